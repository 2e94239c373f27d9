# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The parity gate: what was trained is what was published, and what every consumer at hand decodes with.

Reads the published files afresh. An error in them leaves every text right, because the target verifies it, and costs the speed
that the drafter is for; so rounds are compared one by one, and not texts alone.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from ..drafters.auto import AutoDrafter
from ..drafters.base import Drafter
from ..drafters.published.checkpoint import CONFIG_FILE, SAFETENSORS_FILE
from ..drafters.published.configs import parse_drafter_config
from ..export import PUBLISHED_NAMES, TargetOfExport, read_target
from ..export.rules import check_folder
from ..export.serving import SERVING_FILE
from ..target.frozen import FrozenTarget
from .compare import Reference, Verdict, compare
from .engines import (
    WORKERS,
    EngineFailure,
    EngineSettings,
    find_reason_to_skip,
    run_engine,
    speculative_config,
)
from .fingerprint import describe_gap, find_reasons, rounded_like, take_fingerprint
from .in_process import run_custom_generate, run_transformers
from .known_faults import find_known_fault
from .library import run_speculators
from .recorded import compare_with_record
from .report import Outcome, VerificationReport
from .scene import Scene, decode_plainly, decode_with_us, replay
from .suspects import suspect_layer_ids, suspect_vocabulary


CONSUMERS = ("transformers", "custom_generate", "speculators", "vllm", "sglang")
_SUBFOLDERS = ("speculators", "transformers")
# What a consumer raises on files it cannot use; anything else is a fault of ours and comes through.
_REFUSALS = (EngineFailure, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError)


@dataclass
class _Gate:
    """A verification under way."""

    scene: Scene
    report: VerificationReport
    layouts: dict[str, Path]
    tolerance: float
    engines: EngineSettings
    trust_remote_code: bool
    reference: Reference | None = None
    names: tuple[str, ...] = field(default=CONSUMERS)

    def add(self, verdict: Verdict) -> None:
        self.report.rows.append(verdict.row)
        self.report.problems += verdict.problems
        self.report.notes += verdict.notes


def verify_drafter(
    path: str | Path,
    target: FrozenTarget,
    prompts: Sequence[Sequence[int]],
    *,
    target_name: str | None = None,
    checkpoint: str | Path | None = None,
    consumers: Sequence[str] | None = None,
    num_drafts: int | None = None,
    max_new_tokens: int = 128,
    trust_remote_code: bool = False,
    tolerance: float = 0.01,
    engines: EngineSettings | None = None,
    revision: str | None = None,
) -> VerificationReport:
    """
    Hold a published drafter to its training, and every consumer at hand to our reference loop.

    Decodes each prompt alone to a fixed number of tokens, the end of sequence ignored on all sides, and counts the rounds that start
    within `max_new_tokens` tokens, each with all the drafts it kept: so do engines, and the block that the limit cuts counts whole.

    Args:
        path (`str` or `Path`): Folder or Hub id of the published drafter.
        target ([`FrozenTarget`]): In float32, because outputs are compared to the last token.
        prompts (`Sequence[Sequence[int]]`): Token ids, chat template applied.
        target_name (`str`, *optional*):
            Folder or Hub id of the target for engines and libraries that load it themselves; where it was loaded from by default.
        checkpoint (`str` or `Path`, *optional*): The training checkpoint the export was made from; a LoRA adapter is merged.
        consumers (`Sequence[str]`, *optional*):
            Any of `"transformers"`, `"custom_generate"`, `"speculators"`, `"vllm"`, `"sglang"`; all that are installed by default.
        num_drafts (`int`, *optional*): Drafts per block; the drafter's own number by default.
        max_new_tokens (`int`, *optional*, defaults to 128): Tokens whose rounds are counted.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code in the folder's `custom_generate/`.
        tolerance (`float`, *optional*, defaults to 0.01): Relative gap in tau that is noted and let pass.
        engines ([`EngineSettings`], *optional*): How engines are started.
        revision (`str`, *optional*): Revision on the Hub.

    Returns:
        [`VerificationReport`]. Its `ok` says whether nothing is wrong; its `skipped` what was not looked at.

    Raises:
        ValueError: If the target is not in float32, a consumer is unknown, or there is no prompt.
        OSError: If there is no such folder or repository.
    """
    names = _check_request(target, prompts, consumers, max_new_tokens)
    folder = _find_folder(path, revision)
    layouts = _find_layouts(folder, target)
    report = VerificationReport(str(path), "", len(prompts), num_drafts or 0, max_new_tokens)
    target_name = target_name or target.causal_lm.config.name_or_path or None
    _check_rules(report, folder, layouts, target, target_name)
    try:
        drafter = AutoDrafter.from_pretrained(folder, num_target_layers=target.num_layers)
    except ValueError as error:
        report.problems.append(f"The drafter cannot be loaded, so nothing was decoded: {error}")
        return report
    scene = Scene(
        target=target,
        target_name=target_name,
        folder=folder,
        drafter=drafter.to(target.device),
        prompts=[list(prompt) for prompt in prompts],
        num_drafts=num_drafts or drafter.default_num_drafts,
        max_new_tokens=max_new_tokens,
    )
    report.family, report.num_drafts = drafter.config.family, scene.num_drafts
    engines = engines or EngineSettings()
    gate = _Gate(scene, report, layouts, tolerance, engines, trust_remote_code, None, names)
    responses = decode_plainly(scene)
    texts, chains = decode_with_us(scene)
    gate.reference = Reference(responses, chains)
    gate.add(compare(scene, gate.reference, Outcome("reference", texts, chains, None, "our own loop"), tolerance))
    _compare_with_training(gate, checkpoint)
    for name in CONSUMERS:
        _run_consumer(gate, name)
    return report


def _check_request(
    target: FrozenTarget, prompts: Sequence, consumers: Sequence[str] | None, max_new_tokens: int
) -> tuple[str, ...]:
    unknown = sorted(set(consumers or ()) - set(CONSUMERS))
    if unknown:
        raise ValueError(f"Unknown consumers {unknown}; there are {list(CONSUMERS)}.")
    if target.causal_lm.dtype != torch.float32:
        raise ValueError(
            f"The target is in {target.causal_lm.dtype}. Outputs are compared to the last token, so load it with `dtype=torch.float32`."
        )
    if not len(prompts) or max_new_tokens < 2:
        raise ValueError(f"Needs a prompt and at least 2 tokens, got {len(prompts)} prompts and {max_new_tokens=}.")
    return CONSUMERS if consumers is None else tuple(consumers)


def _find_folder(path: str | Path, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_absolute() or str(path).startswith((".", "~")):
        raise FileNotFoundError(
            f"There is no folder {str(path)!r}. Give the folder that holds config.json, or a Hub id."
        )
    patterns = [*sorted(PUBLISHED_NAMES), *(f"{name}/*" for name in (*_SUBFOLDERS, "custom_generate"))]
    return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))


def _find_layouts(folder: Path, target: FrozenTarget) -> dict[str, Path]:
    """Return the folder of each layout; the one at the root first."""
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {CONFIG_FILE}. Give the folder of a published drafter.")
    raw = json.loads(config.read_text("utf-8"))
    stated = None if raw.get("num_target_layers") else target.num_layers
    layouts = {parse_drafter_config(raw, num_target_layers=stated).layout: folder}
    for name in _SUBFOLDERS:
        if (folder / name / CONFIG_FILE).is_file():
            layouts.setdefault(name, folder / name)
    return layouts


def _check_rules(
    report: VerificationReport, folder: Path, layouts: dict[str, Path], target: FrozenTarget, target_name: str | None
) -> None:
    """Hold every layout of an export of ours to the rules engines read by; other drafters keep rules of their own."""
    if not (folder / SERVING_FILE).is_file():
        report.skipped["rules"] = f"there is no {SERVING_FILE}, so the folder is no export of this package"
        return
    embedding = None
    if target_name is None:
        report.skipped["rule C12"] = "the target's files are not known, so its stored embedding cannot be compared"
    else:
        try:
            embedding = read_target(target_name).embedding
        except (OSError, ValueError) as error:
            report.skipped["rule C12"] = f"the target's stored embedding cannot be read: {error}"
    for name, place in layouts.items():
        found = check_folder(place, TargetOfExport(None, target.config, embedding))
        report.problems += [f"{name} layout: {problem}" for problem in found]


def _compare_with_training(gate: _Gate, checkpoint: str | Path | None) -> None:
    """Compare layouts with each other and with the checkpoint, and the reference with what training would estimate."""
    scene, report = gate.scene, gate.report
    own = take_fingerprint(scene.target, scene.drafter, scene.num_drafts)
    root, *others = gate.layouts
    for name in others:
        try:
            other = AutoDrafter.from_pretrained(gate.layouts[name], num_target_layers=scene.target.num_layers)
        except ValueError as error:
            report.problems.append(f"{name} layout: the drafter cannot be loaded: {error}")
            continue
        gap = describe_gap(own, take_fingerprint(scene.target, other.to(scene.target.device), scene.num_drafts))
        if gap is not None:
            reasons = "; ".join(find_reasons(other, scene.drafter)).replace("the checkpoint", f"the {root} layout")
            report.problems.append(f"{name} layout: {gap} from the {root} layout: {reasons or 'no reason found'}.")
    if checkpoint is None:
        report.skipped["checkpoint"] = (
            "none was given (`--checkpoint`), so the export was not compared with what was trained"
        )
        estimator, remark = scene.drafter, "replay of the target's text with the published weights"
        _look_for_suspects(gate)
    else:
        trained = (
            AutoDrafter.from_pretrained(checkpoint, num_target_layers=scene.target.num_layers)
            .to(scene.target.device)
            .eval()
        )
        estimator, remark = (
            _hold_to_checkpoint(gate, trained),
            "replay of the target's text with the checkpoint's weights",
        )
    chains = replay(scene, estimator, gate.reference.responses)
    outcome = Outcome("estimate", None, chains, None, remark)
    gate.add(compare(scene, gate.reference, outcome, gate.tolerance))
    compare_with_record(scene, report, gate.tolerance)


def _hold_to_checkpoint(gate: _Gate, trained: Drafter) -> Drafter:
    """Compare fingerprints of export and checkpoint; return the checkpoint as the export should hold it."""
    scene, report = gate.scene, gate.report
    config = json.loads((scene.folder / CONFIG_FILE).read_text("utf-8"))
    is_whole = "float32" in (config.get("dtype"), config.get("torch_dtype"))
    expected = trained if is_whole else rounded_like(trained, torch.bfloat16)
    if trained.config.family != scene.drafter.config.family:
        report.problems.append(
            f"The checkpoint is no source of this export: {'; '.join(find_reasons(scene.drafter, trained))}."
        )
        return scene.drafter
    found = describe_gap(
        take_fingerprint(scene.target, scene.drafter, scene.num_drafts),
        take_fingerprint(scene.target, expected, scene.num_drafts),
    )
    reasons = find_reasons(scene.drafter, trained)
    if found is not None or reasons:
        cause = "; ".join(reasons) or "settings and tensors are those of the checkpoint, rounded to bfloat16"
        report.problems.append(
            f"The export is not its checkpoint: {cause}. ({found or 'It drafts alike on a fixed text.'})"
        )
    return expected


def _look_for_suspects(gate: _Gate) -> None:
    found = [suspect_layer_ids(gate.scene, gate.reference.responses), suspect_vocabulary(gate.scene)]
    gate.report.problems += [f"{each[0].upper()}{each[1:]}." for each in found if each is not None]


def _run_consumer(gate: _Gate, name: str) -> None:
    """Run one consumer, or note why not."""
    scene, report = gate.scene, gate.report
    if name not in gate.names:
        report.skipped[name] = "not asked for"
        return
    reason, run = _prepare(gate, name)
    if reason is not None:
        report.skipped[name] = reason
        return
    try:
        outcome = run()
    except _REFUSALS as error:
        report.problems.append(f"{name} does not decode with this export: {type(error).__name__}: {error}")
        return
    is_exact = name not in WORKERS or gate.engines.dtype == "float32"
    reference = Reference(gate.reference.responses, gate.reference.chains, is_exact)
    verdict = _excuse(gate, name, outcome, compare(scene, reference, outcome, gate.tolerance))
    gate.add(verdict)
    if name in WORKERS and verdict.row.num_different:
        report.notes.append(_tell_from_plain(gate, name, outcome))


def _tell_from_plain(gate: _Gate, name: str, outcome: Outcome) -> str:
    """Decode plainly in an engine whose outputs differ: that tells its arithmetic from the drafter's doing."""
    try:
        plain = run_engine(name, gate.scene, gate.engines, speculative=None)
    except EngineFailure as error:
        return f"{name}: its plain decoding could not be compared: {error}"
    is_same = plain.responses == outcome.responses
    writes, whose = ("the same", "its own") if is_same else ("other", "not its own")
    return f"{name}: its plain decoding writes {writes} outputs, so the difference is {whose}."


def _excuse(gate: _Gate, name: str, outcome: Outcome, verdict: Verdict) -> Verdict:
    """Turn problems into a note where our loop with a fault the engine is known for takes exactly its rounds."""
    fault = find_known_fault(name, gate.scene, outcome)
    if fault is None or verdict.row.num_different or not verdict.row.num_other_chains:
        return verdict
    with fault.imitate(gate.scene.drafter):
        _, chains = decode_with_us(gate.scene)
    if chains != outcome.chains:
        return verdict
    told = " ".join([*verdict.problems, *verdict.notes])
    note = f"{told} Not the export's doing: {fault.text}, and our loop with that fault takes exactly these rounds."
    return replace(verdict, problems=[], notes=[note])


def _prepare(gate: _Gate, name: str) -> tuple[str | None, Callable[[], Outcome]]:
    """Return why a consumer cannot be run, or `None`, and what runs it."""
    scene, layouts = gate.scene, gate.layouts
    is_whole = scene.num_drafts == scene.drafter.default_num_drafts
    if name == "transformers":
        if "transformers" not in layouts:
            return "the export has no transformers layout; EAGLE-3 has none", None
        if not is_whole:
            return (
                f"it always drafts {scene.drafter.default_num_drafts} tokens per block, not {scene.num_drafts}",
                None,
            )
        return None, lambda: run_transformers(scene, layouts["transformers"])
    if name == "custom_generate":
        if not (scene.folder / "custom_generate" / "generate.py").is_file():
            return "the export carries no custom_generate", None
        if not gate.trust_remote_code:
            return "it is code from the folder, and is run with `--trust-remote-code` alone", None
        if scene.drafter.config.family == "dflash" and not is_whole:
            return (
                f"it always drafts {scene.drafter.default_num_drafts} tokens per block, not {scene.num_drafts}",
                None,
            )
        return None, lambda: run_custom_generate(scene)
    if name == "speculators":
        return _prepare_speculators(gate)
    place = layouts.get("flat") or layouts.get("speculators")
    if place is None or (name == "sglang" and "flat" not in layouts):
        return f"{name} reads no layout of this export", None
    reason = find_reason_to_skip(name, scene, gate.engines)
    return reason, lambda: run_engine(name, scene, gate.engines, speculative=speculative_config(scene, place))


def _prepare_speculators(gate: _Gate) -> tuple[str | None, Callable[[], Outcome]]:
    scene = gate.scene
    if "speculators" not in gate.layouts:
        return "the export has no speculators layout", None
    if importlib.util.find_spec("speculators") is None:
        return "speculators is not installed", None
    if scene.target_name is None or not (Path(scene.target_name) / SAFETENSORS_FILE).is_file():
        return (
            f"the library reads the target from a local folder with one {SAFETENSORS_FILE}, and none was given",
            None,
        )
    return None, lambda: run_speculators(
        scene, gate.layouts["speculators"], gate.reference.responses, gate.reference.chains
    )
