# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decode prompts in SGLang and write down what it did: `python -P sglang_worker.py REQUEST.json REPLY.json`.

Needs a GPU. Written from SGLang's documentation and source (0.5.23) and never run: no machine with SGLang was at hand.
Where its output lacks a field, the consumer is reported as failed and nothing is guessed.
"""

import json
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any


# Rounds by number of accepted drafts, per request; its name has changed between versions.
_HISTOGRAMS = ("spec_correct_drafts_histogram", "spec_accept_histogram")


def decode(request: dict[str, Any]) -> dict[str, Any]:
    """
    Start an offline engine, decode the prompts greedily to a fixed number of tokens, and return tokens and counters.

    Args:
        request (`dict`):
            As for `vllm_worker.decode`; `speculative` names `model`, `num_speculative_tokens`, and as `options` what
            else the engine is told of the drafter.

    Returns:
        `dict` with `version`, `responses`, `num_rounds` and `kept_at_slot`; `accepted` is `None`, because the engine
        reports how many rounds kept how many drafts, and not in which order.
    """
    import sglang  # pyright: ignore[reportMissingImports]  it may be in another environment

    options: dict[str, Any] = {
        "model_path": request["model"],
        "dtype": request["dtype"],
        "context_length": request["max_model_len"],
        "max_running_requests": request["batch_size"],
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "disable_cuda_graph": True,
    }
    asked = request["speculative"]
    num_drafts = 0
    if asked is not None:
        num_drafts = asked["num_speculative_tokens"]
        options |= {"speculative_draft_model_path": asked["model"]} | asked["options"]
    engine = sglang.Engine(**options)
    try:
        sampling = {"temperature": 0.0, "max_new_tokens": request["max_completion_length"], "ignore_eos": True}
        outputs = engine.generate(input_ids=request["prompts"], sampling_params=sampling)
    finally:
        engine.shutdown()
    counts = _count([output["meta_info"] for output in outputs], num_drafts) if asked is not None else {}
    responses = [output["output_ids"] for output in outputs]
    return {"version": sglang.__version__, "responses": responses, "accepted": None} | counts


def _count(reports: list[dict[str, Any]], num_drafts: int) -> dict[str, Any]:
    name = next((name for name in _HISTOGRAMS if name in reports[0]), None)
    if name is None:
        raise KeyError(f"this SGLang reports none of {_HISTOGRAMS}, but {sorted(reports[0])}")
    rounds = [sum(counts) for counts in zip_longest(*(report[name] for report in reports), fillvalue=0)]
    kept = [sum(rounds[slot:]) for slot in range(1, num_drafts + 1)]
    return {"num_rounds": sum(rounds), "kept_at_slot": kept}


if __name__ == "__main__":
    asked_path, reply_path = map(Path, sys.argv[1:])
    reply_path.write_text(json.dumps(decode(json.loads(asked_path.read_text("utf-8")))), encoding="utf-8")
