# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Readers of exported folders written from the descriptions of those who consume them, without any of the package's
drafters: what EAGLE's and z-lab's code compute from the flat files, and how vLLM and SGLang rename tensors and read
layer ids.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


# ---- what the reference codes compute -------------------------------------------------------------------------------


def read_flat(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return config and tensors, weights in float32."""
    tensors = load_file(folder / "model.safetensors")
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return json.loads((folder / "config.json").read_text()), wide


def _norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(states: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate `(heads, n, d)` states to `(n,)` positions, halves paired."""
    half = states.shape[-1] // 2
    angles = positions[:, None].float() * theta ** (-torch.arange(half).float() / half)
    cos, sin = angles.cos(), angles.sin()
    left, right = states[..., :half], states[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attend with `(h, n, d)` queries to `(g, m, d)` keys under an `(n, m)` mask; return `(n, h * d)`."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    mixed = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ value
    return mixed.transpose(0, 1).flatten(1)


def _mlp(states: torch.Tensor, tensors: dict, prefix: str) -> torch.Tensor:
    gate, up = (states @ tensors[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return (torch.nn.functional.silu(gate) * up) @ tensors[f"{prefix}mlp.down_proj.weight"].T


def eagle_drafts(folder: Path, hidden_states: tuple, ids: torch.Tensor, num_drafts: int) -> tuple[list, list]:
    """
    Draft as EAGLE-3's own code does: the whole text in one pass, then one token at a time on a growing cache.

    Args:
        folder (`Path`): A flat export.
        hidden_states (`tuple` of `(n, H)`): The target's hidden states, embeddings first, of all but the last token.
        ids (`torch.LongTensor` of shape `(n + 1,)`): The text; its last token is the anchor.
        num_drafts (`int`): Drafts.

    Returns:
        `list[int]` of the drafts, as ids of the target, and the logits of each slot.
    """
    config, t = read_flat(folder)
    heads, groups, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta, layer = config["rms_norm_eps"], config["rope_theta"], "midlayer."
    # SGLang's reading of the nested ids; EAGLE's code knows the same three boundaries by convention.
    boundaries = [i + 1 for i in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
    state = torch.cat([hidden_states[b] for b in boundaries], dim=-1) @ t["fc.weight"].T
    tokens, start = ids[1:], 0
    keys, values, drafts, all_logits = [], [], [], []
    for _ in range(num_drafts):
        embeds = t["embed_tokens.weight"][tokens]
        joined = torch.cat(
            [
                _norm(embeds, t[layer + "input_layernorm.weight"], eps),
                _norm(state, t[layer + "hidden_norm.weight"], eps),
            ],
            dim=-1,
        )
        positions = torch.arange(start, start + len(tokens))
        split = {
            name: (joined @ t[f"{layer}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, width)).transpose(0, 1)
            for name in "qkv"
        }
        keys.append(_rotate(split["k"], positions, theta))
        values.append(split["v"])
        seen = torch.arange(start + len(tokens))
        mixed = _attend(
            _rotate(split["q"], positions, theta),
            torch.cat(keys, dim=1),
            torch.cat(values, dim=1),
            seen[None] <= positions[:, None],
        )
        hidden = state + mixed @ t[layer + "self_attn.o_proj.weight"].T
        hidden = hidden + _mlp(_norm(hidden, t[layer + "post_attention_layernorm.weight"], eps), t, layer)
        logits = _norm(hidden[-1], t["norm.weight"], eps) @ t["lm_head.weight"].T
        draft = int(logits.argmax())
        all_logits.append(logits)
        drafts.append(draft + int(t["d2t"][draft]) if "d2t" in t else draft)
        # What is fed back is the state before the final norm, with the drafted token.
        start, tokens, state = start + len(tokens), torch.tensor(drafts[-1:]), hidden[-1:]
    assert heads == split["q"].shape[0] and groups == split["k"].shape[0]
    return drafts, all_logits


def zlab_hidden(folder: Path, hidden_states: tuple, block: torch.Tensor) -> torch.Tensor:
    """
    Run one block as z-lab's DFlash code does.

    Args:
        folder (`Path`): A flat export.
        hidden_states (`tuple` of `(n, H)`):
            The target's hidden states, embeddings first, of the text before the anchor.
        block (`torch.Tensor` of shape `(B, H)`): Embeddings of the anchor and the masks.

    Returns:
        `torch.Tensor` of shape `(B, H)`: states of the block, ready for the target's head.
    """
    config, t = read_flat(folder)
    width, eps, theta = config["head_dim"], config["rms_norm_eps"], config["rope_theta"]
    assert config["is_causal"] is False and set(config["layer_types"]) == {"full_attention"}
    ids = config["dflash_config"]["target_layer_ids"]
    context = torch.cat([hidden_states[i + 1] for i in ids], dim=-1) @ t["fc.weight"].T
    context = _norm(context, t["hidden_norm.weight"], eps)
    length, size = len(context), len(block)
    assert size == config["dflash_config"]["block_size"]
    state, everything = block, torch.ones(size, length + size, dtype=torch.bool)
    for index in range(config["num_hidden_layers"]):
        layer = f"layers.{index}."
        normed = _norm(state, t[layer + "input_layernorm.weight"], eps)

        def heads(states: torch.Tensor, name: str, layer: str = layer) -> torch.Tensor:
            projected = states @ t[f"{layer}self_attn.{name}_proj.weight"].T
            return projected.unflatten(-1, (-1, width)).transpose(0, 1)

        both = torch.cat([context, normed])
        query = _norm(heads(normed, "q"), t[layer + "self_attn.q_norm.weight"], eps)
        key = _norm(heads(both, "k"), t[layer + "self_attn.k_norm.weight"], eps)
        query = _rotate(query, torch.arange(length, length + size), theta)
        mixed = _attend(query, _rotate(key, torch.arange(length + size), theta), heads(both, "v"), everything)
        state = state + mixed @ t[layer + "self_attn.o_proj.weight"].T
        state = state + _mlp(_norm(state, t[layer + "post_attention_layernorm.weight"], eps), t, layer)
    return _norm(state, t["norm.weight"], eps)


# ---- how the engines name tensors -----------------------------------------------------------------------------------


_STACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def _stack(name: str) -> str:
    return ".".join(_STACKED.get(part, part) for part in name.split("."))


def vllm_parameters(names: set[str], config: dict) -> set[str]:
    """Return the parameters that vLLM's loaders fill from tensors of these names; an unknown one raises there."""
    filled = set()
    for name in names:
        if "t2d" in name:
            continue
        if "d2t" in name:
            assert config["draft_vocab_size"] != config["vocab_size"], "vLLM refuses d2t with the full vocabulary"
            filled.add("draft_id_to_target_id")
            continue
        if "lm_head" not in name:
            name = "model." + name
        name = name.replace("midlayer.", "layers.0.")
        name = name.replace("encoder.output_norm_enc.", "hidden_norm.").replace("encoder.fc.", "fc.")
        if "input_norm." in name and not config.get("norm_before_fc"):
            continue
        filled.add(_stack(name))
    return filled


def sglang_parameters(names: set[str]) -> set[str]:
    """
    Return the parameters that SGLang's loaders fill; it skips unknown names and leaves missing ones as they are,
    silently.
    """
    legacy = {
        "midlayer": "layers.0",
        "aux_norm_low": "fc_norm.0",
        "aux_norm_mid": "fc_norm.1",
        "aux_norm_high": "fc_norm.2",
    }
    filled = set()
    for name in names:
        if "d2t" in name or "t2d" in name:
            continue
        for old, new in legacy.items():
            name = name.replace(old, new)
        name = _stack(name)
        filled.add(name if name.startswith(("model.", "lm_head")) else "model." + name)
    return filled


def engine_parameters(config: dict) -> set[str]:
    """Return the parameters a drafter's class has in vLLM and SGLang: all of them must be filled."""
    if "block_size" in config or "dflash_config" in config:
        parts = "input_layernorm post_attention_layernorm self_attn.qkv_proj self_attn.o_proj"
        parts += " self_attn.q_norm self_attn.k_norm"
        layers = [f"layers.{i}." for i in range(config["num_hidden_layers"])]
        names = ["fc", "hidden_norm", "norm", *(layer + part for layer in layers for part in _with_mlp(parts))]
        own = {f"{name}.weight" for name in names} | _heads_of_blocks(config, layers)
        is_reduced = config.get("draft_vocab_size", config["vocab_size"]) != config["vocab_size"]
        return {f"model.{name}" for name in own} | ({"lm_head.weight"} if is_reduced else set())
    parts = "input_layernorm hidden_norm post_attention_layernorm self_attn.qkv_proj self_attn.o_proj"
    names = ["fc", "norm", *(f"layers.0.{part}" for part in _with_mlp(parts))]
    if config["fc_norm"]:
        names += [f"fc_norm.{i}" for i in range(config["num_aux_hidden_states"])]
    if config["norm_before_fc"]:
        names.append("input_norm")
    return {"lm_head.weight", *(f"model.{name}.weight" for name in names)}


def _heads_of_blocks(config: dict, layers: list[str]) -> set[str]:
    """Return what drafters of whole blocks have beside DFlash's plain layers."""
    names = set()
    if config["dflash_config"].get("attention_sink_bias"):
        names |= {f"{layer}self_attn.attention_sink_bias" for layer in layers}
    if config["architectures"] == ["DFlash2DraftModel"]:
        convolutions = [f"{layer}{part}_conv." for layer in layers for part in ("attention", "mlp")]
        names |= {each + name for each in convolutions for name in ("base_kernel", "kernel_projection.weight")}
        codebooks = ("predecessor_codebook", "successor_codebook", "hidden_projection.weight")
        names |= {f"candidate_selector.{name}" for name in codebooks}
    if config.get("markov_rank"):
        names |= {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
    if config.get("enable_confidence_head"):
        names |= {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    return names


def _with_mlp(parts: str) -> list[str]:
    return [*parts.split(), "mlp.gate_up_proj", "mlp.down_proj"]


# ---- how the engines read layer ids ---------------------------------------------------------------------------------


def boundaries_of(config: dict, reader: str, num_layers: int) -> list[int]:
    """Return how many layers have run at each tap, by one reader's rules."""
    ids, section = "eagle_aux_hidden_state_layer_ids", config.get("dflash_config") or {}
    nested = (config.get("eagle_config") or {}).get(ids)
    if reader == "convention":
        return [2, num_layers // 2, num_layers - 3]
    if reader == "vllm":
        if config.get(ids):
            return list(config[ids])
        found = section.get("target_layer_ids") or config.get("target_layer_ids")
        return [i + 1 for i in found]
    if reader == "sglang":
        if section:
            return [i + 1 for i in (section.get("target_layer_ids") or config["target_layer_ids"])]
        return [i + 1 for i in nested] if nested else [2, num_layers // 2, num_layers - 3]
    if reader == "z-lab":
        return [i + 1 for i in section["target_layer_ids"]]
    if reader == "transformers":
        return [i + 1 for i in config["target_layer_ids"]]
    if reader == "speculators":
        return list(config.get(ids) or config["aux_hidden_state_layer_ids"])
    raise AssertionError(reader)
