# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Proves, on a few short texts, that a server's states are the target's.

1. The server's own log-probabilities of the texts against `project(norm(last state))`: the final norm, the head, and
   that the last state is the one before the norm. Needs no body.
2. Each state against the outputs of all layers: its own layer must be the nearest, which tells a layer beside it and
   layers in another order, and near enough, which tells other weights. Outputs come from the target's body; without
   one, from the checkpoint's layers, read from the disk one at a time.

Shape letters:  L = text length, N = the target's layers, S = served states of a token, V = vocabulary, H = hidden size
"""

import tempfile
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..responses.protocols import WrongReply
from ..target.checks import find_layers
from ..target.frozen import FrozenTarget
from ..target.probes import is_quantized
from ..utils.console import hiding_log_lines


_LENGTHS = (48, 31)
_SENTENCES = (
    "A train leaves at nine in the morning and travels 120 kilometres in an hour and a half. Its driver stops twice, "
    "for five minutes each time, and still arrives on time. How fast does it travel between the stops?",
    "def greatest(numbers):\n    best = numbers[0]\n    for number in numbers[1:]:\n        if number > best:\n"
    "            best = number\n    return best\n",
)
# Of the largest logit, in steps of the precision: head and norm round in another order on the server. Seen of vLLM
# 0.32 in bfloat16: 0.04 on average and 0.3 at most.
_MEAN_STEPS, _MOST_STEPS = 0.25, 2.0
# Without steps: matrix products of float32 in TF32.
_MEAN_LEAST, _MOST_LEAST = 2e-3, 1e-2
# Distance of a state from the same layer's in process, as a share of its length: every layer below adds its rounding.
# Seen of vLLM 0.32 in bfloat16: 0.009 after 8 layers, and at least 0.2 to a layer beside it.
_NEAR = {torch.float32: 1e-2, torch.bfloat16: 0.06, torch.float16: 0.03}
# Kernels of quantised layers round their inputs, too.
_NEAR_QUANTIZED = 0.2


def probe_texts(target: FrozenTarget, most_tokens: int | None) -> list[list[int]]:
    """Return a few texts, as token ids, of at most `most_tokens` tokens."""
    texts = []
    for sentence, length in zip(_SENTENCES, _LENGTHS, strict=True):
        ids: list[int] = []
        if target.tokenizer is not None:
            ids = list(target.tokenizer(sentence, add_special_tokens=False, verbose=False)["input_ids"])
        if len(set(ids)) < length // 2:
            # No tokenizer, or one that does not know these letters.
            usable = sorted(set(range(target.vocab_size)) - target.special_token_ids)
            ids = [usable[(7 * i * i + 3 * i + length) % len(usable)] for i in range(length)]
        texts.append(ids[: min(length, most_tokens or length)])
    return texts


@torch.no_grad()
def check_head(
    target: FrozenTarget, text: Sequence[int], last_states: torch.Tensor, logprobs: Sequence[float]
) -> None:
    """
    Compare the server's log-probabilities of a text's tokens, from the second on, with those of our head behind our
    final norm on its last states `(L, H)`.

    Raises:
        WrongReply: If they differ by more than the precision explains.
    """
    logits = target.project(target.norm(last_states[:-1].to(target.device))).float()
    ours = logits.log_softmax(-1).cpu()[range(len(text) - 1), list(text[1:])]
    off = (ours - torch.tensor(logprobs)).abs()
    step = torch.finfo(last_states.dtype).eps * logits.abs().max().item()
    mean, most = max(_MEAN_LEAST, _MEAN_STEPS * step), max(_MOST_LEAST, _MOST_STEPS * step)
    # So that NaN fails.
    if not (off.mean() <= mean and off.max() <= most):
        raise WrongReply(
            f"its log-probabilities of a text differ from those of the target's norm and head on its last state by "
            f"{off.mean():.2g} on average and {off.max():.2g} at most ({mean:.2g} and {most:.2g} are explained by "
            f"{last_states.dtype}). It serves other weights than the target's, or its last state is not the last "
            "layer's output"
        )


@torch.no_grad()
def check_layers(
    target: FrozenTarget, states: torch.Tensor, served_layers: Sequence[int], outputs: torch.Tensor
) -> None:
    """
    Compare the states `(L, S, H)` of a text with the outputs `(L, N, H)` of all layers on it; `served_layers` are the
    layers, as we count them, that the states are of.

    Raises:
        WrongReply: If a state is nearest to another layer's output, or too far from its own.
    """
    outputs = outputs.float()
    lengths = outputs.norm(dim=-1)
    near = _NEAR_QUANTIZED if is_quantized(target.causal_lm) else _NEAR[states.dtype]
    for place, layer in enumerate(served_layers):
        distances = (outputs - states[:, place, None].float()).norm(dim=-1) / lengths
        # The median: first tokens have states that are hundreds of times as long.
        by_layer = distances.median(dim=0).values
        found = int(by_layer.argmin())
        if found != layer:
            raise WrongReply(
                f"its state {place} is the output of layer {found} (off by {by_layer[found]:.2g} of its length), and "
                f"not of layer {layer} (off by {by_layer[layer]:.2g})"
            )
        if not by_layer[layer] <= near:
            raise WrongReply(
                f"its state {place} differs from the output of the target's layer {layer} by {by_layer[layer]:.2g} of "
                f"its length, and {near:.2g} is explained by {states.dtype}: it serves other weights than the target's"
            )


def check_alike(states: torch.Tensor, proven: torch.Tensor) -> None:
    """
    Compare the states `(L, S, H)` of a text with those that were proven to be the target's.

    Raises:
        WrongReply: If a layer's differ by more than the precision explains.
    """
    distances = (states.float() - proven.float()).norm(dim=-1) / proven.float().norm(dim=-1)
    off, near = distances.median(dim=0).values.max(), _NEAR[proven.dtype]
    if not off <= near:
        raise WrongReply(
            f"since it was out of reach its states of a text differ from those that were proven by {off:.2g} of their "
            f"length, and {near:.2g} is explained by {proven.dtype}: another server answers there now"
        )


def read_all_layers(target: FrozenTarget, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """
    Return the outputs `(L, N, H)` of all layers on each text, on the host: of the target's body, else of the layers
    on the disk, one at a time; of those that cannot be run so none, with a warning.
    """
    if target.has_body:
        source, target.source = target.source, None
        try:
            return [_read_in_process(target, text) for text in texts]
        finally:
            target.source = source
    model = target.causal_lm
    name = model.config.name_or_path
    # Merged and quantised layers are not those of the files.
    if target.is_merged or is_quantized(model) or not name:
        kind = "merged from an adapter" if target.is_merged else "quantised or not loaded by its name"
        warnings.warn(
            f"Which layers the servers deliver is not proven, because the target is {kind} and has no body here; its "
            "norm, head and last state are. Start them with the line of `trl-draft-opd read --print-server`."
        )
        return []
    return _read_from_disk(target, name, texts)


def _read_in_process(target: FrozenTarget, text: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([list(text)], device=target.device)
    num_layers = target.num_layers
    reading = target.read_text(ids, torch.ones_like(ids), range(num_layers))
    return reading.features.view(len(text), num_layers, -1).cpu()


def _read_from_disk(target: FrozenTarget, name: str, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Run the checkpoint with its layers left on the disk, from where each comes when it is its turn."""
    backbone = target.causal_lm.base_model
    start = f"{target.causal_lm.base_model_prefix}."
    places: dict[str, int | str] = {
        f"{start}{child}": "disk" if isinstance(module, nn.ModuleList) else "cpu"
        for child, module in backbone.named_children()
    }
    places |= {child: "cpu" for child, module in target.causal_lm.named_children() if module is not backbone}
    # It logs that layers are on the disk, which is the point.
    with tempfile.TemporaryDirectory() as folder, hiding_log_lines("accelerate.big_modeling"):
        # By its own class, so that code beside the weights is that which was trusted.
        model = type(target.causal_lm).from_pretrained(
            name,
            dtype=target.causal_lm.dtype,
            device_map=places,
            offload_folder=folder,
            revision=getattr(target.causal_lm.config, "_commit_hash", None) or "main",
        )
        model.eval()
        layers = find_layers(model.base_model, target.config)
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, arguments: object, output: object) -> None:
            state = output[0] if isinstance(output, tuple) else output
            assert isinstance(state, torch.Tensor)
            found.append(state[0].cpu())

        for layer in layers:
            layer.register_forward_hook(keep)
        readings = []
        with torch.no_grad():
            for text in texts:
                found.clear()
                model.base_model(input_ids=torch.tensor([list(text)]), use_cache=False)
                readings.append(torch.stack(found, dim=1))
    return readings
