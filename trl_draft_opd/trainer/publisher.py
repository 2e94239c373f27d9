# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a run publishes: the names of repository and target, the record of what was trained and measured, exports, cards
and pushes.

Knows the settings and the pair of a run; refuses to know its trainer, whose state is handed in.
"""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..drafters.base import Drafter
from ..export import Publication, TargetOfExport, export_drafter, hub_id_of, read_target
from ..export.card import write_card
from ..export.hub import create_repository, push_folder, validate_repo_id
from ..export.record import (
    Measurement,
    StageRecord,
    TrainingRecord,
    describe_target,
    describe_versions,
    prompts_digest,
    read_record,
)
from ..export.serving import serving_settings
from ..rollout.counts import Counts
from .adapters import is_adapted
from .common_config import DraftTrainingConfig, parsed
from .metrics import DecodedPrompt
from .pair import Pair


logger = logging.getLogger(__name__)

_FAMILY_WORDS = {"eagle3": "EAGLE3", "dflash": "DFlash"}
_RESAMPLES = 2000


class Publisher:
    """
    The Hub's side of a run.

    Making one refuses what could not be pushed later, before the target responds or anything is trained: with
    `push_to_hub=True` it checks the names, then the token, by making the repository.

    Attributes:
        target_id: Hub id by which a drafter names its target; `None` where only a path is known.
        repo_id: Full name of the repository, once it is made.
        earlier: Record in the folder that the drafter was loaded from, if there is one.
        measurements: What was measured in this run, by metric prefix and step.
    """

    def __init__(self, args: DraftTrainingConfig, pair: Pair):
        self.args, self.target, self.num_drafts = args, pair.target, pair.num_drafts
        self.family = pair.drafter.config.family
        # A setting is an id even where a folder of that name lies beside the run.
        self.target_id = args.hub_target_id or hub_id_of(pair.target.config.name_or_path)
        self.repo_id: str | None = None
        self.earlier = _read_earlier_record(pair.drafter.config.name_or_path)
        self.measurements: dict[tuple[str, int], Measurement] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._push: Future | None = None
        if args.push_to_hub:
            validate_repo_id(self.repo_name, self.family)
            self.require_target_id()
            if args.process_index == 0:
                self.make_repository()

    @property
    def repo_name(self) -> str:
        """`hub_model_id`, or a name from the output folder that contains the family, as vLLM wants it."""
        if self.args.hub_model_id is not None:
            return self.args.hub_model_id
        name, word = self.args.output_folder.absolute().name, _FAMILY_WORDS[self.family]
        return name if word.lower() in name.lower() else f"{name}-{word}"

    def require_target_id(self) -> str:
        """Return the Hub id by which a published drafter names its target; raise `ValueError` if there is none."""
        if self.target_id is None:
            raise ValueError(
                "A published drafter names its target by its Hub id, but this target is known as "
                f"{self.target.config.name_or_path or 'an instance'!r} only. Set `hub_target_id='ORG/NAME'`."
            )
        return self.target_id

    # -- the record ---------------------------------------------------------------------------------------------------

    def measure(self, prefix: str, prompts: Sequence[DecodedPrompt], steps: int) -> Measurement:
        """Add the measurement of one set of prompts after a number of steps; `prefix` is that of its metrics."""
        counts = sum((prompt.counts for prompt in prompts), Counts())
        low, high = counts.interval(num_resamples=_RESAMPLES, seed=self.args.seed)
        measured = Measurement(
            prompt_set=_one_word("evaluation" if prefix == "eval" else prefix.removeprefix("eval_")),
            prompts_sha256=prompts_digest([prompt.ids for prompt in prompts]),
            num_prompts=len(prompts),
            temperature=self.args.temperature,
            draft_sampling=self.args.draft_sampling,
            num_drafts=self.num_drafts,
            max_new_tokens=self.args.max_completion_length,
            batch_size=self.args.per_device_eval_batch_size,
            ignore_eos=False,
            tau=counts.tau,
            tau_low=low,
            tau_high=high,
            acceptance_per_slot=counts.acceptance_per_slot,
            num_blocks=counts.num_blocks,
            num_different=None,
            target_dtype=str(self.target.causal_lm.dtype).removeprefix("torch."),
            after_steps=steps,
        )
        self.measurements[prefix, steps] = measured
        return measured

    def record(self, stage: StageRecord | None, steps: int) -> TrainingRecord:
        """
        Return what was trained and measured, earlier stages included; `stage` is this run, `None` before its first
        step.
        """
        assert self.target.tokenizer is not None, "the datasets were read with it"
        template = self.target.tokenizer.chat_template
        target = describe_target(
            self.target.config,
            name=None,
            revision=self.args.target_revision,
            dtype=self.target.causal_lm.dtype,
            num_parameters=self.target.causal_lm.num_parameters(),
            # Tokenizers may hold several.
            chat_template=self.args.chat_template
            or (template.get("default") if isinstance(template, dict) else template),
            chat_template_kwargs=parsed(self.args.chat_template_kwargs),
        )
        stages = list(self.earlier.stages) if self.earlier is not None else []
        # What was measured before the last updates is not this drafter's.
        measured = [m for m in self.measurements.values() if m.after_steps == steps]
        if stage is None and not measured and self.earlier is not None:
            measured = list(self.earlier.measurements)
        return TrainingRecord(
            target=replace(target, name=self.target_id),
            family=self.family,
            stages=stages if stage is None else [*stages, stage],
            measurements=measured,
            versions=describe_versions(),
        )

    # -- files --------------------------------------------------------------------------------------------------------

    def export(self, drafter: Drafter, folder: Path, record: TrainingRecord, license: str | None) -> None:
        """Write a drafter in every layout that can hold it; see [`export_drafter`]."""
        name = self.target.config.name_or_path
        if name:
            # As the target's file holds it.
            token = (parsed(self.args.target_init_kwargs) or {}).get("token")
            embedding = read_target(name, revision=self.args.target_revision, token=token).embedding
        else:
            table: Any = self.target.causal_lm.get_input_embeddings()
            embedding = table.weight
        export_drafter(
            drafter,
            folder,
            target=TargetOfExport(self.require_target_id(), self.target.causal_lm.config, embedding),
            repo_id=self.repo_id or self.repo_name,
            record=record,
            license=license or self.args.hub_license,
        )

    def write_card(
        self,
        drafter: Drafter,
        folder: Path,
        record: TrainingRecord,
        license: str | None = None,
        draws_curve: bool = True,
    ) -> None:
        """Write the card of a checkpoint, which has the flat layout's names."""
        publication = Publication.of(
            drafter,
            dtype=torch.float32,
            layouts=("flat",),
            target=TargetOfExport(self.target_id, self.target.config),
            repo_id=self.repo_id or self.args.hub_model_id,
            license=license or self.args.hub_license,
            record=record,
        )
        settings = serving_settings(publication)
        write_card(folder, publication, settings, draws_curve=draws_curve, is_adapter=is_adapted(drafter))

    # -- pushes -------------------------------------------------------------------------------------------------------

    def make_repository(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository if it is not there yet; see [`create_repository`]."""
        private = self.args.hub_private_repo if private is None else private
        self.repo_id = create_repository(self.repo_name, token=token or self.args.hub_token, private=private)

    @property
    def is_pushing(self) -> bool:
        """Whether a push is under way in the background."""
        return self._push is not None and not self._push.done()

    def push(
        self,
        folder: Path,
        commit_message: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        extra_folders: dict[str, str] | None = None,
        blocking: bool,
    ) -> "str | Future":
        """Push an export, see [`push_folder`]; what is not given is taken from the settings."""
        assert self.repo_id is not None, "the repository is made before the first push"
        push = partial(
            push_folder,
            folder,
            self.repo_id,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            extra_folders=extra_folders,
        )
        if blocking:
            return push()
        self._push = self._pool.submit(push)
        return self._push

    def finish_push(self) -> None:
        """Wait for a push in the background, and warn if it failed, whatever the reason."""
        push, self._push = self._push, None
        error = push.exception() if push is not None else None
        if error is not None:
            logger.warning("A push failed, training goes on: %s", error)


def _one_word(name: str) -> str:
    """Return a user's name for a set of prompts as the record takes it: it may be a path, or a sentence."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-_")[:64] or "evaluation"


def _read_earlier_record(name: str | None) -> TrainingRecord | None:
    """Return the record in the folder a drafter was loaded from, if that is a folder with one."""
    record = read_record(name) if name and Path(name).is_dir() else None
    if record is None:
        return None
    return replace(record, measurements=[replace(measured, after_steps=None) for measured in record.measurements])
