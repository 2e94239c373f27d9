# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A server in a thread that speaks as much of vLLM's extraction of hidden states as is asked for: it computes the real
states of a tiny target, writes them as vLLM does, lock first, and goes wrong in the ways a test asks for.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file

from trl_draft_opd import FrozenTarget
from trl_draft_opd.readings.launch import served_states

from .local_server import LocalServer


# A target is tapped by one thread at a time, also where several servers have the same.
_COMPUTING = threading.Lock()


@dataclass
class Trouble:
    """What goes wrong with one request; by default, nothing."""

    status: int | None = None
    # Hang up without a reply.
    is_silent: bool = False
    # Seconds before the reply, and between the reply and the end of writing.
    reply_after: float = 0.0
    write_after: float = 0.0
    has_file: bool = True
    has_lock: bool = True
    # Changes the tensors of the file, the reply, or what lies at the path.
    tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    reply: Callable[[dict[str, Any]], Any] | None = None
    place: Callable[[Path], None] | None = None


class ExtractionServer(LocalServer):
    """
    Serves a target's states at `layer_ids`; `trouble(number of the request, body)` says what goes wrong, if anything.

    `numbers` replaces vLLM's numbers of the states, and `order` the order in which they come.
    """

    def __init__(
        self,
        target: FrozenTarget,
        layer_ids: Sequence[int],
        folder: Path,
        *,
        trouble: Callable[[int, dict], Trouble | None] | None = None,
        numbers: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
        max_model_len: int | None = 256,
        port: int = 0,
    ):
        self.target, self.folder, self.trouble = target, folder, trouble
        self.numbers = list(numbers or served_states(layer_ids, target.config.num_hidden_layers))
        self.order = order
        self.models: Any = {"data": [{"id": "tiny", "max_model_len": max_model_len}]}
        self.lock = threading.Lock()
        self.seen: list[dict] = []
        self.headers_seen: list[dict] = []
        self.at_once = self.most_at_once = 0
        super().__init__(("127.0.0.1", port), _Handler)

    def states(self, text: Sequence[int]) -> tuple[dict[str, torch.Tensor], list[Any]]:
        """Return what vLLM writes for a text, and its `prompt_logprobs`."""
        target, num_layers = self.target, self.target.config.num_hidden_layers
        ids = torch.tensor([list(text)])
        with _COMPUTING:
            reading = target.read_text(ids, torch.ones_like(ids), range(num_layers))
            logprobs = target.project(reading.last_hidden[:-1]).float().log_softmax(-1)
            embedded = target.embed(ids)[0]
        of_all = torch.cat([embedded[:, None], reading.features.view(len(text), num_layers, -1)], dim=1)
        # As vLLM does, a number beyond the last repeats it.
        states = of_all[:, [min(number, num_layers) for number in self.numbers]]
        states = states[:, list(self.order)] if self.order is not None else states
        entries = [{str(token): {"logprob": row[token].item()}} for token, row in zip(text[1:], logprobs, strict=True)]
        return {"hidden_states": states.contiguous(), "token_ids": torch.tensor(list(text))}, [None, *entries]


class _Handler(BaseHTTPRequestHandler):
    server: ExtractionServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        pages: dict[str, Any] = {"/v1/models": self.server.models, "/version": {"version": "0.32.0"}}
        page = pages.get(self.path)
        self._send(404 if page is None else 200, page)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.seen)
            server.seen.append(body)
            server.headers_seen.append(dict(self.headers))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            trouble = (server.trouble(number, body) if server.trouble else None) or Trouble()
            answer = self._answer(body, trouble)
        finally:
            with server.lock:
                server.at_once -= 1
        if answer is None:
            self.close_connection = True
        else:
            self._send(*answer)

    def _answer(self, body: dict, trouble: Trouble) -> tuple[int, Any] | None:
        time.sleep(trouble.reply_after)
        if trouble.status is not None:
            return trouble.status, {"error": "no"}
        server, text = self.server, body["prompt"]
        tensors, logprobs = server.states(text)
        path = server.folder / f"cmpl-{body['request_id']}-0-{uuid4().hex[:8]}.safetensors"
        descriptor = None
        if trouble.has_lock:
            descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)

        def write() -> None:
            time.sleep(trouble.write_after)
            if trouble.place is not None:
                trouble.place(path)
            elif trouble.has_file:
                save_file(trouble.tensors(tensors) if trouble.tensors else tensors, path)
            if descriptor is not None:
                os.close(descriptor)

        threading.Thread(target=write, daemon=True).start()
        choice = {"text": ".", "token_ids": [1], "finish_reason": "length", "prompt_token_ids": text}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = logprobs
        reply = {"choices": [choice], "kv_transfer_params": {"hidden_states_path": str(path)}}
        if trouble.is_silent:
            return None
        return 200, trouble.reply(reply) if trouble.reply else reply

    def _send(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(
    target: FrozenTarget, layer_ids: Sequence[int], folder: Path, **settings: Any
) -> Iterator[ExtractionServer]:
    """Run a server while the block runs; `settings` as of [`ExtractionServer`]."""
    with ExtractionServer(target, layer_ids, folder, **settings).running() as server:
        yield server
