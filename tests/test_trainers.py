# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Both trainers end to end on tiny models: what moves, what is logged, what is saved, and what must change nothing.
"""

from io import StringIO
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from helpers.oracle import greedy_rows, greedy_text, plant
from helpers.tiny import FAMILIES, TINY_RUN, VOCAB, make_drafter, make_prompts, make_target, make_tokenizer
from trl_draft_opd import (
    AutoDrafter,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    DraftVocabulary,
    FrozenTarget,
)


OPD_VARIANTS = {
    "live": {"rollout": "live"},
    "replay": {},
    "own": {"completions_from_target": True},
    "first": {"rejected_scope": "first"},
    "live_first": {"rollout": "live", "rejected_scope": "first"},
}
# What branches asks more of a trainer than what does not, so it is what these tests train unless they say otherwise.
SUFFIX = {"rejected_scope": "suffix"}


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    """Prompts with the target's own greedy responses of 12 tokens."""
    return greedy_rows(target, 6, 12)


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def make_args(kind, output_dir, **changes):
    options = {
        "output_dir": str(output_dir),
        **TINY_RUN,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "max_completion_length": 12,
    }
    return DraftSFTConfig(**options | changes) if kind == "sft" else DraftOPDConfig(**options | SUFFIX | changes)


def make_trainer(kind, output_dir, drafter, target, rows, eval_rows=None, callbacks=None, **changes):
    trainer_class = DraftSFTTrainer if kind == "sft" else DraftOPDTrainer
    args = make_args(kind, output_dir, **changes)
    tokenizer = None if isinstance(target, str | Path | FrozenTarget) else make_tokenizer()
    return trainer_class(drafter, target, args, rows, eval_rows, tokenizer, callbacks)


def weights(drafter):
    return {name: tensor.detach().clone() for name, tensor in drafter.named_parameters()}


def assert_equal(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_every_tensor_moved(before, after):
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


# -- what an epoch is shown -------------------------------------------------------------------------------------------

DRAWN = {"temperature": 1.0, "draft_sampling": "sample"}
SHOWN = {
    "anchors of supervised text": ("sft", {"num_anchors": 2}),
    "drafts along a text": ("opd", DRAWN | {"rejected_scope": "first"}),
    "drafts along a text, suffixes too": ("opd", DRAWN),
    "drafts of live decoding": ("opd", DRAWN | {"rollout": "live"}),
    "supervised anchors": (
        "opd",
        {"supervised_weight": 0.5, "supervised_anchors": "random", "num_supervised_anchors": 2},
    ),
}


@pytest.mark.parametrize("what", SHOWN)
def test_an_epoch_is_shown_other_blocks_than_the_one_before_and_a_second_run_the_same(
    monkeypatch, tmp_path, target, rows, what
):
    kind, settings = SHOWN[what]

    def blocks_of_two_epochs(output_dir):
        # Nothing is learnt, and an epoch is one step: what is left to differ is what was drawn.
        settings_of_run = {"learning_rate": 0.0, "per_device_train_batch_size": len(rows), "max_steps": 2}
        responses = {} if kind == "sft" else {"responses": str(tmp_path / "responses")}
        drafter = make_drafter("dflash", target)
        with torch.no_grad():
            # A random drafter is nearly certain; one with flat distributions has something to draw.
            drafter.norm.weight.mul_(0.05)
        trainer = make_trainer(kind, output_dir, drafter, target, rows, **settings_of_run | responses | settings)
        prepare, shown = trainer._prepare, []

        def noted(batches, epoch):
            prepared = prepare(batches, epoch)
            (batch,) = prepared
            order = torch.tensor(batch.text.sample_ids).argsort()
            held = [batch.blocks.anchors, batch.blocks.drafts]
            shown.append((epoch, [tensor[order].tolist() for tensor in held]))
            return prepared

        monkeypatch.setattr(trainer, "_prepare", noted)
        trainer.train()
        assert [epoch for epoch, _ in shown] == [0, 1]
        return [blocks for _, blocks in shown]

    first, second = blocks_of_two_epochs(tmp_path / "a")
    assert first != second
    assert blocks_of_two_epochs(tmp_path / "b") == [first, second]


# -- training moves everything ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_every_trainable_tensor_moves_in_training(tmp_path, target, rows, kind, family, bf16):
    drafter = make_drafter(family, target)
    before, frozen = weights(drafter), {n: p.clone() for n, p in target.causal_lm.named_parameters()}
    trainer = make_trainer(kind, tmp_path, drafter, target, rows, bf16=bf16)
    assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
    trainer.train()
    assert_every_tensor_moved(before, weights(drafter))
    assert all(parameter.dtype == torch.float32 for parameter in drafter.parameters())
    assert all(torch.equal(frozen[n], p) and p.grad is None for n, p in target.causal_lm.named_parameters())


def every_pair(names, others, is_quick):
    """Parametrize all pairs; those that are not `is_quick(name, other)` are slow."""
    pairs = [(name, other) for name in names for other in others]
    return [pytest.param(*pair, marks=() if is_quick(*pair) else pytest.mark.slow) for pair in pairs]


# DSpark has most that can stay behind: biases, confidences, both heads.
@pytest.mark.parametrize(
    ("family", "variant"),
    every_pair(FAMILIES, OPD_VARIANTS, lambda family, name: family == "dspark" or name == "live"),
)
def test_every_variant_of_opd_trains(tmp_path, target, rows, family, variant):
    drafter = make_drafter(family, target)
    before = weights(drafter)
    trainer = make_trainer("opd", tmp_path, drafter, target, rows, **OPD_VARIANTS[variant])
    trainer.train()
    assert_every_tensor_moved(before, weights(drafter))
    log = trainer.state.log_history[0]
    assert 1 <= log["tau"] <= 5 and log["loss/rejected"] > 0 and log["slots/rejected"] > 0
    assert "acceptance/slot_4" in log and log["response_length"] == 12


def test_replay_trains_exactly_as_live_at_temperature_0(tmp_path, target, rows):
    final = []
    for variant in ("live", "replay", "own"):
        drafter = make_drafter("eagle3", target)
        make_trainer("opd", tmp_path, drafter, target, rows, optim="sgd", **OPD_VARIANTS[variant]).train()
        final.append(weights(drafter))
    assert_equal(final[0], final[1], tolerance=1e-6)
    assert_equal(final[1], final[2], tolerance=1e-6)


# Draft-OPD drafts with what is compiled too.
@pytest.mark.parametrize("kind", [pytest.param("sft", marks=pytest.mark.slow), "opd"])
def test_a_compiled_drafter_trains_as_a_plain_one(tmp_path, target, rows, kind):
    final = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        drafter = make_drafter("dflash", target)
        make_trainer(kind, tmp_path, drafter, target, rows, optim="sgd", **options).train()
        final.append(weights(drafter))
    compiled = [module for module in drafter.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == 2 * 5 + 2  # per layer an MLP and four norms, and two norms around them
    assert_equal(*final, tolerance=1e-6)


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_a_bfloat16_target_trains_a_float32_drafter(tmp_path, rows, kind):
    target = make_target()
    target.causal_lm.to(torch.bfloat16)
    drafter = make_drafter("eagle3", target)
    before = weights(drafter)
    options = {} if kind == "sft" else {"max_mismatch_share": 1.0, "warn_mismatch_share": 1.0}
    make_trainer(kind, tmp_path, drafter, target, rows, **options).train()
    assert_every_tensor_moved(before, weights(drafter))
    assert all(tensor.dtype == torch.float32 for tensor in weights(drafter).values())


def test_the_target_responds_to_each_prompt_once_and_the_responses_are_kept(monkeypatch, tmp_path, target, rows):
    asked = []
    generate = target.causal_lm.generate
    monkeypatch.setattr(
        target.causal_lm, "generate", lambda **kw: asked.append(len(kw["input_ids"])) or generate(**kw)
    )
    options = {"max_steps": -1, "num_train_epochs": 2}
    make_trainer("opd", tmp_path, make_drafter("dflash", target), target, rows, **options).train()
    assert sum(asked) == len(rows) and len(asked) == 1
    # Another run, and one that brings its own folder, find them there.
    make_trainer("opd", tmp_path, make_drafter("eagle3", target), target, rows, **options).train()
    folder = str(tmp_path / "_responses")
    make_trainer("opd", tmp_path / "b", make_drafter("dflash", target), target, rows, responses=folder).train()
    assert len(asked) == 1 and not (tmp_path / "b" / "_responses").exists()


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_a_store_that_was_named_is_announced_before_it_is_added_to_and_not_when_it_is_full(
    tmp_path, target, rows, kind, caplog
):
    options = {"responses": str(tmp_path / "store"), "max_steps": 1} | ({"regenerate": True} if kind == "sft" else {})
    for name in ("a", "b"):
        make_trainer(kind, tmp_path / name, make_drafter("dflash", target), target, rows, **options).train()
        assert caplog.text.count("store is new: the target writes") == 1 and "the target adds" not in caplog.text


def test_a_run_shorter_than_an_epoch_asks_only_for_what_it_trains_on(monkeypatch, tmp_path, target, rows):
    trainer = make_trainer("opd", tmp_path, make_drafter("dflash", target), target, rows, max_steps=1)
    trainer.train()
    assert len(trainer._responses.store) == 2


def test_readings_beyond_the_budget_are_made_again_with_the_same_result(tmp_path, target, rows):
    final = []
    for reading_bytes in (1, 2**30):
        drafter = make_drafter("eagle3", target)
        options = {"gradient_accumulation_steps": 2, "reading_bytes": reading_bytes}
        make_trainer("opd", tmp_path, drafter, target, rows, **options).train()
        final.append(weights(drafter))
    assert_equal(*final)


def test_sampled_drafts_train_along_sampled_text(tmp_path, target, rows):
    for variant in ("replay", "live"):
        drafter = make_drafter("eagle3", target)
        before = weights(drafter)
        options = {"temperature": 0.8, "draft_sampling": "sample"} | OPD_VARIANTS[variant]
        trainer = make_trainer("opd", tmp_path / "sampled", drafter, target, rows, **options)
        trainer.train()
        assert_every_tensor_moved(before, weights(drafter))
        assert trainer.state.log_history[0]["refused_responses"] == 0


def test_text_the_target_would_not_write_is_refused_before_training(tmp_path, target, rows):
    foreign = rows.map(lambda row: {"completion_ids": [7, 8, 9, 10]})
    drafter = make_drafter("dflash", target)
    before = weights(drafter)
    trainer = make_trainer("opd", tmp_path, drafter, target, foreign, completions_from_target=True)
    with pytest.raises(ValueError, match="did not write these responses"):
        trainer.train()
    assert_equal(before, weights(drafter))


def test_responses_of_another_target_are_refused(tmp_path, target, rows):
    make_trainer("opd", tmp_path, make_drafter("dflash", target), target, rows).train()
    other = make_target(seed=5)
    trainer = make_trainer("opd", tmp_path, make_drafter("dflash", other), other, rows)
    with pytest.raises(ValueError, match="weights"):
        trainer.train()


def test_every_response_of_a_chat_has_a_chain_of_its_own(tmp_path, target):
    turn = [7, 8, 9]
    first = greedy_text(target, turn, 6)
    second = greedy_text(target, first + turn, 6)
    marks = [0] * 3 + [1] * 6 + [0] * 3 + [1] * 6
    rows = Dataset.from_dict({"input_ids": [second], "completion_mask": [marks]})
    options = {"completions_from_target": True, "max_steps": 1, "per_device_train_batch_size": 1}
    trainer = make_trainer("opd", tmp_path, make_drafter("dflash", target), target, rows, **options)
    trainer.train()
    logs = trainer.state.log_history
    assert logs[0]["response_length"] == 12 and logs[0]["response_mismatch"] == 0


def test_a_reduced_vocabulary_trains_and_reports_what_it_loses(tmp_path, target, rows):
    is_known = torch.arange(VOCAB) % 3 != 0
    ids = is_known.nonzero()[:, 0]
    vocabulary = DraftVocabulary(d2t=ids - torch.arange(len(ids)), t2d=is_known, coverage=1.0)
    for kind in ("sft", "opd"):
        drafter = make_drafter("eagle3", target, draft_vocabulary=vocabulary)
        before = weights(drafter)
        trainer = make_trainer(kind, tmp_path, drafter, target, rows)
        trainer.train()
        assert_every_tensor_moved(before, weights(drafter))
        name = "lost_target_mass/accepted" if kind == "sft" else "lost_target_mass/rejected"
        assert 0 < trainer.state.log_history[0][name] < 1


def test_a_sliding_window_target_trains_by_replay_of_first_rejections(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=VOCAB, num_key_value_heads=1, head_dim=8, sliding_window=6, **shape)
    target = FrozenTarget(MistralForCausalLM(config).eval(), make_tokenizer())
    prompts = make_prompts(2)
    rows = Dataset.from_dict(
        {"prompt_ids": prompts, "completion_ids": [greedy_text(target, p, 12)[len(p) :] for p in prompts]}
    )
    drafter = make_drafter("dflash", target)
    before = weights(drafter)
    make_trainer("opd", tmp_path, drafter, target, rows, **OPD_VARIANTS["first"]).train()
    assert_every_tensor_moved(before, weights(drafter))
    for variant in ("replay", "live"):
        with pytest.raises(
            ValueError, match="sliding window of 6 tokens.*`rollout='replay'` and `rejected_scope='first'`"
        ):
            make_trainer("opd", tmp_path, drafter, target, rows, **OPD_VARIANTS[variant])
    make_trainer("sft", tmp_path, drafter, target, rows, rows, eval_rollouts=False).train()


def test_training_raises_tau_on_what_it_trains_on(tmp_path, target, rows):
    drafter = make_drafter("eagle3", target)
    trainer = make_trainer(
        "opd",
        tmp_path,
        drafter,
        target,
        rows,
        rows,
        max_steps=10,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
    )
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    assert trainer.evaluate()["eval_tau"] > before


# -- what must change nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("sft", {}), ("opd", {}), ("opd", {"rollout": "live", "temperature": 1.0, "draft_sampling": "sample"})],
    ids=["sft", "replay", "live-sampled"],
)
def test_gradient_accumulation_changes_nothing(tmp_path, target, rows, kind, variant):
    # Rows of unequal weight: responses of 3 to 12 tokens.
    rows = rows.map(lambda row, i: {"completion_ids": row["completion_ids"][: 3 + 2 * i]}, with_indices=True)
    options = variant | {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    final = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        drafter = make_drafter("eagle3", target)
        before = weights(drafter)
        trainer = make_trainer(
            kind,
            tmp_path,
            drafter,
            target,
            rows,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        trainer.train()
        assert_every_tensor_moved(before, weights(drafter))
        final.append((weights(drafter), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    for other, losses in final[1:]:
        assert_equal(final[0][0], other, tolerance=1e-6)
        assert losses == pytest.approx(final[0][1], abs=1e-4)


def test_paths_and_instances_train_alike(tmp_path, target, rows):
    target.causal_lm.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_drafter("dflash", target).save_pretrained(tmp_path / "drafter")
    pairs = [
        (make_drafter("dflash", target), target),
        (make_drafter("dflash", target), target.causal_lm),
        (str(tmp_path / "drafter"), str(tmp_path / "target")),
        (tmp_path / "drafter", tmp_path / "target"),
    ]
    final = []
    for model, target in pairs:
        trainer = make_trainer("opd", tmp_path / "out", model, target, rows, max_steps=1)
        trainer.train()
        final.append(weights(trainer.model))
    for other in final[1:]:
        assert_equal(final[0], other)
    assert trainer.model.config.target_model_name_or_path == str(tmp_path / "target")


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_evaluate_returns_tau_acceptance_and_loss_parts(monkeypatch, tmp_path, target, rows, kind):
    drafter = make_drafter("dflash", target)
    truths = [greedy_text(target, row["prompt_ids"], 30) for row in rows.select(range(3))]
    starts = [len(row["prompt_ids"]) for row in rows.select(range(3))]
    trainer = make_trainer(kind, tmp_path, drafter, target, rows, rows.select(range(3)))
    # Every third draft of a chain is wrong: blocks keep 2 and commit 3 tokens.
    plant(monkeypatch, drafter, truths, lambda row: set(range(starts[row] + 3, 60, 3)))
    metrics = trainer.evaluate()
    assert metrics["eval_tau"] == 3.0
    assert [metrics[f"eval_acceptance/slot_{slot}"] for slot in (1, 2, 3, 4)] == [1, 1, 0, 0]
    assert metrics["eval_loss/accepted"] > 0 and metrics["eval_response_length"] == 12
    assert ("eval_loss/rejected" in metrics) == (kind == "opd")
    assert trainer.evaluate()["eval_tau"] == 3.0


def test_supervised_evaluation_can_do_without_rollouts(tmp_path, target, rows):
    trainer = make_trainer("sft", tmp_path, make_drafter("dflash", target), target, rows, rows, eval_rollouts=False)
    metrics = trainer.evaluate()
    assert "eval_tau" not in metrics and metrics["eval_loss"] == pytest.approx(metrics["eval_loss/accepted"], rel=0.2)


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_several_evaluation_sets_keep_their_own_metrics(tmp_path, target, rows, kind):
    drafter = make_drafter("eagle3", target)
    parts, loss = {"short": rows.select([0]), "all": rows}, "loss/accepted" if kind == "sft" else "loss/rejected"
    trainer = make_trainer(kind, tmp_path, drafter, target, rows, parts)
    metrics = trainer.evaluate()
    for name, part in parts.items():
        alone = make_trainer(kind, tmp_path, drafter, target, rows, part).evaluate()
        for key in ("tau", "rounds", loss, "acceptance/slot_1"):
            assert metrics[f"eval_{name}_{key}"] == alone[f"eval_{key}"], (name, key)
    assert metrics[f"eval_short_{loss}"] != metrics[f"eval_all_{loss}"] and "eval_tau" not in metrics


def test_the_best_model_by_tau_is_loaded_at_the_end(tmp_path, target, rows):
    drafter = make_drafter("eagle3", target)
    trainer = make_trainer(
        "opd",
        tmp_path,
        drafter,
        target,
        rows,
        rows,
        max_steps=4,
        learning_rate=0.05,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_tau",
        load_best_model_at_end=True,
    )
    trainer.train()
    taus = [log["eval_tau"] for log in trainer.state.log_history if "eval_tau" in log]
    assert len(taus) == 4 and len(set(taus)) > 1 and trainer.state.best_metric == max(taus)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{taus.index(max(taus)) + 1}"
    assert_equal(weights(drafter), weights(AutoDrafter.from_pretrained(best)))
    # Metrics of training and of evaluation do not mix.
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 4 and all("tau" in log and "eval_tau" not in log for log in steps)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_holds_the_drafter_alone(tmp_path, target, rows, family):
    drafter = make_drafter(family, target)
    trainer = make_trainer("opd", tmp_path, drafter, target, rows, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == drafter.state_dict().keys()
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {"model.safetensors", "optimizer.safetensors"}
    state = {"state.json", "trainer_state.json", "optimizer.safetensors", "manifest.json"}
    assert {path.name for path in folder.iterdir()} - state == {
        *("config.json", "model.safetensors", "training_record.json", "README.md")
    }
    target_shapes = {tuple(p.shape) for p in target.causal_lm.get_input_embeddings().parameters()}
    assert family == "eagle3" or not target_shapes & {tuple(tensor.shape) for tensor in saved.values()}
    trainer.save_model(tmp_path / "final")
    assert_equal(weights(drafter), weights(AutoDrafter.from_pretrained(tmp_path / "final")))


# -- data -------------------------------------------------------------------------------------------------------------


def test_regenerate_trains_on_the_targets_own_text(tmp_path, target):
    prompts = [[9, 10, 11], [12, 13]]
    foreign = Dataset.from_dict({"prompt": [words(p) for p in prompts], "completion": ["w20 w21", "w22 w23 w24"]})
    trainer = make_trainer(
        "sft", tmp_path, make_drafter("dflash", target), target, foreign, regenerate=True, max_steps=1
    )
    expected = [greedy_text(target, prompt, 12) for prompt in prompts]
    assert trainer.train_dataset["input_ids"][:] == expected
    assert [sum(mask) for mask in trainer.train_dataset["completion_mask"]] == [12, 12]
    trainer.train()
    kept = make_trainer("sft", tmp_path, make_drafter("dflash", target), target, foreign)
    assert kept.train_dataset["input_ids"][0][:5] == [9, 10, 11, 20, 21]


def test_opd_ignores_completions_unless_they_are_declared_the_targets(tmp_path, target, rows):
    foreign = rows.map(lambda row: {"completion_ids": [7, 7, 7]})
    seen = []
    for data in (rows, foreign):
        drafter = make_drafter("dflash", target)
        trainer = make_trainer("opd", tmp_path, drafter, target, data, max_steps=1)
        assert "completion_ids" not in trainer.train_dataset.column_names
        trainer.train()
        seen.append(weights(drafter))
    assert_equal(*seen)
    declared = make_trainer(
        "opd", tmp_path, make_drafter("dflash", target), target, foreign, completions_from_target=True
    )
    assert declared.train_dataset["input_ids"][0][-3:] == [7, 7, 7]


CHAT = [{"role": "user", "content": "w9 w10"}]
RESPONSE = [{"role": "assistant", "content": "w20 w21 w22"}]


@pytest.mark.parametrize(
    "columns,prompt_ids",
    [
        ({"prompt": "w9 w10"}, [9, 10]),
        ({"prompt": "w9 w10", "completion": "w20 w21"}, [9, 10]),
        ({"prompt": CHAT}, [1, 4, 9, 10, 2, 1, 5]),
        ({"prompt": CHAT, "completion": RESPONSE}, [1, 4, 9, 10, 2, 1, 5]),
        ({"messages": CHAT + RESPONSE}, [1, 4, 9, 10, 2, 1, 5]),
        ({"prompt_ids": [9, 10]}, [9, 10]),
    ],
)
def test_opd_reads_every_kind_of_prompt(tmp_path, target, columns, prompt_ids):
    rows = Dataset.from_list([columns] * 2)
    trainer = make_trainer("opd", tmp_path, make_drafter("dflash", target), target, rows, max_steps=1)
    assert trainer.train_dataset["prompt_ids"][0] == prompt_ids
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "w9 w10", "completion": "w20 w21 w22"},
        {"prompt": CHAT, "completion": RESPONSE},
        {"messages": CHAT + RESPONSE},
        {"text": "w9 w10 w20 w21 w22"},
    ],
)
def test_sft_reads_every_kind_of_row(tmp_path, target, columns):
    rows = Dataset.from_list([columns] * 2)
    trainer = make_trainer("sft", tmp_path, make_drafter("dflash", target), target, rows, max_steps=1)
    input_ids, mask = trainer.train_dataset[0]["input_ids"], trainer.train_dataset[0]["completion_mask"]
    written = [token for token, marked in zip(input_ids, mask, strict=True) if marked]
    assert written == ([10, 20, 21, 22] if "text" in columns else [20, 21, 22, 2])
    trainer.train()
    assert trainer.state.log_history[0]["loss/accepted"] > 0


# -- display ----------------------------------------------------------------------------------------------------------


def test_logged_completions_show_accepted_and_rejected_drafts_by_colour(monkeypatch, tmp_path, target):
    prompt, drafter = [9, 10, 11], make_drafter("dflash", target)
    truth = greedy_text(target, prompt, 30)
    plant(monkeypatch, drafter, [truth, truth], lambda row: {6})
    rows = Dataset.from_dict({"prompt_ids": [prompt] * 2})
    trainer = make_trainer(
        "opd", tmp_path, drafter, target, rows, max_steps=1, log_completions=True, num_completions_to_print=1
    )
    trainer._console = Console(file=StringIO(), record=True, width=200, force_terminal=True, color_system="standard")
    trainer.train()
    styled = trainer._console.export_text(styles=True, clear=False)
    plain = trainer._console.export_text()
    assert plain.count("step 0, row 0") == 1 and "row 1" not in plain and "w9 w10 w11" in plain
    # The first block keeps two drafts and loses two; \x1b[32m is green, 9 strikes through and 31 is red.
    decode = trainer.target.tokenizer.decode
    assert f"\x1b[32m{decode(truth[4:6])}\x1b[0m" in styled
    assert f"\x1b[9;31m{decode([(truth[6] + 1) % VOCAB, truth[7]])}\x1b[0m" in styled
    assert f"\x1b[1m{decode(truth[6:7])}\x1b[0m" in styled


def test_nothing_is_printed_unless_asked_for(tmp_path, target, rows):
    trainer = make_trainer("opd", tmp_path, make_drafter("dflash", target), target, rows, max_steps=1)
    trainer._console = Console(file=StringIO(), record=True)
    trainer.train()
    assert trainer._console.export_text() == ""
