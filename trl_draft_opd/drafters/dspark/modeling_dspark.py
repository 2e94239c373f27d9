# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The DSpark drafter: DFlash's layers draft a block in one pass; a Markov head of low rank adds to the logits of a slot
what the token before it says about them, and a confidence head predicts whether the target keeps the slot's draft.

Shape letters:  H = hidden size, R = rank of the Markov head, W = H + R, V = the target's vocabulary, DV = the
                drafter's
"""

from typing import Any, Self

import torch
from torch import nn

from ..base import HeadPart
from ..dflash import DFlashDraftConfig, DFlashDraftModel
from .configuration_dspark import DSparkDraftConfig


class MarkovHead(nn.Module):
    """A bias of the logits, `(V, DV)`, by the token before a slot; kept as two factors under published names."""

    def __init__(self, config: DSparkDraftConfig):
        super().__init__()
        assert config.draft_vocab_size is not None, "set by the config"
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)


class ConfidenceHead(nn.Module):
    """One logit per slot, under its published name."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)


class DSparkDraftModel(DFlashDraftModel):
    """
    DSpark drafter.

    Source: [DSpark](https://huggingface.co/papers/2607.05147), and DeepSpec's code for the tensors' names.

    Example:

    ```python
    >>> from trl_draft_opd import DSparkDraftModel

    >>> drafter = DSparkDraftModel.from_target("Qwen/Qwen3-4B", mask_token_id=151669)
    ```
    """

    config_class = DSparkDraftConfig
    config: DSparkDraftConfig
    names_of_heads = (*DFlashDraftModel.names_of_heads, "markov_head", "confidence_head")

    def __init__(self, config: DSparkDraftConfig):
        super().__init__(config)
        # Without a Markov head all slots are drafted at once, as a DFlash drafter's.
        self.reads_drafts = config.markov_rank > 0
        if config.markov_rank > 0:
            self.markov_head = MarkovHead(config)
        if config.enable_confidence_head:
            reads_markov = config.confidence_head_with_markov
            self.confidence_head = ConfidenceHead(config.hidden_size + (config.markov_rank if reads_markov else 0))
        self.post_init()

    @classmethod
    def from_target(
        cls,
        target: Any,
        *,
        mask_token_id: int,
        num_hidden_layers: int = 5,
        block_size: int = 7,
        target_layer_ids: list[int] | None = None,
        sample_from_anchor: bool = True,
        markov_rank: int = 256,
        enable_confidence_head: bool = True,
        confidence_head_with_markov: bool | None = None,
    ) -> "DSparkDraftModel":
        """
        Make a fresh drafter of the target's shape.

        Args:
            target, mask_token_id, num_hidden_layers, target_layer_ids:
                As in [`DFlashDraftModel.from_target`].
            block_size, sample_from_anchor, markov_rank, enable_confidence_head, confidence_head_with_markov:
                As in [`DSparkDraftConfig`]; the defaults are the published settings. The confidence head reads the
                Markov head's token wherever there is one.

        Raises:
            ValueError: If the target has fewer than 7 layers and no ids are given, or an id or size is out of range.
        """
        config = DSparkDraftConfig(
            **cls.shape_for_target(target, mask_token_id, target_layer_ids),
            num_hidden_layers=num_hidden_layers,
            block_size=block_size,
            sample_from_anchor=sample_from_anchor,
            markov_rank=markov_rank,
            enable_confidence_head=enable_confidence_head,
            confidence_head_with_markov=_or_where_it_can(confidence_head_with_markov, markov_rank),
        )
        return cls(config)

    @classmethod
    def from_dflash(
        cls,
        drafter: DFlashDraftModel,
        *,
        markov_rank: int = 256,
        enable_confidence_head: bool = True,
        confidence_head_with_markov: bool | None = None,
    ) -> Self:
        """
        Make a drafter that starts from a DFlash drafter's weights. The Markov head's second factor is zero, so the
        logits are the DFlash drafter's, bit for bit; `sample_from_anchor` stays what it was, because with another
        every slot would propose for the place beside its own.

        Args:
            drafter ([`DFlashDraftModel`]): Where to start from; it is not changed.
            markov_rank, enable_confidence_head, confidence_head_with_markov:
                As in [`DSparkDraftConfig`].

        Raises:
            ValueError: If `drafter` is of another family, or has a Markov head already.
        """
        # DeepSpec's DFlash drafters are of this class, without a Markov head.
        if drafter.reads_drafts or not isinstance(drafter, DFlashDraftModel):
            raise ValueError(
                "`from_dflash` starts from a DFlash drafter, or from a DSpark drafter without a Markov head, not from "
                f"this {drafter.config.title} drafter. Use `DSparkDraftModel.from_target` for a fresh one."
            )
        shape: dict[str, Any] = {name: getattr(drafter.config, name) for name in DFlashDraftConfig.own_settings()}
        config = DSparkDraftConfig(
            **shape,
            markov_rank=markov_rank,
            enable_confidence_head=enable_confidence_head,
            confidence_head_with_markov=_or_where_it_can(confidence_head_with_markov, markov_rank),
        )
        model = cls(config)
        tensors = {name: value for name, value in drafter.state_dict().items() if not name.startswith("confidence_")}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected and all(name.startswith(("markov_head.", "confidence_head.")) for name in missing)
        if markov_rank > 0:
            nn.init.zeros_(model.markov_head.markov_w2.weight)
        return model.to(device=drafter.device, dtype=drafter.dtype).train(drafter.training)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)

    @property
    def head_parts(self) -> list[HeadPart]:
        if not self.reads_drafts:
            return super().head_parts
        return [*super().head_parts, HeadPart(self.markov_head.markov_w2, self.config.markov_rank)]

    def join_token(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if not self.reads_drafts:
            return hidden
        return torch.cat([hidden, self.markov_head.markov_w1(tokens).to(hidden.dtype)], dim=-1)

    def confidence_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        if not self.config.enable_confidence_head:
            return None
        projection = self.confidence_head.proj
        # Engines keep this head in float32, whatever the others are in.
        with torch.autocast(hidden.device.type, enabled=False):
            return projection(hidden[..., : projection.in_features].to(projection.weight.dtype))[..., 0]


def _or_where_it_can(asked: bool | None, markov_rank: int) -> bool:
    """Return whether a confidence head reads the Markov head; unless asked, it does where there is one."""
    return markov_rank > 0 if asked is None else asked
