# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Talks JSON with a server: retries where they can help, bounded replies, and a key that nobody else gets to see.

The standard library's client is used: the one of `huggingface_hub` refuses every call in offline mode, which is where
local servers are at home.

The key goes to the address that was named and nowhere else; what the server says is printed and stored without it.
"""

import json
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from ..utils.secrets import without_secret, without_users
from .protocols import ENGINES, WrongReply


_RETRY_STATUS = {408, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0
# More than any response with its log-probabilities; a server that streams without end must not fill the memory.
_MAX_REPLY_BYTES = 256 * 2**20
# Of a reply that is read as it arrives: more than any line of it.
_PIECE_BYTES = 2**16
# Of an error's page: read whole before the key is taken out, so that no half of it is left at the end of the quote.
_MAX_ERROR_BYTES, _LONGEST_QUOTE = 2**20, 500


@dataclass(frozen=True)
class ServerSettings:
    """
    Where the server is and how to talk to it.

    Args:
        base_url (`str`):
            E.g. `http://127.0.0.1:8000`; a trailing `/v1` may be there or not. Without a user, password or query: it
            is printed in errors.
        engine (`str`, *optional*, defaults to `"vllm"`):
            `"vllm"`: `/v1/completions` with token ids. `"sglang"`: SGLang's own `/generate`.
        model (`str`, *optional*):
            Name the target is served under; asked from a server that serves a single one.
        concurrency (`int`, *optional*, defaults to `16`):
            Requests under way at a time.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds without a sign of life after which a request is given up and sent again.
        max_retries (`int`, *optional*, defaults to `5`), retry_wait (`float`, *optional*, defaults to `1.0`):
            How often a request that failed is sent again, and seconds before the first time; doubled each time, up to
            a minute.
        api_key (`str`, *optional*):
            Sent as a bearer token to `base_url` alone; never printed and never stored, whatever the server replies.

    Raises:
        ValueError: If a setting is outside its range, the address is no plain http(s) URL, or the key cannot be sent.
    """

    base_url: str
    engine: str = "vllm"
    model: str | None = None
    concurrency: int = 16
    timeout: float = 600.0
    max_retries: int = 5
    retry_wait: float = 1.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_address(self.base_url)
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ValueError(
                "`api_key` must be one word of printable ASCII characters, and is "
                f"{'empty' if not self.api_key else f'{len(self.api_key)} characters with others among them'}."
            )
        if self.engine not in ENGINES:
            raise ValueError(f"`engine` must be one of {ENGINES}, got {self.engine!r}.")
        if self.concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, got {self.concurrency}.")
        is_time = 0 < self.timeout <= threading.TIMEOUT_MAX and 0 <= self.retry_wait < float("inf")
        if not is_time or self.max_retries < 0:
            raise ValueError(
                "`timeout` must be above 0, `retry_wait` and `max_retries` not below, and all of them finite, got "
                f"{self.timeout}, {self.retry_wait} and {self.max_retries}."
            )

    @property
    def root(self) -> str:
        """Address without a trailing slash or `/v1`."""
        return self.base_url.rstrip("/").removesuffix("/v1").rstrip("/")


def _check_address(base_url: str) -> None:
    """Refuse what is no plain http(s) address, without repeating what may be a secret in it."""
    if "@" in base_url or "?" in base_url or "#" in base_url:
        raise ValueError(
            "`base_url` must be an address like http://127.0.0.1:8000, without a user, password, query or fragment, "
            "because it is printed in errors. Give the server's key as `api_key` (`--api-key-file`)."
        )
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_address = is_address and not re.search(r"\s", base_url)
    except ValueError:  # a port or an IPv6 address that is none
        is_address = False
    if not is_address:
        raise ValueError(f"`base_url` must be an address like http://127.0.0.1:8000, got {base_url!r}.")


class ServerError(OSError):
    """The server could not be reached or did not reply; the message tells what is stored and how to resume."""


class NoJson(ServerError):
    """A success whose content is no JSON: cut short on its way, or of another kind of server."""


class ServerClient:
    """Sends JSON, receives JSON, tries again where that can help; follows no redirect."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.is_stopped = threading.Event()
        # Put together by hand: no proxy of the surroundings, no scheme but http(s), and nobody who follows a redirect,
        # which would carry the key to another host and make a GET of every question.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.HTTPHandler,
            urllib.request.HTTPSHandler,
            urllib.request.HTTPErrorProcessor,
            urllib.request.HTTPDefaultErrorHandler,
        ):
            self._opener.add_handler(handler())

    def describe(self) -> tuple[str | None, str | None]:
        """Return the name the target is served under, and the server's version where it reports one."""
        if self.settings.engine == "sglang":
            return None, None
        model = self.settings.model
        if model is None:
            listed = self.call("/v1/models", None)
            entries = listed.get("data") if isinstance(listed, dict) else None
            names = [str(entry["id"]) for entry in entries or () if isinstance(entry, dict) and "id" in entry]
            if len(names) != 1:
                shown = self.without_key(str(names)) if names else "no named model"
                raise ValueError(
                    f"The server {self.settings.root} serves {shown}. Name the one that is the target with `model` "
                    "(`--served-model-name`)."
                )
            model = names[0]
        try:
            reply = self._send("/version", None)
        except (OSError, HTTPException, ValueError):
            return model, None  # other servers have no such page
        return model, self.without_key(str(reply.get("version"))) if isinstance(reply, dict) else None

    def call(self, path: str, body: dict[str, Any] | None) -> Any:
        """Send one request, again after passing faults."""
        retries_left, wait = self.settings.max_retries, self.settings.retry_wait
        while True:
            try:
                return self._send(path, body)
            except urllib.error.HTTPError as error:
                failure = self._explain(error, path)
            except NoJson as error:
                failure = error
            except (OSError, HTTPException) as error:
                failure = ServerError(self._explain_silence(error, path))
            # Out of the handlers, so that no traceback shows the error inside, whose text may hold the key.
            if isinstance(failure, WrongReply):
                raise failure
            # Spread, so that requests that failed together do not return together.
            if not retries_left or self.is_stopped.wait(min(wait, LONGEST_WAIT) * random.uniform(0.5, 1.0)):
                raise failure
            retries_left, wait = retries_left - 1, wait * 2

    def _explain(self, error: urllib.error.HTTPError, path: str) -> WrongReply | ServerError:
        """Return what to raise for a status that is no success."""
        try:
            said = self.without_key(error.read(_MAX_ERROR_BYTES).decode("utf-8", "replace"))
            if said.lstrip()[:1] == "<":
                # A page: its text alone.
                said = " ".join(re.sub(r"<style.*?</style>|<[^>]*>", " ", said, flags=re.DOTALL).split())
            said = said[:_LONGEST_QUOTE]
        except (OSError, HTTPException):
            said = "(its explanation broke off)"
        if error.code in _RETRY_STATUS:
            return ServerError(f"status {error.code} from {self.settings.root}{path}: {said}")
        place = error.headers.get("Location")
        if 300 <= error.code < 400 and place is not None:
            return WrongReply(
                f"the server redirects (status {error.code}) to {without_users(self.without_key(place))[:200]!r}, "
                "and no redirect is followed. If that is the server you mean, give its address as `base_url`"
            )
        hint = ". Check `--api-key-file` (`api_key`)" if error.code in (401, 403) else ""
        return WrongReply(f"the server refused the request with status {error.code}: {said}{hint}")

    def _explain_silence(self, error: OSError | HTTPException, path: str) -> str:
        """Return what to say where no whole reply came."""
        if isinstance(getattr(error, "reason", None), ConnectionRefusedError):
            return f"no server answers at {self.settings.root} (is it running?)"
        return f"{self.settings.root}{path}: {type(error).__name__}: {self.without_key(str(error))[:_LONGEST_QUOTE]}"

    def without_key(self, text: str) -> str:
        """Return what the server said, to be printed or stored, without the key."""
        return without_secret(text, self.settings.api_key)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        """
        Send one request, once, and yield its reply in the pieces in which it arrives. Whoever stops iterating hangs
        up.

        Raises:
            WrongReply: If the server refuses the request.
            ServerError: If it cannot be reached, fails, or falls silent for longer than the timeout.
        """
        try:
            with self._opener.open(self._request(path, body), timeout=self.settings.timeout) as response:
                while piece := response.read1(_PIECE_BYTES):
                    yield piece
                return
        except urllib.error.HTTPError as error:
            failure = self._explain(error, path)
        except (OSError, HTTPException) as error:
            failure = ServerError(self._explain_silence(error, path))
        # As in `call`.
        raise failure

    def read_page(self, path: str) -> str | None:
        """Return the text of a page, or `None` where the server has none."""
        try:
            return self._fetch(path, None).decode("utf-8", "replace")
        except (OSError, HTTPException, WrongReply):
            return None

    def _request(self, path: str, body: dict[str, Any] | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self.settings.api_key is not None:
            headers["Authorization"] = f"Bearer {self.settings.api_key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self.settings.root + path, data=data, headers=headers)

    def _fetch(self, path: str, body: dict[str, Any] | None) -> bytes:
        with self._opener.open(self._request(path, body), timeout=self.settings.timeout) as response:
            content = response.read(_MAX_REPLY_BYTES + 1)
        if len(content) > _MAX_REPLY_BYTES:
            raise WrongReply(f"the reply is longer than {_MAX_REPLY_BYTES} bytes")
        return content

    def _send(self, path: str, body: dict[str, Any] | None) -> Any:
        content = self._fetch(path, body)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):  # of its encoding and of its depth, too
            said = self.without_key(content[:_MAX_ERROR_BYTES].decode("utf-8", "replace"))[:_LONGEST_QUOTE]
        # Out of the handler: its error quotes the reply as it came.
        raise NoJson(f"{self.settings.root}{path}: the reply is no JSON; it begins {said!r}")
