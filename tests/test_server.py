# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Responses from a server: what is asked, what is believed, and a server that replies late, wrongly, or stops midway.

The server here is a thread on 127.0.0.1 that speaks as much of the two protocols as is asked for.
"""

import html
import json
import threading
import time
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.local_server import LocalServer
from helpers.response_rows import EOS, VOCAB, make_origin, make_rows
from trl_draft_opd import Origin, ResponseStore, ServerSettings
from trl_draft_opd.responses import ServerError, ask_server
from trl_draft_opd.responses.protocols import WrongReply, build_request, prompt_seed, read_reply


PROMPTS = [row.prompt_ids for row in make_rows(12)]
SAMPLED = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}


def respond(prompt_ids: list[int]) -> list[int]:
    """The fake target's response: its prompt's ids, each one up, and an end of sequence."""
    return [min(i + 1, VOCAB - 1) for i in prompt_ids[:5]] + [EOS]


def vllm_reply(body: dict, **changes: Any) -> dict:
    """What vLLM replies to a request."""
    ids = respond(body["prompt"])
    choice = {
        "text": "...",
        "token_ids": ids,
        "prompt_token_ids": body["prompt"],
        "finish_reason": "stop",
        "stop_reason": None,
        "logprobs": {"token_logprobs": [-0.5] * len(ids)} if "logprobs" in body else None,
    }
    return {"choices": [choice | changes], "usage": {"completion_tokens": len(ids)}}


def sglang_reply(body: dict, **changes: Any) -> dict:
    """What SGLang's own endpoint replies to a request."""
    ids = respond(body["input_ids"])
    meta = {
        "prompt_tokens": len(body["input_ids"]),
        "completion_tokens": len(ids),
        "finish_reason": {"type": "stop", "matched": EOS},
        "output_token_logprobs": [[-0.5, i, None] for i in ids] if body["return_logprob"] else None,
    }
    return {"text": "...", "output_ids": ids, "meta_info": meta | changes}


class Raw(bytes):
    """A whole reply, status line and headers included."""


class FakeServer(LocalServer):
    """
    Replies with `script(number of the request, path, body)`: JSON, a status, bytes, `None` to hang up, or a [`Raw`].

    `pages` are what it replies to a GET, by path.
    """

    def __init__(self, script: Callable[[int, str, dict], Any]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.lock = threading.Lock()
        self.seen: list[tuple[str, dict | None, dict]] = []
        self.at_once = self.most_at_once = 0
        self.models = ["tiny"]
        self.pages: dict[str, Any] = {"/version": {"version": "0.0"}}
        self.seen_gets: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen_gets.append(self.path)
        models = {"data": [{"id": name} for name in self.server.models]}
        self._send(({"/v1/models": models} | self.server.pages).get(self.path, 404))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.seen)
            self.server.seen.append((self.path, body, dict(self.headers)))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            reply = self.server.script(number, self.path, body)
        finally:
            # Before the reply is sent: once it is there, the next request may come.
            with self.server.lock:
                self.server.at_once -= 1
        self._send(reply)

    def _send(self, reply: Any) -> None:
        if reply is None:
            self.close_connection = True
            return
        if isinstance(reply, Raw):
            self.wfile.write(reply)
            self.close_connection = True
            return
        status, content = (reply, b"no") if isinstance(reply, int) else (200, reply)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable], FakeServer]]:
    servers = []

    def start(script: Callable[[int, str, dict], Any]) -> FakeServer:
        servers.append(FakeServer(script).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def store(tmp_path: Path) -> ResponseStore:
    return ResponseStore.open(tmp_path / "store", make_origin())


def _ask(store: ResponseStore, server: FakeServer, prompts: list[list[int]] = PROMPTS, **settings: Any) -> int:
    settings = {
        "base_url": server.url,
        "concurrency": 3,
        "timeout": 5.0,
        "max_retries": 2,
        "retry_wait": 0.01,
    } | settings
    return ask_server(
        store,
        ServerSettings(**settings),
        prompts,
        tokenizer=None,
        seed=3,
        shard_size=2,
        show_progress=False,
    )


def _is_right(store: ResponseStore, prompts: list[list[int]]) -> bool:
    return all(store.find(prompt) == respond(prompt) for prompt in prompts)


# ---- what is asked and stored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "reply"), [("vllm", vllm_reply), ("sglang", sglang_reply)])
def test_every_prompt_is_sent_as_ids_and_its_response_stored(serve, store: ResponseStore, engine: str, reply):
    server = serve(lambda number, path, body: reply(body))
    assert _ask(store, server, engine=engine) == len(PROMPTS) == len(store)
    assert _is_right(ResponseStore.read_only(store.path), PROMPTS)
    assert store.read(PROMPTS[0]).logprobs == [-0.5] * len(respond(PROMPTS[0]))
    assert server.most_at_once <= 3
    assert {path for path, _, _ in server.seen} == {"/generate" if engine == "sglang" else "/v1/completions"}
    # Nothing is asked twice.
    assert _ask(store, server, engine=engine) == 0
    assert len(server.seen) == len(PROMPTS)


def test_requests_run_at_the_same_time(serve, store: ResponseStore):
    everyone = threading.Barrier(4, timeout=5)

    def script(number: int, path: str, body: dict) -> dict:
        everyone.wait()  # breaks, and the test fails, unless four are under way together
        return vllm_reply(body)

    assert _ask(store, serve(script), concurrency=4) == 12


def test_neutral_settings_are_sent_so_that_no_server_default_counts():
    for engine in ("vllm", "sglang"):
        _, body = build_request(engine, [7], make_origin(), model="m", seed=1)
        distribution = body if engine == "vllm" else body["sampling_params"]
        neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": [EOS], "ignore_eos": False}
        assert neutral.items() <= distribution.items()
        assert distribution["skip_special_tokens"] is False
        assert not {"seed", "sampling_seed"} & set(distribution)
    _, body = build_request("vllm", [7, 8], make_origin(**SAMPLED), model="m", seed=5)
    assert {"prompt": [7, 8], "model": "m", "max_tokens": 8, "return_token_ids": True}.items() <= body.items()
    assert {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 5, "logprobs": 0}.items() <= body.items()
    _, body = build_request("sglang", [7, 8], make_origin(**SAMPLED), model=None, seed=5)
    assert (body["input_ids"], body["return_logprob"]) == ([7, 8], True)
    assert {"top_k": 5, "sampling_seed": 5, "max_new_tokens": 8, "no_stop_trim": True}.items() <= body[
        "sampling_params"
    ].items()


def test_a_seed_depends_on_prompt_and_run_alone():
    seeds = {prompt_seed(prompt, 0) for prompt in PROMPTS}
    assert len(seeds) == len(PROMPTS)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert prompt_seed([7, 8], 1) == prompt_seed([7, 8], 0) + 1


def test_the_name_of_the_target_is_asked_for_where_there_is_one(serve, store: ResponseStore):
    server = serve(lambda number, path, body: vllm_reply(body))
    _ask(store, server, PROMPTS[:1], base_url=server.url + "/v1/")
    assert server.seen[0][1]["model"] == "tiny"
    server.models = ["tiny", "other"]
    with pytest.raises(ValueError, match=r"serves \['tiny', 'other'\]. Name the one"):
        _ask(store, server)
    _ask(store, server, PROMPTS[1:2], model="other", api_key="hush")
    assert server.seen[1][1]["model"] == "other"
    assert server.seen[1][2]["Authorization"] == "Bearer hush"
    assert "hush" not in repr(ServerSettings(base_url="http://a", api_key="hush"))
    assert not any("hush" in path.read_text("latin-1") for path in store.path.iterdir())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"base_url": "file:///etc/passwd"}, "must be an address like"),
        ({"base_url": "localhost:8000"}, "must be an address like"),
        ({"base_url": "http://a:port"}, "must be an address like"),
        ({"base_url": "http://[::1"}, "must be an address like"),
        ({"base_url": "ftp://a"}, "must be an address like"),
        ({"base_url": "http://a b"}, "must be an address like"),
        ({"base_url": "http://a:0"}, "must be an address like"),
        ({"engine": "tgi"}, "`engine` must be one of"),
        ({"concurrency": 0}, "`concurrency` must be at least 1"),
        ({"timeout": 0.0}, "`timeout` must be above 0"),
        ({"timeout": float("inf")}, "`timeout` must be above 0"),
        ({"retry_wait": float("nan")}, "`retry_wait` and"),
        ({"max_retries": -1}, "`max_retries` not below"),
    ],
)
def test_settings_of_a_server_out_of_range_are_refused(settings: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        ServerSettings(**{"base_url": "http://127.0.0.1:1"} | settings)


# ---- the key --------------------------------------------------------------------------------------------------------

KEY = 'canary-"/+<&\\-0123'


def _everything_said(error: BaseException, caplog: pytest.LogCaptureFixture, store: ResponseStore) -> str:
    files = "".join(path.read_text("latin-1") for path in sorted(store.path.iterdir()))
    return "".join(traceback.format_exception(error)) + repr(error) + caplog.text + files


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["/v1/models", "/version", "/v1/completions"])
def test_no_redirect_is_followed_so_the_key_stays_with_the_server_that_was_named(
    serve, store: ResponseStore, status: int, where: str
):
    elsewhere = serve(lambda number, path, body: vllm_reply(body))
    page = Raw(f"HTTP/1.1 {status} Go\r\nLocation: {elsewhere.url}{where}\r\nContent-Length: 0\r\n\r\n".encode())
    server = serve(lambda number, path, body: page if where == path else vllm_reply(body))
    server.pages[where] = page
    if where == "/version":
        assert _ask(store, server, api_key=KEY) == 12
    else:
        with pytest.raises(ValueError, match=rf"redirects \(status {status}\) to '{elsewhere.url}.*give its address"):
            _ask(store, server, api_key=KEY)
    assert elsewhere.seen == [] and elsewhere.seen_gets == []


def test_a_redirect_is_told_without_the_user_and_the_key_in_it(serve, store: ResponseStore, caplog):
    server = serve(
        lambda number, path, body: Raw(
            f"HTTP/1.1 302 Go\r\nLocation: http://me:secret@there/{quote(KEY)}\r\n\r\n".encode()
        )
    )
    with pytest.raises(ValueError, match=r"to 'http://\*\*\*@there/\*\*\*'") as refusal:
        _ask(store, server, api_key=KEY)
    assert "secret" not in _everything_said(refusal.value, caplog, store)


def _echoes(number: int, path: str, body: dict | None) -> dict[str, Any]:
    """Ways in which a server can say the key that it was sent."""
    page = b"HTTP/1.1 %d %s\r\nContent-Length: %d\r\n\r\n%s"
    texts = [KEY, json.dumps({"Authorization": f"Bearer {KEY}"}), json.dumps(KEY).replace("/", "\\/"), repr(KEY)]
    texts += [html.escape(KEY), quote(KEY), quote(KEY, safe=""), b64encode(KEY.encode()).decode()]
    said = " ".join(texts).encode()
    # So that a quote of some length would end within the key.
    long = b"x" * 490 + KEY.encode()
    echoes = {f"body of {status}": Raw(page % (status, b"no", len(said), said)) for status in (200, 400, 500)}
    echoes |= {f"end of {status}": Raw(page % (status, b"no", len(long), long)) for status in (200, 400, 500)}
    echoes |= {f"reason of {status}": Raw(page % (status, KEY.encode(), 0, b"")) for status in (401, 503)}
    echoes |= {"status line": Raw(b"HTTP/1.1 " + KEY.encode() + b" no\r\n\r\n"), "no HTTP": Raw(said)}
    wrong = vllm_reply(body, finish_reason=f"Bearer {KEY}") if body else {}
    return echoes | {"reply": wrong, "form": {"choices": [{"finish_reason": f"Bearer {KEY}"}]}}


@pytest.mark.parametrize("way", _echoes(0, "", None))
def test_a_key_that_the_server_echoes_is_in_no_message_traceback_or_file(
    serve, store: ResponseStore, caplog, way: str
):
    caplog.set_level("DEBUG")
    server = serve(lambda *request: _echoes(*request)[way])
    with pytest.raises((ServerError, ValueError)) as refusal:
        _ask(store, server, PROMPTS[:2], api_key=KEY, max_retries=1)
    said = _everything_said(refusal.value, caplog, store)
    assert not any(part in said for part in ("canary", html.escape(KEY), b64encode(KEY.encode()).decode()[:16]))
    assert server.seen[0][2]["Authorization"] == f"Bearer {KEY}"


def test_a_key_among_the_names_and_versions_of_a_server_is_neither_printed_nor_stored(serve, store, caplog):
    server = serve(lambda number, path, body: vllm_reply(body))
    server.pages["/version"] = {"version": f"0.1 for {KEY}"}
    assert _ask(store, server, api_key=KEY) == 12
    assert "canary" not in "".join(path.read_text("latin-1") for path in store.path.iterdir())
    server.models = ["a", f"b of {KEY}"]
    with pytest.raises(ValueError, match=r"serves \['a', ") as refusal:
        _ask(ResponseStore.open(store.path.with_name("other"), make_origin()), server, api_key=KEY)
    assert "canary" not in _everything_said(refusal.value, caplog, store)


@pytest.mark.parametrize("key", ["", "a b", "canary\nX-More: 1", "canary\u2026", "canary\x7f"])
def test_a_key_that_cannot_be_sent_is_refused_without_printing_it(key: str):
    with pytest.raises(ValueError, match="`api_key` must be one word of printable ASCII") as refusal:
        ServerSettings(base_url="http://a", api_key=key)
    assert "canary" not in str(refusal.value)


@pytest.mark.parametrize(
    "address",
    [
        "http://me:canary@a",
        "http://canary@a/v1",
        "me:canary@a",
        "http://me:can/ary#@a",
        "http://a/?key=canary",
        "http://a#canary",
        "ftp://me:canary@a",
    ],
)
def test_an_address_with_a_secret_in_it_is_refused_without_printing_it(address: str):
    with pytest.raises(ValueError, match="without a user, password, query or fragment") as refusal:
        ServerSettings(base_url=address)
    assert "can" not in str(refusal.value).replace("because", "")


def test_a_list_of_models_that_is_none_is_said(serve, store: ResponseStore):
    server = serve(lambda number, path, body: vllm_reply(body))
    for page in ([], {"data": None}, {"data": [3, {"name": "x"}]}):
        server.pages["/v1/models"] = page
        with pytest.raises(ValueError, match="serves no named model. Name the one"):
            _ask(store, server)


# ---- a server in trouble --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [500, 503, 429, None, b"{", b"\xff"])
def test_passing_trouble_is_tried_again(serve, store: ResponseStore, trouble: Any):
    server = serve(lambda number, path, body: trouble if number < 2 else vllm_reply(body))
    assert _ask(store, server) == 12
    assert _is_right(store, PROMPTS)
    assert len(server.seen) == 14


def test_a_late_reply_is_given_up_and_asked_for_again(serve, store: ResponseStore):
    def script(number: int, path: str, body: dict) -> dict:
        if number == 0:
            time.sleep(1.0)
        return vllm_reply(body)

    server = serve(script)
    assert _ask(store, server, PROMPTS[:2], timeout=0.3) == 2
    assert len(server.seen) == 3
    assert _is_right(store, PROMPTS[:2])


def test_a_server_that_stops_midway_loses_nothing_and_the_run_resumes(serve, store: ResponseStore):
    dying = serve(lambda number, path, body: vllm_reply(body) if number < 5 else None)
    with pytest.raises(ServerError) as error:
        _ask(store, dying)
    message = str(error.value)
    assert f"5 of 12 missing responses came in and are stored in {store.path}; 7 are still missing" in message
    assert "The same command resumes" in message
    reopened = ResponseStore.open(store.path, make_origin())
    assert len(reopened) == 5
    healthy = serve(lambda number, path, body: vllm_reply(body))
    assert _ask(reopened, healthy) == 7
    assert len(healthy.seen) == 7
    assert _is_right(reopened, PROMPTS)


def test_no_server_at_all_is_one_clear_error(serve, store: ResponseStore):
    server = serve(lambda number, path, body: None)
    server.shutdown()
    server.server_close()
    with pytest.raises(ServerError, match=rf"no server answers at {server.url} \(is it running\?\)"):
        _ask(store, server)


@pytest.mark.parametrize("content", [b"<html>login", b"\xff<html>login", b"[" * 100_000])
def test_a_success_that_is_no_json_is_quoted_after_it_was_tried_again(serve, store: ResponseStore, content: bytes):
    server = serve(lambda number, path, body: content)
    with pytest.raises(ServerError, match=r"/v1/completions: the reply is no JSON; it begins '.*(<html>login|\[\[)'"):
        _ask(store, server, PROMPTS[:1])
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_a_key_is_told_with_the_flag_for_it(serve, store: ResponseStore, status: int):
    server = serve(lambda number, path, body: status)
    with pytest.raises(ValueError, match=f"with status {status}: no. Check `--api-key-file`"):
        _ask(store, server, PROMPTS[:1])
    assert len(server.seen) == 1


def test_a_request_the_server_refuses_is_not_repeated(serve, store: ResponseStore):
    server = serve(lambda number, path, body: 400)
    with pytest.raises(ValueError, match="prompt 0: the server refused the request with status 400: no"):
        _ask(store, server, concurrency=1)
    assert len(server.seen) == 1


def test_a_wrong_reply_stops_sending_and_keeps_the_right_ones(serve, store: ResponseStore):
    def script(number: int, path: str, body: dict) -> dict:
        return vllm_reply(body, **({"token_ids": [7, VOCAB]} if number == 4 else {}))

    server = serve(script)
    with pytest.raises(
        ValueError,
        match="4 of 12 missing .*1 replies were refused: prompt 4: the response holds the token id 64, outside",
    ):
        _ask(store, server, concurrency=1)
    assert len(server.seen) == 5
    assert len(ResponseStore.open(store.path, make_origin())) == 4


def test_an_interrupt_keeps_what_came_in(serve, store: ResponseStore, monkeypatch: pytest.MonkeyPatch):
    server = serve(lambda number, path, body: vllm_reply(body))
    real = ask_server.__globals__["ask_all"]

    def interrupted(*arguments: Any) -> Any:
        for number_taken, result in enumerate(real(*arguments)):
            if number_taken == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setitem(ask_server.__globals__, "ask_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _ask(store, server)
    assert len(ResponseStore.open(store.path, make_origin())) == 3


# ---- what is believed -----------------------------------------------------------------------------------------------


def _read(origin: Origin | None = None, engine: str = "vllm", tokenizer: Any = None, **changes: Any) -> Any:
    prompt = [7, 8, 9]
    reply = vllm_reply if engine == "vllm" else sglang_reply
    body = {"prompt": prompt, "input_ids": prompt, "logprobs": 0, "return_logprob": True}
    return read_reply(engine, reply(body, **changes), prompt, origin or make_origin(), tokenizer)


WRONG_CHOICES = {
    "outside the target's vocabulary of 64": {"token_ids": [7, -1, EOS]},
    "holds the token id 7.0, outside": {"token_ids": [7.0, EOS]},
    "has a response of 9 tokens, more than `max_completion_length` 8": {"token_ids": [7] * 9},
    "read another prompt, of 2 ids in place of 3": {"prompt_token_ids": [7, 8]},
    "continues after an end-of-sequence id": {"token_ids": [7, EOS, 8]},
    "was cut at 2 of 8 tokens": {"token_ids": [7, 8], "finish_reason": "length"},
    "ended the response for the reason 'abort'": {"finish_reason": "abort"},
    "stopped by 'Human:'": {"token_ids": [7, 8], "stop_reason": "Human:"},
    "has 2 log-probabilities for 4 tokens": {"logprobs": {"token_logprobs": [-0.1, -0.1]}},
    "it must be finite and not above 0": {"logprobs": {"token_logprobs": [-0.1, -0.1, None, -0.1]}},
    "returned text and no ids, and there is no tokenizer": {"token_ids": None},
}


@pytest.mark.parametrize("reason", WRONG_CHOICES)
def test_a_reply_that_is_no_response_of_the_target_is_refused(reason: str):
    with pytest.raises(WrongReply, match=reason):
        _read(**WRONG_CHOICES[reason])


@pytest.mark.parametrize("reply", [None, [], {}, {"choices": []}, {"choices": [{}, {}]}, {"choices": [3]}, "no"])
def test_a_reply_of_another_form_is_refused(reply: Any):
    for engine in ("vllm", "sglang"):
        with pytest.raises(WrongReply):
            read_reply(engine, reply, [7], make_origin(), None)


def test_an_end_of_sequence_that_the_engine_strips_is_put_back():
    row = _read(token_ids=[7, 8], logprobs={"token_logprobs": [-0.1, -0.2]})
    assert (row.completion_ids, row.finish_reason) == ([7, 8, EOS], "stop")
    assert row.logprobs is None, "the end has no log-probability, and half a row has none"
    two = make_origin(eos_token_ids=(EOS, 3))
    assert _read(two, token_ids=[7], stop_reason=3, logprobs=None).completion_ids == [7, 3]
    with pytest.raises(WrongReply, match=r"stopped by None, and not by one of .* \[2, 3\]"):
        _read(two, token_ids=[7], logprobs=None)


def test_a_response_as_long_as_allowed_is_cut_and_not_complete():
    full = [7] * 8
    logprobs = {"token_logprobs": [-0.1] * 8}
    assert _read(token_ids=full, finish_reason="length", logprobs=logprobs).finish_reason == "length"
    # Ended by an end of sequence behind the limit, which the engine stripped: the target was not asked for it.
    assert _read(token_ids=full, finish_reason="stop", logprobs=logprobs).completion_ids == full
    # Ended exactly at the limit.
    ended = [7] * 7 + [EOS]
    assert _read(token_ids=ended, finish_reason="length", logprobs=logprobs).finish_reason == "stop"


def test_log_probabilities_of_sglang_must_belong_to_the_returned_ids():
    assert _read(engine="sglang").logprobs == [-0.5] * 4
    with pytest.raises(WrongReply, match="belong to other tokens"):
        _read(engine="sglang", output_token_logprobs=[[-0.5, 50, None]] * 4)
    with pytest.raises(WrongReply, match="of 5 ids in place of 3"):
        _read(engine="sglang", prompt_tokens=5)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and `ab`, a merge of two: `ab` can be written as one token or as two."""
    vocabulary = {"</s>": EOS, "a": 7, "b": 8, "c": 9, "ab": 10, "Ġ": 11}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def _read_text(text: str, count: int | None, prompt: list[int]) -> Any:
    reply = {"choices": [{"text": text, "finish_reason": "stop"}], "usage": {"completion_tokens": count}}
    return read_reply("vllm", reply, prompt, make_origin(), _byte_tokenizer()).completion_ids


def test_text_becomes_ids_only_where_the_way_back_is_proven():
    assert _read_text("cab", 3, [9]) == [9, 10, EOS]
    assert _read_text("cab", 2, [9]) == [9, 10, EOS], "servers count the end of sequence or do not"
    refused = {
        "other tokens of the same text": ("cab", 4, [9]),
        "no count": ("cab", None, [9]),
        "a merge across the border": ("bc", 3, [7]),
        "a prompt that was tokenised in another way": ("c", 2, [7, 8]),
        "text this tokenizer cannot write": ("cz", 3, [9]),
    }
    for case, arguments in refused.items():
        with pytest.raises(WrongReply, match="no proven way back"):
            pytest.fail(f"{case}: {_read_text(*arguments)}")
