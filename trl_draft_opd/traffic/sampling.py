# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Which distribution a request's tokens were drawn from, or why it is none that can be replayed: temperature, top-k and
top-p can be, all else that bends a distribution cannot. By the request fields of vLLM 0.32. Knows no text.
"""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from ..rollout.acceptance import SamplingSettings
from .records import Unusable


# What a request leaves open, vLLM takes from the model's generation config (`--generation-config auto`), then here.
_OPEN = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
# vLLM decodes greedily below the first, and raises what lies between the two to the second.
_GREEDY_BELOW, _LOWEST = 1e-5, 1e-2
# Fields that change which token comes next, or what the prompt is, and their values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "echo": (False,),
    "suffix": ("",),
    "watermarking": (False,),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tool_choice": ("none", "auto"),
    # Off, the ids of reasoning are left out.
    "include_reasoning": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "mm_payload": (),
    "documents": ([],),
    "reasoning_effort": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
}
# Fields that change neither.
_IDLE = frozenset(
    "model messages prompt max_tokens max_completion_tokens logprobs top_logprobs prompt_logprobs logprob_token_ids "
    "seed stop stop_token_ids include_stop_str_in_output stream stream_options stream_interval user length_penalty "
    "skip_special_tokens spaces_between_special_tokens truncation_side tools parallel_tool_calls "
    "add_special_tokens chat_template_kwargs media_io_kwargs mm_processor_kwargs priority request_id session_id "
    "return_tokens_as_token_ids return_token_ids return_prompt_text return_token_offsets return_mm_kwargs cache_salt "
    "routed_experts_prompt_start metadata store service_tier safety_identifier prompt_cache_key".split()
)


def read_defaults(config: GenerationConfig | None, generation_config: str) -> dict[str, Any]:
    """
    Return what a server fills in where a request leaves a sampling setting open.

    Args:
        config ([`~transformers.GenerationConfig`] or `None`): The target's own.
        generation_config (`str`): As vLLM's flag of that name: `"auto"` takes the target's, `"vllm"` none.
    """
    own = config.to_diff_dict() if config is not None and generation_config == "auto" else {}
    return {name: neutral if own.get(name) is None else own[name] for name, neutral in _OPEN.items()}


def read_sampling(request: Mapping[str, Any], defaults: Mapping[str, Any], vocab_size: int) -> SamplingSettings:
    """Return the distribution of a request's tokens, or raise [`Unusable`] with the field that bends it otherwise."""
    for name, value in request.items():
        if name in _OPEN or name in _IDLE or value is None:
            continue
        if name not in _NEUTRAL:
            raise Unusable("a field of the request that this release does not know")
        if not any(value == neutral and isinstance(value, type(neutral)) for neutral in _NEUTRAL[name]):
            raise Unusable(f"`{name}` in the request")
    if any(tool.get("strict") or (tool.get("function") or {}).get("strict") for tool in request.get("tools") or ()):
        raise Unusable("strict tools in the request")
    values = {name: defaults[name] if request.get(name) is None else request[name] for name in _OPEN}
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        if values[name] != _OPEN[name]:
            raise Unusable(f"`{name}`, of the request or of the generation config")
    temperature, top_k = float(values["temperature"]), int(values["top_k"])
    if temperature < _GREEDY_BELOW:
        return SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    if values["min_p"] != 0:
        raise Unusable("`min_p`, of the request or of the generation config")
    top_k = 0 if top_k < 1 or top_k >= vocab_size else top_k
    return SamplingSettings(temperature=max(temperature, _LOWEST), top_k=top_k, top_p=float(values["top_p"]))
