# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Write a drafter for those who serve it: every layout, its settings and its card, in one folder that becomes a
repository.

All of it is made in a temporary sibling folder and put in place by one rename, so that no reader ever sees half an
export.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..drafters.base import Drafter
from ..drafters.published.checkpoint import CONFIG_FILE, SAFETENSORS_FILE
from ..drafters.target_shape import check_layer_ids
from ..utils.atomic_files import check_place, check_replaceable, explaining_failure, making_folder
from .card import CARD_FILE, CURVE_FILE
from .custom_generate import FILES, write_custom_generate
from .layouts import LAYOUT_OF, flat_config, flat_tensors
from .publication import LAYOUTS, Publication
from .record import RECORD_FILE, TrainingRecord
from .serving import SERVING_FILE
from .source import TargetOfExport
from .texts import write_texts


CUSTOM_GENERATE = "custom_generate"
#: Everything an export writes, relative to its folder; nothing else is ever replaced or uploaded.
PUBLISHED_FILES = frozenset(
    {CONFIG_FILE, SAFETENSORS_FILE, CARD_FILE, CURVE_FILE, RECORD_FILE, SERVING_FILE}
    | {f"{CUSTOM_GENERATE}/{name}" for name in FILES}
    | {f"{layout}/{name}" for layout in LAYOUTS[1:] for name in (CONFIG_FILE, SAFETENSORS_FILE)}
)
#: Their places at the root of the folder.
PUBLISHED_NAMES = frozenset(name.split("/")[0] for name in PUBLISHED_FILES)


@dataclass(frozen=True)
class ExportResult:
    """
    What [`export_drafter`] wrote.

    Attributes:
        folder (`Path`): The folder.
        layouts (`dict[str, Path]`): Layout to the folder that holds it.
        refused (`dict[str, str]`): Layout to the reason it could not be written; only under `to="all"`.
    """

    folder: Path
    layouts: dict[str, Path]
    refused: dict[str, str]


def export_drafter(
    drafter: Drafter,
    folder: str | Path,
    *,
    to: str = "all",
    target: TargetOfExport | None = None,
    repo_id: str | None = None,
    record: TrainingRecord | None = None,
    license: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ExportResult:
    """
    Write a drafter in the layouts that engines load as they are.

    Args:
        drafter ([`Drafter`]):
            The drafter, adapters merged.
        folder (`str` or `Path`):
            Where to; must be empty, missing, or an earlier export, which is replaced (its notes in the card survive).
        to (`str`, *optional*, defaults to `"all"`):
            `"flat"`, `"speculators"` or `"transformers"` write that layout at the root; `"all"` writes the flat layout
            at the root and the others, where they can hold the drafter, in folders of their names.
        target ([`TargetOfExport`], *optional*):
            The target, see [`read_target`]: its embedding is needed for EAGLE-3, its Hub id for the speculators layout
            and the card, its config to check the drafter against it.
        repo_id (`str`, *optional*):
            Hub id the folder will have, for commands that can be pasted.
        record ([`TrainingRecord`], *optional*):
            What was trained and measured.
        license (`str`, *optional*):
            Licence of the drafter, for the card.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Precision of the drafter's weights. Engines read bfloat16 everywhere; another one is for exact copies of a
            drafter published in it.

    Returns:
        [`ExportResult`]

    Raises:
        ValueError: If a layout that was asked for cannot hold the drafter, something it needs is missing, or the
            folder holds other things, is a mount point, or cannot be a folder. Nothing is written then.
        OSError: If it cannot be written; what was in the folder is as it was.
    """
    if to not in (*LAYOUTS, "all"):
        raise ValueError(f"`to` must be one of {(*LAYOUTS, 'all')}, got {to!r}.")
    folder, target = Path(folder), target or TargetOfExport()
    check_export_folder(folder)
    _check_target(drafter, target)
    refusals = {name: layout.find_refusal(drafter, target) for name, layout in LAYOUT_OF.items()}
    reasons = {name: reason for name, reason in refusals.items() if reason is not None}
    asked = LAYOUTS if to == "all" else (to,)
    if asked[0] in reasons:
        raise ValueError(f"The drafter cannot be written in the {asked[0]} layout: {reasons[asked[0]]}.")
    layouts = tuple(name for name in asked if name not in reasons)
    publication = Publication.of(
        drafter, dtype=dtype, layouts=layouts, target=target, repo_id=repo_id, license=license, record=record
    )
    fix = f"What was in {str(folder)!r} is as it was. Make room, or name another folder, and export again"
    with explaining_failure("The export", fix), making_folder(folder) as staged:
        _write_layouts(staged, drafter, publication)
        if publication.has_custom_generate:
            write_custom_generate(staged, repo_id)
        write_texts(staged, publication, notes_of=folder)
    places = {name: folder if name == asked[0] else folder / name for name in layouts}
    return ExportResult(folder, places, {name: reasons[name] for name in asked if name in reasons})


def _check_target(drafter: Drafter, target: TargetOfExport) -> None:
    """Refuse a drafter and a target that do not belong together."""
    own = drafter.config
    shape = (own.vocab_size, own.target_hidden_size)
    if target.embedding is not None and tuple(target.embedding.shape) != shape:
        raise ValueError(
            f"The embedding has shape {tuple(target.embedding.shape)}, but this drafter's target has {shape}. Give "
            "the target it was trained for."
        )
    if target.config is None:
        return
    layers = target.config.num_hidden_layers
    pairs = {
        "vocab_size": (own.vocab_size, target.config.vocab_size),
        "hidden_size": (own.target_hidden_size, target.config.hidden_size),
        "num_hidden_layers": (own.num_target_layers or layers, layers),
    }
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        raise ValueError(
            f"The drafter was made for another target: (drafter, target) {wrong}. Give the target it was trained for."
        )
    check_layer_ids(own.target_layer_ids, layers)


def _write_layouts(folder: Path, drafter: Drafter, publication: Publication) -> None:
    """Write the first layout into the folder itself, and the others into folders of their names."""
    config, tensors = flat_config(drafter, publication), flat_tensors(drafter, publication)
    for name in publication.layouts:
        place = folder if name == publication.layouts[0] else folder / name
        place.mkdir(exist_ok=True)
        text = json.dumps(LAYOUT_OF[name].config(config, publication), indent=2, sort_keys=True) + "\n"
        (place / CONFIG_FILE).write_text(text, encoding="utf-8")
        # The one piece of metadata transformers wants to see.
        save_file(LAYOUT_OF[name].tensors(tensors), place / SAFETENSORS_FILE, metadata={"format": "pt"})


def check_export_folder(folder: Path) -> None:
    """Refuse a folder in which an export could not be put, or would destroy something."""
    check_place(folder, "The export's folder")
    check_replaceable(folder)
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(held - PUBLISHED_NAMES)
    if held and (foreign or SERVING_FILE not in held):
        raise ValueError(
            f"{str(folder)!r} holds {foreign or sorted(held)}, which no export wrote. Name an empty folder, a new "
            "one, or an earlier export."
        )
