# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The pair that a run trains: loading drafter and target, and checking that they, the tokenizer, the data and
`output_dir` belong together.
"""

import copy
import json
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from ..data.text_reader import TextReader
from ..drafters.auto import AutoDrafter
from ..drafters.base import Drafter
from ..drafters.published.checkpoint import CONFIG_FILE
from ..drafters.published.configs import parse_drafter_config
from ..drafters.target_shape import check_layer_ids
from ..export import hub_id_of
from ..export.record import TrainingRecord, read_record
from ..export.serving import SERVING_FILE
from ..readings.manifest import holds_readings
from ..responses.store import is_store
from ..target.frozen import FrozenTarget
from ..target.placement import check_placement, load_in_turns
from ..utils.atomic_files import check_place
from .adapters import adapt_drafter, is_adapted
from .common_config import DraftTrainingConfig, parsed


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = logging.getLogger(__name__)

# Files by which a tokenizer lies in a folder.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Pair:
    """
    A drafter and the target it drafts for, checked against each other; the drafts per block in rollouts and
    evaluation; and the record of the runs that made the drafter, if one trained this instance or lies in the folder it
    was loaded from.

    An adapted drafter is a [`~peft.PeftModel`], which passes every call it does not know to the drafter inside.
    """

    target: FrozenTarget
    drafter: Drafter
    num_drafts: int
    earlier: TrainingRecord | None


def load_pair(
    model: str | Path | Drafter,
    target: "str | Path | PreTrainedModel | PeftModel | FrozenTarget",
    args: DraftTrainingConfig,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: "PeftConfig | None",
) -> Pair:
    """
    Load what a trainer is given, and write into the drafter's config which target it is for. Collective if the target
    is to be sharded.
    """
    # Before anything is loaded: what is trained could not be saved.
    check_place(args.output_folder, "`output_dir`")
    frozen = load_target(target, args, processing_class)
    drafter = load_drafter(model, frozen, args)
    drafter.config.num_target_layers = frozen.num_layers
    if frozen.config.name_or_path or frozen.is_merged:
        # A merged instance has no name, and is not the base that a drafter may name.
        drafter.config.target_model_name_or_path = frozen.config.name_or_path or None
        drafter.config.target_model_revision = args.target_revision
    num_drafts = drafter.default_num_drafts if args.num_drafts is None else args.num_drafts
    earlier = _earlier_record(drafter)
    return Pair(frozen, adapt_drafter(drafter, peft_config, seed=args.seed), num_drafts, earlier)


def _earlier_record(drafter: Drafter) -> TrainingRecord | None:
    """Return the record of the runs that made a drafter, in this process or in the folder it was loaded from."""
    name, record = drafter.config.name_or_path, drafter.training_record
    if record is None and name and Path(name).is_dir():
        record = read_record(name)
    if record is None:
        return None
    return replace(record, measurements=[replace(measured, after_steps=None) for measured in record.measurements])


def load_target(
    target: "str | Path | PreTrainedModel | PeftModel | FrozenTarget",
    args: DraftTrainingConfig,
    processing_class: PreTrainedTokenizerBase | None,
) -> FrozenTarget:
    """
    Load or wrap the target as the config states, by name without its body where `readings` stand in for it; raise
    `ValueError` where the launch has no use for it. Collective if it is to be sharded.
    """
    shard = args.shard_target and args.world_size > 1
    if args.shard_target and not shard:
        logger.warning("`shard_target=True` has no effect with one process: the target stays whole.")

    def load() -> FrozenTarget:
        frozen = FrozenTarget.load(
            target,
            dtype=args.target_dtype,
            revision=args.target_revision,
            trust_remote_code=args.trust_remote_code,
            tokenizer=processing_class,
            init_kwargs=parsed(args.target_init_kwargs),
            body=args.readings is None or not isinstance(target, str | Path),
        )
        check_placement(frozen.causal_lm, shard=args.shard_target, num_processes=args.world_size)
        if shard and not frozen.is_sharded:
            frozen.shard(args.device)
        return frozen

    frozen = load_in_turns(load) if shard else load()
    if processing_class is not None:
        check_tokenizer(processing_class, frozen.config.name_or_path)
        frozen.tokenizer = processing_class
    return frozen


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | None) -> None:
    """Raise `ValueError` if a tokenizer gives a token another id than the one that lies beside the target."""
    if not folder or not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        return
    own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    given = tokenizer.get_vocab()
    tokens = {index: token for token, index in own.items()}
    moved = [
        token for token, index in given.items() if own.get(token, index) != index or tokens.get(index, token) != token
    ]
    if moved:
        token = min(moved, key=lambda token: given[token])
        raise ValueError(
            f"`processing_class` is another model's tokenizer: id {given[token]} is {token!r} there and "
            f"{tokens.get(given[token])!r} in the target's own, in {folder!r}. {len(moved)} tokens differ. Leave "
            "`processing_class` out, or load it from the target."
        )


def load_drafter(model: str | Path | Drafter, target: FrozenTarget, args: DraftTrainingConfig) -> Drafter:
    """Load the drafter, or take the instance, and check that it fits the target and the run."""
    if isinstance(model, (str, Path)):
        model = AutoDrafter.from_pretrained(model, num_target_layers=target.num_layers)
    if is_adapted(model):
        raise ValueError(
            f"`model` is a {type(model).__name__} with an adapter in it already. Give the plain drafter and a "
            "`peft_config`, or the folder the adapter was saved in, to continue with it merged in."
        )
    if not isinstance(model, Drafter):
        raise TypeError(
            f"`model` must be a drafter, its id or its path, got {type(model).__name__}. Make a fresh one with "
            "the `from_target(target, ...)` of a family's class, such as `Eagle3DraftModel.from_target(target)`."
        )
    check_pair(model, target)
    if args.num_drafts is not None and model.max_drafts is not None and args.num_drafts > model.max_drafts:
        raise ValueError(
            f"`num_drafts` {args.num_drafts} exceeds the {model.max_drafts} drafts of the drafter's blocks. Lower it, "
            "or make a drafter with a larger `block_size`."
        )
    check_output_content(args.output_folder, model, target)
    return model


def check_output_content(folder: Path, drafter: Drafter, target: FrozenTarget) -> None:
    """Raise `ValueError` at a folder in which a save would replace something else than a drafter for this target."""
    where, fix = f"`output_dir` {str(folder)!r} holds", "Nothing there was touched: give another `output_dir`."
    if (folder / SERVING_FILE).is_file():
        raise ValueError(f"{where} an export, of which a save would replace one layout alone. {fix}")
    if holds_readings(folder):
        raise ValueError(f"{where} readings. {fix} To train from them, name the folder in `readings`.")
    if is_store(folder):
        raise ValueError(f"{where} responses. {fix} To train on them, name the folder in `responses`.")
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return  # There is none, or a save that was cut off left it; it is written again.
    try:
        held = parse_drafter_config(raw, num_target_layers=None)
    except ValueError as error:
        raise ValueError(
            f"{where} a model that a save would replace, and it is no drafter of this package: {error} {fix}"
        ) from error
    theirs = _describe_pair(held.family, held.arguments)
    ours = _describe_pair(drafter.config.family, drafter.config.to_dict() | {"num_target_layers": target.num_layers})
    ours["target"] = hub_id_of(target.config.name_or_path)
    differ = [
        f"its {name} is {theirs[name]!r}, here it is {value!r}"
        for name, value in ours.items()
        if None not in (value, theirs[name]) and value != theirs[name]
    ]
    if differ:
        raise ValueError(f"{where} a drafter of another family or target: {'; '.join(differ)}. {fix}")


def _describe_pair(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return what tells drafters of different families and targets apart."""
    sizes = {name: config.get(name) for name in ("vocab_size", "hidden_size", "num_target_layers")}
    return {"family": family, "target": hub_id_of(config.get("target_model_name_or_path"))} | sizes


def check_pair(drafter: Drafter, target: FrozenTarget) -> None:
    """Raise `ValueError` unless a drafter was made for this target."""
    config, name = drafter.config, type(drafter).__name__
    if config.vocab_size != target.vocab_size:
        raise ValueError(
            f"The drafter has vocab_size {config.vocab_size} but the target has {target.vocab_size}. Both must share "
            f"one tokenizer. Build the drafter with `{name}.from_target(target)`."
        )
    if config.target_hidden_size != target.config.hidden_size:
        raise ValueError(
            f"The drafter reads features of width {config.target_hidden_size} per layer but the target's hidden size "
            f"is {target.config.hidden_size}. Build a drafter with `{name}.from_target(target)`."
        )
    if config.num_target_layers is not None and config.num_target_layers != target.num_layers:
        raise ValueError(
            f"The drafter's layer ids {config.target_layer_ids} belong to a target of {config.num_target_layers} "
            f"layers, but this one has {target.num_layers}. Build a drafter with `{name}.from_target(target)`."
        )
    check_layer_ids(config.target_layer_ids, target.num_layers)


def text_reader(target: FrozenTarget, args: DraftTrainingConfig, *, max_length: int | None) -> TextReader:
    """Return the reader of a run's datasets; raises `ValueError` if the target has no tokenizer that fits it."""
    return target.text_reader(
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
        max_prompt_length=args.max_prompt_length,
        max_length=max_length,
        num_proc=args.dataset_num_proc,
    )


def check_mask_token(
    drafter: Drafter, target: FrozenTarget, dataset: Dataset | IterableDataset, column: str
) -> Dataset | IterableDataset:
    """
    Raise `ValueError` if the drafter's mask token is a special token of the target, or occurs in the data; a stream,
    which is returned, is checked as its rows are read.
    """
    mask_token_id = getattr(drafter.config, "mask_token_id", None)
    if mask_token_id is None:
        return dataset
    names: Any = target.config if target.tokenizer is None else target.tokenizer
    if mask_token_id in {*target.eos_token_ids, names.pad_token_id, names.bos_token_id}:
        raise ValueError(
            f"`mask_token_id` {mask_token_id} is an eos, bos or pad token of the target. Choose an id that text never "
            "uses."
        )
    check = partial(_refuse_mask_token, mask_token_id=mask_token_id, column=column)
    if isinstance(dataset, IterableDataset):
        return dataset.map(check, features=dataset.features)
    for ids, row in zip(dataset[column], dataset["sample_id"], strict=True):
        check({column: ids, "sample_id": row})
    return dataset


def _refuse_mask_token(row: dict[str, Any], *, mask_token_id: int, column: str) -> dict[str, Any]:
    if mask_token_id in row[column]:
        raise ValueError(
            f"`mask_token_id` {mask_token_id} occurs in the data (row {row['sample_id']}): choose an id that text "
            "never uses."
        )
    return row


def compile_drafter(drafter: Drafter, args: DraftTrainingConfig) -> DraftTrainingConfig:
    """
    Compile the drafter's feed-forward and norm layers in place if `torch_compile` asks for it.

    The attention is fused already, and heads and losses run in chunks outside of the drafter. Returns the settings for
    transformers' Trainer, which must not compile the drafter as a whole: its forward is redirected to the step.
    """
    if not args.torch_compile:
        return args
    for module in drafter.modules():
        if isinstance(module, (LlamaMLP, LlamaRMSNorm, Qwen3MLP, Qwen3RMSNorm)):
            # Rollouts and steps differ in the number of rows every time.
            module.compile(
                backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode, dynamic=True
            )
    args = copy.copy(args)
    args.torch_compile_backend = args.torch_compile_mode = None
    return args
