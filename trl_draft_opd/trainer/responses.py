# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Where the texts of a replay come from: the dataset's own responses, a trajectory store, or the target, asked once per prompt.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset

from ..rollout.replay import TargetText
from ..target import FrozenTarget
from ..target_checks import naming_rows
from ..trajectories import Origin, ResponseAudit, TrajectoryStore, check_responses, generate_missing
from ..trajectories.shards import prompt_key
from .batches import join_responses, prompt_rows, response_pairs, text_of
from .common_config import DraftTrainingConfig
from .draft_opd_config import DraftOPDConfig


# Prompts can be private: a push of `output_dir` leaves out what begins with an underscore.
PRIVATE_FOLDER = "_trajectories"


def open_store(target: FrozenTarget, args: DraftTrainingConfig) -> TrajectoryStore:
    """
    Open the trajectory store of a run.

    Raises:
        ValueError: If it holds responses of another target, tokenizer, template or law, or is damaged.
    """
    origin = Origin.of(
        target,
        sampling=args.sampling_settings(),
        max_new_tokens=args.max_completion_length,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    return TrajectoryStore.open(args.trajectories or Path(args.output_dir) / PRIVATE_FOLDER, origin)


def answer_all(target: FrozenTarget, args: DraftTrainingConfig, prompts: Dataset) -> Dataset:
    """
    Return every prompt with the target's response; each rank writes its share of those not in the store. Collective.

    Args:
        target ([`FrozenTarget`]), args ([`DraftTrainingConfig`]): Writer and settings.
        prompts (`Dataset`): Rows with `prompt_ids` and `sample_id`.

    Returns:
        `Dataset` with `prompt_ids` and `completion_ids`, in the order of `prompts`.
    """
    state = PartialState()
    store = open_store(target, args)
    prompt_ids = list(prompts["prompt_ids"])
    missing = store.missing(prompt_ids)[state.process_index :: state.num_processes]
    rows = {prompt_key(prompt): row for prompt, row in zip(prompt_ids, prompts["sample_id"], strict=True)}
    # All ranks cut the same list into shares, so nobody may write before everybody has looked.
    state.wait_for_everyone()
    with naming_rows([rows[prompt_key(prompt)] for prompt in missing], "the dataset"):
        generate_missing(
            store,
            target,
            missing,
            batch_size=args.generation_batch_size,
            seed=args.seed,
            shard_size=args.generation_batch_size,
            show_progress=not args.disable_tqdm and state.is_local_main_process,
        )
    target.finish_together()
    state.wait_for_everyone()
    store.refresh()
    responses = [store.find(prompt) for prompt in prompt_ids]
    return Dataset.from_dict({"prompt_ids": prompt_ids, "completion_ids": responses})


class ResponseSource:
    """
    Turns batches of rows into text the target wrote.

    Args:
        target ([`FrozenTarget`]): Writer of the responses.
        args ([`DraftOPDConfig`]): Settings.
        prompts (`Dataset`, *optional*):
            Tokenized prompts of the training set. When the target has to write anyway, it also answers prompts from here that have no
            response yet, up to a whole generation batch; `None` where the run will not come to all of them.
        rank (`int`), num_ranks (`int`): Ranks answer different prompts of the pool.
        show_progress (`bool`): Draw a progress bar over responses.
    """

    def __init__(
        self,
        target: FrozenTarget,
        args: DraftOPDConfig,
        prompts: Dataset | None,
        rank: int,
        num_ranks: int,
        show_progress: bool,
    ):
        self.target, self.args = target, args
        self.prompts, self.rank, self.num_ranks = prompts, rank, num_ranks
        self.show_progress = show_progress
        self._next_row = rank
        # What the check of the first step's rows found.
        self.audit: ResponseAudit | None = None
        self._store: TrajectoryStore | None = None

    @property
    def store(self) -> TrajectoryStore:
        """The store of this run, opened on first use."""
        if self._store is None:
            self._store = open_store(self.target, self.args)
        return self._store

    def texts(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[TargetText]:
        """
        Return the text of every micro-batch of an optimiser step.

        Raises:
            ValueError: If too many tokens of the first step's text are not what this target writes, or the store is another target's.
        """
        if self.args.completions_from_target:
            texts = [text_of(batch) for batch in batches]
        else:
            self._answer(batches)
            texts = [self._join(batch) for batch in batches]
        if self.audit is None:
            # Once, before anything is trained on them.
            self.audit = check_responses(
                self.target,
                [pair for text in texts for pair in response_pairs(text)],
                self.args.sampling_settings(),
                warn_above=self.args.warn_mismatch_share,
                refuse_above=self.args.max_mismatch_share,
            )
        return texts

    def _join(self, batch: dict[str, torch.Tensor]) -> TargetText:
        prompts = prompt_rows(batch)
        responses = [self.store.find(prompt) for prompt in prompts]
        device = batch["prompt_ids"].device
        return join_responses(prompts, responses, batch["sample_ids"].tolist(), self.target.pad_token_id, device)

    def _answer(self, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        """Have the target answer the prompts of these batches that have no response yet, and fill the generation batch up."""
        prompts = [prompt for batch in batches for prompt in prompt_rows(batch)]
        if not self.store.missing(prompts):
            return
        # Another rank, or another run on the same store, may have answered meanwhile.
        self.store.refresh()
        rows = [row for batch in batches for row in batch["sample_ids"].tolist()]
        row_of = {tuple(prompt): row for prompt, row in zip(prompts, rows, strict=True)}
        missing = {tuple(prompt): row_of[tuple(prompt)] for prompt in self.store.missing(prompts)}
        size = self.args.generation_batch_size
        self._add_prompts(missing, size)
        with naming_rows(list(missing.values()), "the dataset"):
            generate_missing(
                self.store,
                self.target,
                list(missing),
                batch_size=size,
                seed=self.args.seed,
                shard_size=size,
                show_progress=self.show_progress,
            )

    def _add_prompts(self, missing: dict[tuple[int, ...], int], size: int) -> None:
        """Fill `missing`, prompts and their rows, up to `size` with prompts of this rank's share that have no response yet."""
        while self.prompts is not None and len(missing) < size and self._next_row < len(self.prompts):
            row = self.prompts[self._next_row]
            self._next_row += self.num_ranks
            if self.store.find(row["prompt_ids"]) is None:
                missing.setdefault(tuple(row["prompt_ids"]), row["sample_id"])
