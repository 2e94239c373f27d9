# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Fill a store from a dataset: prompts for an engine to respond to, or responses the user already has. One call for both.
"""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.text_reader import TextReader
from ..rollout.acceptance import SamplingSettings
from ..target.frozen import FrozenTarget
from .audit import audit_responses
from .generate import generate_missing
from .origin import Origin
from .protocols import ENGINES
from .server import ServerSettings, ask_server
from .shards import StoredResponse, prompt_key
from .store import ResponseStore, describe_filling


logger = logging.getLogger(__name__)

# Responses that a command checks against the target when another engine wrote them.
CHECKED_ROWS = 8


def write_responses(
    target: FrozenTarget,
    dataset: Dataset,
    path: str | Path,
    *,
    sampling: SamplingSettings,
    max_completion_length: int,
    engine: str = "transformers",
    server: ServerSettings | None = None,
    reader: TextReader | None = None,
    batch_size: int = 8,
    shard_size: int = 64,
    seed: int = 42,
    show_progress: bool = True,
) -> ResponseStore:
    """
    Write the target's responses to the prompts of a dataset into a folder, once. What is there already is kept.

    Args:
        target ([`FrozenTarget`]):
            The target, with its tokenizer.
        dataset (`Dataset`):
            Rows with `messages`, `prompt` or `prompt_ids`; for `engine="dataset"` with their responses.
        path (`str` or `Path`):
            Folder of the store; made, or resumed.
        sampling ([`SamplingSettings`]), max_completion_length (`int`):
            The distribution of the responses, and the longest one.
        engine (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`: the target in this process. `"vllm"` or `"sglang"`: the server at `server`. `"dataset"`:
            the dataset's own responses, taken on trust that this target wrote them under this distribution.
        server ([`ServerSettings`], *optional*):
            The server; its `engine` must be the one named here.
        reader ([`TextReader`], *optional*):
            How rows are read; `target.text_reader()` by default, which takes prompts of any length.
        batch_size (`int`, *optional*, defaults to `8`):
            Prompts that transformers decodes together.
        shard_size (`int`, *optional*, defaults to `64`):
            Responses per file. Fewer are written after a minute, and when the process is told to stop.
        seed (`int`, *optional*, defaults to `42`):
            Seeds draws at a temperature above 0.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show on stderr how far it has come: a bar on a terminal, else a line every half minute.

    Returns:
        [`ResponseStore`].

    Raises:
        ValueError: If settings contradict each other, a row cannot be read, or the folder is of another origin.
        ServerError: If the server fails for good; what came in is stored, and the same call resumes.
    """
    if engine not in ("transformers", "dataset", *ENGINES):
        raise ValueError(f"`engine` must be one of {('transformers', 'dataset', *ENGINES)}, got {engine!r}.")
    if (server.engine if server is not None else None) != (engine if engine in ENGINES else None):
        raise ValueError(
            f"`engine={engine!r}` and `server={server!r}` do not go together: a server is given only for {ENGINES}, "
            "with the same engine."
        )
    if engine == "transformers":
        target.require_body("Writing responses in this process")
    reader = reader or target.text_reader()
    # Before there is a folder, which later settings would have to keep to.
    prompts = [] if engine == "dataset" else list(reader.read_prompts(dataset)["prompt_ids"])
    origin = Origin.of(target, reader, sampling=sampling, max_completion_length=max_completion_length)
    store = ResponseStore.open(path, origin)
    if engine == "dataset":
        import_responses(store, dataset, reader, shard_size=shard_size)
        return store
    missing = store.missing(prompts)
    if missing and show_progress:
        logger.warning(describe_filling(store, len(missing)))
    common = {"seed": seed, "shard_size": shard_size, "show_progress": show_progress}
    if server is None:
        generate_missing(store, target, prompts, batch_size=batch_size, **common)
    else:
        ask_server(store, server, prompts, tokenizer=target.tokenizer, **common)
    return store


def import_responses(store: ResponseStore, dataset: Dataset, reader: TextReader, *, shard_size: int) -> int:
    """
    Store responses that the user already has.

    Nothing here can tell who wrote them: check with [`check_responses`] before training on them. Responses longer than
    the store's `max_completion_length` are cut there, as the target would have been, and where a prompt has several,
    the first is kept; warnings count both.

    Args:
        store ([`ResponseStore`]): Where they go.
        dataset (`Dataset`): `messages`, `prompt` with `completion`, or `prompt_ids` with `completion_ids`.
        reader ([`TextReader`]): How rows are read, with the tokenizer of the target taken to have written them.
        shard_size (`int`): Responses per shard.

    Returns:
        `int`: responses written.

    Raises:
        ValueError: If a row is malformed or is no response this target could have written, naming it.
    """
    rows, origin = reader.read_responses(dataset), store.origin
    assert isinstance(rows, Dataset)

    def responses() -> Iterator[StoredResponse]:
        for prompt_ids, completion_ids in zip(rows["prompt_ids"], rows["completion_ids"], strict=True):
            ids = completion_ids[: origin.max_completion_length]
            yield StoredResponse(prompt_ids, ids, None, origin.finish_reason(ids))

    num_written = store.add_in_shards(responses(), shard_size=shard_size, provenance={"engine": "dataset"})
    num_repeated = len(rows) - len({prompt_key(prompt_ids) for prompt_ids in rows["prompt_ids"]})
    if num_repeated:
        warnings.warn(
            f"{num_repeated} of {len(rows)} responses are to a prompt that has one before; the first of each was kept."
        )
    num_cut = sum(len(ids) > origin.max_completion_length for ids in rows["completion_ids"])
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(rows)} responses are longer than `max_completion_length` "
            f"{origin.max_completion_length} and were cut there."
        )
    return num_written


def summarize_store(store: ResponseStore, target: FrozenTarget, num_checked: int) -> dict[str, Any]:
    """
    Return what a store holds as JSON values: `path`, counts, `lines` to print, and in `check` how well `num_checked`
    evenly spaced responses fit the target at hand (`None` for 0).
    """
    texts = store.texts(max_rows=None)
    num_complete = sum(store.origin.finish_reason(completion) == "stop" for _, completion in texts)
    num_tokens = sum(len(completion) for _, completion in texts)
    lines = [
        f"{store.path} holds {len(texts)} responses, {num_tokens:,} tokens in all; {num_complete} end with an end of "
        "sequence."
    ]
    check = None
    if num_checked and texts:
        audit = audit_responses(target, store.texts(max_rows=num_checked), store.origin.sampling)
        check = asdict(audit) | {"share": audit.share}
        lines.append(f"Checked {audit.num_responses} with the target: {audit.describe()}.")
    return {
        "path": str(store.path),
        "num_responses": len(texts),
        "num_complete": num_complete,
        "num_tokens": num_tokens,
        "check": check,
        "lines": lines,
    }
