# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decode with an EAGLE-3 drafter: `target.generate(**inputs, custom_generate="ORG/DRAFTER", trust_remote_code=True)`.

Takes every argument of `generate`, and `drafter` (folder or Hub id, in place of the one named below) and `num_drafts`. One
sequence at a time. Every token is chosen by the target exactly as plain decoding chooses it, in the same order and with the same
random numbers, so the text is that of plain decoding; drafts only decide how many tokens one pass of the target yields.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb


# Where the drafter lies; filled in when it is published.
DRAFTER = None

_IDS = "eagle_aux_hidden_state_layer_ids"
_LOADED: dict = {}


class Drafter:
    """
    An EAGLE-3 drafter read from its published files, with the keys and values of the text so far.

    Shape letters:  n = new positions, H = hidden size, F = width of the fused layers, h / g = heads / key-value heads, d = head size
    """

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype):
        self.config = json.loads(_file(source, "config.json").read_text("utf-8"))
        tensors = load_file(_file(source, "model.safetensors"))
        # The embedding is the target's; the file holds a copy for engines that want one.
        tensors.pop("embed_tokens.weight", None)
        self.tensors = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()
        }
        self.layer_ids = [int(i) for i in self.config["eagle_config"][_IDS]]
        names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_parameters")
        self.rotary = LlamaRotaryEmbedding(LlamaConfig(**{name: self.config[name] for name in names})).to(device)
        self.forget()

    def forget(self) -> None:
        """Start a new text."""
        self.keys = self.values = self.last_state = None

    def _norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.tensors[f"{name}.weight"] * scaled.to(states.dtype)

    def _linear(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.tensors[f"{name}.weight"])

    def _heads(self, name: str, joined: torch.Tensor) -> torch.Tensor:
        """Project `(1, n, 2H)` to `(1, heads, n, d)`."""
        projected = self._linear(f"midlayer.self_attn.{name}_proj", joined)
        return projected.unflatten(-1, (-1, self.config["head_dim"])).transpose(1, 2)

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

    def read(self, features: torch.Tensor, next_embeds: torch.Tensor) -> None:
        """Append positions of the text: the target's features `(1, n, F)`, and the embedding `(1, n, H)` of the token behind each."""
        states = self._fuse(features)
        joined = self._join(next_embeds, states)
        start = 0 if self.keys is None else self.keys.shape[2]
        key, value = self._place(self._heads("k", joined), start), self._heads("v", joined)
        self.keys = key if self.keys is None else torch.cat([self.keys, key], dim=2)
        self.values = value if self.values is None else torch.cat([self.values, value], dim=2)
        self.last_state = states[:, -1:]

    def _place(self, states: torch.Tensor, start: int) -> torch.Tensor:
        """Rotate `(1, heads, n, d)` states to the positions from `start` on."""
        positions = torch.arange(start, start + states.shape[2], device=states.device)[None]
        cos, sin = self.rotary(states, positions)
        return apply_rotary_pos_emb(states, states, cos, sin)[0]

    def draft(self, token: torch.Tensor, count: int, embed) -> list[int]:
        """Draft `count` tokens behind the anchor `token` (`(1, 1)`), whose own position has not been read yet."""
        state, keys, values, drafts = self.last_state, self.keys, self.values, []
        position = keys.shape[2] - 1
        for step in range(count):
            joined = self._join(embed(token).to(state.dtype), state)
            if step > 0:
                # The first step's key is the text's last entry.
                keys = torch.cat([keys, self._place(self._heads("k", joined), position + step)], dim=2)
                values = torch.cat([values, self._heads("v", joined)], dim=2)
            query = self._place(self._heads("q", joined), position + step)
            mixed = functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            attended = self._linear("midlayer.self_attn.o_proj", mixed.transpose(1, 2).flatten(2))
            is_normed = self.config.get("norm_before_residual")
            hidden = attended + (self._norm("midlayer.hidden_norm", state) if is_normed else state)
            hidden = hidden + self._mlp(self._norm("midlayer.post_attention_layernorm", hidden))
            normed = self._norm("norm", hidden)
            draft = int(self._linear("lm_head", normed)[0, -1].argmax())
            # `d2t` holds the distance from a draft id to the target's.
            drafts.append(draft + int(self.tensors["d2t"][draft]) if "d2t" in self.tensors else draft)
            state = normed if self.config.get("norm_output") else hidden
            token = torch.tensor([[drafts[-1]]], device=token.device)
        return drafts

    def _mlp(self, states: torch.Tensor) -> torch.Tensor:
        gate = functional.silu(self._linear("midlayer.mlp.gate_proj", states))
        return self._linear("midlayer.mlp.down_proj", gate * self._linear("midlayer.mlp.up_proj", states))


def _file(source: str, name: str) -> Path:
    folder = Path(source)
    return folder / name if folder.is_dir() else Path(hf_hub_download(source, name))


def load_drafter(source: str | None, model: torch.nn.Module) -> Drafter:
    """Load the drafter in the target's precision, once per place, device and precision."""
    source = source or DRAFTER
    if source is None:
        raise ValueError(
            'This file does not know where its drafter lies. Pass `drafter="ORG/NAME"`, or its local folder.'
        )
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    key = (str(source), device, dtype)
    if key not in _LOADED:
        _LOADED[key] = Drafter(str(source), device, dtype)
    _check(_LOADED[key].config, model.config.get_text_config())
    return _LOADED[key]


def _check(drafter: dict, target) -> None:
    """Refuse a drafter of another target."""
    pairs = {
        "vocab_size": (drafter["vocab_size"], target.vocab_size),
        "hidden_size": (drafter.get("target_hidden_size") or drafter["hidden_size"], target.hidden_size),
        "num_target_layers": (drafter.get("num_target_layers") or target.num_hidden_layers, target.num_hidden_layers),
    }
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        raise ValueError(f"The drafter was made for another target: (drafter, target) {wrong}.")


class Taps:
    """Keeps what some layers of the target gave out in its last forward pass."""

    def __init__(self, model: torch.nn.Module, layer_ids: list[int]):
        layers = model.get_decoder().layers
        self.outputs = [None] * len(layer_ids)
        self.handles = [layers[layer].register_forward_hook(self._keep(i)) for i, layer in enumerate(layer_ids)]

    def _keep(self, index: int):
        def hook(module, arguments, output):
            self.outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def features(self, count: int) -> torch.Tensor:
        """Return `(1, count, F)`: the first positions of the last pass."""
        return torch.cat([output[:, :count] for output in self.outputs], dim=-1)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def generate(model: torch.nn.Module, drafter: str | None = None, num_drafts: int | None = None, **kwargs):
    """
    Decode with the target, verifying drafts; the result is `model.generate`'s own.

    Args:
        model (`PreTrainedModel`): The target; transformers passes it.
        drafter (`str`, *optional*): Folder or Hub id of the drafter.
        num_drafts (`int`, *optional*): Drafts per block; those of its training by default.
        kwargs: Arguments of `generate`.

    Raises:
        ValueError: If the drafter is unknown or of another target, or an argument asks for what blocks cannot do: more than one
            sequence, beams, a cache that cannot be cropped.
    """
    if kwargs.get("assistant_model") is not None:
        raise ValueError(
            "`assistant_model` has no part in EAGLE-3. Leave it out, or call `generate` without `custom_generate`."
        )
    loaded = load_drafter(drafter, model)
    count = loaded.config.get("ttt_steps", 3) if num_drafts is None else num_drafts
    if count < 1:
        raise ValueError(f"`num_drafts` must be at least 1, got {count}.")

    # transformers hands a function no streamer.
    streamer = kwargs.get("streamer")

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **rest):
        _check_decoding(model, input_ids, generation_config, rest)
        taps = Taps(model, loaded.layer_ids)
        loaded.forget()
        try:
            return _decode(
                model,
                loaded,
                taps,
                count,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer,
                rest,
            )
        finally:
            taps.remove()
            loaded.forget()

    return model.generate(custom_generate=decode, **kwargs)


def _check_decoding(model, input_ids, generation_config, rest: dict) -> None:
    if input_ids.shape[0] != 1 or generation_config.num_beams != 1:
        raise ValueError(
            f"One sequence at a time, got {input_ids.shape[0]} with num_beams={generation_config.num_beams}. Call `generate` once per prompt."
        )
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or []) - {"full_attention"}
    cache = rest.get("past_key_values")
    if kinds or model._is_stateful or not isinstance(cache, DynamicCache) or cache.get_seq_length() > 0:
        raise ValueError(
            f"Rejected drafts must be cut off the cache, which needs full attention in every layer and a fresh DynamicCache; got layers {sorted(kinds)} "
            f"and {type(cache).__name__}. Leave `cache_implementation`, `past_key_values` and `use_cache` at their defaults."
        )


def _decode(
    model, drafter, taps, count, input_ids, logits_processor, stopping_criteria, generation_config, streamer, rest
):
    """Run rounds until the stopping criteria say so; `rest` holds what `generate` prepared for the model."""
    cache, embed = rest["past_key_values"], model.get_input_embeddings()
    mask = rest.get("attention_mask")
    # A padded prompt is read without its padding, which the processors and the result still see.
    padding = 0 if mask is None else int((mask[0] == 0).sum())
    if padding and not bool((mask[0, :padding] == 0).all()):
        raise ValueError(
            "`attention_mask` hides tokens inside of the prompt; only padding to the left of it can be hidden."
        )
    ids, pending, scores, raw = input_ids, input_ids[:, padding:], (), ()
    start, is_done = 0, False
    while not is_done:
        positions = torch.arange(start, start + pending.shape[1], device=ids.device)[None]
        is_first = start == 0
        logits = model(
            input_ids=pending,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if is_first and model._supports_logits_to_keep() else {}),
        ).logits
        drafts = [] if is_first else pending[0, 1:].tolist()
        logits = logits[:, -1:] if is_first else logits
        before = ids.shape[1]
        for index in range(len(drafts) + 1):
            row = logits[:, index].to(torch.float32, copy=True)
            processed = logits_processor(ids, row)
            token = _choose(processed, generation_config.do_sample)
            ids = torch.cat([ids, token], dim=-1)
            scores, raw = (*scores, processed), (*raw, row)
            if streamer is not None:
                streamer.put(token[0].cpu())
            is_done = bool(stopping_criteria(ids, scores).all())
            if is_done or index == len(drafts) or int(token) != drafts[index]:
                break
        # The last token was chosen, not read; all others before it are in the cache.
        read = pending.shape[1] if is_first else ids.shape[1] - before
        start += read
        if not is_done:
            rejected = cache.get_seq_length() - start
            if rejected:
                # A negative number is how many to cut off, in every version.
                cache.crop(-rejected)
            drafter.read(taps.features(read), embed(ids[:, -read:]))
            room = generation_config.max_length - ids.shape[1] - 1 if generation_config.max_length else count
            anchor = ids[:, -1:]
            block = drafter.draft(anchor, max(0, min(count, room)), embed)
            pending = torch.cat([anchor, torch.tensor([block], device=ids.device, dtype=ids.dtype)], dim=-1)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return ids
    return GenerateDecoderOnlyOutput(
        sequences=ids,
        scores=scores if generation_config.output_scores else None,
        logits=raw if generation_config.output_logits else None,
        past_key_values=cache,
    )


def _choose(scores: torch.Tensor, is_drawn: bool) -> torch.Tensor:
    """Choose a token, `(1, 1)`, from processed scores `(1, V)` as plain decoding does."""
    if is_drawn:
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
    return scores.argmax(dim=-1, keepdim=True)
