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


def readers(
    config: dict[str, Any],
    target_architectures: Sequence[str] = (),
    layouts: Sequence[str] = ("flat", "speculators", "transformers"),
) -> dict[str, str]:
    """
    Return, by consumer, `"yes"`, `"yes, "` and on which condition, or `"no: "` and why it cannot load this drafter.

    Args:
        config (`dict`): The flat config.
        target_architectures (`Sequence[str]`, *optional*): The target's.
        layouts (`Sequence[str]`, *optional*): Layouts in the repository, the one at its root first.
    """
    family = family_of(config)
    refusals = _eagle3_refusals(config) if family == "eagle3" else _dflash_refusals(target_architectures)
    conditions = {"EAGLE's code": "if the target's weights lie in several files with an index"}
    if set(target_architectures) & set(_NOT_IN_VLLM):
        conditions["vLLM"] = "with `--model-impl transformers`: its own class of this target hands out no layers"
    elif family == "dflash":
        conditions["vLLM"] = "with an attention backend that can be non-causal (FlashAttention, FlexAttention)"
    answers = {}
    for name, reasons in refusals.items():
        missing = _missing_layout(name, layouts)
        if missing is not None:
            reasons = [missing]
        condition = f", {conditions[name]}" if name in conditions else ""
        answers[name] = f"no: {'; '.join(reasons)}" if reasons else f"yes{condition}"
    return answers


def _missing_layout(reader: str, layouts: Sequence[str]) -> str | None:
    """Return what a reader misses in a repository, or `None`."""
    root = layouts[0]
    if reader in ("speculators", "transformers (assistant_model)"):
        layout = reader.split()[0]
        return None if layout in layouts else f"the repository does not hold the {layout} layout"
    if root == "flat" or (reader == "vLLM" and root == "speculators"):
        return None
    return f"it reads the flat layout, and the root of this repository is the {root} one"


def _eagle3_refusals(config: dict[str, Any]) -> dict[str, list[str]]:
    flags = [name for name in ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output") if config[name]]
    layers, ids = config["num_target_layers"], layer_ids_of(config)
    is_default = layers is not None and ids == [1, layers // 2 - 1, layers - 4]
    convention = [] if is_default else [f"it always reads the layers [1, N // 2 - 1, N - 4], the drafter reads {ids}"]
    eagle = convention + ([f"it has no {', '.join(flags)}"] if flags else [])
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


def _dflash_refusals(target_architectures: Sequence[str]) -> dict[str, list[str]]:
    foreign = sorted(set(target_architectures) & set(_NOT_IN_SGLANG_DFLASH))
    return {
        "vLLM": [],
        "SGLang": [f"its class for {foreign[0]} hands out no layers to DFlash"] if foreign else [],
        "transformers (assistant_model)": [],
        "speculators": [],
        "z-lab's code": [],
        "llama.cpp's converter": [],
    }


def drafter_parameters(config: dict[str, Any]) -> int:
    """Return how many parameters are trained: neither the target's embedding nor, for DFlash, its head."""
    hidden, width = config["hidden_size"], config["head_dim"]
    if family_of(config) == "dflash":
        # Two norms per layer and two per head size; one norm of the context and one at the end.
        norms = config["num_hidden_layers"] * (2 * hidden + 2 * width) + 2 * hidden
        return _fused(config) + config["num_hidden_layers"] * _layer(config) + norms
    count, target = config["num_aux_hidden_states"], config["target_hidden_size"]
    norms = 4 * hidden + count * target * (int(config["fc_norm"]) + int(config["norm_before_fc"]))
    return _fused(config) + _layer(config) + hidden * config["draft_vocab_size"] + norms


def _fused(config: dict[str, Any]) -> int:
    return len(layer_ids_of(config)) * config["target_hidden_size"] * config["hidden_size"]


def _layer(config: dict[str, Any]) -> int:
    """Return the parameters of one layer's matrices; EAGLE-3's projections read embedding and state side by side."""
    hidden, width = config["hidden_size"], config["head_dim"]
    queries, keys = width * config["num_attention_heads"], width * config["num_key_value_heads"]
    inputs = 2 * hidden if family_of(config) == "eagle3" else hidden
    return inputs * (queries + 2 * keys) + queries * hidden + 3 * hidden * config["intermediate_size"]


def drafter_reads(config: dict[str, Any], num_drafts: int | None = None) -> int:
    """
    Return how many parameters are read to draft one block: the layers once per sequential pass, the head where it is used.

    EAGLE-3 runs its layer and head once per draft; DFlash runs its layers once, and the target's head on all slots at once.

    Args:
        config (`dict`): The flat config.
        num_drafts (`int`, *optional*): Drafts per block; what the drafter was trained for by default.
    """
    if family_of(config) == "dflash":
        head = config["hidden_size"] * config["vocab_size"]
        return _fused(config) + config["num_hidden_layers"] * _layer(config) + head
    drafts = num_drafts_of(config) if num_drafts is None else num_drafts
    return _fused(config) + drafts * (_layer(config) + config["hidden_size"] * config["draft_vocab_size"])


def break_even(
    config: dict[str, Any],
    num_target_parameters: int,
    taus: Sequence[float] = (),
    acceptance: Sequence[float] = (),
    *,
    ridge_tokens: int = RIDGE_TOKENS,
) -> dict[str, Any]:
    """
    Estimate from which accepted length on a drafter pays.

    A forward on `n` tokens costs the time to read the weights, times `max(1, n / ridge_tokens)`: bound by memory below the
    ridge, by arithmetic above. A round verifies `batch * (K + 1)` tokens and drafts `batch * K`; plain decoding reads
    `batch` tokens per pass. Attention over the text, sampling and launches are left out, so real engines need more. The
    target counts as reading all its parameters, so mixtures of experts and large untied embeddings need more, too.

    Args:
        config (`dict`): The flat config.
        num_target_parameters (`int`): Parameters of the target.
        taus (`Sequence[float]`, *optional*): Accepted lengths to give the speed-up at.
        acceptance (`Sequence[float]` of length `K`, *optional*):
            Share of blocks that keep at least `k` drafts. With it, EAGLE-3 is also tried with fewer drafts, whose accepted length is
            taken to be `1 + acceptance[0] + ... + acceptance[k - 1]`. DFlash is not: its slots see each other, so a shorter
            block is another input.
        ridge_tokens (`int`, *optional*): Tokens per forward at the ridge of the hardware's roofline.

    Returns:
        `dict` with `draft_cost` (drafting one block at batch 1, in target passes), `ridge_tokens`, and `rows`: per batch size, the
        break-even tau, by tau the expected speed-up, and `best_drafts` with its speed-up, or `None` where it cannot be told.
    """
    drafts = num_drafts_of(config)
    can_vary = family_of(config) == "eagle3" and len(acceptance) == drafts
    rows = []
    for batch in BATCH_SIZES:
        needed = _round_cost(config, num_target_parameters, batch, drafts, ridge_tokens)
        best = None
        if can_vary:
            found = {
                k: (1 + sum(acceptance[:k])) / _round_cost(config, num_target_parameters, batch, k, ridge_tokens)
                for k in range(1, drafts + 1)
            }
            k = max(found, key=found.__getitem__)
            best = {"num_drafts": k, "speedup": round(found[k], 2)}
        speedups = {f"{tau:.2f}": round(tau / needed, 2) for tau in taus}
        rows.append({"batch": batch, "break_even_tau": round(needed, 2), "speedup": speedups, "best_drafts": best})
    share = drafter_reads(config) / num_target_parameters
    return {"draft_cost": round(share, 4), "ridge_tokens": ridge_tokens, "rows": rows}


def _round_cost(config: dict[str, Any], num_target_parameters: int, batch: int, drafts: int, ridge: int) -> float:
    """Return what drafting and verifying a block costs, in plain decoding passes of the same batch."""
    # Tokens a drafter's forward reads per row: one at a time, or the whole block.
    width = drafts + 1 if family_of(config) == "dflash" else 1
    verify = max(1.0, batch * (drafts + 1) / ridge)
    draft = drafter_reads(config, drafts) / num_target_parameters * max(1.0, batch * width / ridge)
    return (verify + draft) / max(1.0, batch / ridge)
