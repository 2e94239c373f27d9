# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The target's readings from vLLM servers that extract hidden states: bounded, retried, checked, and nothing left behind.

Shape letters:  L = text length, S = states of a token (the tapped layers and the last one), H = hidden size
"""

import random
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from ..costs.readings import bytes_per_token
from ..responses.client import LONGEST_WAIT, ServerClient, ServerError, ServerSettings
from ..responses.protocols import WrongReply
from ..target.frozen import FrozenTarget
from ..target.reading import TextStates
from ..utils.hashing import hash_json
from .launch import serve_line, served_states
from .probe import check_alike, check_head, check_layers, probe_texts, read_all_layers
from .protocol import (
    NoStates,
    NotExtracting,
    build_reading,
    check_states,
    find_file_name,
    max_file_bytes,
    read_logprobs,
)
from .shared_folder import SharedFolder


# Times that a request is sent again to one of several servers before another is asked instead, and seconds until that
# one is tried again.
_FEW_RETRIES, _REST_SECONDS = 3, 60.0


class _Server:
    """One server, and how many texts are under way there."""

    def __init__(self, settings: ServerSettings):
        self.client = ServerClient(settings)
        self.root = settings.root
        self.model: str | None = None
        self.version: str | None = None
        self.max_model_len: int | None = None
        self.num_under_way = 0
        # Until when nothing is asked of it, by the monotonic clock.
        self.rests_until = 0.0
        # Whether what answers at this address is what was proven: not known once it was out of reach.
        self.is_proven = False
        self.proving = threading.Lock()

    @property
    def is_left_out(self) -> bool:
        """Whether nothing is asked of it now."""
        return time.monotonic() < self.rests_until

    def describe(self) -> None:
        """Ask for the name, the version and the longest text."""
        self.model, self.version = self.client.describe()
        listed = self.client.call("/v1/models", None)
        entries = listed.get("data") if isinstance(listed, dict) else None
        entries = [entry for entry in entries or () if isinstance(entry, dict)]
        entry = next((entry for entry in entries if entry.get("id") == self.model), None)
        if entry is None:
            shown = self.client.without_key(str([entry.get("id") for entry in entries]))
            raise ValueError(f"The server {self.root} serves {shown}, and not {self.model!r}.")
        length = entry.get("max_model_len")
        self.max_model_len = length if isinstance(length, int) else None


class ReadingServers:
    """
    Fetches readings from one or several servers that [`serve_line`] starts. Use [`ReadingServers.connect`].

    Attributes:
        is_before_norm (`bool`): `True`: the last state comes from before the final norm.
        concurrency (`int`): Texts under way at a time, at all servers together.
        layer_ids (`tuple[int, ...]`): Layers that can be had, ascending.
        digest (`str`): Of the target's weights, precision and layers; not of the addresses.
        engine_version (`str`): The servers' versions of vLLM.
        most_tokens (`int`, *optional*): Tokens of the longest text, where the servers tell.
    """

    is_before_norm = True

    def __init__(
        self,
        target: FrozenTarget,
        servers: list[_Server],
        layer_ids: Sequence[int],
        folder: SharedFolder,
        line: Callable[..., str],
        *,
        concurrency: int,
        timeout: float,
        max_retries: int,
        retry_wait: float,
    ):
        num_layers = target.num_layers
        self.layer_ids = tuple(sorted(set(layer_ids)))
        # Layers, as we count them, of the states in the order in which they come.
        self._served_layers = [state - 1 for state in served_states(self.layer_ids, num_layers)]
        self._hidden_size: int = target.config.hidden_size
        self._dtype = target.causal_lm.dtype
        self._servers, self._folder, self._line = servers, folder, line
        self._per_server, self.concurrency = concurrency, concurrency * len(servers)
        self._timeout, self._max_retries, self._retry_wait = timeout, max_retries, retry_wait
        self._changed = threading.Condition()
        self._is_stopped = threading.Event()
        self.digest = hash_json(
            {"weights": target.weights_fingerprint, "layers": self.layer_ids, "dtype": str(self._dtype), "by": "vllm"}
        )
        self.most_tokens: int | None = None
        self.engine_version = ""
        # A text and its states, once the servers are proven.
        self._proven: tuple[list[int], torch.Tensor] | None = None

    @classmethod
    def connect(
        cls,
        target: FrozenTarget,
        urls: str | Sequence[str],
        layer_ids: Sequence[int],
        *,
        shared_folder: str | Path,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        max_retries: int = 12,
        retry_wait: float = 1.0,
        check_layers: bool = True,
    ) -> "ReadingServers":
        """
        Connect to servers, sweep what ended processes left in their folder, and prove on short texts that they serve
        the target's states at `layer_ids`.

        Args:
            target ([`FrozenTarget`]): With or without its body.
            urls (`str` or `Sequence[str]`): Addresses, e.g. `http://127.0.0.1:8000`; servers of the same states.
            layer_ids (`Sequence[int]`): The layers that the servers were started for.
            shared_folder (`str` or `Path`): The servers' `shared_storage_path`, as this machine sees it.
            model (`str`, *optional*): Name the target is served under; asked from a server that serves a single one.
            api_key (`str`, *optional*): Sent as a bearer token to these addresses alone; never printed.
            concurrency (`int`, *optional*, defaults to `8`): Texts under way at each server at a time.
            timeout (`float`, *optional*, defaults to `600.0`):
                Seconds without a sign of life, and then seconds until a file is written, after which a request is
                given up and sent again.
            max_retries (`int`, *optional*, defaults to `12`), retry_wait (`float`, *optional*, defaults to `1.0`):
                How often a request that failed is sent again, and seconds before the first time; doubled each time,
                up to a minute. As they are, a server that comes back within five minutes is waited for.
            check_layers (`bool`, *optional*, defaults to `True`):
                Whether to compare the states with the layers' outputs, of the target's body or from the disk.

        Raises:
            ServerError: If a server does not reply, or its files do not come.
            ValueError: If one serves something else, or a setting is outside its range.
        """
        roots = [urls] if isinstance(urls, str) else list(urls)
        settings = [
            # Sent again here, where each time gets a number of its own.
            ServerSettings(url, model=model, concurrency=concurrency, timeout=timeout, max_retries=0, api_key=api_key)
            for url in roots
        ]
        if not settings or len({each.root for each in settings}) < len(settings):
            raise ValueError(f"Readings need one or several different servers, got {roots}.")
        ServerSettings(roots[0], max_retries=max_retries, retry_wait=retry_wait)
        servers = [_Server(each) for each in settings]
        line = partial(
            serve_line,
            "MERGED" if target.is_merged else target.causal_lm.config.name_or_path or "TARGET",
            layer_ids,
            target.num_layers,
            shared_folder=Path(shared_folder).absolute(),
            dtype=str(target.causal_lm.dtype).removeprefix("torch."),
        )
        folder = SharedFolder(shared_folder)
        try:
            folder.sweep()
            connected = cls(
                target,
                servers,
                layer_ids,
                folder,
                line,
                concurrency=concurrency,
                timeout=timeout,
                max_retries=max_retries,
                retry_wait=retry_wait,
            )
            connected._prove(target, check_layers)
        except BaseException:
            folder.close()
            raise
        return connected

    # -- Fetcher ------------------------------------------------------------------------------------------------------

    def fetch(self, text: Sequence[int], layer_ids: Sequence[int]) -> TextStates:
        """
        Return the states of a text at some of the layers, the last one's from before the final norm.

        Raises:
            ServerError: If no server delivers them, after all retries.
            ValueError: If the text is too long, a layer is not served, or what was delivered is not the target's.
        """
        lacking = sorted(set(layer_ids) - set(self.layer_ids))
        if lacking:
            raise ValueError(f"The servers deliver the layers {list(self.layer_ids)}, and not {lacking}.")
        self.require_lengths([len(text)])
        states = self._fetch_anywhere(np.asarray(text).tolist())
        places = [self._served_layers.index(layer) for layer in layer_ids]
        return TextStates(states[:, places].flatten(1), states[:, -1].contiguous())

    def num_bytes(self, num_tokens: int, num_layers: int) -> int:
        """Return the bytes of a text's states on the host."""
        return num_tokens * bytes_per_token(self._hidden_size, num_layers, self._dtype.itemsize)

    def require_lengths(self, lengths: Sequence[int]) -> None:
        """Refuse texts, by their numbers, that are empty or longer than the servers can read."""
        most = self.most_tokens
        wrong = [i for i, length in enumerate(lengths) if length < 1 or (most is not None and length > most)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(lengths)} texts cannot be read by the servers: text {wrong[0]} has "
                f"{lengths[wrong[0]]} tokens, and they read 1 to {most}. Start them with `--max-model-len "
                f"{max(lengths) + 1}` or more, or cut the texts (`max_length`)."
            )

    def close(self) -> None:
        """Stop waiting, and sweep what is left of requests that nobody waits for."""
        self._is_stopped.set()
        with self._changed:
            self._changed.notify_all()
        self._folder.close()

    # -- one text -----------------------------------------------------------------------------------------------------

    def _fetch_anywhere(self, text: list[int]) -> torch.Tensor:
        while True:
            server = self._take_server()
            is_one_of_several = self._num_serving() > 1
            retries = min(_FEW_RETRIES, self._max_retries) if is_one_of_several else self._max_retries
            try:
                return self._fetch_from(server, text, retries)[0]
            except WrongReply as error:
                raise WrongReply(self._describe_wrong(server, error, isinstance(error, NotExtracting))) from None
            except ServerError as error:
                failure = error
            finally:
                with self._changed:
                    server.num_under_way -= 1
                    self._changed.notify_all()
            if self._is_stopped.is_set():
                raise ServerError("The readings were closed.")
            if not self._leave_out(server, failure) and not is_one_of_several:
                raise ServerError(
                    f"The readings of a text of {len(text)} tokens did not come from {server.root}, sent "
                    f"{retries + 1} times: {failure}. Once the server is back, the same command resumes."
                ) from failure

    def _take_server(self) -> _Server:
        """Wait for the least busy server that has room for one more text, and count the text there."""
        with self._changed:
            while True:
                if self._is_stopped.is_set():
                    raise ServerError("The readings were closed.")
                serving = [server for server in self._servers if not server.is_left_out]
                server = min(serving, key=lambda server: server.num_under_way)
                if server.num_under_way < self._per_server:
                    server.num_under_way += 1
                    return server
                self._changed.wait()

    def _num_serving(self) -> int:
        return sum(not server.is_left_out for server in self._servers)

    def _leave_out(self, server: _Server, failure: Exception) -> bool:
        """Leave out a server that failed while another serves; return whether it is left out."""
        with self._changed:
            if server.is_left_out or self._num_serving() == 1:
                return server.is_left_out
            server.rests_until = time.monotonic() + _REST_SECONDS
            self._changed.notify_all()
        warnings.warn(
            f"The server {server.root} is left out for {_REST_SECONDS:.0f} seconds; the others read its texts, too. "
            f"{failure}"
        )
        return True

    def _fetch_from(
        self, server: _Server, text: list[int], retries: int, with_logprobs: bool = False
    ) -> tuple[torch.Tensor, list[float]]:
        """Ask one server, again after passing faults, each time under a new number."""
        wait = self._retry_wait
        while True:
            request_id = self._folder.new_request_id()
            try:
                if self._proven is not None and not server.is_proven:
                    self._prove_again(server, *self._proven)
                return self._fetch_once(server, text, request_id, with_logprobs)
            except WrongReply as error:
                # Of the same kind, and out of the handler: the error quotes the reply as it came.
                failure: Exception = type(error)(server.client.without_key(str(error)))
            except ServerError as error:
                failure = error
            except (OSError, HTTPException) as error:
                failure = ServerError(f"{type(error).__name__}: {server.client.without_key(str(error))}")
            self._folder.give_up(request_id)
            # A file that does not come is no sign that another server has taken this one's place.
            server.is_proven = server.is_proven and isinstance(failure, (WrongReply, NoStates))
            if isinstance(failure, WrongReply) or not retries:
                raise failure
            if self._is_stopped.wait(min(wait, LONGEST_WAIT) * random.uniform(0.5, 1.0)):
                raise failure
            retries, wait = retries - 1, wait * 2

    def _fetch_once(
        self, server: _Server, text: list[int], request_id: str, with_logprobs: bool
    ) -> tuple[torch.Tensor, list[float]]:
        path, body = build_reading(text, model=server.model, request_id=request_id, with_logprobs=with_logprobs)
        reply: Any = server.client.call(path, body)
        size = (len(self._served_layers), self._hidden_size, self._dtype)
        tensors = self._folder.take(
            find_file_name(reply, text, request_id),
            max_bytes=max_file_bytes(len(text), *size),
            timeout=self._timeout,
            is_stopped=self._is_stopped,
        )
        return check_states(tensors, text, *size), read_logprobs(reply, text) if with_logprobs else []

    def _prove_again(self, server: _Server, text: list[int], proven: torch.Tensor) -> None:
        """Compare what a server that was out of reach delivers for a text with what was proven to be the target's."""
        with server.proving:
            if server.is_proven:
                return
            request_id = self._folder.new_request_id()
            try:
                check_alike(self._fetch_once(server, text, request_id, with_logprobs=False)[0], proven)
            except BaseException:
                self._folder.give_up(request_id)
                raise
            server.is_proven = True

    def _describe_wrong(self, server: _Server, error: Exception, with_line: bool) -> str:
        said = f"The server {server.root} does not deliver the target's readings: {str(error).rstrip('.')}."
        if not with_line:
            return said
        place = urlsplit(server.root)
        line = self._line(host=place.hostname or "127.0.0.1", port=place.port or 8000)
        return f"{said} A server of these readings is started by:\n{line}"

    # -- the proof ----------------------------------------------------------------------------------------------------

    def _prove(self, target: FrozenTarget, with_layers: bool) -> None:
        """Ask what the servers are, and check on short texts what they deliver."""
        for server in self._servers:
            try:
                server.describe()
            except (ServerError, WrongReply) as error:
                raise type(error)(self._describe_wrong(server, error, with_line=True)) from None
        self.engine_version = ", ".join(sorted({str(server.version) for server in self._servers}))
        lengths = [server.max_model_len - 1 for server in self._servers if server.max_model_len is not None]
        self.most_tokens = min(lengths, default=None)
        texts = probe_texts(target, self.most_tokens)
        outputs: list[torch.Tensor] | None = None
        proven: tuple[list[int], torch.Tensor] | None = None
        for server in self._servers:
            try:
                found = [
                    self._fetch_from(server, text, min(2, self._max_retries), with_logprobs=True) for text in texts
                ]
                for text, (states, logprobs) in zip(texts, found, strict=True):
                    check_head(target, text, states[:, -1], logprobs)
                if with_layers:
                    outputs = read_all_layers(target, texts) if outputs is None else outputs
                    # Without a body, there may be none; of that it has warned.
                    for (states, _), of_all in zip(found, outputs, strict=bool(outputs)):
                        check_layers(target, states, self._served_layers, of_all)
                server.is_proven = True
                proven = (texts[0], found[0][0])
            except (ServerError, WrongReply) as error:
                raise type(error)(self._describe_wrong(server, error, with_line=True)) from None
        self._proven = proven
