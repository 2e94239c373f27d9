# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a target must fulfil before a drafter learns from it: its embedding, layers and head are in reach, and it reads
text as finite numbers. And what of its settings a server would apply, but nothing here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


# Generation settings that change text besides temperature, top_k and top_p, which are settings of training too; and
# the values with which they change nothing.
_TEXT_SETTINGS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("force_words_ids", "constraints", "stop_strings"), ([], "")),
    **dict.fromkeys(("watermarking_config", "dola_layers"), ()),
    "num_beams": (1,),
}
# Filters of what is drawn.
_SAMPLING_SETTINGS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("min_p", "top_h", "epsilon_cutoff", "eta_cutoff"), (0,)),
    "typical_p": (1,),
}

# Rotary embeddings that depend on a token's position and on nothing else.
_FIXED_ROPE_TYPES = {"default", "linear", "llama3", "proportional", "yarn"}


def require_weights(causal_lm: PreTrainedModel) -> None:
    """Refuse a model whose embedding or head is missing, offloaded or quantised."""
    kind = f"Target of type {causal_lm.config.model_type!r}"
    for name, module in {
        "embedding": causal_lm.get_input_embeddings(),
        "head": causal_lm.get_output_embeddings(),
    }.items():
        weight = getattr(module, "weight", None)
        if weight is None:
            raise ValueError(
                f"{kind} ({type(causal_lm).__name__}) has no {name} with a plain `weight`. Load it with "
                f"`AutoModelForCausalLM`; where it is quantised, leave the {name} out (`modules_to_not_convert`)."
            )
        if weight.is_meta:
            raise ValueError(
                f"{kind} has its {name} on the meta device: it was offloaded or never loaded. Load it without "
                "offloading, in a lower precision or on more devices."
            )
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{kind} has its {name} in {weight.dtype}. Leave it out of the quantisation, with "
                "`modules_to_not_convert` or bitsandbytes' `llm_int8_skip_modules=['lm_head']`."
            )


def find_layers(backbone: nn.Module, config: PreTrainedConfig) -> nn.ModuleList:
    """Return the decoder layers of a model without its head; refuse a model that has no such list."""
    for module in backbone.children():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise ValueError(
        f"Target of type {config.model_type!r} has no list of {config.num_hidden_layers} decoder layers in its "
        f"backbone {type(backbone).__name__}. Use a decoder-only target of transformers."
    )


def rollback_reason(causal_lm: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """Return why a model's cache cannot go back to before a token that it has read, or `None` if it can."""
    layer_types = set(getattr(config, "layer_types", None) or [])
    if causal_lm._is_stateful:
        return "keeps a recurrent state, which cannot be rolled back to before a rejected draft"
    if layer_types - {"full_attention"}:
        others = sorted(layer_types - {"full_attention"})
        return f"has layers of type {others}, whose cache drops or mixes what a rejected draft must not touch"
    if not layer_types and getattr(config, "sliding_window", None) is not None:
        window = config.sliding_window
        return f"uses a sliding window of {window} tokens, counted in cache slots that include rejected drafts"
    return None


def chunking_reason(causal_lm: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """Return why a text read in chunks, on the cache, would not be the text read at once; or `None` if it is."""
    kinds = _rope_types(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    if changing := sorted(kinds - _FIXED_ROPE_TYPES):
        return f"has rotary embeddings of type {changing}, which may depend on the longest text that is read"
    return rollback_reason(causal_lm, config)


def _rope_types(parameters: Any) -> set[str]:
    """Return the types of rotary embeddings that a config names, at whatever depth."""
    if not isinstance(parameters, dict):
        return set()
    own = {str(parameters[name]) for name in ("rope_type", "type") if parameters.get(name) is not None}
    return own.union(*(_rope_types(value) for value in parameters.values()))


def describe_text_settings(causal_lm: PreTrainedModel) -> str | None:
    """Return a sentence about settings by which a server changes the target's text, or `None`."""
    config = causal_lm.generation_config
    known = _TEXT_SETTINGS | (_SAMPLING_SETTINGS if getattr(config, "do_sample", False) else {})
    values = {name: getattr(config, name, None) for name in known}
    given = [
        f"{name}={value!r:.60}" for name, value in values.items() if value is not None and value not in known[name]
    ]
    if not given:
        return None
    return (
        f"The target's generation config sets {', '.join(given)}. Servers apply that to its text; drafters here are "
        "trained and measured without it, and would be kept less often. Serve the target without it (vLLM: "
        "`--generation-config vllm`; SGLang: `--sampling-defaults openai`; transformers: reset "
        "`model.generation_config`), or take it out of generation_config.json."
    )


class NotFiniteError(FloatingPointError):
    """Names the rows of `place` that the target reads as NaN or infinity, in hidden states of `dtype`."""

    def __init__(self, rows: list[int], dtype: torch.dtype, place: str = "the text it read"):
        cause = "Its weights are damaged: load it again"
        if dtype != torch.float32:
            cause = f"Its numbers overflow in {dtype}, or its weights are damaged: try `target_dtype='float32'`"
        super().__init__(
            f"The target's hidden states are NaN or infinite in rows {rows} of {place}. {cause}, and check these rows."
        )
        self.rows, self.dtype = rows, dtype


@contextmanager
def naming_rows(names: Sequence[int] | torch.Tensor, place: str) -> Iterator[None]:
    """Let a [`NotFiniteError`] raised inside name `names[row]`, rows of `place`, in place of `row`."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError([int(names[row]) for row in error.rows], error.dtype, place) from error


def refuse_not_finite(hidden: torch.Tensor, rows: torch.Tensor) -> None:
    """Raise [`NotFiniteError`] if hidden states `(T, H)` of tokens that are of `rows` `(T,)` are not finite."""
    # One pass that keeps two numbers per token; NaN passes through both.
    low, high = torch.aminmax(hidden, dim=-1)
    is_wrong = ~(low.isfinite() & high.isfinite())
    if is_wrong.any():
        raise NotFiniteError(rows[is_wrong].unique().tolist(), hidden.dtype)
