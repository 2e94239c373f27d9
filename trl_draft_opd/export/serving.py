# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How a drafter is served: settings with the right numbers for every engine, and which of them can express it."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from ..drafters.eagle3 import Eagle3DraftConfig
from .costs import break_even
from .layouts import NORM_FLAGS
from .publication import Publication


SERVING_FILE = "speculative_config.json"
# Targets whose classes hand out no layers for DFlash in SGLang 0.5, and for any drafter in vLLM 0.33.
_NOT_IN_SGLANG_DFLASH = ("Qwen2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
_NOT_IN_VLLM = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Phi3ForCausalLM")


def serving_settings(publication: Publication) -> dict[str, Any]:
    """
    Return the content of `speculative_config.json`, plain JSON values; placeholders stand for ids that are unknown.
    """
    family, drafts = publication.family, publication.num_drafts
    target, repo = publication.target_name, publication.repo_name
    vllm = {"method": family, "model": repo, "num_speculative_tokens": drafts}
    # The speculators layout names target and numbers itself.
    vllm_words = (
        [repo] if publication.layouts[0] == "speculators" else [target, "--speculative-config", json.dumps(vllm)]
    )
    sglang = {
        "speculative-algorithm": {"eagle3": "EAGLE3", "dflash": "DFLASH"}[family],
        "speculative-draft-model-path": repo,
        # One chain and no tree. SGLang counts the anchor among the draft tokens.
        **({"speculative-num-steps": drafts, "speculative-eagle-topk": 1} if family == "eagle3" else {}),
        "speculative-num-draft-tokens": drafts + 1,
    }
    sglang_words = [word for name, value in sglang.items() for word in (f"--{name}", str(value))]
    return {
        "family": family,
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
    if publication.family == "dflash" and "transformers" in layouts:
        folder = "" if layouts[0] == "transformers" else 'subfolder="transformers", '
        first = f"drafter = AutoModel.from_pretrained({repo}, {folder}dtype=target.dtype)\n"
        call, imported = 'assistant_model=drafter, speculation_type="dflash"', "AutoModel, "
    elif publication.family == "eagle3" and layouts[0] == "flat":
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
    architectures = set(publication.target.architectures)
    conditions = {"EAGLE's code": ", if the target's weights lie in several files with an index"}
    if architectures & set(_NOT_IN_VLLM):
        conditions["vLLM"] = ", with `--model-impl transformers`: its own class of this target hands out no layers"
    elif publication.family == "dflash":
        conditions["vLLM"] = ", with an attention backend that can be non-causal (FlashAttention, FlexAttention)"
    config = publication.config
    if isinstance(config, Eagle3DraftConfig):
        refusals = _eagle3_refusals(config, publication.layer_ids)
    else:
        refusals = _dflash_refusals(architectures)
    verdicts = {}
    for name, own in refusals.items():
        missing = _missing_layout(name, publication.layouts)
        reasons = own if missing is None else [missing]
        verdicts[name] = f"no: {'; '.join(reasons)}" if reasons else f"yes{conditions.get(name, '')}"
    return verdicts


def _missing_layout(reader: str, layouts: Sequence[str]) -> str | None:
    """Return what a reader misses in a repository, or `None`."""
    root = layouts[0]
    if reader in ("speculators", "transformers (assistant_model)"):
        layout = reader.split()[0]
        return None if layout in layouts else f"the repository does not hold the {layout} layout"
    if root == "flat" or (reader == "vLLM" and root == "speculators"):
        return None
    return f"it reads the flat layout, and the root of this repository is the {root} one"


def _eagle3_refusals(config: Eagle3DraftConfig, ids: list[int]) -> dict[str, list[str]]:
    flags = ", ".join(name for name in NORM_FLAGS if getattr(config, name))
    layers = config.num_target_layers
    is_default = layers is not None and ids == [1, layers // 2 - 1, layers - 4]
    convention = [] if is_default else [f"it always reads the layers [1, N // 2 - 1, N - 4], the drafter reads {ids}"]
    eagle = convention + ([f"it has no {flags}"] if flags else [])
    if config.head_dim not in (None, config.hidden_size / config.num_attention_heads):
        eagle.append("it takes the head size for hidden_size / num_attention_heads")
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        eagle.append("its RoPE knows linear and dynamic scaling alone")
    return {
        "vLLM": [],
        "SGLang": ["it has no norm_before_residual"] if config.norm_before_residual else [],
        "transformers (custom_generate)": [],
        "speculators": [],
        "EAGLE's code": eagle,
        "llama.cpp's converter": convention + ([f"it is not known to carry {flags}"] if flags else []),
    }


def _dflash_refusals(architectures: set[str]) -> dict[str, list[str]]:
    foreign = sorted(architectures & set(_NOT_IN_SGLANG_DFLASH))
    return {
        "vLLM": [],
        "SGLang": [f"its class for {foreign[0]} hands out no layers to DFlash"] if foreign else [],
        "transformers (assistant_model)": [],
        "speculators": [],
        "z-lab's code": [],
        "llama.cpp's converter": [],
    }
