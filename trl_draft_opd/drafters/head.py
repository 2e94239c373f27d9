# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
From states that are ready for the head to logits, and from the drafter's vocabulary to the target's.

Shape letters:  H = hidden size, W = width of a state that is ready for the head, V = the target's vocabulary, DV = the
                drafter's vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .draft_vocabulary import DraftVocabulary
from .precision import activation_dtype
from .target_model import is_adapted_target, load_target_model, target_chain, whole_model
from .target_shape import scales_logits


Project = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadPart:
    """
    One of the products whose sum are a drafter's logits.

    Attributes:
        module (`nn.Module` or `None`): A linear layer to `(..., DV)`; `None` is the target's head.
        width (`int`): Columns of a hidden state that it reads.
    """

    module: nn.Module | None
    width: int


@dataclass(frozen=True)
class Candidates:
    """
    What chooses among the likeliest tokens of the head: the score of a candidate `b` is its logit and the product of
    its row with the last `R` columns of the hidden state. Other tokens are never drafted.

    Attributes:
        rows (`torch.Tensor` of shape `(DV, R)`): One row per token of the drafter's vocabulary.
        top_k (`int`): Candidates per slot, by the head's logits alone.
    """

    rows: torch.Tensor
    top_k: int


class DraftingHead(PreTrainedModel):
    """The part of a drafter behind its layers: its head or the target's, over all tokens or a part of them."""

    lm_head: nn.Linear
    d2t: torch.Tensor
    t2d: torch.Tensor
    # A fresh drafter whose vocabulary nobody chose: supervised training may reduce it once it has the responses.
    vocabulary_is_open: bool = False
    # Share of the response tokens trained on that are in a reduced vocabulary, once it was counted.
    draft_vocab_coverage: float | None = None

    def make_head(self) -> None:
        """Make the head and the maps of vocabularies that the config asks for; a family's `__init__` calls it."""
        config = self.config
        if config.owns_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
            self.lm_head.requires_grad_(config.trains_head)
        if config.has_reduced_vocabulary:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            is_first = torch.arange(config.vocab_size) < config.draft_vocab_size
            self.register_buffer("t2d", is_first)

    def train_all(self) -> None:
        """Mark every weight as trained that training changes: all but a head that keeps rows of the target's."""
        self.requires_grad_(True)
        if self.config.owns_head:
            self.lm_head.requires_grad_(self.config.trains_head)

    def reduce_vocabulary(self, draft_vocabulary: DraftVocabulary, target: Any) -> None:
        """
        Keep a part of the target's vocabulary, or exchange the part it has for another, in place; before an optimizer
        or a wrapper holds the drafter. Of tokens that it had every logit stays as it was. The others begin with the
        target's rows, which a part of the head that corrects them leaves alone.

        Args:
            draft_vocabulary ([`DraftVocabulary`]): Tokens that the drafter can propose from now on.
            target (`str`, `PreTrainedModel` or `FrozenTarget`):
                The target, of whose head a drafter takes the rows that it lacks.

        Raises:
            ValueError: If the new vocabulary belongs to another target, or the family or the target's head cannot have
                a part of it.
        """
        size = self.config.vocab_size
        if draft_vocabulary.t2d.numel() != size:
            raise ValueError(
                f"A vocabulary built over {draft_vocabulary.t2d.numel()} tokens cannot reduce a drafter of a target "
                f"with {size}. Count tokens of its target."
            )
        self.config.check_reducible()
        token_ids, had = draft_vocabulary.token_ids, self.draft_token_ids
        for part in self.head_parts:
            if part.module is None:
                module: Any = nn.Linear(part.width, size, bias=False, device="meta")
                weight, is_trained = _plain_head(self.resolve_target(target)), False
                self.lm_head = module
            else:
                module = part.module
                is_trained = module.weight.requires_grad
                weight = module.weight.detach() if had is None else self._rows_of_all(module, had, target)
            kept = weight[token_ids.to(weight.device)].to(self.device, self.dtype)
            module.weight = nn.Parameter(kept, requires_grad=is_trained)
            module.out_features = len(token_ids)
        self.config.draft_vocab_size = len(token_ids)
        self.register_buffer("d2t", draft_vocabulary.d2t.to(self.device, copy=True))
        self.register_buffer("t2d", draft_vocabulary.t2d.to(self.device, copy=True))
        self.vocabulary_is_open = False

    def _rows_of_all(self, module: Any, had: torch.Tensor, target: Any) -> torch.Tensor:
        """Return rows of a part of the head for every token of the target: its own of those it `had`."""
        own = module.weight.detach()
        rows = own.new_zeros(self.config.vocab_size, own.shape[1])
        if module is self.lm_head:
            model = self.resolve_target(target)
            head: Any = model.get_output_embeddings()
            # A head that is trained only begins with the target's rows.
            rows.copy_(head.weight.detach() if self.config.trains_head else _plain_head(model))
        rows[had] = own
        return rows

    @property
    def draft_token_ids(self) -> torch.Tensor | None:
        """Target ids of the draft logits, `(DV,)`; `None` for the target's full vocabulary."""
        if not self.config.has_reduced_vocabulary:
            return None
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    @property
    def head_parts(self) -> list[HeadPart]:
        """The products whose sum are the logits, in the order of the columns they read."""
        return [HeadPart(self.lm_head if self.config.owns_head else None, self.config.hidden_size)]

    @property
    def num_logit_buffers(self) -> int:
        """Tensors of logits that [`draft_logits`] holds at once: one product, or the sum and its terms."""
        return 1 if len(self.head_parts) == 1 else 3

    @property
    def candidates(self) -> Candidates | None:
        """How a draft is chosen among the likeliest tokens, by a family that does so."""
        return None

    def draft_logits(self, hidden: torch.Tensor, project: Project) -> torch.Tensor:
        """
        Turn hidden states `(..., W)` into the logits of the distribution that drafts are drawn from, `(..., DV)`;
        `-inf` where a token cannot be drafted. `project` is the target's head.
        """
        parts, logits = self.head_parts, None
        columns = hidden.split([part.width for part in parts], dim=-1)
        for part, own in zip(parts, columns, strict=True):
            product = project(own) if part.module is None else _multiply(part.module, own)
            logits = product if logits is None else logits + product
        assert logits is not None, "a head has a part"
        return logits

    def confidence_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """
        Return the logit of the chance that the target keeps the draft of each slot, `(...)` of states `(..., W)`;
        `None` from a drafter without a confidence head. It must not depend on the slot's own draft.
        """
        return None

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Turn ids of the drafter's vocabulary into the target's."""
        token_ids = self.draft_token_ids
        return draft_ids if token_ids is None else token_ids[draft_ids]

    def to_target_probs(self, draft_probs: torch.Tensor) -> torch.Tensor:
        """Turn probabilities over the drafter's vocabulary `(..., DV)` into ones over the target's, `(..., V)`."""
        token_ids = self.draft_token_ids
        if token_ids is None:
            return draft_probs
        probs = draft_probs.new_zeros(*draft_probs.shape[:-1], self.config.vocab_size)
        probs[..., token_ids] = draft_probs
        return probs

    @staticmethod
    def resolve_target(target: Any) -> PreTrainedModel:
        """Return the causal language model of an id, a path, a model, a [`~peft.PeftModel`] or a `FrozenTarget`."""
        if isinstance(target, str | Path):
            return load_target_model(target_chain(str(target)))
        if isinstance(target, PreTrainedModel) or is_adapted_target(target):
            return whole_model(target)
        return target.causal_lm


def _multiply(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module(hidden.to(activation_dtype(module.weight)))


def _plain_head(model: PreTrainedModel) -> torch.Tensor:
    """Return the weight of a target's head, `(V, H)`, whose product with a state must be all that it computes."""
    head: Any = model.get_output_embeddings()
    if scales_logits(model.config) or getattr(head, "bias", None) is not None:
        raise ValueError(
            f"The head of target type {model.config.model_type!r} scales, caps or shifts its logits, which a part of "
            "its rows does not. Leave the vocabulary whole, or train an EAGLE-3 drafter, which trains its own head."
        )
    return head.weight.detach()
