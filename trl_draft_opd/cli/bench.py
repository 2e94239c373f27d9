# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The command that measures servers: `bench`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ..data.sent_chats import read_chats
from ..drafters.auto import AutoDrafter
from ..export.record import prompts_digest
from ..export.served import check_machine, served_speed_of
from ..export.texts import add_served_speed
from ..responses import ServerSettings
from ..served_speed.comparison import Comparison, compare
from ..served_speed.measure import measure_servers
from ..served_speed.report import FORMAT_VERSION, LoadSettings, SpeedReport, read_reports
from ..served_speed.showing import check_drawing, comparison_table, draw_curve, level_table, notes
from ..target.frozen import FrozenTarget
from ..target.lengths import TRAINING_LENGTHS, Lengths
from ..utils.atomic_files import write_file
from ..utils.secrets import read_key
from .arguments import RowsArguments, TargetArguments, flag, parse
from .decoding import check_recordable, fresh_record, print_recorded


_LENGTHS = Lengths(TRAINING_LENGTHS.prompt, LoadSettings.max_completion_length)
_SILENCE_SECONDS = 120.0


@dataclass(kw_only=True)
class BenchArguments(TargetArguments, RowsArguments):
    """Flags of `bench`."""

    _argument_group_name = "load"

    base_url: str | None = flag(
        "Address of the server with the drafter, or of the only one; OpenAI-compatible, as vLLM and SGLang are.",
        default=None,
    )
    baseline_url: str | None = flag(
        "Address of a server of the same target without a drafter, to measure against in turns.", default=None
    )
    compare: list[str] | None = flag(
        "Measure nothing, and compare two files of --json: first the plain server's, then the drafter's.", default=None
    )
    target: str | None = flag(
        "Hub id or path of the target, whose tokenizer and template make the prompts.", default=None
    )
    dataset: str | None = flag(
        "Prompts: Hub id, folder, or files (.jsonl, .parquet, .csv, ...; also a pattern).", default=None
    )
    num_prompts: int = flag("Rows to read; each run of a level asks every prompt once.", default=64)
    concurrency: list[int] = flag(
        "Levels of load: requests under way at a time, ascending.",
        default_factory=lambda: list(LoadSettings.concurrency),
    )
    repeats: int = flag("Runs of each level, over which intervals are taken.", default=LoadSettings.repeats)
    warmup: int = flag(
        "Requests before a level that are not counted, times its concurrency.", default=LoadSettings.warmup
    )
    max_seconds: float = flag(
        "Longest time of a run; then nothing more is asked, and what is under way is cut off.",
        default=LoadSettings.max_seconds,
    )
    max_completion_length: int = flag("Tokens per response at most.", default=LoadSettings.max_completion_length)
    temperature: float = flag(
        "Temperature of the target; at 0 the texts of both servers are compared.", default=LoadSettings.temperature
    )
    ignore_eos: bool = flag(
        "Have every response be exactly --max-completion-length tokens long.", default=LoadSettings.ignore_eos
    )
    form: Literal["ids", "text", "chat"] = flag(
        "How prompts are sent: as token ids, as text for servers that take no ids, or as chats that the server's own "
        "template renders.",
        default=LoadSettings.form,
    )
    timeout: float = flag("Seconds of silence after which a server has failed.", default=_SILENCE_SECONDS)
    served_model_name: str | None = flag(
        "The servers' name for the target; if unset, they are asked and must serve one model only.", default=None
    )
    api_key_file: str | None = flag("File with the API key of the server at --base-url.", default=None)
    baseline_api_key_file: str | None = flag("File with the API key of the server at --baseline-url.", default=None)
    json: str | None = flag("File to write the numbers to, after every run.", default=None)
    figure: str | None = flag("File to draw the curve to (.png, .svg, .pdf).", default=None)
    record: str | None = flag(
        "Put the numbers into the record of --drafter, and of an export onto its card, under this name of the "
        "prompts: a Hub id or one word. Needs --machine.",
        default=None,
    )
    drafter: str | None = flag("Folder of the drafter that is served, for --record.", default=None)
    machine: str | None = flag("What the servers run on, in plain words, for --record.", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.load_settings(self.max_completion_length)
        if self.compare is None and (self.base_url is None or self.dataset is None):
            raise ValueError(
                "`bench` needs `--base-url`, `--dataset` and `--target`, or `--compare PLAIN.json DRAFTER.json`."
            )
        if self.compare is not None and (len(self.compare) != 2 or self.base_url or self.baseline_url):
            raise ValueError("`--compare` takes two files, the plain server's first, and no server.")
        if self.target is None and (self.compare is None or self.record is not None):
            raise ValueError("`bench` needs `--target`: its tokenizer makes the prompts, and the record describes it.")
        for name, value in (("json", self.json), ("figure", self.figure)):
            if value is not None and not Path(value).absolute().parent.is_dir():
                raise ValueError(f"`--{name}` {value!r} lies in no folder that exists. Make it first.")
        if self.record is not None:
            if self.drafter is None or self.machine is None:
                raise ValueError("`--record` needs `--drafter`, the folder, and `--machine`, what the servers run on.")
            check_machine(self.machine)
            check_recordable(self.record, self.drafter)
        if self.figure is not None:
            check_drawing()

    def load_settings(self, max_completion_length: int) -> LoadSettings:
        """Return what to ask of a server."""
        return LoadSettings(
            concurrency=tuple(self.concurrency),
            repeats=self.repeats,
            warmup=self.warmup,
            max_seconds=self.max_seconds,
            max_completion_length=max_completion_length,
            temperature=self.temperature,
            ignore_eos=self.ignore_eos,
            form=self.form,
        )

    def servers(self) -> list[ServerSettings]:
        """Return the server, and the baseline behind it if there is one."""
        named = [(self.base_url, self.api_key_file), (self.baseline_url, self.baseline_api_key_file)]
        return [
            ServerSettings(
                base_url=url,
                model=self.served_model_name,
                timeout=self.timeout,
                # A request that is sent again would hide what the failure cost.
                max_retries=0,
                api_key=None if key_file is None else read_key(key_file),
            )
            for url, key_file in named
            if url is not None
        ]

    def prompts(self, target: FrozenTarget, longest: int) -> tuple[list[list[int]], list[Any]]:
        """Return the prompts as token ids, and in the form in which they are sent."""
        reader = target.text_reader(**self.reading(longest))
        rows = self.load_rows()
        read: Any = reader.read_prompts(rows)
        ids = [list(prompt) for prompt in read["prompt_ids"]]
        if self.form == "ids":
            return ids, ids
        if self.form == "text":
            assert target.tokenizer is not None, "the reader has it"
            return ids, [target.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in ids]
        if self.chat_template is not None or self.chat_template_kwargs is not None:
            raise ValueError(
                "With `--form chat` the server renders the chats by its own template. Leave out `--chat-template` and "
                "`--chat-template-kwargs`, or send `--form ids`."
            )
        return ids, read_chats(rows.select(read["sample_id"]))


def run_bench(argv: Sequence[str]) -> int:
    """Measure servers under load; see [`measure_servers`]."""
    (args,) = parse("bench", [BenchArguments], argv)
    if args.compare is not None:
        plain, drafter = (read_reports(path)[0] for path in args.compare)
        _finish(args, [drafter, plain], None)
        return 0
    settings, servers = args.load_settings(args.max_completion_length), args.servers()
    target = args.load_target(body=False)
    lengths = args.fit_lengths(target, args.max_completion_length, num_drafts=0, defaults=_LENGTHS)
    ids, prompts = args.prompts(target, lengths.prompt)
    runs = len(settings.concurrency) * len(servers) * (settings.repeats + bool(settings.warmup))
    print(f"{runs} runs, warm-ups included, of at most {settings.max_seconds:g} s each, {len(prompts)} prompts.")
    reports = measure_servers(
        servers,
        prompts,
        settings,
        prompts_sha256=prompts_digest(ids),
        eos_token_ids=target.eos_token_ids,
        keep=lambda reports: _keep(args.json, reports, None),
    )
    _finish(args, reports, target)
    return 0


def _finish(args: BenchArguments, reports: Sequence[SpeedReport], target: FrozenTarget | None) -> None:
    """Show, draw and record what was measured, of the server and of its baseline if there was one."""
    served, baseline = reports[0], reports[1] if len(reports) > 1 else None
    comparison = None if baseline is None else compare(served, baseline)
    _keep(args.json, reports, comparison)
    console = Console()
    for name, report in zip(("server", "baseline"), reports, strict=False):
        console.print(
            level_table(report, f"{name}: {report.engine or 'unknown engine'} {report.engine_version or ''}")
        )
    if comparison is not None:
        console.print(comparison_table(comparison, "the server against its baseline"))
        print(f"Against the baseline: {comparison.sentence()}.")
    for name, report in zip(("server", "baseline"), reports, strict=False):
        print("\n".join(notes(report, name)) or f"{name}: nothing to note.")
    if args.figure is not None:
        draw_curve(args.figure, served, baseline, comparison)
    if args.record is not None:
        assert args.drafter is not None and args.machine is not None, "`__post_init__`"
        folder, described = Path(args.drafter), target or args.load_target(body=False)
        speed = served_speed_of(served, baseline, comparison, prompt_set=args.record, machine=args.machine)
        names = add_served_speed(
            folder,
            speed,
            lambda: fresh_record(described, args, AutoDrafter.from_pretrained(folder).config.family),
        )
        print_recorded(folder, names)


def _keep(path: str | None, reports: Sequence[SpeedReport], comparison: Comparison | None) -> None:
    """Write what was measured so far to the file of `--json`, whole."""
    if path is None:
        return
    content = {
        "format_version": FORMAT_VERSION,
        "served": reports[0].to_dict(),
        "baseline": reports[1].to_dict() if len(reports) > 1 else None,
        "comparison": None if comparison is None else comparison.to_dict(),
    }
    write_file(Path(path), (json.dumps(content, indent=1) + "\n").encode())
