# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The target's responses from a vLLM or an SGLang server: many requests at once, and nothing lost on the way."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from multiprocessing.pool import ThreadPool

from transformers import PreTrainedTokenizerBase

from .client import ServerClient, ServerError, ServerSettings
from .progress import keeping_responses, showing_progress
from .protocols import WrongReply, build_request, prompt_seed, read_reply
from .shards import StoredResponse
from .store import ResponseStore


_QUIET_SECONDS = 10.0


def ask_server(
    store: ResponseStore,
    settings: ServerSettings,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    shard_size: int,
    show_progress: bool,
) -> int:
    """
    Have a server respond to the prompts that the store has no response for, under the store's distribution.

    Draws depend on the prompt and the seed, as far as the server keeps to seeds. When a request fails for good, or a
    reply is not the target's response to its prompt, no new prompt is sent, what is under way comes in, everything
    good is written, and an error tells what is missing. The same call resumes.

    Returns:
        `int`: responses written.

    Raises:
        ServerError: If requests failed for good.
        ValueError: If replies were refused, naming the prompts' numbers among the missing ones and the reasons.
    """
    missing = store.missing(prompts)
    if not missing:
        return 0
    client = ServerClient(settings)
    model, version = client.describe()
    # Tokenizers change state while they encode.
    lock = threading.Lock()

    def ask(prompt_ids: list[int]) -> StoredResponse:
        drawn_by = prompt_seed(prompt_ids, seed)
        reply = client.call(*build_request(settings.engine, prompt_ids, store.origin, model=model, seed=drawn_by))
        try:
            with lock:
                return read_reply(settings.engine, reply, prompt_ids, store.origin, tokenizer)
        except WrongReply as error:
            reason = client.without_key(str(error))
        # Out of the handler: its error quotes the reply as it came.
        raise WrongReply(reason)

    failures: dict[int, Exception] = {}

    def responses() -> Iterator[StoredResponse | None]:
        with showing_progress(len(missing), is_shown=show_progress) as progress:
            for found in ask_all(ask, missing, settings.concurrency, client.is_stopped):
                if found is None:
                    progress.tick()
                    yield None
                elif isinstance(found[1], StoredResponse):
                    progress.add(1, len(found[1].completion_ids))
                    yield found[1]
                else:
                    failures[found[0]] = found[1]

    provenance = {"engine": settings.engine, "engine_version": version, "seed": seed, "logprobs": "as reported"}
    try:
        with keeping_responses(store, len(missing)):
            num_written = store.add_in_shards(responses(), shard_size=shard_size, provenance=provenance)
    finally:
        client.is_stopped.set()
    if failures:
        _report(failures, num_written, len(missing), store)
    return num_written


def ask_all(
    ask: Callable[[list[int]], StoredResponse], prompts: list[list[int]], concurrency: int, is_stopped: threading.Event
) -> Iterator[tuple[int, StoredResponse | Exception] | None]:
    """
    Ask for several prompts at a time; yield each one's number and its response or its error, as they come in, and
    `None` after seconds without any.

    After an error, or once `is_stopped` is set, no further prompt is sent; what is under way still comes in.
    """

    def work(numbered: tuple[int, list[int]]) -> tuple[int, StoredResponse | Exception] | None:
        number, prompt_ids = numbered
        if is_stopped.is_set():
            return None
        try:
            return number, ask(prompt_ids)
        except (OSError, HTTPException, ValueError) as error:
            is_stopped.set()
            return number, error

    # Its threads are daemons: Ctrl-C ends the program without waiting for replies that are under way.
    with ThreadPool(min(concurrency, len(prompts))) as pool:
        results = pool.imap_unordered(work, enumerate(prompts))
        while True:
            try:
                found = results.next(timeout=_QUIET_SECONDS)
            except StopIteration:
                return
            except multiprocessing.TimeoutError:
                yield None
                continue
            if found is not None:
                yield found


def _report(failures: dict[int, Exception], num_written: int, total: int, store: ResponseStore) -> None:
    """Raise an error that tells what is stored, what is missing and why."""
    head = (
        f"{num_written} of {total} missing responses came in and are stored in {store.path}; {total - num_written} "
        "are still missing. "
    )
    tail = " The same command resumes: it asks only for what is missing."
    wrong = [f"prompt {n}: {error}" for n, error in sorted(failures.items()) if isinstance(error, WrongReply)]
    if wrong:
        raise ValueError(f"{head}{len(wrong)} replies were refused: {'; '.join(wrong[:3])}.{tail}")
    first = failures[min(failures)]
    raise ServerError(f"{head}The server failed: {first}.{tail}") from first
