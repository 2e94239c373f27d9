# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The command line: what it refuses and with which message, and each command once on a tiny pair, offline."""

import json
import re
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

from helpers.files import make_word_rows, save_target, write_rows
from helpers.flag_table import groups_of, parser_of
from helpers.tiny import EOS, VOCAB, make_causal_lm, make_target, make_tokenizer
from trl_draft_opd import AutoDrafter, DraftOPDConfig, ResponseStore, __version__, evaluate_drafter
from trl_draft_opd.cli import COMMANDS, flag_table, main
from trl_draft_opd.cli.arguments import parse, read_bytes
from trl_draft_opd.cli.decoding import EvaluateArguments
from trl_draft_opd.cli.flag_table import INHERITED
from trl_draft_opd.cli.rows import load_rows
from trl_draft_opd.cli.training import OPDArguments, make_drafter
from trl_draft_opd.export.record import read_record
from trl_draft_opd.parity.consumers import CONSUMERS
from trl_draft_opd.parity.report import VerificationReport


TRAINING = "--max_steps 1 --warmup_steps 0 --use_cpu --report_to none --save_strategy no --disable_tqdm true".split()


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_word_rows())


@pytest.fixture(scope="module")
def drafter_folder(target_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("drafter"))
    small = ["--num-hidden-layers", "1", "--block-size", "4", "--seed", "3"]
    assert main(["init", "--family", "dflash", "--target", target_folder, "--output", folder, *small]) == 0
    return folder


def _error(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run a command that a user got wrong and return the one line that it prints."""
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# ---- what needs no model --------------------------------------------------------------------------------------------


def test_help_and_version_load_no_heavy_library():
    code = (
        "import sys\nfrom trl_draft_opd.cli import main\n"
        "for argv in (['--help'], ['--version']):\n"
        "    try:\n        main(argv)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"trl-draft-opd {__version__}" in done.stdout
    for command in ("demo", "init", "sft", "opd", "evaluate"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_that_of_its_parser_and_loads_no_heavy_library(command):
    """The table in `flags.json` is derived: after a change of a command's flags, run `make flags`."""
    code = (
        f"import sys\nfrom trl_draft_opd.cli import flag_table\nprint(flag_table.find_help({command!r}), end='')\n"
        "assert not {'torch', 'transformers', 'datasets', 'trl', 'yaml', 'rich', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parser = parser_of(command)
    if INHERITED not in done.stdout or flag_table.read_table()["versions"] == flag_table.installed_versions():
        assert flag_table.read_table()["commands"][command] == groups_of(parser)
        assert done.stdout == parser.format_help()


def test_help_says_where_inherited_flags_are_of_another_version(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(flag_table, "installed_versions", lambda: {"transformers": "5.17.0", "trl": "1.0.0"})
    for command in ("sft", "opd"):
        assert "What is read are those of transformers 5.17.0 and trl 1.0.0." in flag_table.find_help(command)
    assert "What is read" not in flag_table.find_help("evaluate")


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("generate", "`base_url` must be an address", "`--base-url` must be an address"),
        ("opd", "continue with `resume_from_checkpoint=True`", "continue with `--resume-from-checkpoint true`"),
        ("sft", "Set `regenerate=True`, or `bf16=False`", "Set `--regenerate`, or `--bf16 false`"),
        ("sft", "Set `hub_target_id='ORG/NAME'`.", "Set `--hub-target-id ORG/NAME`."),
        ("sft", "with `resume_from_checkpoint=None` and", "with no `--resume-from-checkpoint` and"),
        ("sft", "with `regenerate=True` (`--regenerate`) alone", "with `--regenerate` alone"),
        ("push", "`model` and `base_url=1`, `generate`", "`model` and `base_url=1`, `generate`"),
    ],
)
def test_errors_of_a_command_name_its_flags_and_leave_other_words(command, text, said):
    assert flag_table.with_flags(text, command) == said


def test_a_size_is_a_number_or_has_a_unit():
    sizes = {"1500": 1500, "10GB": 10**10, "2GiB": 2**31, "1.5 mb": 1_500_000, "64k": 64_000, "7B": 7, "3_000": 3000}
    assert {text: read_bytes(text) for text in sizes} == sizes
    for wrong in ("", "ten", "10 apples", "-1", "GB"):
        with pytest.raises(ArgumentTypeError, match="write e.g. 1500000, 10GB or 2GiB"):
            read_bytes(wrong)


def test_a_size_with_a_unit_is_a_flag_and_a_key(tmp_path):
    (tmp_path / "run.yaml").write_text("reading_bytes: 2GiB\n", encoding="utf-8")
    words = ["--target", "t", "--dataset", "d", "--drafter", "d", "--output-dir", str(tmp_path / "out")]
    words += ["--loss-chunk-bytes", "64MB", "--config", str(tmp_path / "run.yaml")]
    _, config = parse("opd", [OPDArguments, DraftOPDConfig], words)
    assert (config.loss_chunk_bytes, config.reading_bytes) == (64 * 10**6, 2**31)


def test_the_package_runs_as_a_module():
    # Of a command that there is, the heavy libraries would be imported.
    done = subprocess.run([sys.executable, "-m", "trl_draft_opd", "evalute"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'evaluate'?" in done.stderr


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["train"], "demo, plan, generate"), (["evalute"], "Did you mean 'evaluate'?"), ([], "Measure a drafter;")],
)
def test_an_unknown_or_missing_command_is_answered_with_those_there_are(
    words: list[str], hint: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert hint in capsys.readouterr().err


def test_an_unknown_flag_is_named_with_the_nearest_one(capsys: pytest.CaptureFixture):
    needed = ["--target", "t", "--dataset", "d", "--drafter", "m"]
    error = _error(["opd", *needed, "--positon_decay", "0.5", "--use_cpu"], capsys)
    assert "--positon_decay (did you mean --position-decay?)" in error


@pytest.mark.parametrize("name", ["--draft-vocab-size", "--draft_vocab_size"])
def test_a_vocabulary_for_draft_opd_is_answered_with_the_commands_that_choose_one(
    name: str, capsys: pytest.CaptureFixture
):
    error = _error(["opd", "--target", "t", "--dataset", "d", "--drafter", "m", name, "500"], capsys)
    assert f"{name} (only `init` and `sft` choose a drafter's vocabulary" in error and "did you mean" not in error


def test_a_flag_is_not_guessed_from_its_beginning(capsys: pytest.CaptureFixture):
    needed = ["--target", "t", "--dataset", "d", "--drafter", "m"]
    assert "--position_dec " in _error(["opd", *needed, "--position_dec", "0.5", "--use_cpu"], capsys)


def test_a_pattern_that_the_shell_spread_out_is_told_to_be_quoted(capsys: pytest.CaptureFixture):
    needed = ["--target", "t", "--drafter", "m", "--dataset", "a.jsonl", "b.jsonl", "--use_cpu"]
    assert "b.jsonl" in (error := _error(["opd", *needed], capsys)) and "quote a pattern of files" in error


def test_an_unknown_key_of_the_config_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    config = tmp_path / "run.yaml"
    config.write_text("target: t\ndataset: d\ndrafter: m\nuse_cpu: true\nrejected_scop: first\nlearning_rate: 1e-4\n")
    for words in (["--config", str(config)], [f"--config={config}"]):
        error = _error(["opd", *words], capsys)
        assert "config file: --rejected_scop (did you mean --rejected-scope?)" in error
        assert "learning" not in error


def test_a_missing_config_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert "missing.yaml" in _error(["sft", "--config", str(tmp_path / "missing.yaml")], capsys)
    assert "needs the path" in _error(["sft", "--config"], capsys)


def test_debug_shows_the_traceback_of_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["--debug", "sft", "--config", str(tmp_path / "missing.yaml")]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "missing.yaml" in error


def test_a_traceback_never_ends_with_the_code_of_a_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def broken(argv):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("trl_draft_opd.cli.demo.run_demo", broken)
    assert main(["demo"]) == 3
    error = capsys.readouterr().err
    assert "Traceback" in error and "RuntimeError: a fault of the program" in error


def test_a_config_file_that_is_no_yaml_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    config = tmp_path / "run.yaml"
    config.write_text("target: [t\n")
    assert "is no YAML" in _error(["sft", "--config", str(config)], capsys)


def test_a_value_out_of_range_names_the_setting(capsys: pytest.CaptureFixture):
    needed = ["--target", "t", "--dataset", "d", "--use_cpu"]
    assert "`--position-decay` must be in (0, 1]" in _error(
        ["opd", *needed, "--drafter", "m", "--position_decay", "2"], capsys
    )


def test_rules_between_flags_are_checked_before_anything_is_loaded(capsys: pytest.CaptureFixture):
    needed = ["--target", "t", "--dataset", "d", "--use_cpu"]
    for wrong in (
        ["sft"],
        ["sft", "--family", "dflash", "--drafter", "m"],
        ["sft", "--drafter", "m", "--block_size", "4"],
    ):
        assert "either `--drafter`" in _error([wrong[0], *needed, *wrong[1:]], capsys)
    reduced = ["--family", "dflash2", "--draft_vocab_size", "9"]
    assert "which a DFlash 2 drafter cannot have" in _error(["sft", *needed, *reduced], capsys)
    assert "--family" in _error(["opd", *needed, "--drafter", "m", "--family", "dflash"], capsys)
    assert "go together" in _error(["demo", "--target", "t"], capsys)
    init = ["init", "--family", "eagle3", "--target", "t", "--output", "o"]
    for wrong in (
        ["--draft-vocab-size", "9"],
        ["--responses", "r"],
        ["--dataset", "d", "--responses", "r", "--draft-vocab-size", "9"],
    ):
        assert "goes together with one of `--responses`" in _error([*init, *wrong], capsys)
    wrong = ["init", *reduced, *init[3:], "--dataset", "d"]
    assert "which a DFlash 2 drafter cannot have" in _error(wrong, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_help_text_and_a_default_or_is_required(command: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    groups = capsys.readouterr().out.split("\n\n")
    flags = [text for group in groups for text in re.split(r"\n  (?=-)", group)[1:]]
    assert len(flags) > 4
    for text in flags:
        name, words = re.search(r"--[\w-]+", text).group(), " ".join(text.split())
        assert "_" not in name
        has_value = "(default: " in words or "(required)" in words
        assert has_value or name == "--help" or name.startswith("--no-"), text
        assert len(re.sub(r"\(default:.*|\(required.*|-\S+|\b[A-Z_]{2,}\b|\W", "", words)) > 8, text


def test_help_lists_the_command_own_flags_first_and_those_of_transformers_last(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    groups = re.findall(r"^(\w.*):$", capsys.readouterr().out, flags=re.M)
    assert groups == [
        "options",
        "drafter",
        "target and data",
        "LoRA",
        "fresh drafter",
        "settings of DraftSFTConfig",
        "settings of TrainingArguments",
    ]


def test_a_flag_is_accepted_with_hyphens_and_with_underscores():
    words = ["--target", "t", "--drafter", "d", "--dataset", "r"]
    hyphens, underscores = (
        parse("evaluate", [EvaluateArguments], [*words, name, "7"])
        for name in ("--max-completion-length", "--max_completion_length")
    )
    assert hyphens == underscores
    assert hyphens[0].max_completion_length == 7


# ---- data -----------------------------------------------------------------------------------------------------------


def test_rows_come_from_files_and_saved_folders_alike(tmp_path: Path, rows_file: str):
    expected = load_rows(rows_file, None, "train")
    assert expected.num_rows == 6
    assert load_rows(rows_file, None, "train[:2]").num_rows == 2
    expected.to_parquet(tmp_path / "rows.parquet")
    expected.to_csv(tmp_path / "rows.csv")
    expected.save_to_disk(tmp_path / "one")
    DatasetDict({"train": expected, "dev": expected.select([1])}).save_to_disk(tmp_path / "two")
    for name in ("rows.parquet", "rows.csv", "one", "two"):
        assert load_rows(str(tmp_path / name), None, "train").to_list() == expected.to_list(), name
    assert load_rows(str(tmp_path / "two"), None, "dev").to_list() == expected.to_list()[1:2]
    with pytest.raises(ValueError, match="holds the splits .'dev', 'train'., not 'test'"):
        load_rows(str(tmp_path / "two"), None, "test")
    with pytest.raises(FileNotFoundError, match="no dataset file"):
        load_rows(str(tmp_path / "none.json"), None, "train")


# ---- commands -------------------------------------------------------------------------------------------------------


def test_unset_options_of_a_fresh_drafter_are_the_library_own():
    config = make_drafter(make_target(), "eagle3", {}).config
    assert (config.ttt_steps, config.draft_vocab_size, config.target_layer_ids) == (7, 64, [1, 3, 4])
    config = make_drafter(make_target(), "dflash", {}).config
    assert (config.num_hidden_layers, config.block_size, config.mask_token_id) == (5, 16, 3)


def test_an_option_of_the_other_family_is_refused():
    with pytest.raises(ValueError, match=r"`ttt_steps`: no setting that a DFlash drafter has"):
        make_drafter(make_target(), "dflash", {"ttt_steps": 3, "target_layer_ids": [1]})
    with pytest.raises(ValueError, match="got 'medusa'"):
        make_drafter(make_target(), "medusa", {})


def test_init_saves_what_was_asked_for(drafter_folder: str):
    drafter = AutoDrafter.from_pretrained(drafter_folder)
    assert (drafter.config.family, drafter.config.block_size, drafter.config.num_hidden_layers) == ("dflash", 4, 1)


def test_init_with_the_same_seed_makes_the_same_drafter(drafter_folder: str, target_folder: str, tmp_path: Path):
    flags = ["--num-hidden-layers", "1", "--block-size", "4", "--seed", "3"]
    main(["init", "--family", "dflash", "--target", target_folder, "--output", str(tmp_path), *flags])
    first, second = (AutoDrafter.from_pretrained(folder).state_dict() for folder in (drafter_folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sft_makes_an_eagle3_drafter_with_the_most_frequent_tokens(
    target_folder: str, rows_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = tmp_path / "sft.yaml"
    config.write_text(f"target: {target_folder}\ndataset: {rows_file}\nfamily: eagle3\nttt_steps: 2\n")
    out = tmp_path / "out"
    words = ["--config", str(config), "--draft_vocab_size", "12", "--output_dir", str(out), *TRAINING]
    assert main(["sft", *words]) == 0
    drafter = AutoDrafter.from_pretrained(out)
    assert (drafter.config.ttt_steps, drafter.config.draft_vocab_size) == (2, 12)
    # Counted by hand: w15..w21 occur six times each, the next ones on either side five times; EOS is kept always.
    assert {15, 16, 17, 18, 19, 20, 21, 2} <= set(drafter.draft_token_ids.tolist())
    assert "proposes 12 of the target's 64 tokens" in caplog.text


def test_init_counts_the_responses_that_generate_wrote(
    target_folder: str, rows_file: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = ["--target", target_folder]
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    words = ["generate", *base, "--dataset", rows_file, "--output", store, "--max-completion-length", "9"]
    assert main(words) == 0
    init = ["init", *base, "--family", "eagle3", "--output", out, "--draft-vocab-size", "12"]
    assert main([*init, "--responses", store]) == 0
    counts = Counter(chain.from_iterable(ResponseStore.read_only(store).to_dataset()["completion_ids"][:]))
    # Of equally frequent tokens the lowest are kept, EOS (2) in any case.
    frequent = sorted(range(VOCAB), key=lambda token: (token != EOS, -counts[token], token))[:12]
    assert AutoDrafter.from_pretrained(out).draft_token_ids.tolist() == sorted(frequent)
    printed = capsys.readouterr().out
    assert "covers" in printed and printed.endswith(f"--responses {store} --max-completion-length 9\n")
    other = tmp_path / "other"
    make_causal_lm(seed=5).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    words = [*init, "--responses", store, "--target", str(other)]
    assert "written under other conditions" in _error(words, capsys)


def test_init_on_rows_without_responses_names_the_command_that_writes_them(
    target_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "w8 w9"}\n', "utf-8")
    words = ["init", "--family", "eagle3", "--target", "no/target", "--output", "o", "--draft-vocab-size", "9"]
    error = _error([*words, "--dataset", str(rows)], capsys)
    assert "trl-draft-opd generate" in error and "--responses" in error
    # What `sft` would train on has responses: a question with its answer gets as far as the target.
    rows.write_text('{"question": "w8 w9", "answer": "w10"}\n', "utf-8")
    assert "no/target" in _error([*words, "--dataset", str(rows)], capsys)


def test_opd_trains_a_drafter_further(
    target_folder: str, drafter_folder: str, rows_file: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    words = ["--drafter", drafter_folder, "--target", target_folder, "--dataset", rows_file]
    limits = ["--max_completion_length", "12", "--eval-split", "train[:1]", "--eval_strategy", "steps"]
    assert main(["opd", *words, *limits, "--output_dir", str(tmp_path), *TRAINING]) == 0
    before, after = (AutoDrafter.from_pretrained(folder).state_dict() for folder in (drafter_folder, tmp_path))
    assert before.keys() == after.keys()
    assert capsys.readouterr().out.endswith("HELD_OUT.jsonl --max-completion-length 12\n")
    assert not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("command", ["sft", "opd"])
@pytest.mark.parametrize("held_out", ["--eval-dataset", "--eval-split"])
def test_rows_to_evaluate_on_give_tau_once_after_training_and_on_the_card(
    command: str,
    held_out: str,
    target_folder: str,
    drafter_folder: str,
    rows_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    rows = {"--eval-dataset": rows_file, "--eval-split": "train[:2]"}[held_out]
    words = ["--drafter", drafter_folder, "--target", target_folder, "--dataset", rows_file, held_out, rows]
    words += ["--max_completion_length", "12", "--output_dir", str(tmp_path), *TRAINING]
    assert main([command, *words]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "evaluation" in line]
    assert line.startswith("evaluation, step 1/1: ") and ", tau " in line
    assert "tau" in (tmp_path / "README.md").read_text("utf-8")
    assert [m.num_prompts for m in read_record(tmp_path).measurements] == [6 if held_out == "--eval-dataset" else 2]


def _evaluate(target: str, drafter: str, rows: str, *more: str) -> int:
    return main(
        [
            "evaluate",
            "--target",
            target,
            "--drafter",
            drafter,
            "--dataset",
            rows,
            "--max-completion-length",
            "12",
            *more,
        ]
    )


def test_evaluate_prints_the_table_and_writes_the_numbers(
    target_folder: str, drafter_folder: str, rows_file: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = tmp_path / "report.json"
    flags = ["--num-prompts", "3", "--num-drafts", "2", "--batch-size", "2", "--json", str(path)]
    assert _evaluate(target_folder, drafter_folder, rows_file, *flags) == 0
    assert "3 of 3" in capsys.readouterr().out
    report = json.loads(path.read_text("utf-8"))
    assert (report["num_prompts"], report["num_drafts"], report["batch_size"], report["temperature"]) == (3, 2, 2, 0.0)


def test_evaluate_passes_the_sampling_distribution_on(
    target_folder: str, drafter_folder: str, rows_file: str, tmp_path: Path
):
    path = tmp_path / "report.json"
    distribution = "--temperature 0.7 --top-k 5 --draft-sampling sample --seed 4 --ignore-eos".split()
    assert _evaluate(target_folder, drafter_folder, rows_file, *distribution, "--json", str(path)) == 0
    report = json.loads(path.read_text("utf-8"))
    assert report["temperature"] == 0.7
    assert report["num_tokens"] == 6 * 12
    assert report["speedup"] is None


def test_evaluate_fails_when_a_float32_output_is_not_the_target_own(
    target_folder: str, drafter_folder: str, rows_file: str, monkeypatch: pytest.MonkeyPatch
):
    def with_a_difference(*args, **kwargs):
        report = evaluate_drafter(*args, **kwargs)
        return type(report)(**report.to_dict() | {"num_different": 1, "different_prompts": [0]})

    monkeypatch.setattr("trl_draft_opd.cli.decoding.evaluate_drafter", with_a_difference)
    assert _evaluate(target_folder, drafter_folder, rows_file, "--num-prompts", "1") == 1
    assert _evaluate(target_folder, drafter_folder, rows_file, "--num-prompts", "1", "--target-dtype", "bfloat16") == 0


def test_evaluate_puts_its_numbers_on_the_card_of_an_export(
    target_folder: str, drafter_folder: str, rows_file: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    main(["export", "--drafter", drafter_folder, "--target", target_folder, "--output", str(out), "--license", "mit"])
    before = {name: (out / name).read_bytes() for name in ("config.json", "custom_generate/generate.py")}
    card = out / "README.md"
    assert "Not measured yet." in card.read_text("utf-8")
    card.write_text(card.read_text("utf-8").replace("<!-- notes -->", "<!-- notes -->\nMine.\n"), "utf-8")
    words = ["evaluate", "--drafter", str(out), "--target", target_folder, "--dataset", rows_file]
    words += ["--max-completion-length", "12"]
    assert main(words) == 0
    assert "With `--record NAME`" in capsys.readouterr().out and not (out / "training_record.json").exists()
    for batch_size in ("2", "3"):
        assert main([*words, "--record", "gsm8k-test", "--batch-size", batch_size]) == 0
    (measured,) = read_record(out).measurements
    assert (measured.prompt_set, measured.num_prompts, measured.batch_size) == ("gsm8k-test", 6, 3)
    text = card.read_text("utf-8")
    assert "Not measured yet." not in text and "Mine." in text and "license: mit" in text
    assert f"| gsm8k-test (6) | 0 | 3 | {measured.tau:.3f} [" in text and "6 of 6 greedy outputs on gsm8k-test" in text
    assert {name: (out / name).read_bytes() for name in before} == before
    # Under other conditions it is another measurement.
    main([*words, "--record", "gsm8k-test", "--num-drafts", "2"])
    assert [m.num_drafts for m in read_record(out).measurements] == [3, 2]


def test_what_evaluate_recorded_of_a_saved_drafter_is_on_the_card_of_its_export(
    target_folder: str, drafter_folder: str, rows_file: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    saved, out = shutil.copytree(drafter_folder, tmp_path / "saved"), tmp_path / "out"
    words = ["--target", target_folder, "--drafter", str(saved)]
    flags = ["--dataset", rows_file, "--max-completion-length", "12", "--record", "org/prompts:test"]
    assert main(["evaluate", *words, *flags]) == 0
    assert "the card of its next export will have it" in capsys.readouterr().out
    assert main(["export", *words, "--output", str(out)]) == 0
    assert "org/prompts:test (6)" in (out / "README.md").read_text("utf-8")


def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(
    drafter_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    words = ["evaluate", "--target", "no/target", "--dataset", "none", "--drafter"]
    assert "no file, got 'held_out.jsonl'" in _error([*words, drafter_folder, "--record", "held_out.jsonl"], capsys)
    assert "'org/drafter' is none" in _error([*words, "org/drafter", "--record", "x"], capsys)
    checkpoint = shutil.copytree(drafter_folder, tmp_path / "checkpoint-3")
    (checkpoint / "manifest.json").write_text("{}")
    assert "proven by their hashes" in _error([*words, str(checkpoint), "--record", "x"], capsys)


def test_an_export_whose_settings_were_damaged_is_refused_before_anything_is_measured(
    target_folder: str, drafter_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    assert main(["export", "--drafter", drafter_folder, "--target", target_folder, "--output", str(out)]) == 0
    words = ["evaluate", "--target", "no/target", "--dataset", "none", "--drafter", str(out), "--record", "x"]
    for damage, reason in (("{", "is not valid JSON"), ("{}", "lacks .*'num_drafts'.*Export the drafter again")):
        (out / "speculative_config.json").write_text(damage)
        assert re.search(reason, _error(words, capsys))


@pytest.mark.parametrize(
    ("dtype", "code", "advice"), [("bfloat16", 0, "--target-dtype float32"), ("float32", 1, "verify")]
)
def test_evaluate_says_why_outputs_can_differ_and_what_to_do(
    target_folder, drafter_folder, rows_file, monkeypatch, capsys, dtype, code, advice
):
    def evaluate(*args, **kwargs):
        return replace(evaluate_drafter(*args, **kwargs), num_different=1, different_prompts=[0])

    monkeypatch.setattr("trl_draft_opd.cli.decoding.evaluate_drafter", evaluate)
    words = ["--target", target_folder, "--target-dtype", dtype, "--drafter", drafter_folder, "--dataset", rows_file]
    assert main(["evaluate", *words, "--num-prompts", "2", "--max-completion-length", "8"]) == code
    said = capsys.readouterr().out
    assert f"The target computes in {dtype}." in said and advice in said


def test_a_drafter_of_another_target_is_refused(target_folder: str, rows_file: str, tmp_path: Path, capsys):
    other = make_target()
    other.config.vocab_size = 128
    make_drafter(other, "dflash", {"block_size": 4}).save_pretrained(tmp_path)
    error = _error(["evaluate", "--target", target_folder, "--drafter", str(tmp_path), "--dataset", rows_file], capsys)
    assert "vocab_size 128 but the target has 64" in error


def test_a_file_that_does_not_exist_is_one_line(target_folder: str, drafter_folder: str, capsys):
    words = ["--target", target_folder, "--drafter", drafter_folder, "--dataset", "nowhere.jsonl"]
    assert "There is no dataset file 'nowhere.jsonl'" in _error(["evaluate", *words], capsys)


def test_a_password_in_an_address_is_in_no_error(tmp_path: Path, capsys: pytest.CaptureFixture):
    address = "https://me:canary@host.org/rows.jsonl"
    assert main(["generate", "--target", "org/t", "--dataset", address, "--output", str(tmp_path / "o")]) == 2
    key = tmp_path / "key"
    key.write_text("canary twice\n")
    server = ["--engine", "vllm", "--base-url", "http://me:canary@host.org", "--api-key-file", str(key)]
    for flags in (server, [*server[:3], "http://host.org", *server[4:]]):
        assert main(["generate", "--target", "org/t", "--dataset", "d", "--output", "o", *flags]) == 2
    said = capsys.readouterr()
    assert "https://***@host.org/rows.jsonl" in said.err and "canary" not in said.out + said.err


def test_a_dataset_of_the_library_is_read_like_any_other(tmp_path: Path):
    Dataset.from_dict({"text": ["w8 w9"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds the splits"):
        load_rows(str(tmp_path / "saved"), None, "validation")


# ---- publishing -----------------------------------------------------------------------------------------------------


def test_an_export_from_the_shell_loads_and_says_what_it_left_out(
    target_folder: str, drafter_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["export", "--drafter", drafter_folder, "--target", target_folder, "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "speculators  not written: the speculators format names the target" in said
    exported, trained = AutoDrafter.from_pretrained(out), AutoDrafter.from_pretrained(drafter_folder)
    assert torch.equal(exported.fc.weight, trained.fc.weight.bfloat16().float())
    # No path of this machine gets in.
    assert not [path for path in out.rglob("*") if path.is_file() and target_folder.encode() in path.read_bytes()]
    named = ["--target", target_folder, "--target-id", "org/target", "--to", "speculators", "--license", "mit"]
    assert main(["export", "--drafter", drafter_folder, *named, "--output", str(tmp_path / "spec")]) == 0
    config = json.loads((tmp_path / "spec" / "config.json").read_text("utf-8"))
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert "license: mit" in (tmp_path / "spec" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--repo-id", "org/My-EAGLE-3"], "EAGLE-1"),
        (["--target-id", "/somewhere/else"], "must be the target's Hub id"),
        (["--to", "speculators"], "only a Hub id says where"),
        (["--licence", "mit"], "did you mean --license?"),
    ],
)
def test_an_export_refuses_what_nobody_could_read(target_folder, drafter_folder, tmp_path, capsys, flags, message):
    words = ["--drafter", drafter_folder, "--target", target_folder, "--output", str(tmp_path / "out")]
    assert message in _error(["export", *words, *flags], capsys)
    assert not (tmp_path / "out").exists()


def test_a_push_of_a_checkpoint_is_refused_with_the_way_to_export(drafter_folder: str, tmp_path, capsys):
    for folder in (str(tmp_path), drafter_folder):
        assert "holds no export" in _error(["push", "--drafter", folder, "--repo-id", "org/tiny-dflash"], capsys)
    assert "cannot be the name" in _error(["push", "--drafter", drafter_folder, "--repo-id", "org/../x"], capsys)


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_is_trained_by_flags_and_exported_merged(
    target_folder: str, drafter_folder: str, rows_file: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    words = ["--drafter", drafter_folder, "--target", target_folder]
    words += ["--dataset", rows_file, "--output_dir", str(tmp_path / "lora"), *TRAINING]
    lora = ["--lora_r", "3", "--lora_alpha", "6", "--lora_target_modules", "fc", "down_proj", "--lora_dropout", "0.1"]
    assert "set it" in _error(["sft", *words, *lora], capsys).lower()
    assert main(["sft", *words, "--use_peft", *lora]) == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.1)
    assert sorted(config["target_modules"]) == ["down_proj", "fc"]
    out = tmp_path / "out"
    assert main(["export", "--drafter", str(tmp_path / "lora"), "--target", target_folder, "--output", str(out)]) == 0
    merged, exported, base = (AutoDrafter.from_pretrained(f) for f in (tmp_path / "lora", out, drafter_folder))
    assert torch.equal(exported.fc.weight, merged.fc.weight.bfloat16().float())
    assert not torch.equal(merged.fc.weight, base.fc.weight)
    assert torch.equal(merged.layers[0].self_attn.q_proj.weight, base.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("ran", [[], ["vllm"]])
def test_verify_tells_when_no_other_reader_was_run(
    ran: list[str], target_folder: str, rows_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    skipped = {name: "is not installed" for name in CONSUMERS if name not in ran}
    report = VerificationReport("export", "dflash", 6, 3, 128, skipped=skipped)
    monkeypatch.setattr("trl_draft_opd.cli.publishing.verify_drafter", lambda *args, **kwargs: report)
    assert main(["verify", "--drafter", "export", "--target", target_folder, "--dataset", rows_file]) == 0
    ending = "is as it was trained.\n" if ran else "only our own loop was compared.\n"
    last = capsys.readouterr().out.splitlines(keepends=True)[-1]
    assert last.startswith("Passed") and last.endswith(ending) and all(name in last for name in ran)


def test_verify_names_the_command_that_can_work_next(
    target_folder: str, drafter_folder: str, rows_file: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
):
    export = ["export", "--drafter", drafter_folder, "--target", target_folder]
    assert main([*export, "--output", str(tmp_path / "named"), "--repo-id", "you/Tiny-DFlash"]) == 0
    assert main([*export, "--output", str(tmp_path / "unnamed")]) == 0
    report = VerificationReport("export", "dflash", 6, 3, 128)
    monkeypatch.setattr("trl_draft_opd.cli.publishing.verify_drafter", lambda *args, **kwargs: report)
    for folder, following in (
        (drafter_folder, f"export --drafter {drafter_folder} --target {target_folder} --output EXPORT"),
        (tmp_path / "named", f"push --drafter {tmp_path / 'named'} --repo-id you/Tiny-DFlash"),
        (tmp_path / "unnamed", f"push --drafter {tmp_path / 'unnamed'} --repo-id ORG/NAME"),
    ):
        assert main(["verify", "--drafter", str(folder), "--target", target_folder, "--dataset", rows_file]) == 0
        assert capsys.readouterr().out.endswith(f"Next: trl-draft-opd {following}\n")
