# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tau of drafters for targets whose cache cannot be rolled back, sliding-window and hybrid ones: by replay along the
target's own responses, in evaluation, in both trainers, on the command line, in the record and on the card.
"""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset
from test_evaluation import evaluate
from test_trainers import make_trainer
from transformers import MistralConfig, MistralForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from helpers.oracle import greedy_text, plant
from helpers.tiny import EOS, PAD, VOCAB, make_drafter, make_prompts, make_target, make_tokenizer
from trl_draft_opd import FrozenTarget, SamplingSettings, generate_responses
from trl_draft_opd.cli import main
from trl_draft_opd.export.record import read_record


SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "initializer_range": 0.4,
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MODELS = {
    "sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
    "hybrid": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, **LINEAR)),
}
REASONS = {"sliding": "sliding window of 6 tokens", "hybrid": "keeps a recurrent state"}


def make_unrolled(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def target(kind):
    return FrozenTarget(make_unrolled(kind), make_tokenizer())


@pytest.fixture
def endless(target, monkeypatch):
    """The target, with no id that ends a response: lengths are known."""
    monkeypatch.setattr(FrozenTarget, "eos_token_ids", [])
    return target


def greedy(target, prompts, length):
    sampling = SamplingSettings(0.0, 0, 1.0)
    options = {"sampling": sampling, "batch_size": 2, "seed": 0, "show_progress": False}
    return generate_responses(target, prompts, max_completion_length=length, **options)


def test_blocks_and_passes_agree_with_a_hand_count(monkeypatch, endless):
    prompts = [[9, 10, 11], [12, 13]]
    drafter = make_drafter("dflash", endless)
    # The blocks of `test_evaluation.test_every_number_agrees_with_a_hand_count`, which are decoded live there.
    wrong = {0: {6, 7, 15, 17}, 1: set()}
    plant(monkeypatch, drafter, [greedy_text(endless, prompt, 30) for prompt in prompts], wrong.get)
    report = evaluate(endless, drafter, prompts, batch_size=2)
    assert report.is_replay
    assert report.block_counts == [4, 3] and report.accepted_sums == [3 + 1 + 5 + 3, 15]
    assert report.acceptance_per_slot == pytest.approx([6 / 7, 6 / 7, 4 / 7, 4 / 7])
    assert report.num_tokens == 32 and report.tokens_per_target_forward == 32 / (6 + 1 + 3 + 1)
    assert report.speedup is None and report.num_different is None


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_size_changes_nothing(endless, temperature):
    drafter, prompts = make_drafter("dflash", endless), make_prompts(3)
    sampling = SamplingSettings(temperature, 0, 1.0)
    options = {"sampling": sampling, "draft_sampling": "sample" if temperature else "greedy"}
    one, three = (evaluate(endless, drafter, prompts, batch_size=size, **options) for size in (1, 3))
    assert dataclasses.replace(one, batch_size=3) == three
    assert one.num_blocks > 10


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_replay_of_responses_reports_what_live_decoding_does(family):
    target = make_target()
    drafter, prompts = make_drafter(family, target), make_prompts(4)
    live = evaluate(target, drafter, prompts, batch_size=2)
    # Longer than what is asked for: their first tokens are what live decoding stops at.
    replayed = evaluate(target, drafter, prompts, batch_size=3, responses=greedy(target, prompts, 20))
    assert replayed == dataclasses.replace(live, speedup=None, num_different=None, batch_size=3, is_replay=True)
    assert live.num_blocks > 10


def test_what_a_replay_cannot_do_is_refused(target):
    drafter, prompts = make_drafter("dflash", target), make_prompts(2)
    with pytest.raises(ValueError, match="`ignore_eos` decodes past the end .* by replay"):
        evaluate(target, drafter, prompts, ignore_eos=True)
    with pytest.raises(ValueError, match="1 responses to 2 prompts"):
        evaluate(target, drafter, prompts, responses=[[9, 8]])


# -- trainers ---------------------------------------------------------------------------------------------------------


def rows_of(target, count=4, length=16):
    prompts = make_prompts(count)
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": greedy(target, prompts, length)})


OPTIONS = {"opd": {"rollout": "replay", "rejected_scope": "first"}, "sft": {}}


@pytest.mark.parametrize("trainer_kind", list(OPTIONS))
def test_trainers_measure_tau_by_replay_and_say_so(trainer_kind, target, kind, tmp_path, monkeypatch):
    rows, options = rows_of(target), OPTIONS[trainer_kind] | {"max_completion_length": 16}
    drafter = make_drafter("eagle3", target)
    with pytest.warns(UserWarning, match=f"{REASONS[kind]}.*tau is measured by replay.*same distribution"):
        trainer = make_trainer(trainer_kind, tmp_path, drafter, target, rows, rows, **options)
    metrics = trainer.evaluate()
    report = evaluate(target, drafter, rows["prompt_ids"], max_completion_length=16)
    assert metrics["eval_tau"] == pytest.approx(report.tau) and metrics["eval_loss"] > 0
    assert [metrics[f"eval_acceptance/slot_{k}"] for k in range(1, 5)] == pytest.approx(report.acceptance_per_slot)
    assert metrics["eval_tau_low"] <= report.tau <= metrics["eval_tau_high"]
    trainer.train()
    assert trainer.evaluate()["eval_tau"] > 0
    trainer.save_model()
    (measured,) = read_record(tmp_path).measurements
    assert measured.is_replay and measured.num_prompts == 4


@pytest.mark.parametrize("trainer_kind", list(OPTIONS))
def test_the_target_responds_to_evaluation_prompts_once(trainer_kind, target, tmp_path):
    prompts = make_prompts(3)
    rows = Dataset.from_dict({"prompt": [" ".join(f"w{token}" for token in prompt) for prompt in prompts]})
    # What the dataset says in reply is not the target's own.
    rows = rows.add_column("completion", ["w9 w9 w9"] * 3)
    options = OPTIONS[trainer_kind] | {"max_completion_length": 16}
    if trainer_kind == "opd":
        options["completions_from_target"] = False
    trainer = make_trainer(trainer_kind, tmp_path, make_drafter("eagle3", target), target, rows, rows, **options)
    first = trainer.evaluate()
    (store,) = tmp_path.glob("_responses")
    shards = sorted(store.rglob("*.parquet"))
    assert shards and first["eval_tau"] >= 1
    again = make_trainer(trainer_kind, tmp_path, make_drafter("eagle3", target), target, rows, rows, **options)
    assert again.evaluate()["eval_tau"] == first["eval_tau"] and sorted(store.rglob("*.parquet")) == shards


@pytest.mark.parametrize("trainer_kind", list(OPTIONS))
def test_responses_of_another_model_are_not_replayed(trainer_kind, target, tmp_path):
    rows = rows_of(target)
    others = Dataset.from_dict(
        {"prompt_ids": rows["prompt_ids"], "completion_ids": [[9, 10, 11, 12, 13, 14, 15, 16]] * 4}
    )
    options = OPTIONS[trainer_kind] | {"max_completion_length": 16}
    if trainer_kind == "opd":
        options["completions_from_target"] = True
    trainer = make_trainer(trainer_kind, tmp_path, make_drafter("eagle3", target), target, rows, others, **options)
    with pytest.raises(ValueError, match="The target at hand did not write these responses"):
        trainer.evaluate()


def test_training_that_branches_or_decodes_live_is_still_refused(target, kind, tmp_path):
    rows = rows_of(target)
    for options in ({"rollout": "replay", "rejected_scope": "suffix"}, {"rollout": "live"}):
        options |= {"completions_from_target": False}
        with pytest.raises(ValueError, match=f"{REASONS[kind]}.*trains by replay"):
            make_trainer("opd", tmp_path, make_drafter("eagle3", target), target, rows, rows, **options)


# -- on the command line, in the record and on the card ---------------------------------------------------------------


def test_evaluate_replays_and_the_card_says_so(target, kind, tmp_path, capsys, monkeypatch):
    folder = str(tmp_path / "target")
    target.causal_lm.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    make_drafter("dflash", target).save_pretrained(tmp_path / "drafter")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{9 + i} w{10 + i}"}) + "\n" for i in range(3)))
    words = ["evaluate", "--drafter", str(tmp_path / "drafter"), "--target", folder, "--dataset", str(rows)]
    words += ["--max-completion-length", "24", "--target-dtype", "float32", "--responses", str(tmp_path / "store")]
    words += ["--json", str(tmp_path / "report.json"), "--record", "three"]
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert REASONS[kind] in printed and "tau is measured by replay" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["is_replay"] and report["num_blocks"] > 0
    shards = sorted((tmp_path / "store").rglob("*.parquet"))
    assert main(words) == 0 and sorted((tmp_path / "store").rglob("*.parquet")) == shards
    (measured,) = read_record(tmp_path / "drafter").measurements
    assert measured.is_replay and measured.tau == report["tau"]
