# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The contract every drafter family fulfils: the target's features in, draft hidden states out; drafts without gradient.

Knows nothing of trainers, rollouts or losses, and owns no embedding: the target's embedding is handed in as a function.

Shape letters:  B = sequences, L = text length, A = anchors per sequence, K = drafts per block, H = hidden size,
                F = width of the target's features (number of tapped layers times the target's hidden size),
                V = the target's vocabulary
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..utils.loading import loading_whole
from .published.checkpoint import CheckpointSource, read_drafter_config, read_drafter_tensors


Result = TypeVar("Result")
Embed = Callable[[torch.Tensor], torch.Tensor]
Project = Callable[[torch.Tensor], torch.Tensor]
# Chooses tokens from draft logits: `(logits (B, A, S, DV), first_slot) -> (ids (B, A, S), probs (B, A, S, DV) or None)`.
ChooseDrafts = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor | None]]
# Says how blocks go on behind a slot, see `Drafter.draft_along`: `(hidden (B, A, H), slot) -> (tokens, columns)`, `(B, A')` each.
DecideSlot = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor | None] | None]


@dataclass
class DraftContext:
    """
    What a drafter keeps of the committed text, indexed by position: entry `i` belongs to position `i` of its row.

    A block at anchor `a` sees the entries before `a` only, so entries at or behind an anchor may hold anything finite: rejected
    drafts are rolled back by being overwritten.

    Attributes:
        keys (`list[torch.Tensor]`): One `(B, kv_heads, L, head_dim)` tensor per drafter layer, positions rotated in.
        values (`list[torch.Tensor]`): As `keys`.
        fused (`torch.Tensor` or `None`): `(B, L, H)`, the fused target features (EAGLE-3); `None` for families that do not read them.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    fused: torch.Tensor | None

    def extended(self, capacity: int) -> "DraftContext":
        """Return a copy whose buffers hold `capacity` positions; the new ones are zero."""

        def pad(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            shape = list(tensor.shape)
            shape[dim] = capacity - shape[dim]
            return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)

        return DraftContext(
            keys=[pad(key, 2) for key in self.keys],
            values=[pad(value, 2) for value in self.values],
            fused=None if self.fused is None else pad(self.fused, 1),
        )

    def write(self, entries: "DraftContext", position_ids: torch.Tensor) -> None:
        """Overwrite the entries at `position_ids` (`(B, n)`) in place; inference only."""
        rows = torch.arange(position_ids.shape[0], device=position_ids.device)[:, None]
        for own, new in zip(self.keys + self.values, entries.keys + entries.values, strict=True):
            # Advanced indices around the head dimension put (row, position) first.
            own[rows, :, position_ids] = new.transpose(1, 2)
        if self.fused is not None and entries.fused is not None:
            self.fused[rows, position_ids] = entries.fused

    def rows(self, index: torch.Tensor) -> "DraftContext":
        """Return the context of the rows in `index`."""
        return DraftContext(
            keys=[key[index] for key in self.keys],
            values=[value[index] for value in self.values],
            fused=None if self.fused is None else self.fused[index],
        )

    def prefix(self, length: int) -> "DraftContext":
        """Return views on the first `length` positions; no block may have an anchor behind them."""
        return DraftContext(
            keys=[key[:, :, :length] for key in self.keys],
            values=[value[:, :, :length] for value in self.values],
            fused=None if self.fused is None else self.fused[:, :length],
        )


@dataclass(frozen=True)
class Proposal:
    """
    Drafts of one or more blocks per sequence.

    Attributes:
        drafts (`torch.LongTensor` of shape `(B, A, K)`): Proposed token ids of the target's vocabulary.
        probs (`torch.Tensor` of shape `(B, A, K, V)` or `None`):
            The distribution each draft was drawn from; `None` when drafts are the argmax.
    """

    drafts: torch.Tensor
    probs: torch.Tensor | None


class Drafter(PreTrainedModel):
    """
    Base of all drafters: a small network that proposes tokens from the target's hidden states.

    The same three methods serve training, replay and serving: `encode_context` turns the target's features into keys and
    values once per position, `draft_hidden` runs blocks with gradient on recorded drafts, `propose` drafts without gradient.
    """

    base_model_prefix = ""
    main_input_name = "target_features"
    accepts_loss_kwargs = True
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    #: Set by transformers' own switch, `activation_checkpointing_enable` (`gradient_checkpointing_enable` before 5.23).
    gradient_checkpointing: bool = False
    #: Whether the drafter has a head of its own (EAGLE-3) or drafts through the target's (DFlash).
    owns_head: bool = False
    #: Whether a slot reads the drafts before it (EAGLE-3), or all slots of a block are drafted at once (DFlash).
    reads_drafts: bool = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def run_recomputed(self, part: Callable[..., Result], *args: Any) -> Result:
        """
        Run `part(*args)`, a layer or a step; with activation checkpointing on, what it keeps for the backward pass is let go and
        computed again there. Only in training mode and with gradient.

        `part` must have no side result, which a second run would repeat, and be given lists that nobody changes afterwards.
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(part, *args)
        return part(*args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Whoever casts the whole module, as older DeepSpeed does, means the weights: no long position survives rounded rotary frequencies.
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            owner, _, key = name.rpartition(".")
            cast = self.get_submodule(owner)._buffers[key]
            if cast.dtype != buffer.dtype:
                self.get_submodule(owner)._buffers[key] = buffer.to(cast.device)
        return self

    @property
    @abstractmethod
    def max_drafts(self) -> int | None:
        """Largest number of drafts per block the family can make in one go, or `None` where only training bounds it."""

    @property
    @abstractmethod
    def default_num_drafts(self) -> int:
        """Drafts per block used in rollouts and evaluation unless said otherwise."""

    @abstractmethod
    def encode_context(
        self, target_features: torch.Tensor, next_embeds: torch.Tensor, position_ids: torch.Tensor
    ) -> DraftContext:
        """
        Turn the target's features into the drafter's context entries.

        Args:
            target_features (`torch.Tensor` of shape `(B, n, F)`):
                Outputs of the tapped target layers, concatenated in ascending layer order.
            next_embeds (`torch.Tensor` of shape `(B, n, H)`):
                Embedding of the token that follows each position (read by EAGLE-3 only).
            position_ids (`torch.LongTensor` of shape `(B, n)`):
                Position of each entry in its row.

        Returns:
            `DraftContext` with `n` entries.
        """

    @abstractmethod
    def draft_hidden(
        self,
        target_features: torch.Tensor,
        input_ids: torch.Tensor,
        anchor_positions: torch.Tensor,
        drafts: torch.Tensor,
        embed: Embed,
    ) -> torch.Tensor:
        """
        Run blocks from many anchors of each sequence with gradient, on recorded drafts.

        Args:
            target_features (`torch.Tensor` of shape `(B, L, F)`):
                The target's features of the committed text.
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                The committed text, right-padded.
            anchor_positions (`torch.LongTensor` of shape `(B, A)`):
                Anchors, 1..L-1; entries below 1 mark padding, whose rows hold no meaning.
            drafts (`torch.LongTensor` of shape `(B, A, K)`):
                Recorded drafts that later slots read; a family whose slots do not read drafts ignores their values.
            embed (`Callable`):
                The target's embedding, token ids to `(..., H)`.

        Returns:
            `torch.Tensor` of shape `(B, A, K, H)`: hidden state of slot `k` at index `k - 1`, ready for the head.
        """

    @abstractmethod
    def propose(
        self,
        context: DraftContext,
        anchor_positions: torch.Tensor,
        anchor_tokens: torch.Tensor,
        num_drafts: int,
        embed: Embed,
        project: Project,
        choose: ChooseDrafts,
    ) -> Proposal:
        """
        Draft `num_drafts` tokens from each anchor, without gradient.

        Args:
            context (`DraftContext`): Entries for every position before the largest anchor.
            anchor_positions (`torch.LongTensor` of shape `(B, A)`): Anchors, at least 1.
            anchor_tokens (`torch.LongTensor` of shape `(B, A)`): Token at each anchor.
            num_drafts (`int`): K, at least 1.
            embed (`Callable`): The target's embedding.
            project (`Callable`): The target's head, hidden states to logits; families with a head of their own ignore it.
            choose (`Callable`): Picks tokens from logits, see `ChooseDrafts`.

        Returns:
            `Proposal`
        """

    @abstractmethod
    def draft_along(
        self,
        context: DraftContext,
        anchor_positions: torch.Tensor,
        anchor_tokens: torch.Tensor,
        num_drafts: int,
        embed: Embed,
        decide: DecideSlot,
    ) -> None:
        """
        Run blocks slot by slot along tokens that are handed in, without gradient, and drop blocks whose fate is known.

        Args:
            context (`DraftContext`), anchor_positions (`torch.LongTensor` of shape `(B, A)`), anchor_tokens (same shape):
                As for [`propose`].
            num_drafts (`int`): K, at least 1.
            embed (`Callable`): The target's embedding.
            decide (`Callable`):
                Called with the hidden states `(B, A, H)` of slot 1, then of slot 2 and so on. Returns the token of that
                slot for every block that goes on, and the columns, `(B, A')` each, at which those blocks stand among the `A` it was
                given (-1 for padding; `None` for all of them as they stand); or `None` alone when no block goes on.
        """

    @abstractmethod
    def draft_logits(self, hidden: torch.Tensor, project: Project) -> torch.Tensor:
        """Turn hidden states `(..., H)` into draft logits `(..., DV)`, through the head the family drafts with."""

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Turn ids of the drafter's vocabulary into the target's."""
        return draft_ids

    def to_target_probs(self, draft_probs: torch.Tensor) -> torch.Tensor:
        """Turn probabilities over the drafter's vocabulary `(..., DV)` into ones over the target's, `(..., V)`."""
        return draft_probs

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        num_target_layers: int | None = None,
        allow_pickle_weights: bool = False,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """
        Load a drafter in any published layout; see [`AutoDrafter`] for the list.

        Every tensor must fit: missing or unexpected ones are an error that lists them.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Folder or Hub id.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Precision of the weights in memory. Training keeps fp32 masters; bf16 Adam steps lose small updates.
            num_target_layers (`int`, *optional*):
                Layers of the target, for EAGLE-3 checkpoints whose config names no layer ids: the reference convention is then resolved with it.
            allow_pickle_weights (`bool`, *optional*, defaults to `False`):
                Read a `pytorch_model.bin` (with `weights_only=True`) when there is no safetensors file.
            revision, subfolder, token, cache_dir, local_files_only:
                As in `transformers`.

        Raises:
            ValueError: If the checkpoint is of another family, a tensor is missing, unexpected or of another shape, or
                the layout cannot be expressed.
            OSError: If the folder or repository has no `config.json` or no weights.
        """
        source = CheckpointSource(
            str(pretrained_model_name_or_path), revision, subfolder, token, cache_dir, local_files_only
        )
        imported = read_drafter_config(source, num_target_layers=num_target_layers)
        if imported.family != cls.config_class.family:
            raise ValueError(
                f"{source.name_or_path!r} holds a {imported.family} drafter (architectures {imported.architectures}), but "
                f"{cls.__name__} reads {cls.config_class.family} drafters. Use `AutoDrafter.from_pretrained`."
            )
        model = cls(cls.config_class(**imported.arguments))
        model.load_exact(read_drafter_tensors(source, imported, allow_pickle_weights=allow_pickle_weights))
        model.config.name_or_path = source.name_or_path
        model.config.dtype = dtype
        return model.to(dtype).eval()

    def load_exact(self, tensors: dict[str, torch.Tensor]) -> None:
        """
        Load tensors named as in `state_dict()`; buffers that the layout does not carry keep their values.

        Raises:
            ValueError: Listing every missing or unexpected tensor and every shape that differs.
        """
        own = self.state_dict()
        missing = sorted(set(own) - set(tensors))
        unexpected = sorted(set(tensors) - set(own))
        misshapen = [
            f"{name}: checkpoint {tuple(tensors[name].shape)}, config {tuple(own[name].shape)}"
            for name in sorted(set(own) & set(tensors))
            if own[name].shape != tensors[name].shape
        ]
        if missing or unexpected or misshapen:
            raise ValueError(
                f"The weights do not fit {type(self).__name__}: missing {missing}, unexpected {unexpected}, wrong shape "
                f"{misshapen}. Check that config.json and the weight files belong together."
            )
        self.load_state_dict(tensors)

    @staticmethod
    def resolve_target(target: Any) -> PreTrainedModel:
        """Return the causal language model behind an id, a path, a model or a `FrozenTarget`."""
        if isinstance(target, (str, Path)):
            with loading_whole():
                return AutoModelForCausalLM.from_pretrained(target, trust_remote_code=False)
        return target if isinstance(target, PreTrainedModel) else target.causal_lm
