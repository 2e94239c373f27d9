# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a whole run costs before anything is launched: which launch and micro-batch fit, how long the stages take, what
lies on the disk. Has no formula of its own but that of decoding; all others are those of memory, readings and
roofline.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..losses.budget import CHUNK_BYTES_CPU, chunk_bytes_of_card
from .counted import NOW
from .gpus import GPUS, LAUNCH_SECONDS, Gpu
from .jobs import Job
from .memory import (
    BF16,
    LAUNCHES,
    PLANNED_SHARE,
    Stages,
    Workload,
    checkpointing_pays,
    count_stages,
    gib,
    launch_bytes,
)
from .readings import bytes_per_token, cache_bytes_per_token, served_tokens_per_second
from .roofline import Prediction, Stage, predict
from .shapes import DrafterShape, TargetShape


ONE, DELIVERED = LAUNCHES[0], LAUNCHES[-1]
# What several cards try in turn: each holds less than the one before.
SHARED_LAUNCHES = ("DDP", "ZeRO-2", "FSDP2, target sharded")
# Gigabytes above which a number is the name of a card that is not known, such as 3090.
LARGEST_CARD = 512
# Texts of an update and of a micro-batch, and texts that the target writes together (`generate`'s own number).
TEXTS_PER_UPDATE, MICRO_BATCHES, DECODED_TOGETHER = 16, (8, 4, 2, 1), 32
# Of a token in the store of responses, before compression: an id; of one that was written, its log-probability too.
ID_BYTES, LOGPROB_BYTES = 4, 4


@dataclass(frozen=True)
class Run:
    """
    What is to be done, with every text at its longest.

    Attributes:
        target ([`TargetShape`]), drafter ([`DrafterShape`]): The pair.
        prompts (`int`), prompt (`int`), response (`int`): Texts, and the tokens of each.
        sft_epochs (`int`), opd_epochs (`int`): Passes over the texts.
        anchors (`int` or `None`): Blocks of a row in SFT; `None` for one at every position.
        segment (`int`), tau (`float`): Of Draft-OPD: tokens of a segment of the walk, and the accepted length.
    """

    target: TargetShape
    drafter: DrafterShape
    prompts: int
    prompt: int
    response: int
    sft_epochs: int
    opd_epochs: int
    anchors: int | None
    segment: int
    tau: float

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.prompt + self.response

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's reading."""
        return bytes_per_token(self.target.hidden, self.drafter.features // self.target.hidden)

    @property
    def readings_bytes(self) -> int:
        """Bytes of a store of readings of all texts."""
        return self.prompts * self.length * self.token_bytes

    @property
    def responses_bytes(self) -> int:
        """Bytes of the store of responses before compression."""
        return self.prompts * (ID_BYTES * self.length + LOGPROB_BYTES * self.response)

    def epochs(self, stage: str) -> int:
        """Return the passes of `"sft"` or `"opd"`."""
        return self.sft_epochs if stage == "sft" else self.opd_epochs

    def job(self, stage: str, rows: int) -> Job:
        """Return a micro-batch of `"sft"` or `"opd"`."""
        reduced = self.drafter.vocab if self.drafter.vocab < self.target.vocab else None
        sizes = {"rows": rows, "length": self.length, "prompt": self.prompt, "draft_vocab": reduced}
        if stage == "sft":
            return Job(stage, self.drafter.family, num_anchors=self.anchors, **sizes)
        return Job(stage, self.drafter.family, tau=self.tau, segment=self.segment, **sizes)

    def workload(self, stage: str, rows: int, accumulation: int, machine: "Machine") -> Workload:
        """Return what a process of `"sft"` or `"opd"` does in an update."""
        blocks = int(self.response / self.tau)
        if stage == "sft":
            blocks = self.response if self.anchors is None else min(self.anchors, self.response)
        return Workload(
            rows,
            self.length,
            blocks,
            # SFT reads a micro-batch when its turn comes; Draft-OPD has read all of an update by then.
            accumulation=1 if stage == "sft" else accumulation,
            checkpointing=False,
            chunk_bytes=CHUNK_BYTES_CPU if machine.memory is None else chunk_bytes_of_card(machine.memory),
            is_on_cpu=machine.memory is None,
        )


@dataclass(frozen=True)
class Machine:
    """
    What it runs on.

    Attributes:
        memory (`int` or `None`): Bytes of a card; `None` of a CPU, whose memory is the user's to compare.
        gpu ([`Gpu`] or `None`): Whose speed is computed with; `None` where none is known.
        count (`int`): Cards.
    """

    memory: int | None
    gpu: Gpu | None
    count: int = 1

    @classmethod
    def of(cls, name: str, count: int = 1) -> "Machine":
        """
        Return the machine of a card's name, of a card's gigabytes, or of `"cpu"`. Of gigabytes, time is that of the
        slowest card that is sold with as many.

        Raises:
            ValueError: If it is none of these, or CPUs are to be several.
        """
        name = name.lower()
        if name == "cpu":
            if count > 1:
                raise ValueError(f"`--gpus {count}` counts cards, and `--gpu cpu` has none. Leave `--gpus` out.")
            return cls(None, None)
        if name in GPUS:
            return cls(GPUS[name].memory, GPUS[name], count)
        size = int(name) if name.isdecimal() else 0
        if not 1 <= size <= LARGEST_CARD:
            raise ValueError(
                f"`--gpu {name}` is no card that is known. Give one of {', '.join(sorted(GPUS))}, the gigabytes of "
                "another as a number, or cpu."
            )
        # Torch reports somewhat less than is sold.
        sold = [gpu for gpu in GPUS.values() if gpu.memory <= size * 2**30 <= 1.1 * gpu.memory]
        return cls(size * 2**30, min(sold, key=lambda gpu: gpu.peak, default=None), count)

    @property
    def launches(self) -> Sequence[str]:
        """Launches to try, the simplest first."""
        return (ONE, DELIVERED) if self.count == 1 else SHARED_LAUNCHES


@dataclass(frozen=True)
class TrainedStage:
    """
    How `"sft"` or `"opd"` fits.

    Attributes:
        rows (`int`), accumulation (`int`): Texts of a micro-batch, and micro-batches of an update.
        checkpointing (`bool`): Whether layers are computed again in the backward pass.
        peak (`int`): Bytes of a card at most.
        stages ([`Stages`]): Its parts.
    """

    rows: int
    accumulation: int
    checkpointing: bool
    peak: int
    stages: Stages


def fit_stage(run: Run, stage: str, launch: str, machine: Machine, rows: int | None = None) -> list[TrainedStage]:
    """
    Return what fits of a stage under a launch, the largest micro-batch first, or only `rows`; of what does not fit,
    the smallest alone. Layers are computed again where one text would not fit otherwise, as training decides it.
    """
    sizes = MICRO_BATCHES if rows is None else (rows,)
    if machine.memory is None and rows is None:
        sizes = MICRO_BATCHES[2:]  # a CPU gains nothing by more
    tried = []
    for size, again in [*((size, False) for size in sizes), (sizes[-1], True)]:
        accumulation = max(1, TEXTS_PER_UPDATE // (size * machine.count))
        work = replace(run.workload(stage, size, accumulation, machine), checkpointing=again)
        counted = count_stages(run.target, run.drafter, work)
        peak = launch_bytes(counted, launch, machine.count)
        tried.append(TrainedStage(size, accumulation, again, peak, counted))
    if machine.memory is None:
        return tried[:1]
    return [each for each in tried if not checkpointing_pays(each.peak, machine.memory)] or tried[-1:]


def choose_launch(
    run: Run, machine: Machine, rows: int | None = None, *, delivered: bool | None = None
) -> tuple[str, dict[str, TrainedStage]]:
    """
    Return the launch, and how each stage fits: the simplest that fits.

    Args:
        delivered (`bool`, *optional*): Whether readings come from a store; by default where nothing else fits.

    Raises:
        ValueError: If nothing fits.
    """
    launches = list(machine.launches)
    if machine.count > 1 and delivered:
        raise ValueError("A store of readings is planned for one card. Leave `--readings` or `--gpus` out.")
    if machine.count == 1:
        if delivered is not None:
            launches.remove(ONE if delivered else DELIVERED)
    smallest = math.inf
    for launch in launches:
        fits = {stage: fit_stage(run, stage, launch, machine, rows)[0] for stage in ("sft", "opd")}
        peak = max(each.peak for each in fits.values())
        if machine.memory is None or peak <= PLANNED_SHARE * machine.memory:
            return launch, fits
        smallest = min(smallest, peak)
    assert machine.memory is not None, "a CPU is never refused"
    raise ValueError(
        f"Nothing fits: a step of the smallest kind takes {gib(smallest)} GiB of a card of {gib(machine.memory)} GiB, "
        f"of which {PLANNED_SHARE:.0%} are planned with. Give more cards (`--gpus`), shorter texts "
        "(`--max-completion-length`), or a smaller drafter (`--family`, `--num-hidden-layers`)."
    )


# -- seconds ----------------------------------------------------------------------------------------------------------


def prediction(run: Run, stage: str, rows: int, gpu: Gpu, *, checkpointing: bool = False) -> Prediction:
    """Return what a micro-batch takes, the target's reading in process included."""
    return predict(run.job(stage, rows), run.target, run.drafter, gpu, NOW, checkpointing=checkpointing)


def training_seconds(run: Run, stage: str, fits: TrainedStage, machine: Machine, *, delivered: bool) -> float | None:
    """Return the seconds of all passes, evenly over the cards; `None` where the speed is not known."""
    if machine.gpu is None:
        return None
    found = prediction(run, stage, fits.rows, machine.gpu, checkpointing=fits.checkpointing)
    seconds = found.total - (found.seconds_of("target") if delivered else 0.0)
    return run.epochs(stage) * math.ceil(run.prompts / (fits.rows * machine.count)) * seconds


def training_flops(run: Run, stage: str, fits: TrainedStage, *, delivered: bool) -> float:
    """Return the FLOPs of all passes."""
    found = prediction(run, stage, fits.rows, GPUS["h100"])
    flops = found.flops - (found.column("target") if delivered else 0.0)
    return run.epochs(stage) * math.ceil(run.prompts / fits.rows) * flops


def reading_seconds(run: Run, machine: Machine) -> float | None:
    """Return the seconds in which the cards read all texts once, at the speed of large products."""
    if machine.gpu is None:
        return None
    return run.prompts * run.length / served_tokens_per_second(run.target, run.length, machine.gpu, machine.count)


def decoding_seconds(run: Run, machine: Machine, together: int = DECODED_TOGETHER) -> float | None:
    """
    Return the seconds in which the target writes all responses, `together` at a time on one card: a step reads all
    weights and the cache, and launches the kernels of every layer.
    """
    if machine.gpu is None:
        return None
    target = run.target
    keys, _ = cache_bytes_per_token(target, 0)
    step = Stage(
        "decode",
        "target",
        flops=2 * together * (target.layers * target.active_matrices + target.head),
        product_bytes=BF16 * (target.layers * target.layer_matrices + target.head),
        bytes=together * (run.prompt + run.response / 2) * keys,
        launches=NOW.read_launches * target.layers,
    )
    seconds = max(step.busy(machine.gpu), step.launches * LAUNCH_SECONDS)
    return math.ceil(run.prompts / together) * run.response * seconds


def decoding_bytes(run: Run, together: int = DECODED_TOGETHER) -> int:
    """Return what a card holds while the target writes: its weights and the cache."""
    keys, _ = cache_bytes_per_token(run.target, 0)
    return BF16 * run.target.parameters + together * run.length * keys


def reading_bytes(run: Run, stages: Stages, rows: int, batch_size: int) -> int:
    """Return what a card holds while the target reads `batch_size` texts; `stages` are those of `rows` texts."""
    return stages.target + batch_size * stages.forward // rows + batch_size * run.length * run.token_bytes
