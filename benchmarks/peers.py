# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Arms of `speculators` 0.9.0 on our tensors and our weights. The only file that knows its API; nothing here changes what
it computes. Without the package its arms are left out, and a line says so.

On CUDA it runs at its best, with the defaults of its own training: flex attention, fused losses (Triton), compiled
forwards. None of the three exists on the CPU, where it runs what it has there: sdpa with a dense mask, eager losses.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from inspect import signature
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, Qwen3Config

from benchmarks.arms import Report


VERSION = "0.9.0"
_SHAPE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps rope_parameters hidden_act pad_token_id bos_token_id eos_token_id"
).split()

_BLOCK_SETTINGS = (
    "block_size mask_token_id sample_from_anchor markov_rank enable_confidence_head confidence_head_with_markov "
    "conv_kernel_size conv_group_size selector_rank selector_top_k"
).split()

# What it imports to talk to servers, with the parts it names.
_CLIENTS = {"openai": ("types", "types.chat", "types.completion"), "hs_connectors": ()}
# Suites whose output says already how speculators runs.
_SAID: set[str] = set()


def has_speculators(report: Report) -> bool:
    """Whether the arms of speculators can run; if not, say why."""
    if importlib.util.find_spec("speculators") is None:
        report.say("  speculators is not installed: its arms are left out (see `make conformance`)")
        return False
    found = importlib.metadata.version("speculators")
    if found != VERSION:
        report.say(f"  speculators {found} is installed, {VERSION} is compared: its arms are left out")
        return False
    stand_in_for_clients()
    if report.suite not in _SAID:
        _SAID.add(report.suite)
        report.say(describe(report.settings.get("device", "cpu")))
    return True


def stand_in_for_clients() -> None:
    """
    Put empty modules where speculators imports clients of servers, if they are not installed: its models use none.
    """
    for name, parts in _CLIENTS.items():
        if importlib.util.find_spec(name) is None:
            for part in (name, *(f"{name}.{part}" for part in parts)):
                # With a spec, because others look for the module by it; `str`, because settings are typed with it.
                options = {"__spec__": ModuleSpec(part, None), "__path__": [], "HiddenStatesBackend": str}
                sys.modules[part] = mock.MagicMock(**options)


def attention_on(device: torch.device) -> str:
    """Return the best of speculators' attentions that runs on a device; flex needs a compiler for the backward."""
    return "simple_flex_attention" if device.type == "cuda" else "sdpa"


def losses_on(device: torch.device) -> str:
    """Return the best of speculators' implementations of losses that runs on a device."""
    return "fused" if device.type == "cuda" else "eager"


def describe(device: str | torch.device) -> str:
    """Return what speculators' arms run with on a device, for the output."""
    device = torch.device(device)
    # `conditional_torch_compile` of speculators decides so when it is imported.
    forward = "compiled" if torch.cuda.is_available() else "not compiled"
    kinds = f"{attention_on(device)}, {losses_on(device)} losses, forward {forward}"
    return f"  speculators {VERSION} on {device.type}: {kinds}"


def ttt_attention(
    queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], scaling: float
) -> list[Tensor]:
    """
    Run the attention of all TTT steps over one document as `Eagle3DraftModel` does on this device.

    Args:
        queries, keys, values (`Sequence[torch.Tensor]` of shape `(1, h, L, d)`): One per step, positions rotated in.
        scaling (`float`): Factor on the scores.

    Returns:
        `list[torch.Tensor]` of shape `(1, L, h * d)`, one per step.
    """
    from speculators.models.attention import ALL_ATTENTION_FUNCTIONS
    from speculators.models.eagle3 import attention
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    length, device = queries[0].shape[2], queries[0].device
    document_ids = torch.zeros(length, dtype=torch.long, device=device)
    mask_mod = attention.create_combined_mask_mod(document_ids, length)
    name = attention_on(device)
    make_mask = create_block_mask if name == "simple_flex_attention" else create_mask
    mask = make_mask(mask_mod, B=None, H=None, Q_LEN=length, KV_LEN=length, device=device)
    attend = ALL_ATTENTION_FUNCTIONS[name]
    if name == "simple_flex_attention":
        # As inside of its compiled forward; uncompiled, flex attention writes the scores out.
        attend = torch.compile(attend)
    module = SimpleNamespace(
        num_key_value_groups=queries[0].shape[1] // keys[0].shape[1], is_causal=True, training=True
    )
    cache, outputs = DynamicCache(), []
    for query, key, value in zip(queries, keys, values, strict=True):
        all_keys, all_values = cache.update(key, value, 0)
        mixed, _ = attend(module, query, all_keys, all_values, mask, dropout=0.0, scaling=scaling)
        outputs.append(mixed.flatten(2))
        if name == "simple_flex_attention":
            mask = attention.extend_mask_for_draft_tokens(mask)
        else:
            mask = attention.extend_dense_mask_for_draft_tokens(mask, length)
    return outputs


def forward_kl(logits: Tensor, targets: Tensor) -> Tensor:
    """Return speculators' forward KL per position, `(1, N)`, of logits `(1, N, V)`."""
    from speculators.losses import resolve_loss_config

    loss, _ = resolve_loss_config("kl_div", losses_on(logits.device))["kl_div"]
    return loss(logits, targets)


@dataclass(frozen=True)
class PackedBatch:
    """
    Texts joined into one row, as the data pipeline of speculators hands them to its models.

    Attributes:
        input_ids, document_ids, loss_mask, position_ids (`torch.Tensor` of shape `(1, n)`): Tokens, their texts, which
        are supervised.
        features (`torch.Tensor` of shape `(1, n, F)`): The target's tapped layers.
        last_hidden (`torch.Tensor` of shape `(1, n, H)`): The target's last layer, before its final norm.
    """

    input_ids: Tensor
    document_ids: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    features: Tensor
    last_hidden: Tensor

    def arguments(self) -> dict[str, Tensor]:
        """Return the keyword arguments of both models."""
        return {
            "hidden_states": self.features,
            "input_ids": self.input_ids,
            "document_ids": self.document_ids,
            "loss_mask": self.loss_mask,
            "position_ids": self.position_ids,
            "verifier_last_hidden_states": self.last_hidden,
        }


def pack(
    texts: Sequence[Tensor], marks: Sequence[Tensor], features: Tensor, last_hidden: Tensor, family: str
) -> PackedBatch:
    """
    Join texts; EAGLE-3's are shifted by speculators' own function, which pairs a feature with the token behind it.

    Args:
        texts (`Sequence[torch.LongTensor]`), marks (`Sequence[torch.BoolTensor]`):
            Each text, and which tokens are supervised.
        features (`torch.Tensor` of shape `(T, F)`), last_hidden (`torch.Tensor` of shape `(T, H)`):
            Reading of the texts, end to end, the latter before the target's final norm.
        family (`str`): The drafter's.
    """
    from speculators.models.eagle3.data import shift_batch

    rows = []
    lengths = [len(ids) for ids in texts]
    states = zip(features.split(lengths), last_hidden.split(lengths), strict=True)
    for ids, mark, (own_features, own_hidden) in zip(texts, marks, states, strict=True):
        row = {
            "input_ids": ids,
            "hidden_states": own_features,
            "verifier_last_hidden_states": own_hidden,
            "loss_mask": mark,
            "lengths": torch.tensor([len(ids)], device=ids.device),
            "position_ids": torch.arange(len(ids), device=ids.device),
        }
        rows.append(shift_batch(row) if family == "eagle3" else row)
    joined = {name: torch.cat([row[name] for row in rows])[None] for name in rows[0]}
    lengths = joined["lengths"][0]
    documents = torch.arange(len(rows), device=lengths.device).repeat_interleave(lengths)
    return PackedBatch(
        input_ids=joined["input_ids"],
        document_ids=documents[None],
        loss_mask=joined["loss_mask"],
        position_ids=joined["position_ids"],
        features=joined["hidden_states"],
        last_hidden=joined["verifier_last_hidden_states"],
    )


def make_model(drafter: PreTrainedModel, target: PreTrainedModel, *, trains_head: bool) -> nn.Module:
    """
    Build speculators' model of the drafter's family with the drafter's own weights, on the target's device.

    Args:
        drafter, target (`PreTrainedModel`): The pair; the target has a linear head behind a final norm.
        trains_head (`bool`): Whether EAGLE-3's head needs a gradient; speculators' own training leaves it frozen.
    """
    config, device = drafter.config, target.device
    attention = attention_on(device)
    shape = {name: getattr(config, name) for name in _SHAPE} | {"attention_bias": False, "attention_dropout": 0.0}
    if config.family == "eagle3":
        from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

        layers = LlamaConfig(**shape, attn_implementation=attention)
        flags = {
            name: getattr(config, name)
            for name in ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
        }
        options = {"eagle_aux_hidden_state_layer_ids": list(config.target_layer_ids)} | flags
        settings: Any = Eagle3SpeculatorConfig(
            transformer_layer_config=layers, draft_vocab_size=config.vocab_size, **options
        )
        kind: Any = Eagle3DraftModel
    else:
        from speculators.models import dflash, dflash2, dspark

        # Its classes of whole blocks have our names.
        module, name = {"dflash": dflash, "dflash2": dflash2, "dspark": dspark}[config.family], type(drafter).__name__
        kind, settings_kind = getattr(module, name), getattr(module, name.replace("DraftModel", "SpeculatorConfig"))
        layers = Qwen3Config(**shape, attn_implementation=attention)
        options = {each: getattr(config, each) for each in _BLOCK_SETTINGS if hasattr(config, each)}
        options["aux_hidden_state_layer_ids"] = list(config.target_layer_ids)
        settings = settings_kind(transformer_layer_config=layers, draft_vocab_size=config.vocab_size, **options)
    # Where it is to be: a CPU takes a minute to draw what is overwritten next.
    with device:
        model = kind(settings)
    own = {name.replace("midlayer.", "layers.0."): value for name, value in drafter.state_dict().items()}
    head = target.get_output_embeddings().weight.detach()
    own |= {"embed_tokens.weight": target.get_input_embeddings().weight.detach(), "verifier_lm_head.weight": head}
    own |= {"verifier_norm.weight": target.base_model.norm.weight.detach()}
    own.setdefault("lm_head.weight", head)
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected and all("rotary" in name for name in missing), (missing, unexpected)
    model.lm_head.weight.requires_grad_(trains_head and config.family == "eagle3")
    return model.to(device).train()


def eagle3_loss(model: nn.Module, batch: PackedBatch, ttt_steps: int) -> Tensor:
    """Return the loss of `Eagle3DraftModel`: per step a mean over supervised positions, summed over steps."""
    from speculators.losses import resolve_loss_config

    config = resolve_loss_config("kl_div", losses_on(batch.features.device))
    return model(**batch.arguments(), ttt_steps=ttt_steps, ttt_step_loss_decay=1.0, loss_config=config)[1]


def dflash_anchors(batch: PackedBatch, num_anchors: int, block_size: int, seed: int) -> Tensor:
    """
    Return the anchors `dflash_loss` draws with this seed, positions in the packed row; no more are asked than there
    are.
    """
    from speculators.models.dflash.utils import select_anchors

    torch.manual_seed(seed)
    anchors, is_valid = select_anchors(batch.loss_mask, num_anchors, block_size)
    return anchors[is_valid]


def dflash_loss(
    model: nn.Module, batch: PackedBatch, num_anchors: int, gamma: float, seed: int, loss: str = "kl_div"
) -> Tensor:
    """
    Return the loss of `DFlashDraftModel` and of the classes that extend it, in which `loss` is that of the head: slots
    weighed by `exp(-(k - 1) / gamma)`, divided by their plain number.
    """
    from speculators.losses import resolve_loss_config

    torch.manual_seed(seed)
    losses = losses_on(batch.features.device)
    options: dict[str, Any] = {"loss_config": resolve_loss_config(loss, losses)}
    if "tv_loss_fn" in signature(type(model).forward).parameters:
        # Of the acceptance that it foresees, or only reports.
        options["tv_loss_fn"] = resolve_loss_config("tv", losses)["tv"][0]
    return model(**batch.arguments(), max_anchors=num_anchors, gamma=gamma, **options)[1]
