# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How a drafter is served: settings with the right numbers for every engine, and which of them can express it."""

import json
import shlex
from typing import Any

from .costs import break_even
from .publication import Publication


SERVING_FILE = "speculative_config.json"


def serving_settings(publication: Publication) -> dict[str, Any]:
    """
    Return the content of `speculative_config.json`, plain JSON values; placeholders stand for ids that are unknown.
    """
    exported, drafts = publication.config.exported, publication.num_drafts
    target, repo = publication.target_name, publication.repo_name
    vllm: dict[str, Any] = {"method": exported.method, "model": repo, "num_speculative_tokens": drafts}
    if publication.draws_drafts:
        vllm["draft_sample_method"] = "probabilistic"
    # The speculators layout names target and numbers itself, and has no place for how drafts are sampled.
    is_named = publication.layouts[0] == "speculators" and not publication.draws_drafts
    vllm_words = [repo] if is_named else [target, "--speculative-config", json.dumps(vllm)]
    sglang = {
        "speculative-algorithm": exported.algorithm,
        "speculative-draft-model-path": repo,
        **exported.sglang_flags(publication.config, drafts),
    }
    sglang_words = [word for name, value in sglang.items() for word in (f"--{name}", str(value))]
    return {
        "family": publication.family,
        "target": publication.target_id,
        "target_architectures": publication.target.architectures,
        "repository": publication.repo_id,
        "num_drafts": drafts,
        "context_length": publication.config.max_position_embeddings,
        "target_layer_ids": publication.layer_ids,
        "target_boundaries": publication.boundaries,
        "vllm": {"speculative_config": vllm, "command": shlex.join(["vllm", "serve", *vllm_words])},
        "sglang": {
            "flags": sglang,
            "command": shlex.join(["python", "-m", "sglang.launch_server", "--model-path", target, *sglang_words]),
        },
        "transformers": _transformers_snippet(publication),
        "readers": readers(publication),
        "break_even": _break_even(publication),
    }


def _break_even(publication: Publication) -> dict[str, Any] | None:
    """
    Return the estimate of [`break_even`] from what was recorded, or `None` where the target's size was not.
    Measurements count that were made with the number of drafts that is served, the lowest temperature for the slots.
    """
    record = publication.record
    if record is None or not record.target.num_parameters:
        return None
    fitting = [m for m in record.measurements if m.num_drafts == publication.num_drafts]
    first = min(fitting, key=lambda m: m.temperature, default=None)
    return break_even(
        publication.config,
        publication.num_drafts,
        record.target.num_parameters,
        taus=sorted({round(m.tau, 2) for m in fitting}),
        acceptance=[] if first is None else first.acceptance_per_slot,
    )


def _transformers_snippet(publication: Publication) -> str | None:
    """
    Return Python lines that decode with the drafter in transformers; `None` where no layout in the repository can.
    """
    layouts, repo, target = publication.layouts, json.dumps(publication.repo_name), json.dumps(publication.target_name)
    config = publication.config
    if "transformers" in layouts and config.exported.find_refusal(config, "transformers") is None:
        folder = "" if layouts[0] == "transformers" else 'subfolder="transformers", '
        first = f"drafter = AutoModel.from_pretrained({repo}, {folder}dtype=target.dtype)\n"
        call, imported = 'assistant_model=drafter, speculation_type="dflash"', "AutoModel, "
    elif publication.has_custom_generate:
        call, first, imported = f"custom_generate={repo}, trust_remote_code=True", "", ""
    else:
        return None
    arguments = publication.record.target.chat_template_kwargs if publication.record is not None else {}
    switches = "".join(f", {name}={value!r}" for name, value in arguments.items())
    return (
        f"from transformers import {imported}AutoModelForCausalLM, AutoTokenizer\n\n"
        f"target = AutoModelForCausalLM.from_pretrained({target})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({target})\n"
        f"{first}"
        'chat = [{"role": "user", "content": "Why is the sky blue?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        f'    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True{switches}\n'
        ")\n"
        f"output = target.generate(**inputs, max_new_tokens=256, {call})\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
    )


def readers(publication: Publication) -> dict[str, str]:
    """
    Return, by reader, `"yes"`, `"yes, "` and on which condition, or `"no: "` and why it cannot load this drafter.
    """
    config, verdicts = publication.config, {}
    for name, verdict in config.exported.readers(config, set(publication.target.architectures)).items():
        missing = _missing_layout(name, publication)
        reasons = verdict.refusals if missing is None else [missing]
        conditions = "".join(f", {condition}" for condition in verdict.conditions)
        verdicts[name] = f"no: {'; '.join(reasons)}" if reasons else f"yes{conditions}"
    return verdicts


def _missing_layout(reader: str, publication: Publication) -> str | None:
    """Return what a reader misses in a repository, or `None`."""
    layouts, config = publication.layouts, publication.config
    root = layouts[0]
    if reader in ("speculators", "transformers (assistant_model)"):
        layout = reader.split()[0]
        if layout in layouts:
            return None
        reason = config.exported.find_refusal(config, layout)
        return f"the repository does not hold the {layout} layout" if reason is None else reason.split(". ")[0]
    if root == "flat" or (reader == "vLLM" and root == "speculators"):
        return None
    return f"it reads the flat layout, and the root of this repository is the {root} one"
