# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The chance that the target keeps a draft, which a confidence head is trained to predict. Knows no heads and no chunks.

Shape letters:  C = rows of one chunk, S = target states of one chunk, V = vocabulary of the target, D = of the drafter
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import accumulation_dtype


Distribution = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Verification:
    """
    How drafts come about and are verified, and with it the chance that a draft is kept.

    With `p` what the text is drawn from and `q` what the draft is drawn from, speculative sampling keeps it with the
    chance `sum_v min(p(v), q(v))`. An argmax is a draw from a one-hot distribution, so the same formula gives all
    three cases: the overlap where both are drawn, `p(argmax q)` where drafts are argmax, and 1 or 0, whether the two
    argmaxes agree, where the text is greedy. Source: Leviathan et al., [Fast Inference from Transformers via
    Speculative Decoding](https://huggingface.co/papers/2211.17192), section 3.

    `p` covers the target's whole vocabulary, `q` the drafter's: what the target would say outside of it is never kept.

    Args:
        text (`Callable`, *optional*), drafts (`Callable`, *optional*):
            Turn logits of the target, `(n, V)`, and of the drafter, `(n, D)`, into the probabilities that tokens are
            drawn from; `None` where the argmax is taken. Greedy text has argmax drafts.
    """

    text: Distribution | None
    drafts: Distribution | None

    def __post_init__(self) -> None:
        if self.text is None and self.drafts is not None:
            raise ValueError("Greedy text never has drawn drafts: pass `drafts=None` too.")

    def read_text(self, logits_SV: Tensor, draft_token_ids: Tensor | None, blocks: Sequence[slice]) -> Tensor:
        """
        Return what [`chances`] reads of the target: its probability of each of the drafter's tokens, `(S, D)`, or its
        choice in its own ids, `(S,)`.
        """
        if self.text is None:
            return logits_SV.argmax(dim=1)
        num_logits = logits_SV.shape[1] if draft_token_ids is None else len(draft_token_ids)
        probs_SD = logits_SV.new_empty(len(logits_SV), num_logits, dtype=accumulation_dtype(logits_SV))
        for block in blocks:
            probs_bV = self.text(logits_SV[block])
            probs_SD[block] = probs_bV if draft_token_ids is None else probs_bV.index_select(1, draft_token_ids)
            del probs_bV  # before the next block's exist
        return probs_SD

    def chances(
        self,
        logits_CD: Tensor,
        text_S: Tensor,
        places_C: Tensor,
        draft_token_ids: Tensor | None,
        blocks: Sequence[slice],
    ) -> Tensor:
        """
        Return the chance that the draft of each row is kept, `(C,)`, float32 or float64.

        Args:
            logits_CD (`torch.Tensor` of shape `(C, D)`): The drafter's; `-inf` where a token cannot be drafted.
            text_S (`torch.Tensor`): From [`read_text`].
            places_C (`torch.LongTensor` of shape `(C,)`): Index of each row's state in `text_S`.
        """
        dtype = accumulation_dtype(logits_CD)
        if self.drafts is None:
            drafts_C = logits_CD.argmax(dim=1)
            if self.text is not None:
                return text_S[places_C, drafts_C].to(dtype)
            return ((drafts_C if draft_token_ids is None else draft_token_ids[drafts_C]) == text_S[places_C]).to(dtype)
        chances_C = logits_CD.new_empty(len(logits_CD), dtype=dtype)
        for block in blocks:
            draft_probs_bD = self.drafts(logits_CD[block])
            text_bD = text_S.index_select(0, places_C[block]).to(draft_probs_bD.dtype)
            torch.minimum(draft_probs_bD, text_bD, out=draft_probs_bD)
            chances_C[block] = draft_probs_bD.sum(dim=1)
            del draft_probs_bD, text_bD  # before the next block's exist
        return chances_C.clamp_(max=1)  # sums of rounded probabilities may exceed it
