# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The EAGLE-3 drafter: one attention layer that reads fused target features at the first step and its own hidden state
and drafted token at every later one.

Pair `i` holds the target's feature at position `i` and the token at `i + 1`. A block at anchor `a` starts from pair
`a - 1`, whose token is the anchor; step `k` has RoPE position `a + k - 2` and proposes the token at `a + k`.

Shape letters:  B = sequences, L = context length, A = anchors per sequence, K = drafts per block, H = hidden size,
                F = feature width, DV = draft vocabulary, h = heads, g = key/value heads, d = head dimension
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from ..attention import AttentionPlan, anchored_attention
from ..base import DraftContext, Drafter, DraftState, Embed
from ..draft_vocabulary import DraftVocabulary
from ..feed_forward import run_mlp
from ..packing import BlockPacking
from ..precision import activation_dtype, run_norm
from ..target_shape import middle_layer_ids, shape_from_target
from .configuration_eagle3 import Eagle3DraftConfig


class Eagle3Attention(nn.Module):
    """Projections of the drafter's one attention layer; its input is twice the hidden size (token and state)."""

    def __init__(self, config: Eagle3DraftConfig):
        super().__init__()
        assert config.head_dim is not None, "set by the config"
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(2 * config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(2 * config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """Turn `(B, n, heads * d)` into `(B, heads, n, d)`."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


@dataclass(frozen=True)
class _Blocks:
    """
    Blocks between two steps.

    Attributes:
        context (`DraftContext`), anchors (`torch.LongTensor` of shape `(B, A)`), embed (`Callable`):
            As the blocks were begun.
        packing (`BlockPacking`): The N blocks that are not padding, which only attention sees.
        plan (`AttentionPlan`): What they see of the context.
        fed (`torch.Tensor` of shape `(N, H)`): What the next step reads beside the token.
        keys (`list[torch.Tensor]`), values (`list[torch.Tensor]`):
            `(B, g, A, 1, d)` of every step but the first, whose are the context's.
    """

    context: DraftContext
    anchors: torch.Tensor
    embed: Embed
    packing: BlockPacking
    plan: AttentionPlan
    fed: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


@dataclass(frozen=True)
class Eagle3State(DraftState):
    """Blocks behind a step, which `blocks` describes for the next one."""

    blocks: _Blocks


class Eagle3Layer(nn.Module):
    """The drafter's decoder layer under its published tensor names."""

    def __init__(self, config: Eagle3DraftConfig):
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Eagle3Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def attention_input(self, embeds: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Join the normed token embedding and the normed state, `(..., 2H)`."""
        return torch.cat([run_norm(self.input_layernorm, embeds), run_norm(self.hidden_norm, hidden)], dim=-1)


class Eagle3DraftModel(Drafter):
    """
    EAGLE-3 drafter.

    Source: Li et al., [EAGLE-3](https://huggingface.co/papers/2503.01840), section 3.

    Example:

    ```python
    >>> from trl_draft_opd import Eagle3DraftModel

    >>> drafter = Eagle3DraftModel.from_target("Qwen/Qwen3-4B")
    ```
    """

    config_class = Eagle3DraftConfig
    config: Eagle3DraftConfig
    _no_split_modules = ["Eagle3Layer"]

    def __init__(self, config: Eagle3DraftConfig):
        super().__init__(config)
        if config.target_layer_ids is None:
            raise ValueError(
                "`target_layer_ids` is not set. Build the drafter with `Eagle3DraftModel.from_target(target)`."
            )
        assert config.target_hidden_size is not None and config.draft_vocab_size is not None, "set by the config"
        num_taps = len(config.target_layer_ids)
        feature_width = num_taps * config.target_hidden_size
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                LlamaRMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in range(num_taps)
            )
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(feature_width, eps=config.rms_norm_eps)
        self.fc = nn.Linear(feature_width, config.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_head()
        self.rotary_emb = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]  it reads shapes alone
        self.post_init()

    @classmethod
    def from_target(
        cls,
        target: Any,
        *,
        target_layer_ids: list[int] | None = None,
        draft_vocabulary: DraftVocabulary | None = None,
        ttt_steps: int = 7,
        fc_norm: bool = False,
        norm_output: bool = False,
        norm_before_fc: bool = False,
    ) -> "Eagle3DraftModel":
        """
        Make a fresh drafter of the target's shape; its head starts from the target's rows.

        Args:
            target (`str`, `PreTrainedModel` or `FrozenTarget`): The target to draft for.
            target_layer_ids (`list[int]`, *optional*):
                0-based layers to read. Defaults to `[1, N // 2 - 1, N - 4]` of `N` layers, every engine's default.
            draft_vocabulary ([`DraftVocabulary`], *optional*):
                Reduced vocabulary, see `build_draft_vocabulary`. The full one by default, which [`DraftSFTTrainer`]
                reduces by the responses if it is large, see `draft_vocab_size` of [`DraftSFTConfig`].
            ttt_steps (`int`, *optional*, defaults to 7):
                Steps of training-time test, as published; the default number of drafts.
            fc_norm (`bool`, *optional*, defaults to `False`), norm_output (`bool`, *optional*, defaults to `False`):
                The EAGLE-3.1 options; off because EAGLE's own code and llama.cpp do not read them.
            norm_before_fc (`bool`, *optional*, defaults to `False`):
                One norm on all features in place of `fc_norm`. With `norm_output`, what speculators trains today.

        Raises:
            ValueError: If the target has fewer than 7 layers and no ids are given, ids are out of range, or the
                draft vocabulary belongs to another vocabulary.
        """
        model = cls.resolve_target(target)
        shape = shape_from_target(model.config)
        if target_layer_ids is None:
            target_layer_ids = middle_layer_ids(shape["num_target_layers"])
        if draft_vocabulary is not None and draft_vocabulary.t2d.numel() != shape["vocab_size"]:
            raise ValueError(
                f"The draft vocabulary was built over {draft_vocabulary.t2d.numel()} tokens but the target has "
                f"{shape['vocab_size']}. Count tokens again with this `vocab_size`."
            )
        config = Eagle3DraftConfig(
            **shape,
            target_layer_ids=list(target_layer_ids),
            draft_vocab_size=None if draft_vocabulary is None else draft_vocabulary.d2t.numel(),
            ttt_steps=ttt_steps,
            fc_norm=fc_norm,
            norm_output=norm_output,
            norm_before_fc=norm_before_fc,
        )
        drafter = cls(config)
        output_embeddings: Any = model.get_output_embeddings()
        head = output_embeddings.weight.detach().float()
        with torch.no_grad():
            if draft_vocabulary is None:
                drafter.lm_head.weight.copy_(head)
            else:
                drafter.d2t.copy_(draft_vocabulary.d2t)
                drafter.t2d.copy_(draft_vocabulary.t2d)
                drafter.lm_head.weight.copy_(head[draft_vocabulary.token_ids.to(head.device)])
        drafter.vocabulary_is_open = draft_vocabulary is None
        return drafter

    @property
    def default_num_drafts(self) -> int:
        return self.config.ttt_steps

    def fuse(self, target_features: torch.Tensor) -> torch.Tensor:
        """Fuse the tapped layers, `(B, n, F)` to `(B, n, H)`."""
        if self.config.fc_norm:
            chunks = target_features.chunk(len(self.fc_norm), dim=-1)
            normed = [run_norm(norm, chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)]
            target_features = torch.cat(normed, dim=-1)
        if self.config.norm_before_fc:
            target_features = run_norm(self.input_norm, target_features)
        return self.fc(target_features.to(activation_dtype(self.fc.weight)))

    def encode_context(
        self, target_features: torch.Tensor, next_ids: torch.Tensor, position_ids: torch.Tensor, embed: Embed
    ) -> DraftContext:
        fused = self.fuse(target_features)
        attention = self.midlayer.self_attn
        joined = self.midlayer.attention_input(embed(next_ids).to(fused.dtype), fused)
        key = attention.split_heads(attention.k_proj(joined))
        value = attention.split_heads(attention.v_proj(joined))
        cos, sin = self.rotary_emb(key, position_ids)
        _, key = apply_rotary_pos_emb(key, key, cos, sin)
        return DraftContext(keys=[key], values=[value], fused=fused)

    def begin(
        self,
        context: DraftContext,
        anchors: torch.Tensor,
        anchor_tokens: torch.Tensor,
        num_drafts: int,
        embed: Embed,
    ) -> "Eagle3State":
        assert context.fused is not None, "a context of this family"
        packing, plan = context.place_blocks(anchors)
        index = (anchors - 1).clamp(min=0)[..., None].expand(-1, -1, context.fused.shape[-1])
        fed = packing.pack(context.fused.gather(1, index))
        return self._run_slot(_Blocks(context, anchors, embed, packing, plan, fed, [], []), anchor_tokens, 1)

    def advance(self, state: DraftState, tokens: torch.Tensor, columns: torch.Tensor | None = None) -> "Eagle3State":
        assert isinstance(state, Eagle3State), "a state of this family"
        blocks = state.blocks
        if columns is not None:
            is_padding, columns = columns < 0, columns.clamp(min=0)
            index = columns[..., None].expand(-1, -1, blocks.fed.shape[-1])
            anchors = blocks.anchors.gather(1, columns).masked_fill(is_padding, -1)
            packing, plan = blocks.context.place_blocks(anchors)
            fed = packing.pack(blocks.packing.unpack(blocks.fed).gather(1, index))
            keys, values = ([_pick_columns(part, columns) for part in parts] for parts in (blocks.keys, blocks.values))
            blocks = _Blocks(blocks.context, anchors, blocks.embed, packing, plan, fed, keys, values)
        return self._run_slot(blocks, tokens, state.slot + 1)

    def _run_slot(self, blocks: _Blocks, tokens: torch.Tensor, slot: int) -> "Eagle3State":
        slot_hidden, blocks = self.run_recomputed(self._step, blocks, tokens, slot)
        return Eagle3State(slot, blocks.packing.unpack(slot_hidden), None, blocks)

    def _step(self, blocks: _Blocks, tokens: torch.Tensor, slot: int) -> tuple[torch.Tensor, _Blocks]:
        """Run one step on its tokens, `(B, A)`; return its states `(N, H)`, ready for the head, and the blocks."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        packing, fed, keys, values = blocks.packing, blocks.fed, blocks.keys, blocks.values
        joined = layer.attention_input(blocks.embed(packing.pack(tokens)).to(fed.dtype), fed)
        query = attention.split_heads(attention.q_proj(joined)[None])
        cos, sin = self.rotary_emb(query, packing.pack(blocks.plan.positions)[None] + slot - 2)

        def spread(states: torch.Tensor) -> torch.Tensor:
            """Turn `(1, heads, N, d)` into `(B, heads, A, 1, d)`."""
            return packing.unpack(states[0].transpose(0, 1)).transpose(1, 2)[:, :, :, None]

        if slot == 1:
            # The first step's own key is the context entry at `a - 1`.
            query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        else:
            key = attention.split_heads(attention.k_proj(joined)[None])
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            value = attention.split_heads(attention.v_proj(joined)[None])
            # New lists: a step that is computed again must find those it was given.
            keys, values = [*keys, spread(key)], [*values, spread(value)]
        mixed = anchored_attention(
            spread(query),
            blocks.context.keys[0],
            blocks.context.values[0],
            keys,
            values,
            blocks.plan,
            attention.head_dim**-0.5,
        )
        residual = run_norm(layer.hidden_norm, fed) if self.config.norm_before_residual else fed
        hidden = residual + attention.o_proj(packing.pack(mixed[:, :, 0]))
        hidden = hidden + run_mlp(layer.mlp, run_norm(layer.post_attention_layernorm, hidden))
        slot_hidden = run_norm(self.norm, hidden)
        fed = slot_hidden if self.config.norm_output else hidden
        return slot_hidden, replace(blocks, fed=fed, keys=keys, values=values)


def _pick_columns(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the blocks in `columns` (`(B, A')`) of `(B, g, A, 1, d)` keys or values."""
    return block.gather(2, columns[:, None, :, None, None].expand(-1, block.shape[1], -1, 1, block.shape[-1]))
