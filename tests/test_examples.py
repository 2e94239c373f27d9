# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The example scripts run as they are, on a tiny target and a few prompts.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tiny import make_drafter, make_target, make_tokenizer

from trl_draft_opd import AutoDrafter


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = (
    "--max_steps 1 --max_completion_length 12 --per_device_train_batch_size 2 --use_cpu true --bf16 false "
    "--report_to none --save_strategy no --disable_tqdm true"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a target, a drafter of each family and prompts."""
    folder = tmp_path_factory.mktemp("examples")
    target = make_target()
    target.causal_lm.save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    for family in ("dflash", "eagle3"):
        make_drafter(family, target).save_pretrained(folder / family)
    rows = [{"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}]} for i in range(7, 15)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def run_script(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_flat_loop_runs_three_steps(folder, capsys):
    minimal = runpy.run_path(str(EXAMPLES / "minimal_opd.py"))
    taus = minimal["main"](folder / "target", folder / "eagle3", folder / "prompts.jsonl", 3)
    assert len(taus) == 3 and all(tau >= 1 for tau in taus)
    assert capsys.readouterr().out.count("loss") == 3


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_the_opd_scripts_train_and_save(monkeypatch, tmp_path, folder, capsys, family):
    arguments = [
        "--model",
        folder / family,
        "--target",
        folder / "target",
        "--dataset",
        folder / "prompts.jsonl",
    ]
    arguments += ["--output_dir", tmp_path, "--num_eval_prompts", 2]
    run_script(monkeypatch, f"train_{family}_opd.py", *arguments, *SMALL)
    assert "held-out prompts" in capsys.readouterr().out
    assert AutoDrafter.from_pretrained(tmp_path).config.family == family


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_the_sft_scripts_train_and_save(monkeypatch, tmp_path, folder, family):
    arguments = ["--target", folder / "target", "--dataset", folder / "prompts.jsonl"]
    run_script(monkeypatch, f"train_{family}_sft.py", *arguments, "--output_dir", tmp_path, *SMALL)
    assert AutoDrafter.from_pretrained(tmp_path).config.family == family


@pytest.mark.parametrize("rank", [0, 2])
def test_the_adapting_script_saves_a_drafter_or_an_adapter(monkeypatch, tmp_path, folder, capsys, rank):
    arguments = ["--model", folder / "dflash", "--target", folder / "target", "--dataset"]
    arguments += [folder / "prompts.jsonl", "--output_dir", tmp_path, "--num_eval_prompts", 2, "--lora_r", rank]
    run_script(monkeypatch, "adapt_drafter.py", *arguments, *SMALL)
    assert "held-out prompts" in capsys.readouterr().out
    assert (tmp_path / "adapter_config.json").exists() == (rank > 0)
    assert AutoDrafter.from_pretrained(tmp_path).config.family == "dflash"
