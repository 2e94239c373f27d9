# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The closed loop: so many requests are under way, and as soon as one has ended, the next is sent, until prompts or time
are used up. Speed is counted while there are as many as that.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from typing import Any

from ..responses.client import ServerClient, ServerError
from ..responses.protocols import WrongReply
from .counters import DraftCounts, read_counts
from .requests import Reply, read_reply


_METRICS, _END = "/metrics", b"[DONE]"
# More than any response; a server that writes without end must not fill the memory.
_MAX_REPLY_BYTES = 256 * 2**20
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Run:
    """
    What one server did under one load, once. Times are in seconds, and lists have an entry per finished response.

    Attributes:
        concurrency (`int`): Requests under way at a time.
        seconds (`float`): From the first request until one ended behind which there was nothing more to ask.
        num_tokens (`int`): Tokens that arrived in that time, of all requests.
        num_cut (`int`): Responses that the end of the time cut off.
        first_token (`list[float]`): From a request to its first token.
        between_tokens (`list[float]`): Time per further token; none of a response that came in one piece.
        latency (`list[float]`): From a request to its last token.
        digests (`list[str | None]`): Per prompt, by which its text is known again; `None` where it was not finished.
        drafts ([`DraftCounts`] or `None`): What the engine counted meanwhile; `None` where it does not draft or say.
        num_foreign (`int` or `None`): Tokens that the engine wrote meanwhile for somebody else; `None` if unknown.
    """

    concurrency: int
    seconds: float
    num_tokens: int
    num_cut: int = 0
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    digests: list[str | None] = field(default_factory=list)
    drafts: DraftCounts | None = None
    num_foreign: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.num_tokens / self.seconds if self.seconds > 0 else float("nan")


@dataclass
class _Sent:
    """A request: its prompt's number, when it was sent, and the pieces of its reply with their times."""

    number: int
    moment: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    is_cut: bool = False


class _Loop:
    """The prompts that are left, shared by the threads that ask."""

    def __init__(
        self, client: ServerClient, bodies: Sequence[tuple[str, dict[str, Any]]], concurrency: int, max_seconds: float
    ) -> None:
        self.client, self.bodies = client, bodies
        self.todo, self.lock = iter(range(len(bodies))), threading.Lock()
        self.all_ready = threading.Barrier(concurrency, timeout=_START_SECONDS)
        self.must_stop = threading.Event()
        self.failures: list[tuple[int, Exception]] = []
        self.sent: list[_Sent] = []
        self.max_seconds = max_seconds
        # When all threads were ready, and when the first one found nothing more to ask.
        self.begin, self.full_until = 0.0, float("inf")

    def work(self, _: int) -> None:
        """Ask until there is nothing more to ask."""
        if self.all_ready.wait() == 0:
            self.begin = time.perf_counter()
        # Once more, so that nobody begins before the clock does.
        self.all_ready.wait()
        while (request := self.take()) is not None:
            try:
                self.ask(request)
            except (OSError, HTTPException, ValueError) as error:
                self.failures.append((request.number, error))
                self.must_stop.set()

    def is_over(self) -> bool:
        """Whether nothing more is to be sent or waited for."""
        return self.must_stop.is_set() or time.perf_counter() - self.begin >= self.max_seconds

    def take(self) -> _Sent | None:
        """Return the next request, or `None` at the end."""
        with self.lock:
            number = None if self.is_over() else next(self.todo, None)
            now = time.perf_counter()
            if number is None:
                self.full_until = min(self.full_until, now)
                return None
            self.sent.append(_Sent(number, now))
            return self.sent[-1]

    def ask(self, request: _Sent) -> None:
        """Keep what arrives, unread: reading would take time from the other requests."""
        num_bytes = 0
        for piece in self.client.stream(*self.bodies[request.number]):
            request.pieces.append((time.perf_counter(), piece))
            num_bytes += len(piece)
            if num_bytes > _MAX_REPLY_BYTES:
                raise WrongReply(f"the reply is longer than {_MAX_REPLY_BYTES} bytes")
            if self.is_over():
                request.is_cut = True
                return
        if _END not in b"".join(piece for _, piece in request.pieces[-2:]):
            # What is wrong is told when it is read.
            self.must_stop.set()


def run_load(
    client: ServerClient, bodies: Sequence[tuple[str, dict[str, Any]]], *, concurrency: int, max_seconds: float
) -> Run:
    """
    Send every request once, `concurrency` at a time, and count what comes.

    After `max_seconds` nothing more is sent, and what is under way is cut off.

    Raises:
        ServerError: If the server could not be reached, or fell silent.
        WrongReply: If it refused a request or did not answer as it should; the message names the prompt.
    """
    loop = _Loop(client, bodies, concurrency, max_seconds)
    before = read_counts(client.read_page(_METRICS))
    # Its threads are daemons: Ctrl-C ends the program without waiting for replies that are under way.
    with ThreadPool(concurrency) as pool:
        try:
            pool.map_async(loop.work, range(concurrency), chunksize=1).get()
        finally:
            loop.must_stop.set()
    replies = {sent.number: _read(sent, client, loop.failures) for sent in loop.sent}
    if loop.failures:
        number, error = min(loop.failures, key=lambda failure: failure[0])
        kind = WrongReply if isinstance(error, ValueError) else ServerError
        raise kind(f"prompt {number}: {error}")
    after = read_counts(client.read_page(_METRICS))
    counted = None if before is None or after is None else after.since(before)
    end = min(loop.full_until, loop.begin + max_seconds)
    whole = [(request, reply) for request in loop.sent if (reply := replies[request.number]) and reply.is_whole]
    num_cut = len(replies) - len(whole)
    arrivals = [arrival for reply in replies.values() if reply is not None for arrival in reply.arrivals]
    num_written = sum(count for _, count in arrivals)
    return Run(
        concurrency=concurrency,
        seconds=end - loop.begin,
        num_tokens=sum(count for moment, count in arrivals if moment <= end),
        num_cut=num_cut,
        first_token=[_rounded(reply.arrivals[0][0] - sent.moment) for sent, reply in whole if reply.arrivals],
        between_tokens=[_rounded(each) for _, reply in whole if (each := _time_per_token(reply)) is not None],
        latency=[_rounded(reply.arrivals[-1][0] - sent.moment) for sent, reply in whole if reply.arrivals],
        digests=[reply.digest if (reply := replies.get(n)) and reply.is_whole else None for n in range(len(bodies))],
        drafts=None if counted is None else counted.drafts,
        # A response that was cut off was written further than it was read.
        num_foreign=None if counted is None or num_cut else counted.written - num_written,
    )


def _read(request: _Sent, client: ServerClient, failures: list[tuple[int, Exception]]) -> Reply | None:
    """Read what was kept of a reply; a wrong one is a failure, told without the key."""
    if any(number == request.number for number, _ in failures):
        return None
    try:
        return read_reply(request.pieces, is_cut=request.is_cut, clean=client.without_key)
    except WrongReply as error:
        failures.append((request.number, error))
        return None


def _time_per_token(reply: Reply) -> float | None:
    (first, count), (last, _) = reply.arrivals[0] if reply.arrivals else (0.0, 0), (reply.arrivals or ((0.0, 0),))[-1]
    return (last - first) / (reply.num_tokens - count) if reply.num_tokens > count else None


def _rounded(seconds: float) -> float:
    """Return a time as it is kept: to the microsecond."""
    return round(seconds, 6)
