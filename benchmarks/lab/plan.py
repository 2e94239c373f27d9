# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What the laboratory runs, read from YAML: a pair (target, drafter family, prompts, SFT) and the arms that continue from
its SFT.

Knows names and numbers; refuses to know models and trainers. A key that nobody reads is an error, not a comment.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


FOLDER = Path(__file__).parent
TRAINERS = ("sft", "opd", "one_token", "random_anchors", "stale", "dense", "hard", "confident")


@dataclass(frozen=True)
class PromptSet:
    """
    Prompts from a JSONL file under `--shared`, or from the Hub.

    Attributes:
        field (`str`): Column that holds the user's message.
        count (`int`): Prompts taken.
        start (`int`): First row taken; counted from the end if negative.
        joined (`int`): Rows in a row that make one prompt, a blank line between them: several tasks, long responses.
        extra_field (`str`, *optional*): A second column, put on a line behind the first where it is not empty.
        file (`str`, *optional*): JSONL file, relative to `--shared`.
        hub (`str`, *optional*), config (`str`, *optional*), split (`str`): Dataset on the Hub, if there is no file.
    """

    field: str
    count: int
    start: int = 0
    joined: int = 1
    extra_field: str | None = None
    file: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"

    def __post_init__(self):
        if (self.file is None) == (self.hub is None):
            raise ValueError(f"A prompt set needs either `file` or `hub`, got {self.file!r} and {self.hub!r}.")
        for name in ("count", "joined"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` of a prompt set must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class SftPlan:
    """
    How the start of all arms is made: SFT at a constant rate until tau stops rising, then a linear cool-down to 0.

    Attributes:
        settings (`dict`): Fields of `DraftSFTConfig`.
        measure_every (`int`): Updates between two measurements of tau on the development prompts.
        min_updates (`int`), max_updates (`int`):
            The plateau is not looked for before, and not waited for after. 0: the pair's drafter is the start as it
            is.
        cooldown_updates (`int`): Updates of the cool-down.
    """

    settings: dict[str, Any]
    measure_every: int
    min_updates: int
    max_updates: int
    cooldown_updates: int


@dataclass(frozen=True)
class Pair:
    """
    A target, a drafter family, and prompts.

    Attributes:
        name (`str`): Name of its YAML file.
        family (`str`): One of `trl_draft_opd.drafters.auto.DRAFTER_CLASSES`.
        target (`str`): Folder under `--shared` or `--out`, or an id on the Hub.
        drafter (`dict`):
            Arguments of the family's `from_target`; or `{"id": ...}` for a trained one to continue from: an id on the
            Hub, or a folder, also under `--out`; or `{"from_dflash": ...}`, such a name of a DFlash drafter, and
            arguments of the family's `from_dflash`.
        max_completion_length (`int`): Longest response.
        train (`list[PromptSet]`), dev (`list[PromptSet]`), tests (`dict[str, PromptSet]`):
            Prompts; neither a development nor a test prompt is trained on.
        fresh (`list[PromptSet]`): More prompts, for arms that train on prompts that the start has not seen.
        prompts_per_update (`int`): Prompts of one optimiser step.
        sft (`SftPlan`): How the start is made.
        budgets (`dict[int, float]`): TFLOP of an arm, by tier.
        common (`dict`), opd (`dict`): Settings of every arm, and of every Draft-OPD arm, which an arm's own override.
        continued_sft (`dict`): Settings of every SFT arm.
        seeds (`dict[int, int]`): Seeds of an arm, by tier.
        arms (`list[str]`, *optional*): The arms it runs; all of a tier by default.
        responses (`str`, *optional*): Name of the responses under `--out`, shared by pairs; its own if unset.
    """

    name: str
    family: str
    target: str
    drafter: dict[str, Any]
    max_completion_length: int
    train: list[PromptSet]
    dev: list[PromptSet]
    tests: dict[str, PromptSet]
    prompts_per_update: int
    sft: SftPlan
    budgets: dict[int, float]
    seeds: dict[int, int]
    common: dict[str, Any] = field(default_factory=dict)
    opd: dict[str, Any] = field(default_factory=dict)
    continued_sft: dict[str, Any] = field(default_factory=dict)
    arms: list[str] | None = None
    responses: str | None = None
    fresh: list[PromptSet] = field(default_factory=list)


@dataclass(frozen=True)
class Arm:
    """
    One way to continue from SFT.

    Attributes:
        name (`str`): Its name in tables.
        tiers (`tuple[int, ...]`): Tiers it belongs to. 1: several seeds. 2: one seed, shorter. 6: a real model.
        trainer (`str`): `"sft"`, `"opd"`, `"one_token"` (the released code's estimators),
            `"random_anchors"` (the paper's ablation), `"stale"` (anchors kept for some epochs), `"dense"` (blocks at
            every position), `"hard"` (blocks wrong at once replayed twice) or `"confident"` (errors alone where the
            target is confident).
        settings (`dict`): Fields of the trainer's config that differ from the pair's.
        pool (`int`, *optional*): Train on the first so many prompts only.
        is_fresh (`bool`): Train on the pair's `fresh` prompts in place of those of the start.
        refresh_epochs (`int`): Epochs between two walks of the chain (`"stale"` only).
        temperature (`float`), draft_sampling (`str`): Distribution of text and drafts, in training and evaluation.
        budget_share (`float`): Share of the tier's budget.
        begins (`str`):
            What it continues from: `"start"`, the drafter of another arm of its tier, or `"fresh"`, the start's shape
            untrained.
        lora (`dict`, *optional*): Arguments of `peft.LoraConfig`: an adapter is trained in place of the drafter.
        sharpen (`float`, *optional*): Temperature of the target that the losses compare with; its own is 1.
        average (`float`, *optional*): Decay of an average of the weights, which the arm ends with.
    """

    name: str
    tiers: tuple[int, ...]
    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    pool: int | None = None
    refresh_epochs: int = 1
    temperature: float = 0.0
    draft_sampling: str = "greedy"
    budget_share: float = 1.0
    begins: str = "start"
    lora: dict[str, Any] | None = None
    sharpen: float | None = None
    average: float | None = None
    is_fresh: bool = False

    def __post_init__(self):
        if self.trainer not in TRAINERS:
            raise ValueError(f"Arm {self.name!r} has trainer {self.trainer!r}; choose one of {TRAINERS}.")
        if not 0 < self.budget_share:
            raise ValueError(f"Arm {self.name!r} has budget_share {self.budget_share}; it must be above 0.")
        if self.sharpen is not None and not 0 < self.sharpen:
            raise ValueError(f"Arm {self.name!r} has sharpen {self.sharpen}; it must be above 0.")
        if self.average is not None and (not 0 < self.average < 1 or self.lora is not None):
            raise ValueError(
                f"Arm {self.name!r} has average {self.average}; it must be in (0, 1), without an adapter."
            )


def read_pair(name: str) -> Pair:
    """
    Return the pair of a name, or of the path of a YAML file.

    Raises:
        ValueError: If there is no such pair, or the file has unknown or missing keys.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / "pairs" / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in (FOLDER / "pairs").glob("*.yaml"))
        raise ValueError(f"There is no pair {name!r}. Choose one of {known}, or give the path of a YAML file.")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    where = f"pair {path.stem!r}"
    values = raw | {"name": path.stem}
    if isinstance(values.get("sft"), dict):
        values["sft"] = build(SftPlan, values["sft"], f"{where}, sft")
    for key in ("train", "dev", "fresh"):
        values[key] = [build(PromptSet, row, f"{where}, {key}") for row in values.get(key, [])]
    values["tests"] = {
        key: build(PromptSet, row, f"{where}, tests") for key, row in (values.get("tests") or {}).items()
    }
    return build(Pair, values, where)


def read_arms(pair: Pair, tier: int, path: Path = FOLDER / "arms.yaml") -> list[Arm]:
    """
    Return the arms of a tier that a pair runs, in the order of the file.

    Raises:
        ValueError: If the file has unknown keys, an unknown trainer, or a name twice.
    """
    arms = []
    for name, row in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        row = {"name": name} | row
        row |= {"tiers": tuple(row["tiers"])} if "tiers" in row else {}
        arms.append(build(Arm, row, f"arm {name!r}"))
    known = {arm.name for arm in arms}
    if unknown := sorted(set(pair.arms or []) - known):
        raise ValueError(f"Pair {pair.name!r} names arms {unknown} that {path} does not have: {sorted(known)}.")
    wanted = known if pair.arms is None else set(pair.arms)
    return [arm for arm in arms if tier in arm.tiers and arm.name in wanted]


def build(kind: type, values: dict[str, Any], where: str) -> Any:
    """Return a dataclass of these values; raise `ValueError` naming keys that are unknown or missing."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name
        for name, item in fields.items()
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise ValueError(f"In {where}: unknown keys {unknown}, missing keys {missing}. Known are {sorted(fields)}.")
    return kind(**values)
