# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Logs of a server become a store of responses: what is taken, what is left out and why, and that nothing leaks."""

import asyncio
import copy
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from helpers.logs import chat_line, streamed, write_log
from helpers.tiny import EOS, VOCAB, make_drafter, make_target
from trl_draft_opd import (
    ResponseStore,
    SamplingSettings,
    generate_responses,
    import_traffic,
)
from trl_draft_opd.cli import main
from trl_draft_opd.data.text_reader import TextReader
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.traffic.reading import ServedResponse, ServedRounds, TrafficReader
from trl_draft_opd.traffic.records import Exchange, Unusable
from trl_draft_opd.traffic.sampling import read_defaults
from trl_draft_opd.traffic.served import _replay, compare_served


PAGE = Path(__file__).resolve().parents[1] / "docs" / "do" / "traffic.md"
GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
LENGTH, NUM_DRAFTS = 24, 4
# In no vocabulary of these tests, and as ids of words.
MARKER, WORDS = "Zanzibar-7731", "w41 w17 w53 w29 w61"
MARKED_IDS = [41, 17, 53, 29, 61]


@pytest.fixture(scope="module")
def target():
    return make_target()


def ids_of(target, content: str) -> list[int]:
    chat = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return target.tokenizer.apply_chat_template(chat, **options)["input_ids"]


@pytest.fixture(scope="module")
def texts(target) -> list[tuple[str, list[int], list[int]]]:
    """Chats, their ids, and the target's greedy responses."""
    contents = [f"w{8 + i} w{9 + 2 * i} {WORDS}" for i in range(12)]
    prompts = [ids_of(target, content) for content in contents]
    options = {"sampling": GREEDY, "batch_size": 1, "seed": 0, "show_progress": False}
    return list(
        zip(
            contents,
            prompts,
            generate_responses(target, prompts, max_completion_length=LENGTH, **options),
            strict=True,
        )
    )


@pytest.fixture
def lines(texts) -> list[dict]:
    return [chat_line(*text, finish="stop" if text[2][-1] == EOS else "length") for text in texts]


def take(target, tmp_path: Path, lines: list, **options):
    settings = {"sampling": GREEDY, "max_completion_length": LENGTH} | options
    return import_traffic(target, [write_log(tmp_path / "log.jsonl", lines)], tmp_path / "store", **settings)


def test_a_log_becomes_the_texts_that_the_target_wrote_streamed_or_not(target, texts, lines, tmp_path):
    report = take(target, tmp_path, [*lines[:6], *map(streamed, lines[6:])])
    assert (report.num_lines, report.num_written, report.skipped) == (12, 12, {})
    assert report.check.num_mismatches == 0
    store = ResponseStore.read_only(tmp_path / "store")
    assert all(store.find(prompt) == response for _, prompt, response in texts)
    # Once more, and the store stays as it is.
    again = take(target, tmp_path, lines)
    assert (again.num_written, again.num_repeated, len(store)) == (0, 12, 12)


def test_completions_of_text_and_of_ids_are_read(target, texts, tmp_path):
    lines = []
    for prompt in ("w9 w10 w11", [12, 13, 14]):
        ids = prompt if isinstance(prompt, list) else [9, 10, 11]
        options = {"sampling": GREEDY, "batch_size": 1, "seed": 0, "show_progress": False}
        (response,) = generate_responses(target, [ids], max_completion_length=LENGTH, **options)
        choice = {"index": 0, "text": "", "finish_reason": "length", "token_ids": response, "prompt_token_ids": ids}
        request = {"prompt": prompt, "temperature": 0}
        lines.append({"request": json.dumps(request), "response": {"choices": [choice]}, "status": 200})
    assert take(target, tmp_path, lines).num_written == 2


def test_text_without_ids_is_taken_where_the_way_back_is_proven():
    tokens = Tokenizer(BPE(vocab={"</s>": EOS, "a": 7, "b": 8, "c": 9, "ab": 10}, merges=[("a", "b")]))
    tokens.pre_tokenizer, tokens.decoder = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>")
    reader = TrafficReader(TextReader(tokenizer, (EOS,), VOCAB), read_defaults(None, "vllm"), None)

    def read(text: str, num_prompt: int, num_response: int, finish: str, **request) -> list[int]:
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num_response}
        reply = {"choices": [{"text": text, "finish_reason": finish}], "usage": usage}
        return reader.read(Exchange({"prompt": "c", "temperature": 0} | request, reply)).completion_ids.tolist()

    assert read("cab", 1, 3, "stop") == [9, 10, EOS] and read("cab", 1, 2, "length") == [9, 10]
    for wrong, reason in (
        (("cab", 1, 4, "stop"), "`token_ids`, and the text has no proven way"),
        (("cab", 1, 3, "length"), "`token_ids`, and the text has no proven way"),
        (("cab", 2, 3, "stop"), "no `prompt_token_ids`"),
    ):
        with pytest.raises(Unusable, match=reason):
            read(*wrong)
    with pytest.raises(Unusable, match="a text that is not whole"):
        read("cab", 1, 3, "stop", stop=["b"])


CASES = {
    "`repetition_penalty`, of the request": {"repetition_penalty": 1.1},
    "`presence_penalty`, of the request": {"presence_penalty": 0.5},
    "`logit_bias`": {"logit_bias": {"9": 5}},
    "`n`": {"n": 2},
    "`ignore_eos`": {"ignore_eos": True},
    "`response_format`": {"response_format": {"type": "json_object"}},
    "`tool_choice`": {"tool_choice": "required"},
    "does not know": {"a_new_way_to_sample": 1},
    "chat template": {"messages": [{"role": "user", "content": "w9 other"}]},
    "`include_reasoning`": {"include_reasoning": False},
    "`bad_words`": {"bad_words": [MARKER]},
}


@pytest.mark.parametrize("reason", CASES)
def test_a_request_that_cannot_be_replayed_is_left_out_and_counted(target, lines, tmp_path, reason):
    lines[0]["request"] |= CASES[reason]
    report = take(target, tmp_path, lines)
    assert report.num_written == 11
    ((found, count),) = report.skipped.items()
    assert reason in found and count == 1 and MARKER not in found


def test_damaged_and_failed_replies_are_left_out_and_counted(target, lines, tmp_path):
    aborted, failed, refused = copy.deepcopy(lines[:3])
    aborted["response"]["choices"][0]["finish_reason"] = None
    failed["response"] = {"error": {"message": MARKER}}
    refused["status"] = 503
    broken = streamed(lines[3])
    broken["response"] = broken["response"][: len(broken["response"]) // 2]
    hidden = streamed(lines[4])
    hidden["response"] = hidden["response"].replace('"token_ids"', '"hidden"', 1)
    odd = {"request": lines[5]["request"], "response": {"choices": {MARKER: 1}}}
    bad = [aborted, failed, refused, broken, hidden, odd, '{"request": ' + MARKER, "[1]"]
    report = take(target, tmp_path, [*bad, *lines[6:]])
    assert report.num_written == 6
    assert sorted(report.skipped.values(), reverse=True) == [2, 2, 1, 1, 1, 1]
    assert MARKER not in str(report)


def test_other_temperatures_are_counted_with_the_flags_that_import_them(target, lines, tmp_path):
    for line in lines[:4]:
        line["request"] |= {"temperature": 0.7, "top_k": 8, "top_p": 0.9}
    report = take(target, tmp_path, lines)
    assert report.num_written == 8
    assert report.others == {"--temperature 0.7 --top-k 8 --top-p 0.9": 4}
    del lines[0]["request"]["temperature"]
    # Left open, it is the generation config's, as the server fills it in.
    assert list(take(target, tmp_path, lines).others) == [
        "--temperature 0.7 --top-k 8 --top-p 0.9",
        "--temperature 1 --top-k 8 --top-p 0.9",
    ]


def test_what_the_target_did_not_write_is_refused_and_nothing_is_written(target, lines, tmp_path):
    for line in lines:
        ids = line["response"]["choices"][0]["token_ids"]
        ids[:-1] = [7 + (token * 5) % 50 for token in ids[:-1]]
    with pytest.raises(ValueError, match="did not write these responses"):
        take(target, tmp_path, lines)
    assert not (tmp_path / "store").exists()


def test_log_probabilities_of_other_weights_are_noticed(target, lines, tmp_path):
    for line in lines:
        (choice,) = line["response"]["choices"]
        choice["logprobs"] = {"content": [{"token": "w9", "logprob": -7.5} for _ in choice["token_ids"]]}
    with pytest.warns(UserWarning, match="nats from the target's own"):
        assert take(target, tmp_path, lines).logprob_gap > 1


def test_a_log_of_two_models_is_refused_until_one_is_named(target, lines, tmp_path):
    lines[0]["request"]["model"] = "another"
    with pytest.raises(ValueError, match="replies of 2 models.*--served-model-name"):
        take(target, tmp_path, lines)
    assert take(target, tmp_path, lines, served_model_name="target").num_written == 11


def test_sampled_traffic_is_checked_by_its_likelihood(target, tmp_path):
    sampling = SamplingSettings(temperature=0.8, top_k=8, top_p=1.0)
    prompts = [ids_of(target, f"w{9 + i} w{30 - i}") for i in range(16)]
    options = {"batch_size": 8, "seed": 0, "show_progress": False, "max_completion_length": LENGTH}
    request = {"temperature": 0.8, "top_k": 8, "top_p": 1.0}

    def log_of(drawn_from: SamplingSettings) -> list[dict]:
        responses = generate_responses(target, prompts, sampling=drawn_from, **options)
        return [
            chat_line(f"w{9 + i} w{30 - i}", prompt, response, "length", **request)
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]

    report = take(target, tmp_path, log_of(sampling), sampling=sampling)
    assert (report.num_written, report.check.num_impossible, report.others) == (16, 0, {})
    hotter = log_of(SamplingSettings(temperature=3.0, top_k=0, top_p=1.0))
    with pytest.raises(ValueError, match="did not write these responses"):
        take(target, tmp_path, hotter, sampling=sampling)


def test_a_middleware_of_the_page_logs_what_import_reads(target, texts, lines, tmp_path):
    source = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)[1]
    module: dict = {}
    exec(source, module)
    module["LOGS"] = tmp_path / "logs"
    asked = []

    def serve(line: dict) -> None:
        reply = line["response"]
        data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()

        async def app(scope, receive, send):
            asked.append(json.loads((await receive())["body"]))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for part in (data[:50], data[50:]):
                await send({"type": "http.response.body", "body": part, "more_body": part is not data[50:]})

        body = json.dumps(line["request"]).encode()
        parts = [{"body": body[:9], "more_body": True}, {"body": body[9:], "more_body": False}]

        async def receive():
            return parts.pop(0)

        async def send(message):
            pass

        scope = {"type": "http", "path": "/v1/chat/completions", "headers": [(b"content-length", b"1")]}
        asyncio.run(module["TrafficLog"](app)(scope, receive, send))

    for line in [*lines[:2], streamed(lines[2])]:
        serve(line)
    assert [request["return_token_ids"] for request in asked] == [True] * 3
    logs = list(module["LOGS"].glob("*/*.jsonl"))
    assert logs and all(log.stat().st_mode & 0o077 == 0 for log in logs)
    options = {"sampling": GREEDY, "max_completion_length": LENGTH}
    assert import_traffic(target, logs, tmp_path / "store", **options).num_written == 3


# ---- the drafter that was served ------------------------------------------------------------------------------------


def with_rounds(target, drafter, texts) -> list[ServedResponse]:
    """Responses as a server with this drafter reports them."""
    rows = [ServedResponse(*map(np.asarray, text[1:]), None, GREEDY, None) for text in texts]
    chains = _replay(target, drafter, rows, DraftingSettings(NUM_DRAFTS, GREEDY, "greedy", False), 0)
    return [
        ServedResponse(row.prompt_ids, row.completion_ids, None, GREEDY, ServedRounds(chain, NUM_DRAFTS, True))
        for row, chain in zip(rows, chains, strict=True)
    ]


def test_the_drafter_that_was_served_is_told_from_one_that_was_not(target, texts):
    drafter = make_drafter("eagle3", target)
    served = with_rounds(target, drafter, texts)
    same = compare_served(target, drafter, served, GREEDY)
    assert (same.gap, same.num_other, same.differs) == (0.0, 0, False) and same.num_rounds > 100
    better = [ServedRounds([2] * 24, NUM_DRAFTS, True) for _ in served]
    wrong = [ServedResponse(*list(vars(row).values())[:4], each) for row, each in zip(served, better, strict=True)]
    other = compare_served(target, drafter, wrong, GREEDY)
    assert other.differs and other.gap_low > 0 and "does not draft as this drafter does" in other.describe()


def test_a_round_that_reaches_behind_the_end_of_a_response_is_not_compared(target, texts):
    drafter = make_drafter("eagle3", target)
    served = with_rounds(target, drafter, texts)
    # An engine goes on behind the end, and may keep there what a replay cannot know.
    for row in served:
        row.rounds.accepted[-1] = NUM_DRAFTS
    compared = compare_served(target, drafter, served, GREEDY)
    assert (compared.gap, compared.num_other) == (0.0, 0)


def test_rounds_that_do_not_add_up_are_left_out(target, texts):
    drafter = make_drafter("eagle3", target)
    served = with_rounds(target, drafter, texts)
    served[0].rounds.accepted[:] = [0, 0]
    assert compare_served(target, drafter, served, GREEDY).num_unclear == 1
    with pytest.raises(ValueError, match="--per-request-spec-decode-metrics detailed"):
        compare_served(target, drafter, [ServedResponse(*list(vars(served[1]).values())[:4], None)], GREEDY)


# ---- nothing leaks --------------------------------------------------------------------------------------------------


def holds(data: bytes) -> bool:
    """Whether a file or a message holds private text, or its ids in some written form."""
    forms = [MARKER, WORDS, str(MARKED_IDS), str(MARKED_IDS)[1:-1], ",".join(map(str, MARKED_IDS))]
    forms += [np.asarray(MARKED_IDS, kind).tobytes() for kind in ("<i4", "<i8")]
    return any((form if isinstance(form, bytes) else form.encode()) in data for form in forms)


def test_private_text_is_found_by_the_search_of_this_test():
    assert holds(b"so w41 w17 w53 w29 w61 so") and holds(json.dumps(MARKED_IDS).encode()) and not holds(b"w41 w17")


def test_nothing_of_a_log_is_in_messages_records_drafters_or_cards(target, texts, lines, tmp_path, capfd):
    lines[0]["request"] |= {"user": MARKER, "metadata": {"who": MARKER}}
    lines += [
        f'{{"request": "{MARKER} {WORDS}',
        chat_line(MARKER, *texts[0][1:], n=3, tools=[{"function": {"name": MARKER}}]),
        {"request": {"messages": MARKER, "temperature": 0}, "response": {"choices": [{"finish_reason": "stop"}]}},
        chat_line("\0" + MARKER, *texts[0][1:]),
        {"request": lines[0]["request"], "response": {"error": MARKER + WORDS}},
    ]
    model = tmp_path / "target"
    target.causal_lm.save_pretrained(model)
    target.tokenizer.save_pretrained(model)
    make_drafter("eagle3", target).save_pretrained(tmp_path / "drafter")
    log = write_log(tmp_path / "log.jsonl", lines)
    store = tmp_path / "store"
    words = ["import", "--log", log, "--target", model, "--output", store, "--json", tmp_path / "import.json"]
    length = ["--max-completion-length", LENGTH]
    bad = write_log(tmp_path / "bad.jsonl", lines[12:])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(list(map(str, [*words, *length]))) == 0
        # Refusals: nothing usable, another origin, and a text that the target did not write.
        assert main(list(map(str, ["--debug", *words, *length, "--log", bad]))) == 2
        assert main(list(map(str, ["--debug", *words, "--max-completion-length", 9]))) == 2
        for line in lines[:12]:
            line["response"]["choices"][0]["token_ids"][:5] = MARKED_IDS
        write_log(tmp_path / "foreign.jsonl", lines)
        assert main(list(map(str, [*words, *length, "--log", tmp_path / "foreign.jsonl"]))) == 2
        for path in tmp_path.glob("*.jsonl"):
            path.unlink()
        shown = [*words[3:5], "--drafter", tmp_path / "drafter", "--dataset", store, "--responses", store]
        small = "--max_steps 1 --use_cpu true --bf16 false --report_to none --disable_tqdm true --logging_steps 1"
        words = ["opd", *shown, *length, "--output-dir", tmp_path / "trained", *small.split()]
        assert main([str(word) for word in words]) == 0
        words = ["export", "--drafter", tmp_path / "trained", "--output", tmp_path / "export", "--target", model]
        assert main([str(word) for word in [*words, "--repo-id", "me/drafter"]]) == 0
    said = capfd.readouterr()
    assert "Next: trl-draft-opd opd" in said.out and "lines holds a response" in said.err
    assert not holds((said.out + said.err).encode())
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != store]
    assert any(path.name == "README.md" for path in files) and len(files) > 10
    assert [path.name for path in files if holds(path.read_bytes())] == []
