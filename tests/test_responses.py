# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Responses from dataset to store: whose they are, how transformers writes them, what is imported, how they are checked.
"""

import copy
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3ForCausalLM

from helpers.files import make_word_rows, save_target, write_rows
from helpers.tiny import EOS, TARGETS, VOCAB, make_causal_lm, make_prompts, make_target, make_tokenizer
from trl_draft_opd import (
    FrozenTarget,
    Origin,
    ResponseStore,
    SamplingSettings,
    ServerSettings,
)
from trl_draft_opd.cli import main
from trl_draft_opd.responses import (
    audit_responses,
    check_responses,
    generate_missing,
    generate_responses,
    import_responses,
    summarize_store,
    write_responses,
)
from trl_draft_opd.responses.audit import score_responses
from trl_draft_opd.responses.origin import hash_config, hash_tokenizer
from trl_draft_opd.rollout.acceptance import token_probs
from trl_draft_opd.target.fingerprint import fingerprint_weights


GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
SAMPLED = SamplingSettings(temperature=0.8, top_k=8, top_p=0.95)


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_word_rows())


def _error(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run a command that a user got wrong and return what it says."""
    capsys.readouterr()
    assert main(argv) == 2
    return capsys.readouterr().err


def _origin(target: FrozenTarget, sampling: SamplingSettings = GREEDY, **changes) -> Origin:
    settings = {name: changes.pop(name) for name in ("chat_template", "chat_template_kwargs") if name in changes}
    reader = target.text_reader(**settings) if settings else None
    return Origin.of(target, reader, sampling=sampling, **{"max_completion_length": 12} | changes)


def _generate(store: ResponseStore, target: FrozenTarget, prompts: list, **changes) -> int:
    settings = {"batch_size": 2, "seed": 0, "shard_size": 2, "show_progress": False} | changes
    return generate_missing(store, target, prompts, **settings)


# ---- whose responses they are ---------------------------------------------------------------------------------------


def test_an_origin_survives_its_way_through_a_file(tmp_path: Path):
    origin = _origin(make_target(), SAMPLED, chat_template_kwargs={"a": [1, {"b": None}]})
    ResponseStore.open(tmp_path, origin)
    again = ResponseStore.read_only(tmp_path).origin
    assert again == origin
    assert again.digest == origin.digest
    assert again.sampling == SAMPLED
    origin.check_same(again)


def test_every_field_but_the_names_of_the_target_tells_origins_apart():
    origin = _origin(make_target())
    for field in fields(Origin):
        other = replace(origin, **{field.name: "other" if field.name != "eos_token_ids" else (9,)})
        is_name = field.name in ("target", "revision")
        assert (other.digest == origin.digest) == is_name, field.name


def test_a_saved_and_reloaded_target_is_the_same_in_every_precision(tmp_path: Path):
    target = make_target()
    target.causal_lm.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    origin = _origin(target)
    for dtype in ("float32", "bfloat16"):
        reloaded = FrozenTarget.load(tmp_path, dtype=dtype)
        origin.check_same(_origin(reloaded))
        assert _origin(reloaded).target == str(tmp_path)


def test_another_seed_gives_other_weights_of_the_same_architecture():
    first, second = make_target(seed=0), make_target(seed=1)
    assert hash_config(first.config) == hash_config(second.config)
    with pytest.raises(ValueError, match="weights_fingerprint: .* there, .* here") as refusal:
        _origin(first).check_same(_origin(second))
    assert "config_hash" not in str(refusal.value)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_change_of_any_parameter_changes_the_fingerprint(kind: str):
    model = make_causal_lm(kind)
    before = fingerprint_weights(model)
    assert fingerprint_weights(model) == before
    for parameter in model.parameters():
        kept = parameter.data.clone()
        parameter.data.mul_(1.05).add_(0.05)
        assert fingerprint_weights(model) != before
        parameter.data.copy_(kept)
    assert fingerprint_weights(model) == before


def test_a_tied_head_counts_once():
    tied, untied = make_causal_lm("qwen3"), make_causal_lm("qwen3")
    config = copy.deepcopy(tied.config)
    config.tie_word_embeddings = False
    untied = Qwen3ForCausalLM(config)
    untied.load_state_dict(tied.state_dict())
    assert fingerprint_weights(untied) != fingerprint_weights(tied)


def test_fields_of_a_config_that_do_not_shape_text_are_not_hashed():
    config = make_causal_lm().config
    before = hash_config(config)
    config.transformers_version, config.architectures, config.dtype = "9.9", ["X"], "bfloat16"
    config.use_cache, config.pad_token_id = False, 9
    # As a newer library adds to an older checkpoint.
    config.a_new_switch, config.a_new_option = False, None
    assert hash_config(config) == before
    config.rms_norm_eps = 1e-5
    assert hash_config(config) != before


def test_padding_and_truncation_do_not_change_a_tokenizer_and_words_do():
    tokenizer = make_tokenizer()
    before = hash_tokenizer(tokenizer)
    tokenizer(["w8 w9", "w8"], padding=True, truncation=True, max_length=4)
    tokenizer.pad_token = tokenizer.eos_token
    assert hash_tokenizer(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert hash_tokenizer(tokenizer) != before


def test_a_reloaded_tokenizer_has_the_same_hash(tmp_path: Path):
    make_tokenizer().save_pretrained(tmp_path)
    assert hash_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == hash_tokenizer(make_tokenizer())


def test_another_template_or_its_arguments_make_another_origin():
    target = make_target()
    origin = _origin(target)
    with pytest.raises(ValueError, match="chat_template_hash: .* there, .* here"):
        origin.check_same(_origin(target, chat_template="{{ messages }}"))
    with pytest.raises(ValueError, match="chat_template_kwargs: {'x': 1} there, {} here"):
        origin.check_same(_origin(target, chat_template_kwargs={"x": 1}))
    assert _origin(target, chat_template=target.tokenizer.chat_template).digest == origin.digest


def test_another_length_of_responses_is_refused_with_the_settings_to_change():
    target = make_target()
    with pytest.raises(ValueError, match="here `max_completion_length=9`"):
        _origin(target).check_same(_origin(target, max_completion_length=9))


def test_filters_of_a_greedy_distribution_are_not_part_of_it():
    target = make_target()
    filtered = SamplingSettings(temperature=0.0, top_k=5, top_p=0.5)
    assert _origin(target, filtered) == _origin(target)


def test_the_longest_response_must_be_positive():
    with pytest.raises(ValueError, match="`max_completion_length` must be at least 1, got 0"):
        _origin(make_target(), max_completion_length=0)


# ---- transformers as the engine -------------------------------------------------------------------------------------


def test_stored_responses_are_those_of_plain_decoding(tmp_path: Path):
    target, prompts = make_target(), make_prompts(7)
    store = ResponseStore.open(tmp_path, _origin(target))
    assert _generate(store, target, prompts) == len(store) == 7
    plain = generate_responses(
        target, prompts, max_completion_length=12, sampling=GREEDY, batch_size=3, seed=0, show_progress=False
    )
    assert [store.find(prompt) for prompt in prompts] == plain
    assert audit_responses(target, store.texts(max_rows=None), GREEDY).share == 0.0
    # Complete iff they end with an end of sequence.
    for prompt, response in zip(prompts, plain, strict=True):
        assert store.read(prompt).finish_reason == ("stop" if response[-1] == EOS else "length")


def test_a_run_that_dies_is_resumed_without_writing_anything_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, prompts = make_target(), make_prompts(8)
    store = ResponseStore.open(tmp_path / "a", _origin(target, SAMPLED))
    real, calls = target.causal_lm.generate, []

    def dying(**inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return real(**inputs)

    monkeypatch.setattr(target.causal_lm, "generate", dying)
    with pytest.raises(RuntimeError, match="out of memory"):
        _generate(store, target, prompts, shard_size=3)
    resumed = ResponseStore.open(tmp_path / "a", _origin(target, SAMPLED))
    assert len(resumed) == 4
    assert _generate(resumed, target, prompts, shard_size=3) == 4
    assert calls == [2, 2, 2, 2, 2]
    assert _generate(resumed, target, prompts) == 0
    # And draws as a run that was not interrupted.
    monkeypatch.undo()
    whole = ResponseStore.open(tmp_path / "b", _origin(target, SAMPLED))
    _generate(whole, target, prompts)
    assert [resumed.find(prompt) for prompt in prompts] == [whole.find(prompt) for prompt in prompts]


def test_drawn_responses_depend_on_no_batch(tmp_path: Path):
    target, prompts = make_target(), make_prompts(6)
    found = []
    for number, (batch_size, order) in enumerate([(6, 1), (1, 1), (4, -1)]):
        store = ResponseStore.open(tmp_path / str(number), _origin(target, SAMPLED))
        _generate(store, target, prompts[::order], batch_size=batch_size)
        found.append([store.find(prompt) for prompt in prompts])
    assert found[0] == found[1] == found[2]
    assert len({tuple(response) for response in found[0]}) == 6


def test_plain_draws_have_the_targets_distribution():
    target, prompt, count = make_target(), [9, 10], 4000
    options = {"max_completion_length": 1, "sampling": SAMPLED, "batch_size": 1000, "show_progress": False}
    drawn = torch.tensor(generate_responses(target, [prompt] * count, seed=3, **options))[:, 0]
    with torch.no_grad():
        distribution = token_probs(target.causal_lm(torch.tensor([prompt])).logits[0, -1], SAMPLED)
    observed, expected = torch.bincount(drawn, minlength=VOCAB), distribution * count
    assert observed[distribution == 0].sum() == 0
    # Five standard deviations per token.
    assert ((observed - expected).abs() <= 5 * (expected * (1 - distribution)).sqrt() + 1e-9).all()


def test_log_probabilities_of_drawn_tokens_are_those_of_the_distribution(tmp_path: Path):
    target, prompts = make_target(), make_prompts(4)
    store = ResponseStore.open(tmp_path, _origin(target, SAMPLED))
    _generate(store, target, prompts, seed=5)
    for prompt in prompts:
        row = store.read(prompt)
        text = torch.tensor([[*prompt, *row.completion_ids]])
        with torch.no_grad():
            probs = token_probs(target.causal_lm(text).logits[0, len(prompt) - 1 : -1], SAMPLED)
        expected = probs.gather(1, text[0, len(prompt) :, None])[:, 0].log()
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_a_different_seed_draws_other_responses(tmp_path: Path):
    target, prompts = make_target(), make_prompts(4)
    found = []
    for seed in (0, 0, 1):
        store = ResponseStore.open(tmp_path / str(len(found)), _origin(target, SAMPLED))
        _generate(store, target, prompts, seed=seed)
        found.append([store.find(prompt) for prompt in prompts])
    assert found[0] == found[1] != found[2]


# ---- responses that are there already -------------------------------------------------------------------------------


def test_responses_of_every_form_are_imported_as_ids(tmp_path: Path):
    target = make_target()
    chat = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w10"}]
    forms = {
        "ids": Dataset.from_dict({"prompt_ids": [[7, 8]], "completion_ids": [[9, EOS]]}),
        "text": Dataset.from_dict({"prompt": ["w7 w8"], "completion": [" w9"]}),
        "chat": Dataset.from_dict({"messages": [chat]}),
    }
    for name, dataset in forms.items():
        store = ResponseStore.open(tmp_path / name, _origin(target))
        assert import_responses(store, dataset, target.text_reader(), shard_size=2) == 1
        prompt = [1, 4, 9, EOS, 1, 5] if name == "chat" else [7, 8]
        assert store.find(prompt) == ([10, EOS] if name == "chat" else [9, EOS])


def test_imported_responses_end_where_the_target_would_have_been_cut(tmp_path: Path):
    store = ResponseStore.open(tmp_path, _origin(make_target()))
    rows = Dataset.from_dict({"prompt_ids": [[7], [8]], "completion_ids": [[9] * 20, [9, EOS]]})
    with pytest.warns(UserWarning, match="1 of 2 responses are longer than `max_completion_length` 12"):
        import_responses(store, rows, make_target().text_reader(), shard_size=2)
    assert store.find([7]) == [9] * 12
    assert store.read([7]).finish_reason == "length"


def test_an_imported_response_that_goes_on_behind_its_end_is_refused(tmp_path: Path):
    store = ResponseStore.open(tmp_path, _origin(make_target()))
    rows = Dataset.from_dict({"prompt_ids": [[7]], "completion_ids": [[9, EOS, 9]]})
    with pytest.raises(ValueError, match="row 0 continues after an end-of-sequence id"):
        import_responses(store, rows, make_target().text_reader(), shard_size=2)


# ---- whether the target could have written them ---------------------------------------------------------------------


def _texts(target: FrozenTarget, sampling: SamplingSettings, count: int = 6) -> list[tuple[list[int], list[int]]]:
    prompts = make_prompts(count)
    responses = generate_responses(
        target, prompts, max_completion_length=12, sampling=sampling, batch_size=6, seed=1, show_progress=False
    )
    return list(zip(prompts, responses, strict=True))


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_scores_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int):
    monkeypatch.setattr("trl_draft_opd.responses.audit._CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("trl_draft_opd.responses.audit._TOKENS_PER_BATCH", 40)
    target = make_target("gemma2")
    texts = [(prompt, [9, 10, 11][: 1 + row % 3]) for row, prompt in enumerate(make_prompts(6))]
    scored = dict(score_responses(target, texts, SAMPLED))
    assert sorted(scored) == list(range(6))
    for row, (prompt, response) in enumerate(texts):
        with torch.no_grad():
            logits = target.causal_lm(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        probs = token_probs(logits, SAMPLED)
        tokens = torch.tensor(response)[:, None]
        expected = probs.gather(1, tokens)[:, 0].log()
        torch.testing.assert_close(scored[row].logprobs, expected, rtol=1e-4, atol=1e-4)
        assert scored[row].is_choice.tolist() == (logits.argmax(-1) == tokens[:, 0]).tolist()
        surprises = -probs.log().nan_to_num(neginf=0)
        mean = (probs * surprises).sum(-1)
        torch.testing.assert_close(scored[row].entropies, mean, rtol=1e-4, atol=1e-4)
        variance = (probs * (surprises - mean[:, None]) ** 2).sum(-1)
        torch.testing.assert_close(scored[row].variances, variance, rtol=1e-3, atol=1e-3)


def test_mismatches_are_counted_token_by_token():
    target = make_target()
    (prompt, response), *_ = _texts(target, GREEDY)
    assert audit_responses(target, [(prompt, response)], GREEDY).share == 0.0
    # The last token alone, so that no later state changes.
    broken = [*response[:-1], (response[-1] + 1) % VOCAB]
    audit = audit_responses(target, [(prompt, broken)], GREEDY)
    assert (audit.num_mismatches, audit.num_tokens) == (1, len(response))
    assert audit.share == 1 / len(response)


def test_a_tie_is_no_mismatch():
    target = make_target("llama")
    target.causal_lm.lm_head.weight.data.zero_()
    assert audit_responses(target, [([7], [8, 9, 10])], GREEDY).share == 0.0


def test_greedy_text_of_another_target_is_refused_and_a_little_of_it_warned_of():
    target, other = make_target(seed=0), make_target(seed=1)
    own, foreign = _texts(target, GREEDY), _texts(other, GREEDY)
    limits = {"warn_above": 0.02, "refuse_above": 0.5}
    assert check_responses(target, own, GREEDY, **limits).num_mismatches == 0
    with pytest.raises(ValueError, match="did not write these responses: .*not the target's argmax.*Refused above 50"):
        check_responses(target, foreign, GREEDY, **limits)
    # One token in twelve: the last, so that no later state changes.
    nearly = [(prompt, [*response[:-1], (response[-1] + 1) % VOCAB]) for prompt, response in own]
    with pytest.warns(UserWarning, match="fit the target at hand only roughly"):
        check_responses(target, nearly, GREEDY, **limits)


def test_a_token_the_filters_exclude_makes_its_response_impossible():
    target = make_target()
    texts = _texts(target, SAMPLED)
    assert audit_responses(target, texts, SAMPLED).num_impossible == 0
    prompt, response = texts[0]
    with torch.no_grad():
        least = target.causal_lm(torch.tensor([prompt])).logits[0, -1].argmin().item()
    audit = audit_responses(target, [*texts[1:], (prompt, [least, *response[1:]])], SAMPLED)
    assert audit.num_impossible == 1
    assert audit.share == 1 / 6
    with pytest.raises(ValueError, match="1 of 6 responses .* hold a token of probability 0"):
        check_responses(target, [*texts[1:], (prompt, [least])], SAMPLED, warn_above=0.0, refuse_above=0.1)


def test_sampled_text_is_as_likely_as_expected_and_text_of_another_target_is_not():
    """Without filters nothing is impossible; the mean log-probability still tells whose text it is."""
    distribution = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0)
    target, other = make_target(seed=0), make_target(seed=1)
    limits = {"warn_above": 0.0, "refuse_above": 0.0}
    own = check_responses(target, _texts(target, distribution, 40), distribution, **limits)
    assert abs(own.surprise) < 4 * own.surprise_error
    with pytest.raises(ValueError, match=r"mean log-probability -\d"):
        check_responses(target, _texts(other, distribution, 40), distribution, **limits)


def test_texts_without_a_response_cannot_be_checked():
    target = make_target()
    with pytest.raises(ValueError, match="There is no response to check"):
        audit_responses(target, [], GREEDY)
    with pytest.raises(ValueError, match=r"Texts \[1\] have an empty"):
        audit_responses(target, [([7], [8]), ([7], [])], GREEDY)


# ---- one call, and one command --------------------------------------------------------------------------------------


def test_one_call_reads_prompts_writes_responses_and_goes_on(tmp_path: Path):
    target = make_target()
    rows = Dataset.from_dict({"prompt": ["w7 w8", "w9", "w7 w8"]})
    common = {"sampling": GREEDY, "max_completion_length": 5, "show_progress": False}
    store = write_responses(target, rows.select([0]), tmp_path, **common)
    assert len(store) == 1
    store = write_responses(target, rows, tmp_path, **common)
    assert len(store) == 2
    summary = summarize_store(store, target, 2)
    assert (summary["num_responses"], summary["check"]["num_mismatches"]) == (2, 0)
    assert json.loads(json.dumps(summary)) == summary


def test_rows_that_cannot_be_read_leave_no_folder_behind(tmp_path: Path):
    rows, store = Dataset.from_dict({"wrong": ["w7"]}), tmp_path / "store"
    with pytest.raises(ValueError, match="has columns"):
        write_responses(make_target(), rows, store, sampling=GREEDY, max_completion_length=5)
    assert not store.exists()


def test_engines_and_servers_that_do_not_go_together_are_refused(tmp_path: Path):
    target, rows = make_target(), Dataset.from_dict({"prompt": ["w7"]})
    common = {"sampling": GREEDY, "max_completion_length": 5, "show_progress": False}
    server = ServerSettings(base_url="http://127.0.0.1:1", engine="sglang")
    for settings in ({"engine": "vllm"}, {"server": server}, {"engine": "vllm", "server": server}):
        with pytest.raises(ValueError, match="do not go together"):
            write_responses(target, rows, tmp_path, **common, **settings)
    with pytest.raises(ValueError, match="`engine` must be one of"):
        write_responses(target, rows, tmp_path, **common, engine="tgi")
    with pytest.raises(ValueError, match="No tokenizer"):
        write_responses(FrozenTarget(make_causal_lm()), rows, tmp_path, **common)


def test_the_command_writes_resumes_and_reports(target_folder: str, rows_file: str, tmp_path: Path, capsys):
    words = ["generate", "--target", target_folder, "--dataset", rows_file, "--output", str(tmp_path / "store")]
    words += ["--max-completion-length", "6", "--batch-size", "2"]
    assert main([*words, "--num-prompts", "2"]) == 0
    assert "holds 2 responses" in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert main([*words, "--check-rows", "3", "--json", str(report)]) == 0
    assert "Checked 3 with the target: 0 of" in capsys.readouterr().out
    assert json.loads(report.read_text("utf-8"))["num_responses"] == 6
    assert len(ResponseStore.read_only(tmp_path / "store")) == 6
    assert "temperature: 0.0 there, 0.5 here" in _error([*words, "--temperature", "0.5"], capsys)


def test_the_command_imports_and_checks_responses_that_are_there(
    target_folder: str, rows_file: str, tmp_path: Path, capsys
):
    words = ["generate", "--target", target_folder, "--dataset", rows_file, "--output", str(tmp_path / "store")]
    assert main([*words, "--engine", "dataset", "--max-completion-length", "20"]) == 0
    told = capsys.readouterr().out
    assert "holds 6 responses, 78 tokens in all; 6 end" in told
    assert "are not the target's argmax" in told


def test_flags_of_a_server_need_a_server(target_folder: str, rows_file: str, tmp_path: Path, capsys):
    words = ["generate", "--target", target_folder, "--dataset", rows_file, "--output", str(tmp_path / "store")]
    for wrong in (["--engine", "vllm"], ["--base-url", "http://a"], ["--concurrency", "2"]):
        assert "need `--base-url`, and other engines take no server flags" in _error([*words, *wrong], capsys)
    unreachable = ["--engine", "vllm", "--base-url", "file:///etc/passwd"]
    assert "must be an address" in _error([*words, *unreachable], capsys)
    assert not (tmp_path / "store").exists()
