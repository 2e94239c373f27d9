# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The parity gate: what was trained is what was published, and what every consumer at hand decodes with.

Reads the published files afresh. An error in them leaves every text right, because the target verifies it, and costs
the speed that the drafter is for; so rounds are compared one by one, and not only texts.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from ..drafters.published.checkpoint import CONFIG_FILE, CheckpointSource
from ..drafters.published.configs import parse_drafter_config
from ..export import LAYOUTS, PUBLISHED_NAMES, TargetOfExport, read_target
from ..export.rules import check_folder
from ..export.serving import SERVING_FILE
from ..target.frozen import FrozenTarget
from ..target.lengths import TRAINING_LENGTHS, Lengths, fit_lengths
from ..utils.loading import require_model
from .compare import Outcome, Reference, compare
from .consumers import CONSUMERS
from .engines import WORKERS, EngineFailure, run_engine
from .report import VerificationReport
from .scene import EngineSettings, Scene, decode_plainly, decode_with_us, load_drafter
from .training import compare_with_training


# The rounds of a response, without the hours that whole ones take in every engine.
VERIFICATION_LENGTHS = Lengths(TRAINING_LENGTHS.prompt, 128)
# What a consumer raises on files it cannot use; anything else is a fault of ours and comes through.
_REFUSALS = (EngineFailure, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError)


def verify_drafter(
    path: str | Path,
    target: FrozenTarget,
    prompts: Sequence[Sequence[int]],
    *,
    target_name: str | None = None,
    checkpoint: str | Path | None = None,
    consumers: Sequence[str] | None = None,
    num_drafts: int | None = None,
    max_completion_length: int | None = None,
    trust_remote_code: bool = False,
    tolerance: float = 0.01,
    engines: EngineSettings | None = None,
    revision: str | None = None,
) -> VerificationReport:
    """
    Check a published drafter against its training, and every consumer at hand against our reference loop.

    Decodes each prompt alone, the end of sequence ignored on all sides, and counts the rounds that start within
    `max_completion_length` tokens. As in engines, a block that the limit cuts counts whole.

    Args:
        path (`str` or `Path`): Folder or Hub id of the published drafter.
        target ([`FrozenTarget`]): In float32, because outputs are compared to the last token.
        prompts (`Sequence[Sequence[int]]`): Token ids, chat template applied.
        target_name (`str`, *optional*):
            Folder or Hub id of the target for engines and libraries that load it themselves; where it was loaded from
            by default.
        checkpoint (`str` or `Path`, *optional*):
            The training checkpoint the export was made from; a LoRA adapter is merged.
        consumers (`Sequence[str]`, *optional*):
            Any of `"transformers"`, `"custom_generate"`, `"speculators"`, `"vllm"`, `"sglang"`; all that are installed
            by default.
        num_drafts (`int`, *optional*): Drafts per block; the drafter's own number by default.
        max_completion_length (`int`, *optional*):
            Tokens whose rounds are counted; 128 by default, or half of what the prompts leave of the target's
            positions.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code in the folder's `custom_generate/`.
        tolerance (`float`, *optional*, defaults to 0.01): Relative gap in tau that passes, with a note.
        engines ([`EngineSettings`], *optional*): How engines are started.
        revision (`str`, *optional*): Revision on the Hub.

    Returns:
        [`VerificationReport`]. Its `ok` is true if nothing is wrong; its `skipped` lists what was not looked at.

    Raises:
        ValueError: If the target is not in float32, a consumer is unknown, or there is no prompt.
        OSError: If there is no such folder or repository.
    """
    names = _check_request(target, prompts, consumers, max_completion_length, tolerance)
    folder = _find_folder(path, revision)
    layouts = _find_layouts(folder, target)
    report = VerificationReport(str(path), "", len(prompts), num_drafts=0, max_completion_length=0)
    # An adapter's name is none that engines could load.
    target_name = None if target.is_merged else target_name or target.causal_lm.config.name_or_path or None
    _check_rules(report, folder, layouts, target, target_name)
    try:
        drafter = load_drafter(folder, target)
    except ValueError as error:
        report.problems.append(f"The drafter cannot be loaded, so nothing was decoded: {error}")
        return report
    num_drafts = drafter.default_num_drafts if num_drafts is None else num_drafts
    max_completion_length = _fit_length(target, prompts, max_completion_length, num_drafts)
    scene = Scene(
        target=target,
        target_name=target_name,
        folder=folder,
        drafter=drafter,
        prompts=[list(prompt) for prompt in prompts],
        num_drafts=num_drafts,
        max_completion_length=max_completion_length,
        layouts=layouts,
        engines=engines or EngineSettings(),
        trust_remote_code=trust_remote_code,
    )
    report.family, report.num_drafts = drafter.config.family, num_drafts
    report.max_completion_length = max_completion_length
    texts, chains = decode_with_us(scene)
    reference = Reference(decode_plainly(scene), chains)
    report.add(compare(scene, reference, Outcome("reference", texts, chains, None, "our own loop"), tolerance))
    compare_with_training(scene, reference, checkpoint, tolerance, report)
    for name in CONSUMERS:
        reason = CONSUMERS[name].find_reason(scene) if name in names else "not asked for"
        if reason is None:
            _run_consumer(name, scene, reference, tolerance, report)
        else:
            report.skipped[name] = reason
    return report


def _check_request(
    target: FrozenTarget,
    prompts: Sequence,
    consumers: Sequence[str] | None,
    max_completion_length: int | None,
    tolerance: float,
) -> tuple[str, ...]:
    if not 0 <= tolerance < 1:
        raise ValueError(f"`tolerance` is a share of tau in [0, 1), got {tolerance}.")
    target.require_body("Verification")
    unknown = sorted(set(consumers or ()) - set(CONSUMERS))
    if unknown:
        raise ValueError(f"Unknown consumers {unknown}; there are {list(CONSUMERS)}.")
    if target.causal_lm.dtype != torch.float32:
        raise ValueError(
            f"The target is in {target.causal_lm.dtype}. Outputs are compared to the last token, so load it with "
            "`dtype=torch.float32`."
        )
    if not len(prompts) or (max_completion_length is not None and max_completion_length < 2):
        raise ValueError(
            f"Needs a prompt and at least 2 tokens, got {len(prompts)} prompts and {max_completion_length=}."
        )
    return tuple(CONSUMERS) if consumers is None else tuple(consumers)


def _fit_length(target: FrozenTarget, prompts: Sequence[Sequence[int]], given: int | None, num_drafts: int) -> int:
    """Return the number of tokens whose rounds are counted."""
    return fit_lengths(
        target.num_positions,
        prompt=max(map(len, prompts)),
        completion=given,
        # A block behind the last counted round, and the drafts that decoding it takes.
        num_drafts=2 * num_drafts + 1,
        defaults=VERIFICATION_LENGTHS,
    ).completion


def _find_folder(path: str | Path, revision: str | None) -> Path:
    if str(path) and Path(path).is_dir():
        return Path(path)
    require_model(str(path))
    patterns = [pattern for name in sorted(PUBLISHED_NAMES) for pattern in (name, f"{name}/*")]
    return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))


def _find_layouts(folder: Path, target: FrozenTarget) -> dict[str, Path]:
    """Return the folder of each layout; the one at the root first."""
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {CONFIG_FILE}. Give the folder of a published drafter.")
    raw = CheckpointSource(str(folder)).read_json(CONFIG_FILE)
    stated = None if raw.get("num_target_layers") else target.num_layers
    layouts = {parse_drafter_config(raw, num_target_layers=stated).layout: folder}
    for name in LAYOUTS[1:]:
        if (folder / name / CONFIG_FILE).is_file():
            layouts.setdefault(name, folder / name)
    return layouts


def _check_rules(
    report: VerificationReport, folder: Path, layouts: dict[str, Path], target: FrozenTarget, target_name: str | None
) -> None:
    """Check every layout of an export of ours by the rules of engines; other drafters keep rules of their own."""
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


def _run_consumer(name: str, scene: Scene, reference: Reference, tolerance: float, report: VerificationReport) -> None:
    """Have one consumer decode, and compare it with the reference."""
    try:
        outcome = CONSUMERS[name].run(scene, reference)
    except _REFUSALS as error:
        report.problems.append(f"{name} does not decode with this export: {type(error).__name__}: {error}")
        return
    is_engine = name in WORKERS
    reference = replace(reference, is_exact=not is_engine or scene.engines.dtype == "float32")
    verdict = compare(scene, reference, outcome, tolerance)
    report.add(verdict)
    if is_engine and verdict.row.num_different:
        report.notes.append(_tell_from_plain(name, scene, outcome))


def _tell_from_plain(name: str, scene: Scene, outcome: Outcome) -> str:
    """Decode plainly in an engine whose outputs differ: that tells its arithmetic from the drafter's doing."""
    try:
        plain = run_engine(name, scene, is_plain=True)
    except EngineFailure as error:
        return f"{name}: its plain decoding could not be compared: {error}"
    if plain.responses == outcome.responses:
        return f"{name}: its plain decoding writes the same outputs, so the difference is its own."
    return f"{name}: its plain decoding writes other outputs, so the difference is not its own."
