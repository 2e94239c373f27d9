# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The commands that decode: `evaluate` and `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from ..drafters.auto import AutoDrafter
from ..evaluation import evaluate_drafter
from ..responses import CHECKED_ROWS, ServerSettings, summarize_store, write_responses
from ..trainer.common_config import DraftTrainingConfig
from ..trainer.pair import check_pair
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


@dataclass(kw_only=True)
class EvaluateArguments(TargetArguments, RowsArguments, SamplingArguments):
    """Flags of `evaluate`."""

    _argument_group_name = "evaluation"

    drafter: str = flag("Hub id or path of the drafter, in any published layout.")
    num_drafts: int | None = flag("Drafts per block; the drafter's own number if unset.", default=None)
    draft_sampling: Literal["greedy", "sample"] = flag(
        "`greedy`: drafts are the drafter's argmax; `sample`: they are drawn from its distribution.",
        default=default_of(evaluate_drafter, "draft_sampling"),
    )
    max_completion_length: int = flag(
        "Longest response.", default=default_of(evaluate_drafter, "max_completion_length")
    )
    ignore_eos: bool = flag(
        "Decode exactly --max-completion-length, to compare with an engine that counts past the end of sequence.",
        default=default_of(evaluate_drafter, "ignore_eos"),
    )
    batch_size: int = flag("Prompts decoded together.", default=default_of(evaluate_drafter, "batch_size"))
    seed: int = flag("Seed of draws and bootstrap.", default=default_of(evaluate_drafter, "seed"))
    json: str | None = flag("File to write the numbers to.", default=None)


def run_evaluate(argv: Sequence[str]) -> int:
    """Measure a drafter; see [`evaluate_drafter`]."""
    (args,) = parse("evaluate", [EvaluateArguments], argv)
    sampling = args.sampling_settings()
    target = args.load_target()
    drafter = AutoDrafter.from_pretrained(args.drafter, num_target_layers=target.num_layers).eval()
    check_pair(drafter, target)
    target.place(torch.accelerator.current_accelerator(True) or torch.device("cpu"))
    report = evaluate_drafter(
        target,
        drafter.to(target.device),
        args.read_prompts(target),
        num_drafts=args.num_drafts,
        max_completion_length=args.max_completion_length,
        sampling=sampling,
        draft_sampling=args.draft_sampling,
        batch_size=args.batch_size,
        ignore_eos=args.ignore_eos,
        seed=args.seed,
    )
    Console().print(report.table(f"{args.drafter} for {args.target}"))
    write_json(args.json, report.to_dict())
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
    max_completion_length: int = flag("Longest response.", default=DraftTrainingConfig.max_completion_length)
    batch_size: int = flag(
        "Prompts that transformers decodes together.", default=default_of(write_responses, "batch_size")
    )
    shard_size: int = flag(
        "Responses per file; a killed process loses this many at most.",
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
            api_key=None if self.api_key_file is None else Path(self.api_key_file).read_text("utf-8").strip(),
        )


def run_generate(argv: Sequence[str]) -> int:
    """Write the target's responses to prompts; see [`write_responses`]."""
    (args,) = parse("generate", [GenerateArguments], argv)
    server, rows = args.server(), args.load_rows()
    target = args.load_target()
    # The accelerator belongs to the server, if there is one.
    accelerator = torch.accelerator.current_accelerator(True)
    if server is None and accelerator is not None:
        target.place(accelerator)
    store = write_responses(
        target,
        rows,
        args.output,
        sampling=args.sampling_settings(),
        max_completion_length=args.max_completion_length,
        engine=args.engine,
        server=server,
        reader=target.text_reader(**args.reading(), num_proc=args.num_proc),
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
        max_completion_length=unless_default(args, "max_completion_length"),
    )
    write_json(args.json, summary)
    return 0
