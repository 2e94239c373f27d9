# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The command that reads: `read`."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from ..costs.readings import bytes_per_token, shared_folder_bytes
from ..drafters.auto import AutoDrafter
from ..drafters.base import Drafter
from ..drafters.dflash.configuration_dflash import DFlashDraftConfig
from ..drafters.target_shape import middle_layer_ids, spread_layer_ids
from ..readings.launch import serve_line
from ..readings.manifest import show_bytes
from ..readings.server import ReadingServers
from ..readings.store import ReadingStore
from ..readings.write import ReadingPlan, write_readings
from ..responses import Origin, ResponseStore
from ..target.frozen import FrozenTarget
from ..target.lengths import TRAINING_LENGTHS, fit_text_length
from ..trainer.delivery import stored_texts
from ..trainer.draft_sft_config import MAX_LENGTH
from ..trainer.pair import check_pair
from ..utils.atomic_files import check_place
from ..utils.settings import check_at_least
from .arguments import RowsArguments, TargetArguments, default_of, flag, parse, print_next, unless_default


# Where a server on this machine leaves states until they are fetched, unless another folder is named.
_SHARED_FOLDER = "/dev/shm/readings"  # noqa: S108  a server on this machine is told the same


@dataclass(kw_only=True)
class ReadArguments(TargetArguments, RowsArguments):
    """Flags of `read`."""

    _argument_group_name = "readings"

    output: str = flag("Folder for the readings; those that it holds are kept.")
    responses: str | None = flag(
        "Folder of `generate`: read each prompt with its stored response, as Draft-OPD and `sft --regenerate` do. If "
        "unset, the rows' own texts are read, as `sft` does.",
        default=None,
    )
    drafter: str | None = flag(
        "Hub id or path of the drafter whose layers to keep, and whose block the texts leave room for.", default=None
    )
    target_layer_ids: list[int] | None = flag(
        "Target layers to keep, from 0 and ascending; if unset, --drafter's, or those that EAGLE-3 and DFlash tap.",
        default=None,
    )
    dtype: str = flag(
        "Precision to keep the states in, `bfloat16` or `float32`; `auto` is the target's.",
        default=default_of(write_readings, "dtype"),
    )
    max_length: int | None = flag(
        f"Texts are cut behind this many tokens, as in `sft`; {MAX_LENGTH} if unset, or what the target's positions "
        "allow. Responses are read whole if unset.",
        default=None,
    )
    max_bytes: int | None = flag("Largest size of the folder; the disk's free space if unset.", default=None)
    batch_size: int = flag(
        "Texts that transformers reads together, in the order of the rows.",
        default=default_of(write_readings, "batch_size"),
    )
    num_proc: int | None = flag("Processes that tokenize.", default=None)
    engine: Literal["transformers", "vllm"] = flag(
        "What reads: the target in this process, or vLLM servers that `--print-server` starts.",
        default="transformers",
    )
    base_url: list[str] | None = flag("Addresses of the vLLM servers, which share the texts.", default=None)
    shared_folder: str = flag(
        "Folder in which the servers leave states, as this machine sees it.", default=_SHARED_FOLDER
    )
    served_model_name: str | None = flag(
        "The servers' name for the target; if unset, they are asked and must serve one model only.", default=None
    )
    api_key_file: str | None = flag("File with the servers' API key.", default=None)
    concurrency: int = flag(
        "Texts at a time at each server.", default=default_of(ReadingServers.connect, "concurrency")
    )
    verify: bool = flag(
        "Check every byte of what --output holds, and count what is missing, in place of reading; exit code 1 on "
        "damage.",
        default=False,
    )
    print_server: bool = flag("Print the command that starts a vLLM server of these readings, and end.", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "batch_size", "num_proc", "max_bytes", "concurrency")
        check_at_least(self, 2, "max_length")
        if self.drafter is not None and self.target_layer_ids is not None:
            raise ValueError("Give `--drafter`, whose layers are kept, or `--target-layer-ids`, and not both.")

        server = ("base_url", "served_model_name", "api_key_file")
        given = [name for name in server if getattr(self, name) is not None]
        if given and self.engine != "vllm":
            raise ValueError(f"{given} describe servers, which `--engine vllm` asks. Set it, or leave them out.")
        if self.engine == "vllm" and not self.base_url and not self.print_server:
            raise ValueError("`--engine vllm` needs `--base-url`; `--print-server` prints what starts such a server.")

    @contextmanager
    def source(self, target: FrozenTarget, layer_ids: Sequence[int]) -> Iterator[ReadingServers | None]:
        """Yield the servers, connected and checked, or `None` for the target in this process."""
        if self.engine != "vllm":
            yield None
            return
        assert self.base_url is not None, "`__post_init__`"
        key = None if self.api_key_file is None else Path(self.api_key_file).read_text("utf-8").strip()
        servers = ReadingServers.connect(
            target,
            self.base_url,
            layer_ids,
            shared_folder=self.shared_folder,
            model=self.served_model_name,
            api_key=key,
            concurrency=self.concurrency,
        )
        try:
            yield servers
        finally:
            servers.close()

    def load_drafter(self, target: FrozenTarget) -> Drafter | None:
        """Return the drafter, if one was named; raise `ValueError` if it is not one of this target."""
        if self.drafter is None:
            return None
        drafter = AutoDrafter.from_pretrained(self.drafter, num_target_layers=target.num_layers)
        check_pair(drafter, target)
        return drafter

    def choose_layers(self, target: FrozenTarget, drafter: Drafter | None) -> list[int]:
        """Return the layers to keep."""
        if drafter is not None:
            return list(drafter.config.target_layer_ids)
        if self.target_layer_ids is not None:
            return self.target_layer_ids
        return sorted({*middle_layer_ids(target.num_layers), *spread_layer_ids(target.num_layers)})

    def text_length(self, target: FrozenTarget, num_drafts: int | None) -> int | None:
        """Return where texts are cut; `None` of responses, which are read whole where no length is given."""
        if self.responses is not None and self.max_length is None:
            return None
        # Of no drafter in particular, so that `sft` cuts there for a drafter of any family.
        num_drafts = DFlashDraftConfig.block_size if num_drafts is None else num_drafts
        return fit_text_length(target.num_positions, self.max_length, num_drafts=num_drafts, default=MAX_LENGTH)

    def read_texts(self, target: FrozenTarget, rows: Dataset, num_drafts: int | None) -> list[Any]:
        """
        Return the texts that training reads, as arrays of token ids: lists of numbers would take ten times the memory.

        Raises:
            ValueError: If a row is malformed, or the responses are another target's or not all there.
        """
        stored = None if self.responses is None else ResponseStore.read_only(self.responses)
        completion = None if stored is None else stored.origin.max_completion_length
        lengths = self.fit_lengths(target, completion, num_drafts=num_drafts or 0, defaults=TRAINING_LENGTHS)
        max_length = self.text_length(target, num_drafts)
        reader = target.text_reader(**self.reading(lengths.prompt), num_proc=self.num_proc, max_length=max_length)
        if stored is not None:
            origin = Origin.of(
                target,
                reader,
                sampling=stored.origin.sampling,
                max_completion_length=stored.origin.max_completion_length,
            )
            origin.check_same(stored.origin, f"The responses in {self.responses}")
            prompts = list(reader.read_prompts(rows)["prompt_ids"])
            num_missing = len(stored.missing(prompts))
            if num_missing:
                raise ValueError(
                    f"The folder of responses {self.responses!r} lacks {num_missing:,} of the {len(prompts):,} "
                    "prompts. Run `trl-draft-opd generate` with the same rows first: it writes only those."
                )
            responses = [stored.find(prompt) for prompt in prompts]
            rows = Dataset.from_dict({"prompt_ids": prompts, "completion_ids": responses})
        texts: Any = reader.read_texts(rows)
        return list(stored_texts(texts))

    def describe_server(self, target: FrozenTarget, layer_ids: Sequence[int], longest: int) -> str:
        """Return what the readings of texts of up to so many tokens take of a server's cache and folder."""
        token_bytes = bytes_per_token(target.config.hidden_size, len(layer_ids), target.causal_lm.dtype.itemsize)
        folder_bytes = shared_folder_bytes(self.concurrency, longest, token_bytes)
        return (
            f"A token's states take {token_bytes:,} bytes, of the cache of each of the server's cards beside keys and "
            f"values, too. {self.concurrency} texts under way, of up to {longest:,} tokens, take up to "
            f"{show_bytes(folder_bytes)} of {self.shared_folder!r}. Add what the machine needs, such as "
            "`--tensor-parallel-size`."
        )

    def serve_line(self, target: FrozenTarget, layer_ids: Sequence[int], longest: int) -> str:
        """Return the command that starts a server of these layers, for texts of up to so many tokens."""
        # One more, because a server always writes a token.
        room = longest + 1 if target.num_positions is None or longest < target.num_positions else None
        return serve_line(
            self.target,
            layer_ids,
            target.num_layers,
            shared_folder=self.shared_folder,
            dtype=str(target.causal_lm.dtype).removeprefix("torch."),
            max_model_len=room,
            trust_remote_code=self.trust_remote_code,
        )


def run_read(argv: Sequence[str]) -> int:
    """Write the target's readings of texts; see [`write_readings`]."""
    (args,) = parse("read", [ReadArguments], argv)
    check_place(Path(args.output), "`--output`")
    rows = args.load_rows()
    reads_here = args.engine == "transformers" and not (args.verify or args.print_server)
    target = args.load_target(body=reads_here)
    drafter = args.load_drafter(target)
    layer_ids = args.choose_layers(target, drafter)
    num_drafts = None if drafter is None else drafter.default_num_drafts
    texts = args.read_texts(target, rows, num_drafts)
    if args.print_server:
        longest = max(map(len, texts))
        # What is to be pasted alone on the standard output.
        print(args.describe_server(target, layer_ids, longest), file=sys.stderr)
        print(args.serve_line(target, layer_ids, longest))
        return 0
    if args.verify:
        return _verify(ReadingStore.open_for(target, args.output, layer_ids), texts)
    plan = ReadingPlan.of(target, texts, args.output, layer_ids, args.dtype)
    print(plan.describe())
    # Before servers are asked.
    plan.check_room(args.max_bytes)
    accelerator = torch.accelerator.current_accelerator(True)
    # It belongs to the servers, if there are any.
    if reads_here and accelerator is not None:
        target.place(accelerator)
    with args.source(target, layer_ids) as servers:
        if servers is not None:
            servers.require_lengths([len(text) for text in texts])
        store = write_readings(
            target,
            texts,
            args.output,
            layer_ids=layer_ids,
            dtype=args.dtype,
            source=servers,
            provenance=None if servers is None else {"engine": "vllm", "engine_version": servers.engine_version},
            batch_size=args.batch_size,
            max_bytes=args.max_bytes,
        )
    print(store.describe())
    _print_training(args, args.text_length(target, num_drafts))
    return 0


def _print_training(args: ReadArguments, max_length: int | None) -> None:
    """Print the command that trains from what was read."""
    print_next(
        "sft" if args.responses is None else "opd",
        drafter=args.drafter or (None if args.responses is None else "DRAFTER"),
        family="eagle3" if args.responses is None and args.drafter is None else None,
        target=args.target,
        dataset=args.dataset,
        responses=args.responses,
        readings=args.output,
        target_dtype=unless_default(args, "target_dtype"),
        max_length=max_length if args.responses is None and max_length != MAX_LENGTH else None,
        max_prompt_length=args.max_prompt_length,
        # The store of responses takes no other.
        max_completion_length=None
        if args.responses is None
        else ResponseStore.read_only(args.responses).origin.max_completion_length,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
    )


def _verify(store: ReadingStore, texts: Sequence[Sequence[int]]) -> int:
    """Check a store to the last byte, print what was found, and return the exit code."""
    print(store.describe())
    damage = list(store.verify())
    missing = store.missing(texts)
    print("\n".join(damage) if damage else "Every byte is as it was written.")
    if missing:
        print(f"{len(missing):,} texts of these rows are missing; the command without `--verify` reads them.")
    return int(bool(damage))
