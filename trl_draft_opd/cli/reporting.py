# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The command `report`, and the flags of `evaluate` that write the same page with what was just measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..drafters.auto import DRAFTER_CLASSES
from ..drafters.base import Drafter
from ..drafters.portable_config import PortableConfig
from ..drafters.published.checkpoint import CONFIG_FILE, CheckpointSource, read_drafter_config
from ..evaluation import EvaluationReport, paired_gain
from ..export.record import TrainingRecord, read_record
from ..reports.completions import Completion, CompletionCollector
from ..reports.content import drafter_page, estimate_break_even, folder_title
from ..reports.figures import check_drawing
from ..reports.page import write_page
from ..reports.preferences import read_preferences
from ..target.frozen import FrozenTarget
from ..utils.settings import check_at_least
from .arguments import flag, parse


# Keys under which the file of `--json` keeps whose prompts were measured, and the gain, beside the report itself.
PROMPTS_KEY, GAIN_KEY = "prompts_sha256", "gain_in_tau"
# What changes tau beside the drafter: taus of other settings are not compared.
_COMPARED = ("num_drafts", "temperature", "draft_sampling", "max_completion_length", "ignore_eos", "min_confidence")


def check_page(path: str, name: str) -> None:
    """Raise where no page could be drawn, or written to the path of the flag `name`."""
    check_drawing()
    place = Path(path)
    if place.is_dir() or not place.parent.is_dir():
        what = "is a folder" if place.is_dir() else f"is in no folder: there is none at {str(place.parent)!r}"
        raise ValueError(f"`{name}` must be a file to write, such as report.html; {path!r} {what}.")


def read_evaluation(path: str, name: str) -> tuple[EvaluationReport, str | None]:
    """Return what `evaluate --json` wrote, and the hash of its prompts; `name` is the flag that named the file."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"`{name}` must be a file of `evaluate --json`; {path!r}: {error.strerror}.") from error
    except ValueError as error:  # of the encoding, too
        raise ValueError(f"`{name}` must be a file of `evaluate --json`; {path!r} is no JSON: {error}.") from error
    known = {known.name for known in fields(EvaluationReport)}
    if not isinstance(content, dict) or set(content) - {PROMPTS_KEY, GAIN_KEY} != known:
        raise ValueError(
            f"`{name}` must be a file that `evaluate --json` of this version wrote; the keys of {path!r} are others. "
            "Measure again."
        )
    digest = content.pop(PROMPTS_KEY, None)
    content.pop(GAIN_KEY, None)
    return EvaluationReport(**content), digest


def measure_gain(before: EvaluationReport | None, after: EvaluationReport) -> dict[str, dict[str, float]]:
    """Print the gain in tau over an earlier evaluation, and return it for `--json`; nothing if there is none."""
    if before is None:
        return {}
    gain, low, high = paired_gain(before, after)
    print(f"Gain in tau: {gain:+.1%} [{low:+.1%}, {high:+.1%}], paired over the same prompts.")
    return {GAIN_KEY: {"gain": gain, "low": low, "high": high}}


def check_same(
    before: EvaluationReport,
    digest: str | None,
    *,
    num_prompts: int,
    prompts_sha256: str | None,
    conditions: Mapping[str, Any],
) -> None:
    """Raise `ValueError` unless an earlier evaluation was made under `conditions`, of `_COMPARED` by their names."""
    compared = [("number of prompts", before.num_prompts, num_prompts)]
    compared += [(f"`{name}`", getattr(before, name), conditions[name]) for name in _COMPARED]
    found = [f"{what}: {earlier}, now {now}" for what, earlier, now in compared if earlier != now]
    if not found and digest != prompts_sha256:
        found = ["prompts, though as many, or the same through another chat template"]
    if found:
        raise ValueError(
            f"The earlier evaluation has other {'; '.join(found)}. Measure both on the same prompts and settings."
        )


def config_of(folder: str, record: TrainingRecord) -> PortableConfig | None:
    """Return the config of the drafter in a folder with a record; `None` of a LoRA adapter, which has none."""
    source = CheckpointSource(folder)
    if source.find(CONFIG_FILE) is None:
        return None
    parsed = read_drafter_config(source, num_target_layers=record.target.num_layers)
    return DRAFTER_CLASSES[parsed.family].config_class(**parsed.arguments)


@dataclass(kw_only=True)
class ReportArguments:
    """Flags of `evaluate` about a page of what it measured."""

    _argument_group_name = "report"

    report: str | None = flag(
        "HTML file to write: what was measured, the training curves of the drafter's record, and responses, coloured.",
        default=None,
    )
    before: str | None = flag(
        "File that `--json` wrote of an earlier drafter on the same prompts: the gain in tau over it is printed, and "
        "kept in the file of this `--json`; a report shows both.",
        default=None,
    )
    report_text: int = flag(
        "Responses whose text the report holds; 0 keeps all text out of it, and no prompt is ever in it.", default=4
    )

    def check_report(self) -> tuple[EvaluationReport, str | None] | None:
        """Refuse what could not be written, before anything is measured; return the earlier evaluation."""
        check_at_least(self, 0, "report_text")
        if self.report is not None:
            check_page(self.report, "--report")
        return None if self.before is None else read_evaluation(self.before, "--before")

    def collector(self, target: FrozenTarget, drafter: Drafter) -> CompletionCollector | None:
        """Return what keeps responses for the report, if any are wanted."""
        if self.report is None or self.report_text == 0 or target.tokenizer is None:
            return None
        return CompletionCollector(target.tokenizer, self.report_text, partial(read_preferences, target, drafter))

    def write_report(
        self,
        names: tuple[str, str],
        config: PortableConfig,
        num_target_parameters: int,
        evaluation: EvaluationReport,
        before: EvaluationReport | None,
        completions: Sequence[Completion],
    ) -> None:
        """Write the page of the drafter and the target of these names, if one was asked for."""
        if self.report is None:
            return
        record = read_record(names[0])
        estimate = estimate_break_even(config, num_target_parameters, record, evaluation)
        write_page(drafter_page(folder_title(*names), record, evaluation, before, completions, estimate), self.report)
        held = f"; it holds the text of {len(completions)} responses (`--report-text 0` leaves it out)"
        print(f"Report: {self.report}{held if completions else ''}.")


@dataclass(kw_only=True)
class PageArguments:
    """Flags of `report`."""

    _argument_group_name = "report"

    drafter: str = flag("Folder of a run, a checkpoint or an export, with its training record.")
    output: str = flag("HTML file to write.")
    evaluation: str | None = flag("File that `evaluate --json` wrote of this drafter, to show too.", default=None)
    before: str | None = flag(
        "File that `evaluate --json` wrote of an earlier drafter on the same prompts, to show beside it.", default=None
    )


def run_report(argv: Sequence[str]) -> int:
    """Write the page of a training run; see [`drafter_page`]. Loads no model, and holds no text."""
    (args,) = parse("report", [PageArguments], argv)
    check_page(args.output, "--output")
    record = read_record(args.drafter)
    if record is None:
        raise ValueError(
            f"There is no training record in {args.drafter!r}. Name the `output_dir` of a run, a checkpoint of it, or "
            "an export."
        )
    if args.before is not None and args.evaluation is None:
        raise ValueError("`--before` is compared with `--evaluation`. Name that file too.")
    evaluation = before = None
    if args.evaluation is not None:
        evaluation, digest = read_evaluation(args.evaluation, "--evaluation")
        if args.before is not None:
            before, earlier = read_evaluation(args.before, "--before")
            check_same(
                before,
                earlier,
                num_prompts=evaluation.num_prompts,
                prompts_sha256=digest,
                conditions=vars(evaluation),
            )
    config, estimate = config_of(args.drafter, record), None
    if config is not None and record.target.num_parameters:
        estimate = estimate_break_even(config, record.target.num_parameters, record, evaluation)
    title = folder_title(args.drafter, record.target.name)
    write_page(drafter_page(title, record, evaluation, before, estimate=estimate), args.output)
    print(f"Report: {args.output}; it holds no text of prompts or responses.")
    return 0
