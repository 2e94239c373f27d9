# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Upload an exported folder to the Hub: one commit that holds what an export wrote and nothing else, tried again where
the network failed. The local folder stays as it is.
"""

import json
import logging
import mmap
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from time import sleep

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import HFValidationError
from huggingface_hub.utils import validate_repo_id as validate_hub_id

from ..drafters.auto import DRAFTER_CLASSES
from ..drafters.published.checkpoint import CONFIG_FILE, SAFETENSORS_FILE
from ..utils.secrets import without_secret, without_users
from ..utils.versions import TRANSPORT_ERRORS
from .serving import SERVING_FILE
from .source import hub_id_of
from .texts import read_publication, renamed_texts
from .write import PUBLISHED_FILES, PUBLISHED_NAMES


logger = logging.getLogger(__name__)

NUM_RETRIES = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
# Of the server's making, and likely to pass; 412: somebody else committed meanwhile.
_PASSING = {408, 412, 425, 429, 500, 502, 503, 504}
# What a checkpoint holds that a run does not resume from: arguments, with their token.
_NOT_RESUMED = {"training_args.bin"}
# Entries of a checkpoint's JSON files that may be paths of this machine; no run resumes from them.
_PATH_ENTRIES = (
    "_name_or_path",
    "base_model_name_or_path",
    "best_model_checkpoint",
    "name_or_path",
    "target_model_name_or_path",
)


def validate_repo_id(repo_id: str, family: str | None = None) -> None:
    """
    Refuse a name that is no Hub id, or by which vLLM takes a drafter of `family` for one of another method; warn about
    one that names no method. vLLM looks at a name where no method is given, and at the owner in it too.
    """
    try:
        validate_hub_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} cannot be the name of a repository: {error} Use ORG/NAME with letters, digits, '-', '_' and "
            "'.'."
        ) from error
    name = repo_id.lower()
    if "eagle-" in name:
        raise ValueError(
            f"{repo_id!r} contains 'eagle-', by which vLLM takes a drafter for EAGLE-1. Write EAGLE3 in one word."
        )
    if family is None:
        return
    exported = {name: drafter.config_class.exported for name, drafter in DRAFTER_CLASSES.items()}
    word, method = exported[family].word.lower(), exported[family].method
    # Where one word lies in another, as in those of a family and what builds on it, vLLM finds the same method.
    for other in sorted({each.word.lower() for each in exported.values()}):
        if other in name and other not in word and word not in other:
            raise ValueError(
                f"{repo_id!r} contains {other!r}, by which vLLM takes a drafter for one of that method, and this is "
                f"one of {method!r}. Name it after {word!r}."
            )
    if method not in name:
        _warn_about(repo_id, method)


@cache
def _warn_about(repo_id: str, method: str) -> None:
    """Warn about a name without a method, once however often a run pushes."""
    logger.warning(
        "%r does not contain %r, by which vLLM finds the method where none is given. Serve it with "
        '`"method": "%s"`, as the settings in %s do, or rename it.',
        repo_id,
        method,
        method,
        SERVING_FILE,
    )


def published_files(folder: str | Path) -> list[str]:
    """Return the files of an export, relative to it and sorted; nothing that a link leads to."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Make one with `trl-draft-opd export`.")
    missing = [name for name in (CONFIG_FILE, SAFETENSORS_FILE, SERVING_FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} holds no export: {missing} missing. Make one with `trl-draft-opd export`.")
    root = folder.resolve()
    return [name for name in sorted(PUBLISHED_FILES) if (path := root / name).is_file() and path.resolve() == path]


def _is_replaced(name: str) -> bool:
    """Whether a file of the repository gives way: an earlier export's, or what readers would take for its weights."""
    is_weights = name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin", ".index.json"))
    return name.split("/")[0] in PUBLISHED_NAMES or ("/" not in name and (is_weights or name in _NOT_RESUMED))


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload drafter",
    extra_folders: Mapping[str, Mapping[str, Path | bytes]] | None = None,
) -> str:
    """
    Upload an export as one commit, which also deletes files of an earlier export; other files are left alone.

    Args:
        folder (`str` or `Path`):
            The export. What in it names a repository (card, settings, `custom_generate`) is uploaded with the name of
            this one; the folder stays as it is.
        repo_id (`str`): Where to; made if it does not exist.
        token (`str`, *optional*): The one stored by `hf auth login` by default.
        private (`bool`, *optional*): Whether a new repository is private; the account's own rule by default.
        revision (`str`, *optional*): Branch; made if it does not exist. The main one by default.
        commit_message (`str`, *optional*): Of the commit.
        extra_folders (`Mapping[str, Mapping[str, Path | bytes]]`, *optional*):
            Folders to add, by their place in the repository: their files by name, see [`resumable_files`].

    Returns:
        `str`: Address of the commit.

    Raises:
        ValueError: If the name is refused, the folder holds no export, a file holds the token, or the repository is
            public where a private one was asked for. Nothing was uploaded.
        PermissionError: If the token is missing, expired, or may not write there.
        ConnectionError: If network or server kept failing. The repository is as it was: a commit is made whole or not
            at all.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in published_files(folder)}
    if json.loads((folder / SERVING_FILE).read_text("utf-8"))["repository"] != repo_id:
        validate_repo_id(repo_id, read_publication(folder).family)
    extra_folders = extra_folders or {}
    for place, extra in extra_folders.items():
        files |= {f"{place}/{name}": content for name, content in extra.items()}
    fix = f"{str(folder)!r} is complete. Try again with `trl-draft-opd push --drafter {folder} --repo-id {repo_id}`"
    held = _require_token(token, fix)
    _refuse_token_in(files, held)
    api = HfApi(token=token)

    def upload() -> str:
        made = _ready_repository(api, repo_id, private)
        if revision is not None and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(made, branch=revision, exist_ok=True)
        renamed = _named(folder, made)
        info = api.model_info(made, revision=revision)
        there = [sibling.rfilename for sibling in info.siblings or []]
        stale = {name for name in there if _is_replaced(name) or name.split("/")[0] in extra_folders} - files.keys()
        commit = api.create_commit(
            made,
            [
                *(
                    CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                    for name, content in (files | renamed).items()
                ),
                *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale)),
            ],
            commit_message=commit_message,
            revision=revision,
            # What is stale was read from this commit.
            parent_commit=info.sha,
        )
        return without_users(str(commit.commit_url))

    return _with_retries(upload, fix, held)


def _named(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Return what of an export has to name its repository and names another one, or none, as it is for `repo_id`."""
    renamed = renamed_texts(folder, repo_id)
    if renamed:
        logger.warning(
            "The export was not made for %s: what names its repository is uploaded with that name (%s). To have the "
            "same in %s, export again with `--repo-id %s`.",
            repo_id,
            ", ".join(sorted(renamed)),
            folder,
            repo_id,
        )
    return dict(renamed)


def create_repository(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Make a repository if it does not exist, and return its full id, `ORG/NAME`; raises as [`push_folder`] does."""
    validate_repo_id(repo_id)
    fix = "Nothing was uploaded"
    held = _require_token(token, fix)
    api = HfApi(token=token)
    return _with_retries(lambda: _ready_repository(api, repo_id, private), fix, held)


def _ready_repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Make the repository if it does not exist, and return its full id; a public one is not made private by asking."""
    made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(made).private:
        raise ValueError(
            f"{made!r} exists and is public, but a private repository was asked for. Make it private in its settings, "
            "name another, or leave `private` out. Nothing was uploaded."
        )
    return made


def resumable_files(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of a checkpoint that a run resumes from: no arguments, no rollouts, no path of this machine."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): _without_paths(path) if path.suffix == ".json" else path
        for name, path in found.items()
        if not path.is_symlink()
        and name.name not in _NOT_RESUMED
        and not name.parts[0].startswith(("_", "completions", "runs"))
    }


def _without_paths(path: Path) -> Path | bytes:
    """Return a JSON file, or its content without the entries that name folders of this machine."""
    content = json.loads(path.read_text("utf-8"))
    entries = content if isinstance(content, dict) else {}
    paths = {name for name in _PATH_ENTRIES if entries.get(name) is not None and hub_id_of(entries[name]) is None}
    if not paths:
        return path
    return (json.dumps(content | dict.fromkeys(paths), indent=2) + "\n").encode()


def _require_token(token: str | None, fix: str) -> str:
    """Return the token that the Hub will be asked with; raise `PermissionError` without one, before it is asked."""
    found = token or get_token()
    if not found:
        raise PermissionError(
            f"There is no Hub token on this machine, and a push needs one that may write: run `hf auth login`. {fix}."
        )
    return found


def _refuse_token_in(files: Mapping[str, Path | bytes], token: str) -> None:
    for name, content in files.items():
        if _holds(content, token.encode()):
            raise ValueError(f"{name!r} holds the Hub token. Nothing was uploaded: remove it and revoke the token.")


def _holds(content: Path | bytes, needle: bytes) -> bool:
    """Whether a file holds a text; of weights, only the header is looked at, the rest is numbers."""
    if isinstance(content, bytes):
        return needle in content
    if content.stat().st_size == 0:
        return False
    with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = 8 + int.from_bytes(data[:8], "little") if content.suffix == ".safetensors" else len(data)
        return data.find(needle, 0, end) >= 0


def _with_retries(action: Callable[[], str], fix: str, token: str | None) -> str:
    """
    Run `action`; try again after errors that pass by themselves, and tell of the others what to do. The token is in no
    message, nor in the traceback of one.
    """
    for attempt in range(NUM_RETRIES + 1):
        pause = _FIRST_PAUSE * 2**attempt
        try:
            return action()
        except OfflineModeIsEnabled as error:
            raise ConnectionError(f"The Hub is switched off in this process (HF_HUB_OFFLINE=1). {fix}.") from error
        except HfHubHTTPError as error:
            refusal = _refusal(error, fix, token)
            if refusal is not None:
                raise refusal from _shown(error, token)
            reason, failure = f"status {error.response.status_code}", error
            asked = error.response.headers.get("Retry-After", "")
            pause = max(pause, float(asked)) if asked.isdigit() else pause
        except (*TRANSPORT_ERRORS, ConnectionError, TimeoutError) as error:
            reason, failure = type(error).__name__, error
        except RuntimeError as error:
            # The library reports a weights file that did not go through this way, after attempts of its own.
            reason, failure = _printable(str(error).rstrip("."), token), error
        if attempt == NUM_RETRIES:
            raise ConnectionError(
                f"The upload failed {attempt + 1} times, the last time with: {reason}. {fix}."
            ) from _shown(failure, token)
        logger.warning("The upload failed (%s); trying again.", reason)
        sleep(min(pause, _LONGEST_PAUSE))
    raise AssertionError("unreachable")


def _printable(text: str, token: str | None) -> str:
    """Return what library or server said without the token, and without a password in the address of a mirror."""
    return without_users(without_secret(text, token))


def _shown(error: Exception, token: str | None) -> Exception | None:
    """Return an error as the cause of another, unless a traceback would show a secret in it."""
    text = "".join(traceback.format_exception(error))
    return error if _printable(text, token) == text else None


def _refusal(error: HfHubHTTPError, fix: str, token: str | None) -> OSError | None:
    """Return what to raise for a refusal of the Hub that will not change, or `None` for one that may."""
    status = error.response.status_code
    if status in _PASSING:
        return None
    # A repository that the account may not see is "not found".
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return PermissionError(
            f"The Hub refused the token (status {status}): it is missing, expired or may not write there. Run `hf "
            f"auth login`. {fix}."
        )
    reason = _printable(error.server_message or "no reason given", token)
    return OSError(f"The Hub refused (status {status}): {reason}. {fix}.")
