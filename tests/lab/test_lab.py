# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The laboratory: plans, plateaus, counted FLOPs, arms that resume, and a target that remembers without changing
anything.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.lab import arms as arms_module
from benchmarks.lab.__main__ import parse_arguments, run
from benchmarks.lab.arms import arm_settings, collect, make_trainer, measure_start, run_arm
from benchmarks.lab.compare_rollouts import compare_rollouts
from benchmarks.lab.diagnose import diagnose_states
from benchmarks.lab.measure import measure_drafter
from benchmarks.lab.memo import RememberingTarget
from benchmarks.lab.plan import FOLDER, Arm, PromptSet, build, read_arms, read_pair
from benchmarks.lab.start import count_flops, find_plateau, make_start, sft_flops
from benchmarks.lab.trainers import bernoulli_forward_kl, bounded_k3
from benchmarks.lab.workbench import Machine, Workbench
from helpers.tiny import make_drafter
from helpers.tiny_lab import write_shared
from trl_draft_opd import DraftOPDConfig, DraftSFTConfig, FrozenTarget, evaluate_drafter, write_readings


pytestmark = pytest.mark.lab


NUM_ROWS = 24


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Return a folder with a tiny target and prompts, laid out as `--shared` is."""
    folder = tmp_path_factory.mktemp("shared")
    write_shared(folder, NUM_ROWS)
    return folder


def make_pair(folder: Path, family: str = "eagle3", **changes) -> Path:
    """Write the plan of a tiny pair and return its path."""
    words = {"file": "data/words.jsonl", "field": "question"}
    plan = {
        "family": family,
        "target": "targets/tiny",
        "drafter": {"ttt_steps": 3} if family == "eagle3" else {"num_hidden_layers": 1, "block_size": 4},
        "max_completion_length": 20,
        "prompts_per_update": 2,
        "train": [words | {"count": 12}],
        "dev": [words | {"count": 4, "start": -4}],
        "tests": {"words": words | {"count": 6, "start": -10}},
        "sft": {
            "settings": {"learning_rate": 1e-2, "num_anchors": 8},
            "measure_every": 2,
            "min_updates": 4,
            "max_updates": 6,
            "cooldown_updates": 2,
        },
        "budgets": {1: 2e-4, 2: 1e-4},
        "seeds": {1: 2, 2: 1},
    }
    path = folder / f"tiny-{family}.yaml"
    path.write_text(yaml.safe_dump(plan | changes), encoding="utf-8")
    return path


def make_bench(pair: Path, shared: Path, out: Path, memo_bytes: int = 10**8) -> Workbench:
    """Return a workbench on the CPU."""
    return Workbench(read_pair(str(pair)), Machine(shared, out, "cpu", "float32", memo_bytes, 8, None, False))


@pytest.fixture(scope="module")
def bench(shared, tmp_path_factory) -> Workbench:
    """Return a workbench whose SFT start is made."""
    folder = tmp_path_factory.mktemp("out")
    bench = make_bench(make_pair(folder), shared, folder)
    make_start(bench)
    return bench


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((FOLDER / "pairs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_plan_can_be_read_and_its_arms_are_settings_that_exist(path):
    pair = read_pair(path.stem)
    for tier in pair.budgets:
        arms = read_arms(pair, tier)
        assert len({arm.name for arm in arms}) == len(arms) > 0
        for arm in arms:
            bench = object.__new__(Workbench)
            bench.pair = pair
            config = DraftSFTConfig if arm.trainer == "sft" else DraftOPDConfig
            config(output_dir="unused", report_to="none", use_cpu=True, **arm_settings(bench, arm))


def test_no_test_prompt_of_a_committed_plan_is_trained_on():
    for path in (FOLDER / "pairs").glob("*.yaml"):
        pair = read_pair(path.stem)
        for test in [*pair.dev, *pair.tests.values()]:
            for train in pair.train:
                if (test.file or test.hub, test.split) == (train.file or train.hub, train.split):
                    assert train.start == 0 and test.start < 0, path
                    # gsm8k_train has 7,473 rows, codealpaca 6,482: the front and the back never meet.
                    assert train.count * train.joined - test.start <= 6_482, path


def test_a_key_that_nobody_reads_is_refused():
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\]"):
        build(PromptSet, {"file": "a", "field": "b", "count": 1, "colour": "red"}, "a test")


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match=r"missing keys \['count'\]"):
        build(PromptSet, {"file": "a", "field": "b"}, "a test")


def test_an_unknown_pair_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="smoke"):
        read_pair("nobody")


def test_an_unknown_trainer_is_refused():
    with pytest.raises(ValueError, match="choose one of"):
        Arm(name="a", tiers=(1,), trainer="magic")


def test_prompts_beyond_the_end_of_a_file_are_refused(shared, tmp_path):
    bench = make_bench(make_pair(tmp_path), shared, tmp_path)
    with pytest.raises(SystemExit, match=f"has {NUM_ROWS} rows"):
        bench.messages(PromptSet(field="question", count=5, start=-4, file="data/words.jsonl"))


def test_a_second_field_is_put_behind_the_first(shared, tmp_path):
    bench = make_bench(make_pair(tmp_path), shared, tmp_path)
    prompts = PromptSet(field="question", extra_field="more", count=1, file="data/words.jsonl")
    assert bench.messages(prompts)[0].endswith("\nw9")


def test_rows_are_joined_into_prompts(shared, tmp_path):
    bench = make_bench(make_pair(tmp_path), shared, tmp_path)
    words = {"field": "question", "start": 1, "file": "data/words.jsonl"}
    one, two, three, four = bench.messages(PromptSet(count=4, **words))
    assert bench.messages(PromptSet(count=2, joined=2, **words)) == [f"{one}\n\n{two}", f"{three}\n\n{four}"]
    with pytest.raises(SystemExit, match=f"has {NUM_ROWS} rows; {NUM_ROWS} from row 1"):
        bench.messages(PromptSet(count=NUM_ROWS // 2, joined=2, **words))


def test_a_training_prompt_that_is_measured_on_is_left_out(shared, tmp_path):
    words = {"file": "data/words.jsonl", "field": "question"}
    bench = make_bench(make_pair(tmp_path, train=[words | {"count": NUM_ROWS}]), shared, tmp_path)
    trained = {tuple(ids) for ids in bench.training_rows()["prompt_ids"]}
    assert len(trained) == NUM_ROWS - 10
    for prompts in (*bench.pair.dev, bench.pair.tests["words"]):
        assert not trained & {tuple(ids) for ids in bench.prompt_ids(prompts)}


def test_fresh_prompts_are_neither_those_of_the_start_nor_measured_on(shared, tmp_path):
    words = {"file": "data/words.jsonl", "field": "question"}
    fresh = [words | {"count": NUM_ROWS}]
    bench = make_bench(make_pair(tmp_path, fresh=fresh), shared, tmp_path)
    known = [tuple(ids) for prompts in bench.pair.train for ids in bench.prompt_ids(prompts)]
    found = {tuple(ids) for ids in bench.training_rows(is_fresh=True)["prompt_ids"]}
    measured = {tuple(ids) for ids in bench.prompt_ids(bench.pair.tests["words"])}
    assert found and not found & ({*known} | measured)
    assert found <= {tuple(ids) for ids in bench.every_prompt()}, "their responses are written with the others"


def test_an_arm_of_fresh_prompts_needs_some(shared, tmp_path):
    bench = make_bench(make_pair(tmp_path), shared, tmp_path)
    with pytest.raises(SystemExit, match="no `fresh` prompts"):
        bench.training_rows(is_fresh=True)


# -- the plateau ------------------------------------------------------------------------------------------------------


def test_a_rising_tau_is_no_plateau_and_a_flat_one_is():
    rising = [{"update": 50 * step, "tau": 2 + 0.1 * step} for step in range(1, 30)]
    assert not find_plateau(rising)
    flat = [{"update": 50 * step, "tau": min(2 + 0.1 * step, 3)} for step in range(1, 30)]
    assert find_plateau(flat)


def test_a_history_too_short_to_tell_is_no_plateau():
    assert not find_plateau([{"update": 50, "tau": 2.0}, {"update": 100, "tau": 2.0}])


# -- what it measures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_tau_along_stored_text_is_that_of_live_decoding(shared, tmp_path, family):
    bench = make_bench(make_pair(tmp_path, family), shared, tmp_path)
    drafter = make_drafter(family, bench.target)
    prompts = bench.prompt_ids(bench.pair.tests["words"])
    ours = measure_drafter(bench.target, drafter, bench.answered(prompts, 0.0))
    live = evaluate_drafter(
        bench.target, drafter, prompts, max_completion_length=20, compare_with_target=False, show_progress=False
    )
    assert ours["rounds"] == live.block_counts
    assert [r + a for r, a in zip(ours["rounds"], ours["accepted"], strict=True)] == live.accepted_sums
    assert ours["tau"] == pytest.approx(live.tau)
    assert ours["slot_acceptance"] == pytest.approx(live.acceptance_per_slot)


def test_a_target_that_remembers_reads_what_one_that_forgets_reads(bench):
    rows = bench.training_rows()
    plain = FrozenTarget(bench.target.causal_lm, bench.target.tokenizer)
    remembering = RememberingTarget(bench.target.causal_lm, bench.target.tokenizer)
    remembering.budget_bytes = 10**8
    texts = [p + c for p, c in zip(rows["prompt_ids"], rows["completion_ids"], strict=True)]
    for picks in ([0, 1, 2], [2, 3], [3, 0, 5], [0, 1, 2]):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(texts[row]) for row in picks], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(texts[row])) for row in picks], batch_first=True)
        ours, theirs = (target.read_text(ids, mask.long(), [1, 3, 5]).padded() for target in (remembering, plain))
        for name in ("features", "last_hidden"):
            mine, other = (getattr(reading, name) * mask[..., None] for reading in (ours, theirs))
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert remembering.num_forwards < plain.num_forwards


def test_a_full_memory_takes_in_no_more(bench):
    target = RememberingTarget(bench.target.causal_lm, bench.target.tokenizer)
    target.budget_bytes = 1
    ids = torch.tensor([[7, 8, 9]])
    for _ in range(2):
        target.read_text(ids, torch.ones_like(ids), [1])
    assert target.num_forwards == 2


def test_a_store_of_readings_changes_neither_text_nor_tau_nor_the_counted_cost(shared, tmp_path):
    drafter = {"ttt_steps": 3, "target_layer_ids": [0, 1, 2]}
    plan = make_pair(tmp_path, drafter=drafter, responses="texts", budgets={1: 2e-4})
    plain = make_bench(plan, shared, tmp_path / "plain", memo_bytes=0)
    dev = [ids for prompts in plain.pair.dev for ids in plain.prompt_ids(prompts)]
    test = plain.prompt_ids(plain.pair.tests["words"])
    rows = [plain.training_rows(), *(plain.answered(prompts, 0.0) for prompts in (dev, test))]
    texts = [row["prompt_ids"] + row["completion_ids"] for part in rows for row in part]
    write_readings(plain.target, texts, tmp_path / "readings", layer_ids=[0, 1, 2], dtype="float32")
    machine = Machine(shared, tmp_path / "stored", "cpu", "float32", 0, 8, None, False, tmp_path / "readings")
    stored = Workbench(read_pair(str(plan)), machine)
    shutil.copytree(tmp_path / "plain" / "texts-t0", tmp_path / "stored" / "texts-t0")
    starts = [make_start(bench) for bench in (plain, stored)]
    weights = [(start / "model.safetensors").read_bytes() for start in starts]
    assert weights[0] == weights[1]
    forwards = stored.target.num_forwards
    assert measure_start(stored)["evals"]["words"]["rounds"] == measure_start(plain)["evals"]["words"]["rounds"]
    assert sft_flops(stored, starts[1]) == sft_flops(plain, starts[0])
    assert stored.target.num_forwards > forwards, "what an update costs is counted without the store"
    stored.target.source.close()


def test_what_an_update_costs_is_counted_as_if_nothing_were_remembered(bench, shared, tmp_path):
    start, rows = make_start(bench), bench.training_rows()
    arm = Arm(name="a", tiers=(1,), trainer="opd")
    counts = []
    for memo_bytes in (10**8, 0):
        bench.target.budget_bytes = memo_bytes

        def make(**settings):
            return make_trainer(bench, arm, bench.load_drafter(start), rows, tmp_path, 0, **settings)

        counts.append(count_flops(bench, make))
        assert bench.target.budget_bytes == memo_bytes
    bench.target.budget_bytes = 10**8
    assert counts[0] == counts[1] > 0


def test_states_are_told_apart_and_a_copy_of_the_target_is_never_wrong(bench):
    drafter = make_drafter("eagle3", bench.target)
    found = diagnose_states(bench.target, drafter, bench.training_rows())
    mismatch = found["mismatch"]
    # A first rejection is a wrong argmax by definition, an accepted draft a right one.
    assert mismatch["first_rejected"]["is_wrong"] == 1.0
    assert mismatch.get("accepted", {"is_wrong": 0.0})["is_wrong"] == 0.0
    assert found["target_entropy"] > 0


# -- arms -------------------------------------------------------------------------------------------------------------


def test_a_start_is_made_once_and_its_history_is_kept(bench):
    history = json.loads((bench.folder / "sft" / "history.json").read_text(encoding="utf-8"))
    assert [row["update"] for row in history] == [2, 4, 6]
    stamp = (bench.folder / "sft" / "start" / "model.safetensors").stat().st_mtime_ns
    make_start(bench)
    assert (bench.folder / "sft" / "start" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_killed_sft_goes_on_to_the_same_start(shared, tmp_path, monkeypatch):
    whole = make_bench(make_pair(tmp_path), shared, tmp_path / "whole")
    killed = make_bench(make_pair(tmp_path), shared, tmp_path / "killed")
    make_start(whole)
    from benchmarks.lab import start as start_module

    measure, calls = start_module.measure_drafter, []

    def die_on_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(start_module, "measure_drafter", die_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_start(killed)
    make_start(killed)
    ours, theirs = (bench.load_drafter(bench.folder / "sft" / "start").state_dict() for bench in (killed, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("trainer", ["sft", "opd", "one_token", "stale"])
def test_an_arm_spends_its_budget_and_is_not_run_twice(bench, monkeypatch, trainer):
    arm = Arm(name=f"arm-{trainer}", tiers=(1,), trainer=trainer, settings={"learning_rate": 1e-2})
    result = run_arm(bench, arm, 1, 0)
    budget = bench.pair.budgets[1]
    assert abs(result["tflop"] - budget) <= result["flops_per_update"] / 1e12
    assert result["updates"] > 1
    monkeypatch.setattr(arms_module, "make_trainer", None)
    assert run_arm(bench, arm, 1, 0) == result


def test_a_killed_arm_goes_on_to_the_same_drafter(bench, monkeypatch):
    monkeypatch.setattr(arms_module, "SAVE_EVERY", 2)
    arms = [Arm(name=name, tiers=(1,), trainer="opd") for name in ("whole", "killed")]
    run_arm(bench, arms[0], 1, 0)
    make = arms_module.make_trainer
    monkeypatch.setattr(arms_module, "make_trainer", lambda *args, **kwargs: _dies_at(make(*args, **kwargs), 3))
    arm_folder = bench.folder / "tier1"
    shutil.copytree(arm_folder / "whole", arm_folder / "killed", ignore=shutil.ignore_patterns("seed*", "arm.json"))
    with pytest.raises(KeyboardInterrupt):
        run_arm(bench, arms[1], 1, 0)
    monkeypatch.setattr(arms_module, "make_trainer", make)
    run_arm(bench, arms[1], 1, 0)
    ours, theirs = (
        bench.load_drafter(arm_folder / name / "seed0" / "drafter").state_dict() for name in ("killed", "whole")
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)


def _dies_at(trainer, step: int):
    compute_loss = trainer.compute_loss

    def dying(*args, **kwargs):
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = dying
    return trainer


def test_a_result_never_goes_under_another_plans_name(bench):
    arm = Arm(name="renewed", tiers=(1,), trainer="sft", settings={"learning_rate": 1e-2})
    run_arm(bench, arm, 1, 0)
    with pytest.raises(SystemExit, match=r"made by another plan \(settings: .*0.01.*0.02.*Delete that folder"):
        run_arm(bench, dataclasses.replace(arm, settings={"learning_rate": 2e-2}), 1, 0)


def test_a_start_never_goes_under_another_plans_name(bench, shared):
    changed = make_bench(make_pair(bench.machine.out, max_completion_length=19), shared, bench.machine.out)
    with pytest.raises(SystemExit, match=r"max_completion_length: 20 then, 19 now"):
        make_start(changed)


def test_seeds_differ_and_share_their_start(bench):
    arm = Arm(name="seeded", tiers=(1,), trainer="opd", settings={"learning_rate": 1e-2})
    losses = [run_arm(bench, arm, 1, seed)["log"][-1]["train_loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_an_arm_at_temperature_1_is_measured_with_both_kinds_of_drafts(bench):
    arm = Arm(name="warm", tiers=(2,), trainer="opd", temperature=1.0, draft_sampling="sample", pool=6)
    assert {"words", "words_t1_greedy", "words_t1_sample"} == set(run_arm(bench, arm, 2, 0)["evals"])


def test_training_on_live_and_on_replayed_rollouts_coincides(bench):
    found = compare_rollouts(bench)
    live, replay = found["logs"]["live"], found["logs"]["replay"]
    for ours, theirs in zip(live, replay, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert {**ours, "loss": 0} == {**theirs, "loss": 0}
    assert found["weights_apart"] < 0.05 * found["weights_moved"]


def test_the_run_command_leaves_tables_that_can_be_made_again(shared, tmp_path, capsys):
    path = make_pair(tmp_path, arms=["sft_continued", "opd"], budgets={1: 5e-5}, seeds={1: 1})
    arguments = ["run", "--pair", str(path), "--shared", str(shared), "--out", str(tmp_path), "--tier", "1"]
    run(parse_arguments(arguments))
    printed = capsys.readouterr().out
    assert "| sft_continued |" in printed and "| opd |" in printed
    results = json.loads((tmp_path / "tiny-eagle3.json").read_text(encoding="utf-8"))
    assert {row["arm"] for row in results["runs"]} == {"sft_start", "sft_continued", "opd"}
    assert results["responses"]["tflop"] > 0 and results["sft"]["flops_per_update"] > 0


def test_a_pair_without_the_tier_asked_for_says_which_it_has(shared, tmp_path):
    path = make_pair(tmp_path, budgets={1: 5e-5}, seeds={1: 1})
    with pytest.raises(SystemExit, match=r"it has \[1\]"):
        run(
            parse_arguments(
                ["run", "--pair", str(path), "--shared", str(shared), "--out", str(tmp_path), "--tier", "2"]
            )
        )


# -- the released code's estimators -----------------------------------------------------------------------------------


def test_one_token_estimators_vanish_where_drafter_and_target_agree():
    log_p = torch.tensor([0.7, 0.2]).log()
    assert bernoulli_forward_kl(log_p, log_p).abs().max() < 1e-6
    assert bounded_k3(log_p, log_p).abs().max() < 1e-6


def test_the_most_wrong_drafts_have_no_gradient_under_the_bounded_estimator():
    log_q = torch.tensor([-12.0], requires_grad=True)
    bounded_k3(torch.tensor([-0.1]), log_q).sum().backward()
    assert log_q.grad.item() == 0.0


def test_a_bernoulli_divergence_by_hand():
    p, q = 0.5, 0.25
    expected = p * torch.tensor(p / q).log() + (1 - p) * torch.tensor((1 - p) / (1 - q)).log()
    got = bernoulli_forward_kl(torch.tensor([p]).log(), torch.tensor([q]).log())
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_collecting_twice_gives_the_same_results(bench):
    assert collect(bench) == collect(bench)
