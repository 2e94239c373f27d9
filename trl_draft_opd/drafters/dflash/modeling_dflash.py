# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The DFlash drafter: fills a block of masks in one pass, reading the target's features as injected keys and values in
every layer.

Its `forward` has the signature of transformers' native DFlash assistants, so `target.generate(...,
assistant_model=drafter, speculation_type="dflash")` works with the plain form; `begin` runs any number of blocks of a
batch at once.

A block holds the anchor and `S - 1` masks. Its position `i` drafts the token at anchor `+ i`, the anchor's none
(`S - 1` drafts); with `sample_from_anchor`, the token at anchor `+ i + 1` (`S` drafts).

Shape letters:  B = sequences, L = context length, A = anchors per sequence, S = block size, K = drafts per block, H =
                hidden size, F = feature width
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding, rotate_half

from ...utils.versions import CACHE_NAME
from ..attention import AttentionPlan, anchored_attention
from ..base import DraftContext, Drafter, DraftState, Embed
from ..feed_forward import run_mlp
from ..packing import BlockPacking
from ..precision import activation_dtype, run_norm
from ..target_shape import shape_from_target, spread_layer_ids
from .configuration_dflash import DFlashDraftConfig


Attend = Callable[[torch.Tensor], torch.Tensor]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `(B, heads, n, d)` states by the angles of their positions, `(B, n, d)` each."""
    return states * cos[:, None] + rotate_half(states) * sin[:, None]


class DFlashAttention(nn.Module):
    """Qwen3-style attention whose keys and values come from the context features and from the block."""

    def __init__(self, config: DFlashDraftConfig, layer: int):
        super().__init__()
        assert config.head_dim is not None, "set by the config"
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.sight, self.value_scale = config.sight_of(layer), config.attention_value_scale
        # The published name; no bias, but a logit that no key has.
        self.attention_sink_bias = None
        if config.attention_sinks:
            self.attention_sink_bias = nn.Parameter(torch.zeros(config.num_attention_heads))

    def query(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return rotated queries `(B, heads, n, d)` of `(B, n, H)` states."""
        split = self.q_proj(hidden).unflatten(-1, (-1, self.head_dim))
        return rotate(run_norm(self.q_norm, split).transpose(1, 2), cos, sin)

    def key_value(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotated keys and values `(B, kv_heads, n, d)` of `(B, n, H)` states."""
        key = run_norm(self.k_norm, self.k_proj(hidden).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        value = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return rotate(key, cos, sin), value if self.value_scale == 1 else value * self.value_scale

    def attend_natively(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Return the attention of one block, `(B, heads, S, d)`, for queries of that shape, and keys and values `(B,
        kv_heads, n, d)` of the last `n` tokens, the block's own among them; `mask`, `(B, n or more)`, is false where
        all queries are blind.
        """
        num_queries, num_keys = query.shape[2], key.shape[2]
        mask = None if mask is None else mask[:, None, None, -num_keys:]
        window, is_causal = self.sight
        # Tokens between a key and a query; below 0 for keys behind it. A window sees no less than the block.
        places = torch.arange(num_keys, device=key.device)
        behind = places[-num_queries:, None] - places
        if window is not None:
            mask = behind < window if mask is None else mask & (behind < window)
        if is_causal:
            mask = behind >= 0 if mask is None else mask & (behind >= 0)
        if self.attention_sink_bias is not None:
            # One more key, whose score is the sink and whose value is zero.
            key, value = (nn.functional.pad(states, (0, 0, 0, 1)) for states in (key, value))
            scores = query.new_zeros(query.shape[0], query.shape[1], num_queries, num_keys + 1)
            scores[..., -1] = self.attention_sink_bias.to(query.dtype)[:, None]
            if mask is not None:
                scores[..., :-1].masked_fill_(~mask, float("-inf"))
            mask = scores
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class DFlashLayer(nn.Module):
    """One decoder layer under its published tensor names."""

    def __init__(self, config: DFlashDraftConfig, layer: int):
        super().__init__()
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DFlashAttention(config, layer)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Run the layer on block states `(N, n, H)`; `attend` mixes the normed ones with all that they see."""
        hidden = hidden + self.self_attn.o_proj(attend(run_norm(self.input_layernorm, hidden)))
        return hidden + run_mlp(self.mlp, run_norm(self.post_attention_layernorm, hidden))


@dataclass(frozen=True)
class DFlashState(DraftState):
    """
    Blocks that are drafted whole.

    Attributes:
        block (`torch.Tensor` of shape `(B, A, K, H)`): What the layers make of all slots of the blocks as begun.
        columns (`torch.Tensor` of shape `(B, A')` or `None`): The blocks among them that these are; all if `None`.
    """

    block: torch.Tensor
    columns: torch.Tensor | None

    def slots(self, first: int, count: int) -> torch.Tensor:
        """Return what the layers made of `count` slots from slot `first` on, `(B, A', count, H)`."""
        slots = self.block[:, :, first - 1 : first - 1 + count]
        if self.columns is None:
            return slots
        return slots.gather(1, self.columns[..., None, None].expand(-1, -1, *slots.shape[2:]))


class DFlashDraftModel(Drafter):
    """
    DFlash drafter.

    Source: [DFlash](https://huggingface.co/papers/2602.06036), section 3.

    Example:

    ```python
    >>> from trl_draft_opd import DFlashDraftModel

    >>> drafter = DFlashDraftModel.from_target("Qwen/Qwen3-4B", mask_token_id=151669)
    ```
    """

    config_class = DFlashDraftConfig
    config: DFlashDraftConfig
    layer_class = DFlashLayer
    main_input_name = "noise_embeds"
    _no_split_modules = ["DFlashLayer"]
    reads_drafts = False

    def __init__(self, config: DFlashDraftConfig):
        super().__init__(config)
        if config.target_layer_ids is None or config.mask_token_id is None:
            raise ValueError(
                f"`target_layer_ids` ({config.target_layer_ids}) and `mask_token_id` ({config.mask_token_id}) must "
                "both be set. Build the drafter with `DFlashDraftModel.from_target(target, mask_token_id=...)`."
            )
        assert config.target_hidden_size is not None, "set by the config"
        feature_width = len(config.target_layer_ids) * config.target_hidden_size
        self.fc = nn.Linear(feature_width, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        layers = nn.ModuleList(self.layer_class(config, index) for index in range(config.num_hidden_layers))
        self.layers = cast(list[DFlashLayer], layers)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)  # pyright: ignore[reportArgumentType]  it reads shapes alone
        self.make_head()
        self.post_init()

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
    ) -> "DFlashDraftModel":
        """
        Make a fresh drafter of the target's shape.

        Args:
            target (`str`, `PreTrainedModel` or `FrozenTarget`): The target to draft for.
            mask_token_id (`int`):
                An id inside the target's embedding that no text uses, see [`FrozenTarget.find_mask_token_id`].
            num_hidden_layers (`int`, *optional*, defaults to 5):
                Layers of the drafter, as published.
            block_size (`int`, *optional*, defaults to 16):
                Positions of a block, as published: the anchor's and 15 masks.
            target_layer_ids (`list[int]`, *optional*):
                0-based layers to read. Defaults to five ids spread over layers `1..N - 3`, the published rule.
            sample_from_anchor (`bool`, *optional*, defaults to `False`):
                Whether the anchor's position drafts too, see [`DFlashDraftConfig`].

        Raises:
            ValueError: If the target has fewer than 7 layers and no ids are given, or an id or size is out of range.
        """
        shape = cls.shape_for_target(target, mask_token_id, target_layer_ids)
        settings = {"block_size": block_size, "sample_from_anchor": sample_from_anchor}
        return cls(DFlashDraftConfig(**shape, num_hidden_layers=num_hidden_layers, **settings))

    @classmethod
    def shape_for_target(cls, target: Any, mask_token_id: int, target_layer_ids: list[int] | None) -> dict[str, Any]:
        """Return the arguments of a config that the target decides; the arguments are those of [`from_target`]."""
        shape = shape_from_target(cls.resolve_target(target).config)
        if target_layer_ids is None:
            target_layer_ids = spread_layer_ids(shape["num_target_layers"])
        special = shape["eos_token_id"] if isinstance(shape["eos_token_id"], list) else [shape["eos_token_id"]]
        special = [*special, shape["bos_token_id"], shape["pad_token_id"]]
        if mask_token_id in special:
            raise ValueError(
                f"`mask_token_id` {mask_token_id} is the target's eos, bos or pad token. Choose an id no text uses."
            )
        return shape | {"target_layer_ids": list(target_layer_ids), "mask_token_id": mask_token_id}

    @property
    def max_drafts(self) -> int | None:
        return self.config.drafts_per_block

    @property
    def default_num_drafts(self) -> int:
        return self.config.drafts_per_block

    def _inject(self, target_features: torch.Tensor) -> torch.Tensor:
        """Turn features `(B, n, F)` into the states `(B, n, H)` whose keys and values every layer reads."""
        return run_norm(self.hidden_norm, self.fc(target_features.to(activation_dtype(self.fc.weight))))

    def encode_context(
        self, target_features: torch.Tensor, next_ids: torch.Tensor, position_ids: torch.Tensor, embed: Embed
    ) -> DraftContext:
        injected = self._inject(target_features)
        cos, sin = self.rotary_emb(injected, position_ids)
        pairs = [layer.self_attn.key_value(injected, cos, sin) for layer in self.layers]
        return DraftContext(keys=[key for key, _ in pairs], values=[value for _, value in pairs], fused=None)

    def forward(
        self,
        noise_embeds: torch.Tensor,
        context_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
        use_cache: bool | None = None,
        past_key_values: Any | None = None,
    ) -> BaseModelOutputWithPast:
        """
        Run one block per sequence over the injected context, as transformers' generation does.

        Args:
            noise_embeds (`torch.Tensor` of shape `(B, S, H)`): Embeddings of the anchor and the masks of each block.
            context_hidden_states (`torch.Tensor` of shape `(B, n, F)`):
                The target's features that are not yet in `cache`.
            attention_mask (`torch.Tensor` of shape `(B, cached + n + S)`, *optional*): 0 hides a key from all queries.
            position_ids (`torch.LongTensor` of shape `(B, n + S)`, *optional*): Of the new context and the block.
            cache (`DFlashCache`, *optional*): Keys and values of earlier context, used iff it is given.
            use_cache (`bool`, *optional*): Not read; part of the native signature.
            past_key_values (`DFlashCache`, *optional*): The same as `cache`, for versions that call it so.

        Returns:
            `BaseModelOutputWithPast` whose `last_hidden_state` has the shape of `noise_embeds`; the anchor's own
            position proposes nothing.

        Raises:
            ValueError: If the drafter drafts otherwise than by the target's head from the slots behind the anchor's,
                which is all that the caller does with the states.
        """
        self._check_native()
        cache = past_key_values if cache is None else cache
        injected = self._inject(context_hidden_states)
        num_context, block = injected.shape[1], noise_embeds.shape[1]
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(seen, seen + num_context + block, device=noise_embeds.device)[None]
        hidden = noise_embeds.to(injected.dtype)
        cos, sin = self.rotary_emb(hidden, position_ids)
        mask = None if attention_mask is None else attention_mask.bool()

        def attend(layer: DFlashLayer, index: int, normed: torch.Tensor) -> torch.Tensor:
            query = layer.self_attn.query(normed, cos[:, num_context:], sin[:, num_context:])
            key, value = layer.self_attn.key_value(torch.cat([injected, normed], dim=1), cos, sin)
            if cache is not None:
                key, value = cache.update(key, value, index)
            mixed = layer.self_attn.attend_natively(query, key, value, mask)
            return mixed.transpose(1, 2).flatten(2)

        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, partial(attend, layer, index))
        return BaseModelOutputWithPast(last_hidden_state=run_norm(self.norm, hidden), **{CACHE_NAME: cache})

    def _check_native(self) -> None:
        lacking = [f"what {self.config.title} adds to DFlash"] if self.reads_drafts else []
        lacking += ["its draft in the anchor's slot"] if self.config.sample_from_anchor else []
        lacking += ["its head of a reduced vocabulary"] if self.config.owns_head else []
        if lacking:
            raise ValueError(
                f"transformers' `assistant_model` would draft without {', '.join(lacking)}, so other tokens than "
                "this drafter's. Export it, and call `target.generate(..., custom_generate=FOLDER, "
                "trust_remote_code=True)` without `assistant_model`."
            )

    def begin(
        self,
        context: DraftContext,
        anchors: torch.Tensor,
        anchor_tokens: torch.Tensor,
        num_drafts: int,
        embed: Embed,
    ) -> "DFlashState":
        # Always as wide as in training, because slots see the masks behind them; fewer drafts are fewer slots read.
        assert self.config.mask_token_id is not None
        masks = anchor_tokens.new_full((*anchors.shape, self.config.block_size - 1), self.config.mask_token_id)
        noise_embeds = embed(torch.cat([anchor_tokens[..., None], masks], dim=-1))
        packing, plan = context.place_blocks(anchors)
        hidden = packing.pack(noise_embeds.to(activation_dtype(self.fc.weight)))
        positions = packing.pack(plan.positions)[:, None] + torch.arange(self.config.block_size, device=anchors.device)
        rotation = self.rotary_emb(hidden, positions)
        for layer, key, value in zip(self.layers, context.keys, context.values, strict=True):
            hidden = self.run_recomputed(self._run_layer, layer, hidden, rotation, key, value, plan, packing)
        start = 0 if self.config.sample_from_anchor else 1
        block = packing.unpack(run_norm(self.norm, hidden))[:, :, start : start + num_drafts]
        first = self.join_token(block[:, :, 0], anchor_tokens)
        return DFlashState(1, first, None if self.reads_drafts else block, block, None)

    def advance(self, state: DraftState, tokens: torch.Tensor, columns: torch.Tensor | None = None) -> "DFlashState":
        assert isinstance(state, DFlashState), "a state of this family"
        if columns is not None:
            columns = columns.clamp(min=0)
            columns = columns if state.columns is None else state.columns.gather(1, columns)
            state = replace(state, columns=columns)
        hidden = self.join_token(state.slots(state.slot + 1, 1)[:, :, 0], tokens)
        return replace(state, slot=state.slot + 1, hidden=hidden)

    def run_along(self, state: DraftState, drafts: torch.Tensor) -> tuple["DFlashState", torch.Tensor]:
        assert isinstance(state, DFlashState), "a state of this family"
        following = self.join_token(state.slots(state.slot + 1, drafts.shape[-1]), drafts)
        hidden = torch.cat([state.hidden[:, :, None], following], dim=2)
        return replace(state, slot=state.slot + drafts.shape[-1], hidden=hidden[:, :, -1]), hidden

    def join_token(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """
        Make states ready for the head, `(..., W)`, of what the layers make of a slot, `(..., H)`, and the token before
        it, `(...)`, in target ids. A family whose slots read no draft has nothing to join.
        """
        return hidden

    def _run_layer(
        self,
        layer: DFlashLayer,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        context_key: torch.Tensor,
        context_value: torch.Tensor,
        plan: AttentionPlan,
        packing: BlockPacking,
    ) -> torch.Tensor:
        """Run one layer on `(N, S, H)` states of blocks, which see the context as planned."""
        attention = layer.self_attn

        def spread(states: torch.Tensor) -> torch.Tensor:
            """Turn `(N, heads, S, d)` into `(B, heads, A, S, d)`."""
            return packing.unpack(states).transpose(1, 2)

        def attend(normed: torch.Tensor) -> torch.Tensor:
            key, value = attention.key_value(normed, *rotation)
            mixed = anchored_attention(
                spread(attention.query(normed, *rotation)),
                context_key,
                context_value,
                [spread(key)],
                [spread(value)],
                plan,
                attention.head_dim**-0.5,
                sight=attention.sight,
                sinks=attention.attention_sink_bias,
            )
            return packing.pack(mixed)

        return layer(hidden, attend)
