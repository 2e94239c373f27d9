# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Training a LoRA adapter in place of the whole drafter: make it, save it, load its weights, merge it.

An adapted drafter is a [`~peft.PeftModel`], which passes every call it does not know to the drafter inside, whose
layers apply the adapter. So it is a [`Drafter`] to everything that calls one.
"""

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from ..drafters.auto import AutoDrafter
from ..drafters.base import Drafter
from ..drafters.merging import merge
from ..drafters.published.adapter import ADAPTER_WEIGHTS_FILE, LORA_FIELDS, require_peft
from ..drafters.published.checkpoint import check_weight, read_safetensors
from ..runs.distributed.launch import is_sharded


if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig


# The others rewrite the drafter's own weights, so that the adapter's file would not fit the drafter it names.
_INITIALISATIONS = (True, False, "gaussian")


def adapt_drafter(drafter: Drafter, peft_config: "PeftConfig | None", *, seed: int) -> Drafter:
    """
    Put a fresh adapter into a drafter's layers and freeze everything else; with `peft_config=None` return it as it is.

    The drafter must equal the one that its config names: an adapter's file is useless without it. Without
    `target_modules`, or with `"all-linear"`, the adapter goes into every linear layer but the heads. Its parameters
    are float32, drawn by `seed`; until the first update the result drafts as the drafter does, bit for bit, unless
    `init_lora_weights=False` asks for something else.
    """
    if peft_config is None:
        return drafter
    peft = require_peft("Training with `peft_config`")
    config = _checked(peft_config, drafter, peft.LoraConfig)
    base = _checked_base(drafter)
    # The draws must not move those of whatever comes next; adapters are made on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(drafter, config)
    # PEFT looks for it where drafters do not have it.
    adapted.peft_config["default"].base_model_name_or_path = base
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ValueError("`peft_config` has `inference_mode=True`, so nothing would be trained. Leave it out.")
    return adapted


def _checked(peft_config: "PeftConfig", drafter: Drafter, lora_config: "type[LoraConfig]") -> "LoraConfig":
    """Return a copy of a config that a drafter can take, its layers named; raise `ValueError` if it cannot."""
    if getattr(peft_config, "is_prompt_learning", False) or not isinstance(peft_config, lora_config):
        raise ValueError(
            f"`peft_config` is a {type(peft_config).__name__}. A drafter takes `peft.LoraConfig` only, which can be "
            "merged into it."
        )
    if peft_config.task_type is not None:
        raise ValueError(
            f"`peft_config` has task_type {peft_config.task_type!r}, but a drafter neither generates nor classifies: "
            "leave `task_type` out."
        )
    defaults = lora_config()
    names = [field.name for field in dataclasses.fields(peft_config) if field.name not in LORA_FIELDS]
    unknown = [name for name in names if getattr(peft_config, name) != getattr(defaults, name, None)]
    if unknown:
        raise ValueError(f"`peft_config` sets {unknown}, which drafters do not support. Leave them at their defaults.")
    if peft_config.init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"`init_lora_weights` {peft_config.init_lora_weights!r} rewrites the drafter's own weights, which the "
            f"adapter's file does not hold. Use one of {_INITIALISATIONS}."
        )
    config = copy.deepcopy(peft_config)
    _name_layers(config, drafter)
    if config.modules_to_save and drafter.dtype != torch.float32:
        raise ValueError(
            f"`modules_to_save` trains whole layers in float32, but the drafter is in {drafter.dtype}. Load it in "
            "float32, or use `target_modules` alone."
        )
    return config


def _name_layers(config: "LoraConfig", drafter: Drafter) -> None:
    """Fill in the layers a config leaves to us; raise `ValueError` at some that the drafter does not have."""
    linear = {name for name, module in drafter.named_modules() if isinstance(module, nn.Linear)}
    if config.target_modules in (None, "all-linear"):
        layers = {name for name in linear if not any(part in name for part in drafter.names_of_heads)}
        config.target_modules = sorted({name.split(".")[-1] for name in layers})
    asked = {"target_modules": linear, "modules_to_save": {name for name, _ in drafter.named_modules()}}
    for setting, known in asked.items():
        wanted = getattr(config, setting) or ()
        # A regular expression is PEFT's to match; it raises where nothing fits.
        names = [] if isinstance(wanted, str) else wanted
        missing = [name for name in names if not any(f".{module}".endswith(f".{name}") for module in known)]
        if missing:
            leaves = sorted({name.split(".")[-1] for name in known if name} - {str(i) for i in range(len(known))})
            raise ValueError(
                f"`{setting}` names {sorted(missing)}, which this {drafter.config.family} drafter does not have. It "
                f"has {leaves}."
            )


def _checked_base(drafter: Drafter) -> str:
    """Return the folder or id a drafter was loaded from; raise `ValueError` if it differs from what is there."""
    name = drafter.config.name_or_path
    fix = "Save it with `drafter.save_pretrained(FOLDER)` and give the folder as `model` (`--drafter`)."
    if not name:
        raise ValueError(
            f"With `peft_config` only the adapter is saved, but the drafter under it was never saved. {fix}"
        )
    own = drafter.state_dict()
    there = AutoDrafter.from_pretrained(
        name, dtype=drafter.dtype, num_target_layers=drafter.config.num_target_layers
    ).state_dict()
    if own.keys() != there.keys() or any(not torch.equal(own[key].cpu(), there[key]) for key in own):
        raise ValueError(
            "With `peft_config` only the adapter is saved, but the drafter under it has been trained since it was "
            f"loaded from {name!r}. {fix}"
        )
    return name


def is_adapted(model: nn.Module) -> bool:
    """Whether a drafter without its distributed wrapper has an adapter."""
    return hasattr(model, "peft_config")


def check_adapter_launch(model: nn.Module, accelerator: Accelerator) -> None:
    """Raise `ValueError` where an adapted drafter would be sharded."""
    if is_adapted(model) and is_sharded(accelerator):
        raise ValueError(
            "`peft_config` under FSDP or ZeRO-3 is not supported: an adapter leaves little to shard. Launch with "
            "plain data parallelism (DDP) or ZeRO-2."
        )


def merged_drafter(model: Drafter) -> Drafter:
    """Return a drafter with its adapter, if it has one, merged into a copy; `model` is not changed."""
    return merge(model) if is_adapted(model) else model


def adapter_settings(model: Any) -> dict[str, Any]:
    """Return what a training record states about an adapter: nothing where there is none."""
    if not is_adapted(model):
        return {}
    config = model.peft_config["default"]
    names = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    return {"lora_r": config.r} | {name: getattr(config, name) for name in names}


def save_drafter(model: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """
    Save a drafter without its distributed wrapper; of an adapted one the adapter alone, with the drafter's config.

    `state_dict` is the model's, where it had to be gathered.
    """
    if not is_adapted(model):
        model.save_pretrained(folder, state_dict=state_dict)
        return
    # Not `PeftModel.save_pretrained`, which writes a card of its own, and the whole head where the adapter touches it.
    tensors = _adapter_tensors(model, state_dict)
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    # What it states about the target is this training's, not the base's.
    model.config.save_pretrained(folder)


def _adapter_tensors(model: Drafter, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    peft = require_peft("Saving an adapter")
    tensors = peft.get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_adapter_weights(model: Drafter, folder: str | Path) -> None:
    """Load what [`save_drafter`] saved of an adapter into a drafter with an adapter of the same config."""
    path = Path(folder) / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {ADAPTER_WEIGHTS_FILE}. Was it trained without `peft_config`?"
        )
    tensors, own = read_safetensors(path), _adapter_tensors(model)
    shapes, wanted = ({name: tuple(t.shape) for name, t in group.items()} for group in (tensors, own))
    wrong = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    if wrong:
        raise ValueError(
            f"The adapter in {str(folder)!r} has another `peft_config` than this run: {len(wrong)} tensors differ in "
            f"name or shape, the first is {wrong[0]!r} ({shapes.get(wrong[0])} there, {wanted.get(wrong[0])} here)."
        )
    for name, tensor in tensors.items():
        check_weight(name, tensor)
    require_peft("Loading an adapter").set_peft_model_state_dict(model, tensors)
