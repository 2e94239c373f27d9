# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The EAGLE-3 drafter: one attention layer that reads fused target features at the first step and its own hidden state
and drafted token at every later one. Knows nothing of rollouts or losses.

Pair `i` holds the target's feature at position `i` and the token at `i + 1`. A block at anchor `a` starts from pair
`a - 1`, whose token is the anchor; step `k` has RoPE position `a + k - 2` and proposes the token at `a + k`.

Shape letters:  B = sequences, L = context length, A = anchors per sequence, K = drafts per block, H = hidden size,
                F = feature width, DV = draft vocabulary, h = heads, g = key/value heads, d = head dimension
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from ..attention import anchored_attention
from ..base import DraftContext, Drafter, DraftState, Embed, Project
from ..feed_forward import run_mlp
from ..packing import BlockPacking
from ..target_shape import check_layer_ids, require_layer_ids, shape_from_target
from .configuration_eagle3 import Eagle3DraftConfig
from .draft_vocabulary import DraftVocabulary


class Eagle3Attention(nn.Module):
    """Projections of the drafter's one attention layer; its input is twice the hidden size (token and state)."""

    def __init__(self, config: Eagle3DraftConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """Turn `(B, n, heads * d)` into `(B, heads, n, d)`."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class StepResult(NamedTuple):
    """
    What one step leaves behind.

    Attributes:
        state (`torch.Tensor` of shape `(N, H)`): The layer's output.
        slot_hidden (`torch.Tensor` of shape `(N, H)`): The same behind the norm, ready for the head.
        key (`torch.Tensor` of shape `(B, g, A, 1, d)` or `None`), value (as `key`):
            The step's own key and value; `None` for the first step, whose are the context's.
    """

    state: torch.Tensor
    slot_hidden: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None


@dataclass(frozen=True)
class Eagle3State(DraftState):
    """
    Blocks behind a step.

    Attributes:
        context (`DraftContext`), anchors (`torch.LongTensor` of shape `(B, A)`), embed (`Callable`):
            As the blocks were begun.
        packing (`BlockPacking`): The N blocks that are not padding, which only attention sees.
        fed (`torch.Tensor` of shape `(N, H)`): What the next step reads beside the token.
        keys (`list[torch.Tensor]`), values (`list[torch.Tensor]`): `(B, g, A, 1, d)` of every step but the first.
    """

    context: DraftContext
    anchors: torch.Tensor
    packing: BlockPacking
    fed: torch.Tensor
    embed: Embed
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


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
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)


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
    owns_head = True

    def __init__(self, config: Eagle3DraftConfig):
        super().__init__(config)
        if config.target_layer_ids is None:
            raise ValueError(
                "`target_layer_ids` is not set, so the width of the fused features is unknown. Build the drafter with "
                "`Eagle3DraftModel.from_target(target)`."
            )
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
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        if config.has_reduced_vocabulary:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            is_first = torch.arange(config.vocab_size) < config.draft_vocab_size
            self.register_buffer("t2d", is_first)
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
    ) -> "Eagle3DraftModel":
        """
        Make a fresh drafter of the target's shape; its head starts from the target's rows.

        Args:
            target (`str`, `PreTrainedModel` or `FrozenTarget`):
                The target to draft for.
            target_layer_ids (`list[int]`, *optional*):
                0-based layers to read. Defaults to `[1, N // 2 - 1, N - 4]` of `N` layers, every engine's default.
            draft_vocabulary ([`DraftVocabulary`], *optional*):
                Reduced vocabulary, see `build_draft_vocabulary`. The full one by default, which loses no target mass.
            ttt_steps (`int`, *optional*, defaults to 7):
                Steps of training-time test, as published; the default number of drafts.
            fc_norm (`bool`, *optional*, defaults to `False`), norm_output (`bool`, *optional*, defaults to `False`):
                The EAGLE-3.1 options; off because EAGLE's own code and llama.cpp do not read them.

        Raises:
            ValueError: If the target has fewer than 7 layers and no ids are given, ids are out of range, or the
                draft vocabulary belongs to another vocabulary.
        """
        model = cls.resolve_target(target)
        shape = shape_from_target(model.config)
        num_layers = shape["num_target_layers"]
        require_layer_ids(target_layer_ids, num_layers)
        layer_ids = [1, num_layers // 2 - 1, num_layers - 4] if target_layer_ids is None else target_layer_ids
        check_layer_ids(layer_ids, num_layers)
        head = model.get_output_embeddings().weight.detach().float()
        if draft_vocabulary is not None and draft_vocabulary.t2d.numel() != shape["vocab_size"]:
            raise ValueError(
                f"The draft vocabulary was built over {draft_vocabulary.t2d.numel()} tokens but the target has "
                f"{shape['vocab_size']}. Count tokens again with `count_tokens(dataset, "
                f"vocab_size={shape['vocab_size']})`."
            )
        config = Eagle3DraftConfig(
            **shape,
            target_layer_ids=list(layer_ids),
            draft_vocab_size=None if draft_vocabulary is None else draft_vocabulary.d2t.numel(),
            ttt_steps=ttt_steps,
            fc_norm=fc_norm,
            norm_output=norm_output,
        )
        drafter = cls(config)
        with torch.no_grad():
            if draft_vocabulary is None:
                drafter.lm_head.weight.copy_(head)
            else:
                drafter.d2t.copy_(draft_vocabulary.d2t)
                drafter.t2d.copy_(draft_vocabulary.t2d)
                drafter.lm_head.weight.copy_(head[draft_vocabulary.token_ids.to(head.device)])
        return drafter

    @property
    def max_drafts(self) -> int | None:
        return None

    @property
    def default_num_drafts(self) -> int:
        return self.config.ttt_steps

    @property
    def draft_token_ids(self) -> torch.Tensor | None:
        """Target ids of the head's rows, `(DV,)`; `None` for the full vocabulary."""
        if not self.config.has_reduced_vocabulary:
            return None
        return torch.arange(self.config.draft_vocab_size, device=self.d2t.device) + self.d2t

    def fuse(self, target_features: torch.Tensor) -> torch.Tensor:
        """Fuse the tapped layers, `(B, n, F)` to `(B, n, H)`."""
        if self.config.fc_norm:
            chunks = target_features.chunk(len(self.fc_norm), dim=-1)
            target_features = torch.cat([norm(c) for norm, c in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        if self.config.norm_before_fc:
            target_features = self.input_norm(target_features)
        return self.fc(target_features.to(self.fc.weight.dtype))

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
        width = context.fused.shape[-1]
        packing = BlockPacking(anchors >= 1)
        fed = packing.pack(context.fused.gather(1, (anchors - 1).clamp(min=0)[..., None].expand(-1, -1, width)))
        return self._run_slot(context, anchors, packing, fed, anchor_tokens, embed, 1, [], [])

    def advance(self, state: DraftState, tokens: torch.Tensor, columns: torch.Tensor | None = None) -> "Eagle3State":
        assert isinstance(state, Eagle3State), "a state of this family"
        anchors, packing, fed, keys, values = state.anchors, state.packing, state.fed, state.keys, state.values
        if columns is not None:
            is_padding, columns = columns < 0, columns.clamp(min=0)
            padded = packing.unpack(fed).gather(1, columns[..., None].expand(-1, -1, fed.shape[-1]))
            anchors = anchors.gather(1, columns).masked_fill(is_padding, -1)
            packing = BlockPacking(anchors >= 1)
            fed = packing.pack(padded)
            keys, values = ([_pick_columns(part, columns) for part in parts] for parts in (keys, values))
        return self._run_slot(state.context, anchors, packing, fed, tokens, state.embed, state.slot + 1, keys, values)

    def draft_logits(self, hidden: torch.Tensor, project: Project) -> torch.Tensor:
        return self.lm_head(hidden.to(self.lm_head.weight.dtype))

    def _run_slot(
        self,
        context: DraftContext,
        anchors: torch.Tensor,
        packing: BlockPacking,
        fed: torch.Tensor,
        tokens: torch.Tensor,
        embed: Embed,
        slot: int,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> "Eagle3State":
        """Run one slot of the N blocks on what is fed to it, `(N, H)` states and `(B, A)` tokens."""
        step = self.run_recomputed(self._step, context, anchors, packing, fed, tokens, embed, slot, keys, values)
        if slot > 1:
            # New lists: a step that is computed again must find those it was given.
            keys, values = [*keys, step.key], [*values, step.value]
        fed_next = step.slot_hidden if self.config.norm_output else step.state
        hidden = packing.unpack(step.slot_hidden)
        return Eagle3State(slot, hidden, None, context, anchors, packing, fed_next, embed, keys, values)

    def _step(
        self,
        context: DraftContext,
        anchors: torch.Tensor,
        packing: BlockPacking,
        state: torch.Tensor,
        tokens: torch.Tensor,
        embed: Embed,
        slot: int,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> StepResult:
        """Run one step of the N blocks; from the second step on they also see keys and values of the steps so far."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        joined = layer.attention_input(embed(packing.pack(tokens)).to(state.dtype), state)
        query = attention.split_heads(attention.q_proj(joined)[None])
        cos, sin = self.rotary_emb(query, packing.pack(anchors)[None] + slot - 2)

        def spread(states: torch.Tensor) -> torch.Tensor:
            """Turn `(1, heads, N, d)` into `(B, heads, A, 1, d)`."""
            return packing.unpack(states[0].transpose(0, 1)).transpose(1, 2)[:, :, :, None]

        if slot == 1:
            # The first step's own key is the context entry at `a - 1`.
            query, _ = apply_rotary_pos_emb(query, query, cos, sin)
            own_key = own_value = None
        else:
            key = attention.split_heads(attention.k_proj(joined)[None])
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            own_key, own_value = spread(key), spread(attention.split_heads(attention.v_proj(joined)[None]))
            keys, values = [*keys, own_key], [*values, own_value]
        mixed = anchored_attention(
            spread(query),
            context.keys[0],
            context.values[0],
            keys,
            values,
            anchors.clamp(min=1),
            attention.head_dim**-0.5,
        )
        residual = layer.hidden_norm(state) if self.config.norm_before_residual else state
        hidden = residual + attention.o_proj(packing.pack(mixed[:, :, 0]))
        hidden = hidden + run_mlp(layer.mlp, layer.post_attention_layernorm(hidden))
        return StepResult(hidden, self.norm(hidden), own_key, own_value)

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        if not self.config.has_reduced_vocabulary:
            return draft_ids
        return draft_ids + self.d2t[draft_ids]

    def to_target_probs(self, draft_probs: torch.Tensor) -> torch.Tensor:
        token_ids = self.draft_token_ids
        if token_ids is None:
            return draft_probs
        probs = draft_probs.new_zeros(*draft_probs.shape[:-1], self.config.vocab_size)
        probs[..., token_ids] = draft_probs
        return probs


def _pick_columns(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the blocks in `columns` (`(B, A')`) of `(B, g, A, 1, d)` keys or values."""
    return block.gather(2, columns[:, None, :, None, None].expand(-1, block.shape[1], -1, 1, block.shape[-1]))
