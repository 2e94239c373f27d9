# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The contract of every drafter family. A drafter owns no embedding: the target's is handed in as a function.

A drafter turns the target's features of the committed text into a `DraftContext`, once per position
(`encode_context`). From there it drafts blocks, one per anchor, slot by slot; the caller owns the loop and decides
which token each slot holds:

    state = drafter.begin(context, anchors, anchor_tokens, num_drafts, embed)    # slot 1 of every block
    for slot in range(1, num_drafts + 1):
        logits = drafter.draft_logits(state.hidden, project)                     # (B, A, DV)
        tokens = ...                                     # drawn, argmax or recorded: ids of the target, (B, A)
        if slot < num_drafts:
            state = drafter.advance(state, tokens)       # slot + 1; `columns` picks the blocks that continue

Training runs all slots along recorded drafts with gradient (`run_blocks`), live decoding drafts by argmax or by draws
(`rollout/drafting.py`), replay drops blocks on the way (`rollout/replay.py`). What a family must fulfil:

- A state is a value: `advance` returns a new one and leaves the old one as it was.
- `state.hidden` is `(B, A, W)`, ready for the head: the columns that `head_parts` multiply, side by side, and behind
  them what only the family's own `draft_logits` reads. A block sees the context before its anchor and its own earlier
  slots only, so its states depend neither on other blocks nor on which of them continue.
- Anchors below 1, and columns below 0, are padding: it costs no layer, and its states hold no meaning.
- A family whose slots read no draft (`reads_drafts = False`) ignores tokens and fills `state.block_hidden`. One that
  drafts whole blocks whose slots do read the draft before them keeps the block in its state, and joins the two in
  `advance`; `run_along` does so for all slots at once.
- Gradients flow through all of it, each step under `run_recomputed`; callers that need none switch them off.

Shape letters:  B = sequences, L = text length, A = anchors per sequence, K = drafts per block, H = hidden size,
                W = width of a state that is ready for the head (H, and what else a family's head reads),
                F = width of the target's features (number of tapped layers times the target's hidden size),
                V = the target's vocabulary, DV = the drafter's vocabulary
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionPlan
from .head import Candidates as Candidates
from .head import DraftingHead
from .head import HeadPart as HeadPart
from .head import Project as Project
from .packing import BlockPacking
from .portable_config import PortableConfig
from .published.checkpoint import CheckpointSource, check_tensors_fit, read_drafter_config, read_drafter_tensors


# Slots that are drafted at once, unless a caller says otherwise: the states of a pass are kept for its backward pass.
SLOTS_PER_PASS = 2**16

Result = TypeVar("Result")
Embed = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class DraftContext:
    """
    What a drafter keeps of the committed text: one entry per token of a row, which holds one text, or several packed
    end to end.

    A block at anchor `a` sees the entries of its own text before `a` only; entries at or behind it may hold anything
    finite, so rejected drafts are rolled back by being overwritten.

    Attributes:
        keys (`list[torch.Tensor]`): One `(B, kv_heads, L, head_dim)` tensor per drafter layer, positions rotated in.
        values (`list[torch.Tensor]`): As `keys`.
        fused (`torch.Tensor` or `None`):
            `(B, L, H)`, the fused target features (EAGLE-3); `None` for families that do not read them.
        starts (`torch.LongTensor` of shape `(B, L)`, *optional*):
            Index of the entry at which each entry's own text starts; `None` if every row is one text.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    fused: torch.Tensor | None
    starts: torch.Tensor | None = None

    def firsts(self, anchors: torch.Tensor) -> torch.Tensor | None:
        """Return the index at which the text of each anchor starts, in the shape of `anchors`; `None` if all are 0."""
        # The entry before an anchor is of its text, and there even if the text ends with it.
        return None if self.starts is None else self.starts.gather(1, anchors.clamp(min=1) - 1)

    def place_blocks(self, anchors: torch.Tensor) -> tuple[BlockPacking, AttentionPlan]:
        """
        Return the packing of blocks at `anchors` (`(B, A)`), and the plan of what they see. Where texts are packed,
        there is no padding among the anchors.
        """
        packing = BlockPacking(anchors >= 1, is_whole=self.starts is not None)
        return packing, AttentionPlan(anchors.clamp(min=1), self.firsts(anchors))

    def extended(self, capacity: int) -> "DraftContext":
        """Return a copy whose buffers hold `capacity` entries; the new ones are zero and of the text before them."""

        def pad(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            shape = list(tensor.shape)
            shape[dim] = capacity - shape[dim]
            return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)

        def prolong(starts: torch.Tensor) -> torch.Tensor:
            return torch.cat([starts, starts[:, -1:].expand(-1, capacity - starts.shape[1])], dim=1)

        return replace(self._map(pad), starts=None if self.starts is None else prolong(self.starts))

    def rows(self, index: torch.Tensor) -> "DraftContext":
        """Return the context of the rows in `index`."""
        return self._map(lambda tensor, dim: tensor[index])

    def prefix(self, length: int) -> "DraftContext":
        """Return views on the first `length` positions; no block may have an anchor behind them."""
        return self._map(lambda tensor, dim: tensor.narrow(dim, 0, length))

    def _map(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> "DraftContext":
        """Return the context with every tensor changed; `change` is given the dimension of positions too."""
        return DraftContext(
            keys=[change(key, 2) for key in self.keys],
            values=[change(value, 2) for value in self.values],
            fused=None if self.fused is None else change(self.fused, 1),
            starts=None if self.starts is None else change(self.starts, 1),
        )

    def write(self, entries: "DraftContext", position_ids: torch.Tensor) -> None:
        """Overwrite the entries at index `position_ids` (`(B, n)`) in place; inference only."""
        rows = torch.arange(position_ids.shape[0], device=position_ids.device)[:, None]
        for own, new in zip(self.keys + self.values, entries.keys + entries.values, strict=True):
            # Advanced indices around the head dimension put (row, position) first.
            own[rows, :, position_ids] = new.transpose(1, 2)
        if self.fused is not None and entries.fused is not None:
            self.fused[rows, position_ids] = entries.fused
        if self.starts is not None and entries.starts is not None:
            self.starts[rows, position_ids] = entries.starts


@dataclass(frozen=True)
class DraftState:
    """
    Blocks at one of their slots. Families add what they carry from slot to slot.

    Attributes:
        slot (`int`): The current slot, 1 for the first draft.
        hidden (`torch.Tensor` of shape `(B, A, W)`): Its hidden states, ready for the head.
        block_hidden (`torch.Tensor` of shape `(B, A, K, W)` or `None`):
            Hidden states of all slots of the blocks as begun; `None` from a family whose slots read the drafts before
            them.
    """

    slot: int
    hidden: torch.Tensor
    block_hidden: torch.Tensor | None


class Drafter(DraftingHead):
    """Base of all drafters: a small network that proposes tokens from the target's hidden states."""

    config_class: type[PortableConfig]
    base_model_prefix = ""
    main_input_name = "target_features"
    accepts_loss_kwargs = True
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    #: Set by transformers' switch of activation checkpointing.
    gradient_checkpointing: bool = False
    #: Whether a slot reads the drafts before it.
    reads_drafts: bool = True
    #: What the names of weights have in them that belong to no layer: heads and embeddings, whose rows are tokens.
    #: Muon leaves them to AdamW, and `target_modules="all-linear"` leaves them as they are.
    names_of_heads: ClassVar[tuple[str, ...]] = ("embed_tokens", "lm_head")
    #: What the trainer that trained this instance recorded, for the next one; `None` where it was not trained here.
    training_record: Any = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Older name of `is_activation_checkpointing`; PEFT asks by it, and transformers' own warns."""
        return self.gradient_checkpointing

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def run_recomputed(self, part: Callable[..., Result], *args: Any) -> Result:
        """
        Run `part(*args)`, a layer or a step; with activation checkpointing on, once more in the backward pass.

        `part` must change nothing outside, and its arguments must not change in between.
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(part, *args)
        return part(*args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # A cast of the whole module, as older DeepSpeed makes, means the weights: rounded rotary frequencies would
        # spoil long positions.
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = self.get_buffer(name)
            if cast.dtype != buffer.dtype:
                owner, _, key = name.rpartition(".")
                setattr(self.get_submodule(owner), key, buffer.to(cast.device))
        return self

    @property
    def max_drafts(self) -> int | None:
        """Most drafts a block can hold; `None` where only training bounds it."""
        return None

    @property
    @abstractmethod
    def default_num_drafts(self) -> int:
        """Drafts per block in rollouts and evaluation unless another number is given."""

    @abstractmethod
    def encode_context(
        self, target_features: torch.Tensor, next_ids: torch.Tensor, position_ids: torch.Tensor, embed: Embed
    ) -> DraftContext:
        """
        Turn the target's features into the drafter's context entries.

        Args:
            target_features (`torch.Tensor` of shape `(B, n, F)`):
                Outputs of the tapped target layers, concatenated in ascending layer order.
            next_ids (`torch.LongTensor` of shape `(B, n)`): The token that follows each position (EAGLE-3 reads it).
            position_ids (`torch.LongTensor` of shape `(B, n)`): Position of each entry in its text.
            embed (`Callable`): The target's embedding, token ids to `(..., H)`.
        """

    @abstractmethod
    def begin(
        self,
        context: DraftContext,
        anchors: torch.Tensor,
        anchor_tokens: torch.Tensor,
        num_drafts: int,
        embed: Embed,
    ) -> DraftState:
        """
        Begin a block at every anchor.

        Args:
            context (`DraftContext`): Entries for every position before the largest anchor.
            anchors (`torch.LongTensor` of shape `(B, A)`):
                Index of each anchor in its row; entries below 1 are padding. Never the first token of a text.
            anchor_tokens (`torch.LongTensor` of shape `(B, A)`): Token at each anchor.
            num_drafts (`int`): K, at least 1 and at most `max_drafts`.
            embed (`Callable`): The target's embedding.
        """

    @abstractmethod
    def advance(self, state: DraftState, tokens: torch.Tensor, columns: torch.Tensor | None = None) -> DraftState:
        """
        Continue blocks behind the token of their current slot, which is before K.

        Args:
            state (`DraftState`): From [`begin`] or from here.
            tokens (`torch.LongTensor` of shape `(B, A')`):
                Token of the current slot, in target ids, of every block that continues.
            columns (`torch.LongTensor` of shape `(B, A')`, *optional*):
                Which of the `A` blocks of `state` these are, -1 for padding. All continue, in order, if not given.
        """

    def run_along(self, state: DraftState, drafts: torch.Tensor) -> tuple[DraftState, torch.Tensor]:
        """
        Run blocks on along given drafts, from the current slot of `state` on.

        Args:
            state (`DraftState`): From [`begin`] or [`advance`].
            drafts (`torch.LongTensor` of shape `(B, A, n)`): Tokens of the current slot and those behind it.

        Returns:
            `tuple` of the state at the last of `n + 1` slots, and the hidden states of all of them, `(B, A, n + 1,
            W)`.
        """
        hidden = [state.hidden]
        for tokens in drafts.unbind(dim=-1):
            state = self.advance(state, tokens)
            hidden.append(state.hidden)
        return state, torch.stack(hidden, dim=2)

    def encode_text(
        self,
        target_features: torch.Tensor,
        input_ids: torch.Tensor,
        embed: Embed,
        starts: torch.Tensor | None = None,
    ) -> DraftContext:
        """
        Return the context of whole texts: features `(B, L, F)` of right-padded ids `(B, L)`, or of texts packed end to
        end, whose `starts` (`(B, L)`) say where the text of each token begins.
        """
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if starts is not None:
            position_ids = position_ids - starts
        # The last entry of a text has no next token, and takes what follows in the row. It lies before no anchor of
        # its own text, and before the first entry of the next one, so whatever it holds is never seen.
        next_ids = torch.cat([input_ids[:, 1:], input_ids[:, -1:]], dim=1)
        return replace(self.encode_context(target_features, next_ids, position_ids, embed), starts=starts)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the drafter in evaluation mode, and back into its own afterwards."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

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
            pretrained_model_name_or_path (`str` or `Path`): Folder or Hub id.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Precision of the weights in memory. Training keeps fp32 masters; bf16 Adam steps lose small updates.
            num_target_layers (`int`, *optional*):
                Layers of the target, for EAGLE-3 checkpoints whose config names no layer ids.
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
                f"{source.name_or_path!r} holds a {imported.family} drafter (architectures {imported.architectures}), "
                f"but {cls.__name__} reads {cls.config_class.family} drafters. Use `AutoDrafter.from_pretrained`."
            )
        model = cls(cls.config_class(**imported.arguments))
        tensors = read_drafter_tensors(source, imported, allow_pickle_weights=allow_pickle_weights)
        check_tensors_fit(tensors, model.state_dict(), f"the drafter {str(source)!r}")
        model.load_state_dict(tensors)
        model.config.name_or_path = source.name_or_path
        model.config.dtype = dtype
        return model.to(dtype).eval()  # pyright: ignore[reportArgumentType]  its decorator hides `self` from the stub


def run_blocks(
    drafter: Drafter,
    target_features: torch.Tensor,
    input_ids: torch.Tensor,
    anchors: torch.Tensor,
    drafts: torch.Tensor,
    embed: Embed,
    starts: torch.Tensor | None = None,
    blocks_per_pass: int | None = None,
) -> torch.Tensor:
    """
    Run blocks from many anchors of each sequence along recorded drafts, with gradient.

    Args:
        target_features (`torch.Tensor` of shape `(B, L, F)`): The target's features of the committed text.
        input_ids (`torch.LongTensor` of shape `(B, L)`): The committed text, right-padded or packed.
        anchors (`torch.LongTensor` of shape `(B, A)`): Anchors, 1..L-1; entries below 1 are padding.
        drafts (`torch.LongTensor` of shape `(B, A, K)`): Recorded drafts, which later slots read.
        starts (`torch.LongTensor` of shape `(B, L)`, *optional*):
            Where the text of each token begins, if a row holds several. There is no padding among `anchors` then.
        blocks_per_pass (`int`, *optional*):
            Most blocks of a row drafted at once. More are drafted in several passes over the same context, each
            computed again in the backward pass, so that memory is that of one. By default as many as have
            `SLOTS_PER_PASS` slots.

    Returns:
        `torch.Tensor` of shape `(B, A, K, W)`: hidden state of slot `k` at index `k - 1`, ready for the head.
    """
    context = drafter.encode_text(target_features, input_ids, embed, starts)
    tokens = input_ids.gather(1, anchors.clamp(min=1))

    def run(anchors: torch.Tensor, tokens: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        state = drafter.begin(context, anchors, tokens, drafts.shape[-1], embed)
        return state.block_hidden if state.block_hidden is not None else drafter.run_along(state, drafts[..., :-1])[1]

    num_blocks, per_pass = anchors.shape[1], blocks_per_pass or max(1, SLOTS_PER_PASS // drafts.shape[-1])
    if num_blocks <= per_pass:
        return run(anchors, tokens, drafts)
    # Of equal size: one small remainder would take as many launches as the others.
    num_passes = -(-num_blocks // per_pass)
    passes = zip(*(each.tensor_split(num_passes, dim=1) for each in (anchors, tokens, drafts)), strict=True)
    # An adapter's dropout must draw again what it drew. Without one, fetching the generator's state is a wait in vain.
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in drafter.modules())
    again = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=has_dropout)
    return torch.cat([again(*part) for part in passes], dim=1)
