# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Measure again the one fully public row of the Draft-OPD paper: Qwen3-4B without thinking, DFlash 6.04 -> Draft-OPD
6.60.

    python -m benchmarks.lab.paper_table --output FOLDER     # one GPU and access to the Hub; the same command resumes
    python -m benchmarks.lab.paper_table --dry-run           # the same path on random models, without network

Knows the table and how to fill it; `docs/why/paper_table.md` says how it differs from the paper's. Trains nothing.
"""

import argparse
import hashlib
import json
import string
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, DatasetDict

from trl_draft_opd import AutoDrafter, DFlashDraftModel, FrozenTarget
from trl_draft_opd.cli.rows import load_rows
from trl_draft_opd.demo.corpus import write_chats
from trl_draft_opd.demo.tiny_target import make_target, train_tokenizer
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.evaluation import evaluate_drafter
from trl_draft_opd.responses import generate_responses
from trl_draft_opd.rollout.acceptance import SamplingSettings
from trl_draft_opd.trainer.pair import check_pair

from .plan import FOLDER, build
from .statistics import NUM_RESAMPLES, ArmCounts, Estimate, arm_counts, paired_gain, resampled_taus, tau_interval
from .tables import percent


SIDES = ("before", "after")
DRY_RUN = "DRY RUN: a random target, random drafters and synthetic prompts. These numbers mean nothing."


@dataclass(frozen=True)
class Task:
    """
    One task set of the row.

    Attributes:
        dataset (`str`), config (`str`, *optional*), split (`str`): Where the rows are, on the Hub or on disk.
        num_prompts (`int`): Rows taken, those that shuffling with seed 0 puts first.
        prompt (`str`, *optional*): Template of the user's message over the columns of a row.
        turns (`str`, *optional*):
            Column with the user's turns of a dialogue, in place of `prompt`; every turn is a prompt.
        paper_speed (`list[float]`): The paper's speed against plain decoding, before and after.
        checked (`bool`): Whether the dataset was found under this id.
    """

    dataset: str
    split: str
    num_prompts: int
    paper_speed: list[float]
    checked: bool
    config: str | None = None
    prompt: str | None = None
    turns: str | None = None

    def __post_init__(self):
        if (self.prompt is None) == (self.turns is None):
            raise ValueError(f"A task needs either `prompt` or `turns`, got {self.prompt!r} and {self.turns!r}.")


@dataclass(frozen=True)
class Row:
    """What is measured: the fields of `paper_table.yaml`, whose comments say what they are."""

    target: str
    before: str
    after: str
    dtype: str
    chat_template_kwargs: dict[str, Any]
    temperature: float
    max_completion_length: int
    batch_size: int
    compare_with_target: bool
    paper_tau: list[float]
    tasks: dict[str, Task]

    @property
    def sampling(self) -> SamplingSettings:
        """Distribution of the target's text."""
        return SamplingSettings(temperature=self.temperature, top_k=0, top_p=1.0)

    def prompt_settings(self, task: Task) -> dict[str, Any]:
        """Return what the prompts of a task depend on: a later turn holds the target's own answers."""
        names = ("target", "dtype", "chat_template_kwargs")
        of_answers = ("temperature", "max_completion_length", "batch_size") if task.turns is not None else ()
        source = {
            name: getattr(task, name) for name in ("dataset", "config", "split", "num_prompts", "prompt", "turns")
        }
        return {name: getattr(self, name) for name in (*names, *of_answers)} | source

    def settings(self, side: str, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return what a measurement depends on."""
        names = ("target", "dtype", "temperature", "max_completion_length", "batch_size", "compare_with_target")
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        return {name: getattr(self, name) for name in names} | {"drafter": getattr(self, side), "prompts": digest}


class Models:
    """The target and the two drafters, each loaded when it is first asked for: a finished table loads none."""

    def __init__(self, row: Row):
        self.row = row
        self._target: FrozenTarget | None = None
        self._drafters: dict[str, Drafter] = {}

    def target(self) -> FrozenTarget:
        """Return the target, on the accelerator if there is one."""
        if self._target is None:
            self._target = FrozenTarget.load(self.row.target, dtype=self.row.dtype)
            if torch.accelerator.is_available():
                self._target.place(torch.accelerator.current_accelerator())
        return self._target

    def drafter(self, side: str) -> Drafter:
        """Return the drafter before or after Draft-OPD."""
        if side not in self._drafters:
            target = self.target()
            drafter = AutoDrafter.from_pretrained(
                getattr(self.row, side), dtype=getattr(torch, self.row.dtype), num_target_layers=target.num_layers
            )
            check_pair(drafter, target)
            self._drafters[side] = drafter.eval().to(target.device)
        return self._drafters[side]


def read_row(path: Path) -> Row:
    """
    Read what to measure.

    Raises:
        ValueError: If the file has unknown or missing keys.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    tasks = {name: build(Task, task, f"{path.name}, task {name!r}") for name, task in raw.get("tasks", {}).items()}
    return build(Row, raw | {"tasks": tasks}, path.name)


def load_prompts(models: Models, task: Task, path: Path) -> list[list[int]]:
    """Return the token ids of a task's prompts, written once so that both drafters read the same."""
    settings = models.row.prompt_settings(task)
    known = _read_kept(path, settings)
    if known is None:
        known = {"settings": settings, "prompts": _write_prompts(models, task)}
        _write(path, known)
    return known["prompts"]


def _write_prompts(models: Models, task: Task) -> list[list[int]]:
    rows = load_rows(task.dataset, task.config, task.split)
    rows = rows.shuffle(seed=0).select(range(min(task.num_prompts, len(rows))))
    target, row = models.target(), models.row
    turns = [[task.prompt.format(**r)] if task.turns is None else list(r[task.turns]) for r in rows]
    dialogues: list[list[dict[str, str]]] = [[] for _ in turns]
    prompts: list[list[int]] = []
    for number in range(max(len(of_row) for of_row in turns)):
        alive = [index for index, of_row in enumerate(turns) if number < len(of_row)]
        for index in alive:
            dialogues[index].append({"role": "user", "content": turns[index][number]})
        ids = _tokenize(target, [dialogues[index] for index in alive], row.chat_template_kwargs)
        prompts += ids
        going_on = [place for place, index in enumerate(alive) if number + 1 < len(turns[index])]
        if not going_on:
            continue
        answers = generate_responses(
            target,
            [ids[place] for place in going_on],
            max_completion_length=row.max_completion_length,
            sampling=row.sampling,
            batch_size=row.batch_size,
            seed=0,
            show_progress=sys.stdout.isatty(),
        )
        for place, answer in zip(going_on, answers, strict=True):
            text = target.tokenizer.decode(answer, skip_special_tokens=True)
            dialogues[alive[place]].append({"role": "assistant", "content": text})
    return prompts


def _tokenize(target: FrozenTarget, dialogues: list[list[dict]], template_kwargs: dict[str, Any]) -> list[list[int]]:
    rows = Dataset.from_list([{"prompt": dialogue} for dialogue in dialogues])
    ids = target.text_reader(chat_template_kwargs=template_kwargs).read_prompts(rows)["prompt_ids"][:]
    if len(ids) != len(dialogues):
        raise ValueError(
            f"Only {len(ids)} of {len(dialogues)} prompts could be rendered by the target's chat template."
        )
    return ids


def measure(models: Models, side: str, prompts: list[list[int]], path: Path) -> dict[str, Any]:
    """Return one drafter's report on one task, from its file if it was measured before."""
    settings = models.row.settings(side, prompts)
    known = _read_kept(path, settings)
    if known is None:
        report = evaluate_drafter(
            models.target(),
            models.drafter(side),
            prompts,
            max_completion_length=models.row.max_completion_length,
            sampling=models.row.sampling,
            batch_size=models.row.batch_size,
            compare_with_target=models.row.compare_with_target,
            show_progress=sys.stdout.isatty(),
        )
        known = {"settings": settings, "report": report.to_dict()}
        _write(path, known)
    return known["report"]


def _read_kept(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    changed = {name for name in kept["settings"] | settings if kept["settings"].get(name) != settings.get(name)}
    if changed:
        raise ValueError(f"{path} was made with other {sorted(changed)}. Give another --output, or delete the file.")
    return kept


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that is stopped while it writes leaves no half file behind.
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(values), encoding="utf-8")
    draft.replace(path)


def counts_of(report: dict[str, Any]) -> ArmCounts:
    """Return a report's counts as those of an arm with one seed."""
    rounds = report["block_counts"]
    accepted = [total - blocks for total, blocks in zip(report["accepted_sums"], rounds, strict=True)]
    return arm_counts({0: {"rounds": rounds, "accepted": accepted}})


def mean_of_prompts(report: dict[str, Any]) -> float:
    """Return tau averaged over prompts, as the paper's script does, in place of pooled."""
    pairs = zip(report["accepted_sums"], report["block_counts"], strict=True)
    return float(np.mean([total / blocks for total, blocks in pairs if blocks]))


def gain_of_means(pairs: Sequence[tuple[ArmCounts, ArmCounts]], *, num_resamples: int = NUM_RESAMPLES) -> Estimate:
    """
    Return the gain in the mean tau over tasks with its 95 % interval, resampling the prompts of every task.

    Args:
        pairs (`Sequence[tuple[ArmCounts, ArmCounts]]`): Before and after, task by task.
        num_resamples (`int`, *optional*, defaults to 10,000): Resamples.
    """
    # Another seed for every task: its prompts have nothing to do with another's.
    taus = [resampled_taus(pair, num_resamples=num_resamples, seed=seed) for seed, pair in enumerate(pairs)]
    before_R, after_R = (np.mean([task[side] for task in taus], axis=0) for side in (0, 1))
    gains_R = after_R / before_R - 1
    low, high = np.quantile(gains_R[np.isfinite(gains_R)], [0.025, 0.975]).tolist()
    before, after = (np.mean([pair[side].tau for pair in pairs]) for side in (0, 1))
    return Estimate(float(after / before - 1), low, high)


def render(row: Row, reports: dict[str, dict[str, dict[str, Any]]], is_dry_run: bool) -> str:
    """
    Return the table as Markdown.

    Args:
        row ([`Row`]): What was measured.
        reports (`dict`): Reports by task and side; a task counts when both sides are there.
        is_dry_run (`bool`): Whether to say that the numbers mean nothing.
    """
    lines = [
        f"## {row.target}, temperature {row.temperature:g}, {row.chat_template_kwargs}, at most "
        f"{row.max_completion_length} tokens",
        *([f"**{DRY_RUN}**"] if is_dry_run else []),
        f"before: `{row.before}`, after: `{row.after}`. tau is pooled, [..] a 95 % interval over prompts, gains are "
        "paired; in brackets tau averaged over prompts, as the paper's script has it.",
        "",
    ]
    table = [
        "| task | prompts | tau before | tau after | gain in tau | paper's speed before, after | paper's gain in "
        "speed |",
        "|---|---|---|---|---|---|---|",
    ]
    pairs = []
    for name, sides in reports.items():
        task = row.tasks[name]
        pair = tuple(counts_of(sides[side]) for side in SIDES)
        pairs.append(pair)
        taus = [
            f"{_interval(tau_interval(c))} ({mean_of_prompts(sides[s]):.2f})" for s, c in zip(SIDES, pair, strict=True)
        ]
        slow, fast = task.paper_speed
        cells = [name, str(pair[0].num_prompts), *taus, percent(paired_gain(*pair))]
        table.append(f"| {' | '.join([*cells, f'{slow:.2f}x, {fast:.2f}x', f'{100 * (fast / slow - 1):+.1f} %'])} |")
    means = [float(np.mean([pair[side].tau for pair in pairs])) for side in (0, 1)]
    by_prompt = [float(np.mean([mean_of_prompts(r[side]) for r in reports.values()])) for side in SIDES]
    speeds = [float(np.mean([row.tasks[name].paper_speed[side] for name in reports])) for side in (0, 1)]
    cells = [f"mean of {len(pairs)}", str(sum(pair[0].num_prompts for pair in pairs))]
    cells += [f"{mean:.2f} ({other:.2f})" for mean, other in zip(means, by_prompt, strict=True)]
    cells += [
        percent(gain_of_means(pairs)),
        "{:.2f}x, {:.2f}x".format(*speeds),
        f"{100 * (speeds[1] / speeds[0] - 1):+.1f} %",
    ]
    table.append(f"| {' | '.join(cells)} |")
    before, after = row.paper_tau
    lines += [
        *table,
        "",
        f"The paper's mean tau of this row: {before:.2f} -> {after:.2f}, {100 * (after / before - 1):+.1f} %.",
    ]
    left_out = [name for name in row.tasks if name not in reports]
    if left_out:
        lines.append(
            f"Not measured: {', '.join(left_out)}; the mean is not the paper's mean of {len(row.tasks)} tasks."
        )
    return "\n".join(lines) + "\n"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def dry_run_row(row: Row, folder: Path) -> Row:
    """
    Return the same row over a tiny random target, two random drafters and synthetic rows, built in `folder` once.

    Everything else is left as it is, templates and columns of the tasks included.
    """
    target, drafters = folder / "target", {side: folder / side for side in SIDES}
    chats = write_chats(64, seed=0)
    tasks = {}
    for name, task in row.tasks.items():
        path = folder / "datasets" / name
        if not path.exists():
            questions = [chat[0]["content"] for chat in chats[:4]]
            DatasetDict({task.split: Dataset.from_list(_synthetic_rows(task, questions))}).save_to_disk(path)
        tasks[name] = replace(task, dataset=str(path), config=None, num_prompts=2)
    if not drafters["after"].exists():
        torch.manual_seed(0)
        tokenizer = train_tokenizer(chats, vocab_size=320)
        model = make_target(tokenizer, hidden_size=32)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        frozen = FrozenTarget(model, tokenizer)
        for side in SIDES:
            drafter = DFlashDraftModel.from_target(
                frozen, mask_token_id=frozen.find_mask_token_id(), num_hidden_layers=1, block_size=4
            )
            drafter.save_pretrained(drafters[side])
    places = {"target": str(target)} | {side: str(path) for side, path in drafters.items()}
    return replace(row, **places, tasks=tasks, max_completion_length=12)


def _synthetic_rows(task: Task, questions: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows with the columns a task reads."""
    if task.turns is not None:
        return [{task.turns: [question, "And then?"]} for question in questions]
    columns = [name for _, name, _, _ in string.Formatter().parse(task.prompt) if name]
    return [dict.fromkeys(columns, question) for question in questions]


def run(row: Row, output: Path, is_dry_run: bool) -> str:
    """Fill the table, task by task, and return it; what was measured before is read from `output`."""
    models = Models(row)
    reports: dict[str, dict[str, dict[str, Any]]] = {}
    for name, task in row.tasks.items():
        prompts = load_prompts(models, task, output / "prompts" / f"{name}.json")
        reports[name] = {side: measure(models, side, prompts, output / side / f"{name}.json") for side in SIDES}
        taus = " -> ".join(f"{reports[name][side]['tau']:.2f}" for side in SIDES)
        print(f"{name}: {len(prompts)} prompts, tau {taus}", flush=True)
    table = render(row, reports, is_dry_run)
    (output / "table.md").write_text(table, encoding="utf-8")
    _write(output / "row.json", asdict(row) | {"is_dry_run": is_dry_run})
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, fill the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=FOLDER / "paper_table.yaml", help="what to measure")
    parser.add_argument("--output", type=Path, help="folder for reports and table; needed but for a dry run")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="at most so many rows of each task")
    parser.add_argument("--dry-run", action="store_true", help="tiny random models and synthetic prompts, no network")
    args = parser.parse_args(argv)
    if args.output is None and not args.dry_run:
        parser.error("--output is needed: the folder that the same command resumes from")
    row = read_row(args.config)
    unknown = sorted(set(args.tasks or []) - set(row.tasks))
    if unknown:
        parser.error(f"unknown tasks {unknown}; there are {sorted(row.tasks)}")
    tasks = {name: task for name, task in row.tasks.items() if args.tasks is None or name in args.tasks}
    if args.num_prompts is not None:
        tasks = {
            name: replace(task, num_prompts=min(task.num_prompts, args.num_prompts)) for name, task in tasks.items()
        }
    row = replace(row, tasks=tasks)
    if not args.dry_run:
        print(run(row, args.output, is_dry_run=False))
        return
    print(DRY_RUN)
    with tempfile.TemporaryDirectory(prefix="paper-table-dry-run-") as scratch:
        output = args.output or Path(scratch)
        print(run(dry_run_row(row, output), output, is_dry_run=True))


if __name__ == "__main__":
    main(sys.argv[1:])
