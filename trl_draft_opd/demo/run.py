# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Runs the demo: a target, its responses, a drafter by SFT, the same drafter after Draft-OPD, and both measured. Each
phase leaves a folder with the settings it was made from, and is not repeated while they stay the same.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback, TrainerState, set_seed

from ..drafters.auto import DRAFTER_CLASSES, AutoDrafter
from ..drafters.base import Drafter
from ..evaluation import EvaluationReport, evaluate_drafter, paired_gain
from ..responses import generate_responses
from ..rollout.acceptance import SamplingSettings
from ..target.frozen import FrozenTarget
from ..target.lengths import TRAINING_LENGTHS, fit_lengths
from ..trainer.draft_opd_config import DraftOPDConfig
from ..trainer.draft_opd_trainer import DraftOPDTrainer
from ..trainer.draft_sft_config import DraftSFTConfig
from ..trainer.draft_sft_trainer import DraftSFTTrainer
from ..trainer.log_printer import LogPrinter
from ..utils.atomic_files import writing_files
from ..utils.bars import library_bars
from ..utils.settings import check_settings
from .corpus import write_chats
from .results import draw_plot, require_matplotlib, results_table
from .tiny_target import TinyTargetSettings, train_target


FAMILIES = sorted(DRAFTER_CLASSES)
# Leaves room for a response in the tiny target's 1,024 positions; its own prompts are far shorter.
MAX_PROMPT_LENGTH = 512


@dataclass(frozen=True)
class DemoSettings:
    """
    What the demo does; the defaults fit two CPU cores and a few minutes.

    Attributes:
        target (`str` or `None`): Hub id or path of a real target; by default a tiny one is trained first.
        dataset (`str` or `None`): Name of the real target's prompts, for the record.
        num_test_prompts (`int`): Prompts to measure on, `test_batch_size` at a time.
        sft_learning_rate, opd_learning_rate (`float`): Higher than the library's defaults: the drafter is tiny.
    """

    output: Path = Path("outputs/demo")
    family: str = "dflash"
    target: str | None = None
    dataset: str | None = None
    num_prompts: int = 960
    num_test_prompts: int = 98
    test_batch_size: int = 14
    max_completion_length: int = 128
    num_drafts: int = 7
    sft_epochs: int = 8
    opd_epochs: int = 1
    batch_size: int = 16
    sft_learning_rate: float = 4e-3
    opd_learning_rate: float = 1e-3
    tiny: TinyTargetSettings = field(default_factory=TinyTargetSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.family not in FAMILIES:
            raise ValueError(f"`family` must be one of {FAMILIES}, got {self.family!r}.")
        for name, value in vars(self).items():
            if isinstance(value, int) and name != "seed" and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    def pick(self, names: str) -> dict[str, Any]:
        """Return the settings with these names, which are separated by spaces."""
        return {name: getattr(self, name) for name in names.split()}


def run_demo(settings: DemoSettings, rows: Dataset | None) -> dict:
    """
    Run every phase that the output folder does not hold yet, print the table, draw the plot, and return what
    `results.json` holds. `rows` are the prompts for a real target.
    """
    require_matplotlib()
    if (settings.target is None) != (rows is None):
        raise ValueError("A real target and its prompts go together: give `target` and `rows`, or neither.")
    console = Console()
    with library_bars(False):
        phases = Phases(settings.output, console)
        if settings.target is None or rows is None:
            target_path, rows = _make_tiny_target(phases, settings)
            target = FrozenTarget.load(target_path, dtype=torch.float32)
        else:
            target = FrozenTarget.load(settings.target)
        accelerator = torch.accelerator.current_accelerator(True)
        if accelerator is not None:
            target.place(accelerator)
        train_rows, test_prompts = write_responses(phases, settings, target, rows)
        drafters = train_drafters(phases, settings, target, train_rows)
        before, after = (_measure(phases, settings, target, folder, test_prompts) for folder in drafters)
    gain = paired_gain(before, after)
    results = {
        "sft": before.to_dict(),
        "opd": after.to_dict(),
        "gain": dict(zip(("tau", "low", "high"), gain, strict=True)),
        "settings": asdict(settings) | {"output": str(settings.output)},
        "seconds": phases.seconds,
    }
    plot, numbers = settings.output / "demo.png", settings.output / "results.json"
    numbers.write_text(json.dumps(results, indent=2), encoding="utf-8")
    draw_plot(before, after, plot)
    console.print(results_table(before, after, gain, DRAFTER_CLASSES[settings.family].config_class.title))
    console.print(f"Plot: {plot}   numbers: {numbers}   drafter: {drafters[1]}", soft_wrap=True)
    return results


class Phases:
    """Runs phases one after another, each in a folder of its own, and skips those whose folder is up to date."""

    def __init__(self, output: Path, console: Console):
        self.output = output
        self.console = console
        self.seconds: dict[str, float] = {}
        self._settings: dict[str, dict[str, Any]] = {}

    def run(self, title: str, name: str, settings: dict[str, Any], make: Callable[[Path], object]) -> Path:
        """
        Return the phase's folder, which `make` fills unless it was made with the same settings before.

        `settings` are what the phase depends on, besides the phases before it, and are equal to themselves after JSON.
        """
        self._settings = {**self._settings, name: settings}
        folder = self.output / name
        # A finished phase has the one file, a phase under way the other: a folder with neither is not the demo's own.
        finished, unfinished = folder / "settings.json", folder / "unfinished"
        if finished.is_file() and json.loads(finished.read_text(encoding="utf-8")) == self._settings:
            self.console.print(f"{title}: already in {folder}")
            return folder
        if finished.is_file() or unfinished.is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        self.console.print(f"{title} ...")
        with self.timed(title):
            make(folder)
        finished.write_text(json.dumps(self._settings), encoding="utf-8")
        unfinished.unlink()
        self.console.print(f"{title}: {self.seconds[title]:.0f} s")
        return folder

    @contextmanager
    def timed(self, title: str) -> Iterator[None]:
        """Record how long the body takes."""
        begun = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - begun, 1)


def _make_tiny_target(phases: Phases, settings: DemoSettings) -> tuple[Path, Dataset]:
    """Train the tiny target; return its folder, and chats it was not trained on, which lend their prompts."""
    tiny, seed = settings.tiny, settings.seed
    chats = write_chats(tiny.num_chats + settings.num_prompts + settings.num_test_prompts, seed)

    def make(folder: Path) -> None:
        train_target(chats[: tiny.num_chats], folder, tiny, seed)

    folder = phases.run("1/5 target", "target", asdict(tiny) | {"seed": seed}, make)
    return folder, Dataset.from_list([{"messages": chat} for chat in chats[tiny.num_chats :]])


def write_responses(
    phases: Phases, settings: DemoSettings, target: FrozenTarget, rows: Dataset
) -> tuple[Dataset, list[list[int]]]:
    """Let the target respond to the training prompts; return those pairs, and the test prompts."""
    # The test prompts are the last rows, so that another number of training prompts leaves them as they are.
    num_others = len(rows) - settings.num_test_prompts
    if num_others < 1:
        raise ValueError(
            f"The dataset has {len(rows)} rows, of which {settings.num_test_prompts} are kept for the measurement. "
            "Give more rows."
        )

    lengths = fit_lengths(
        target.num_positions,
        prompt=MAX_PROMPT_LENGTH,
        completion=settings.max_completion_length,
        num_drafts=settings.num_drafts,
        defaults=TRAINING_LENGTHS,
    )

    def make(folder: Path) -> None:
        reader = target.text_reader(max_prompt_length=lengths.prompt)
        picked = range(min(settings.num_prompts, num_others)), range(num_others, len(rows))
        train, test = (list(reader.read_prompts(rows.select(indices))["prompt_ids"]) for indices in picked)
        responses = respond(settings, target, train)
        pairs = [{"prompt_ids": p, "completion_ids": r} for p, r in zip(train, responses, strict=True)]
        (folder / "rows.json").write_text(json.dumps({"train": pairs, "test": test}), encoding="utf-8")

    made_from = settings.pick("target dataset num_prompts num_test_prompts max_completion_length seed")
    folder = phases.run("2/5 target's responses", "responses", made_from | {"num_rows": len(rows)}, make)
    data = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return Dataset.from_list(data["train"]), data["test"]


def respond(settings: DemoSettings, target: FrozenTarget, prompts: list[list[int]]) -> list[list[int]]:
    """Let the target respond to prompts, greedily."""
    return generate_responses(
        target,
        prompts,
        max_completion_length=settings.max_completion_length,
        sampling=SamplingSettings(temperature=0.0, top_k=0, top_p=1.0),
        batch_size=64,
        seed=settings.seed,
        show_progress=True,
    )


def train_drafters(
    phases: Phases,
    settings: DemoSettings,
    target: FrozenTarget,
    rows: Dataset,
    *,
    sft: dict[str, Any] | None = None,
    opd: dict[str, Any] | None = None,
) -> tuple[Path, Path]:
    """
    Train a fresh drafter by SFT, then a copy of it by Draft-OPD; return both folders. `sft` and `opd` are fields of
    the trainers' configs, in place of the demo's.
    """
    sft, opd = sft or {}, opd or {}
    has_accelerator = torch.accelerator.is_available()
    shared = {
        "per_device_train_batch_size": settings.batch_size,
        "max_prompt_length": MAX_PROMPT_LENGTH,
        "max_completion_length": settings.max_completion_length,
        "save_strategy": "no",
        "logging_steps": 5,
        "report_to": "none",
        "use_cpu": not has_accelerator,
        "dataloader_pin_memory": has_accelerator,
        "seed": settings.seed,
        "disable_tqdm": True,
    }

    def train_sft(folder: Path) -> None:
        own = {
            "num_train_epochs": settings.sft_epochs,
            "learning_rate": settings.sft_learning_rate,
            "adam_beta2": 0.95,
            # About as many blocks as a response has in decoding; another epoch draws others.
            "num_anchors": 16,
        }
        config = DraftSFTConfig(str(folder), **shared | own | sft)
        set_seed(settings.seed)
        drafter = _make_drafter(settings, target)
        _train(DraftSFTTrainer(drafter, target, config, rows), phases.console)
        with writing_files(folder, "drafter") as staged:
            drafter.save_pretrained(staged)

    def train_opd(folder: Path) -> None:
        own = {
            "num_train_epochs": settings.opd_epochs,
            "learning_rate": settings.opd_learning_rate,
            # The responses are there already; at temperature 0 the blocks are those of live decoding.
            "rollout": "replay",
            "completions_from_target": True,
        }
        config = DraftOPDConfig(str(folder), **shared | own | opd)
        drafter = AutoDrafter.from_pretrained(sft_folder, num_target_layers=target.num_layers)
        _train(DraftOPDTrainer(drafter, target, config, rows), phases.console)
        with writing_files(folder, "drafter") as staged:
            drafter.save_pretrained(staged)

    made_from = settings.pick("family num_drafts sft_epochs batch_size sft_learning_rate") | sft
    sft_folder = phases.run("3/5 drafter by SFT", "drafter-sft", made_from, train_sft)
    made_from = settings.pick("opd_epochs opd_learning_rate") | opd
    return sft_folder, phases.run("4/5 Draft-OPD", "drafter-opd", made_from, train_opd)


def _make_drafter(settings: DemoSettings, target: FrozenTarget) -> Drafter:
    """Return a small fresh drafter whose blocks have the demo's drafts."""
    family_class: Any = DRAFTER_CLASSES[settings.family]
    if not family_class.config_class.drafts_whole_blocks:
        return family_class.from_target(target, ttt_steps=settings.num_drafts)
    return family_class.from_target(
        target,
        mask_token_id=target.find_mask_token_id(),
        num_hidden_layers=2,
        block_size=settings.num_drafts + (0 if family_class.config_class.sample_from_anchor else 1),
    )


def _train(trainer: DraftSFTTrainer | DraftOPDTrainer, console: Console) -> None:
    """Train with one progress bar and no other output."""
    trainer.remove_callback(LogPrinter)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        trainer.add_callback(_ShowSteps(progress))
        trainer.train()


class _ShowSteps(TrainerCallback):
    """A bar over the updates, with the latest loss, and tau where it is known."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.task = progress.add_task("starting", total=None)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, total=state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.progress.advance(self.task)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        shown = [f"{name} {kwargs['logs'][name]:.3f}" for name in ("loss", "tau") if name in kwargs["logs"]]
        if shown:
            self.progress.update(self.task, description=", ".join(shown))


def _measure(
    phases: Phases, settings: DemoSettings, target: FrozenTarget, folder: Path, prompts: list[list[int]]
) -> EvaluationReport:
    """Measure a drafter; this is done in every run."""
    title = f"5/5 measuring {folder.name}"
    phases.console.print(f"{title} on {len(prompts)} prompts it was not trained on")
    drafter = AutoDrafter.from_pretrained(folder, num_target_layers=target.num_layers).eval()
    with phases.timed(title):
        return evaluate_drafter(
            target,
            drafter.to(target.device),  # pyright: ignore[reportArgumentType]
            prompts,
            max_completion_length=settings.max_completion_length,
            batch_size=settings.test_batch_size,
            show_progress=phases.console.is_terminal,
        )
