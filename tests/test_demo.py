# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The demo: its corpus, its tokenizer, its target, and a miniature run of every phase with both families."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_draft_opd import AutoDrafter
from trl_draft_opd.demo.corpus import KINDS, write_chats
from trl_draft_opd.demo.run import DemoSettings, run_demo
from trl_draft_opd.demo.tiny_target import TinyTargetSettings, train_target, train_tokenizer


MINIATURE = {
    "num_prompts": 16,
    "num_test_prompts": 4,
    "max_completion_length": 16,
    "num_drafts": 3,
    "sft_epochs": 2,
    "opd_epochs": 2,
    "batch_size": 8,
    "tiny": TinyTargetSettings(num_chats=56, vocab_size=300, hidden_size=32, num_steps=6, batch_size=4),
}


# The command, with the sizes of `MINIATURE` for its own.
COMMAND = """
import sys
from dataclasses import replace
from test_demo import MINIATURE
from trl_draft_opd.cli import demo, main

run = demo.run_phases
demo.run_phases = lambda settings, rows: run(replace(settings, **MINIATURE), rows)
sys.exit(main(["demo", "--output", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    """One miniature run of the command in a process of its own, whose last argument is its folder."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", COMMAND, str(tmp_path_factory.mktemp("demo") / "run")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent)))}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(ran: subprocess.CompletedProcess) -> tuple[DemoSettings, dict]:
    """Settings and results of that run."""
    assert ran.returncode == 0, ran.stderr
    settings = DemoSettings(output=Path(ran.args[-1]), **MINIATURE)
    return settings, json.loads((settings.output / "results.json").read_text("utf-8"))


def _ages(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---- corpus ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_chats():
    assert write_chats(50, 3) == write_chats(50, 3) == write_chats(80, 3)[:50]
    assert write_chats(50, 3) != write_chats(50, 4)


def test_no_question_is_asked_twice_and_many_answers_differ():
    chats = write_chats(3000, 0)
    assert len({chat[0]["content"] for chat in chats}) == 3000
    assert len({chat[1]["content"] for chat in chats}) > 2700
    assert [[message["role"] for message in chat] for chat in chats[:7]] == [["user", "assistant"]] * 7


def test_every_kind_of_question_is_in_the_corpus():
    chats = write_chats(len(KINDS) * 10, 0)
    marks = (
        r" = \d+, and the answer",
        "has now|have now",
        "each of the .* multiply",
        r"\|---\|",
        "in order|Sort",
        "```python",
        "backwards",
    )
    found = Counter(
        next(i for i, mark in enumerate(marks) if re.search(mark, f"{q['content']} {a['content']}", re.S))
        for q, a in chats
    )
    assert len(found) == len(KINDS) == len(marks)
    assert min(found.values()) >= 8


def test_more_chats_than_one_kind_has_questions_can_be_written():
    assert len(write_chats(13_000, 0)) == 13_000


def test_the_worked_answers_are_right():
    for question, answer in write_chats(1400, 1):
        if re.search("plus|Add|\\+", question["content"]):
            a, b = map(int, re.findall(r"\d+", question["content"]))
            assert answer["content"].endswith(f"the answer is {a + b}.")
        if "boxes" in question["content"]:
            start, boxes, size = map(int, re.findall(r"\d+", question["content"]))
            assert f"= {start + boxes * size} " in answer["content"]
        if "backwards" in question["content"]:
            word = re.search('"(.*)"', question["content"]).group(1)
            assert " ".join(reversed(word)) in answer["content"]


def test_the_code_of_the_answers_runs_and_does_what_it_says():
    codes = [a["content"] for _, a in write_chats(700, 2) if "```python" in a["content"]]
    assert len(codes) >= 90
    for text in codes:
        scope: dict = {}
        exec(compile(text.split("```")[1].removeprefix("python\n"), "answer", "exec"), scope)
        number = int(re.search(r"(\d+)", text.split("```")[2]).group(1))
        function = next(value for name, value in scope.items() if callable(value))
        items = [1, 10, 30]
        expected = {
            "adds": [item + number for item in items],
            "multiplies": [item * number for item in items],
            "keeps": [item for item in items if item > number],
            "counts": sum(item < number for item in items),
        }[text.split("```")[2].split("` ")[1].split(" ")[0]]
        assert function(items) == expected


# ---- target ---------------------------------------------------------------------------------------------------------


def test_the_tokenizer_gives_back_every_text():
    chats = write_chats(140, 0)
    tokenizer = train_tokenizer(chats, 400)
    assert len(tokenizer) == 400
    for text in (chats[3][1]["content"], chats[5][1]["content"], "  naïve — 東京 🙂\n\t12345"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("12345")["input_ids"]) == 5


def test_the_template_ends_turns_with_eos_and_keeps_the_mask_free():
    chats = write_chats(70, 0)
    tokenizer = train_tokenizer(chats, 400)
    ids = tokenizer.apply_chat_template(chats[0], tokenize=True, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.mask_token == "<|mask|>"
    assert not {tokenizer.mask_token_id, tokenizer.pad_token_id} & set(ids)
    prompt = tokenizer.apply_chat_template(chats[0][:1], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ids[: len(prompt["input_ids"])] == prompt["input_ids"]


def test_a_trained_target_is_an_ordinary_checkpoint_that_has_learnt(tmp_path: Path):
    settings = TinyTargetSettings(vocab_size=300, hidden_size=32, batch_size=8, learning_rate=1e-2)
    chats = write_chats(56, 0)
    early = train_target(chats, tmp_path, replace(settings, num_steps=2), seed=0)
    late = train_target(chats, tmp_path, replace(settings, num_steps=40), seed=0)
    assert late < early - 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (model.config.model_type, model.config.num_hidden_layers) == ("qwen3", 8)
    assert tokenizer.chat_template is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


# ---- run ------------------------------------------------------------------------------------------------------------


def test_the_demo_prints_no_warning(ran: subprocess.CompletedProcess):
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "gain in tau" in ran.stdout and not re.search("(?i)warning|note:", ran.stdout)


def test_a_run_leaves_drafters_plot_and_numbers(finished: tuple[DemoSettings, dict]):
    settings, results = finished
    assert (settings.output / "demo.png").read_bytes().startswith(b"\x89PNG")
    for name in ("drafter-sft", "drafter-opd"):
        assert AutoDrafter.from_pretrained(settings.output / name).config.block_size == 4
    for report in (results["sft"], results["opd"]):
        assert report["num_prompts"] == 4
        # float32, so every output is the target's own to the last token.
        assert report["num_different"] == 0
        assert report["tau_low"] <= report["tau"] <= report["tau_high"]
    assert results["gain"]["tau"] == pytest.approx(results["opd"]["tau"] / results["sft"]["tau"] - 1)


def test_draft_opd_trains_the_drafter_of_sft(finished: tuple[DemoSettings, dict]):
    before, after = (
        AutoDrafter.from_pretrained(finished[0].output / name).state_dict() for name in ("drafter-sft", "drafter-opd")
    )
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_is_written_outside_the_output_folder(finished: tuple[DemoSettings, dict]):
    assert sorted(path.name for path in finished[0].output.parent.iterdir()) == ["run"]
    names = {path.name for path in finished[0].output.iterdir()}
    assert names == {"target", "responses", "drafter-sft", "drafter-opd", "results.json", "demo.png"}


def test_test_prompts_are_not_among_the_training_prompts(finished: tuple[DemoSettings, dict]):
    rows = json.loads((finished[0].output / "responses" / "rows.json").read_text("utf-8"))
    assert len(rows["train"]) == 16
    assert len(rows["test"]) == 4
    assert not [prompt for prompt in rows["test"] if prompt in [row["prompt_ids"] for row in rows["train"]]]


def test_a_second_run_reuses_finished_phases_and_changed_ones_run_again(
    finished: tuple[DemoSettings, dict], capsys: pytest.CaptureFixture
):
    settings, results = finished
    first = _ages(settings.output)
    again = run_demo(settings, None)
    assert again["opd"]["accepted_sums"] == results["opd"]["accepted_sums"]
    assert json.loads((settings.output / "results.json").read_text("utf-8")) == json.loads(json.dumps(again))
    kept = {name for name, age in _ages(settings.output).items() if age == first.get(name)}
    assert set(first) - kept == {"results.json", "demo.png"}
    # Another family needs another drafter, but neither another target nor other responses. An interrupted phase is
    # repeated.
    (settings.output / "drafter-sft" / "settings.json").rename(settings.output / "drafter-sft" / "unfinished")
    capsys.readouterr()
    results = run_demo(replace(settings, family="eagle3"), None)
    printed = capsys.readouterr().out
    assert printed.count("already in") == 2
    for word in ("tau", "gain in tau", "kept per slot", "equal outputs", "speed"):
        assert word in printed
    assert AutoDrafter.from_pretrained(settings.output / "drafter-opd").config.family == "eagle3"
    assert results["opd"]["num_different"] == 0


def test_a_real_target_takes_the_prompts_it_is_given(finished: tuple[DemoSettings, dict], tmp_path: Path):
    rows = Dataset.from_list([{"prompt": f"What is {i} + 5?"} for i in range(9)])
    target = str(finished[0].output / "target")
    settings = replace(finished[0], output=tmp_path, target=target, dataset="sums", sft_epochs=1, opd_epochs=1)
    results = run_demo(settings, rows)
    assert not (tmp_path / "target").exists()
    assert len(json.loads((tmp_path / "responses" / "rows.json").read_text("utf-8"))["train"]) == 5
    assert results["settings"]["target"] == target


def test_wrong_settings_are_refused_with_their_value(finished: tuple[DemoSettings, dict], tmp_path: Path):
    with pytest.raises(ValueError, match="got 'medusa'"):
        DemoSettings(family="medusa")
    with pytest.raises(ValueError, match="`opd_epochs` must be at least 1, got 0"):
        DemoSettings(opd_epochs=0)
    target = str(finished[0].output / "target")
    with pytest.raises(ValueError, match="go together"):
        run_demo(DemoSettings(output=tmp_path, target=target), None)
    with pytest.raises(ValueError, match="has 3 rows, of which 4 are kept"):
        run_demo(replace(finished[0], output=tmp_path, target=target), Dataset.from_list([{"prompt": "a"}] * 3))


def test_a_missing_matplotlib_is_said_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="`pip install matplotlib`"):
        run_demo(DemoSettings(output=tmp_path / "out", **MINIATURE), None)
    assert not (tmp_path / "out").exists()
