# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Write a drafter for those who serve it: every layout, its settings and its card, in one folder that becomes a repository.

All of it is made beside the folder and put in place by one rename, so that no reader ever sees half an export.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ..drafters.base import Drafter
from ..drafters.published.checkpoint import CONFIG_FILE, SAFETENSORS_FILE
from ..drafters.target_shape import check_layer_ids
from ..utils.atomic_files import making_folder
from . import native, speculators
from .card import CARD_FILE, CURVE_FILE, write_card
from .custom_generate import write_custom_generate
from .flat import flat_config, flat_tensors
from .record import RECORD_FILE, TrainingRecord, write_record
from .serving import SERVING_FILE, measured_facts, serving_settings
from .source import embedding_scale


LAYOUTS = ("flat", "speculators", "transformers")
CUSTOM_GENERATE = "custom_generate"
#: Everything an export writes at the root of its folder; nothing else is ever replaced or uploaded.
PUBLISHED_NAMES = frozenset(
    {CONFIG_FILE, SAFETENSORS_FILE, CARD_FILE, CURVE_FILE, RECORD_FILE, SERVING_FILE, CUSTOM_GENERATE, *LAYOUTS[1:]}
)


@dataclass(frozen=True)
class ExportResult:
    """
    What [`export_drafter`] wrote.

    Attributes:
        folder (`Path`): The folder.
        layouts (`dict[str, Path]`): Layout to the folder that holds it.
        refused (`dict[str, str]`): Layout to the reason it could not be written; under `to="all"` alone.
    """

    folder: Path
    layouts: dict[str, Path]
    refused: dict[str, str]


def export_drafter(
    drafter: Drafter,
    folder: str | Path,
    *,
    to: str = "all",
    embedding: torch.Tensor | None = None,
    target_config: PreTrainedConfig | None = None,
    target_id: str | None = None,
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
            `"flat"`, `"speculators"` or `"transformers"` write that layout at the root; `"all"` writes the flat layout at the root
            and the others, where they can hold the drafter, in folders of their names.
        embedding (`torch.Tensor` of shape `(V, H)`, *optional*):
            The target's embedding; needed for EAGLE-3.
        target_config ([`~transformers.PreTrainedConfig`], *optional*):
            The target's config: what the drafter is checked against, and the architecture the speculators format names.
        target_id (`str`, *optional*):
            Hub id of the target; needed for the speculators layout and the card's metadata.
        repo_id (`str`, *optional*):
            Hub id the folder will have, for commands that can be pasted.
        record ([`TrainingRecord`], *optional*):
            What was trained and measured.
        license (`str`, *optional*):
            Licence of the drafter, for the card.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Precision of the drafter's weights. Engines read bfloat16 everywhere; another one is for exact copies of a drafter
            published in it.

    Returns:
        [`ExportResult`]

    Raises:
        ValueError: If a layout that was asked for cannot hold the drafter, something it needs is missing, or the folder
            holds other things. Nothing is written then.
    """
    if to not in (*LAYOUTS, "all"):
        raise ValueError(f"`to` must be one of {(*LAYOUTS, 'all')}, got {to!r}.")
    folder = Path(folder)
    check_folder_is_ours(folder)
    reasons = unwritable_layouts(drafter, embedding, target_config, target_id)
    asked = LAYOUTS if to == "all" else (to,)
    if asked[0] in reasons:
        raise ValueError(f"The drafter cannot be written in the {asked[0]} layout: {reasons[asked[0]]}.")
    wanted = [name for name in asked if name not in reasons]
    with making_folder(folder) as staged:
        flat = flat_config(drafter, target_id=target_id, dtype=dtype)
        tensors = flat_tensors(drafter, embedding, dtype)
        for name in wanted:
            place = staged if name == asked[0] else staged / name
            write_layout(place, *_layout(name, drafter, flat, tensors, target_config, target_id))
        # DFlash decodes through transformers' own class, so its function needs that layout beside it.
        if wanted[0] == "flat" and (drafter.config.family == "eagle3" or "transformers" in wanted):
            write_custom_generate(staged, drafter.config.family, repo_id)
        if (folder / CARD_FILE).is_file():
            # The new card keeps the notes people wrote into the earlier one.
            shutil.copy(folder / CARD_FILE, staged / CARD_FILE)
        architectures = list(getattr(target_config, "architectures", None) or [])
        write_about(staged, flat, wanted, record, target_id, repo_id, architectures, license)
    places = {name: folder if name == asked[0] else folder / name for name in wanted}
    return ExportResult(folder, places, {name: reasons[name] for name in asked if name in reasons})


def unwritable_layouts(
    drafter: Drafter,
    embedding: torch.Tensor | None,
    target_config: PreTrainedConfig | None,
    target_id: str | None,
) -> dict[str, str]:
    """
    Return, by layout, why it cannot hold this drafter; layouts that can are left out.

    Raises:
        ValueError: If the drafter and the target's config or embedding do not belong together.
    """
    shape = (drafter.config.vocab_size, drafter.config.target_hidden_size)
    if embedding is not None and tuple(embedding.shape) != shape:
        raise ValueError(
            f"The embedding has shape {tuple(embedding.shape)}, but this drafter's target has {shape}. Give the target it was trained for."
        )
    if target_config is not None:
        _check_target(drafter, target_config)
    reasons = {}
    if drafter.config.family == "eagle3" and embedding is None:
        reasons["flat"] = reasons["speculators"] = (
            "an EAGLE-3 drafter is published with a copy of its target's embedding, because some engines leave a missing one "
            "uninitialised. Give the target (`--target`, in Python `embedding=`)"
        )
    scale = None if target_config is None else embedding_scale(target_config)
    if scale is not None:
        reasons["flat"] = reasons["speculators"] = (
            f"the target scales its embeddings ({scale}), and the drafter was trained on scaled ones, but engines hand it the bare rows"
        )
    found = {
        "speculators": speculators.check_drafter(drafter, target_id),
        "transformers": native.check_drafter(drafter),
    }
    return {name: reason for name, reason in found.items() if reason is not None} | reasons


def _check_target(drafter: Drafter, target_config: PreTrainedConfig) -> None:
    config = drafter.config
    names = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.target_hidden_size,
        "num_hidden_layers": config.num_target_layers or target_config.num_hidden_layers,
    }
    wrong = {
        name: (own, getattr(target_config, name)) for name, own in names.items() if own != getattr(target_config, name)
    }
    if wrong:
        raise ValueError(
            f"The drafter was made for another target: (drafter, target) {wrong}. Give the target it was trained for."
        )
    check_layer_ids(config.target_layer_ids, target_config.num_hidden_layers)


def _layout(
    name: str,
    drafter: Drafter,
    flat: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    target_config: PreTrainedConfig | None,
    target_id: str | None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return config and tensors of one layout."""
    if name == "flat":
        return flat, tensors
    if name == "transformers":
        return native.native_config(flat), native.native_tensors(tensors)
    config = speculators.speculators_config(
        flat,
        family=drafter.config.family,
        target_id=target_id,
        target_architectures=list(getattr(target_config, "architectures", None) or []),
        num_drafts=drafter.default_num_drafts,
    )
    return config, speculators.speculators_tensors(tensors)


def write_layout(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    # The one piece of metadata transformers wants to see.
    save_file(tensors, folder / SAFETENSORS_FILE, metadata={"format": "pt"})
    # safetensors writes for the owner alone; a server often runs as somebody else.
    shutil.copymode(folder / CONFIG_FILE, folder / SAFETENSORS_FILE)


def write_about(
    folder: Path,
    flat: dict[str, Any],
    layouts: list[str],
    record: TrainingRecord | None,
    target_id: str | None,
    repo_id: str | None,
    target_architectures: list[str],
    license: str | None,
) -> None:
    """Write what is not the drafter itself: how to serve it, what is known of it, and the card."""
    settings = serving_settings(
        flat,
        target_id=target_id,
        repo_id=repo_id,
        target_architectures=target_architectures,
        layouts=layouts,
        **measured_facts(record, flat),
    )
    (folder / SERVING_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if record is not None:
        write_record(record, folder)
    write_card(
        folder,
        config=flat,
        record=record,
        repo_id=repo_id,
        layouts=layouts,
        target_id=target_id,
        target_architectures=target_architectures,
        license=license,
    )


def check_folder_is_ours(folder: Path) -> None:
    """
    Refuse a folder that an export would destroy something in.

    Raises:
        ValueError: If it holds anything but an earlier export.
    """
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file. Name a folder.")
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(held - PUBLISHED_NAMES)
    if held and (foreign or SERVING_FILE not in held):
        raise ValueError(
            f"{str(folder)!r} holds {foreign or sorted(held)}, which no export wrote. Name an empty folder, a new one, or an earlier export."
        )
