# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What every phase of the laboratory works with: the pair's target, its prompts, and the responses the target wrote to
them once.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset

from benchmarks.counters import FlopCount
from trl_draft_opd import AutoDrafter, SamplingSettings, open_readings
from trl_draft_opd.drafters.auto import DRAFTER_CLASSES
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.responses import Origin, ResponseStore, generate_missing, generate_responses

from .memo import RememberingTarget
from .plan import Pair, PromptSet


MEASURED_RESPONSES = 32  # responses whose writing is counted to say what all cost


@dataclass(frozen=True)
class Machine:
    """
    Where and how it runs; none of it belongs to the question.

    Attributes:
        shared (`Path`, *optional*): Folder that holds the targets and prompt files that a pair names.
        out (`Path`): Folder of everything the laboratory writes.
        device (`str`), dtype (`str`): Of the target.
        memo_bytes (`int`): Bytes of target readings kept in memory, see [`RememberingTarget`].
        generation_batch_size (`int`): Prompts the target answers together.
        micro_batch_size (`int`, *optional*): Prompts per backward pass; an update's all together by default.
        bf16 (`bool`): Train drafters under bf16 autocast.
        readings (`Path`, *optional*): A store of the target's readings of every text, to read from in its place.
    """

    shared: Path | None
    out: Path
    device: str
    dtype: str
    memo_bytes: int
    generation_batch_size: int
    micro_batch_size: int | None
    bf16: bool
    readings: Path | None = None


class Workbench:
    """
    A pair on a machine. Everything is made on first use and kept under `out/<pair>`.

    Args:
        pair ([`Pair`]): What to work on.
        machine ([`Machine`]): Where.
    """

    def __init__(self, pair: Pair, machine: Machine):
        self.pair, self.machine = pair, machine
        self.folder = machine.out / pair.name
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def target(self) -> RememberingTarget:
        """The frozen target."""
        target = RememberingTarget.load(self._source(self.pair.target), dtype=getattr(torch, self.machine.dtype))
        target.place(torch.device(self.machine.device))
        target.budget_bytes = self.machine.memo_bytes
        if self.machine.readings is not None:
            layer_ids = self.pair.drafter.get("target_layer_ids")
            if layer_ids is None:
                raise SystemExit(
                    f"Pair {self.pair.name!r} is to be read from {str(self.machine.readings)!r}, so its `drafter` "
                    "must name the `target_layer_ids` to read."
                )
            target.source = open_readings(target, str(self.machine.readings), layer_ids)
        return target

    def _source(self, name: str) -> str:
        """
        Return a model's folder under `out` or `shared`, or its own name: a folder elsewhere, or an id on the Hub.
        """
        for root in (self.machine.out, self.machine.shared):
            if root is not None and (root / name / "config.json").exists():
                return str(root / name)
        if name.startswith("targets/"):
            raise SystemExit(
                f"Target {name!r} of pair {self.pair.name!r} is neither under --out {self.machine.out} nor under "
                f"--shared {self.machine.shared}. Give the folder that holds targets/ and data/ with --shared PATH, "
                "or train it: see docs/why/laboratory.md."
            )
        return name

    # -- text ---------------------------------------------------------------------------------------------------------

    def messages(self, prompts: PromptSet) -> list[str]:
        """Return the users' messages of a prompt set."""
        if prompts.file is None:
            rows = load_dataset(prompts.hub, prompts.config, split=prompts.split)
        else:
            if self.machine.shared is None:
                raise SystemExit(f"Prompts come from {prompts.file!r}: give the folder it lies in with --shared PATH.")
            rows = Dataset.from_json(str(self.machine.shared / prompts.file))
        start = prompts.start if prompts.start >= 0 else len(rows) + prompts.start
        num_rows = prompts.count * prompts.joined
        if start < 0 or start + num_rows > len(rows):
            raise SystemExit(
                f"{prompts.file or prompts.hub} has {len(rows)} rows; {num_rows} from row {prompts.start} on were "
                "asked for."
            )
        rows = rows.select(range(start, start + num_rows))
        extra = rows[prompts.extra_field] if prompts.extra_field else [""] * len(rows)
        tasks = ["\n".join(filter(None, pair)) for pair in zip(rows[prompts.field], extra, strict=True)]
        return ["\n\n".join(tasks[row : row + prompts.joined]) for row in range(0, num_rows, prompts.joined)]

    def prompt_ids(self, prompts: PromptSet) -> list[list[int]]:
        """Return the prompts as token ids, chat template applied."""
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        chats = [[{"role": "user", "content": message}] for message in self.messages(prompts)]
        return [self.target.tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]

    def every_prompt(self) -> list[list[int]]:
        """Return the prompts of all sets, trained and measured on, as token ids."""
        pair = self.pair
        sets = (*pair.train, *pair.dev, *pair.tests.values(), *pair.fresh)
        return [ids for each in sets for ids in self.prompt_ids(each)]

    def store(self, temperature: float) -> ResponseStore:
        """Return the store of the target's responses, made if need be."""
        sampling = SamplingSettings(temperature=temperature, top_k=0, top_p=1.0)
        origin = Origin.of(self.target, sampling=sampling, max_completion_length=self.pair.max_completion_length)
        folder = self.folder / "responses" if self.pair.responses is None else self.machine.out / self.pair.responses
        return ResponseStore.open(folder.with_name(f"{folder.name}-t{temperature:g}"), origin)

    def answered(self, prompt_ids: list[list[int]], temperature: float) -> Dataset:
        """
        Return prompts with the target's responses, `prompt_ids` and `completion_ids`; written once, into a store.

        Prompts that occur twice share their response.
        """
        store = self.store(temperature)
        size = self.machine.generation_batch_size
        # What is written now is in no store yet.
        with reading_itself(self.target):
            generate_missing(
                store,
                self.target,
                store.missing(prompt_ids),
                batch_size=size,
                seed=0,
                shard_size=4 * size,
                show_progress=False,
            )
        responses = [store.find(prompt) for prompt in prompt_ids]
        return Dataset.from_dict({"prompt_ids": prompt_ids, "completion_ids": responses})

    def training_rows(self, temperature: float = 0.0, pool: int | None = None, is_fresh: bool = False) -> Dataset:
        """
        Return the training prompts with their responses, or the first `pool` of them, or the `fresh` ones; none that
        is measured on is among them.

        Raises:
            SystemExit: If fresh prompts are asked for and the pair has none.
        """
        if is_fresh and not self.pair.fresh:
            raise SystemExit(f"Pair {self.pair.name!r} names no `fresh` prompts, which an arm is to train on.")
        pair = self.pair
        sets, others = (pair.fresh, pair.train) if is_fresh else (pair.train, [])
        others = (*others, *pair.dev, *pair.tests.values())
        held_out = {tuple(ids) for prompts in others for ids in self.prompt_ids(prompts)}
        prompt_ids = [ids for prompts in sets for ids in self.prompt_ids(prompts)]
        prompt_ids = [ids for ids in prompt_ids if tuple(ids) not in held_out]
        # So that a smaller pool holds every kind.
        order = torch.randperm(len(prompt_ids), generator=torch.Generator().manual_seed(0)).tolist()
        return self.answered([prompt_ids[row] for row in order[:pool]], temperature)

    def writing_cost(self) -> dict[str, Any]:
        """Return what writing the training responses cost once, from counting the first of them."""
        path = self.folder / "writing.json"
        if not path.exists():
            rows = self.training_rows()
            few = rows.select(range(min(MEASURED_RESPONSES, len(rows))))
            with FlopCount() as counter:
                generate_responses(
                    self.target,
                    few["prompt_ids"],
                    max_completion_length=self.pair.max_completion_length,
                    sampling=SamplingSettings(temperature=0.0, top_k=0, top_p=1.0),
                    batch_size=len(few),
                    seed=0,
                    show_progress=False,
                )
            tokens, few_tokens = (sum(map(len, part["completion_ids"])) for part in (rows, few))
            cost = {"num_prompts": len(rows), "tokens": tokens, "tflop": counter.total / 1e12 * tokens / few_tokens}
            write_json(path, cost)
        return read_json(path)

    # -- drafters -----------------------------------------------------------------------------------------------------

    def fresh_drafter(self) -> Drafter:
        """Return the pair's drafter before any training of ours: random, or what it names to start from."""
        options = dict(self.pair.drafter)
        if "id" in options:
            return AutoDrafter.from_pretrained(self._source(options["id"]), num_target_layers=self.target.num_layers)
        if "from_dflash" in options:
            dflash = AutoDrafter.from_pretrained(self._source(options.pop("from_dflash")))
            torch.manual_seed(0)
            return DRAFTER_CLASSES[self.pair.family].from_dflash(dflash, **options)
        return self._untrained(options)

    def untrained_like(self, drafter: Drafter) -> Drafter:
        """Return a drafter of the same shape that has learned nothing."""
        settings = set(signature(type(drafter).from_target).parameters) & set(drafter.config.own_settings())
        return self._untrained({name: getattr(drafter.config, name) for name in settings})

    def _untrained(self, options: dict[str, Any]) -> Drafter:
        kind = DRAFTER_CLASSES[self.pair.family]
        if "mask_token_id" in kind.config_class.own_settings() and "mask_token_id" not in options:
            options = options | {"mask_token_id": self.target.find_mask_token_id()}
        torch.manual_seed(0)
        return kind.from_target(self.target, **options)

    def load_drafter(self, folder: Path) -> Drafter:
        """Return a trained drafter."""
        return AutoDrafter.from_pretrained(folder).to(self.machine.device)


@contextmanager
def reading_itself(target: RememberingTarget) -> Iterator[None]:
    """Have a target read every text itself while the block runs: neither from memory nor from a store."""
    kept = target.budget_bytes, target.source
    target.budget_bytes, target.source = 0, None
    try:
        yield
    finally:
        target.budget_bytes, target.source = kept


def read_json(path: Path) -> Any:
    """Return the value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


def require_unchanged(path: Path, made_of: dict[str, Any]) -> None:
    """
    Note in `path` what the work in its folder is made of, or hold it to what was noted when it was begun.

    Raises:
        SystemExit: If something differs, so that no result goes under another plan's name.
    """
    made_of = json.loads(json.dumps(made_of))
    if not path.exists():
        write_json(path, made_of)
        return
    before = read_json(path)
    changed = {key: (before.get(key), made_of.get(key)) for key in before.keys() | made_of.keys()}
    lines = [f"{key}: {was!r} then, {now!r} now" for key, (was, now) in sorted(changed.items()) if was != now]
    if lines:
        raise SystemExit(
            f"What lies in {path.parent} was made by another plan ({'; '.join(lines)}). Delete that folder to make it "
            "again, or give another --out."
        )
