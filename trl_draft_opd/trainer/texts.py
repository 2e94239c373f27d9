# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How dataset rows become the text of an optimiser step: the dataset's own responses, a response store, or the target
asked once per prompt; rows regrouped by length.

Shape letters:  B = sequences, L = text length
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import islice

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..responses import Origin, ResponseAudit, ResponseStore, check_responses, generate_missing
from ..responses.shards import prompt_key
from ..responses.store import describe_filling
from ..rollout.acceptance import SamplingSettings
from ..rollout.texts import TargetText, join_responses, pad_rows
from ..rollout.types import Rollout, response_ends
from ..runs.distributed.ranks import first_rank_decides
from ..runs.folder_lock import locked
from ..target.checks import naming_rows
from ..target.frozen import FrozenTarget
from .common_config import DraftTrainingConfig
from .draft_opd_config import DraftOPDConfig
from .pair import text_reader


logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset

# Prompts can be private: a push of `output_dir` leaves out what begins with an underscore.
PRIVATE_FOLDER = "_responses"


def read_each(
    read: Callable[[AnyDataset], AnyDataset], datasets: AnyDataset | dict[str, AnyDataset] | None
) -> AnyDataset | dict[str, AnyDataset] | None:
    """Return what `read` makes of a dataset, or of each of several by name; `None` stays `None`."""
    if isinstance(datasets, dict):
        return {name: read(dataset) for name, dataset in datasets.items()}
    return None if datasets is None else read(datasets)


def text_of(batch: dict[str, torch.Tensor]) -> TargetText:
    """Return a batch of whole texts of [`RowCollator`]."""
    return TargetText(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], batch["sample_ids"].tolist()
    )


def text_of_rollout(rollout: Rollout, sample_ids: Sequence[int]) -> TargetText:
    return TargetText(rollout.input_ids, rollout.attention_mask, rollout.completion_mask, sample_ids)


def rows_of(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[list[int]]:
    """Return right-padded rows without their padding."""
    lengths = attention_mask.sum(dim=1).tolist()
    return [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]


def prompt_rows(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Return the prompts of a batch of prompts of [`RowCollator`], without padding."""
    return rows_of(batch["input_ids"], batch["attention_mask"])


def prompts_of_text(text: TargetText) -> list[list[int]]:
    """Return what stands before the first token that the target wrote in each row, at least the row's first token."""
    starts = text.completion_mask.long().argmax(dim=1).tolist()
    return [row[: max(start, 1)] for row, start in zip(text.input_ids.tolist(), starts, strict=True)]


def responses_in_place(text: TargetText) -> list[tuple[list[int], list[int], list[int]]]:
    """Return every response of a text with all that stands before it and behind it, as token ids."""
    found = []
    rows, ends = rows_of(text.input_ids, text.attention_mask), response_ends(text.completion_mask)
    is_start = text.completion_mask.clone()
    is_start[:, 1:] &= ~text.completion_mask[:, :-1]
    for row, start in is_start.nonzero().tolist():
        ids, end = rows[row], int(ends[row, start]) + 1
        found.append((ids[:start], ids[start:end], ids[end:]))
    return found


def check_texts_written(
    target: FrozenTarget, texts: Sequence[TargetText], sampling: SamplingSettings, **limits: float
) -> ResponseAudit:
    """Check the responses of texts as [`check_responses`] does, whose limits are `limits`."""
    found = [each for text in texts for each in responses_in_place(text)]
    pairs = [(before, response) for before, response, _ in found]
    # Only whole texts are delivered; the body reads no further than it has to.
    rests = None if target.source is None else [rest for _, _, rest in found]
    return check_responses(target, pairs, sampling, rests=rests, **limits)


def regroup_by_length(texts: Sequence[TargetText], pad_token_id: int) -> list[TargetText]:
    """
    Deal the rows of an optimiser step's micro-batches out again, as many each, rows of similar length together.

    The update is a sum over all rows of the step, so only the padding changes.
    """
    if len(texts) < 2:
        return list(texts)
    # In one read of the device.
    lengths = iter(torch.cat([text.attention_mask.sum(dim=1) for text in texts]).tolist())
    rows = [
        (text.input_ids[row, :length], text.completion_mask[row, :length], text.sample_ids[row])
        for text in texts
        for row, length in zip(range(len(text.sample_ids)), lengths, strict=False)
    ]
    by_length = iter(sorted(rows, key=lambda row: len(row[0])))
    return [
        pad_rows(list(islice(by_length, len(text.sample_ids))), pad_token_id, text.input_ids.device) for text in texts
    ]


def open_store(target: FrozenTarget, args: DraftTrainingConfig) -> ResponseStore:
    """Open the response store of a run; raises `ValueError` if it is another target's, or damaged."""
    reader = text_reader(target, args, max_length=None)
    origin = Origin.of(target, reader, sampling=args.sampling_settings(), max_completion_length=args.longest_response)
    return ResponseStore.open(args.responses or args.output_folder / PRIVATE_FOLDER, origin)


def respond_to_all(target: FrozenTarget, args: DraftTrainingConfig, prompts: AnyDataset, place: str) -> Dataset:
    """
    Return every prompt with the target's response, as `prompt_ids` and `completion_ids`; each rank writes its share of
    those not in the store. `place` is what errors call the rows. Collective.
    """
    if isinstance(prompts, IterableDataset):
        raise ValueError(
            "`regenerate=True`, and evaluation by replay, need a dataset of known length, got an `IterableDataset`."
        )
    state = PartialState()
    with ExitStack() as lock:
        # As training holds it: a second run is refused before its target writes for hours.
        first_rank_decides(state, lambda: lock.enter_context(locked(args.output_folder)))
        store = open_store(target, args)
        prompt_ids = list(prompts["prompt_ids"])
        missing = store.missing(prompt_ids)
        if missing and target.has_body and args.responses is not None and state.is_main_process:
            logger.warning(describe_filling(store, len(missing)))
        missing = missing[state.process_index :: state.num_processes]
        rows = {prompt_key(prompt): row for prompt, row in zip(prompt_ids, prompts["sample_id"], strict=True)}
        # All ranks cut the same list into shares, so nobody may write before everybody has looked.
        state.wait_for_everyone()
        _write_responses(store, target, args, missing, [rows[prompt_key(prompt)] for prompt in missing], place)
        target.finish_together()
        state.wait_for_everyone()
    store.refresh()
    return Dataset.from_dict(
        {"prompt_ids": prompt_ids, "completion_ids": [store.find(prompt) for prompt in prompt_ids]}
    )


def describe_unwritten(
    target: FrozenTarget, store: ResponseStore, num_missing: int, row: int, place: str = "the dataset"
) -> str:
    """Return what is wrong where responses are missing and cannot be written, and what to do."""
    name, folder = target.config.name_or_path or "TARGET", store.path
    return (
        f"{num_missing} prompts of {place} have no response in {str(folder)!r}, the first of them row {row}, and a "
        f"run with `readings` writes none. Write them with `trl-draft-opd generate --target {name} --dataset DATASET "
        f"--output RESPONSES --max-completion-length {store.origin.max_completion_length}` (by a server with "
        f"`--engine vllm --base-url URL`), read them with `trl-draft-opd read --target {name} --dataset DATASET "
        "--responses RESPONSES --output READINGS`, and name both folders; or give the responses as ids in the dataset."
    )


def _write_responses(
    store: ResponseStore,
    target: FrozenTarget,
    args: DraftTrainingConfig,
    prompts: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    place: str = "the dataset",
) -> None:
    """Have the target respond to prompts, which errors call by their rows in `place`."""
    if prompts and not target.has_body:
        raise ValueError(describe_unwritten(target, store, len(prompts), sample_ids[0], place))
    with naming_rows(sample_ids, place):
        generate_missing(
            store,
            target,
            prompts,
            batch_size=args.generation_batch_size,
            seed=args.seed,
            shard_size=args.generation_batch_size,
            # Without a terminal there are lines and no bar to disable.
            show_progress=PartialState().is_local_main_process and not (args.disable_tqdm and sys.stderr.isatty()),
        )


class ResponseSource:
    """
    Turns batches of rows into text the target wrote.

    When the target has to write anyway, it also responds to other prompts of the training set `rows`, up to a whole
    generation batch, if the run will come to all of them; each rank to other ones.
    """

    def __init__(self, target: FrozenTarget, args: DraftOPDConfig, rows: AnyDataset | None):
        self.target, self.args = target, args
        # What the check of the first step's rows found.
        self.audit: ResponseAudit | None = None
        self._further = iter(())
        self._is_announced = False
        if isinstance(rows, Dataset) and not args.completions_from_target and self._comes_to_all(rows):
            state = PartialState()
            self._further = (rows[i] for i in range(state.process_index, len(rows), state.num_processes))

    def _comes_to_all(self, rows: Dataset) -> bool:
        """Whether training is long enough for every row."""
        args = self.args
        if args.max_steps <= 0:
            return args.num_train_epochs >= 1
        per_step = args.train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
        return args.max_steps * per_step >= len(rows)

    @cached_property
    def store(self) -> ResponseStore:
        """The store of this run, opened on first use."""
        return open_store(self.target, self.args)

    def _announce(self) -> None:
        """Say once, if the user named the store, that it is about to be added to."""
        if not self._is_announced and self.args.responses is not None and PartialState().is_main_process:
            logger.warning(describe_filling(self.store, None))
        self._is_announced = True

    def texts(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[TargetText]:
        """
        Return the text of every micro-batch of an optimiser step, rows of similar length together; raise `ValueError`
        if too many tokens of the first step's text are not what this target writes.
        """
        if self.args.completions_from_target:
            texts = [text_of(batch) for batch in batches]
        else:
            self._respond(batches)
            texts = [self._join(batch) for batch in batches]
        if self.audit is None:
            # Once, before anything is trained on them.
            self.audit = check_texts_written(
                self.target,
                texts,
                self.args.sampling_settings(),
                warn_above=self.args.warn_mismatch_share,
                refuse_above=self.args.max_mismatch_share,
            )
        return regroup_by_length(texts, self.target.pad_token_id)

    def known_texts(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[TargetText]:
        """Return what [`texts`] will of micro-batches to come; nothing if a response of theirs is not written yet."""
        if self.args.completions_from_target:
            texts = [text_of(batch) for batch in batches]
        elif self.store.missing([prompt for batch in batches for prompt in prompt_rows(batch)]):
            return []
        else:
            texts = [self._join(batch) for batch in batches]
        return regroup_by_length(texts, self.target.pad_token_id)

    def _join(self, batch: dict[str, torch.Tensor]) -> TargetText:
        prompts = prompt_rows(batch)
        # Were one missing, the lengths would differ, which is refused.
        responses = [found for prompt in prompts if (found := self.store.find(prompt)) is not None]
        sample_ids, device = batch["sample_ids"].tolist(), batch["input_ids"].device
        return join_responses(prompts, responses, sample_ids, self.target.pad_token_id, device)

    def _respond(self, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        """Have the target respond to prompts that have no response yet, and fill the generation batch up."""
        prompts = [prompt for batch in batches for prompt in prompt_rows(batch)]
        if not self.store.missing(prompts):
            return
        # Another rank, or another run on the same store, may have responded meanwhile.
        self.store.refresh()
        self._announce()
        rows = [row for batch in batches for row in batch["sample_ids"].tolist()]
        row_of = {tuple(prompt): row for prompt, row in zip(prompts, rows, strict=True)}
        missing = {tuple(prompt): row_of[tuple(prompt)] for prompt in self.store.missing(prompts)}
        while len(missing) < self.args.generation_batch_size and (row := next(self._further, None)) is not None:
            if self.store.find(row["prompt_ids"]) is None:
                missing.setdefault(tuple(row["prompt_ids"]), row["sample_id"])
        _write_responses(self.store, self.target, self.args, list(missing), list(missing.values()))
