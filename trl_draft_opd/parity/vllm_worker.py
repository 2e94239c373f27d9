# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decode prompts in vLLM and write down what it did: `python -P vllm_worker.py REQUEST.json REPLY.json`.

A process of its own, because an engine takes a whole process for itself, and perhaps of another environment, because
vLLM pins other versions than training does. So this file stands alone: it imports vLLM and nothing of this package.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any


# The engine's own counters, summed over all requests.
_COUNTERS = {
    "num_rounds": "vllm:spec_decode_num_drafts",
    "kept_at_slot": "vllm:spec_decode_num_accepted_tokens_per_pos",
}
# Lets the engine write down every round of every request; younger than the counters.
_PER_REQUEST = "per_request_spec_decode_metrics"


def mend_norms(request: dict[str, Any]) -> bool:
    """
    Have DFlash drafters norm their context's keys by each layer's weights where this vLLM does not, and return whether
    that was needed. It hands its kernel the weights of all layers at once; of its kernels, those for CPUs (as of 0.32)
    take the first row for all, so a folder that is right would draft otherwise than it was trained to.
    """
    if not request["has_drafter"] or (request["speculative"] or {}).get("method", "dflash") != "dflash":
        return False
    import torch
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if not current_platform.is_cpu():
        return False
    from vllm import _custom_ops  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model  # pyright: ignore[reportMissingImports]

    # Before June 2026, vLLM looped over the layers itself.
    if not hasattr(DFlashQwen3Model, "_normalize_context_k"):
        return False
    # Keys of ones, in two layers of weights 1 and 2.
    weights = torch.tensor([1.0, 2.0])[:, None].expand(2, 64).contiguous()
    keys, normed = torch.ones(2, 1, 1, 64), torch.empty(2, 1, 1, 64)
    _custom_ops.rms_norm(normed, keys, weights, 0.0)
    if normed[1].amax() > 1.5:
        return False
    DFlashQwen3Model._normalize_context_k = _norm_by_layer
    return True


def _norm_by_layer(model: Any, keys: Any) -> Any:
    """Return the keys `(layers, tokens, heads, width)`, each layer's normed by its own weights."""
    import torch
    from vllm import _custom_ops  # pyright: ignore[reportMissingImports]

    normed = torch.empty_like(keys)
    for layer, weights in enumerate(model._k_norm_weights):
        _custom_ops.rms_norm(normed[layer], keys[layer], weights, model._rms_norm_eps)
    return normed


def decode(request: dict[str, Any]) -> dict[str, Any]:
    """
    Start an engine, decode the prompts greedily to a fixed number of tokens, and return tokens and counters.

    Args:
        request (`dict`):
            `model` (target's folder or id, or a speculators repository alone), `prompts` (token ids),
            `max_completion_length`, `speculative` (vLLM's `speculative_config`, or `None`), `has_drafter` (by that or
            by the model's own config), `dtype`, `max_model_len`, `batch_size`, `cache_bytes`.

    Returns:
        `dict` with `version`, `responses` (token ids), `accepted` (accepted drafts by round and request, or `None`
        where nothing is drafted or this vLLM does not report them), and the engine's counters `num_rounds` and
        `kept_at_slot`; `is_mended`, see [`mend_norms`].
    """
    # It may be in another environment than the types are checked in.
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]

    is_mended = mend_norms(request)
    options = {
        "model": request["model"],
        "dtype": request["dtype"],
        "max_model_len": request["max_model_len"],
        "max_num_seqs": request["batch_size"],
        "enforce_eager": True,
        "disable_log_stats": False,
        # A cached prefix is other arithmetic.
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": request["cache_bytes"],
    }
    if request["speculative"] is not None:
        options["speculative_config"] = request["speculative"]
    if request["has_drafter"] and _PER_REQUEST in {field.name for field in fields(EngineArgs)}:
        options[_PER_REQUEST] = "detailed"
    engine = LLM(**options)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=request["max_completion_length"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = [output.outputs[0] for output in engine.generate(prompts, sampling, use_tqdm=False)]
    kept: list[Any] = [getattr(output, "spec_decode_metrics", None) for output in outputs]
    return {
        "version": vllm.__version__,
        "is_mended": is_mended,
        "responses": [list(output.token_ids) for output in outputs],
        "accepted": None if None in kept else [list(each.per_step_accepted) for each in kept],
        **_count(engine.get_metrics()),
    }


def _count(metrics: list) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(_COUNTERS)
    for name, metric_name in _COUNTERS.items():
        for metric in metrics:
            if metric.name in (metric_name, f"{metric_name}_total"):
                found[name] = list(metric.values) if hasattr(metric, "values") else int(metric.value)
    return found


if __name__ == "__main__":
    asked, reply = map(Path, sys.argv[1:])
    reply.write_text(json.dumps(decode(json.loads(asked.read_text("utf-8")))), encoding="utf-8")
elif __name__ == "__mp_main__":
    # A process of the engine's, which begins with this file and holds the model.
    mend_norms(json.loads(Path(sys.argv[1]).read_text("utf-8")))
