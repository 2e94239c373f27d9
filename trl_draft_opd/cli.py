# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The command `trl-draft-opd`: reads flags and files, calls the library, prints, and turns user errors into one line.

Holds no default that a config or the library already has. Heavy imports stand inside the commands, so that help is quick.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__


if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from .drafters.base import Drafter
    from .target import FrozenTarget
    from .trainer.common_config import DraftTrainingConfig
    from .trajectories import ServerSettings


USAGE = "trl-draft-opd [--debug] COMMAND [FLAGS]"
# What `from_target` takes, by family.
FAMILY_OPTIONS = {
    "dflash": ("block_size", "num_hidden_layers", "mask_token_id"),
    "eagle3": ("ttt_steps", "draft_vocab_size"),
}
FRESH_OPTIONS = (*FAMILY_OPTIONS["dflash"], *FAMILY_OPTIONS["eagle3"], "target_layer_ids")
# How text becomes token ids, besides the target's tokenizer.
READING = ("max_prompt_length", "chat_template", "chat_template_kwargs", "num_proc")
FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def _unset(help: str):
    return field(default=None, metadata={"help": help})


@dataclass
class DraftScriptArguments:
    """What `sft` and `opd` train and on what; unset options of a fresh drafter are left to its `from_target`."""

    target_model_name_or_path: str = field(metadata={"help": "Hub id or path of the target."})
    dataset_name: str = field(metadata={"help": "Hub id, folder, or .json/.jsonl/.parquet/.csv file."})
    model_name_or_path: str | None = _unset("Hub id or path of the drafter.")
    family: str | None = _unset("Make a fresh drafter: dflash or eagle3 (sft only).")
    dataset_config: str | None = _unset("Name of the dataset's configuration.")
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = _unset("Split to evaluate on.")
    block_size: int | None = _unset("Fresh DFlash: anchor and drafts per block.")
    num_hidden_layers: int | None = _unset("Fresh DFlash: layers.")
    mask_token_id: int | None = _unset("Fresh DFlash: an id that text never uses.")
    ttt_steps: int | None = _unset("Fresh EAGLE-3: steps of training-time test.")
    draft_vocab_size: int | None = _unset("Fresh EAGLE-3: tokens it can propose, the commonest of the training split.")
    target_layer_ids: list[int] | None = _unset("Fresh drafter: 0-based target layers to read, ascending.")


def refuse_unknown(unknown: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise `ValueError` that names unknown flags or keys, each with the nearest known one."""
    words = list(unknown)
    names = [word.split("=")[0] for word in words if word.startswith("-")] or words
    hints = []
    for name in names:
        near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
        hints.append(f"{name} (did you mean {near[0]}?)" if near else name)
    if hints:
        raise ValueError(f"Unknown in {where}: {', '.join(hints)}. `--help` lists what there is.")


def command_parser(command: str, required: str, integers: str) -> argparse.ArgumentParser:
    """Return the parser of a command with its required and its whole-number flags, and those every command has."""
    description = COMMANDS[command].__doc__
    parser = argparse.ArgumentParser(prog=f"trl-draft-opd {command}", description=description, allow_abbrev=False)
    for name in required.split():
        parser.add_argument(f"--{name}", required=True)
    for name in integers.split():
        parser.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--dataset-config", help="name of the dataset's configuration")
    parser.add_argument("--split", default="train", help="split of the dataset")
    return parser


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of a command, refusing unknown ones by name."""
    namespace, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, list(parser._option_string_actions), "the command line")
    return namespace


def given(namespace: argparse.Namespace | DraftScriptArguments, names: Iterable[str]) -> dict:
    """Return the options that were set, by name."""
    return {name: getattr(namespace, name) for name in names if getattr(namespace, name) is not None}


def parse_training(command: str, config_class: type, argv: Sequence[str]) -> tuple:
    """Read flags and the YAML file of `--config` into [`DraftScriptArguments`] and a trainer's config."""
    from trl import TrlParser

    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words[-1:] == ["--config"]:
        raise ValueError("`--config` needs the path of a YAML file behind it.")
    parser = TrlParser(
        [DraftScriptArguments, config_class],
        prog=f"trl-draft-opd {command}",
        usage=f"trl-draft-opd {command} [--config FILE.yaml] [FLAGS]",
        allow_abbrev=False,
    )
    script, training, config_rest, flags_rest = parser.parse_args_and_config(
        words, return_remaining_strings=True, separate_remaining_strings=True
    )
    known = [flag for flag in parser._option_string_actions if "_" not in flag]
    refuse_unknown(config_rest[::2], known, "the config file")
    refuse_unknown(flags_rest, known, "the command line")
    return script, training


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """Load one split of a Hub dataset, of a folder, or of a file, which is one split called `train`."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    kind = FILE_KINDS.get(path.suffix)
    if kind is not None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no dataset file {name!r}.")
        return load_dataset(kind, data_files=str(path), split=split)
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        return load_dataset(name, config, split=split)
    saved = load_from_disk(name)
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"The folder {name!r} holds the splits {sorted(splits)}, not {split!r}.")
    return splits[split]


def make_drafter(target: FrozenTarget, family: str | None, options: dict, count: Callable) -> Drafter:
    """Return a fresh drafter; `count` is called for a reduced vocabulary only and returns how often each token occurs."""
    from .drafters.dflash import DFlashDraftModel
    from .drafters.eagle3 import Eagle3DraftModel, build_draft_vocabulary

    if family not in FAMILY_OPTIONS:
        raise ValueError(f"`family` must be one of {sorted(FAMILY_OPTIONS)}, got {family!r}.")
    foreign = sorted(set(options) - {"target_layer_ids", *FAMILY_OPTIONS[family]})
    if foreign:
        raise ValueError(f"{foreign} mean nothing to a drafter of family {family!r}. Leave them out.")
    if family == "dflash":
        if "mask_token_id" not in options:
            options = options | {"mask_token_id": target.find_mask_token_id()}
        return DFlashDraftModel.from_target(target, **options)
    size = options.get("draft_vocab_size")
    options = {name: value for name, value in options.items() if name != "draft_vocab_size"}
    if size is None:
        return Eagle3DraftModel.from_target(target, **options)
    vocabulary = build_draft_vocabulary(count(), size, target.eos_token_ids)
    print(f"Draft vocabulary of {size} tokens covers {vocabulary.coverage:.2%} of the supervised tokens.")
    return Eagle3DraftModel.from_target(target, draft_vocabulary=vocabulary, **options)


def count_supervised(target: FrozenTarget, rows: Dataset, reading: dict) -> torch.Tensor:
    """Return how often each token of the target's vocabulary is supervised in a dataset."""
    from .data import tokenize_sft_dataset
    from .drafters.eagle3 import count_tokens

    return count_tokens(tokenize_sft_dataset(rows, **_reader(target), **reading), target.vocab_size)


def read_prompts(target: FrozenTarget, rows: Dataset, reading: dict) -> list[list[int]]:
    """Return the prompts of a dataset as token ids."""
    from .data import tokenize_prompt_dataset

    return list(tokenize_prompt_dataset(rows, **_reader(target), **reading, keep_completions=False)["prompt_ids"])


def _reader(target: FrozenTarget) -> dict:
    from .trainer.setup import require_tokenizer

    tokenizer = require_tokenizer(target)
    return {"tokenizer": tokenizer, "eos_token_ids": target.eos_token_ids, "vocab_size": target.vocab_size}


def run_sft(argv: Sequence[str]) -> int:
    """Train a drafter on text its target wrote."""
    from .trainer.draft_sft_config import DraftSFTConfig
    from .trainer.draft_sft_trainer import DraftSFTTrainer

    script, args = parse_training("sft", DraftSFTConfig, argv)
    fresh = given(script, FRESH_OPTIONS)
    if (script.model_name_or_path is None) == (script.family is None) or (script.model_name_or_path and fresh):
        raise ValueError(
            "Give either `model_name_or_path` to go on from a drafter, or `family` to make a fresh one, to which "
            f"{', '.join(FRESH_OPTIONS)} belong."
        )
    if args.regenerate and script.draft_vocab_size is not None:
        raise ValueError(
            "`draft_vocab_size` counts the dataset's completions, which `regenerate` replaces. Leave one of the two out."
        )
    return train(DraftSFTTrainer, script, args)


def run_opd(argv: Sequence[str]) -> int:
    """Improve a trained drafter by on-policy distillation."""
    from .trainer.draft_opd_config import DraftOPDConfig
    from .trainer.draft_opd_trainer import DraftOPDTrainer

    script, args = parse_training("opd", DraftOPDConfig, argv)
    fresh = sorted(given(script, ("family", *FRESH_OPTIONS)))
    if script.model_name_or_path is None or fresh:
        what = f"got {fresh}" if fresh else "got none"
        raise ValueError(
            f"`opd` starts from a trained drafter, `model_name_or_path`; {what}. Train a fresh one by `sft`."
        )
    return train(DraftOPDTrainer, script, args)


def train(trainer_class: type, script: DraftScriptArguments, args: DraftTrainingConfig) -> int:
    """Load, train, save, and push if asked for."""
    from transformers import set_seed

    from .trainer.setup import load_target

    rows = load_rows(script.dataset_name, script.dataset_config, script.dataset_train_split)
    held_out = None
    if script.dataset_test_split is not None:
        held_out = load_rows(script.dataset_name, script.dataset_config, script.dataset_test_split)
    target = load_target(script.target_model_name_or_path, args, None)
    drafter = script.model_name_or_path
    if drafter is None:
        reading = {name: getattr(args, name) for name in (*READING[:3], "max_length")}
        reading["num_proc"] = args.dataset_num_proc
        set_seed(args.seed)
        options = given(script, FRESH_OPTIONS)
        drafter = make_drafter(target, script.family, options, lambda: count_supervised(target, rows, reading))
    trainer = trainer_class(drafter, target, args, train_dataset=rows, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        print(f"The drafter is in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return 0


def run_init(argv: Sequence[str]) -> int:
    """Make a fresh drafter for a target and save it."""
    integers = "block-size num-hidden-layers mask-token-id ttt-steps draft-vocab-size seed"
    parser = command_parser("init", "target output", integers)
    parser.add_argument("--family", required=True, choices=FAMILY_OPTIONS)
    parser.add_argument("--target-layer-ids", type=int, nargs="+", metavar="N", help="0-based, ascending")
    parser.add_argument("--dataset", help="text of the target, whose commonest tokens --draft-vocab-size keeps")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parse_flags(parser, argv)
    if (options.draft_vocab_size is None) != (options.dataset is None):
        raise ValueError("`--draft-vocab-size` and `--dataset` go together: the commonest tokens of the one are kept.")
    from transformers import set_seed

    from .target import FrozenTarget

    target = FrozenTarget.load(options.target, trust_remote_code=options.trust_remote_code)

    def count() -> torch.Tensor:
        rows = load_rows(options.dataset, options.dataset_config, options.split)
        return count_supervised(target, rows, dict.fromkeys((*READING, "max_length")))

    if options.seed is not None:
        set_seed(options.seed)
    drafter = make_drafter(target, options.family, given(options, FRESH_OPTIONS), count)
    drafter.save_pretrained(options.output)
    print(f"A fresh {options.family} drafter of {drafter.num_parameters():,} parameters is in {options.output}")
    return 0


def run_evaluate(argv: Sequence[str]) -> int:
    """Measure a drafter; exit code 1 when a greedy float32 output is not the target's own."""
    integers = "num-prompts max-new-tokens num-drafts top-k batch-size seed"
    parser = command_parser("evaluate", "target drafter dataset", integers)
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

    from .drafters.auto import AutoDrafter
    from .evaluation import evaluate_drafter
    from .target import FrozenTarget
    from .trainer.draft_opd_config import DraftOPDConfig
    from .trainer.setup import check_pair
    from .verification import SamplingSettings

    law = {name: getattr(DraftOPDConfig, name) for name in ("temperature", "top_k", "top_p")}
    sampling = SamplingSettings(**law | given(options, law))
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
    from .trajectories import ServerSettings

    if "api_key_file" in flags:
        flags["api_key"] = flags.pop("api_key_file").read_text("utf-8").strip()
    return ServerSettings(engine=options.engine, **flags)


def run_generate(argv: Sequence[str]) -> int:
    """Write the target's responses to prompts once, to train on them many times; the same command resumes."""
    integers = (
        "max-new-tokens top-k batch-size concurrency shard-size max-prompt-length num-prompts num-proc check-rows seed"
    )
    parser = command_parser("generate", "target dataset output", integers)
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

    from .target import FrozenTarget
    from .trainer.draft_opd_config import DraftOPDConfig
    from .trajectories import CHECKED_ROWS, summarize_store, write_trajectories
    from .verification import SamplingSettings

    law = {name: getattr(DraftOPDConfig, name) for name in ("temperature", "top_k", "top_p")}
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
    names = ("engine", "chat_template_kwargs", "num_proc", "batch_size", "shard_size", "seed")
    store = write_trajectories(
        target,
        rows,
        options.output,
        sampling=SamplingSettings(**law | given(options, law)),
        max_new_tokens=options.max_new_tokens or DraftOPDConfig.max_completion_length,
        max_prompt_length=options.max_prompt_length or DraftOPDConfig.max_prompt_length,
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


def run_demo(argv: Sequence[str]) -> int:
    """Run the whole method in minutes on a CPU: a tiny target, a drafter by SFT, Draft-OPD, tau before and after."""
    integers = "num-prompts max-new-tokens sft-epochs opd-epochs seed"
    parser = command_parser("demo", "", integers)
    parser.add_argument("--family", choices=FAMILY_OPTIONS)
    parser.add_argument("--target", help="a real target's Hub id or path in place of the tiny one; needs --dataset")
    parser.add_argument("--dataset", help="rows with a prompt or messages, for --target")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    options = parse_flags(parser, argv)
    if (options.target is None) != (options.dataset is None):
        raise ValueError("`--target` and `--dataset` go together: the demo's own chats suit its own target only.")
    from .demo.run import DemoSettings
    from .demo.run import run_demo as run

    names = (
        "family",
        "target",
        "dataset",
        "num_prompts",
        "max_new_tokens",
        "sft_epochs",
        "opd_epochs",
        "seed",
        "output",
    )
    settings = DemoSettings(**given(options, names))
    rows = None if options.dataset is None else load_rows(options.dataset, options.dataset_config, options.split)
    run(settings, rows)
    return 0


COMMANDS = {
    "demo": run_demo,
    "generate": run_generate,
    "init": run_init,
    "sft": run_sft,
    "opd": run_opd,
    "evaluate": run_evaluate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*): Words behind the program's name; those of the process by default.

    Returns:
        `int`: 0, or 1 when `evaluate` finds an output that is not the target's own, or 2 after a user's error.
    """
    lines = [f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="trl-draft-opd",
        usage=USAGE,
        epilog="commands:\n" + "\n".join(lines) + "\n\n`trl-draft-opd COMMAND --help` lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's error")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        return COMMANDS[options.command](options.flags)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"trl-draft-opd {options.command}: {error}", file=sys.stderr)
        return 2
