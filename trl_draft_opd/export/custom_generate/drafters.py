# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The drafters of `generate.py` beside this file: read from their published files, each with the keys and values of one
text so far.

Shape letters:  n = new positions, S = block size, K = drafts, H = hidden size, F = width of the fused layers, d = head
                size, DV = tokens that can be drafted
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb


_IDS = "eagle_aux_hidden_state_layer_ids"
_PROJECTIONS = ("q", "k", "v", "o")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

Project = Callable[[torch.Tensor], torch.Tensor]


class Drafter:
    """What the families share: arithmetic on named tensors, and the keys and values of the text."""

    #: Keys and values of the text, per layer `(1, kv_heads, n, d)`; changed in place by no one.
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
    ):
        self.config, self.dtype = config, dtype
        self.tensors = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()
        }
        names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_parameters")
        self.rotary = LlamaRotaryEmbedding(LlamaConfig(**{name: config[name] for name in names})).to(device)
        self.keys, self.values = [], []

    @staticmethod
    def layer_ids_in(config: dict[str, Any]) -> list[int]:
        """Return the 0-based ids of the target's layers that are read."""
        raise NotImplementedError

    @staticmethod
    def names_in(config: dict[str, Any]) -> set[str]:
        """Return the names of the tensors that a drafter of this config consists of."""
        raise NotImplementedError

    @property
    def layer_ids(self) -> list[int]:
        """The same of this drafter."""
        return self.layer_ids_in(self.config)

    @property
    def default_drafts(self) -> int:
        """Drafts per block unless the call says otherwise."""
        raise NotImplementedError

    @property
    def max_drafts(self) -> int | None:
        """Most drafts a block can hold; `None` where nothing bounds it."""
        return None

    def read(self, features: torch.Tensor, next_embeds: torch.Tensor) -> None:
        """Append text: the target's features `(1, n, F)`, and the embedding `(1, n, H)` of the token behind each."""
        raise NotImplementedError

    def draft(self, token: torch.Tensor, count: int, embed: Project, project: Project) -> torch.Tensor:
        """
        Draft the `(1, count)` tokens behind the anchor `token` (`(1, 1)`), which the target has not read yet; `embed`
        and `project` are the target's embedding and head.
        """
        raise NotImplementedError

    def for_new_text(self) -> Any:
        """Return a drafter with the same weights that has read nothing, so that threads stay apart."""
        fresh = copy.copy(self)
        fresh.keys, fresh.values = [], []
        return fresh

    def _append(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """Add entries to every layer's keys and values."""
        if not self.keys:
            self.keys, self.values = keys, values
            return
        self.keys = [torch.cat(pair, dim=2) for pair in zip(self.keys, keys, strict=True)]
        self.values = [torch.cat(pair, dim=2) for pair in zip(self.values, values, strict=True)]

    @property
    def _length(self) -> int:
        """Positions of the text that were read."""
        return self.keys[0].shape[2] if self.keys else 0

    def _norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.tensors[f"{name}.weight"] * scaled.to(states.dtype)

    def _linear(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _heads(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Project `(1, n, ...)` to `(1, heads, n, d)`."""
        return self._linear(name, states).unflatten(-1, (-1, self.config["head_dim"])).transpose(1, 2)

    def _place(self, states: torch.Tensor, start: int) -> torch.Tensor:
        """Rotate `(1, heads, n, d)` states to the positions from `start` on."""
        positions = torch.arange(start, start + states.shape[2], device=states.device)[None]
        cos, sin = self.rotary(states, positions)
        return apply_rotary_pos_emb(states, states, cos, sin)[0]

    def _mlp(self, layer: str, states: torch.Tensor) -> torch.Tensor:
        gate = ACT2FN[self.config.get("hidden_act", "silu")](self._linear(f"{layer}.mlp.gate_proj", states))
        return self._linear(f"{layer}.mlp.down_proj", gate * self._linear(f"{layer}.mlp.up_proj", states))

    def _to_target(self, ids: torch.Tensor) -> torch.Tensor:
        """Turn drafted ids into the target's: `d2t` holds the distances."""
        return ids + self.tensors["d2t"][ids] if "d2t" in self.tensors else ids


def _head_names(config: dict[str, Any], owns_head: bool) -> set[str]:
    is_reduced = config.get("draft_vocab_size", config["vocab_size"]) != config["vocab_size"]
    return ({"lm_head.weight"} if owns_head or is_reduced else set()) | ({"d2t"} if is_reduced else set())


class Eagle3Drafter(Drafter):
    """EAGLE-3: one layer that runs once per draft, on the fused features and the token before."""

    last_state: Any = None

    @staticmethod
    def layer_ids_in(config: dict[str, Any]) -> list[int]:
        return [int(i) for i in config["eagle_config"][_IDS]]

    @staticmethod
    def names_in(config: dict[str, Any]) -> set[str]:
        layer = ("input_layernorm", "hidden_norm", "post_attention_layernorm", *_MLP)
        names = {f"midlayer.{name}.weight" for name in layer} | {"fc.weight", "norm.weight"}
        names |= {f"midlayer.self_attn.{each}_proj.weight" for each in _PROJECTIONS} | _head_names(config, True)
        if config.get("attention_bias"):
            names |= {f"midlayer.self_attn.{each}_proj.bias" for each in _PROJECTIONS}
        if config.get("fc_norm"):
            names |= {f"fc_norm.{i}.weight" for i in range(len(config["eagle_config"][_IDS]))}
        return names | ({"input_norm.weight"} if config.get("norm_before_fc") else set())

    @property
    def default_drafts(self) -> int:
        return self.config.get("ttt_steps", 3)

    def for_new_text(self) -> "Eagle3Drafter":
        fresh = super().for_new_text()
        fresh.last_state = None
        return fresh

    def _fuse(self, features: torch.Tensor) -> torch.Tensor:
        if self.config.get("fc_norm"):
            parts = features.chunk(len(self.layer_ids), dim=-1)
            features = torch.cat([self._norm(f"fc_norm.{i}", part) for i, part in enumerate(parts)], dim=-1)
        if self.config.get("norm_before_fc"):
            features = self._norm("input_norm", features)
        return self._linear("fc", features)

    def _join(self, embeds: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        normed = self._norm("midlayer.input_layernorm", embeds), self._norm("midlayer.hidden_norm", states)
        return torch.cat(normed, dim=-1)

    def _entry(self, joined: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of joined states `(1, n, 2H)` at the positions from `start` on."""
        key, value = (self._heads(f"midlayer.self_attn.{name}_proj", joined) for name in ("k", "v"))
        return self._place(key, start), value

    def read(self, features: torch.Tensor, next_embeds: torch.Tensor) -> None:
        states = self._fuse(features.to(self.dtype))
        key, value = self._entry(self._join(next_embeds.to(self.dtype), states), self._length)
        self._append([key], [value])
        self.last_state = states[:, -1:]

    def draft(self, token: torch.Tensor, count: int, embed: Project, project: Project) -> torch.Tensor:
        state, keys, values, drafts = self.last_state, self.keys[0], self.values[0], []
        position = keys.shape[2] - 1
        for step in range(count):
            joined = self._join(embed(token).to(self.dtype), state)
            if step > 0:
                # The first step's key is the text's last entry.
                key, value = self._entry(joined, position + step)
                keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            query = self._place(self._heads("midlayer.self_attn.q_proj", joined), position + step)
            mixed = functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            attended = self._linear("midlayer.self_attn.o_proj", mixed.transpose(1, 2).flatten(2))
            is_normed = self.config.get("norm_before_residual")
            hidden = attended + (self._norm("midlayer.hidden_norm", state) if is_normed else state)
            hidden = hidden + self._mlp("midlayer", self._norm("midlayer.post_attention_layernorm", hidden))
            normed = self._norm("norm", hidden)
            token = self._to_target(self._linear("lm_head", normed)[:, -1].argmax(dim=-1, keepdim=True))
            drafts.append(token)
            state = normed if self.config.get("norm_output") else hidden
        return torch.cat([token[:, :0], *drafts], dim=1)


class BlockDrafter(Drafter):
    """
    DFlash, and what builds on it: all slots of a block in one pass, next to the features' keys and values in every
    layer. DSpark and DFlash 2 then choose the drafts in turn, each by the one before it.
    """

    @staticmethod
    def layer_ids_in(config: dict[str, Any]) -> list[int]:
        return [int(i) for i in config["target_layer_ids"]]

    @staticmethod
    def names_in(config: dict[str, Any]) -> set[str]:
        nested = config.get("dflash_config") or {}
        layer = {f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", *_MLP)}
        layer |= {f"self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
        layer |= {f"self_attn.{each}_proj.weight" for each in _PROJECTIONS}
        if config.get("attention_bias"):
            layer |= {f"self_attn.{each}_proj.bias" for each in _PROJECTIONS}
        if nested.get("attention_sink_bias"):
            layer |= {"self_attn.attention_sink_bias"}
        names = {"fc.weight", "hidden_norm.weight", "norm.weight"} | _head_names(config, False)
        if nested.get("conv_kernel_size"):
            convolutions = ("base_kernel", "kernel_projection.weight")
            layer |= {f"{part}_conv.{name}" for part in ("attention", "mlp") for name in convolutions}
            selector = ("predecessor_codebook", "successor_codebook", "hidden_projection.weight")
            names |= {f"candidate_selector.{name}" for name in selector}
        if config.get("markov_rank"):
            names |= {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
        if config.get("enable_confidence_head"):
            names |= {"confidence_head.proj.weight", "confidence_head.proj.bias"}
        return names | {f"layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in layer}

    @property
    def _nested(self) -> dict[str, Any]:
        return self.config.get("dflash_config") or {}

    @property
    def _first(self) -> int:
        """The first slot that drafts: the anchor's own, or the one behind it."""
        stated = self.config.get("sample_from_anchor", self._nested.get("sample_from_anchor"))
        return 0 if stated else 1

    @property
    def default_drafts(self) -> int:
        return self.config["block_size"] - self._first

    @property
    def max_drafts(self) -> int:
        return self.default_drafts

    def _key_value(self, layer: str, states: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = self._norm(f"{layer}.self_attn.k_norm", self._heads(f"{layer}.self_attn.k_proj", states))
        value = self._heads(f"{layer}.self_attn.v_proj", states)
        return self._place(key, start), value * self._nested.get("attention_value_scale", 1.0)

    def read(self, features: torch.Tensor, next_embeds: torch.Tensor) -> None:
        injected = self._norm("hidden_norm", self._linear("fc", features.to(self.dtype)))
        layers = range(self.config["num_hidden_layers"])
        keys, values = zip(*(self._key_value(f"layers.{i}", injected, self._length) for i in layers), strict=True)
        self._append(list(keys), list(values))

    def _hidden_of_block(self, token: torch.Tensor, embed: Project) -> torch.Tensor:
        """Return the states `(1, S, H)` of all slots of the block at the anchor."""
        masks = token.new_full((1, self.config["block_size"] - 1), self.config["mask_token_id"])
        hidden = embed(torch.cat([token, masks], dim=1)).to(self.dtype)
        for index in range(self.config["num_hidden_layers"]):
            layer = f"layers.{index}"
            normed, after = self._convolve(f"{layer}.attention_conv", self._norm(f"{layer}.input_layernorm", hidden))
            hidden = hidden + after(self._attend(index, normed))
            normed, after = self._convolve(
                f"{layer}.mlp_conv", self._norm(f"{layer}.post_attention_layernorm", hidden)
            )
            hidden = hidden + after(self._mlp(layer, normed))
        return self._norm("norm", hidden)

    def _attend(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        layer = f"layers.{index}"
        query = self._norm(f"{layer}.self_attn.q_norm", self._heads(f"{layer}.self_attn.q_proj", normed))
        query = self._place(query, self._length)
        key, value = self._key_value(layer, normed, self._length)
        keys, values = torch.cat([self.keys[index], key], dim=2), torch.cat([self.values[index], value], dim=2)
        groups = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        scores = (query @ keys.transpose(2, 3)).float() * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~self._mask(index, scores), float("-inf"))
        sinks = self.tensors.get(f"{layer}.self_attn.attention_sink_bias")
        if sinks is not None:
            # One more place to look at, which holds nothing.
            sink = sinks.float()[None, :, None, None].expand(-1, -1, scores.shape[2], 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(dim=-1)[..., : keys.shape[2]]
        mixed = weights.to(values.dtype) @ values
        return self._linear(f"{layer}.self_attn.o_proj", mixed.transpose(1, 2).flatten(2))

    def _mask(self, index: int, scores: torch.Tensor) -> torch.Tensor:
        """Return what each of the `S` slots sees of the text and the block, `(S, n + S)`."""
        kinds = self.config.get("layer_types") or []
        is_sliding = bool(kinds) and kinds[index] == "sliding_attention"
        # Where nothing is stated, blocks are causal in sliding layers alone.
        is_causal = self.config.get("is_causal")
        is_causal = is_sliding if is_causal is None else is_causal
        slots = torch.arange(self._length, scores.shape[3], device=scores.device)[:, None]
        seen = torch.arange(scores.shape[3], device=scores.device)[None]
        visible = torch.ones_like(seen <= slots) if not is_causal else seen <= slots
        return visible & (slots - seen < self.config["sliding_window"]) if is_sliding else visible

    def _convolve(self, name: str, states: torch.Tensor) -> tuple[torch.Tensor, Project]:
        """Return what a sublayer reads in place of `states` `(1, S, H)`, and what its output passes through."""
        base = self.tensors.get(f"{name}.base_kernel")
        if base is None:
            return states, lambda output: output
        group = self._nested["conv_group_size"]
        own = self._linear(f"{name}.kernel_projection", states).unflatten(-1, (2, base.shape[1], -1))

        def run(side: int, states: torch.Tensor) -> torch.Tensor:
            # A tap reads the slot so many places before, and nothing before the block.
            shifted = [functional.pad(states, (0, 0, tap, 0))[:, : states.shape[1]] for tap in range(base.shape[1])]
            kernels = base[side] + own[:, :, side].repeat_interleave(group, dim=-1)
            return (torch.stack(shifted, dim=2) * kernels).sum(dim=2)

        return run(0, states), lambda output: run(1, output)

    def draft(self, token: torch.Tensor, count: int, embed: Project, project: Project) -> torch.Tensor:
        hidden = self._hidden_of_block(token, embed)[:, self._first : self._first + count]
        logits = self._linear("lm_head", hidden) if "lm_head.weight" in self.tensors else project(hidden)
        drafts = []
        for slot in range(count):
            token = self._to_target(self._choose(logits[:, slot], hidden[:, slot], token))
            drafts.append(token)
        return torch.cat([token[:, :0], *drafts], dim=1)

    def _choose(self, logits: torch.Tensor, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Choose the draft `(1, 1)` of a slot with logits `(1, DV)` behind the token `before` (`(1, 1)`)."""
        if "markov_head.markov_w1.weight" in self.tensors:
            code = self.tensors["markov_head.markov_w1.weight"][before[:, 0]]
            logits = logits + self._linear("markov_head.markov_w2", code)
        if "candidate_selector.predecessor_codebook" in self.tensors:
            scores, candidates = logits.topk(self._nested["selector_top_k"], dim=-1)
            code = self.tensors["candidate_selector.predecessor_codebook"][before[:, 0]]
            code = code * self._linear("candidate_selector.hidden_projection", hidden)
            scores = (
                scores + (self.tensors["candidate_selector.successor_codebook"][candidates] @ code[..., None])[..., 0]
            )
            return candidates.gather(1, scores.argmax(dim=-1, keepdim=True))
        return logits.argmax(dim=-1, keepdim=True)


#: By the first of `architectures` in the flat layout.
DRAFTERS: dict[str, type[Drafter]] = {
    "LlamaForCausalLMEagle3": Eagle3Drafter,
    "DFlashDraftModel": BlockDrafter,
    "Qwen3DSparkModel": BlockDrafter,
    "DFlash2DraftModel": BlockDrafter,
}
