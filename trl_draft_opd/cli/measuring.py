# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The commands that decode: `evaluate` and `generate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .reading import READING, command_parser, given, load_rows, parse_flags, read_prompts


if TYPE_CHECKING:
    from ..responses import ServerSettings


def run_evaluate(argv: Sequence[str]) -> int:
    """Measure a drafter; exit code 1 when a greedy float32 output is not the target's own."""
    integers = "num-prompts max-new-tokens num-drafts top-k batch-size seed"
    parser = command_parser(run_evaluate, "target drafter dataset", integers)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--draft-sampling", choices=("greedy", "sample"))
    parser.add_argument("--ignore-eos", action="store_true", default=None)
    parser.add_argument("--chat-template-kwargs", type=json.loads, metavar="JSON")
    parser.add_argument("--target-dtype", help="float32 where outputs must agree to the last token")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    options = parse_flags(parser, argv)
    import torch
    from rich.console import Console

    from ..drafters.auto import AutoDrafter
    from ..evaluation import evaluate_drafter
    from ..rollout.acceptance import SamplingSettings
    from ..target.frozen import FrozenTarget
    from ..trainer.draft_opd_config import DraftOPDConfig
    from ..trainer.pair import check_pair

    distribution = {name: getattr(DraftOPDConfig, name) for name in ("temperature", "top_k", "top_p")}
    sampling = SamplingSettings(**distribution | given(options, distribution))
    rows = load_rows(options.dataset, options.dataset_config, options.split)
    if options.num_prompts is not None:
        rows = rows.select(range(min(options.num_prompts, len(rows))))
    dtype = options.target_dtype or DraftOPDConfig.target_dtype
    target = FrozenTarget.load(options.target, dtype=dtype, trust_remote_code=options.trust_remote_code)
    drafter = AutoDrafter.from_pretrained(options.drafter, num_target_layers=target.num_layers).eval()
    check_pair(drafter, target)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    target.place(device)
    names = ("num_drafts", "max_new_tokens", "draft_sampling", "batch_size", "ignore_eos", "seed")
    reading = dict.fromkeys(READING) | {"max_prompt_length": DraftOPDConfig.max_prompt_length}
    prompts = read_prompts(target, rows, reading | given(options, ["chat_template_kwargs"]))
    report = evaluate_drafter(target, drafter.to(target.device), prompts, sampling=sampling, **given(options, names))
    Console().print(report.table(f"{options.drafter} for {options.target}"))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
    return int(bool(report.num_different) and target.causal_lm.dtype == torch.float32)


def read_server(options: argparse.Namespace) -> ServerSettings | None:
    """Return the server that the flags of `generate` name, or `None`; refuse flags that do not go together."""
    flags = given(options, ("base_url", "model", "api_key_file", "timeout", "concurrency"))
    if options.engine not in ("vllm", "sglang") and not flags:
        return None
    if options.engine not in ("vllm", "sglang") or "base_url" not in flags:
        raise ValueError(
            f"`--engine vllm` and `--engine sglang` need `--base-url`, other engines take no flag of a server; got {sorted(flags)}."
        )
    from ..responses import ServerSettings

    if "api_key_file" in flags:
        flags["api_key"] = flags.pop("api_key_file").read_text("utf-8").strip()
    return ServerSettings(engine=options.engine, **flags)


def run_generate(argv: Sequence[str]) -> int:
    """Write the target's responses to prompts once, to train on them many times; the same command resumes."""
    integers = (
        "max-new-tokens top-k batch-size concurrency shard-size max-prompt-length num-prompts num-proc check-rows seed"
    )
    parser = command_parser(run_generate, "target dataset output", integers)
    parser.add_argument("--engine", choices=("transformers", "vllm", "sglang", "dataset"))
    parser.add_argument("--base-url", metavar="URL", help="address of the vLLM or SGLang server")
    parser.add_argument("--model", metavar="NAME", help="name the server serves the target under")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the server's key")
    parser.add_argument("--timeout", type=float, metavar="SECONDS")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--chat-template-kwargs", type=json.loads, metavar="JSON")
    parser.add_argument("--target-dtype")
    parser.add_argument("--revision", help="revision of the target")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    options = parse_flags(parser, argv)
    server = read_server(options)
    import torch

    from ..responses import CHECKED_ROWS, summarize_store, write_responses
    from ..rollout.acceptance import SamplingSettings
    from ..target.frozen import FrozenTarget
    from ..trainer.draft_opd_config import DraftOPDConfig

    distribution = {name: getattr(DraftOPDConfig, name) for name in ("temperature", "top_k", "top_p")}
    rows = load_rows(options.dataset, options.dataset_config, options.split)
    if options.num_prompts is not None:
        rows = rows.select(range(min(options.num_prompts, len(rows))))
    target = FrozenTarget.load(
        options.target,
        dtype=options.target_dtype or DraftOPDConfig.target_dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    # Beside a server, the accelerator is the server's.
    if server is None and torch.accelerator.is_available():
        target.place(torch.accelerator.current_accelerator())
    names = ("engine", "batch_size", "shard_size", "seed")
    store = write_responses(
        target,
        rows,
        options.output,
        sampling=SamplingSettings(**distribution | given(options, distribution)),
        max_new_tokens=options.max_new_tokens or DraftOPDConfig.max_completion_length,
        reader=target.text_reader(
            max_prompt_length=options.max_prompt_length or DraftOPDConfig.max_prompt_length,
            chat_template_kwargs=options.chat_template_kwargs,
            num_proc=options.num_proc,
        ),
        server=server,
        **given(options, names),
    )
    # Text decoded in this process needs no check by the same target.
    num_checked = 0 if options.engine in (None, "transformers") else CHECKED_ROWS
    summary = summarize_store(store, target, num_checked if options.check_rows is None else options.check_rows)
    print("\n".join(summary["lines"]))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return 0
