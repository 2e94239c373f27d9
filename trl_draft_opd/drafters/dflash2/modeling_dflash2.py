# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The DFlash 2 drafter: a DFlash whose layers convolve each block along its slots, and whose drafts are chosen among the
likeliest tokens of a slot by what fits the token before it.

The layers read no drafts, so a block is run once; only the selector follows the tokens, slot by slot.

Shape letters:  B = sequences, A = anchors per sequence, N = blocks, S = block size, H = hidden size, T = taps of a
                convolution, G = its groups of channels, V = vocabulary, R = rank of the selector, C = candidates
"""

from typing import Any, Self

import torch
from torch import nn
from torch.nn.functional import embedding, pad

from ..base import Candidates, Project
from ..dflash import DFlashDraftConfig, DFlashDraftModel
from ..dflash.modeling_dflash import Attend, DFlashLayer
from ..feed_forward import run_mlp
from ..precision import run_norm
from .configuration_dflash2 import DFlash2DraftConfig


class BlockConvolution(nn.Module):
    """
    Two convolutions around a sublayer, one of what it reads and one of what it adds. Both mix each slot with those
    right before it in its block, by kernels that depend on what the sublayer reads at that slot.
    """

    def __init__(self, config: DFlash2DraftConfig):
        super().__init__()
        self.num_groups = config.hidden_size // config.conv_group_size
        self.base_kernel = nn.Parameter(torch.empty(2, config.conv_kernel_size, config.hidden_size))
        num_factors = 2 * config.conv_kernel_size * self.num_groups
        self.kernel_projection = nn.Linear(config.hidden_size, num_factors, bias=False)

    @torch.no_grad()
    def make_identity(self) -> None:
        """Let both convolutions hand on what they are given, with a gradient for every tap."""
        self.base_kernel.zero_()[:, 0] = 1
        self.kernel_projection.weight.zero_()

    def enter(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the sublayer reads of `(N, S, H)` states, and the kernels `(N, S, T, G)` for what it adds."""
        before, behind = self.kernel_projection(normed).unflatten(-1, (2, -1, self.num_groups)).unbind(dim=-3)
        return convolve(normed, self.base_kernel[0], before), behind

    def leave(self, added: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Return what is added to the residual of a sublayer's output `(N, S, H)`."""
        return convolve(added, self.base_kernel[1], kernels)


def convolve(states: torch.Tensor, base_kernel: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """
    Mix every slot with those before it in its block: `sum_t (base_t + kernels_t) * states[slot - t]`, where nothing
    lies before the first slot.

    Args:
        states (`torch.Tensor` of shape `(N, S, H)`): Slots of blocks.
        base_kernel (`torch.Tensor` of shape `(T, H)`): Factor of each channel.
        kernels (`torch.Tensor` of shape `(N, S, T, G)`): What is added to it at each slot, one for `H / G` channels.
    """
    num_groups, mixed = kernels.shape[-1], torch.zeros_like(states)
    for tap, base in enumerate(base_kernel.to(states.dtype)):
        moved = pad(states[:, : states.shape[1] - tap], (0, 0, tap, 0)) if tap else states
        grouped = moved.unflatten(-1, (num_groups, -1))
        # Two products: the sum of both factors, as large as the states, would be kept for the backward pass.
        mixed = mixed + moved * base + (grouped * kernels[:, :, tap, :, None]).flatten(-2)
    return mixed


class DFlash2Layer(DFlashLayer):
    """One decoder layer under its published tensor names: a DFlash's, with convolutions around both sublayers."""

    def __init__(self, config: DFlash2DraftConfig, layer: int):
        super().__init__(config, layer)
        self.attention_conv = BlockConvolution(config)
        self.mlp_conv = BlockConvolution(config)

    def forward(self, hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
        read, kernels = self.attention_conv.enter(run_norm(self.input_layernorm, hidden))
        hidden = hidden + self.attention_conv.leave(self.self_attn.o_proj(attend(read)), kernels)
        read, kernels = self.mlp_conv.enter(run_norm(self.post_attention_layernorm, hidden))
        return hidden + self.mlp_conv.leave(run_mlp(self.mlp, read), kernels)


class CandidateSelector(nn.Module):
    """
    Scores which token fits behind another at a slot: `<predecessor[a] * projection(h), successor[b]>` for `b` behind
    `a`, under its published tensor names.
    """

    def __init__(self, config: DFlash2DraftConfig):
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)

    @torch.no_grad()
    def make_silent(self, std: float) -> None:
        """
        Draw both codebooks and give every pair of tokens the score 0.

        By the projection, and not by a codebook: every slot reads it, so one update wakes it, and from then on both
        codebooks have gradients. A codebook of zeros would wake row by row, each when its token is met, and hold back
        the other two until then.
        """
        self.predecessor_codebook.normal_(std=std)
        self.successor_codebook.normal_(std=std)
        self.hidden_projection.weight.zero_()

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return what a successor's row is multiplied with, `(..., R)`, for slots `(..., H)` behind tokens `(...)`."""
        return embedding(tokens, self.predecessor_codebook).to(hidden.dtype) * self.hidden_projection(hidden)


class DFlash2DraftModel(DFlashDraftModel):
    """
    DFlash 2 drafter. It owns no head; a draft is one of the tokens that the target's head finds likeliest.

    Source: [DFlash 2](https://inco.ai/blog/dflash2) and its code.

    Example:

    ```python
    >>> from trl_draft_opd import DFlash2DraftModel

    >>> drafter = DFlash2DraftModel.from_target("Qwen/Qwen3-4B", mask_token_id=151669)
    ```
    """

    config_class = DFlash2DraftConfig
    config: DFlash2DraftConfig
    layer_class = DFlash2Layer
    _no_split_modules = ["DFlash2Layer"]
    names_of_heads = (*DFlashDraftModel.names_of_heads, "codebook")
    reads_drafts = True

    def __init__(self, config: DFlash2DraftConfig):
        super().__init__(config)
        self.candidate_selector = CandidateSelector(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockConvolution):
            module.make_identity()
        if isinstance(module, CandidateSelector):
            module.make_silent(self.config.initializer_range)

    @classmethod
    def from_target(
        cls,
        target: Any,
        *,
        mask_token_id: int,
        num_hidden_layers: int = 5,
        block_size: int = 16,
        target_layer_ids: list[int] | None = None,
        sample_from_anchor: bool = False,
        conv_kernel_size: int = 2,
        conv_group_size: int = 16,
        selector_rank: int = 256,
        selector_top_k: int = 16,
    ) -> "DFlash2DraftModel":
        """
        Make a fresh drafter of the target's shape, whose convolutions and selector change nothing yet.

        Args:
            target, mask_token_id, num_hidden_layers, block_size, target_layer_ids, sample_from_anchor:
                As in [`DFlashDraftModel.from_target`].
            conv_kernel_size, conv_group_size, selector_rank, selector_top_k (`int`, *optional*):
                As in [`DFlash2DraftConfig`].
        """
        config = DFlash2DraftConfig(
            **cls.shape_for_target(target, mask_token_id, target_layer_ids),
            num_hidden_layers=num_hidden_layers,
            block_size=block_size,
            sample_from_anchor=sample_from_anchor,
            conv_kernel_size=conv_kernel_size,
            conv_group_size=conv_group_size,
            selector_rank=selector_rank,
            selector_top_k=selector_top_k,
        )
        return cls(config)

    @classmethod
    def from_dflash(
        cls,
        drafter: DFlashDraftModel,
        *,
        conv_kernel_size: int = 2,
        conv_group_size: int = 16,
        selector_rank: int = 256,
        selector_top_k: int = 16,
    ) -> Self:
        """
        Make a drafter that drafts what a DFlash does until it is trained: its states and the logits of the likeliest
        tokens are the same, bit for bit.

        Args:
            drafter ([`DFlashDraftModel`]): Where all weights but those of the convolutions and the selector come from.
            conv_kernel_size, conv_group_size, selector_rank, selector_top_k (`int`, *optional*):
                As in [`DFlash2DraftConfig`].

        Raises:
            ValueError: If `drafter` is of another family, has a vocabulary of its own, or a size is out of range.
        """
        if drafter.config.family != DFlashDraftConfig.family:
            raise ValueError(
                f"A DFlash 2 drafter starts from a DFlash drafter, not from this {drafter.config.title} drafter. Use "
                "`DFlash2DraftModel.from_target` for a fresh one."
            )
        shape: dict[str, Any] = {name: getattr(drafter.config, name) for name in DFlashDraftConfig.own_settings()}
        config = DFlash2DraftConfig(
            **shape,
            conv_kernel_size=conv_kernel_size,
            conv_group_size=conv_group_size,
            selector_rank=selector_rank,
            selector_top_k=selector_top_k,
        )
        model = cls(config)
        missing, unexpected = model.load_state_dict(drafter.state_dict(), strict=False)
        assert not unexpected and all("_conv." in name or name.startswith("candidate_selector.") for name in missing)
        return model.to(device=drafter.device, dtype=drafter.dtype).train(drafter.training)  # pyright: ignore[reportArgumentType, reportCallIssue]

    @property
    def num_logit_buffers(self) -> int:
        return 2  # Those of the head, and those that drafts are drawn from.

    @property
    def candidates(self) -> Candidates:
        return Candidates(self.candidate_selector.successor_codebook, self.config.selector_top_k)

    def join_token(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden, self.candidate_selector(hidden, tokens)], dim=-1)

    def draft_logits(self, hidden: torch.Tensor, project: Project) -> torch.Tensor:
        hidden, context = hidden.split([self.config.hidden_size, self.config.selector_rank], dim=-1)
        unary = super().draft_logits(hidden, project)
        rows, top_k = self.candidates.rows, self.candidates.top_k
        values, token_ids = unary.topk(top_k, dim=-1)
        # At least float32: the differences between few candidates decide, and are drawn from.
        successors = embedding(token_ids, rows)
        dtype = torch.promote_types(unary.dtype, torch.float32)
        scores = values.to(dtype) + (successors * context[..., None, :].to(dtype)).sum(dim=-1)
        return torch.full_like(unary, -torch.inf, dtype=dtype).scatter_(-1, token_ids, scores)
