# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The script of the paper's row runs from its command to its table on tiny models, measures nothing twice, and its
arithmetic is right.
"""

import json
import re

import numpy as np
import pytest

from benchmarks.lab import paper_table
from benchmarks.lab.statistics import arm_counts
from benchmarks.lab.tables import percent


pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """A folder with a finished dry run of two tasks, one of them a dialogue."""
    folder = tmp_path_factory.mktemp("row")
    paper_table.main(["--dry-run", "--output", str(folder), "--tasks", "gsm8k", "mt_bench"])
    return folder


def again(folder, *flags):
    paper_table.main(["--dry-run", "--output", str(folder), "--tasks", "gsm8k", "mt_bench", *flags])


def test_the_row_is_that_of_the_paper():
    row = paper_table.read_row(paper_table.FOLDER / "paper_table.yaml")
    assert (row.target, row.temperature, row.max_completion_length) == ("Qwen/Qwen3-4B", 0, 2048)
    assert row.chat_template_kwargs == {"enable_thinking": False}
    assert {name: task.num_prompts for name, task in row.tasks.items()} == {
        "gsm8k": 128,
        "math500": 128,
        "aime25": 30,
        "mbpp": 128,
        "humaneval": 128,
        "swe_bench_lite": 128,
        "mt_bench": 80,
    }
    # The paper's means of speed are those of the seven tasks, so these were read off rightly.
    speeds = np.mean([task.paper_speed for task in row.tasks.values()], axis=0)
    assert speeds == pytest.approx([4.84, 5.31], abs=0.006)


def test_templates_keep_their_braces_for_the_answer():
    row = paper_table.read_row(paper_table.FOLDER / "paper_table.yaml")
    assert row.tasks["gsm8k"].prompt.format(question="Why?").splitlines()[0] == "Why?"
    assert row.tasks["gsm8k"].prompt.format(question="Why?").endswith("within \\boxed{}.")
    assert row.tasks["mbpp"].prompt.format(prompt="def {f}") == "def {f}"


def test_a_dry_run_fills_the_table_and_says_what_it_is(dry_run):
    table = (dry_run / "table.md").read_text()
    assert paper_table.DRY_RUN in table
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == ["| gsm8k", "| mt_bench", "| mean of 2"]
    # Two prompts, and two dialogues of two turns.
    assert [line.split(" | ")[1] for line in lines[1:]] == ["2", "4", "6"]
    assert re.search(r"5\.36x, 6\.22x \| \+16\.0 %", lines[1])
    assert "Not measured" not in table


def test_a_later_turn_holds_the_answer_to_the_first(dry_run):
    prompts = json.loads((dry_run / "prompts" / "mt_bench.json").read_text())["prompts"]
    assert len(prompts) == 4
    for first, second in zip(prompts[:2], prompts[2:], strict=True):
        assert len(second) > len(first) and second[: len(first) - 1] == first[:-1]


def test_what_was_measured_is_not_measured_again(dry_run, monkeypatch, capsys):
    table = (dry_run / "table.md").read_text()

    def fail(*args, **options):
        raise AssertionError("measured or loaded again")

    monkeypatch.setattr(paper_table, "evaluate_drafter", fail)
    monkeypatch.setattr(paper_table.FrozenTarget, "load", fail)
    again(dry_run)
    assert (dry_run / "table.md").read_text() == table
    assert paper_table.DRY_RUN in capsys.readouterr().out


def test_a_stopped_run_goes_on_where_it_was(dry_run, monkeypatch):
    table = (dry_run / "table.md").read_text()
    (dry_run / "after" / "mt_bench.json").unlink()
    evaluate, calls = paper_table.evaluate_drafter, []

    def counting(target, drafter, prompts, **options):
        calls.append(len(prompts))
        return evaluate(target, drafter, prompts, **options)

    monkeypatch.setattr(paper_table, "evaluate_drafter", counting)
    again(dry_run)
    assert calls == [4]
    assert (dry_run / "table.md").read_text() == table


def test_reports_of_other_settings_are_not_mixed_in(dry_run):
    with pytest.raises(ValueError, match="prompts/gsm8k.json was made with other .*num_prompts"):
        row = paper_table.read_row(paper_table.FOLDER / "paper_table.yaml")
        row = paper_table.dry_run_row(row, dry_run)
        paper_table.run(paper_table.replace(row, tasks={"gsm8k": changed(row.tasks["gsm8k"])}), dry_run, True)
    row = paper_table.replace(row, max_completion_length=13, tasks={"gsm8k": row.tasks["gsm8k"]})
    with pytest.raises(ValueError, match="before/gsm8k.json was made with other .*max_completion_length"):
        paper_table.run(row, dry_run, True)


def changed(task):
    return paper_table.replace(task, num_prompts=1)


def test_the_gain_of_means_weighs_tasks_alike():
    def arm(rounds, accepted):
        return arm_counts({0: {"rounds": rounds, "accepted": accepted}})

    # tau 2 -> 3 on many rounds, 2 -> 2 on few: the mean goes from 2 to 2.5.
    many = (arm([100, 100], [100, 100]), arm([100, 100], [200, 200]))
    few = (arm([1, 1], [1, 1]), arm([1, 1], [1, 1]))
    assert percent(paper_table.gain_of_means([many, few], num_resamples=200)) == "+25.0 % [+25.0, +25.0]"
    assert percent(paper_table.gain_of_means([few, few], num_resamples=200)) == "+0.0 % [+0.0, +0.0]"


def test_tau_by_prompt_is_the_mean_of_means():
    report = {"accepted_sums": [30, 4, 0], "block_counts": [10, 2, 0]}
    assert paper_table.mean_of_prompts(report) == pytest.approx((3 + 2) / 2)
    assert paper_table.counts_of(report).tau == 34 / 12


def test_flags_that_cannot_be_meant_are_refused(capsys):
    for flags, said in (([], "--output"), (["--dry-run", "--tasks", "gsm9k"], "unknown tasks ['gsm9k']")):
        with pytest.raises(SystemExit):
            paper_table.main(flags)
        assert said in capsys.readouterr().err
