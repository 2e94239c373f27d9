# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Upload an exported folder to the Hub: one commit that holds what an export wrote and nothing else, tried again where the network
failed, with the local folder left as it is.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError
from huggingface_hub.utils import validate_repo_id as validate_hub_id

from ..drafters.importing import CONFIG_FILE, SAFETENSORS_FILE
from .rules import check_repo_name
from .write import PUBLISHED_NAMES


try:
    # huggingface_hub 2 speaks through this package, 1 through its predecessor.
    from httpx2 import TransportError
except ImportError:
    from httpx import TransportError


logger = logging.getLogger(__name__)

NUM_RETRIES = 4
_FIRST_PAUSE = 1.0
# Of the server's making, and likely to pass.
_PASSING = {408, 425, 429, 500, 502, 503, 504}


def validate_repo_id(repo_id: str, family: str | None = None) -> None:
    """
    Refuse names that the Hub or an engine would take for something else.

    Args:
        repo_id (`str`): `ORG/NAME`, or `NAME` in the user's own account.
        family (`str`, *optional*): Family of the drafter; a name without it is warned about.

    Raises:
        ValueError: If the name is no Hub id, or contains `eagle-`.
    """
    try:
        validate_hub_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} cannot be the name of a repository: {error} Use ORG/NAME with letters, digits, '-', '_' and '.'."
        ) from error
    if ".." in repo_id or "--" in repo_id or repo_id.count("/") > 1:
        raise ValueError(f"{repo_id!r} cannot be the name of a repository. Use ORG/NAME.")
    if "eagle-" in repo_id.lower():
        raise ValueError(
            f"{repo_id!r} contains 'eagle-', by which vLLM takes a drafter for EAGLE-1 whenever no method is named. Write EAGLE3 in one word."
        )
    if family is not None:
        for problem in check_repo_name(repo_id, family):
            logger.warning("%s Name the method when you serve it, or rename it.", problem)


def published_files(folder: str | Path) -> list[Path]:
    """
    Return the files of an export, relative to it, sorted.

    Raises:
        ValueError: If the folder holds no export.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG_FILE, SAFETENSORS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} holds no export: {missing} missing. Make one with `trl-draft-opd export`.")
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(path for path in found if path.parts[0] in PUBLISHED_NAMES and "__pycache__" not in path.parts)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload drafter",
    extra_folders: Mapping[str, str | Path] | None = None,
    endpoint: str | None = None,
    num_retries: int = NUM_RETRIES,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """
    Upload an export as one commit; files of an earlier export that are no longer there are deleted in it, others are left alone.

    Args:
        folder (`str` or `Path`): The export.
        repo_id (`str`): Where to; made if it does not exist.
        token (`str`, *optional*): The one stored by `hf auth login` by default.
        private (`bool`, *optional*): Whether a new repository is private; the account's own rule by default.
        revision (`str`, *optional*): Branch; made if it does not exist. The main one by default.
        commit_message (`str`, *optional*): Of the commit.
        extra_folders (`Mapping[str, str | Path]`, *optional*): Checkpoints to add, by their place in the repository, to resume from.
        endpoint (`str`, *optional*): Address of the Hub.
        num_retries (`int`, *optional*, defaults to 4): Times to try again after errors of network or server.
        sleep (`Callable`, *optional*): Waits a number of seconds between them.

    Returns:
        `str`: Address of the commit.

    Raises:
        ValueError: If the name is refused, the folder holds no export, or a file holds the token.
        PermissionError: If the token is missing, expired, or may not write there.
        ConnectionError: If network or server failed to the end.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    files = {path.as_posix(): folder / path for path in published_files(folder)}
    for place, extra in (extra_folders or {}).items():
        files |= {f"{place}/{path.as_posix()}": Path(extra) / path for path in _resumable_files(Path(extra))}
    _refuse_token_in(files, token or get_token())
    api = HfApi(endpoint=endpoint, token=token)

    def upload() -> str:
        made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(made, branch=revision, exist_ok=True)
        ours = PUBLISHED_NAMES | set(extra_folders or {})
        there = api.list_repo_files(made, revision=revision)
        stale = sorted(name for name in there if name.split("/")[0] in ours and name not in files)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        return str(api.create_commit(made, operations, commit_message=commit_message, revision=revision).commit_url)

    return _with_retries(
        upload, f"{str(folder)!r} is complete. Try again with `trl-draft-opd push`", num_retries, sleep
    )


def create_repository(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    endpoint: str | None = None,
    num_retries: int = NUM_RETRIES,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """
    Make a repository if it does not exist, and return its full id.

    Raises:
        ValueError, PermissionError, ConnectionError: As [`push_folder`].
    """
    validate_repo_id(repo_id)
    api = HfApi(endpoint=endpoint, token=token)

    def create() -> str:
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id

    return _with_retries(create, "Nothing was trained yet", num_retries, sleep)


def _resumable_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that a run goes on from; no arguments, no text of rollouts."""
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        path
        for path in found
        if path.name != "training_args.bin" and not path.parts[0].startswith(("_", "completions", "runs"))
    ]


def _refuse_token_in(files: Mapping[str, Path], token: str | None) -> None:
    if not token:
        return
    needle = token.encode()
    for name, path in files.items():
        # Weights are numbers; only the header of their file holds text.
        with path.open("rb") as file:
            content = file.read(2**20) if path.suffix == ".safetensors" else file.read()
        if needle in content:
            raise ValueError(f"{name!r} holds the Hub token. Nothing was uploaded: remove it and revoke the token.")


def _with_retries(upload: Callable[[], str], way_out: str, num_retries: int, sleep: Callable[[float], None]) -> str:
    for attempt in range(num_retries + 1):
        try:
            return upload()
        except (LocalTokenNotFoundError, GatedRepoError) as error:
            raise PermissionError(
                f"The Hub asks for a token with write access: run `hf auth login`. {way_out}."
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise PermissionError(
                f"The Hub does not show the repository to this account: the token is missing, expired or may not write there (`hf auth login`). {way_out}."
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status in (401, 403):
                raise PermissionError(
                    f"The Hub refused the token (status {status}): it is missing, expired or may not write there. Run `hf auth login`. {way_out}."
                ) from error
            if status not in _PASSING:
                raise
            reason = f"status {status}"
            failure: Exception = error
        except (TransportError, ConnectionError, TimeoutError) as error:
            reason, failure = type(error).__name__, error
        if attempt == num_retries:
            raise ConnectionError(
                f"The upload failed {num_retries + 1} times, the last time with {reason}. {way_out}."
            ) from failure
        logger.warning("The upload failed (%s); trying again.", reason)
        sleep(_FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")
