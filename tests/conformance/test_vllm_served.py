# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Exported drafters in vLLM itself, on the CPU: its outputs are the target's own, and it keeps our drafts round by round.

Runs with `-m conformance --shared PATH`, in the environment that `make conformance` builds. `--drafters PATH` names a
folder with trained drafters, `eagle3/` and `dflash/`; without it, short ones are trained here, good enough that
acceptance is put to the test.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from helpers.vllm_process import require_vllm
from trl_draft_opd import (
    AutoDrafter,
    DFlashDraftModel,
    Eagle3DraftModel,
    FrozenTarget,
    build_draft_vocabulary,
)
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.export import export_drafter, read_target
from trl_draft_opd.parity import EngineSettings, verify_drafter
from trl_draft_opd.parity.compare import Reference, compare
from trl_draft_opd.parity.engines import run_engine
from trl_draft_opd.parity.scene import GREEDY, Scene, decode_plainly, decode_with_us
from trl_draft_opd.responses import generate_responses
from trl_draft_opd.rollout.blocks import sample_anchors


pytestmark = pytest.mark.conformance

NUM_PROMPTS, NUM_TOKENS = 50, 48
# Enough to compare what the first 50 prompts have shown already.
NUM_FEW = 6
NUM_TRAINED_ON, TRAINED_LENGTH = 96, 96
# DFlash needs more steps until its drafts are kept often enough to test anything.
NUM_STEPS = {"eagle3": 150, "dflash": 320}
TARGET_ID = "local/gsm8k-qwen3-7m"
FAMILIES = ("eagle3", "dflash")
# One request at a time, as the reference decodes.
ENGINE = EngineSettings(timeout=600.0)


@pytest.fixture(scope="module")
def target_folder(shared_dir: Path) -> Path:
    require_vllm()
    return shared_dir / "targets" / "gsm8k-qwen3-7m"


@pytest.fixture(scope="module")
def target(target_folder: Path) -> FrozenTarget:
    return FrozenTarget.load(target_folder, dtype=torch.float32)


def read_prompts(shared_dir: Path, target: FrozenTarget, name: str, count: int) -> list[list[int]]:
    with (shared_dir / "data" / name).open(encoding="utf-8") as lines:
        questions = [json.loads(next(lines))["question"] for _ in range(count)]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    chats = [[{"role": "user", "content": question}] for question in questions]
    return [target.tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]


@pytest.fixture(scope="module")
def prompts(shared_dir: Path, target: FrozenTarget) -> list[list[int]]:
    return read_prompts(shared_dir, target, "gsm8k_test.jsonl", NUM_PROMPTS)


@pytest.fixture(scope="module")
def texts(shared_dir: Path, target: FrozenTarget) -> list[tuple[list[int], list[int]]]:
    """Prompts to train on, with the target's responses."""
    asked = read_prompts(shared_dir, target, "gsm8k_train.jsonl", NUM_TRAINED_ON)
    options = {"sampling": GREEDY, "batch_size": 32, "seed": 0, "show_progress": False}
    return list(
        zip(asked, generate_responses(target, asked, max_completion_length=TRAINED_LENGTH, **options), strict=True)
    )


def make_fresh(family: str, target: FrozenTarget, texts: list) -> Eagle3DraftModel | DFlashDraftModel:
    torch.manual_seed(0)
    if family == "dflash":
        drafter = DFlashDraftModel.from_target(target, mask_token_id=3, num_hidden_layers=2, block_size=6)
        with torch.no_grad():
            # As long training makes them: no layer's norm of keys is another's.
            drafter.layers[1].self_attn.k_norm.weight.mul_(torch.linspace(0.5, 1.5, drafter.config.head_dim))
        return drafter
    written = torch.tensor([token for _, response in texts for token in response])
    counts = torch.bincount(written, minlength=target.vocab_size)
    # A reduced vocabulary, so that the engine's use of d2t is put to the test.
    vocabulary = build_draft_vocabulary(counts, 2048, target.eos_token_ids)
    return Eagle3DraftModel.from_target(target, ttt_steps=4, draft_vocabulary=vocabulary)


def train_short(family: str, target: FrozenTarget, texts: list) -> Eagle3DraftModel | DFlashDraftModel:
    """Train a fresh drafter by the plain supervised loss, a few rows at a time."""
    drafter = make_fresh(family, target, texts)
    num_drafts = drafter.default_num_drafts
    place = None
    if drafter.draft_token_ids is not None:
        size = len(drafter.draft_token_ids)
        place = torch.full((target.vocab_size,), -1).index_put((drafter.draft_token_ids,), torch.arange(size))
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=NUM_STEPS[family], pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(NUM_STEPS[family]):
        picks = torch.randint(len(texts), (4,), generator=generator).tolist()
        rows = [torch.tensor([*texts[row][0], *texts[row][1]]) for row in picks]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths, starts = (
            torch.tensor(sizes)[:, None]
            for sizes in ([len(row) for row in rows], [len(texts[row][0]) for row in picks])
        )
        index = torch.arange(ids.shape[1])
        mask, is_response = (index < lengths).long(), (index >= starts) & (index < lengths)
        features = target.read_text(ids, mask, drafter.config.target_layer_ids).padded().features
        anchors = sample_anchors(ids, is_response, picks, num_anchors=24, num_drafts=num_drafts, seed=0, epoch=step)
        hidden = run_blocks(drafter, features, ids, anchors.anchors, anchors.drafts, target.embed)
        is_learned, labels = anchors.is_accepted, anchors.labels
        if place is not None:
            labels = place[labels.clamp(min=0)]
            is_learned = is_learned & (labels >= 0)
        logits = drafter.draft_logits(hidden[is_learned], target.project)
        loss = torch.nn.functional.cross_entropy(logits, labels[is_learned])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return drafter.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, pytestconfig, target, target_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A trained checkpoint and its export."""
    place, given = tmp_path_factory.mktemp("published"), pytestconfig.getoption("--drafters")
    if given is None:
        checkpoint = place / "checkpoint"
        train_short(request.param, target, request.getfixturevalue("texts")).save_pretrained(checkpoint)
    else:
        checkpoint = (pytestconfig.invocation_params.dir / given / request.param).resolve()
    folder = place / f"gsm8k-{request.param}"
    drafter = AutoDrafter.from_pretrained(checkpoint)
    facts = read_target(target_folder, target_id=TARGET_ID)
    export_drafter(drafter, folder, repo_id=f"local/gsm8k-{request.param}", target=facts)
    return checkpoint, folder


def make_scene(target: FrozenTarget, folder: Path, prompts: list[list[int]]) -> Scene:
    drafter = AutoDrafter.from_pretrained(folder)
    name = target.causal_lm.config.name_or_path
    return Scene(target, name, folder, drafter, prompts, drafter.default_num_drafts, NUM_TOKENS, engines=ENGINE)


def cache_as(name: str, folder: Path) -> None:
    """Put a folder where a download from the Hub would lie."""
    place = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
    revision = "0" * 40
    snapshot = place / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(revision)
    for file in folder.iterdir():
        if file.is_file() and not (snapshot / file.name).exists():
            (snapshot / file.name).symlink_to(file)


def test_an_export_served_by_vllm_keeps_the_drafts_it_was_trained_to(published, target, prompts):
    checkpoint, folder = published
    options = {"checkpoint": checkpoint, "consumers": ["vllm"], "max_completion_length": NUM_TOKENS, "engines": ENGINE}
    report = verify_drafter(folder, target, prompts, **options)
    assert report.problems == []
    rows = {row.name: row for row in report.rows}
    ours, served = rows["reference"], rows["vllm"]
    assert ours.tau > 1.3, f"tau {ours.tau:.3f} hardly tests acceptance"
    assert served.num_different == 0
    assert abs(served.tau / ours.tau - 1) <= 0.01, report.notes
    for own, theirs in zip(ours.acceptance_per_slot, served.acceptance_per_slot, strict=True):
        assert abs(own - theirs) <= 0.01, report.notes
    # Equal to the last round, or reported why not.
    assert (served.num_other_chains == 0) == (report.notes == [])
    assert rows["estimate"].num_other_chains == 0
    # Where this fails for DFlash, vLLM has mended its kernel, and `mend_norms` can go.
    assert ("mended here" in served.remark) == (report.family == "dflash"), served.remark


def test_one_argument_serves_the_speculators_layout(published, target, prompts):
    _, folder = published
    scene = make_scene(target, folder, prompts[:NUM_FEW])
    cache_as(TARGET_ID, Path(scene.target_name))
    # EAGLE-3 as a repository of the Hub, DFlash as a folder: vLLM takes the target and all settings from the config.
    model = str(folder / "speculators")
    if scene.drafter.config.family == "eagle3":
        model = "local/gsm8k-eagle3-speculators"
        cache_as(model, folder / "speculators")
    outcome = run_engine("vllm", scene, model=model)
    texts, chains = decode_with_us(scene)
    assert [response[:NUM_TOKENS] for response in texts] == outcome.responses
    assert outcome.chains is not None
    verdict = compare(scene, Reference(texts, chains), outcome, tolerance=0.02)
    assert abs(verdict.row.tau / compare_tau(chains) - 1) <= 0.02


def compare_tau(chains: list[list[int]]) -> float:
    rounds = [accepted + 1 for chain in chains for accepted in chain]
    return sum(rounds) / len(rounds)


def test_every_other_consumer_of_this_environment_agrees(published, target, prompts):
    _, folder = published
    consumers = ["transformers", "custom_generate", "speculators"]
    options = {
        "checkpoint": folder,
        "consumers": consumers,
        "max_completion_length": NUM_TOKENS,
        "trust_remote_code": True,
    }
    report = verify_drafter(folder, target, prompts[:NUM_FEW], **options)
    assert report.ok, report.problems
    ran = [row.name for row in report.rows]
    assert ran[2:] == (consumers if report.family == "dflash" else consumers[1:]), report.skipped
    assert {row.num_other_chains for row in report.rows} == {0} or report.notes


def test_vllm_without_a_drafter_writes_the_targets_own_text(published, target, prompts):
    scene = make_scene(target, published[1], prompts[:NUM_FEW])
    if scene.drafter.config.family != "eagle3":
        pytest.skip("plain decoding needs no drafter: once is enough")
    outcome = run_engine("vllm", scene, is_plain=True)
    assert outcome.chains is None
    assert outcome.responses == [response[:NUM_TOKENS] for response in decode_plainly(scene)]
