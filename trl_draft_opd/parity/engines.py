# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Consumers that are engines: vLLM and SGLang, each started in a process of its own with an explicit speculative
configuration, greedy, to a fixed number of tokens. Their counters are read, not their logs.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, mkstemp
from typing import Any

from ..rollout.counts import Counts
from .compare import Outcome
from .counting import started_within
from .scene import EngineSettings, Scene


WORKERS = {"vllm": "vllm_worker.py", "sglang": "sglang_worker.py"}
_LEAST_CACHE = 1 << 28
# How an engine's log ends and what of it names a cause: `SomeError: reason`, behind whatever stands before it.
_LAST_LINES, _NUM_CAUSES = 4, 2
_MENDED = (
    "its kernel for CPUs norms the context's keys of every layer by the first layer's weights, which was mended here: "
    "served on a CPU, it keeps fewer drafts"
)
_CAUSE = re.compile(r"\b(?:[A-Za-z_][\w.]*)?(?:Error|Exception|Interrupt)\b: *\S.*")


class EngineFailure(RuntimeError):
    """An engine that is installed did not decode: it refused the export, crashed or took too long."""


def find_reason_to_skip(name: str, scene: Scene) -> str | None:
    """Return why an engine is not run, or `None`."""
    python = scene.engines.python
    if _find_layout(name, scene) is None:
        return f"{name} reads no layout of this export"
    if not _holds(python, f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"):
        return f"{name} is not installed" + ("" if python == sys.executable else f" for {python}")
    if scene.target_name is None:
        return "engines load the target themselves, and no folder or id of a whole model was given (`target_name`)"
    config = scene.drafter.config
    reason = "SGLang decodes speculatively" if name == "sglang" else config.exported.needs_gpu_in_vllm(config)
    if reason is not None and not _holds(python, "import sys, torch; sys.exit(not torch.cuda.is_available())"):
        return f"{reason}, on a GPU, and there is none"
    return None


def _holds(python: str, probe: str) -> bool:
    return subprocess.run([python, "-P", "-c", probe], check=False).returncode == 0


def _find_layout(name: str, scene: Scene) -> Path | None:
    return scene.layouts.get("flat") or (scene.layouts.get("speculators") if name == "vllm" else None)


def run_engine(name: str, scene: Scene, *, model: str | None = None, is_plain: bool = False) -> Outcome:
    """
    Decode the prompts in an engine, with the target alone if `is_plain`. In place of the target, vLLM can serve a
    `model`: a speculators layout, whose config names target and numbers.
    """
    speculative = None
    folder = _find_layout(name, scene)
    if folder is not None and model is None and not is_plain:
        config = scene.drafter.config
        speculative = {"model": str(folder.resolve()), "num_speculative_tokens": scene.num_drafts}
        if name == "vllm":
            speculative["method"] = config.exported.method
        else:
            flags = config.exported.sglang_flags(config, scene.num_drafts)
            speculative["options"] = {"speculative_algorithm": config.exported.algorithm} | {
                flag.replace("-", "_"): value for flag, value in flags.items()
            }
    settings = scene.engines
    longest = max(len(prompt) for prompt in scene.prompts) + scene.num_decoded + 2 * (scene.num_drafts + 1)
    request = {
        "model": model or str(scene.target_name),
        "prompts": scene.prompts,
        "max_completion_length": scene.max_completion_length,
        "speculative": speculative,
        "has_drafter": speculative is not None or model is not None,
        "dtype": settings.dtype,
        "max_model_len": min(longest, scene.target.config.max_position_embeddings),
        "batch_size": settings.batch_size,
        "cache_bytes": _cache_bytes(scene, longest * settings.batch_size),
    }
    reply = _ask(name, settings, request)
    accepted, counts = reply["accepted"], None
    # Without per-request rounds there are the engine's counters; SGLang and old versions of vLLM have only those.
    chains = None if accepted is None else [started_within(chain, scene.max_completion_length) for chain in accepted]
    if reply.get("num_rounds") is not None:
        counts = Counts((reply["num_rounds"],), (tuple(reply["kept_at_slot"]),))
        if chains is not None and counts != Counts.of_chains(chains, scene.num_drafts).pooled():
            raise EngineFailure(
                f"{name} counts {counts.num_blocks} rounds and {sum(counts.kept_at_slot)} accepted drafts in all, but "
                "its requests report others."
            )
    remark = f"{name} {reply['version']}, {settings.dtype}; a block cut by the limit counts whole, here as there"
    config = scene.drafter.config
    if reply.get("is_mended") and config.exported.method == "dflash" and config.num_hidden_layers > 1:
        remark += f"; {_MENDED}"
    return Outcome(name, reply["responses"], chains, counts, remark)


def _cache_bytes(scene: Scene, num_tokens: int) -> int:
    """Return a size that holds the keys and values of so many tokens, of drafter and target, twice over."""
    config = scene.target.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers + scene.drafter.config.num_hidden_layers
    return max(_LEAST_CACHE, 2 * num_tokens * layers * 2 * config.num_key_value_heads * width * 4)


def _ask(name: str, settings: EngineSettings, request: dict[str, Any]) -> dict[str, Any]:
    with TemporaryDirectory() as scratch:
        asked, reply, log = (Path(scratch) / file for file in ("request.json", "reply.json", "log.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        worker = Path(__file__).with_name(WORKERS[name])
        # -P: the folder of the worker holds modules of its own, which must not shadow the engine's.
        command = [settings.python, "-P", str(worker), str(asked), str(reply)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(settings.timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # Engines start further processes; none may outlive the verification.
                _end(process)
        if code != 0 or not reply.is_file():
            why = f"took more than {settings.timeout:.0f} s" if code is None else f"ended with code {code}"
            told = _last_words(log.read_text("utf-8", "replace").strip().splitlines())
            raise EngineFailure(f"{name} {why}:\n{told}\nIts whole log: {_kept(log, name)}")
        return json.loads(reply.read_text("utf-8"))


def _last_words(lines: list[str]) -> str:
    """
    Return the first errors in a log, by which engines start to fail, and its end; what lies between are tracebacks of
    every process that hears of it.
    """
    causes = dict.fromkeys(found.group() for line in lines if (found := _CAUSE.search(line)))
    told = [f"  {cause}" for cause in list(causes)[:_NUM_CAUSES]]
    ending = [line for line in lines[-_LAST_LINES:] if not any(cause.strip() in line for cause in told)]
    return "\n".join([*told, *(["..."] if told and ending else []), *ending])


def _kept(log: Path, name: str) -> Path:
    """Copy a log to where it outlives this process, and return its place."""
    descriptor, place = mkstemp(prefix=f"trl-draft-opd-{name}-", suffix=".log")
    os.close(descriptor)
    shutil.copyfile(log, place)
    return Path(place)


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
