# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a person sees: output that ends no run, no useless notes, no bars in files, metrics as a table."""

import io
import logging
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import datasets
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging

from helpers.tiny import TINY_RUN, make_drafter, make_target, make_tokenizer
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.cli import main
from trl_draft_opd.trainer import log_printer, metrics
from trl_draft_opd.trainer.log_printer import LogPrinter
from trl_draft_opd.trainer.metrics import Pace
from trl_draft_opd.trainer.notebook_table import NotebookTable
from trl_draft_opd.utils.bars import library_bars
from trl_draft_opd.utils.console import LastingStream, lasting_output, own_warnings_as_sentences


ROWS = Dataset.from_list([{"prompt_ids": [7, 8, 9], "completion_ids": list(range(10 + i, 26 + i))} for i in range(4)])


def run_sft(tmp_path, callbacks=(), **settings):
    """Train a tiny drafter for two updates and return the trainer."""
    target = make_target()
    target.tokenizer = make_tokenizer()
    run = TINY_RUN | {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    config = DraftSFTConfig(str(tmp_path), **run | settings)
    trainer = DraftSFTTrainer(make_drafter("eagle3", target), target, config, ROWS, callbacks=list(callbacks))
    trainer.train()
    trainer.save_model()
    return trainer


# -- output that cannot fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"caf\xe9 \u4f60"), ("cp1252", "caf\xe9 \\u4f60")])
def test_what_a_console_cannot_encode_is_escaped(encoding, shown):
    raw = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(raw, encoding)), lasting_output():
        sys.stdout.write("caf\xe9 \u4f60\n")
        assert raw.getvalue().decode(encoding) == f"{shown}\n", "a line is out when it is written"


def broken_pipe():
    """Return a text stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_a_table_is_printed_in_every_encoding():
    raw = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(raw, "ascii")), lasting_output():
        Console().rule("\u4f60")
        assert rb"\u4f60" in raw.getvalue()


@pytest.mark.parametrize("stream", ["closed pipe", "full disk", "closed", "none"])
def test_training_outlives_its_output(tmp_path, stream):
    out = {
        "closed pipe": broken_pipe,
        "full disk": lambda: open("/dev/full", "w", encoding="utf-8"),
        "closed": lambda: open(os.devnull, "w", encoding="utf-8"),
        "none": lambda: None,
    }[stream]()
    if stream == "closed":
        out.close()
    with redirect_stdout(out), redirect_stderr(out):
        trainer = run_sft(tmp_path, disable_tqdm=False)
    if stream == "full disk":
        with pytest.raises(OSError, match="No space"):
            out.close()
    assert trainer.state.global_step == 2
    assert (tmp_path / "model.safetensors").is_file()


def test_a_command_into_a_closed_pipe_ends_as_it_would_have():
    command = [sys.executable, "-m", "trl_draft_opd", "--help"]
    with broken_pipe() as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_attributes_are_those_of_the_stream():
    with open(os.devnull, "w", encoding="cp1252") as file:
        stream = LastingStream(file)
        assert (stream.encoding, stream.fileno(), stream.isatty()) == ("cp1252", file.fileno(), False)


# -- no noise ---------------------------------------------------------------------------------------------------------


def test_notes_about_parts_that_nobody_asked_for_are_dropped_and_others_kept(caplog):
    useless = {
        "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: %s.",
        "DeepSpeed": "Setting ds_accelerator to cpu (auto detect)",
    }
    for name, note in useless.items():
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)
        logger.warning(note, *("x" for _ in range(note.count("%s"))))
        logger.warning("%s ran out of memory", name)
        logger.removeHandler(caplog.handler)
    said = {record.getMessage() for record in caplog.records}
    assert said == {f"{name} ran out of memory" for name in useless}


def test_the_package_is_imported_without_a_word():
    code = "import trl_draft_opd as t\nfor name in t.__all__: getattr(t, name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_our_warnings_are_sentences_and_others_stay_as_they_are():
    ours, theirs = (module.__file__ for module in (log_printer, datasets))
    usual = warnings.formatwarning
    with own_warnings_as_sentences():
        assert warnings.formatwarning("skipped 2 rows", UserWarning, ours, 7) == "note: skipped 2 rows\n"
        assert warnings.formatwarning("beware", UserWarning, theirs, 7) == usual("beware", UserWarning, theirs, 7)
    assert warnings.formatwarning is usual


def test_the_bars_of_libraries_are_hidden_and_come_back():
    with library_bars(False):
        assert datasets.are_progress_bars_disabled()
        assert not transformers_logging.is_progress_bar_enabled()
    assert not datasets.are_progress_bars_disabled()
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("is_terminal", "asked", "is_hidden"), [(0, None, 1), (1, None, 0), (0, False, 0), (1, True, 1)]
)
def test_bars_are_for_terminals_unless_asked_for(monkeypatch, is_terminal, asked, is_hidden):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(is_terminal))
    assert DraftOPDConfig("x", **TINY_RUN | {"disable_tqdm": asked}).disable_tqdm == bool(is_hidden)


def test_a_run_into_a_file_prints_its_metrics_and_nothing_else(tmp_path, capfd):
    run_sft(tmp_path, disable_tqdm=None)
    out, err = capfd.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == ["step", "1/2", "2/2", "trained,"]


# -- the metrics of a run ---------------------------------------------------------------------------------------------

UPDATE = {
    "loss": 5.63251,
    "grad_norm": 12.34,
    "learning_rate": 3e-4,
    "epoch": 0.2,
    "slots/accepted": 9.0,
    "tau": 1.049,
}


def test_rows_of_the_table_stand_below_their_titles():
    printer = LogPrinter()
    slots = {"acceptance/slot_1": 0.05, "acceptance/slot_2": 1.0}
    titles, first = printer.lines(UPDATE | slots, 9, 300)
    (second,) = printer.lines(UPDATE | slots | {"loss": 0.1, "learning_rate": 1e-9, "tau": 7.5}, 300, 300)
    assert titles.split() == "step epoch loss tau kept per slot, % grad norm rate".split()
    assert first.split() == "9/300 0.20 5.6325 1.049 5 100 12.3 3.0e-04".split()
    assert len(titles) == len(first) == len(second)
    ends = [i + 1 for i, letter in enumerate(second) if letter != " " and second[i + 1 : i + 2] in (" ", "")]
    assert {titles.index("loss") + 4, titles.index("tau") + 3, titles.index("rate") + 4} <= set(ends)


def test_the_titles_are_repeated_where_columns_are_new_and_troubles_are_named_when_there_are_any():
    printer = LogPrinter()
    printer.lines(UPDATE, 1, 2)
    assert len(printer.lines(UPDATE | {"refused_responses": 0.0}, 1, 2)) == 1
    (row,) = printer.lines(UPDATE | {"refused_responses": 0.25}, 1, 2)
    assert row.endswith("  refused 25 %")
    assert len(printer.lines(UPDATE | {"loss/accepted": 1.0, "loss/rejected": 2.0}, 1, 2)) == 2
    titles, row = printer.lines(UPDATE | {"reading_wait": 0.00072}, 1, 2)
    assert titles.endswith("  waiting") and row.endswith("  0.1%")


def test_a_narrow_terminal_gets_the_columns_that_matter_most():
    slots = {f"acceptance/slot_{slot}": 0.5 for slot in range(1, 8)}
    parts = {"loss/accepted": 1.0, "loss/rejected": 2.0, "tokens_per_second": 1234.5, "time_left": "0:01:02"}
    titles, row = LogPrinter().lines(UPDATE | slots | parts, 9, 300)
    assert titles.endswith("tokens/s      left") and row.endswith("   1,234   0:01:02")
    assert len(titles) > 100
    for width in (100, 80, 60):
        titles, row = LogPrinter().lines(UPDATE | slots | parts, 9, 300, width)
        assert max(len(titles), len(row)) <= width and {"step", "loss", "tau", "left"} <= set(titles.split())
    assert "rate" not in titles and "kept per slot, %" in titles
    # What has no column counts too, and the columns that it takes the place of do not come back.
    printer, plain = LogPrinter(), UPDATE | slots | parts
    first, second = (printer.lines(plain | more, 9, 300, 100) for more in ({}, {"truncated_responses": 1.0}))
    assert len(second[1]) <= 100 and second[1].endswith("  cut short 100 %") and len(second[0]) < len(first[0])
    assert len(printer.lines(plain, 9, 300, 100)) == 1, "the same columns"
    # What cannot be spared stays, however narrow.
    assert "tau" in LogPrinter().lines(UPDATE | slots | parts, 9, 300, 10)[0]


def test_the_time_left_is_that_of_the_updates_so_far(monkeypatch):
    printer, state = LogPrinter(), TrainerState(global_step=100, max_steps=300, is_world_process_zero=True)
    clock = iter([50.0, 250.0])
    monkeypatch.setattr(log_printer.time, "perf_counter", lambda: next(clock))
    printer.on_train_begin(None, state, None)
    assert printer.time_left(state) == {}, "nothing is known before the first update"
    state.global_step = 140
    assert printer.time_left(state) == {"time_left": "0:13:20"}, "40 updates in 200 s, 160 to go"


def test_the_reporters_get_the_tokens_per_second_and_the_history_does_not(tmp_path):
    seen = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = run_sft(tmp_path, callbacks=[Keep()])
    speeds = [logs["tokens_per_second"] for logs in seen if "loss" in logs]
    assert len(speeds) == 2 and all(speed > 0 for speed in speeds)
    assert not any("tokens_per_second" in entry for entry in trainer.state.log_history)


def test_tokens_are_counted_until_they_are_asked_for(monkeypatch):
    clock = iter([10.0, 14.0, 15.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    pace = Pace()
    pace.add([torch.tensor([[True, False], [True, True]]), torch.tensor([[True]])])
    assert pace.pop() == (4.0, 4.0)
    assert pace.pop() == (0.0, 1.0)


def test_a_notebook_shows_one_table_with_tau_and_sentences_below():
    table, state = NotebookTable(), TrainerState(global_step=1, max_steps=2, is_world_process_zero=True)
    for logs in (UPDATE, UPDATE | {"of <a> callback": 1}, {"eval_runtime": 1.0, "eval_tau": 2.0}):
        table.add(logs, state)
    html = table.html()
    assert html.count("<table>") == 1 and html.count("<tr>") == 3
    assert "<th>tau</th>" in html and "<td>1.049</td>" in html and "of &lt;a&gt; callback" in html
    assert html.endswith("<p>evaluation, step 1/2: 1.0 s, tau 2.000</p>")
    table.on_train_begin(None, state, None)
    assert table.html() == ""


def test_an_evaluation_and_the_end_are_sentences():
    evaluated = {"loss": 5.2, "tau": 1.0851, "tau_low": 1.036, "tau_high": 1.139, "acceptance/slot_1": 0.09}
    evaluated |= {"runtime": 72.2, "samples_per_second": 4.0, "steps_per_second": 1.0}
    logs = {f"eval_{name}": value for name, value in evaluated.items()} | {"epoch": 1.0}
    (line,) = LogPrinter().lines(logs, 10, 20)
    start = "evaluation, step 10/20: 1 min 12 s (4 rows per second), tau 1.085 [1.036, 1.139], kept per slot 9 %"
    assert line == f"{start}, loss 5.2"
    named = {name.replace("eval_", "eval_code_"): value for name, value in logs.items()}
    assert LogPrinter().lines(named, 10, 20) == [line.replace("evaluation", "code")]
    end = {"train_runtime": 7260.0, "train_samples_per_second": 4.4, "train_steps_per_second": 1, "train_loss": 6.66}
    assert LogPrinter().lines(end, 20, 20) == ["trained, step 20/20: 2 h 1 min, mean loss 6.66"]


def test_a_tau_without_an_interval_of_its_own_is_printed_without_one():
    logs = {"eval_runtime": 1.0, "eval_tau": 1.0, "eval_tau_low": 1.0, "eval_tau_high": 1.0}
    assert LogPrinter().lines(logs, 1, 1) == ["evaluation, step 1/1: 1.0 s, tau 1.000"]


def test_a_share_of_what_went_wrong_is_printed_in_percent():
    (_, row) = LogPrinter().lines({"loss": 1.0, "truncated_responses": 1.0, "response_mismatch": 0.015}, 1, 1)
    assert row.endswith("  cut short 100 %  not the target's own 1.5 %")


def test_a_training_that_had_ended_before_has_no_sum(capsys):
    printer, end = LogPrinter(), {"train_runtime": 0.01, "train_loss": 0.0}
    state = TrainerState(global_step=2, max_steps=2, is_world_process_zero=True)
    printer.on_train_begin(None, state, None)
    printer.on_log(None, state, None, end)
    assert capsys.readouterr().out == ""
    state.global_step = 3
    printer.on_log(None, state, None, end)
    assert "trained" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), None, "text", [1], 10**30])
def test_whatever_is_logged_is_printed(value):
    (_, row) = LogPrinter().lines({"loss": value, "of_a_callback": value, "epoch": value}, 1, 1)
    assert str(value)[:3] in row


def test_log_history_keeps_every_number_unrounded(tmp_path):
    trainer = run_sft(tmp_path)
    entry = trainer.state.log_history[0]
    assert {"loss", "grad_norm", "learning_rate", "loss/accepted", "slots/accepted", "epoch", "step"} <= set(entry)
    assert all(isinstance(value, (int, float)) for value in entry.values())
    assert entry["loss/accepted"] != round(entry["loss/accepted"], 4)


def test_a_rollout_is_printed_below_no_part_of_the_bar(tmp_path):
    target, shown = make_target(), io.StringIO()
    target.tokenizer = make_tokenizer()
    run = TINY_RUN | {"max_steps": 2, "per_device_train_batch_size": 1, "save_strategy": "no", "log_completions": True}
    run |= {"disable_tqdm": False, "logging_steps": 1, "completions_from_target": True, "max_mismatch_share": 1.0}
    with redirect_stdout(shown), redirect_stderr(shown):
        DraftOPDTrainer(make_drafter("eagle3", target), target, DraftOPDConfig(str(tmp_path), **run), ROWS).train()
    panels = shown.getvalue().split("\u256d")
    assert len(panels) > 2 and "| 1/2 [" in shown.getvalue()
    assert all(before[-1] in "\r\n" for before in panels[:-1])


def test_rejected_drafts_can_be_told_without_colours(tmp_path, capsys):
    target = make_target()
    target.tokenizer = make_tokenizer()
    run = TINY_RUN | {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no", "log_completions": True}
    config = DraftOPDConfig(str(tmp_path), completions_from_target=True, max_mismatch_share=1.0, **run)
    DraftOPDTrainer(make_drafter("eagle3", target), target, config, ROWS).train()
    shown = capsys.readouterr().out
    assert "accepted ~rejected~ *target's own*" in shown
    assert "~w" in shown and "*w" in shown


# -- errors of a command ----------------------------------------------------------------------------------------------


def test_an_error_of_ours_shows_its_traceback_and_where_to_report(monkeypatch, capsys):
    def fail(words):
        raise KeyError("a bug")

    monkeypatch.setattr("trl_draft_opd.cli.demo.run_demo", fail)
    assert main(["demo"]) == 3
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "KeyError: 'a bug'" in shown and "Please report it" in shown


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("wrong"), 2, "trl-draft-opd demo: wrong\n"),
        (ImportError("needs PEFT"), 2, "trl-draft-opd demo: needs PEFT\n"),
        (KeyboardInterrupt(), 130, "trl-draft-opd demo: stopped by Ctrl-C.\n"),
    ],
)
def test_an_error_of_the_user_is_one_line(monkeypatch, capsys, error, code, said):
    def fail(words):
        raise error

    monkeypatch.setattr("trl_draft_opd.cli.demo.run_demo", fail)
    assert main(["demo"]) == code
    assert capsys.readouterr().err == said
