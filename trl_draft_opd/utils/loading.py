# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What is loaded by name: whether a folder or repository is there at all, asked once; and transformers' models whole on
every rank, whatever the launcher asks for. Knows no target and no drafter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from accelerate.utils import disable_fsdp_ram_efficient_loading
from huggingface_hub import HfApi, constants, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.integrations import deepspeed
from transformers.modeling_utils import is_fsdp_enabled  # pyright: ignore[reportPrivateImportUsage]

from .versions import TRANSPORT_ERRORS


# Seconds for the one question whether a repository exists.
_TIMEOUT = 10.0


def require_model(
    name: str,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> None:
    """
    Refuse a name under which there is no folder here and no repository on the Hub, before anything is downloaded.

    A name that only a path can have is never asked for on the Hub; any other one once, because downloading would try a
    Hub that is out of reach again and again.

    Raises:
        FileNotFoundError: With both things that a name could be, where it could be both.
    """
    path = Path(name)
    if name and path.is_dir():
        return
    if path.is_file():
        raise FileNotFoundError(f"{name!r} is a file. Give the folder it lies in.")
    if not name or path.is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {name!r}. Give the one that holds config.json, or a Hub id.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(f"There is no folder {name!r}, and it is no Hub id: {error}") from error
    snapshots = Path(
        cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots"
    )
    if snapshots.is_dir():
        return
    if local_files_only or is_offline_mode():
        raise FileNotFoundError(
            f"There is no folder {name!r} here, and no model of that name in the cache of the Hub, which is all that "
            "may be read offline. Check the path, or download it first."
        )
    _require_repository(name, token)


@cache  # of what was found; a failure is asked for again
def _require_repository(name: str, token: str | bool | None) -> None:
    missing = f"There is no folder {name!r} here"
    try:
        HfApi(token=token).model_info(name, timeout=_TIMEOUT)
    except HfHubHTTPError as error:
        # To who may not read it, a private one looks like one that is not there.
        if error.response.status_code in (401, 404):
            raise FileNotFoundError(
                f"{missing}, and no model of that name on the Hub that you may read. Check the path or the id; for a "
                "private one, `hf auth login`."
            ) from error
        # Otherwise a download tells what is wrong, and tries again where that may pass.
    except TRANSPORT_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FileNotFoundError(
            f"{missing}, and the Hub could not be asked for a model of that name ({reason}). Check the path, or your "
            "connection."
        ) from error


@contextmanager
def loading_whole() -> Iterator[None]:
    """
    Have `from_pretrained` load whole weights on every rank while the context lasts.

    Under ZeRO-3 it would shard every model, the frozen target too. Under FSDP's RAM-efficient loading only the first
    rank would read the file; that stays off, because our drafters are sharded from whole weights.
    """
    if is_fsdp_enabled():
        disable_fsdp_ram_efficient_loading()
    # transformers holds it weakly and has no public accessor for it; without one, nothing is sharded.
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)
