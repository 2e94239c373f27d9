# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Runs the demo: target, its responses, a drafter by SFT, the same drafter after Draft-OPD, and both measured.

Each phase leaves a folder with the settings it was made from, and is not repeated while they stay the same.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from rich.console import Console
from rich.progress import Progress
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from ..drafters.auto import AutoDrafter
from ..drafters.base import Drafter
from ..drafters.dflash import DFlashDraftModel
from ..drafters.eagle3 import Eagle3DraftModel
from ..evaluation import EvaluationReport, evaluate_drafter
from ..responses import generate_responses
from ..rollout.acceptance import SamplingSettings
from ..target.frozen import FrozenTarget
from ..trainer.draft_opd_config import DraftOPDConfig
from ..trainer.draft_opd_trainer import DraftOPDTrainer
from ..trainer.draft_sft_config import DraftSFTConfig
from ..trainer.draft_sft_trainer import DraftSFTTrainer
from .corpus import write_chats
from .pair import train_target
from .results import draw_plot, require_matplotlib, results_table, summary


GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
FAMILIES = ("dflash", "eagle3")


@dataclass(frozen=True)
class DemoSettings:
    """
    What the demo does; the defaults fit two CPU cores and a few minutes.

    Args:
        output (`Path`, *optional*, defaults to `outputs/demo`): Everything is written below it.
        family (`str`, *optional*, defaults to `"dflash"`): `"dflash"` or `"eagle3"`.
        target (`str`, *optional*): Hub id or path of a real target; by default a tiny one is trained first.
        dataset (`str`, *optional*): Name of the real target's prompts, for the record.
        num_prompts (`int`), num_test_prompts (`int`): Prompts to train on, and others to measure on.
        test_batch_size (`int`): Prompts decoded together in the measurement, its speed included.
        max_new_tokens (`int`): Longest response.
        num_drafts (`int`): Drafts per block.
        sft_epochs (`int`), opd_epochs (`int`), batch_size (`int`): Of the drafter's training; prompts per update.
        sft_learning_rate (`float`), opd_learning_rate (`float`): Peak rates, higher than the library's: the drafter is tiny.
        num_chats (`int`), vocab_size (`int`), hidden_size (`int`): Of the tiny target's corpus and model.
        target_steps (`int`), target_batch_size (`int`), target_learning_rate (`float`): Of the tiny target's training.
        seed (`int`): Of everything.
    """

    output: Path = Path("outputs/demo")
    family: str = "dflash"
    target: str | None = None
    dataset: str | None = None
    num_prompts: int = 960
    num_test_prompts: int = 98
    test_batch_size: int = 14
    max_new_tokens: int = 128
    num_drafts: int = 7
    sft_epochs: int = 8
    opd_epochs: int = 1
    batch_size: int = 16
    sft_learning_rate: float = 4e-3
    opd_learning_rate: float = 1e-3
    num_chats: int = 7000
    vocab_size: int = 768
    hidden_size: int = 96
    target_steps: int = 400
    target_batch_size: int = 16
    target_learning_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"`family` must be one of {FAMILIES}, got {self.family!r}.")
        for name in (
            "num_prompts",
            "num_test_prompts",
            "max_new_tokens",
            "sft_epochs",
            "opd_epochs",
            "test_batch_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def named(self, *names: str) -> dict:
        """Return some of the settings by name."""
        return {name: getattr(self, name) for name in names}

    def target_key(self) -> dict:
        """Return what the tiny target depends on."""
        names = "num_chats vocab_size hidden_size target_steps target_batch_size target_learning_rate seed"
        return self.named(*names.split())

    def responses_key(self, num_rows: int | None) -> dict:
        """Return what the responses depend on; `num_rows` is the size of a given dataset."""
        names = "target dataset num_prompts num_test_prompts max_new_tokens seed"
        return {**({} if self.target else self.target_key()), **self.named(*names.split()), "num_rows": num_rows}

    def sft_key(self, num_rows: int | None) -> dict:
        """Return what the SFT drafter depends on."""
        names = "family num_drafts sft_epochs batch_size sft_learning_rate"
        return self.responses_key(num_rows) | self.named(*names.split())


def run_demo(settings: DemoSettings, rows: Dataset | None) -> dict:
    """
    Run every phase that the output folder does not hold yet, print the table, draw the plot.

    Args:
        settings ([`DemoSettings`]): What to do.
        rows (`Dataset`, *optional*): Prompts for a real target; given exactly if `settings.target` is.

    Returns:
        `dict`: what `results.json` holds.

    Raises:
        ValueError: If matplotlib is missing, or target and rows are not given together, or the rows are too few.
    """
    require_matplotlib()
    if (settings.target is None) != (rows is None):
        raise ValueError("A real target and its prompts go together: give `target` and `rows`, or neither.")
    console = Console()
    num_rows = None if rows is None else len(rows)
    folders = {name: settings.output / name for name in ("target", "responses", "drafter-sft", "drafter-opd")}
    seconds: dict[str, float] = {}
    with _quiet_libraries():
        if settings.target is None:
            rows = _own_rows(settings)
            with _phase(console, "1/5 target", folders["target"], settings.target_key(), seconds) as is_needed:
                if is_needed:
                    _train_own_target(settings, rows, folders["target"])
            rows = rows.select(range(settings.num_chats, len(rows)))
        dtype = torch.float32 if settings.target is None else "auto"
        target = FrozenTarget.load(settings.target or folders["target"], dtype=dtype)
        target.place(_device())
        key = settings.responses_key(num_rows)
        with _phase(console, "2/5 target's responses", folders["responses"], key, seconds) as is_needed:
            if is_needed:
                _write_responses(settings, target, rows, folders["responses"])
        data = json.loads((folders["responses"] / "rows.json").read_text(encoding="utf-8"))
        train_rows = Dataset.from_list(data["train"])
        key = settings.sft_key(num_rows)
        with _phase(console, "3/5 drafter by SFT", folders["drafter-sft"], key, seconds) as is_needed:
            if is_needed:
                _train_sft(settings, target, train_rows, folders["drafter-sft"], console)
        key |= settings.named("opd_epochs", "opd_learning_rate")
        with _phase(console, "4/5 Draft-OPD", folders["drafter-opd"], key, seconds) as is_needed:
            if is_needed:
                _train_opd(settings, target, train_rows, folders, console)
        reports = {}
        for name, folder in (("sft", folders["drafter-sft"]), ("opd", folders["drafter-opd"])):
            console.print(f"5/5 measuring {folder.name} on {len(data['test'])} prompts it was not trained on")
            reports[name] = _measure(settings, target, folder, data["test"], seconds)
    return _report(settings, reports, seconds, console)


# -- phases -------------------------------------------------------------------------------------------------------------


@contextmanager
def _phase(console: Console, name: str, folder: Path, key: dict, seconds: dict[str, float]) -> Iterator[bool]:
    """Yield whether a phase must run; its marker is written when it has, and a sign of the demo's own stands there until then."""
    marker, sign = folder / "settings.json", folder / "unfinished"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == key:
        console.print(f"{name}: already in {folder}")
        yield False
        return
    if marker.is_file() or sign.is_file():
        # Another run's results, or half of them; a folder that the demo did not make is not touched.
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sign.touch()
    console.print(f"{name} ...")
    begun = time.perf_counter()
    yield True
    seconds[name] = round(time.perf_counter() - begun, 1)
    marker.write_text(json.dumps(key), encoding="utf-8")
    sign.unlink()
    console.print(f"{name}: {seconds[name]:.0f} s")


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the libraries' own bars and notes: the demo shows its own."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
        enable_progress_bars()


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _own_rows(settings: DemoSettings) -> Dataset:
    """Return the chats of the target's corpus and, behind them, those that only lend their prompts."""
    chats = write_chats(settings.num_chats + settings.num_prompts + settings.num_test_prompts, settings.seed)
    return Dataset.from_list([{"messages": chat} for chat in chats])


def _train_own_target(settings: DemoSettings, rows: Dataset, folder: Path) -> None:
    train_target(
        rows[: settings.num_chats]["messages"],
        folder,
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_steps=settings.target_steps,
        batch_size=settings.target_batch_size,
        learning_rate=settings.target_learning_rate,
        seed=settings.seed,
    )


def _write_responses(settings: DemoSettings, target: FrozenTarget, rows: Dataset, folder: Path) -> None:
    """Have the target answer the training prompts; the test prompts are kept beside them."""
    if len(rows) <= settings.num_test_prompts:
        raise ValueError(
            f"The dataset has {len(rows)} rows, of which {settings.num_test_prompts} are kept for the measurement. Give more rows."
        )
    # The last rows, so that another number of training prompts leaves the test prompts as they are.
    last = list(range(len(rows) - settings.num_test_prompts, len(rows)))
    first = list(range(min(settings.num_prompts, last[0])))
    reader = target.text_reader(max_prompt_length=DraftOPDConfig.max_prompt_length)
    tokenized = reader.read_prompts(rows.select(first + last))
    is_train = [sample_id < len(first) for sample_id in tokenized["sample_id"]]
    prompts = list(tokenized["prompt_ids"])
    train = [prompt for prompt, kept in zip(prompts, is_train, strict=True) if kept]
    test = [prompt for prompt, kept in zip(prompts, is_train, strict=True) if not kept]
    responses = generate_responses(
        target,
        train,
        max_new_tokens=settings.max_new_tokens,
        sampling=GREEDY,
        batch_size=64,
        seed=settings.seed,
        show_progress=True,
    )
    pairs = [{"prompt_ids": p, "completion_ids": r} for p, r in zip(train, responses, strict=True)]
    (folder / "rows.json").write_text(json.dumps({"train": pairs, "test": test}), encoding="utf-8")


def _fresh_drafter(settings: DemoSettings, target: FrozenTarget) -> Drafter:
    set_seed(settings.seed)
    if settings.family == "eagle3":
        return Eagle3DraftModel.from_target(target, ttt_steps=settings.num_drafts)
    return DFlashDraftModel.from_target(
        target,
        mask_token_id=target.find_mask_token_id(),
        num_hidden_layers=2,
        block_size=settings.num_drafts + 1,
    )


def _trainer_settings(settings: DemoSettings, folder: Path) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
        "save_strategy": "no",
        "logging_steps": 5,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "seed": settings.seed,
        "disable_tqdm": True,
    }


def _train_sft(settings: DemoSettings, target: FrozenTarget, rows: Dataset, folder: Path, console: Console) -> None:
    config = DraftSFTConfig(
        **_trainer_settings(settings, folder),
        num_train_epochs=settings.sft_epochs,
        learning_rate=settings.sft_learning_rate,
        adam_beta2=0.95,
        # About as many blocks as a response has in decoding; another epoch draws others.
        num_anchors=16,
    )
    _train(DraftSFTTrainer(_fresh_drafter(settings, target), target, config, rows), folder, console)


def _train_opd(
    settings: DemoSettings, target: FrozenTarget, rows: Dataset, folders: dict[str, Path], console: Console
) -> None:
    config = DraftOPDConfig(
        **_trainer_settings(settings, folders["drafter-opd"]),
        num_train_epochs=settings.opd_epochs,
        learning_rate=settings.opd_learning_rate,
        # Minutes of SFT end far below the plateau, where the paper's reverse KL lowers tau (docs/why/experiment_log.md, 7).
        rejected_loss="forward_kl",
        # The responses are written already; at temperature 0 the blocks are those of live decoding.
        rollout="replay",
        completions_from_target=True,
    )
    trainer = DraftOPDTrainer(str(folders["drafter-sft"]), target, config, rows)
    _train(trainer, folders["drafter-opd"], console)


def _train(trainer: DraftSFTTrainer | DraftOPDTrainer, folder: Path, console: Console) -> None:
    trainer.remove_callback(PrinterCallback)
    with Progress(console=console, transient=True) as progress:
        trainer.add_callback(_ShowSteps(progress))
        trainer.train()
    trainer.model.save_pretrained(folder)


class _ShowSteps(TrainerCallback):
    """A bar over the updates, with the latest loss, and tau where it is known."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.task = progress.add_task("starting", total=None)

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress.update(self.task, total=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.advance(self.task)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{name} {logs[name]:.3f}" for name in ("loss", "tau") if name in logs]
        if shown:
            self.progress.update(self.task, description=", ".join(shown))


def _measure(
    settings: DemoSettings, target: FrozenTarget, folder: Path, prompts: list[list[int]], seconds: dict[str, float]
) -> EvaluationReport:
    drafter = AutoDrafter.from_pretrained(folder, num_target_layers=target.num_layers).eval().to(target.device)
    begun = time.perf_counter()
    report = evaluate_drafter(
        target, drafter, prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.test_batch_size
    )
    seconds[f"5/5 measuring {folder.name}"] = round(time.perf_counter() - begun, 1)
    return report


def _report(
    settings: DemoSettings, reports: dict[str, EvaluationReport], seconds: dict[str, float], console: Console
) -> dict:
    """Print the table, draw the plot, write the JSON."""
    before, after = reports["sft"], reports["opd"]
    plot, numbers = settings.output / "demo.png", settings.output / "results.json"
    results = summary(before, after) | {
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
        },
        "seconds": seconds,
    }
    numbers.write_text(json.dumps(results, indent=2), encoding="utf-8")
    draw_plot(before, after, plot)
    console.print(results_table(before, after, settings.family))
    console.print(f"Plot: {plot}   numbers: {numbers}   drafter: {settings.output / 'drafter-opd'}", soft_wrap=True)
    return results
