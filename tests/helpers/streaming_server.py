# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
An OpenAI-compatible server on 127.0.0.1 that streams known tokens at a known pace and counts them as vLLM does. What
it writes depends on the prompt alone.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from .local_server import LocalServer


# What a reply can be in place of whole.
FAULTS = ("status", "hang up", "half", "silence", "error", "no JSON", "no counts")


def written(prompt: Any, count: int) -> list[int]:
    """Return the ids that the server writes to a prompt."""
    start = sum(prompt) if isinstance(prompt, list) and all(isinstance(i, int) for i in prompt) else len(str(prompt))
    return [(start + 3 * index) % 50 + 7 for index in range(count)]


class StreamingServer(LocalServer):
    """
    Writes `per_round` tokens per piece, `delay` seconds apart.

    Attributes:
        kept (`int` or `None`): Drafts it says it keeps per round; `None`: it does not draft.
        has_metrics (`bool`): Whether there is a page `/metrics`.
        fault (`Callable`): What is wrong with the reply to a request, by its number; `None` is nothing.
        wants_full (`int` or `None`): Reply only while so many requests are under way, until `total` have come;
            `was_short` says whether `patience` ended before.
        change (`int`): Added to the ids that it writes.
        foreign (`int`): Tokens it says it wrote for others, per piece.
    """

    def __init__(self, **changes: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.per_round, self.delay, self.first_delay, self.kept = 1, 0.0, 0.0, None
        self.has_metrics, self.sends_ids, self.foreign = True, True, 0
        self.fault: Callable[[int], str | None] = lambda number: None
        self.wants_full: int | None = None
        self.total, self.patience, self.change = 0, 20.0, 0
        self.bodies: list[tuple[str, dict]] = []
        self.headers: list[dict] = []
        self.under_way, self.most, self.was_short = 0, 0, False
        self.counts = {"generation_tokens": 0, "spec_decode_num_drafts": 0, "spec_decode_num_accepted_tokens": 0}
        self.changed = threading.Condition()
        vars(self).update(changes)

    def page(self) -> str:
        """What `/metrics` says, of two engines that counted a half each."""
        names = [name for name in self.counts if self.kept is not None or not name.startswith("spec")]
        lines = ["# HELP vllm:generation_tokens Tokens."]
        for name in names:
            half = self.counts[name] // 2
            lines += [f'vllm:{name}_total{{engine="0",model_name="a {{b}}, c"}} {half}.0']
            lines += [f'vllm:{name}_total{{engine="1",model_name="a {{b}}, c"}} {self.counts[name] - half}.0']
            lines += [f'vllm:{name}_created{{engine="0"}} 1.7e+09']
        if self.kept is not None:
            rounds = self.counts["spec_decode_num_drafts"]
            for slot in range(self.kept + 1):
                count = float(rounds if slot < self.kept else 0)
                name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                lines.append(f'{name}{{engine="0",position="{slot}"}} {count}')
        return "\n".join(lines) + "\n"


class _Handler(BaseHTTPRequestHandler):
    server: StreamingServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        pages = {"/v1/models": '{"data": [{"id": "tiny"}]}', "/version": '{"version": "0.1"}'}
        if self.server.has_metrics:
            pages["/metrics"] = self.server.page()
        content = pages.get(self.path)
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write((content or "").encode())

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.changed:
            number = len(server.bodies)
            server.bodies.append((self.path, body))
            server.headers.append(dict(self.headers))
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            server.changed.notify_all()
            if server.wants_full is not None:

                def is_full() -> bool:
                    return server.under_way == server.wants_full or len(server.bodies) >= server.total

                server.was_short |= not server.changed.wait_for(is_full, timeout=server.patience)
        try:
            self._reply(number, body)
        finally:
            self.close_connection = True

    def _leave(self) -> None:
        """Count the request as ended: before its end is sent, because the next one may come as soon as it is."""
        with self.server.changed:
            self.server.under_way -= 1

    def _reply(self, number: int, body: dict) -> None:
        server, fault = self.server, self.server.fault(number)
        if fault in ("status", "hang up"):
            self._leave()
            if fault == "status":
                self.send_response(503)
                self.end_headers()
                self.wfile.write(f"busy; you sent {self.headers['Authorization']}".encode())
            return
        self.send_response(200)
        self.end_headers()
        time.sleep(server.first_delay)
        ids = written(body.get("prompt", body.get("messages")), body["max_tokens"])
        ids = [min(i + server.change, 63) for i in ids]
        for start in range(0, len(ids), server.per_round):
            own = ids[start : start + server.per_round]
            if start:
                time.sleep(server.delay)
            if start >= len(ids) // 2 and fault is not None and fault != "no counts":
                self._leave()
                said = {"error": f'data: {{"error": "out of memory {self.headers["Authorization"]}"}}\n\n'}
                said |= {"no JSON": f"data: {{{self.headers['Authorization']}\n\n"}
                self.wfile.write(said.get(fault, "").encode())
                if fault == "silence":
                    time.sleep(3)
                return
            self._count(len(own), is_first=start == 0)
            self._piece(body, own, fault, is_last=start + len(own) == len(ids))
        self._leave()
        usage = {"choices": [], "usage": {"completion_tokens": len(ids)}}
        self._send([] if fault == "no counts" else [usage])
        self.wfile.write(b"data: [DONE]\n\n")

    def _count(self, count: int, *, is_first: bool) -> None:
        with self.server.changed:
            counts = self.server.counts
            counts["generation_tokens"] += count + self.server.foreign
            if self.server.kept is not None and not is_first:
                counts["spec_decode_num_drafts"] += 1
                counts["spec_decode_num_accepted_tokens"] += self.server.kept

    def _piece(self, body: dict, ids: list[int], fault: str | None, *, is_last: bool) -> None:
        text = "".join(f" w{i}" for i in ids)
        choice: dict[str, Any] = {"text": text} if "prompt" in body else {"delta": {"content": text}}
        choice |= {"finish_reason": "length" if is_last else None}
        if self.server.sends_ids and fault != "no counts":
            choice["token_ids"] = ids
        self._send([{"choices": [choice]}])

    def _send(self, events: list[dict]) -> None:
        self.wfile.write(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))
        self.wfile.flush()


@contextmanager
def streaming(**changes: Any) -> Iterator[StreamingServer]:
    """Yield a running server, its attributes changed."""
    with StreamingServer(**changes).running() as server:
        yield server
