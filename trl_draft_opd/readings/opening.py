# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Opens what the setting `readings` names, a store or servers, for a target and the layers of its drafter."""

from collections.abc import Sequence
from pathlib import Path

from ..target.frozen import FrozenTarget
from .fetching import Fetcher
from .manifest import refuse_responses
from .prefetch import PREFETCH_BYTES, PrefetchingSource
from .server import ReadingServers
from .store import ReadingStore


_SCHEMES = ("http://", "https://")


def is_address(readings: str) -> bool:
    """Whether the setting names servers, and no folder."""
    return readings.strip().lower().startswith(_SCHEMES)


def check_shared_folder(readings: str | None, shared_folder: str | None) -> None:
    """Raise `ValueError` where servers are named without the folder that they share, or a folder without servers."""
    is_served = readings is not None and is_address(readings)
    if shared_folder is not None and not is_served:
        raise ValueError(
            f"`shared_folder` {shared_folder!r} is where servers leave states, and `readings` is {readings!r}. "
            "Give the servers' `http://...` in `readings`, or leave `shared_folder` out."
        )
    if is_served and shared_folder is None:
        raise ValueError(
            f"`readings={readings!r}` names servers, which leave states in a folder that they share with this "
            "machine. Name it in `shared_folder` (their `shared_storage_path`, as this machine sees it)."
        )


def open_readings(
    target: FrozenTarget,
    readings: str,
    layer_ids: Sequence[int],
    *,
    shared_folder: str | Path | None = None,
    limit_bytes: int = PREFETCH_BYTES,
) -> PrefetchingSource:
    """
    Open a store or servers, and check that what they have is this target's.

    Args:
        target ([`FrozenTarget`]): The target, with or without its body.
        readings (`str`): The folder of a store, or addresses of servers, separated by commas.
        layer_ids (`Sequence[int]`): Layers to read, ascending.
        shared_folder (`str` or `Path`, *optional*): Where the servers leave states, as this machine sees it.
        limit_bytes (`int`, *optional*, defaults to `2147483648`): Host memory for what is fetched ahead.

    Returns:
        [`PrefetchingSource`]: For `target.source`; close it when done.

    Raises:
        ValueError: If there is no store or no such server, or it is of another target, precision or other layers.
        OSError: If it cannot be reached.
    """
    fetcher: Fetcher
    if is_address(readings):
        addresses = [each.strip() for each in readings.split(",") if each.strip()]
        strange = [each for each in addresses if not is_address(each)]
        if strange:
            raise ValueError(
                f"`readings` names {strange[0]!r} beside servers, which begin with `http://`. Give addresses alone, "
                "separated by commas, or one folder."
            )
        if shared_folder is None:
            raise ValueError(
                "Servers leave states in a folder that they share with this machine. Name it in `shared_folder` "
                "(their `shared_storage_path`, as this machine sees it)."
            )
        fetcher = ReadingServers.connect(target, addresses, layer_ids, shared_folder=shared_folder)
    else:
        _check_folder(Path(readings))
        fetcher = ReadingStore.open_for(target, readings, layer_ids)
    return PrefetchingSource(fetcher, layer_ids, limit_bytes)


def _check_folder(folder: Path) -> None:
    """Refuse what is mistaken for a store of readings: no folder, and one of responses."""
    if not folder.is_dir():
        raise ValueError(
            f"`readings` {str(folder)!r} is no folder. Write one with `trl-draft-opd read`; servers begin with "
            "`http://`."
        )
    refuse_responses(folder)
