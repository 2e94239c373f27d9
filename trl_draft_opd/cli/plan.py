# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The command that plans: `plan`. Reads the target's config, no weights, and says what each figure rests on."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .arguments import flag, parse, write_json


# Where a run has no better number: texts, passes, and the longest prompt and response without and with thinking.
NUM_PROMPTS, SFT_EPOCHS, OPD_EPOCHS = 20_000, 3, 1
LONGEST_PROMPT, LONGEST_RESPONSE, LONGEST_THINKING = 512, 1536, 8192
# A layer of the drafter for so many of the target's, up to the published number.
TARGET_LAYERS_PER_LAYER, MOST_LAYERS = 5, 5
SERVER, SHARED_FOLDER = "http://127.0.0.1:8000", "/dev/shm/readings"  # noqa: S108  a server is told the same

COUNTED = "computed; measured within 6 % on a CPU"
ON_CARD = "computed; an earlier version was measured within 11 % on an H200"
ON_CARDS = "computed; launches on several cards were not measured"
SPEED = "computed (roofline), not measured on a GPU"
EXACT, THUMB, GIVEN = "computed", "rule of thumb", "given"


@dataclass(kw_only=True)
class PlanArguments:
    """Flags of `plan`."""

    _argument_group_name = "plan"

    target: str = flag("Hub id or folder of the target, of which the config alone is read.")
    target_revision: str | None = flag("Revision of the target.", default=None)
    gpu: str = flag(
        "Card: its name (h100, a100, ...), its gigabytes (80), or cpu for none; times of gigabytes are those of the "
        "slowest known card sold with as many.",
        default="h100",
    )
    gpus: int = flag("Cards of one machine.", default=1)
    num_prompts: int = flag("Prompts to train on.", default=NUM_PROMPTS)
    max_prompt_length: int | None = flag(f"Longest prompt, in tokens; {LONGEST_PROMPT} if unset.", default=None)
    max_completion_length: int | None = flag(
        f"Longest response, in tokens; {LONGEST_RESPONSE} if unset, {LONGEST_THINKING} with --thinking.", default=None
    )
    thinking: bool | None = flag(
        "Whether the chat template is told to think (`enable_thinking`); not told if unset.", default=None
    )
    family: str | None = flag("Family of the drafter; recommended if unset.", default=None)
    num_hidden_layers: int | None = flag("Layers of the drafter; recommended if unset.", default=None)
    draft_vocab_size: int | None = flag(
        "Tokens that can be drafted; 0 keeps all; if unset, as `sft` chooses.", default=None
    )
    tau: float | None = flag(
        "Accepted length when Draft-OPD begins; 3 for EAGLE-3 and 4 for the others if unset.", default=None
    )
    sft_epochs: int = flag("Passes of SFT over the prompts.", default=SFT_EPOCHS)
    opd_epochs: int = flag("Passes of Draft-OPD over the prompts.", default=OPD_EPOCHS)
    per_device_train_batch_size: int | None = flag(
        "Texts of a micro-batch; the most that fit if unset, at most 8.", default=None
    )
    readings: bool | None = flag(
        "Whether readings are stored before training; only where nothing else fits, if unset.", default=None
    )
    dataset: str = flag("File, folder or Hub id of the prompts, for the commands.", default="prompts.jsonl")
    json: str | None = flag("File to write the plan to.", default=None)

    def __post_init__(self) -> None:
        from ..utils.settings import check_at_least

        positive = ("gpus", "num_prompts", "max_prompt_length", "max_completion_length", "num_hidden_layers", "tau")
        check_at_least(self, 1, *positive, "sft_epochs", "opd_epochs", "per_device_train_batch_size")
        check_at_least(self, 0, "draft_vocab_size")


@dataclass(frozen=True)
class Line:
    """A figure of the plan: `value` for people, `number` in `unit` for programs, and what it rests on."""

    name: str
    value: str
    basis: str
    number: float | None = None
    unit: str | None = None


def read_target_config(target: str, revision: str | None) -> Any:
    """
    Read the config of a target.

    Raises:
        OSError: If there is none, or the Hub is out of reach.
        ValueError: If it is of an architecture that transformers does not know, or no decoder of text.
    """
    from transformers import AutoConfig

    from ..drafters.target_shape import text_config
    from ..utils.loading import require_model

    require_model(target)
    return text_config(AutoConfig.from_pretrained(target, revision=revision))


def drafter_config_of(config: Any, family: str, layers: int | None, draft_vocab: int | None) -> Any:
    """
    Return the config of the drafter that `sft` would make; no weight is made.

    Args:
        layers (`int`, *optional*): Layers; the published number if not given.
        draft_vocab (`int`, *optional*): Tokens that it can propose; 0 for all, by default as training chooses.

    Raises:
        ValueError: If the family is unknown or cannot have the vocabulary or the layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ..drafters.auto import DRAFTER_CLASSES
    from ..trainer.draft_sft_config import DRAFT_VOCAB_SIZE, LARGE_VOCABULARY

    if family not in DRAFTER_CLASSES:
        raise ValueError(f"`--family` must be one of {', '.join(DRAFTER_CLASSES)}, got {family!r}.")
    kind: Any = DRAFTER_CLASSES[family]
    options: dict[str, Any] = {}
    if kind.config_class.drafts_whole_blocks:
        # Any id that is no special one; the real one is found by its tokenizer.
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        special = {*ends, config.bos_token_id, config.pad_token_id}
        options["mask_token_id"] = next(i for i in range(config.vocab_size) if i not in special)
        options |= {} if layers is None else {"num_hidden_layers": layers}
    elif layers not in (None, 1):
        raise ValueError(f"`--num-hidden-layers {layers}`: EAGLE-3 has one layer. Leave it out.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        made = kind.from_target(model, **options).config
    if draft_vocab is None and family == "eagle3" and config.vocab_size > LARGE_VOCABULARY:
        draft_vocab = DRAFT_VOCAB_SIZE
    if draft_vocab:
        made.check_reducible()
        if draft_vocab > config.vocab_size:
            raise ValueError(f"`--draft-vocab-size {draft_vocab}` exceeds the target's {config.vocab_size} tokens.")
        made.draft_vocab_size = draft_vocab
    return made


@dataclass(frozen=True)
class Plan:
    """
    A plan: what it was made for, its lines, and its commands.

    Attributes:
        run, machine, launch, fits: As in [`choose_launch`].
        config (`Any`): The drafter's config.
        lines (`list[Line]`), notes (`list[str]`), commands (`list[str]`): What is printed.
    """

    run: Any
    machine: Any
    launch: str
    fits: dict[str, Any]
    config: Any
    lines: list[Line]
    notes: list[str]
    commands: list[str]


def make_plan(args: PlanArguments) -> Plan:
    """
    Plan a run.

    Raises:
        ValueError: If the target's architecture is unknown, or nothing fits.
    """
    from ..costs.planning import Machine, Run, choose_launch
    from ..costs.shapes import DrafterShape, TargetShape
    from ..target.lengths import Lengths, fit_lengths

    machine = Machine.of(args.gpu, args.gpus)
    target_config = read_target_config(args.target, args.target_revision)
    target = TargetShape.of_known(target_config)
    # The recommended one, and what needs least memory.
    families = [args.family] if args.family else ["eagle3"] if machine.memory is None else ["dspark", "eagle3"]
    for family in families:
        layers = args.num_hidden_layers
        if layers is None and family != "eagle3":
            layers = max(1, min(MOST_LAYERS, target.layers // TARGET_LAYERS_PER_LAYER))
        config = drafter_config_of(target_config, family, layers, args.draft_vocab_size)
        drafter = DrafterShape.of(config)
        response = LONGEST_THINKING if args.thinking else LONGEST_RESPONSE
        lengths = fit_lengths(
            target_config.max_position_embeddings,
            prompt=args.max_prompt_length,
            completion=args.max_completion_length,
            num_drafts=drafter.num_drafts,
            defaults=Lengths(LONGEST_PROMPT, response),
        )
        run = Run(
            target,
            drafter,
            args.num_prompts,
            *(lengths.prompt, lengths.completion),
            *(args.sft_epochs, args.opd_epochs),
            anchors=config.default_num_anchors or None,
            segment=config.default_segment_length,
            tau=args.tau or (4.0 if drafter.drafts_whole_blocks else 3.0),
        )
        try:
            launch, fits = choose_launch(run, machine, args.per_device_train_batch_size, delivered=args.readings)
            break
        except ValueError:
            if family == families[-1]:
                raise
    plan = Plan(run, machine, launch, fits, config, [], [], [])
    _describe(plan, args, target_config)
    return plan


# -- what is printed --------------------------------------------------------------------------------------------------


def show_seconds(seconds: float) -> str:
    """Return seconds in the unit that a person would say them in."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _describe(plan: Plan, args: PlanArguments, target_config: Any) -> None:
    """Fill in lines, notes and commands."""
    from ..costs import planning
    from ..costs.memory import GIB, gib
    from ..readings.manifest import show_bytes

    run, machine, fits, lines, notes = plan.run, plan.machine, plan.fits, plan.lines, plan.notes
    target, drafter = run.target, run.drafter
    delivered = plan.launch == planning.DELIVERED
    is_cpu = machine.memory is None
    on_memory = COUNTED if is_cpu else ON_CARD if machine.count == 1 else ON_CARDS

    def add(name: str, value: str, basis: str, number: float | None = None, unit: str | None = None) -> None:
        lines.append(Line(name, value, basis, number, unit))

    def add_memory(name: str, size: int, basis: str) -> None:
        room = "" if is_cpu else f" of {gib(machine.memory)} GiB"
        add(f"memory, {name}", f"{gib(size)} GiB{room}", basis, size / GIB, "GiB")

    add("target", f"{target.parameters / 1e6:,.1f} M weights ({target_config.model_type})", EXACT, target.parameters)
    reason = "the most tokens a pass where authors compared families; vLLM drafts with it on a GPU only"
    if drafter.family == "eagle3":
        reason = "every engine reads it, vLLM on a CPU too" if is_cpu else "the least memory; DSpark does not fit"
    add("family", plan.config.title, GIVEN if args.family else f"{THUMB}: {reason}")
    basis = "as published"
    if drafter.drafts_whole_blocks:
        basis = f"{THUMB}: one for {TARGET_LAYERS_PER_LAYER} of the target's, at most {MOST_LAYERS}"
    add("layers", f"{drafter.layers}", GIVEN if args.num_hidden_layers else basis, drafter.layers)
    vocab = f"{drafter.vocab:,} of {target.vocab:,} tokens"
    add(
        "draft vocabulary",
        vocab,
        f"{THUMB}: as `sft` chooses" if args.draft_vocab_size is None else GIVEN,
        drafter.vocab,
    )
    add("drafter", f"{drafter.parameters / 1e6:,.1f} M weights", EXACT, drafter.parameters)
    texts = f"{run.prompts:,}, of up to {run.prompt:,} + {run.response:,} tokens"
    add("prompts", texts, GIVEN if args.num_prompts != NUM_PROMPTS else THUMB, run.prompts)

    together = _halve(planning.DECODED_TOGETHER, machine, lambda n: planning.decoding_bytes(run, n))
    batch = _halve(8, machine, lambda n: planning.reading_bytes(run, fits["sft"].stages, fits["sft"].rows, n))
    served = f"does not fit on one card ({gib(2 * target.parameters)} GiB of weights): a vLLM server"
    if together:
        add_memory("generate", planning.decoding_bytes(run, together), EXACT)
    else:
        add("memory, generate", served, EXACT)
    if delivered and batch:
        add_memory("read", planning.reading_bytes(run, fits["sft"].stages, fits["sft"].rows, batch), on_memory)
    elif delivered:
        add("memory, read", served, EXACT)
    for stage, title in (("sft", "sft"), ("opd", "opd")):
        add_memory(title, fits[stage].peak, on_memory)
    add("launch", plan.launch.replace(planning.ONE, "one process") if is_cpu else plan.launch, EXACT)

    seconds: dict[str, float | None] = {"generate": planning.decoding_seconds(run, machine, together or 32)}
    if delivered:
        seconds["read"] = planning.reading_seconds(run, machine)
    for stage in ("sft", "opd"):
        seconds[stage] = _training(plan, stage, delivered=delivered)
    for stage, value in seconds.items():
        if value is not None:
            basis = f"{THUMB}: weights and cache read once a token" if stage == "generate" else SPEED
            add(f"time, {stage}", f"{show_seconds(value)} on {machine.gpu.name}", basis, value, "s")
        elif stage in fits:
            flops = planning.training_flops(run, stage, fits[stage], delivered=delivered)
            add(f"work, {stage}", f"{flops / 1e15:,.3g} PFLOP", EXACT, flops, "FLOP")
    if machine.gpu is None:
        notes.append("Seconds are not computed for this machine: give `sft` and `opd` `--max-steps 5` first, and see.")
    if is_cpu:
        notes.append(
            "Memory comes on top of that of Python and its libraries. `--bf16 true` is for CPUs with AVX512-BF16 or "
            "AMX; leave it out on others."
        )
    add("disk, responses", show_bytes(run.responses_bytes), f"{EXACT}, before compression", run.responses_bytes, "B")
    where = "" if delivered else " (not planned: the target reads in process)"
    add("disk, readings", show_bytes(run.readings_bytes) + where, EXACT, run.readings_bytes, "B")

    if not delivered and machine.gpu is not None and machine.count == 1:
        saved = sum(seconds[stage] - _training(plan, stage, delivered=True) for stage in fits)
        once = show_seconds(planning.reading_seconds(run, machine) or 0.0)
        notes.append(
            f"`--readings` would store what the target makes of the texts: {show_bytes(run.readings_bytes)}, and "
            f"{show_seconds(saved)} less of training for {once} of reading ({SPEED})."
        )
    notes.append("Every text is counted at its longest: shorter ones take less time and disk in proportion.")
    notes.append(f"Draft-OPD is planned with tau {run.tau:g} ({GIVEN if args.tau else THUMB}).")
    if getattr(target_config, "quantization_config", None):
        notes.append("The target is quantised: its weights are counted in bfloat16, and take less.")
    if drafter.drafts_whole_blocks:
        notes.append("If the tokenizer has no free id for the mask, `sft` lists some for `--mask-token-id`.")
    plan.commands.extend(_commands(plan, args, together, batch))


def _training(plan: Plan, stage: str, *, delivered: bool) -> Any:
    """Return the seconds of a stage's training, `None` where no speed is known."""
    from ..costs.planning import training_seconds

    return training_seconds(plan.run, stage, plan.fits[stage], plan.machine, delivered=delivered)


def _halve(most: int, machine: Any, size: Any) -> int:
    """Return the largest of `most`, its half and so on with which what `size` says fits; 0 if none does."""
    from ..costs.memory import PLANNED_SHARE

    while most and machine.memory is not None and size(most) > PLANNED_SHARE * machine.memory:
        most //= 2
    return most


def _line(words: str, **flags: Any) -> str:
    """Return a command; a flag that is `None` or `False` is left out, one that is `True` has no value."""
    parts = []
    for name, value in flags.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            parts += [f"--{name.replace('_', '-')}", *map(str, values)]
    return f"{words} {shlex.join(parts)}"


def _commands(plan: Plan, args: PlanArguments, together: int, batch: int) -> list[str]:
    """Return the commands of the plan, in their order."""
    from ..costs import planning

    run, fits, is_cpu = plan.run, plan.fits, plan.machine.memory is None
    delivered = plan.launch == planning.DELIVERED
    kwargs = None if args.thinking is None else json.dumps({"enable_thinking": args.thinking})
    common = {"target": args.target, "target_revision": args.target_revision, "dataset": args.dataset}
    texts = {"max_prompt_length": run.prompt, "chat_template_kwargs": kwargs}
    answers = {"max_completion_length": run.response}
    engine = {} if together else {"engine": "vllm", "base_url": SERVER}
    size = None if together in (0, planning.DECODED_TOGETHER) else together
    command = "trl-draft-opd"
    found = [_line(f"{command} generate", **common, output="responses", **texts, **answers, **engine, batch_size=size)]
    if delivered:
        served = {} if batch else {"engine": "vllm", "base_url": SERVER, "shared_folder": SHARED_FOLDER}
        reads = {"target_layer_ids": list(plan.config.target_layer_ids), "output": "readings"}
        size = None if batch in (0, 8) else batch
        reads |= {"responses": "responses", "batch_size": size, **served}
        if not batch:
            found.append(_line(f"{command} read", **common, **texts, **reads, print_server=True))
        found.append(_line(f"{command} read", **common, **texts, **reads))
    begin = command
    if plan.machine.count > 1:
        file = {"DDP": "multi_gpu", "ZeRO-2": "zero2"}.get(plan.launch, "fsdp2")
        begin = f"accelerate launch --config_file examples/accelerate_configs/{file}.yaml"
        begin += f" --num_processes {plan.machine.count} -m trl_draft_opd"
    shared = common | {"responses": "responses", **texts, **answers, "readings": "readings" if delivered else None}
    shared |= {"shard_target": plan.launch == planning.SHARED_LAUNCHES[-1], "use_cpu": is_cpu}
    shared |= {"bf16": "true" if is_cpu else None}

    def sizes(stage: str) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": fits[stage].rows,
            "gradient_accumulation_steps": fits[stage].accumulation,
            "activation_checkpointing": fits[stage].checkpointing,
            "num_train_epochs": run.epochs(stage),
        }

    has_layers = run.drafter.drafts_whole_blocks
    fresh = {"family": run.drafter.family, "num_hidden_layers": run.drafter.layers if has_layers else None}
    fresh |= {"draft_vocab_size": args.draft_vocab_size, "regenerate": True, "max_length": run.length}
    found.append(_line(f"{begin} sft", **fresh, **shared, **sizes("sft"), output_dir="drafter-sft"))
    found.append(_line(f"{begin} opd", drafter="drafter-sft", **shared, **sizes("opd"), output_dir="drafter-opd"))
    return found


def run_plan(argv: Sequence[str]) -> int:
    """Print what a run would take, and the commands that make it."""
    (args,) = parse("plan", [PlanArguments], argv)
    plan = make_plan(args)
    widths = [
        max(len(text) for text in column) for column in zip(*((x.name, x.value) for x in plan.lines), strict=True)
    ]
    for line in plan.lines:
        print(f"{line.name:{widths[0]}}  {line.value:{widths[1]}}  {line.basis}")
    print(*("", *plan.notes), sep="\n")
    print(f"\nCommands, where {args.dataset} holds the {plan.run.prompts:,} prompts:\n")
    print(*plan.commands, sep="\n")
    lines = [asdict(line) for line in plan.lines]
    write_json(args.json, {"lines": lines, "notes": plan.notes, "commands": plan.commands})
    return 0
