# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The commands that decode: `evaluate` and `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from ..drafters.auto import AutoDrafter
from ..drafters.base import Drafter
from ..evaluation import (
    EVALUATION_LENGTHS,
    EvaluationReport,
    evaluate_drafter,
    explain_difference,
    explain_replay,
)
from ..export import hub_id_of
from ..export.card import CARD_FILE
from ..export.record import (
    TrainingRecord,
    check_prompt_set,
    describe_target,
    describe_versions,
    measurement_of,
    prompts_digest,
    read_record,
)
from ..export.serving import SERVING_FILE
from ..export.texts import add_measurement, read_publication
from ..readings.opening import check_servers, open_readings
from ..responses import (
    CHECKED_ROWS,
    Origin,
    ResponseStore,
    ServerSettings,
    generate_missing,
    summarize_store,
    write_responses,
)
from ..rollout.drafting import check_min_confidence
from ..runs.checkpoints import MANIFEST
from ..target.frozen import FrozenTarget
from ..target.lengths import TRAINING_LENGTHS, Lengths
from ..trainer.common_config import length_help
from ..trainer.delivery import check_texts
from ..trainer.pair import check_pair
from ..trainer.texts import describe_unwritten
from ..utils.atomic_files import check_place
from ..utils.secrets import read_key
from ..utils.settings import check_at_least, check_settings
from .arguments import (
    RowsArguments,
    SamplingArguments,
    TargetArguments,
    default_of,
    flag,
    parse,
    print_next,
    unless_default,
    write_json,
)
from .reporting import PROMPTS_KEY, ReportArguments, check_same, measure_gain


def check_recordable(prompt_set: str, drafter: str) -> None:
    """Raise `ValueError` where numbers of a set of prompts could not be put into the record of a drafter's folder."""
    check_prompt_set(prompt_set)
    folder = Path(drafter)
    if not folder.is_dir():
        raise ValueError(f"`--record` writes into the drafter's folder, and {drafter!r} is none.")
    if (folder / MANIFEST).is_file():
        raise ValueError(
            f"`--record` cannot write into the checkpoint {drafter!r}, whose files are proven by their hashes. "
            "Measure the saved drafter in `output_dir`, or an export of the checkpoint."
        )
    read_record(folder)
    if (folder / SERVING_FILE).is_file():
        read_publication(folder)


def fresh_record(target: FrozenTarget, args: TargetArguments, family: str) -> TrainingRecord:
    """Return the record of a drafter whose folder has none."""
    facts = describe_target(
        target.config,
        name=hub_id_of(args.target),
        revision=args.target_revision,
        dtype=target.causal_lm.dtype,
        num_parameters=target.num_parameters,
    )
    return TrainingRecord(facts, family, stages=[], measurements=[], versions=describe_versions())


def print_recorded(folder: Path, names: Sequence[str]) -> None:
    """Say which files of a drafter's folder hold what was measured."""
    after = "" if CARD_FILE in names else "; the card of its next export will have it"
    print(f"Recorded in {', '.join(str(folder / name) for name in names)}{after}.")


@dataclass(kw_only=True)
class EvaluateArguments(ReportArguments, TargetArguments, RowsArguments, SamplingArguments):
    """Flags of `evaluate`."""

    _argument_group_name = "evaluation"

    drafter: str = flag("Hub id or path of the drafter, in any published layout.")
    num_drafts: int | None = flag("Drafts per block; the drafter's own number if unset.", default=None)
    draft_sampling: Literal["greedy", "sample"] = flag(
        "`greedy`: drafts are the drafter's argmax; `sample`: they are drawn from its distribution.",
        default=default_of(evaluate_drafter, "draft_sampling"),
    )
    min_confidence: float | None = flag(
        "Verify a block only while the running product of the drafter's confidences is at least this, in (0, 1].",
        default=None,
    )
    max_completion_length: int | None = flag(length_help(EVALUATION_LENGTHS), default=None)
    ignore_eos: bool = flag(
        "Decode exactly --max-completion-length, to compare with an engine that counts past the end of sequence.",
        default=default_of(evaluate_drafter, "ignore_eos"),
    )
    batch_size: int = flag("Prompts decoded together.", default=default_of(evaluate_drafter, "batch_size"))
    seed: int = flag("Seed of draws and bootstrap.", default=default_of(evaluate_drafter, "seed"))
    responses: str | None = flag(
        "Folder of `generate` to measure along by replay, in place of live decoding; what it lacks is added. A target "
        "that cannot be rolled back is always measured so, and its responses are kept nowhere if unset.",
        default=None,
    )
    readings: str | None = flag(
        "Folder of `read`, or addresses of vLLM servers separated by commas, that read the texts of --responses. The "
        "target is loaded without its body then, and nothing is decoded.",
        default=None,
    )
    shared_folder: str | None = flag("Folder in which servers leave states, as this machine sees it.", default=None)
    api_key_file: str | None = flag("File with the servers' API key.", default=None)
    json: str | None = flag("File to write the numbers to.", default=None)
    record: str | None = flag(
        "Put the numbers into the record of the drafter's folder, and of an export onto its card, under this name of "
        "the prompts: a Hub id or one word.",
        default=None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "num_drafts", "max_completion_length", "batch_size")
        check_settings(self)
        check_min_confidence(self.min_confidence)
        check_servers(self.readings, self.shared_folder, self.api_key_file)
        if self.readings is not None and self.responses is None:
            raise ValueError(
                "`--readings` takes the target's decoder layers out, so tau is measured by replay along stored "
                "responses. Name their folder in `--responses`, or leave `--readings` out to decode live."
            )

    def open_source(
        self,
        target: FrozenTarget,
        drafter: Drafter,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]] | None,
    ) -> None:
        """Have the target read the texts from where `--readings` says, if it does; refuse what is not there."""
        if self.readings is None or responses is None:
            return
        source = open_readings(
            target,
            self.readings,
            drafter.config.target_layer_ids,
            shared_folder=self.shared_folder,
            api_key_file=self.api_key_file,
        )
        target.source = source
        texts = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        check_texts(target, texts, range(len(texts)), "the dataset")
        source.expect(texts)

    def stored_responses(
        self, target: FrozenTarget, prompts: Sequence[Sequence[int]], lengths: Lengths
    ) -> list[list[int]] | None:
        """Return the target's responses to the prompts, if `--responses` names a store; it writes what is missing."""
        if self.responses is None:
            return None
        reader = target.text_reader(**self.reading(lengths.prompt))
        settings = {"sampling": self.sampling_settings(), "max_completion_length": lengths.completion}
        store = ResponseStore.open(self.responses, Origin.of(target, reader, **settings))
        missing = store.missing(prompts)
        if missing and not target.has_body:
            first = next(row for row, prompt in enumerate(prompts) if store.find(prompt) is None)
            raise ValueError(describe_unwritten(target, store, len(missing), first))
        sizes = {"batch_size": self.batch_size, "shard_size": default_of(write_responses, "shard_size")}
        generate_missing(store, target, prompts, **sizes, seed=self.seed, show_progress=True)
        return [found for prompt in prompts if (found := store.find(prompt)) is not None]

    def check_record(self) -> None:
        """Raise `ValueError` where `--record` could not be kept to, before anything is measured."""
        if self.record is None:
            return
        if self.min_confidence is not None:
            raise ValueError("`--record` keeps the numbers of whole blocks. Leave out `--min-confidence`.")
        check_recordable(self.record, self.drafter)

    def add_to_record(self, report: EvaluationReport, target: FrozenTarget, family: str, prompts_sha256: str) -> None:
        """Put what was measured where `--record` says, or say how it gets there."""
        folder = Path(self.drafter)
        if self.record is None:
            if folder.is_dir() and not (folder / MANIFEST).is_file():
                print("With `--record NAME`, such numbers go into the drafter's record, from which cards are written.")
            return
        measurement = measurement_of(
            report,
            prompt_set=self.record,
            prompts_sha256=prompts_sha256,
            target_dtype=str(target.causal_lm.dtype).removeprefix("torch."),
        )
        print_recorded(folder, add_measurement(folder, measurement, lambda: fresh_record(target, self, family)))


def run_evaluate(argv: Sequence[str]) -> int:
    """Measure a drafter; see [`evaluate_drafter`]."""
    (args,) = parse("evaluate", [EvaluateArguments], argv)
    sampling = args.sampling_settings()
    args.check_record()
    earlier = args.check_report()
    target = args.load_target(body=args.readings is None)
    drafter = AutoDrafter.from_pretrained(args.drafter, num_target_layers=target.num_layers).eval()
    check_pair(drafter, target)
    target.place(torch.accelerator.current_accelerator(True) or torch.device("cpu"))
    num_drafts = drafter.default_num_drafts if args.num_drafts is None else args.num_drafts
    lengths = args.fit_lengths(target, args.max_completion_length, num_drafts=num_drafts, defaults=EVALUATION_LENGTHS)
    prompts = args.read_prompts(target, lengths.prompt)
    digest = prompts_digest(prompts)
    if earlier is not None:
        now = vars(args) | {"num_drafts": num_drafts, "max_completion_length": lengths.completion}
        check_same(*earlier, num_prompts=len(prompts), prompts_sha256=digest, conditions=now)
    drafter = drafter.to(target.device)
    collector = args.collector(target, drafter)
    responses = args.stored_responses(target, prompts, lengths)
    args.open_source(target, drafter, prompts, responses)
    report = evaluate_drafter(
        target,
        drafter,
        prompts,
        num_drafts=num_drafts,
        max_completion_length=lengths.completion,
        sampling=sampling,
        draft_sampling=args.draft_sampling,
        min_confidence=args.min_confidence,
        batch_size=args.batch_size,
        ignore_eos=args.ignore_eos,
        responses=responses,
        seed=args.seed,
        on_rollout=collector,
    )
    Console().print(report.table(f"{args.drafter} for {args.target}"))
    if report.is_replay:
        print(explain_replay(target.rollback_reason))
    if report.num_different:
        print(explain_difference(target.causal_lm.dtype))
    before = None if earlier is None else earlier[0]
    write_json(args.json, report.to_dict() | {PROMPTS_KEY: digest} | measure_gain(before, report))
    args.write_report(
        (args.drafter, args.target),
        drafter.config,
        target.num_parameters,
        report,
        before,
        [] if collector is None else collector.kept,
    )
    args.add_to_record(report, target, drafter.config.family, digest)
    return int(bool(report.num_different) and target.causal_lm.dtype == torch.float32)


@dataclass(kw_only=True)
class GenerateArguments(TargetArguments, RowsArguments, SamplingArguments):
    """Flags of `generate`."""

    _argument_group_name = "responses"

    output: str = flag("Folder for the responses; those that it holds are kept.")
    engine: Literal["transformers", "vllm", "sglang", "dataset"] = flag(
        "Source of the responses: the target in this process, a server, or the dataset itself, taken on trust.",
        default=default_of(write_responses, "engine"),
    )
    max_completion_length: int | None = flag(length_help(TRAINING_LENGTHS), default=None)
    batch_size: int = flag(
        "Prompts that transformers decodes together.", default=default_of(write_responses, "batch_size")
    )
    shard_size: int = flag(
        "Responses per file; what has come in after a minute is written all the same.",
        default=default_of(write_responses, "shard_size"),
    )
    seed: int = flag("Seed of draws at a temperature above 0.", default=default_of(write_responses, "seed"))
    num_proc: int | None = flag("Processes that tokenize.", default=None)
    check_rows: int | None = flag(
        f"Responses to compare with the target afterwards; {CHECKED_ROWS} if unset, none if this process wrote them.",
        default=None,
    )
    base_url: str | None = flag("Address of the vLLM or SGLang server.", default=None)
    served_model_name: str | None = flag(
        "The server's name for the target; if unset, the server is asked and must serve one model only.",
        default=ServerSettings.model,
    )
    api_key_file: str | None = flag("File with the server's API key.", default=None)
    timeout: float = flag("Seconds without a reply before a request is sent again.", default=ServerSettings.timeout)
    concurrency: int = flag("Requests at a time.", default=ServerSettings.concurrency)
    json: str | None = flag("File to write the numbers to.", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "max_completion_length", "batch_size", "shard_size", "num_proc")
        check_at_least(self, 0, "check_rows")

    def server(self) -> ServerSettings | None:
        """Return the server that the flags name, if they do; refuse flags that contradict each other."""
        names = ("base_url", "served_model_name", "api_key_file", "timeout", "concurrency")
        given = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        is_served = self.engine in ("vllm", "sglang")
        if not is_served and not given:
            return None
        if not is_served or self.base_url is None:
            raise ValueError(
                "`--engine vllm` and `--engine sglang` need `--base-url`, and other engines take no server flags; got "
                f"`--engine {self.engine}` with {sorted(given)}."
            )
        return ServerSettings(
            base_url=self.base_url,
            engine=self.engine,
            model=self.served_model_name,
            concurrency=self.concurrency,
            timeout=self.timeout,
            api_key=None if self.api_key_file is None else read_key(self.api_key_file),
        )


def run_generate(argv: Sequence[str]) -> int:
    """Write the target's responses to prompts; see [`write_responses`]."""
    (args,) = parse("generate", [GenerateArguments], argv)
    check_place(Path(args.output), "`--output`")
    server, rows = args.server(), args.load_rows()
    target = args.load_target()
    lengths = args.fit_lengths(target, args.max_completion_length, num_drafts=0, defaults=TRAINING_LENGTHS)
    # The accelerator belongs to the server, if there is one.
    accelerator = torch.accelerator.current_accelerator(True)
    if server is None and accelerator is not None:
        target.place(accelerator)
    store = write_responses(
        target,
        rows,
        args.output,
        sampling=args.sampling_settings(),
        max_completion_length=lengths.completion,
        engine=args.engine,
        server=server,
        reader=target.text_reader(**args.reading(lengths.prompt), num_proc=args.num_proc),
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        seed=args.seed,
    )
    # Responses decoded in this process need no check by the same target.
    num_checked = 0 if args.engine == "transformers" else CHECKED_ROWS
    summary = summarize_store(store, target, num_checked if args.check_rows is None else args.check_rows)
    print("\n".join(summary["lines"]))
    print_next(
        "sft",
        family="eagle3",
        target=args.target,
        dataset=args.dataset,
        regenerate=True,
        responses=args.output,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
        max_completion_length=unless_default(args, "max_completion_length"),
    )
    write_json(args.json, summary)
    return 0
