# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How a drafter is served: settings with the right numbers for every engine, which engines can express it, and from which
accepted length on it pays. Pure functions of the flat config.
"""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from huggingface_hub.utils import validate_repo_id

from .record import TrainingRecord


SERVING_FILE = "speculative_config.json"
BATCH_SIZES = (1, 8, 32, 64, 128, 256)
# Tokens per forward at which a bfloat16 matrix product stops being bound by reading weights: 989 TFLOP/s over 3.35 TB/s of an
# H100, at one FLOP per byte and token.
RIDGE_TOKENS = 295
# Targets whose classes hand out no layers for DFlash in SGLang 0.5, and for any drafter in vLLM 0.33.
_NOT_IN_SGLANG_DFLASH = ("Qwen2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
_NOT_IN_VLLM = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Phi3ForCausalLM")
_IDS = "eagle_aux_hidden_state_layer_ids"


def num_drafts_of(config: dict[str, Any]) -> int:
    """Return the drafts per block the drafter was trained for."""
    return config["block_size"] - 1 if "block_size" in config else config["ttt_steps"]


def family_of(config: dict[str, Any]) -> str:
    """Return the family a flat config describes."""
    return "dflash" if config["architectures"] == ["DFlashDraftModel"] else "eagle3"


def layer_ids_of(config: dict[str, Any]) -> list[int]:
    """Return the 0-based ids of the target layers whose outputs are read."""
    return config["target_layer_ids"] if "target_layer_ids" in config else config["eagle_config"][_IDS]


def placeholder(config: dict[str, Any]) -> str:
    """Return what stands for a repository whose name is not known yet."""
    return "ORG/NAME-DFlash" if family_of(config) == "dflash" else "ORG/NAME-EAGLE3"


def serving_settings(
    config: dict[str, Any],
    *,
    target_id: str | None,
    repo_id: str | None,
    target_architectures: Sequence[str] = (),
    num_target_parameters: int | None = None,
    taus: Sequence[float] = (),
    acceptance: Sequence[float] = (),
    layouts: Sequence[str] = ("flat", "speculators", "transformers"),
    max_model_len: int | None = None,
    template_arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Return the content of `speculative_config.json`.

    Args:
        config (`dict`): The flat `config.json`.
        target_id (`str` or `None`), repo_id (`str` or `None`): Hub ids; placeholders stand for those that are not known.
        target_architectures (`Sequence[str]`, *optional*): The target's, for what an engine has no class for.
        num_target_parameters (`int`, *optional*): The target's parameters, for the break-even table.
        taus (`Sequence[float]`, *optional*): Measured accepted lengths, for expected speed-ups.
        acceptance (`Sequence[float]`, *optional*): Measured acceptance per slot, for how many drafts pay; see [`measured_facts`].
        layouts (`Sequence[str]`, *optional*): Layouts in the repository, the one at its root first; all of them by default.
        max_model_len (`int`, *optional*): Longest text to serve; the engine's own choice by default.
        template_arguments (`dict`, *optional*): Arguments of the chat template that the drafter was trained with.

    Returns:
        `dict` of plain JSON values.

    Raises:
        ValueError: If an id is no Hub id, or `max_model_len` is longer than the drafter's context.
    """
    for name in (target_id, repo_id):
        if name is not None:
            validate_repo_id(name)
    family, drafts, context = family_of(config), num_drafts_of(config), config["max_position_embeddings"]
    if max_model_len is not None and not 0 < max_model_len <= context:
        raise ValueError(
            f"`max_model_len` must be in 1..{context}, the drafter's context, got {max_model_len}. Engines refuse a longer one."
        )
    target, repo = target_id or "ORG/TARGET", repo_id or placeholder(config)
    ids = layer_ids_of(config)
    vllm = {"method": family, "model": repo, "num_speculative_tokens": drafts}
    sglang = {"speculative-algorithm": "EAGLE3", "speculative-draft-model-path": repo}
    if family == "eagle3":
        sglang |= {
            "speculative-num-steps": drafts,
            "speculative-eagle-topk": 1,
            "speculative-num-draft-tokens": drafts + 1,
        }
    else:
        sglang |= {"speculative-algorithm": "DFLASH", "speculative-num-draft-tokens": drafts + 1}
    return {
        "family": family,
        "target": target_id,
        "repository": repo_id,
        "num_drafts": drafts,
        "context_length": context,
        "target_layer_ids": ids,
        "target_boundaries": [i + 1 for i in ids],
        "vllm": {"speculative_config": vllm, "command": _vllm_command(target, vllm, layouts[0], max_model_len)},
        "sglang": {"flags": sglang, "command": _sglang_command(target, sglang, max_model_len)},
        "transformers": transformers_snippet(config, target, repo, layouts, template_arguments or {}),
        "readers": readers(config, target_architectures, layouts),
        "break_even": break_even(config, num_target_parameters, taus, acceptance) if num_target_parameters else None,
    }


def measured_facts(record: TrainingRecord | None, config: dict[str, Any]) -> dict[str, Any]:
    """
    Return the arguments of [`serving_settings`] that a training record holds.

    Accepted lengths count where they were measured with the number of drafts that is served; acceptance per slot is that of the
    first such measurement, the lowest temperature before others.
    """
    if record is None:
        return {}
    fitting = [m for m in record.measurements if m.num_drafts == num_drafts_of(config)]
    first = min(fitting, key=lambda m: m.temperature, default=None)
    return {
        "num_target_parameters": record.target.num_parameters,
        "taus": sorted({round(m.tau, 2) for m in fitting}),
        "acceptance": [] if first is None else list(first.acceptance_per_slot),
        "template_arguments": dict(record.target.chat_template_kwargs),
    }


def _vllm_command(target: str, settings: dict[str, Any], root: str, max_model_len: int | None) -> str:
    # The speculators layout names target and numbers itself.
    named = [settings["model"]] if root == "speculators" else [target, "--speculative-config", json.dumps(settings)]
    length = [] if max_model_len is None else ["--max-model-len", str(max_model_len)]
    return shlex.join(["vllm", "serve", *named, *length])


def _sglang_command(target: str, flags: dict[str, Any], max_model_len: int | None) -> str:
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    length = [] if max_model_len is None else ["--context-length", str(max_model_len)]
    return shlex.join(["python", "-m", "sglang.launch_server", "--model-path", target, *words, *length])


def transformers_snippet(
    config: dict[str, Any],
    target: str,
    repo: str,
    layouts: Sequence[str] = ("flat", "speculators", "transformers"),
    template_arguments: dict[str, Any] | None = None,
) -> str | None:
    """Return Python lines that decode with the drafter in transformers; `None` where no layout in the repository can."""
    switches = "".join(f", {name}={value!r}" for name, value in (template_arguments or {}).items())
    if "transformers" not in layouts and (family_of(config) == "dflash" or layouts[0] != "flat"):
        return None
    if family_of(config) == "dflash":
        folder = "" if layouts[0] == "transformers" else 'subfolder="transformers", '
        first = f"drafter = AutoModel.from_pretrained({json.dumps(repo)}, {folder}dtype=target.dtype)\n"
        call, imported = 'assistant_model=drafter, speculation_type="dflash"', "AutoModel, "
    else:
        first, imported = "", ""
        call = f"custom_generate={json.dumps(repo)}, trust_remote_code=True"
    return (
        f"from transformers import {imported}AutoModelForCausalLM, AutoTokenizer\n\n"
        f"target = AutoModelForCausalLM.from_pretrained({json.dumps(target)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(target)})\n"
        f"{first}"
        'chat = [{"role": "user", "content": "Why is the sky blue?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        f'    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True{switches}\n'
        ")\n"
        f"output = target.generate(**inputs, max_new_tokens=256, {call})\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
    )


def readers(config: dict[str, Any], target_architectures: Sequence[str] = ()) -> dict[str, str]:
    """Return, by consumer, `"yes"` or `"no: "` and why it cannot load this drafter."""
    refusals = (
        _eagle3_refusals(config) if family_of(config) == "eagle3" else _dflash_refusals(config, target_architectures)
    )
    return {name: f"no: {'; '.join(reasons)}" if reasons else "yes" for name, reasons in refusals.items()}


def _eagle3_refusals(config: dict[str, Any]) -> dict[str, list[str]]:
    flags = [name for name in ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output") if config[name]]
    layers, ids = config["num_target_layers"], layer_ids_of(config)
    is_default = layers is not None and ids == [1, layers // 2 - 1, layers - 4]
    convention = [] if is_default else [f"it always reads the layers [1, N // 2 - 1, N - 4], the drafter reads {ids}"]
    normed = [f"it has no {', '.join(flags)}"] if flags else []
    eagle = convention + normed
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        eagle = [*eagle, "it takes the head size for hidden_size / num_attention_heads"]
    if config["rope_scaling"] is not None:
        eagle = [*eagle, "its RoPE knows linear and dynamic scaling alone"]
    return {
        "vLLM": [],
        "SGLang": ["it has no norm_before_residual"] if config["norm_before_residual"] else [],
        "transformers (custom_generate)": [],
        "speculators": [],
        "EAGLE's code": eagle,
        "llama.cpp's converter": convention + ([f"it is not known to carry {', '.join(flags)}"] if flags else []),
    }


def _dflash_refusals(config: dict[str, Any], target_architectures: Sequence[str]) -> dict[str, list[str]]:
    foreign = sorted(set(target_architectures) & set(_NOT_IN_SGLANG_DFLASH))
    return {
        "vLLM": [],
        "SGLang": [f"its class for {foreign[0]} hands out no layers to DFlash"] if foreign else [],
        "transformers (assistant_model)": [],
        "speculators": [],
        "z-lab's code": [],
        "llama.cpp's converter": [],
    }


def drafter_reads(config: dict[str, Any]) -> int:
    """
    Return how many parameters are read to draft one block: the layers once per sequential pass, the head where it is used.

    EAGLE-3 runs its layer and head once per draft; DFlash runs its layers once, and the target's head on all slots at once.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    attended = config["head_dim"] * (config["num_attention_heads"] + config["num_key_value_heads"])
    fused = len(layer_ids_of(config)) * config["target_hidden_size"] * hidden
    if family_of(config) == "dflash":
        layer = 2 * hidden * attended + 3 * hidden * inner
        return fused + config["num_hidden_layers"] * layer + hidden * config["vocab_size"]
    queries = config["head_dim"] * config["num_attention_heads"]
    keys = config["head_dim"] * config["num_key_value_heads"]
    layer = 2 * hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    return fused + num_drafts_of(config) * (layer + hidden * config["draft_vocab_size"])


def break_even(
    config: dict[str, Any], num_target_parameters: int, taus: Sequence[float] = (), *, ridge_tokens: int = RIDGE_TOKENS
) -> dict[str, Any]:
    """
    Estimate from which accepted length on a drafter pays.

    A forward on `n` tokens costs the time to read the weights, times `max(1, n / ridge_tokens)`: bound by memory below the
    ridge, by arithmetic above. A round verifies `batch * (K + 1)` tokens and drafts `batch * K`; plain decoding reads
    `batch` tokens per pass. Attention over the text, sampling and launches are left out, so real engines need more.

    Args:
        config (`dict`): The flat config.
        num_target_parameters (`int`): Parameters of the target.
        taus (`Sequence[float]`, *optional*): Accepted lengths to give the speed-up at.
        ridge_tokens (`int`, *optional*): Tokens per forward at the ridge of the hardware's roofline.

    Returns:
        `dict` with `draft_cost` (drafting one block at batch 1, in target passes), `ridge_tokens`, and `rows`: per batch size, the
        break-even tau and, by tau, the expected speed-up.
    """
    drafts, share = num_drafts_of(config), drafter_reads(config) / num_target_parameters
    # Tokens a drafter's forward reads per row: one at a time, or the whole block.
    width = drafts + 1 if family_of(config) == "dflash" else 1
    rows = []
    for batch in BATCH_SIZES:
        plain = max(1.0, batch / ridge_tokens)
        verify = max(1.0, batch * (drafts + 1) / ridge_tokens)
        draft = share * max(1.0, batch * width / ridge_tokens)
        needed = (verify + draft) / plain
        speedups = {f"{tau:.2f}": round(tau / needed, 2) for tau in taus}
        rows.append({"batch": batch, "break_even_tau": round(needed, 2), "speedup": speedups})
    return {"draft_cost": round(share, 4), "ridge_tokens": ridge_tokens, "rows": rows}
