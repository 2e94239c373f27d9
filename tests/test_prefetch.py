# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The source that fetches readings ahead: what it returns, what it holds, and that it always ends."""

import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from trl_draft_opd.readings.prefetch import PrefetchingSource
from trl_draft_opd.target.reading import TextStates


LAYERS, WIDTH = (1, 3, 5), 4
# Bytes of a token at three layers and the input of the head, in float32.
TOKEN_BYTES = 4 * WIDTH * 4


class FakeFetcher:
    """States that tell text and layer apart; counts what is under way, and can be slow, gated or failing."""

    is_before_norm, concurrency, layer_ids, digest = False, 3, LAYERS, "fake"

    def __init__(self, seconds: float = 0.0, failing: Sequence[int] | None = None):
        self.seconds, self.failing = seconds, failing
        self.fetched: list[tuple[list[int], tuple[int, ...]]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.is_closed = False

    def fetch(self, text: Sequence[int], layer_ids: Sequence[int]) -> TextStates:
        self.fetched.append((list(text), tuple(layer_ids)))
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(20)
        time.sleep(self.seconds)
        if list(text) == self.failing:
            raise OSError(f"No file for the text of {len(text)} tokens.")
        return states_of(text, layer_ids)

    def num_bytes(self, num_tokens: int, num_layers: int) -> int:
        return num_tokens * WIDTH * 4 * (num_layers + 1)

    def close(self) -> None:
        self.is_closed = True
        self.gate.set()


def states_of(text: Sequence[int], layer_ids: Sequence[int]) -> TextStates:
    ids = torch.tensor(text, dtype=torch.float32)[:, None].expand(-1, WIDTH)
    features = [ids + 1000 * layer_id for layer_id in layer_ids]
    return TextStates(torch.cat(features, dim=1) if features else ids[:, :0], ids.clone())


def make_texts(*lengths: int) -> list[list[int]]:
    return [[number, *range(length - 1)] for number, length in enumerate(lengths)]


def check(found: list[TextStates], texts: Sequence[Sequence[int]], layer_ids: Sequence[int] = LAYERS) -> None:
    for got, text in zip(found, texts, strict=True):
        for part, expected in zip(got, states_of(text, layer_ids), strict=True):
            assert torch.equal(part, expected)


def wait_until(is_true, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.002)


@pytest.fixture
def make_source():
    sources: list[PrefetchingSource] = []

    def make(fetcher: FakeFetcher, limit_bytes: int = 2**20) -> PrefetchingSource:
        sources.append(PrefetchingSource(fetcher, LAYERS, limit_bytes))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def test_announced_texts_are_fetched_before_they_are_read(make_source) -> None:
    fetcher, texts = FakeFetcher(), make_texts(5, 3, 8, 2)
    source = make_source(fetcher)
    source.expect(texts)
    wait_until(lambda: source.held_bytes == sum(map(len, texts)) * TOKEN_BYTES and len(fetcher.fetched) == 4)
    check(source.read(texts, LAYERS), texts)
    assert len(fetcher.fetched) == 4 and fetcher.threads == {"readings"}
    assert source.held_bytes == 0 and source.delivered_bytes == 18 * TOKEN_BYTES


def test_unannounced_texts_are_fetched_where_they_are_read(make_source) -> None:
    fetcher, texts = FakeFetcher(), make_texts(5, 3, 8, 2)
    source = make_source(fetcher)
    check(source.read(texts, LAYERS), texts)
    check(source.read(texts[1:2], ()), texts[1:2], ())
    assert len(fetcher.fetched) == 5 and source.held_bytes == 0


def test_threads_share_the_texts_of_an_unannounced_batch(make_source) -> None:
    fetcher, texts = FakeFetcher(seconds=0.05), make_texts(*[3] * 12)
    source = make_source(fetcher)
    begun = time.monotonic()
    check(source.read(texts, LAYERS), texts)
    assert time.monotonic() - begun < 12 * 0.05


def test_what_a_read_waits_for_comes_before_what_is_only_to_come(make_source) -> None:
    texts = make_texts(2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    announced, urgent = texts[:6], texts[6:]
    fetcher = FakeFetcher(seconds=0.05)
    source = make_source(fetcher)
    fetcher.gate.clear()
    source.expect(announced)
    wait_until(lambda: len(fetcher.fetched) == fetcher.concurrency)

    def open_gate() -> None:
        # The reading thread is at its first text by itself: all that it waits for is in the queue.
        wait_until(lambda: len(fetcher.fetched) > fetcher.concurrency)
        fetcher.gate.set()

    threading.Thread(target=open_gate).start()
    check(source.read(urgent, LAYERS), urgent)
    check(source.read(announced, LAYERS), announced)
    order = [text for text, _ in fetcher.fetched]
    assert max(map(order.index, urgent)) < order.index(announced[-1])


@pytest.mark.parametrize("limit_tokens", [1, 10, 16, 25])
def test_what_is_held_never_exceeds_the_limit_or_a_single_text(make_source, limit_tokens: int) -> None:
    limit = limit_tokens * TOKEN_BYTES
    lengths = [(7 * number) % 13 + 1 for number in range(40)]
    fetcher, texts = FakeFetcher(seconds=0.001), make_texts(*lengths)
    source, seen, is_over = make_source(fetcher, limit), [], threading.Event()
    source.expect(texts)

    def watch() -> None:
        while not is_over.is_set():
            seen.append(source.held_bytes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for start in range(0, 40, 5):
        check(source.read(texts[start : start + 5], LAYERS), texts[start : start + 5])
    is_over.set()
    watcher.join()
    assert max(seen) <= max(limit, max(lengths) * TOKEN_BYTES)
    assert len(fetcher.fetched) == 40 and source.held_bytes == 0


def test_nothing_more_is_fetched_until_something_is_read(make_source) -> None:
    fetcher, texts = FakeFetcher(), make_texts(*[4] * 10)
    source = make_source(fetcher, limit_bytes=3 * 4 * TOKEN_BYTES)
    source.expect(texts)
    wait_until(lambda: len(fetcher.fetched) == 3)
    time.sleep(0.05)
    assert len(fetcher.fetched) == 3 and source.held_bytes == 12 * TOKEN_BYTES
    source.read(texts[:2], LAYERS)
    wait_until(lambda: len(fetcher.fetched) == 5)
    time.sleep(0.05)
    assert len(fetcher.fetched) == 5


def test_a_text_above_the_limit_is_held_alone(make_source) -> None:
    fetcher, texts = FakeFetcher(), make_texts(50, 2, 2)
    source = make_source(fetcher, limit_bytes=4 * TOKEN_BYTES)
    source.expect(texts)
    wait_until(lambda: len(fetcher.fetched) == 1)
    time.sleep(0.05)
    assert len(fetcher.fetched) == 1 and source.held_bytes == 50 * TOKEN_BYTES
    check(source.read(texts, LAYERS), texts)


def test_a_read_passes_by_texts_that_fill_the_memory(make_source) -> None:
    fetcher, texts = FakeFetcher(), make_texts(4, 4, 4, 4)
    source = make_source(fetcher, limit_bytes=8 * TOKEN_BYTES)
    source.expect(texts[:3])
    wait_until(lambda: source.held_bytes == 8 * TOKEN_BYTES)
    # Neither announced, nor with room; then announced, and without room.
    check(source.read(texts[3:], LAYERS), texts[3:])
    check(source.read(texts[2:3], LAYERS), texts[2:3])
    check(source.read(texts[:2], LAYERS), texts[:2])
    assert len(fetcher.fetched) == 4 and source.held_bytes == 0


def test_a_text_twice_in_a_batch_is_fetched_once(make_source) -> None:
    fetcher, (text, other) = FakeFetcher(), make_texts(5, 3)
    source = make_source(fetcher)
    source.expect([text, other, text])
    check(source.read([text, other, text], LAYERS), [text, other, text])
    check(source.read([other, other], LAYERS), [other, other])
    assert [len(ids) for ids, _ in fetcher.fetched].count(5) == 1 and len(fetcher.fetched) == 3
    assert source.held_bytes == 0


def test_a_text_announced_twice_stays_for_its_second_read(make_source) -> None:
    fetcher, texts = FakeFetcher(), make_texts(5, 3)
    source = make_source(fetcher)
    source.expect(texts)
    source.expect(texts[:1])
    for batch, held in ((texts, 5), (texts[:1], 0)):
        wait_until(lambda: len(fetcher.fetched) == 2)
        check(source.read(batch, LAYERS), batch)
        assert source.held_bytes == held * TOKEN_BYTES
    assert len(fetcher.fetched) == 2


def test_a_subset_of_layers_is_cut_from_what_was_fetched(make_source) -> None:
    fetcher, texts = FakeFetcher(), make_texts(5, 3)
    source = make_source(fetcher)
    source.expect(texts)
    wait_until(lambda: len(fetcher.fetched) == 2)
    for layer_ids in ((), (3,), (1, 5)):
        check(source.read(texts, layer_ids), texts, layer_ids)
    # The reads that they were announced for are still to come.
    check(source.read(texts, LAYERS), texts)
    assert len(fetcher.fetched) == 2 and source.held_bytes == 0


def test_an_error_in_the_background_is_raised_by_the_read_alone(make_source) -> None:
    texts = make_texts(5, 3, 4)
    fetcher = FakeFetcher(failing=texts[1])
    source = make_source(fetcher)
    source.expect(texts)
    wait_until(lambda: len(fetcher.fetched) == 3)
    check(source.read(texts[:1], LAYERS), texts[:1])
    for _ in range(2):
        with pytest.raises(OSError, match="3 tokens"):
            source.read(texts[1:2], LAYERS)
    fetcher.failing = None
    check(source.read(texts, LAYERS), texts)
    assert source.held_bytes == 0


def test_a_text_whose_read_failed_is_not_fetched_again(make_source) -> None:
    texts = make_texts(4, 5)
    fetcher = FakeFetcher(failing=texts[1])
    source = make_source(fetcher, limit_bytes=1)
    source.expect(texts)
    wait_until(lambda: len(fetcher.fetched) == 1)
    # There is room for no other, so that the reading thread fetches it itself.
    with pytest.raises(OSError, match="No file"):
        source.read([texts[1]], LAYERS)
    check(source.read([texts[0]], LAYERS), [texts[0]])
    time.sleep(0.1)
    assert [text for text, _ in fetcher.fetched] == texts and source.held_bytes == 0


def test_what_an_error_leaves_behind_is_let_go(make_source) -> None:
    texts = make_texts(5, 3, 4, 6)
    source = make_source(FakeFetcher(failing=texts[0]))
    with pytest.raises(OSError, match="5 tokens"):
        source.read(texts, LAYERS)
    wait_until(lambda: source.held_bytes == 0)


def test_forgotten_texts_free_their_memory(make_source) -> None:
    fetcher, texts = FakeFetcher(), make_texts(4, 4, 4, 4)
    source = make_source(fetcher, limit_bytes=8 * TOKEN_BYTES)
    fetcher.gate.clear()
    source.expect(texts)
    wait_until(lambda: len(fetcher.fetched) == 2)
    source.forget()
    # Under way still, so that memory is theirs.
    assert source.held_bytes == 8 * TOKEN_BYTES
    fetcher.gate.set()
    wait_until(lambda: source.held_bytes == 0)
    check(source.read(texts, LAYERS), texts)


def test_waiting_for_readings_is_counted(make_source) -> None:
    source, texts = make_source(FakeFetcher(seconds=0.05)), make_texts(4)
    source.read(texts, LAYERS)
    assert source.wait_seconds >= 0.05


def test_closing_ends_the_threads_and_refuses_reads(make_source) -> None:
    fetcher, texts = FakeFetcher(), make_texts(4, 4)
    source = make_source(fetcher)
    source.read(texts, LAYERS)
    threads = [thread for thread in threading.enumerate() if thread.name == "readings"]
    assert len(threads) == 3
    source.close()
    source.close()
    assert fetcher.is_closed and not any(thread.is_alive() for thread in threads)
    with pytest.raises(ValueError, match="closed"):
        source.read(texts, LAYERS)


def test_a_source_that_is_let_go_ends_its_threads() -> None:
    fetcher = FakeFetcher()
    source = PrefetchingSource(fetcher, LAYERS, 2**20)
    source.read(make_texts(4), LAYERS)
    del source
    wait_until(lambda: fetcher.is_closed and not [t for t in threading.enumerate() if t.name == "readings"])


def _read_in_child(source: PrefetchingSource, texts: list[list[int]], queue) -> None:
    check(source.read(texts, LAYERS), texts)
    queue.put("read")


@pytest.mark.skipif(sys.platform != "linux", reason="Other systems do not fork.")
def test_a_fork_breaks_neither_process(make_source) -> None:
    fetcher, texts = FakeFetcher(seconds=0.02), make_texts(*[4] * 6)
    source = make_source(fetcher)
    source.expect(texts)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    # The lock is held while the process forks, by a thread that is not there in the child.
    with source._shelf.changed:
        child = context.Process(target=_read_in_child, args=(source, texts, queue))
        child.start()
    assert queue.get(timeout=20) == "read"
    child.join(20)
    assert child.exitcode == 0
    check(source.read(texts, LAYERS), texts)


_LEFT_OPEN = """
import sys, time
sys.path.insert(0, "tests")
from test_prefetch import LAYERS, FakeFetcher, PrefetchingSource, make_texts
fetcher = FakeFetcher(seconds={seconds})
source = PrefetchingSource(fetcher, LAYERS, 2**30)
source.expect(make_texts(*[4] * 1000))
time.sleep(0.05)
print("end", flush=True)
"""


@pytest.mark.parametrize("seconds", [0.02, 600.0])
def test_threads_do_not_keep_a_process_alive(seconds: float) -> None:
    script = [sys.executable, "-c", _LEFT_OPEN.format(seconds=seconds)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout == "end\n" and done.stderr == ""
