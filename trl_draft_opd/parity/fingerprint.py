# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A drafter's fingerprint: what it drafts on one fixed text of random tokens, and with which log-probabilities. Two
layouts of one drafter have the same one, whatever the prompts; where they differ, config and tensors are searched for
the reason.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch

from ..drafters.base import Drafter, run_blocks
from ..target.frozen import FrozenTarget


_LENGTH, _STRIDE, _SEED = 96, 4, 20260001
# Same weights and same code give the same bits on one machine; this allows for other kernels.
_CLOSE = 1e-4
# What decides a drafter's computation besides its weights. Names that a family lacks are passed over.
_DECISIVE = (
    "target_layer_ids block_size mask_token_id num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_size intermediate_size hidden_act rms_norm_eps rope_parameters vocab_size draft_vocab_size fc_norm "
    "norm_before_fc norm_before_residual norm_output is_causal"
).split()


@dataclass(frozen=True)
class Fingerprint:
    """
    Attributes:
        drafts (`torch.LongTensor` of shape `(A, K)`): Argmax drafts, as ids of the target's vocabulary.
        logprobs (`torch.Tensor` of shape `(A, K)`): Their log-probabilities under the drafter.
    """

    drafts: torch.Tensor
    logprobs: torch.Tensor


@torch.no_grad()
def take_fingerprint(target: FrozenTarget, drafter: Drafter, num_drafts: int) -> Fingerprint:
    """Draft along a fixed text of random tokens, each slot reading the text and not the drafts before it."""
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(target.vocab_size, (1, _LENGTH), generator=generator).to(target.device)
    features = target.read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids).padded().features
    anchors = torch.arange(_STRIDE, _LENGTH - num_drafts, _STRIDE, device=target.device)
    slots = torch.arange(1, num_drafts + 1, device=target.device)
    recorded = ids[0, anchors[:, None] + slots][None]
    hidden = run_blocks(drafter, features, ids, anchors[None], recorded, target.embed)
    best = drafter.draft_logits(hidden, target.project)[0].float().log_softmax(dim=-1).max(dim=-1)
    return Fingerprint(drafter.to_target_ids(best.indices), best.values)


def describe_gap(own: Fingerprint, other: Fingerprint) -> str | None:
    """Return how two fingerprints differ, or `None` if they do not."""
    num_other = int((own.drafts != other.drafts).sum())
    furthest = float((own.logprobs - other.logprobs).abs().max())
    if not num_other and furthest <= _CLOSE:
        return None
    return (
        f"{num_other} of {own.drafts.numel()} drafts differ on a fixed text, log-probabilities by up to {furthest:.3g}"
    )


def rounded_like(drafter: Drafter, dtype: torch.dtype) -> Drafter:
    """Return a copy of a drafter whose weights went through `dtype`, as an export's do."""
    copy = deepcopy(drafter)
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return copy


def find_reasons(published: Drafter, checkpoint: Drafter) -> list[str]:
    """
    Return in which settings and tensors a published drafter is not its checkpoint, or the checkpoint's bfloat16
    rounding.
    """
    return [*_config_reasons(published, checkpoint), *_tensor_reasons(published, checkpoint)]


def _config_reasons(published: Drafter, checkpoint: Drafter) -> Iterator[str]:
    if published.config.family != checkpoint.config.family:
        yield (
            f"it is a drafter of family {published.config.family}, the checkpoint is one of {checkpoint.config.family}"
        )
        return
    for name in _DECISIVE:
        own, wanted = (getattr(drafter.config, name, None) for drafter in (published, checkpoint))
        if own != wanted:
            what = "it reads the target's layers" if name == "target_layer_ids" else f"its {name} is"
            yield f"{what} {own}, the checkpoint {'those' if name == 'target_layer_ids' else 'has'} {wanted}"


def _tensor_reasons(published: Drafter, checkpoint: Drafter) -> Iterator[str]:
    own, wanted = published.state_dict(), checkpoint.state_dict()
    if set(own) != set(wanted):
        yield f"its tensors are others: {sorted(set(own) ^ set(wanted))}"
        return
    halved, other = [], []
    for name in sorted(own):
        stored, trained = own[name].cpu(), wanted[name].cpu()
        if stored.shape != trained.shape:
            other.append(f"{name} has shape {tuple(stored.shape)} instead of {tuple(trained.shape)}")
        elif not stored.is_floating_point():
            if not torch.equal(stored, trained):
                yield (
                    f"its {name} differs from the checkpoint's in {int((stored != trained).sum())} of {len(trained)} "
                    "entries, so drafts stand for other tokens than in training"
                )
        elif any(_is_rounded(stored, trained, dtype) for dtype in (trained.dtype, torch.bfloat16)):
            continue
        elif _is_rounded(stored, trained, torch.float16):
            halved.append(name)
        else:
            other.append(f"{name} by up to {(stored - trained).abs().max():.3g}")
    if halved:
        yield f"{len(halved)} tensors were rounded to float16, the first {halved[0]!r}; engines read bfloat16"
    if other:
        more = ", ..." if len(other) > 3 else ""
        yield f"{len(other)} tensors differ: {', '.join(other[:3])}{more}; they are from another step, or damaged"


def _is_rounded(stored: torch.Tensor, trained: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(stored, trained.to(dtype).to(stored.dtype))
