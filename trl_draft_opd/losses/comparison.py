# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Compare chunks of the drafter's logits with the target's: by fused kernels where these run, by the eager formulas
elsewhere. Knows no heads and no chunks.

Shape letters:  C = rows of one chunk, S = target states of one chunk, b = rows of one block of a chunk, V = vocabulary
of the target, D = vocabulary of the drafter (`D == V` unless it is reduced)
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import fused
from .divergences import NO_TOKEN, accumulation_dtype, differentiate, differentiate_ce
from .keeping import Verification


@dataclass(frozen=True)
class Target:
    """
    What rows are compared with: the target's logits, or under `ce` only the token it would choose.

    `lost_mass_S` is `None` with a full vocabulary, `statistics_2S` where the eager formulas are used, `text_S` (see
    [`Verification`]) where nobody asks for the chances that drafts are kept.
    """

    logits_SD: Tensor | None
    choices_S: Tensor | None
    lost_mass_S: Tensor | None
    statistics_2S: Tensor | None = None
    text_S: Tensor | None = None


@dataclass(frozen=True)
class Comparison:
    """
    One loss over one vocabulary.

    Args:
        draft_token_ids (`torch.LongTensor` of shape `(D,)`, *optional*): Target ids of the drafter's logits.
        rows_per_block (`int`): Rows that the eager formulas compare at a time: few keep their temporaries small, and
            on the CPU in its cache.
        is_fused (`bool`): Whether the fused kernels are used, as long as they run.
        verification ([`Verification`], *optional*): How drafts are verified, where the chances of it are asked for.
        needs_choices (`bool`): Whether the target's likeliest tokens are asked for, see [`wanted`].
    """

    loss_type: str
    draft_token_ids: Tensor | None
    rows_per_block: int
    is_fused: bool
    verification: Verification | None = None
    needs_choices: bool = False

    def read_target(self, logits_SV: Tensor) -> Target:
        """Take what is needed of the target's logits."""
        if self.verification is None:
            return self._read_loss(logits_SV)
        blocks = self._blocks(len(logits_SV))
        text_S = self.verification.read_text(logits_SV, self.draft_token_ids, blocks)
        return replace(self._read_loss(logits_SV), text_S=text_S)

    def keep_chances(self, logits_CD: Tensor, target: Target, places_C: Tensor) -> Tensor:
        """Return the chance that the draft of each row is kept, `(C,)`; before [`compare`] overwrites its logits."""
        assert self.verification is not None and target.text_S is not None, "asked for"
        blocks = self._blocks(len(logits_CD))
        return self.verification.chances(logits_CD, target.text_S, places_C, self.draft_token_ids, blocks)

    def wanted(self, target: Target | None, places_C: Tensor, labels_C: Tensor | None) -> Tensor:
        """Return the token of each row in the drafter's ids, `(C,)`: its label, or the target's likeliest one."""
        choices_C = None if target is None or target.choices_S is None else target.choices_S[places_C]
        if choices_C is None or labels_C is None:
            wanted_C = labels_C if choices_C is None else choices_C
            assert wanted_C is not None, "read for every loss but `ce`, where it is asked for"
            return wanted_C
        return torch.where(labels_C == NO_TOKEN, choices_C, labels_C)

    def _read_loss(self, logits_SV: Tensor) -> Target:
        """Take what the loss needs."""
        ids, is_ce = self.draft_token_ids, self.loss_type == "ce"
        found = None if not self.is_fused or (ids is None and is_ce) else fused.read_target(logits_SV, ids)
        if found is None:
            logits_SD, lost_mass_S = (logits_SV, None) if ids is None else self._reduce(logits_SV, ids)
            statistics_2S = None
        else:
            logits_SD, statistics_2S, lost_mass_S = found
        choices_S = logits_SD.argmax(dim=1) if is_ce or self.needs_choices else None
        return Target(None if is_ce else logits_SD, choices_S, lost_mass_S, None if is_ce else statistics_2S)

    def _reduce(self, logits_SV: Tensor, draft_token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the drafter's vocabulary, and the probability of all others."""
        logits_SD = logits_SV.new_empty(len(logits_SV), len(draft_token_ids))
        lost_mass_S = logits_SV.new_empty(len(logits_SV), dtype=accumulation_dtype(logits_SV))
        for block in self._blocks(len(logits_SV)):
            probs_bV = logits_SV[block].softmax(1, lost_mass_S.dtype)
            lost_mass_S[block] = 1 - probs_bV.index_select(1, draft_token_ids).sum(dim=1)
            logits_SD[block] = logits_SV[block].index_select(1, draft_token_ids)
        return logits_SD, lost_mass_S

    def compare(
        self,
        logits_CD: Tensor,
        weights_C: Tensor | None,
        target: Target | None,
        places_C: Tensor,
        labels_C: Tensor | None,
    ) -> Tensor:
        """
        Return the losses of a chunk; given weights, overwrite its logits with the gradient of the weighted sum.

        Args:
            places_C (`torch.LongTensor` of shape `(C,)`): Index of each row's state in `target`.
            labels_C (`torch.LongTensor` of shape `(C,)`, *optional*): Under `ce`, tokens in the drafter's ids.
        """
        if labels_C is not None:
            labels_C = self.wanted(target, places_C, labels_C)
        if self.is_fused:
            logits_SD, statistics_2S = (target.logits_SD, target.statistics_2S) if target else (None, None)
            if labels_C is not None or statistics_2S is not None:
                losses_C = fused.differentiate(
                    logits_CD, logits_SD, statistics_2S, places_C, labels_C, weights_C, self.loss_type
                )
                if losses_C is not None:
                    return losses_C
        losses_C = logits_CD.new_empty(len(logits_CD), dtype=accumulation_dtype(logits_CD))
        for block in self._blocks(len(logits_CD)):
            if labels_C is not None:
                found = differentiate_ce(logits_CD[block], labels_C[block])
            else:
                assert target is not None and target.logits_SD is not None, "read for every loss but `ce`"
                target_logits_bD = target.logits_SD.index_select(0, places_C[block])
                found = differentiate(logits_CD[block], target_logits_bD, self.loss_type)
                del target_logits_bD
            losses_C[block], grad_bD = found
            if weights_C is not None:
                torch.mul(grad_bD, weights_C[block].unsqueeze(1).to(grad_bD.dtype), out=logits_CD[block])
            del found, grad_bD  # before the next block's temporaries exist
        return losses_C

    def _blocks(self, num_rows: int) -> list[slice]:
        return [slice(first, first + self.rows_per_block) for first in range(0, num_rows, self.rows_per_block)]
