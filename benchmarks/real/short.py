# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The shortest honest version on a real model, what `make real` runs: a small EAGLE-3 drafter for SmolLM2-135M-Instruct,
Q4_1, by SFT and Draft-OPD; tau on questions that nobody trained on, and decoded speed against plain decoding.

The phases are the demo's, each kept until its settings change. Two things make it fit: every text is read by the
target once and remembered, and the drafter proposes a few thousand frequent tokens alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table

from benchmarks.lab.memo import RememberingTarget
from trl_draft_opd import AutoDrafter, EvaluationReport, FrozenTarget, evaluate_drafter, export_drafter, read_target
from trl_draft_opd.demo.results import require_matplotlib
from trl_draft_opd.demo.run import DemoSettings, Phases, respond, train_drafters, write_responses
from trl_draft_opd.evaluation import paired_gain
from trl_draft_opd.served_speed.comparison import Comparison
from trl_draft_opd.served_speed.report import LoadSettings, SpeedReport
from trl_draft_opd.served_speed.showing import comparison_table, level_table
from trl_draft_opd.utils.bars import library_bars

from .fetch import fetch_target
from .serve import measure_served


MEANING = """[bold]What the numbers mean[/bold]
- tau: tokens that one pass of the target yields, its own included: 1 would be plain decoding. \\[..] is the 95 %
  interval over questions: it tells how far tau may lie from that of endlessly many such questions.
- kept per slot: how often the target keeps the first draft of a block, the first two, and so on.
- speed: seconds of plain decoding over seconds with the drafter, one question at a time, in turns, in bfloat16, in our
  own loop of Python, on this machine; measured once. Below 1.00x the drafter costs more time than it saves. Fewer
  drafts per block can be faster: late ones are seldom kept, and each costs time.
- equal outputs: answers that are the target's own to the last token, in float32. The drafter never chooses the text;
  in bfloat16, rounding may: several tokens read at once add up in another order than one by one.

[bold]What not to conclude[/bold]
- Not that Draft-OPD beats SFT, or loses: it came on top of SFT and had more updates. docs/why/results.md compares them
  at equal compute, after SFT has stopped helping, and with several seeds. This is one seed, minutes after the start.
- Not the tau of a finished drafter: SFT was cut off while tau still rose.
- Not the speed of a server: engines spend less time around a model than this loop does, and many requests at once
  leave a drafter less to gain.
- Not anything about code, chat or other languages: all questions are grade-school mathematics (GSM8K).
- Not anything about the Hub's SmolLM2-135M-Instruct: these weights are its rounding to Q4_1, another model."""


@dataclass(frozen=True)
class ShortSettings:
    """
    How much is done; the defaults took 17 min 46 s on one of two CPU cores with AVX512-BF16, the other one busy.

    Attributes:
        num_prompts (`int`), num_test_prompts (`int`):
            Questions trained on, the first ones, and those that tau is measured on, the last ones.
        sft_epochs (`int`), opd_epochs (`int`), batch_size (`int`): Passes over the questions; questions per update.
        num_drafts (`int`): Drafts per block in training.
        draft_vocab_size (`int`): Tokens the drafter can propose.
        max_completion_length (`int`): Longest response.
        num_timed (`int`), timed_length (`int`): Of the test questions decoded live, and the tokens of each answer.
        timed_drafts (`tuple[int, ...]`): Drafts per block in these.
        memory_bytes (`int`): Readings of the target that are kept.
    """

    num_prompts: int = 640
    num_test_prompts: int = 100
    sft_epochs: int = 4
    opd_epochs: int = 1
    batch_size: int = 8
    num_drafts: int = 4
    draft_vocab_size: int = 4000
    max_completion_length: int = 128
    num_timed: int = 10
    timed_length: int = 96
    timed_drafts: tuple[int, ...] = (2, 4)
    memory_bytes: int = 2 * 10**9


def run_short(
    out: Path, shared: Path | None, settings: ShortSettings | None = None, vllm: str | None = None
) -> dict[str, Any]:
    """
    Run every phase that `out/short` does not hold yet, print table and explanation, draw the picture, and return what
    `results.json` holds.

    Args:
        out (`Path`): The target's folder lies or comes here.
        shared (`Path`, *optional*): Folder with `data/gsm8k_train.jsonl`; the Hub's GSM8K if there is none.
        settings ([`ShortSettings`], *optional*): How much is done.
        vllm (`str`, *optional*): Interpreter of an environment with vLLM, which then serves the drafter, too.
    """
    require_matplotlib()
    settings, console = settings or ShortSettings(), Console()
    phases, folder = Phases(out / "short", console), fetch_target(out)
    demo = DemoSettings(
        output=out / "short",
        family="eagle3",
        target=str(folder),
        dataset="gsm8k",
        num_prompts=settings.num_prompts,
        num_test_prompts=settings.num_test_prompts,
        max_completion_length=settings.max_completion_length,
        num_drafts=settings.num_drafts,
        sft_epochs=settings.sft_epochs,
        opd_epochs=settings.opd_epochs,
        batch_size=settings.batch_size,
        sft_learning_rate=2e-3,
        opd_learning_rate=3e-4,
    )
    with library_bars(False):
        device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
        target = RememberingTarget.load(folder, dtype=torch.bfloat16)
        target.place(device)
        target.budget_bytes = settings.memory_bytes
        rows, prompts = write_responses(phases, demo, target, gsm8k(shared))
        responses = _write_held_out(phases, demo, target, prompts)
        sft = {"bf16": True, "draft_vocab_size": settings.draft_vocab_size, "num_anchors": 64, "warmup_steps": 10}
        opd = {"bf16": True, "rejected_scope": "first"}
        # In so few updates, Muon comes much farther than AdamW alone.
        sft, opd = sft | {"muon_learning_rate": 2e-2}, opd | {"muon_learning_rate": 3e-3}
        folders = train_drafters(phases, demo, target, rows, sft=sft, opd=opd)
        drafters = [AutoDrafter.from_pretrained(each).eval().to(device) for each in folders]
        with phases.timed("5/5 measuring"):
            taus = [_replay(target, drafter, prompts, responses) for drafter in drafters]
            few, last = prompts[: settings.num_timed], drafters[-1]
            length = settings.timed_length
            live = {num_drafts: _decode(target, last, few, num_drafts, length) for num_drafts in settings.timed_drafts}
            exact = FrozenTarget.load(folder, dtype=torch.float32)
            exact.place(device)
            same = _decode(exact, last, few, settings.num_drafts, length)
        served = None
        if vllm is not None:
            # With as many drafts as were fastest here.
            best = max(live, key=lambda num_drafts: live[num_drafts].speedup)
            load = LoadSettings(concurrency=(1, 4), max_completion_length=length)
            served = _serve(vllm, target, last, best, few, load, out / "short")
    gain = paired_gain(*taus)
    results = {
        "sft": taus[0].to_dict(),
        "opd": taus[1].to_dict(),
        "gain": dict(zip(("tau", "low", "high"), gain, strict=True)),
        "live": {str(num_drafts): report.to_dict() for num_drafts, report in live.items()},
        "live_float32": same.to_dict(),
        "served": None if served is None else [each.to_dict() for each in served],
        "seconds": phases.seconds,
        "threads": torch.get_num_threads(),
    }
    numbers, picture = out / "short" / "results.json", out / "short" / "short.png"
    numbers.write_text(json.dumps(results, indent=2), encoding="utf-8")
    draw_short(taus, live, picture)
    console.print(short_table(taus, gain, live, same))
    if served is not None:
        report, baseline, comparison = served
        console.print(level_table(report, "vLLM with the drafter"), level_table(baseline, "vLLM without it"))
        console.print(comparison_table(comparison, "vLLM with the drafter against vLLM without it"))
    console.print(MEANING, soft_wrap=True)
    console.print(f"\nPicture: {picture}   numbers: {numbers}   drafter: {folders[1]}", soft_wrap=True)
    return results


def gsm8k(shared: Path | None) -> Dataset:
    """Return GSM8K's training questions as prompts, from `shared` or the Hub."""
    if shared is None:
        rows = load_dataset("openai/gsm8k", "main", split="train")
    else:
        rows = Dataset.from_json(str(shared / "data" / "gsm8k_train.jsonl"))
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in rows["question"]])


def _write_held_out(
    phases: Phases, demo: DemoSettings, target: FrozenTarget, prompts: list[list[int]]
) -> list[list[int]]:
    """Return the target's responses to the test prompts, along which tau is measured."""

    def make(folder: Path) -> None:
        responses = respond(demo, target, prompts)
        (folder / "rows.json").write_text(json.dumps(responses), encoding="utf-8")

    folder = phases.run("2/5 responses to test questions", "held-out", {}, make)
    return json.loads((folder / "rows.json").read_text(encoding="utf-8"))


def _replay(target: FrozenTarget, drafter: Any, prompts: list[list[int]], responses: list[list[int]]):
    """Measure tau along the target's responses: at temperature 0 these are the blocks of live decoding."""
    return evaluate_drafter(target, drafter, prompts, responses=responses, batch_size=16, show_progress=False)


def _decode(target: FrozenTarget, drafter: Any, prompts: list[list[int]], num_drafts: int, length: int):
    """Decode one prompt at a time, with the drafter and plainly, in turns."""
    return evaluate_drafter(
        target,
        drafter,
        prompts,
        num_drafts=num_drafts,
        max_completion_length=length,
        batch_size=1,
        show_progress=False,
    )


def _serve(
    python: str,
    target: FrozenTarget,
    drafter: Any,
    num_drafts: int,
    prompts: list[list[int]],
    load: LoadSettings,
    folder: Path,
) -> tuple[SpeedReport, SpeedReport, Comparison]:
    """Have vLLM serve the drafter, and the target alone."""
    export_drafter(drafter, folder / "export", to="flat", target=read_target(target.config.name_or_path))
    config = {"method": "eagle3", "model": str((folder / "export").resolve()), "num_speculative_tokens": num_drafts}
    return measure_served(python, target, config, prompts, load, folder)


def short_table(
    taus: list[EvaluationReport],
    gain: tuple[float, float, float],
    live: dict[int, EvaluationReport],
    same: EvaluationReport,
) -> Table:
    """Return what was measured, to print with `rich`."""
    title = (
        f"EAGLE-3 for SmolLM2-135M-Instruct, Q4_1\n{taus[0].num_prompts} questions nobody trained on, temperature 0"
    )
    table = Table("", "alone", "SFT drafter", "after Draft-OPD", title=title)
    slots = (" ".join(f"{100 * rate:.0f}" for rate in each.acceptance_per_slot) for each in taus)
    table.add_row("tau", "1", *(f"{each.tau:.2f} [{each.tau_low:.2f}, {each.tau_high:.2f}]" for each in taus))
    table.add_row("gain in tau", "", "", "{:+.1%} [{:+.1%}, {:+.1%}]".format(*gain))
    table.add_row("kept per slot", "", *(f"{rates} %" for rates in slots))
    for num_drafts, report in live.items():
        table.add_row(f"speed, {num_drafts} drafts", "1.00x", "", f"{report.speedup:.2f}x")
    equal = same.num_prompts - len(same.different_prompts)
    table.add_row("equal outputs", "", "", f"{equal} of {same.num_prompts}")
    return table


def draw_short(taus: list[EvaluationReport], live: dict[int, EvaluationReport], path: Path) -> None:
    """Save tau with its interval, and speed against plain decoding, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    tau_axis, speed_axis = figure.subplots(1, 2)
    for index, (report, colour) in enumerate(zip(taus, ("tab:gray", "tab:green"), strict=True)):
        error = [[report.tau - report.tau_low], [report.tau_high - report.tau]]
        tau_axis.bar(index, report.tau, yerr=error, capsize=5, color=colour, width=0.6)
    tau_axis.set(ylabel="tau (tokens per target pass)", xticks=[0, 1], xticklabels=["SFT", "after Draft-OPD"])
    names = ["plain decoding", *(f"{num_drafts} drafts" for num_drafts in live)]
    speed_axis.bar(names, [1.0, *(report.speedup for report in live.values())], color="tab:green", width=0.6)
    speed_axis.patches[0].set_color("tab:gray")
    speed_axis.set(ylabel="speed, one question at a time")
    for axis in (tau_axis, speed_axis):
        # What plain decoding has.
        axis.axhline(1, color="black", linestyle=":", linewidth=1)
    figure.suptitle("EAGLE-3 for SmolLM2-135M-Instruct, Q4_1")
    figure.savefig(path, dpi=150)
