# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The example scripts run as they are, on a tiny target and a few prompts."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from test_snippets import parse_ours

from helpers.logs import chat_line, write_log
from helpers.tiny import FAMILIES, make_drafter, make_target, make_tokenizer
from trl_draft_opd import AutoDrafter, FrozenTarget, SamplingSettings, generate_responses


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = (
    "--max_steps 1 --max_completion_length 24 --per_device_train_batch_size 2 --use_cpu true --bf16 false "
    "--report_to none --save_strategy no --disable_tqdm true"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a target, a drafter of each family and prompts."""
    folder = tmp_path_factory.mktemp("examples")
    target = make_target()
    target.causal_lm.save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    for family in FAMILIES:
        make_drafter(family, target).save_pretrained(folder / family)
    # Raw, as GSM8K has them.
    rows = [{"question": f"w{i} w{i + 1}", "answer": "w8 #### w9"} for i in range(7, 15)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def run_script(monkeypatch, folder, name, *flags):
    """Run a script with `--target` and `--dataset` from a folder, and more flags."""
    pair = ["--target", folder / "target", "--dataset", folder / "prompts.jsonl"]
    monkeypatch.setattr(sys, "argv", [name, *map(str, [*pair, *flags])])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_readme_names_every_script():
    named = set(re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text("utf-8")))
    assert named == {path.name for path in EXAMPLES.glob("*.py")}


def test_every_script_shows_its_own_command():
    for path in EXAMPLES.glob("*.py"):
        shown = path.read_text("utf-8").replace("\\\n        ", "")
        assert re.search(rf"^    (python|accelerate launch .*) examples/{path.name} --target ", shown, re.M), path.name


def test_the_quickstart_runs_on_its_own_raw_rows_and_again_on_others(monkeypatch, folder, tmp_path, capsys):
    few = tmp_path / "raw.jsonl"
    few.write_text("".join(json.dumps({"question": f"w{i} w9", "answer": "w8"}) + "\n" for i in range(8)), "utf-8")
    for rows in ([], ["--dataset", str(few)]):
        words = ["--target", folder / "target", "--output", tmp_path / "out", "--max_completion_length", 12, *rows]
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, words)])
        runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
        shown = capsys.readouterr().out
        assert "after Draft-OPD" in shown and "The drafter is in" in shown
        # Each table of metrics stands below its stage.
        assert re.search("Stage 1 of 2: SFT.*\n *step .*(.*\n)+Stage 2 of 2: Draft-OPD.*\n *step ", shown)
    assert AutoDrafter.from_pretrained(tmp_path / "out" / "drafter-opd").config.family == "eagle3"


def test_the_quickstart_refuses_too_few_rows_before_it_loads_the_target(monkeypatch, folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w9"}\n' * 7, encoding="utf-8")
    with pytest.raises(SystemExit, match="has 7 rows. Give at least 8"):
        run_script(monkeypatch, tmp_path, "quickstart.py")


@pytest.mark.parametrize("family", ["dspark", "eagle3"])
def test_the_flat_loop_runs_three_steps(monkeypatch, folder, capsys, family):
    run_script(monkeypatch, folder, "minimal_opd.py", "--drafter", folder / family, "--num_steps", 3)
    taus = re.findall(r"^step \d: loss \S+, tau (\S+)$", capsys.readouterr().out, re.M)
    assert len(taus) == 3 and all(float(tau) >= 1 for tau in taus)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_opd_script_trains_a_drafter_of_any_family(monkeypatch, tmp_path, folder, capsys, family):
    # 64 prompts are held out unless asked for otherwise, of 8 rows two.
    flags = ["--drafter", folder / family, "--output_dir", tmp_path]
    run_script(monkeypatch, folder, "train_eagle3_opd.py", *flags, *SMALL)
    assert "tau on 2 held-out prompts" in capsys.readouterr().out
    assert AutoDrafter.from_pretrained(tmp_path).config.family == family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sft_script_trains_a_fresh_drafter_of_any_family(monkeypatch, tmp_path, folder, capsys, family):
    flags = ["--family", family, "--output_dir", tmp_path, "--num_eval_prompts", 2]
    run_script(monkeypatch, folder, "train_sft.py", *flags, *SMALL)
    assert "held-out prompts" in capsys.readouterr().out
    assert AutoDrafter.from_pretrained(tmp_path).config.family == family


def test_the_sft_script_trains_a_drafter_further(monkeypatch, tmp_path, folder):
    flags = ["--drafter", folder / "dflash", "--output_dir", tmp_path, "--num_eval_prompts", 2]
    run_script(monkeypatch, folder, "train_sft.py", *flags, *SMALL)
    trained, start = (AutoDrafter.from_pretrained(path).config for path in (tmp_path, folder / "dflash"))
    assert (trained.family, trained.block_size) == ("dflash", start.block_size)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_adapting_script_saves_a_drafter_or_an_adapter(monkeypatch, tmp_path, folder, capsys, rank):
    flags = ["--drafter", folder / "dflash", "--output_dir", tmp_path, "--num_eval_prompts", 2, "--lora_r", rank]
    run_script(monkeypatch, folder, "adapt_drafter.py", *flags, *SMALL)
    assert "held-out prompts" in capsys.readouterr().out
    assert (tmp_path / "adapter_config.json").exists() == (rank > 0)
    assert AutoDrafter.from_pretrained(tmp_path).config.family == "dflash"


@pytest.mark.parametrize("name", ["train_eagle3_opd.py", "adapt_drafter.py", "train_sft.py"])
def test_a_script_refuses_a_single_row_in_a_sentence(monkeypatch, tmp_path, name):
    (tmp_path / "prompts.jsonl").write_text('{"question": "w9", "answer": "w8"}\n', encoding="utf-8")
    flags = ["--output_dir", tmp_path / "out", *(["--drafter", "d"] if name != "train_sft.py" else [])]
    with pytest.raises(SystemExit, match="has 1 rows. Give at least 2"):
        run_script(monkeypatch, tmp_path, name, *flags, *SMALL)


def test_the_resuming_script_goes_on_where_it_was(monkeypatch, tmp_path, folder, capsys):
    flags = ["--drafter", folder / "dflash", "--output_dir", tmp_path / "out", *SMALL, "--save_strategy", "steps"]
    for num_steps in (1, 2):
        run_script(monkeypatch, folder, "resume_run.py", *flags, "--save_steps", 1, "--max_steps", num_steps)
        # Started afresh, the second would be refused: the folder holds the checkpoint of the first.
        assert f"trained to step {num_steps}" in capsys.readouterr().out


def test_the_script_for_several_processes_runs_on_one(monkeypatch, tmp_path, folder, capsys):
    run_script(monkeypatch, folder, "two_processes.py", "--output_dir", tmp_path, *SMALL)
    assert "trained on 1 processes" in capsys.readouterr().out


def test_the_script_with_a_store_trains_without_the_body(monkeypatch, tmp_path, folder, capsys):
    flags = ["--drafter", folder / "dflash", "--output_dir", tmp_path, *SMALL]
    trainer = run_script(monkeypatch, folder, "train_from_store.py", *flags)["trainer"]
    assert not trainer.target.has_body and "trained on 8 texts" in capsys.readouterr().out


def test_two_drafters_are_compared_and_the_numbers_kept(monkeypatch, tmp_path, folder, capsys):
    pair = ["--drafter", folder / "dflash", "--baseline", folder / "eagle3", "--json", tmp_path / "numbers.json"]
    run_script(monkeypatch, folder, "evaluate_pair.py", *pair, "--max_completion_length", 12)
    assert "gain in tau" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "numbers.json").read_text("utf-8"))) == 2


def test_the_publishing_script_exports_and_verifies_and_pushes_nothing_unasked(monkeypatch, tmp_path, folder, capsys):
    flags = ["--drafter", folder / "dflash", "--output", tmp_path / "export", "--target_id", "org/target"]
    run_script(monkeypatch, folder, "publish_drafter.py", *flags)
    shown = capsys.readouterr().out
    assert "written: flat" in shown and "verified" in shown and "pushed" not in shown


def test_the_traffic_script_trains_along_a_log(monkeypatch, tmp_path, folder, capsys):
    target = FrozenTarget.load(folder / "target")
    prompts = target.text_reader().read_prompts(
        load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train")
    )
    options = {"sampling": SamplingSettings(0.0, 0, 1.0), "batch_size": 8, "seed": 0, "show_progress": False}
    prompts = list(prompts["prompt_ids"])
    responses = generate_responses(target, prompts, max_completion_length=24, **options)
    texts = zip(range(7, 15), prompts, responses, strict=True)
    log = write_log(tmp_path / "log.jsonl", [chat_line(f"w{i} w{i + 1}", *text, "length") for i, *text in texts])
    words = ["--target", folder / "target", "--drafter", folder / "eagle3", "--log", log]
    words += ["--responses", tmp_path / "responses", "--output_dir", tmp_path / "out", *SMALL]
    monkeypatch.setattr(sys, "argv", ["from_traffic.py", *map(str, words)])
    runpy.run_path(str(EXAMPLES / "from_traffic.py"), run_name="__main__")
    assert "8 of 8 lines hold a response" in capsys.readouterr().out


# Writes down what it is asked to do, and makes what the script looks at.
STUB = """
import json, sys
from pathlib import Path

words = sys.argv[1:]
with Path(__file__).with_name("asked.jsonl").open("a") as asked:
    asked.write(json.dumps(words) + "\\n")
for name, value in zip(words, words[1:]):
    if name in ("--output", "--output-dir"):
        Path(value).mkdir()
    if name == "--json":
        Path(value).write_text('{"gain_in_tau": {"low": LOW}}')
"""


@pytest.mark.parametrize(("low", "repo_id", "is_pushed"), [(0.01, "me/d", 1), (-0.01, "me/d", 0), (0.01, None, 0)])
def test_the_nightly_traffic_script_pushes_only_a_gain_clear_of_zero(monkeypatch, tmp_path, low, repo_id, is_pushed):
    stub = tmp_path / "bin" / "trl-draft-opd"
    stub.parent.mkdir()
    stub.write_text(f"#!{sys.executable}{STUB.replace('LOW', str(low))}", encoding="utf-8")
    stub.chmod(0o755)
    for hour in ("08", "09", "10"):
        (tmp_path / f"{hour}.jsonl").touch()
    monkeypatch.setenv("PATH", f"{stub.parent}:{Path(sys.executable).parent}:/usr/bin:/bin")
    words = ["bash", EXAMPLES / "nightly.sh", "target", "drafter", tmp_path, tmp_path / "work"]
    words += [] if repo_id is None else [repo_id, "--learning-rate", "1e-4"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    asked = [json.loads(line) for line in stub.with_name("asked.jsonl").read_text().splitlines()]
    names = ["import", "import", "opd", "evaluate", "evaluate", "export", "verify"]
    assert [command[0] for command in asked] == names + ["push"] * is_pushed, done.stderr
    train, held_out = (" ".join(command) for command in asked[:2])
    assert "08.jsonl" in train and "09.jsonl" in train and "10.jsonl" not in train and "10.jsonl" in held_out
    assert not (tmp_path / "work" / "train").exists() and not (tmp_path / "work" / "held-out").exists()
    (tmp_path / "work" / "export").mkdir(exist_ok=True)
    for command in asked:
        parse_ours(command, monkeypatch)


# ---- the notebook ---------------------------------------------------------------------------------------------------


def test_the_notebook_runs_in_miniature_and_shows_curves_and_coloured_text(monkeypatch, tmp_path, folder):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own draws inline
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    settings = next(cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", ()))
    settings.source += f"\nTARGET = {str(folder / 'target')!r}\nNUM_ROWS, MAX_TOKENS, EPOCHS = 8, 16, 1\n"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    html = "".join(output.get("data", {}).get("text/html", "") for output in shown)
    assert "<th>tau</th>" in html and "kept per slot" in html, "the table of updates"
    assert any("image/png" in output.get("data", {}) for output in shown), "curves"
    assert "target's own" in html.replace("&#x27;", "'") and "line-through" in html, "the coloured view"
    # A kernel without widgets has tqdm warn of their absence.
    said = "".join(output.get("text", "") for output in shown if output.get("name") == "stderr")
    assert not re.search("(?i)(?<!tqdm)warning|traceback", said), said
