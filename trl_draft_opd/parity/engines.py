# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Consumers that are servers: vLLM and SGLang, each started in a process of its own with an explicit speculative configuration, greedy,
to a fixed number of tokens. Their counters are read, not their logs.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..rollout.counts import Counts
from .counting import started_within
from .report import Outcome
from .scene import Scene


WORKERS = {"vllm": "vllm_worker.py", "sglang": "sglang_worker.py"}
_LEAST_CACHE, _LOG_LINES = 1 << 28, 12


@dataclass(frozen=True)
class EngineSettings:
    """
    How engines are started.

    Attributes:
        python (`str`): Interpreter of the environment that holds the engine; this one's by default.
        dtype (`str`): Precision the engine computes in. Outputs are held equal in float32 alone.
        batch_size (`int`): Requests decoded together. Other batches round otherwise, so 1 compares best.
        timeout (`float`): Seconds an engine may take in all.
    """

    python: str = sys.executable
    dtype: str = "float32"
    batch_size: int = 1
    timeout: float = 3600.0


class EngineFailure(RuntimeError):
    """An engine that is installed did not decode: it refused the export, crashed or took too long."""


def find_reason_to_skip(name: str, scene: Scene, settings: EngineSettings) -> str | None:
    """Return why an engine is not run, or `None`."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    if subprocess.run([settings.python, "-P", "-c", probe], check=False).returncode != 0:
        return f"{name} is not installed" + ("" if settings.python == sys.executable else f" for {settings.python}")
    if scene.target_name is None:
        return "engines load the target themselves, and no folder or id of it was given (`target_name`)"
    if name == "sglang":
        probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([settings.python, "-P", "-c", probe], check=False).returncode != 0:
            return "SGLang decodes speculatively on a GPU, and there is none"
    return None


def speculative_config(scene: Scene, folder: Path) -> dict[str, Any]:
    """Return vLLM's `speculative_config` for a folder; SGLang's settings are derived from it."""
    family = scene.drafter.config.family
    return {"method": family, "model": str(folder.resolve()), "num_speculative_tokens": scene.num_drafts}


def run_engine(
    name: str, scene: Scene, settings: EngineSettings, *, model: str | None = None, speculative: dict[str, Any] | None
) -> Outcome:
    """
    Decode the prompts in an engine.

    Args:
        name (`str`): `"vllm"` or `"sglang"`.
        scene ([`Scene`]): Prompts and sizes.
        settings ([`EngineSettings`]): How to start it.
        model (`str`, *optional*): What the engine serves; the target by default.
        speculative (`dict` or `None`): See [`speculative_config`]; `None` decodes plainly.

    Raises:
        EngineFailure: With the last lines of its log.
    """
    longest = max(len(prompt) for prompt in scene.prompts) + scene.num_decoded + 2 * (scene.num_drafts + 1)
    answer = _ask(
        name,
        settings,
        {
            "model": model or str(scene.target_name),
            "prompts": scene.prompts,
            "max_new_tokens": scene.max_new_tokens,
            "speculative": speculative,
            "has_drafter": speculative is not None or model is not None,
            "dtype": settings.dtype,
            "max_model_len": min(longest, scene.target.config.max_position_embeddings),
            "batch_size": settings.batch_size,
            "cache_bytes": _cache_bytes(scene, longest * settings.batch_size),
        },
    )
    accepted, counts = answer["accepted"], None
    # Without per-request rounds there are the engine's counters; SGLang and old versions of vLLM have those alone.
    chains = None if accepted is None else [started_within(chain, scene.max_new_tokens) for chain in accepted]
    if answer.get("num_rounds") is not None:
        counts = Counts((answer["num_rounds"],), (tuple(answer["kept_at_slot"]),))
    if chains is not None and counts not in (None, Counts.of_chains(chains, scene.num_drafts).pooled()):
        raise EngineFailure(
            f"{name} counts {counts.num_blocks} rounds and {sum(counts.kept_at_slot)} accepted drafts in all, but its requests tell of others."
        )
    remark = f"{name} {answer['version']}, {settings.dtype}; a block cut by the limit counts whole, here as there"
    return Outcome(name, answer["responses"], chains, counts, remark, answer["device"])


def _cache_bytes(scene: Scene, num_tokens: int) -> int:
    """Return a size that holds the keys and values of so many tokens, of drafter and target, twice over."""
    config = scene.target.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers + scene.drafter.config.num_hidden_layers
    return max(_LEAST_CACHE, 2 * num_tokens * layers * 2 * config.num_key_value_heads * width * 4)


def _ask(name: str, settings: EngineSettings, request: dict[str, Any]) -> dict[str, Any]:
    with TemporaryDirectory() as scratch:
        asked, answer, log = (Path(scratch) / file for file in ("request.json", "answer.json", "log.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        worker = Path(__file__).with_name(WORKERS[name])
        # -P: the folder of the worker holds modules of its own, which must not shadow the engine's.
        command = [settings.python, "-P", str(worker), str(asked), str(answer)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(settings.timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # Engines start further processes; none may outlive the verification.
                _end(process)
        if code != 0 or not answer.is_file():
            lines = log.read_text("utf-8", "replace").strip().splitlines()[-_LOG_LINES:]
            why = f"took more than {settings.timeout:.0f} s" if code is None else f"ended with code {code}"
            raise EngineFailure(f"{name} {why}:\n" + "\n".join(lines))
        return json.loads(answer.read_text("utf-8"))


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
