# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Flags, files and fresh drafters: what the commands read before they call the library."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import LoraConfig

    from ..drafters.base import Drafter
    from ..target.frozen import FrozenTarget


# What `from_target` takes, by family.
FAMILY_OPTIONS = {
    "dflash": ("block_size", "num_hidden_layers", "mask_token_id"),
    "eagle3": ("ttt_steps", "draft_vocab_size"),
}
FRESH_OPTIONS = (*FAMILY_OPTIONS["dflash"], *FAMILY_OPTIONS["eagle3"], "target_layer_ids")
# What `--use_peft` takes, and what `peft.LoraConfig` calls it.
LORA_OPTIONS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
}
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
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter in place of the whole drafter."})
    lora_r: int | None = _unset("Rank of the adapter; PEFT's default if unset.")
    lora_alpha: int | None = _unset("The adapter is scaled by this over its rank; PEFT's default if unset.")
    lora_dropout: float | None = _unset("Dropout in the adapter; PEFT's default if unset.")
    lora_target_modules: list[str] | None = _unset("Layers it goes into; every linear one but the head if unset.")
    lora_modules_to_save: list[str] | None = _unset("Layers trained as a whole beside it.")


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


def command_parser(
    command: Callable, required: str, integers: str, *, reads_rows: bool = True
) -> argparse.ArgumentParser:
    """
    Return the parser of a command.

    Args:
        command (`Callable`): The function that runs it, called `run_` and the command's name.
        required (`str`), integers (`str`): Its required and its whole-number flags, separated by spaces.
        reads_rows (`bool`, *optional*, defaults to `True`): Whether it takes the flags that pick rows of a dataset.
    """
    name = command.__name__.removeprefix("run_")
    parser = argparse.ArgumentParser(prog=f"trl-draft-opd {name}", description=command.__doc__, allow_abbrev=False)
    for flag in required.split():
        parser.add_argument(f"--{flag}", required=True)
    for flag in integers.split():
        parser.add_argument(f"--{flag}", type=int, metavar="N")
    if reads_rows:
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


def lora_config(script: DraftScriptArguments) -> LoraConfig | None:
    """Return the adapter that the flags describe, `None` without `--use_peft`; raise `ValueError` if it is missing."""
    options = given(script, LORA_OPTIONS)
    if not script.use_peft:
        if options:
            raise ValueError(
                f"{sorted(options)} describe an adapter, which is trained under `use_peft` alone. Set it."
            )
        return None
    from ..drafters.published.merging import require_peft

    return require_peft("`use_peft`").LoraConfig(**{LORA_OPTIONS[name]: value for name, value in options.items()})


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """
    Load one split of a Hub dataset, of a folder, or of a file, which is one split called `train`.

    Raises:
        OSError: If there is no such file, folder or dataset.
        ValueError: If there is no such split, or a file is damaged; of JSON, the message names the line.
    """
    from datasets import DatasetDict, load_from_disk

    path = Path(name)
    kind = FILE_KINDS.get(path.suffix)
    if kind is not None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no dataset file {name!r}.")
        return _load(name, kind, split, data_files=str(path))
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        return _load(name, name, split, name=config)
    saved = load_from_disk(name)
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"The folder {name!r} holds the splits {sorted(splits)}, not {split!r}.")
    return splits[split]


def _load(shown: str, path: str, split: str, **options: str | None) -> Dataset:
    """Call `load_dataset`, whose errors of damaged files name neither file nor line."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    try:
        rows = load_dataset(path, split=split, **options)
        if path in FILE_KINDS.values():
            # Arrow takes text in as bytes: what is no UTF-8 would fail at the row that is read, without a name.
            rows.data.validate(full=True)
        return rows
    except (DatasetGenerationError, UnicodeDecodeError, ArrowInvalid, StopIteration) as error:
        reason = str(error.__cause__ or error) or "it holds no row"
        if path == "json":
            reason = find_json_fault(Path(shown)) or reason
        raise ValueError(f"The dataset {shown!r} cannot be read: {reason.rstrip('.')}. Mend or replace it.") from error


def find_json_fault(path: Path) -> str | None:
    """Say which line of a file of JSON rows is damaged and how, or return `None` where none is."""
    lines = path.read_bytes().splitlines(keepends=True)
    if path.suffix == ".json" and lines and not lines[0].strip().endswith(b"}"):
        lines = [b"".join(lines)]  # one value over many lines, and not a row a line
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            return f"line {number} is no UTF-8 (byte {line[error.start]:#04x} at {error.start})"
        except UnicodeEncodeError:
            return f"line {number} holds half of a surrogate pair"
        except json.JSONDecodeError as error:
            number += error.lineno - 1
            if line is lines[-1] and not line.endswith(b"\n"):
                return f"line {number}, its last, ends in the middle: its writer was cut off ({error.msg})"
            return f"line {number} is no JSON ({error.msg} at column {error.colno})"
        if not isinstance(row, dict) and line is not lines[0]:
            return f"line {number} holds no row but a {type(row).__name__}"
    return None


def make_drafter(target: FrozenTarget, family: str | None, options: dict, count: Callable) -> Drafter:
    """Return a fresh drafter; `count` is called for a reduced vocabulary only and returns how often each token occurs."""
    from ..drafters.dflash import DFlashDraftModel
    from ..drafters.eagle3 import Eagle3DraftModel, build_draft_vocabulary

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
    from ..drafters.eagle3 import count_tokens

    return count_tokens(target.text_reader(**reading).read_texts(rows), target.vocab_size)


def read_prompts(target: FrozenTarget, rows: Dataset, reading: dict) -> list[list[int]]:
    """Return the prompts of a dataset as token ids."""
    return list(target.text_reader(**reading).read_prompts(rows)["prompt_ids"])
