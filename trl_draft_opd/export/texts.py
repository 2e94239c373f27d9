# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What an export says in words and settings, beside its layouts: written with them, and again when the repository gets
another name or the drafter a measurement.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedConfig

from ..drafters.auto import DRAFTER_CLASSES
from ..drafters.published.checkpoint import CONFIG_FILE, CheckpointSource
from ..drafters.published.configs import parse_drafter_config
from ..utils.atomic_files import clear_leftovers, explaining_failure, move_files, staging_folder
from .card import CARD_FILE, write_card
from .custom_generate import write_custom_generate
from .publication import LAYOUTS, Publication
from .record import Measurement, TrainingRecord, read_record, write_record
from .served import ServedSpeed
from .serving import SERVING_FILE, serving_settings
from .source import TargetOfExport


# Of the settings, what texts are written from again.
_NEEDED = ("num_drafts", "target", "target_architectures", "repository")
# What texts in the making are called.
_TEXTS = "texts"


def write_texts(place: Path, publication: Publication, *, notes_of: Path) -> None:
    """Write settings, record and card into `place`; the notes in the card of the folder `notes_of` are kept."""
    settings = serving_settings(publication)
    (place / SERVING_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if publication.record is not None:
        write_record(publication.record, place)
    write_card(place, publication, settings, notes_of=notes_of)


def read_publication(folder: Path) -> Publication:
    """
    Return what an export was written from, as far as its texts tell.

    Raises:
        ValueError: If the folder holds no export, or its files are damaged.
    """
    if not (folder / SERVING_FILE).is_file():
        raise ValueError(
            f"{str(folder)!r} has no {SERVING_FILE}: it is no export. Make one with `trl-draft-opd export`."
        )
    raw, settings = (CheckpointSource(str(folder)).read_json(name) for name in (CONFIG_FILE, SERVING_FILE))
    missing = [name for name in _NEEDED if name not in settings]
    if missing:
        raise ValueError(f"{SERVING_FILE} of {str(folder)!r} lacks {missing}. Export the drafter again.")
    dtype = getattr(torch, str(raw.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{CONFIG_FILE} of {str(folder)!r} has dtype={raw.get('dtype')!r}. Export the drafter again.")
    parsed = parse_drafter_config(raw, num_target_layers=None)
    others = [name for name in LAYOUTS if (folder / name / CONFIG_FILE).is_file() and name != parsed.layout]
    return Publication(
        config=DRAFTER_CLASSES[parsed.family].config_class(**parsed.arguments),
        num_drafts=settings["num_drafts"],
        dtype=dtype,
        layouts=(parsed.layout, *others),
        target=TargetOfExport(settings["target"], PreTrainedConfig(architectures=settings["target_architectures"])),
        repo_id=settings["repository"],
        license=_licence_of(folder / CARD_FILE),
        record=read_record(folder),
    )


def _licence_of(card: Path) -> str | None:
    if not card.is_file():
        return None
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return data.get("license_name") or data.get("license")


def renamed_texts(folder: Path, repo_id: str) -> dict[str, bytes]:
    """
    Return the texts of an export that name its repository, by their place, as they are for `repo_id`; nothing where
    they name it already. The folder stays as it is.
    """
    if CheckpointSource(str(folder)).read_json(SERVING_FILE).get("repository") == repo_id:
        return {}
    publication = replace(read_publication(folder), repo_id=repo_id)
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_texts(place, publication, notes_of=folder)
        if publication.has_custom_generate:
            write_custom_generate(place, repo_id)
        written = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    own = {path: (folder / path).read_bytes() if (folder / path).is_file() else None for path in written}
    return {path.as_posix(): text for path, text in written.items() if text != own[path]}


def add_measurement(folder: Path, measurement: Measurement, make_record: Callable[[], TrainingRecord]) -> list[str]:
    """
    Put a measurement into the record of a drafter's folder, in place of an earlier one under the same conditions, and
    of an export also onto its card; return the files written.

    Where the folder has no record, `make_record` makes one.
    """
    record = read_record(folder) or make_record()
    kept = [each for each in record.measurements if _conditions(each) != _conditions(measurement)]
    return _write_record(folder, replace(record, measurements=[*kept, measurement]))


def add_served_speed(folder: Path, served: ServedSpeed, make_record: Callable[[], TrainingRecord]) -> list[str]:
    """As [`add_measurement`], of a server's speed."""
    record = read_record(folder) or make_record()
    kept = [each for each in record.served if _served_conditions(each) != _served_conditions(served)]
    return _write_record(folder, replace(record, served=[*kept, served]))


def _write_record(folder: Path, record: TrainingRecord) -> list[str]:
    """Put a record into a drafter's folder, and of an export also onto its card; return the files written."""
    is_export = (folder / SERVING_FILE).is_file()
    clear_leftovers(folder, re.compile(_TEXTS))
    fix = f"The texts in {str(folder)!r} are as they were. Make room and measure again"
    with explaining_failure("The measurement", fix), staging_folder(folder, _TEXTS) as staged:
        if is_export:
            write_texts(staged, replace(read_publication(folder), record=record), notes_of=folder)
        else:
            write_record(record, staged)
        names = sorted(path.name for path in staged.iterdir())
        move_files(staged, folder)
    return names


def _conditions(measurement: Measurement) -> tuple:
    """Return what must be equal for a measurement to take another one's place."""
    names = ("prompts_sha256", "temperature", "draft_sampling", "num_drafts", "max_completion_length", "ignore_eos")
    return tuple(getattr(measurement, name) for name in names)


def _served_conditions(served: ServedSpeed) -> tuple:
    names = ("prompts_sha256", "machine", "engine", "max_completion_length", "temperature", "ignore_eos")
    return tuple(getattr(served, name) for name in names)
