# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The command `read`: which texts and layers it reads, what it says before and after, and what it refuses."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from helpers.extraction_server import serving
from helpers.files import make_word_rows, save_target, write_rows
from helpers.tiny import make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import FrozenTarget, ResponseStore
from trl_draft_opd.cli import main
from trl_draft_opd.readings.store import ReadingStore
from trl_draft_opd.responses.audit import read_texts


TRAINING = "--max_steps 1 --warmup_steps 0 --use_cpu --report_to none --save_strategy no --disable_tqdm true".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, rows, and the target's responses to them."""
    place = tmp_path_factory.mktemp("place")
    save_target(place / "target")
    write_rows(place / "rows.jsonl", make_word_rows())
    make_drafter("eagle3", make_target()).save_pretrained(place / "drafter")
    words = ["generate", *common(place), "--output", str(place / "responses"), "--max-completion-length", "10"]
    assert main(words) == 0
    return place


def common(place: Path) -> list[str]:
    return ["--target", str(place / "target"), "--dataset", str(place / "rows.jsonl")]


def read(place: Path, output: Path, *words: str) -> int:
    return main(["read", *common(place), "--output", str(output), *words])


def error_of(place: Path, output: Path, capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    assert read(place, output, *words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def next_command(said: str) -> list[str]:
    return shlex.split(re.findall(r"Next: trl-draft-opd (.*)", said)[-1])


def test_it_says_what_it_takes_and_what_was_written_and_the_same_command_reads_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert read(place, tmp_path / "out") == 0
    said = capsys.readouterr().out
    store = ReadingStore.read_only(tmp_path / "out")
    assert store.layer_ids == (1, 2, 3, 4, 5) and store.manifest.dtype == "float32"
    assert f"To read: 6 texts, {store.num_tokens} tokens; to write: " in said and "768 bytes a token" in said
    assert "holds the readings of 6 texts" in said
    assert read(place, tmp_path / "out", "--verify") == 0
    assert "Every byte is as it was written." in capsys.readouterr().out
    assert read(place, tmp_path / "out") == 0
    assert "To read: 0 texts" in capsys.readouterr().out and len(list((tmp_path / "out").glob("*.json"))) == 2


def test_the_texts_of_a_store_are_those_that_sft_reads(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    # The longest length included: EAGLE-3's own layers, in bfloat16.
    words = ["--drafter", str(place / "drafter"), "--dtype", "bfloat16", "--max-length", "9"]
    assert read(place, tmp_path / "out", *words) == 0
    store = ReadingStore.read_only(tmp_path / "out")
    assert store.layer_ids == (1, 3, 4) and store.num_tokens == 6 * 9
    command = next_command(capsys.readouterr().out)
    assert command[0] == "sft" and command[command.index("--max-length") + 1] == "9"
    assert main([*command, *TRAINING, "--output-dir", str(tmp_path / "trained")]) == 0
    assert "--use-cpu" in next_command(capsys.readouterr().out), "pasted, it would take a GPU that sft left alone"


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_a_text_that_is_cut_without_a_drafter_is_cut_alike_for_a_drafter_of_any_family(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, family: str
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "w8 w9", "completion": " ".join(["w10", "w11"] * 200)}) + "\n", "utf-8")
    words = ["--target", str(place / "target"), "--dataset", str(rows), "--output", str(tmp_path / "out")]
    assert main(["read", *words]) == 0
    following = next_command(capsys.readouterr().out)
    assert following[following.index("--max-length") + 1] == "240"
    following[following.index("--family") + 1] = family
    assert main([*following, *TRAINING, "--output-dir", str(tmp_path / "sft")]) == 0


def test_with_responses_the_texts_are_those_that_draft_opd_replays(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    responses = ResponseStore.read_only(place / "responses")
    words = ["--responses", str(place / "responses"), "--drafter", str(place / "drafter")]
    assert read(place, tmp_path / "out", *words) == 0
    store = ReadingStore.read_only(tmp_path / "out")
    assert len(store) == len(responses) == 6
    assert store.missing([prompt + response for prompt, response in responses.texts(max_rows=None)]) == []
    command = next_command(capsys.readouterr().out)
    assert command[0] == "opd"
    assert main([*command, *TRAINING, "--output-dir", str(tmp_path / "trained")]) == 0


def test_ids_columns_are_read_as_they_are(place: Path, tmp_path: Path):
    rows = [{"prompt_ids": [9, 10], "completion_ids": [11, 12, 2]}, {"prompt_ids": [8], "completion_ids": [7, 7]}]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(place, tmp_path / "out", "--dataset", str(tmp_path / "ids.jsonl")) == 0
    store = ReadingStore.read_only(tmp_path / "out")
    assert len(store) == 2 and [9, 10, 11, 12, 2] in store and [8, 7, 7] in store


def test_servers_read_what_the_target_in_this_process_reads(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shared = tmp_path / "states"
    shared.mkdir()
    target = FrozenTarget.load(str(place / "target"))
    layers = ["--target-layer-ids", "1", "4"]
    with serving(target, (1, 4), shared) as server:
        words = ["--engine", "vllm", "--base-url", server.url, "--shared-folder", str(shared), *layers]
        assert read(place, tmp_path / "served", *words) == 0
        assert read(place, tmp_path / "served", *words) == 0
        assert len(server.seen) < 6 + 20
    assert read(place, tmp_path / "here", *layers, "--batch-size", "1") == 0
    served, here = (ReadingStore.read_only(tmp_path / name) for name in ("served", "here"))
    assert served.manifest == here.manifest and len(served) == len(here) == 6
    for text in target.text_reader().read_texts(load_rows(place))["input_ids"]:
        for a, b in zip(served.fetch(text, [1, 4]), here.fetch(text, [1, 4]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    (listed,) = (tmp_path / "served").glob("shard-*.json")
    assert json.loads(listed.read_text())["provenance"]["engine"] == "vllm"


def load_rows(place: Path):
    from trl_draft_opd.cli.rows import load_rows

    return load_rows(str(place / "rows.jsonl"), None, "train")


def test_the_line_of_a_server_names_the_layers_the_folder_and_the_longest_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    capsys.readouterr()
    assert read(place, tmp_path / "out", "--print-server", "--shared-folder", "/states", "--engine", "vllm") == 0
    printed = capsys.readouterr()
    line = shlex.split(printed.out)
    assert line[:3] == ["vllm", "serve", str(place / "target")]
    # Six states of 32 numbers of 4 bytes, and of 8 texts of 16 tokens.
    assert "states take 768 bytes" in printed.err and "take up to 98,304 bytes of '/states'" in printed.err
    extraction = json.loads(line[line.index("--speculative-config") + 1])
    assert extraction["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4, 5, 6, 8]
    assert line[line.index("--max-model-len") + 1] == "17" and "/states" in " ".join(line)
    assert not (tmp_path / "out").exists()


def test_verify_finds_damage_and_counts_what_is_missing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert read(place, tmp_path / "out", "--num-prompts", "4") == 0
    capsys.readouterr()
    assert read(place, tmp_path / "out", "--verify") == 0
    assert "2 texts of these rows are missing" in capsys.readouterr().out
    (states,) = (tmp_path / "out").glob("*.safetensors")
    data = bytearray(states.read_bytes())
    data[-5] ^= 4
    states.write_bytes(data)
    assert read(place, tmp_path / "out", "--verify") == 1
    assert f"{states} is not usable" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--dtype", "float16"], "not stored in 'float16'.*65,504"),
        (["--max-bytes", "1000"], "`--max-bytes` is 1,000 bytes. Nothing was read"),
        (["--target-layer-ids", "1", "7"], r"must lie in 0..6 for a target of 8 layers"),
        (["--target-layer-ids", "1", "--drafter", "x"], "and not both"),
        (["--base-url", "http://localhost:1"], "describe servers, which `--engine vllm` asks"),
        (["--engine", "vllm"], "needs `--base-url`"),
        (["--batch-size", "0"], "`--batch-size`"),
        (["--verify"], "no store of readings"),
        (["--max-length", "300"], "exceed the target's 256 positions"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_and_leaves_no_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], said: str
):
    assert re.search(said, error_of(place, tmp_path / "out", capsys, *words))
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_a_response_is_refused_with_the_command_that_writes_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copy(place / "rows.jsonl", tmp_path / "more.jsonl")
    with (tmp_path / "more.jsonl").open("a") as file:
        file.write('{"prompt": "w30 w31", "completion": "w32"}\n')
    words = ["--responses", str(place / "responses"), "--dataset", str(tmp_path / "more.jsonl")]
    said = error_of(place, tmp_path / "out", capsys, *words)
    assert "lacks 1 of the 7 prompts" in said and "generate" in said
    words = ["--responses", str(place / "responses"), "--chat-template-kwargs", '{"x": 1}']
    assert "chat_template_kwargs" in error_of(place, tmp_path / "out", capsys, *words)


def test_the_readings_of_a_target_are_refused_by_another(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert read(place, tmp_path / "out") == 0
    make_causal_lm(seed=5).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    said = error_of(place, tmp_path / "out", capsys, "--target", str(tmp_path / "other"))
    assert "weights_fingerprint" in said


def test_a_bodiless_target_reads_from_what_was_written(place: Path, tmp_path: Path):
    assert read(place, tmp_path / "out", "--batch-size", "2") == 0
    target = FrozenTarget.load(str(place / "target"), body=False)
    store = ReadingStore.open_for(target, tmp_path / "out", [1, 3, 4])
    whole = FrozenTarget.load(str(place / "target"))
    texts = list(whole.text_reader().read_texts(load_rows(place))["input_ids"])
    expected = read_texts(whole, texts[:2], [1, 3, 4])
    found = [store.fetch(text, [1, 3, 4]) for text in texts[:2]]
    assert torch.equal(torch.cat([states.features for states in found]), expected.features)
    assert torch.equal(torch.cat([states.last_hidden for states in found]), expected.last_hidden)
