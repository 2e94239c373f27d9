# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The parity gate: good exports pass in every consumer of this process, and each way an export goes wrong is caught and
named, though the text stays the target's own in all of them.
"""

import io
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from helpers.tiny import make_causal_lm, make_drafter, make_tokenizer
from trl_draft_opd import AutoDrafter, FrozenTarget, build_draft_vocabulary, evaluate_drafter
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.export import TargetOfExport, export_drafter
from trl_draft_opd.export.record import (
    Measurement,
    TrainingRecord,
    describe_target,
    prompts_digest,
    write_record,
)
from trl_draft_opd.parity import EngineSettings, training, verify_drafter
from trl_draft_opd.parity import compare as parity_compare
from trl_draft_opd.parity.compare import Outcome, Reference, compare
from trl_draft_opd.parity.consumers import rounds_of
from trl_draft_opd.parity.counting import anchors_of, started_within
from trl_draft_opd.parity.fingerprint import describe_gap, take_fingerprint
from trl_draft_opd.parity.report import VerificationReport
from trl_draft_opd.parity.scene import Scene, decode_plainly, decode_with_us, replay
from trl_draft_opd.rollout.blocks import sample_anchors
from trl_draft_opd.rollout.counts import Counts


IDS = "eagle_aux_hidden_state_layer_ids"
TRAINED_ON = [[9, 10, 11], [40, 21]]
PROMPTS = [[40, 21], [33, 8, 50, 12]]
NUM_TOKENS, NUM_DRAFTS = 18, 4


def greedy(target, prompt, num_tokens):
    """Return the target's greedy continuation, past any end of sequence, by the plainest loop there is."""
    ids = torch.tensor([prompt])
    for _ in range(num_tokens):
        ids = torch.cat([ids, target.causal_lm(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def train(target, drafter, texts, steps=60):
    """Overfit a drafter to the target's continuations of two prompts, so that blocks are kept in part and in full."""
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    names = {
        tuple(text.shape): target.read_text(text, torch.ones_like(text), drafter.config.target_layer_ids).padded()
        for text in texts
    }
    for step in range(steps):
        text, start = texts[step % 2], len(TRAINED_ON[step % 2])
        is_response = (torch.arange(text.shape[1]) >= start)[None]
        anchors = sample_anchors(text, is_response, [0], num_anchors=None, num_drafts=NUM_DRAFTS, seed=0, epoch=0)
        features = names[tuple(text.shape)].features
        hidden = run_blocks(drafter, features, text, anchors.anchors, anchors.drafts, target.embed)
        logits, labels = drafter.draft_logits(hidden, target.project), anchors.labels
        is_learned = anchors.is_accepted
        if drafter.draft_token_ids is not None:
            place = torch.full((64,), -1).index_put(
                (drafter.draft_token_ids,), torch.arange(len(drafter.draft_token_ids))
            )
            labels = place[labels.clamp(min=0)]
            is_learned = is_learned & (labels >= 0)
        loss = torch.nn.functional.cross_entropy(logits[is_learned], labels[is_learned])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A tiny target that also lies in a folder."""
    folder = tmp_path_factory.mktemp("target")
    make_causal_lm("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return FrozenTarget.load(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def published(tmp_path_factory, target):
    """By name, a trained checkpoint and its export."""
    place = tmp_path_factory.mktemp("published")
    continuations = [greedy(target, prompt, 36) for prompt in TRAINED_ON]
    texts = [torch.tensor([prompt + text]) for prompt, text in zip(TRAINED_ON, continuations, strict=True)]
    counts = torch.bincount(torch.tensor(sum(continuations, [])), minlength=64)
    drafters = {
        "eagle3": make_drafter("eagle3", target),
        "reduced": make_drafter("eagle3", target, draft_vocabulary=build_draft_vocabulary(counts, 40)),
        "dflash": make_drafter("dflash", target),
    }
    with torch.no_grad():
        # Layers whose key norms differ, as they do once they are trained for long.
        drafters["dflash"].layers[1].self_attn.k_norm.weight.mul_(torch.linspace(0.3, 3.0, 8))
    folders = {}
    for name, drafter in drafters.items():
        train(target, drafter, texts)
        drafter.save_pretrained(place / f"{name}-checkpoint")
        export(drafter, target, place / name)
        folders[name] = (place / f"{name}-checkpoint", place / name)
    return folders


def export(drafter, target, folder, **options):
    stored = load_file(f"{target.causal_lm.config.name_or_path}/model.safetensors")["model.embed_tokens.weight"]
    facts = TargetOfExport("org/target", target.causal_lm.config, stored)
    return export_drafter(drafter, folder, target=facts, **options)


@pytest.fixture
def copy(tmp_path, published):
    """Return a copy of an export, to be spoilt."""

    def make(name):
        shutil.copytree(published[name][1], tmp_path / name)
        return tmp_path / name

    return make


def verify(folder, target, **options):
    """Verify an export, as its own checkpoint unless told otherwise: the search for suspects is slow."""
    defaults = {"consumers": ["transformers", "custom_generate"], "trust_remote_code": True, "checkpoint": folder}
    options = defaults | options
    return verify_drafter(folder, target, PROMPTS, max_completion_length=NUM_TOKENS, **options)


def edit_config(folder, change):
    """Change every layout's config as `change(config)` says."""
    for path in [folder / "config.json", *folder.glob("*/config.json")]:
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    for path in [folder / "model.safetensors", *folder.glob("*/model.safetensors")]:
        save_file(change(load_file(path)), path, metadata={"format": "pt"})


def read_other_layer(config, places=slice(1)):
    """Shift layer ids, the first one, by one in all the places a layout writes them, so that no rule sees it."""
    for key in (IDS, "aux_hidden_state_layer_ids", "target_layer_ids"):
        for section in (config, config.get("eagle_config"), config.get("dflash_config")):
            if section and key in section:
                section[key][places] = [i - 1 for i in section[key][places]]


# ---- good exports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eagle3", "reduced", "dflash"])
def test_a_good_export_passes_in_every_consumer_of_this_process(published, target, name):
    checkpoint, folder = published[name]
    report = verify(folder, target, checkpoint=checkpoint)
    assert report.ok, report.problems
    assert report.notes == []
    names = ["reference", "estimate", *(["transformers"] if name == "dflash" else []), "custom_generate"]
    assert [row.name for row in report.rows] == names
    assert {row.num_other_chains for row in report.rows} == {0}
    assert {row.num_different for row in report.rows} == {0, None}
    assert len({(row.tau, row.num_rounds) for row in report.rows}) == 1
    # Blocks are kept in part: neither all nor none of the drafts are.
    assert 1.4 < report.rows[0].tau < NUM_DRAFTS + 1


def test_what_is_not_run_is_listed_with_its_reason(published, target):
    report = verify(
        published["eagle3"][1], target, consumers=["custom_generate", "vllm"], trust_remote_code=False, checkpoint=None
    )
    assert (
        report.skipped["custom_generate"] == "it is code from the folder, and is run with `--trust-remote-code` alone"
    )
    assert report.skipped["vllm"] == "vllm is not installed"
    assert report.skipped["transformers"] == report.skipped["sglang"] == "not asked for"
    assert "--checkpoint" in report.skipped["checkpoint"]
    assert report.ok and [row.name for row in report.rows] == ["reference", "estimate"]


def test_fewer_drafts_than_trained_skip_what_cannot_make_them(published, target):
    report = verify(published["dflash"][1], target, num_drafts=2)
    assert report.ok and report.num_drafts == 2
    assert "always drafts 4 tokens per block, not 2" in report.skipped["transformers"]
    shorter = verify(published["eagle3"][1], target, num_drafts=2)
    assert shorter.ok and [len(row.acceptance_per_slot) for row in shorter.rows] == [2, 2, 2]


def test_a_training_checkpoint_itself_can_be_verified(published, target):
    checkpoint = published["dflash"][0]
    report = verify(checkpoint, target, checkpoint=checkpoint)
    assert report.ok, report.problems
    assert "no export of this package" in report.skipped["rules"]


def test_a_report_is_plain_json_and_prints(published, target):
    report = verify(published["eagle3"][1], target, consumers=[])
    again = json.loads(json.dumps(report.to_dict()))
    assert again["ok"] is True and again["rows"][0]["tau"] == report.rows[0].tau
    console = Console(width=120, file=io.StringIO())
    console.print(report.table("title"))
    printed = console.file.getvalue()
    assert f"{report.rows[0].tau:.4f}" in printed and "2 of 2" in printed and "our own loop" in printed


# ---- exports gone wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_a_wrong_layer_id_is_named_beside_the_right_one(copy, published, target, name):
    folder = copy(name)
    edit_config(folder, read_other_layer)
    report = verify(folder, target, checkpoint=published[name][0])
    assert not report.ok
    told = next(problem for problem in report.problems if "The export is not its checkpoint" in problem)
    right = AutoDrafter.from_pretrained(published[name][0]).config.target_layer_ids
    wrong = [right[0] - 1, *right[1:]]
    assert f"reads the target's layers {wrong}, the checkpoint those {right}" in told
    # No rule on the files and no output shows it.
    assert not any("layout: C" in problem for problem in report.problems)
    assert report.rows[0].num_different == 0


def test_a_wrong_layer_id_is_suspected_without_any_checkpoint(copy, target):
    folder = copy("eagle3")
    # As a writer does who counts layers from one.
    edit_config(folder, partial(read_other_layer, places=slice(None)))
    # Prompts that all lead into a text that the drafter knows.
    text = TRAINED_ON[0] + greedy(target, TRAINED_ON[0], 10)
    prompts = [text[:length] for length in range(len(TRAINED_ON[0]), len(text))]
    report = verify_drafter(folder, target, prompts, max_completion_length=24, consumers=[])
    assert not report.ok
    assert "The layer ids [0, 2, 3] look wrong: with [1, 3, 4] tau is" in report.problems[0]
    assert "layer ids" not in report.skipped
    # Too few to tell, and the same ones again are no more.
    report = verify_drafter(folder, target, prompts[:4] * 3, max_completion_length=12, consumers=[])
    assert report.ok
    assert report.skipped["layer ids"].startswith("4 different prompts cannot tell a wrong one from chance; give 9 ")


def test_a_good_export_is_not_suspected_by_chance_however_few_the_prompts(monkeypatch, published, target):
    # Each prompt has taus by chance for every choice of layers, the named ones included: a good export of a drafter
    # that does not care which layers it reads.
    scene = make_scene(target, published["eagle3"][1])
    named = list(scene.drafter.config.target_layer_ids)
    generator = torch.Generator().manual_seed(0)

    def draw(scene, drafter, responses):
        return [torch.randint(0, NUM_DRAFTS + 1, (6,), generator=generator).tolist() for _ in responses]

    monkeypatch.setattr(training, "replay", draw)
    alarms = dict.fromkeys((1, 4, 12, 32), 0)
    for num_prompts in alarms:
        few = replace(scene, prompts=[[number, 9] for number in range(num_prompts)])
        for _ in range(100):
            report = VerificationReport("", "", num_prompts, NUM_DRAFTS, NUM_TOKENS)
            alarms[num_prompts] += training._suspect_layer_ids(few, [[]] * num_prompts, report) is not None
    assert list(scene.drafter.config.target_layer_ids) == named
    # By the largest tau alone, most of these would be suspected.
    assert max(alarms.values()) <= 2


def test_the_number_of_wins_that_chance_does_not_explain_is_that_of_a_fair_coin():
    assert training._least_wins(3, 0.01) == 4  # three of three are 1 in 8
    assert training._least_wins(7, 0.01) == 7  # seven of seven are 1 in 128
    assert training._least_wins(10, 0.06) == 8  # (1 + 10 + 45) / 1024 is 5.5 %
    assert training._least_wins(10, 0.05) == 9


def test_a_near_tie_is_no_gap_however_few_the_rounds(published, target, monkeypatch):
    scene = make_scene(target, published["eagle3"][1])
    texts, chains = decode_with_us(scene)
    other = [list(chain) for chain in chains]
    place = next(index for index, kept in enumerate(other[0]) if kept > 0)
    other[0][place] -= 1
    outcome = Outcome("engine", None, other, None, "")
    reference = Reference(decode_plainly(scene), chains)
    monkeypatch.setattr(parity_compare, "_draft_gap", lambda *_: 1e-4)
    verdict = compare(scene, reference, outcome, 0.001)
    assert verdict.problems == [] and "near ties of two drafts" in verdict.notes[0]
    monkeypatch.setattr(parity_compare, "_draft_gap", lambda *_: 1.0)
    assert compare(scene, reference, outcome, 0.001).problems


def test_a_wrong_layer_id_in_one_layout_names_that_layout(copy, target):
    folder = copy("eagle3")
    edit_config(folder / "speculators", read_other_layer)
    report = verify(folder, target, consumers=[])
    (problem,) = report.problems
    assert problem.startswith("speculators layout: ") and "reads the target's layers [0, 3, 4]" in problem


def give_stale_vocabulary(tensors):
    """Replace the draft vocabulary by another one of the same size, consistent in itself."""
    size = len(tensors["d2t"])
    token_ids = torch.arange(64)[-size:]
    t2d = torch.zeros(64, dtype=torch.bool)
    t2d[token_ids] = True
    return tensors | {"d2t": token_ids - torch.arange(size), "t2d": t2d}


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_stale_draft_vocabulary_is_named_with_and_without_checkpoint(copy, published, target, with_checkpoint):
    folder = copy("reduced")
    edit_tensors(folder, give_stale_vocabulary)
    checkpoint = published["reduced"][0] if with_checkpoint else None
    report = verify(folder, target, consumers=[], checkpoint=checkpoint)
    assert not report.ok
    expected = "its d2t differs from the checkpoint's" if with_checkpoint else "D2t looks stale"
    assert any(expected in problem for problem in report.problems), report.problems
    assert not any("C11" in problem for problem in report.problems)


def test_a_cast_to_float16_is_named_by_rule_and_by_weights(copy, published, target):
    checkpoint, _ = published["dflash"]
    trained = AutoDrafter.from_pretrained(checkpoint)
    folder = copy("dflash")
    own = {name: tensor.half() for name, tensor in trained.state_dict().items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    report = verify(folder, target, checkpoint=checkpoint, consumers=[])
    assert any("flat layout: C6: weights must be bfloat16" in problem for problem in report.problems)
    assert any("were rounded to float16" in problem for problem in report.problems)


def test_weights_of_another_step_are_told_from_a_rounding(copy, published, target):
    folder = copy("eagle3")
    edit_tensors(folder, lambda tensors: tensors | {"norm.weight": tensors["norm.weight"] * 1.5})
    report = verify(folder, target, checkpoint=published["eagle3"][0], consumers=[])
    assert any("1 tensors differ: norm.weight by up to" in problem for problem in report.problems)


def test_a_drafter_that_cannot_be_loaded_is_a_problem_and_no_crash(copy, target):
    folder = copy("eagle3")
    edit_tensors(folder, lambda tensors: {name: t for name, t in tensors.items() if name != "fc.weight"})
    report = verify(folder, target)
    assert not report.ok and report.rows == []
    assert "cannot be loaded" in report.problems[-1] and "fc.weight" in report.problems[-1]


def test_a_consumer_that_refuses_the_export_is_named(copy, target):
    folder = copy("eagle3")
    (folder / "custom_generate" / "generate.py").write_text(
        "def generate(model, **options):\n    raise ValueError('no')\n"
    )
    report = verify(folder, target)
    assert report.problems == ["custom_generate does not decode with this export: ValueError: no"]


def test_a_consumer_that_drafts_otherwise_is_caught_though_its_text_is_right(copy, target):
    folder = copy("eagle3")
    code = folder / "custom_generate" / "drafters.py"
    text = code.read_text()
    assert text.count("position = keys.shape[2] - 1") == 1
    # Positions of later slots one too far.
    code.write_text(text.replace("position = keys.shape[2] - 1", "position = keys.shape[2]"))
    report = verify(folder, target)
    row = report.rows[-1]
    assert row.name == "custom_generate" and row.num_different == 0 and row.num_other_chains > 0
    assert not report.ok and "custom_generate: tau is" in report.problems[0]


# ---- the record -----------------------------------------------------------------------------------------------------


def record_of(target, folder, **changes):
    drafter = AutoDrafter.from_pretrained(folder)
    found = evaluate_drafter(
        target, drafter, PROMPTS, max_completion_length=16, compare_with_target=False, show_progress=False
    )
    shared = "num_prompts temperature num_drafts batch_size tau tau_low tau_high acceptance_per_slot num_blocks"
    values = {name: getattr(found, name) for name in [*shared.split(), "num_different"]} | {
        "prompt_set": "some",
        "prompts_sha256": prompts_digest(PROMPTS),
        "draft_sampling": "greedy",
        "max_completion_length": 16,
        "ignore_eos": False,
        "target_dtype": "float32",
    }
    described = describe_target(target.config, name=None, revision=None)
    return TrainingRecord(described, drafter.config.family, [], [Measurement(**values | changes)], {})


def test_the_recorded_tau_is_measured_again_and_must_be_met(copy, target):
    folder = copy("eagle3")
    write_record(record_of(target, folder), folder)
    report = verify(folder, target, consumers=[])
    assert report.ok and report.rows[-1].name == "recorded"
    assert "Counted as in training and `evaluate`: blocks inside responses of up to 16" in report.rows[-1].remark
    write_record(record_of(target, folder, tau=4.5, tau_low=4.4, tau_high=4.6), folder)
    report = verify(folder, target, consumers=[])
    assert report.ok and "the interval of 2 prompts is too narrow to judge by" in report.notes[0]
    write_record(record_of(target, folder, tau=4.5, tau_low=4.4, tau_high=4.6, num_prompts=10), folder)
    report = verify(folder, target, consumers=[])
    assert "was recorded before" in report.problems[0] and "outside of the recorded interval" in report.problems[0]
    # Within its noise, it is worth a note.
    write_record(record_of(target, folder, tau=4.5, tau_low=1.0, tau_high=4.6), folder)
    report = verify(folder, target, consumers=[])
    assert report.ok and "lies in the recorded interval" in report.notes[0]


def test_a_record_of_other_prompts_is_skipped_and_said_so(copy, target):
    folder = copy("eagle3")
    write_record(record_of(target, folder, prompts_sha256="0" * 64), folder)
    report = verify(folder, target, consumers=[])
    assert report.skipped["record"] == "none of its measurements is of these prompts"


# ---- engines, played by a script ------------------------------------------------------------------------------------


def make_scene(target, folder):
    drafter = AutoDrafter.from_pretrained(folder)
    return Scene(target, None, folder, drafter, PROMPTS, NUM_DRAFTS, NUM_TOKENS)


def play_engine(tmp_path, lines, reply=None):
    """Return settings whose interpreter is a script: it finds every module, and runs `lines` in place of a worker."""
    (tmp_path / "reply.json").write_text(json.dumps(reply))
    script = tmp_path / "python"
    body = ["import shutil, sys, time", "if '-c' in sys.argv: sys.exit(0)", *lines]
    script.write_text(f"#!{sys.executable}\n" + "\n".join(body) + "\n")
    script.chmod(0o755)
    return EngineSettings(python=str(script), timeout=1.0 if any("sleep" in line for line in lines) else 60.0)


REPLIES = ["shutil.copy(__file__.replace('python', 'reply.json'), sys.argv[-1])"]


def reply_of(scene, chains, **changes):
    counts = Counts.of_chains(chains, NUM_DRAFTS)
    sums = {"num_rounds": counts.num_blocks, "kept_at_slot": list(counts.kept_at_slot)}
    responses = [response[:NUM_TOKENS] for response in decode_plainly(scene)]
    return {"version": "9", "responses": responses, "accepted": chains} | sums | changes


def test_an_engine_that_takes_our_rounds_passes(tmp_path, published, target):
    folder = published["eagle3"][1]
    scene = make_scene(target, folder)
    _, chains = decode_with_us(scene)
    settings = play_engine(tmp_path, REPLIES, reply_of(scene, chains))
    report = verify(folder, target, consumers=["vllm"], engines=settings)
    assert report.ok and report.rows[-1].name == "vllm" and report.rows[-1].num_other_chains == 0
    assert report.rows[-1].num_rounds == report.rows[0].num_rounds
    # An engine that tells sums alone is held to those.
    settings = play_engine(tmp_path, REPLIES, reply_of(scene, chains, accepted=None))
    report = verify(folder, target, consumers=["vllm"], engines=settings)
    assert report.ok and report.rows[-1].num_other_chains is None
    assert report.rows[-1].tau == report.rows[0].tau


def test_an_engine_that_keeps_no_drafts_is_a_problem_with_a_hint(tmp_path, published, target):
    folder = published["eagle3"][1]
    scene = make_scene(target, folder)
    settings = play_engine(tmp_path, REPLIES, reply_of(scene, [[0] * (NUM_TOKENS - 1)] * 2))
    report = verify(folder, target, consumers=["vllm"], engines=settings)
    (problem,) = report.problems
    assert "vllm: tau is 1.0000 instead of" in problem and "the two best logits of slot" in problem
    assert "look at the layer ids as this consumer counts them" in problem


def test_an_engine_that_writes_other_text_is_a_problem(tmp_path, published, target):
    folder = published["eagle3"][1]
    scene = make_scene(target, folder)
    _, chains = decode_with_us(scene)
    reply = reply_of(scene, chains)
    reply["responses"][1][5] ^= 1
    report = verify(folder, target, consumers=["vllm"], engines=play_engine(tmp_path, REPLIES, reply))
    assert "vllm: 1 of 2 outputs are not the target's own: response 1 from token 5 on" in report.problems[0]
    assert "its plain decoding writes the same outputs" in report.notes[-1]
    # In half precision a choice between close tokens may differ, so it is told and let pass.
    half = EngineSettings(python=str(tmp_path / "python"), dtype="bfloat16")
    assert verify(folder, target, consumers=["vllm"], engines=half).ok


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["print('page size mismatch'); sys.exit(3)"], "vllm ended with code 3:\npage size mismatch"),
        (["time.sleep(60)"], "vllm took more than 1 s"),
    ],
)
def test_an_engine_that_fails_is_a_problem_with_its_last_words(
    tmp_path, published, target, monkeypatch, lines, expected
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report = verify(published["eagle3"][1], target, consumers=["vllm"], engines=play_engine(tmp_path, lines))
    assert expected in report.problems[0]


def test_an_engine_that_fails_names_the_first_error_and_where_its_whole_log_lies(
    tmp_path, published, target, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    log = [
        "INFO starting",
        *(f"INFO step {i}" for i in range(50)),
        "(EngineCore pid=7) Traceback (most recent call last):",
    ]
    log += [
        "(EngineCore pid=7) ERROR [core.py:700] ValueError: No room for the KV cache; raise gpu_memory_utilization"
    ]
    log += ["(EngineCore pid=7) ValueError: No room for the KV cache; raise gpu_memory_utilization"]
    log += [f'  File "engine.py", line {i}' for i in range(60)]
    log += ["RuntimeError: Engine core initialization failed. See root cause above.", "[rank0] destroyed", "bye"]
    lines = [f"print({line!r})" for line in log] + ["sys.exit(1)"]
    report = verify(published["eagle3"][1], target, consumers=["vllm"], engines=play_engine(tmp_path, lines))
    told = report.problems[0].splitlines()
    assert told[1] == "  ValueError: No room for the KV cache; raise gpu_memory_utilization"
    assert told[2].startswith("  RuntimeError: Engine core initialization failed")
    assert "step 3" not in report.problems[0] and len(told) < 12
    place = Path(told[-1].removeprefix("Its whole log: "))
    assert place.read_text() == "\n".join(log) + "\n"


def test_counters_that_contradict_the_requests_are_a_problem(tmp_path, published, target):
    folder = published["eagle3"][1]
    scene = make_scene(target, folder)
    _, chains = decode_with_us(scene)
    settings = play_engine(tmp_path, REPLIES, reply_of(scene, chains, num_rounds=1))
    report = verify(folder, target, consumers=["vllm"], engines=settings)
    assert "vllm counts 1 rounds" in report.problems[0]


# ---- counting -------------------------------------------------------------------------------------------------------


def test_rounds_start_within_the_limit_and_count_whole():
    # Anchors 0, 3, 4, 10: to write 11 tokens an engine runs the first three rounds alone, to write 12 all four.
    assert anchors_of([2, 0, 5, 1]) == [0, 3, 4, 10]
    assert started_within([2, 0, 5, 1], 11) == [2, 0, 5]
    assert started_within([2, 0, 5, 1], 12) == [2, 0, 5, 1]
    counts = Counts.of_chains([[2, 0, 5], [1]], 5)
    assert counts.pooled() == Counts((4,), ((3, 2, 1, 1, 1),)) and counts.tau == 3.0


def test_rounds_are_read_off_the_targets_forward_passes():
    # A prompt of 7 tokens; passes over the anchor and 3 drafts at positions 7, 10 and 11.
    assert rounds_of([(0, 7), (7, 4), (10, 4), (11, 4)], 7, 100) == [2, 0]
    with pytest.raises(ValueError, match="not one over the prompt of 7"):
        rounds_of([(0, 5), (5, 2)], 7, 100)
    # As read where the target's cache is handed over under a name that is not known.
    for unseen in ([(0, 7), (0, 4), (0, 4)], [(0, 7), (7, 4), (7, 4)], [(0, 7), (6, 4)]):
        with pytest.raises(ValueError, match="must rise from there, so its rounds cannot be counted"):
            rounds_of(unseen, 7, 100)


def test_the_estimate_of_training_takes_the_rounds_of_decoding(published, target):
    scene = make_scene(target, published["dflash"][1])
    texts, chains = decode_with_us(scene)
    responses = decode_plainly(scene)
    assert texts == responses == [greedy(target, prompt, scene.num_decoded) for prompt in PROMPTS]
    assert replay(scene, scene.drafter, responses) == chains


def test_a_difference_without_a_near_tie_is_no_small_matter(published, target):
    scene = make_scene(target, published["eagle3"][1])
    texts, chains = decode_with_us(scene)
    reference = Reference(texts, chains)
    # One more draft in a block that ends there for a clear reason, within a tolerance that lets everything pass.
    changed = [list(chain) for chain in chains]
    row, index = next((r, i) for r, chain in enumerate(chains) for i, kept in enumerate(chain) if kept < NUM_DRAFTS)
    changed[row][index] += 1
    outcome = Outcome("other", None, changed, None, "")
    verdict = compare(scene, reference, outcome, tolerance=10.0)
    assert len(verdict.problems) == 1 and "No near tie explains it" in verdict.problems[0]
    assert compare(scene, Reference(texts, chains, is_exact=False), outcome, tolerance=10.0).problems == []
    assert compare(scene, reference, Outcome("same", None, chains, None, ""), tolerance=0.0).problems == []


@pytest.mark.parametrize("place", [0, 1, NUM_TOKENS - 2, NUM_TOKENS - 1])
@pytest.mark.parametrize("row", [0, 1])
def test_a_difference_is_found_as_late_as_in_the_last_token_and_named_with_its_place(published, target, place, row):
    scene = make_scene(target, published["eagle3"][1])
    texts, chains = decode_with_us(scene)
    changed = [list(text) for text in texts]
    changed[row][place] ^= 1
    verdict = compare(scene, Reference(texts, chains), Outcome("other", changed, None, None, ""), tolerance=0.0)
    assert f"1 of 2 outputs are not the target's own: response {row} from token {place} on" in verdict.problems[0]
    # A text that ends early is another one too, and what is decoded past the limit is not compared.
    changed = [
        text[: place if number == row else NUM_TOKENS] + [1] * (number != row) for number, text in enumerate(texts)
    ]
    verdict = compare(scene, Reference(texts, chains), Outcome("other", changed, None, None, ""), tolerance=0.0)
    assert f"1 of 2 outputs are not the target's own: response {row} from token {place} on" in verdict.problems[0]


@pytest.mark.parametrize("row", [0, 1])
def test_a_difference_in_the_last_round_is_found(published, target, row):
    scene = make_scene(target, published["eagle3"][1])
    texts, chains = decode_with_us(scene)
    changed = [list(chain) for chain in chains]
    changed[row][-1] += 1 if changed[row][-1] == 0 else -1
    verdict = compare(scene, Reference(texts, chains), Outcome("other", None, changed, None, ""), tolerance=0.0)
    assert len(verdict.problems) == 1 and f"prompt {row}, block at token" in verdict.problems[0]
    assert verdict.row.num_other_chains == 1
    changed[row] = chains[row][:-1]
    verdict = compare(scene, Reference(texts, chains), Outcome("other", None, changed, None, ""), tolerance=10.0)
    assert f"prompt {row}: {len(changed[row])} rounds instead of {len(chains[row])}" in verdict.problems[0]


def test_fingerprints_of_one_drafter_agree_and_of_two_differ(published, target):
    drafter = AutoDrafter.from_pretrained(published["eagle3"][1])
    own = take_fingerprint(target, drafter, NUM_DRAFTS)
    again = take_fingerprint(target, AutoDrafter.from_pretrained(published["eagle3"][1] / "speculators"), NUM_DRAFTS)
    assert describe_gap(own, again) is None
    other = take_fingerprint(target, make_drafter("eagle3", target, seed=5), NUM_DRAFTS)
    assert "drafts differ on a fixed text" in describe_gap(own, other)


# ---- bad requests ---------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_met_say_what_to_do(tmp_path, published, target):
    folder = published["eagle3"][1]
    with pytest.raises(ValueError, match=r"Unknown consumers \['vlm'\]; there are"):
        verify(folder, target, consumers=["vlm"])
    with pytest.raises(ValueError, match="load it with `dtype=torch.float32`"):
        verify(folder, FrozenTarget(make_causal_lm().to(torch.bfloat16)))
    with pytest.raises(ValueError, match="got 0 prompts"):
        verify_drafter(folder, target, [])
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        verify(tmp_path / "nowhere", target)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        verify(tmp_path, target)
