# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Tests of `trl_draft_opd/trainer/draft_vocabulary.py`: which tokens a drafter can propose once training starts."""

from collections import Counter
from itertools import chain

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file

from helpers.tiny import EOS, TINY_RUN, VOCAB, make_drafter, make_prompts, make_target
from trl_draft_opd import (
    AutoDrafter,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    Eagle3DraftModel,
    build_draft_vocabulary,
)
from trl_draft_opd.export import TargetOfExport, export_drafter
from trl_draft_opd.trainer import draft_vocabulary


RUN = TINY_RUN | {"max_steps": 2, "warmup_steps": 0, "max_completion_length": 12, "per_device_train_batch_size": 2}
RUN |= {"save_strategy": "no", "logging_steps": 1, "seed": 3}
# Nothing that the target says; `regenerate` must not count it.
FOREIGN = Dataset.from_dict({"prompt_ids": make_prompts(6), "completion_ids": [[60, 61, 62, 63]] * 6})


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture
def is_large(monkeypatch):
    """Take the tiny vocabulary for a large one."""
    monkeypatch.setattr(draft_vocabulary, "LARGE_VOCABULARY", VOCAB - 1)
    monkeypatch.setattr(draft_vocabulary, "DRAFT_VOCAB_SIZE", 20)


def make_sft(place, drafter, target, rows=FOREIGN, **settings):
    return DraftSFTTrainer(drafter, target, DraftSFTConfig(str(place), **RUN | settings), rows)


def most_frequent(completions, size):
    """Return the tokens to keep by the plainest count there is: EOS, then by frequency, then the lowest ids."""
    counts = Counter(chain.from_iterable(completions))
    return sorted(sorted(range(VOCAB), key=lambda token: (token != EOS, -counts[token], token))[:size])


def completions_of(rows):
    pairs = zip(rows["input_ids"][:], rows["completion_mask"][:], strict=True)
    return [[token for token, mark in zip(ids, marks, strict=True) if mark] for ids, marks in pairs]


@pytest.mark.parametrize("place_of_responses", ["own", "shared"])
def test_a_fresh_drafter_of_a_large_vocabulary_gets_the_targets_own_frequent_tokens(
    tmp_path, target, is_large, caplog, place_of_responses
):
    settings = {} if place_of_responses == "own" else {"responses": str(tmp_path / "responses")}
    drafter = make_drafter("eagle3", target)
    head = drafter.lm_head.weight.detach().clone()
    trainer = make_sft(tmp_path / "run", drafter, target, regenerate=True, **settings)
    completions = completions_of(trainer.train_dataset)
    assert drafter.draft_token_ids.tolist() == most_frequent(completions, 20)
    assert torch.equal(drafter.lm_head.weight, head[drafter.draft_token_ids])
    assert drafter.t2d.nonzero()[:, 0].tolist() == drafter.draft_token_ids.tolist()
    said = [
        record.getMessage() for record in caplog.records if "proposes 20 of the target's 64" in record.getMessage()
    ]
    covered = sum(token in drafter.draft_token_ids for token in chain.from_iterable(completions))
    assert len(said) == 1 and f"cover {covered / sum(map(len, completions)):.2%}" in said[0]
    trainer.train()
    trainer.save_model()
    loaded = AutoDrafter.from_pretrained(tmp_path / "run")
    assert loaded.draft_token_ids.tolist() == drafter.draft_token_ids.tolist()


@pytest.mark.parametrize(
    ("settings", "make", "size"),
    [
        ({"draft_vocab_size": 0}, lambda target: make_drafter("eagle3", target), VOCAB),
        ({"draft_vocab_size": 9}, lambda target: make_drafter("eagle3", target), 9),
        ({}, lambda target: Eagle3DraftModel(make_drafter("eagle3", target).config), VOCAB),
        ({"draft_vocab_size": 9}, lambda target: Eagle3DraftModel(make_drafter("eagle3", target).config), 9),
        ({"draft_vocab_size": VOCAB}, lambda target: make_drafter("eagle3", target), VOCAB),
    ],
    ids=["zero-keeps-all", "a-number", "an-object-of-a-config", "a-number-for-it", "the-whole-by-number"],
)
def test_the_setting_says_how_many_tokens_and_only_an_open_choice_is_made(
    tmp_path, target, is_large, settings, make, size
):
    drafter = make(target)
    make_sft(tmp_path, drafter, target, **settings)
    assert drafter.config.draft_vocab_size == size == len(drafter.lm_head.weight)
    # A second trainer, without the setting, leaves what was settled.
    make_sft(tmp_path, drafter, target)
    assert drafter.config.draft_vocab_size == size


def test_a_small_vocabulary_stays_whole(tmp_path, target):
    drafter = make_drafter("eagle3", target)
    make_sft(tmp_path, drafter, target)
    assert not drafter.config.has_reduced_vocabulary


def test_opd_keeps_the_vocabulary_of_its_drafter_and_says_when_nobody_chose_one(tmp_path, target, is_large, caplog):
    fresh = make_drafter("eagle3", target)
    config = DraftOPDConfig(str(tmp_path / "opd"), **RUN)
    DraftOPDTrainer(fresh, target, config, FOREIGN)
    assert not fresh.config.has_reduced_vocabulary and "would choose 20 of them" in caplog.text
    caplog.clear()
    drafter = make_drafter("eagle3", target)
    make_sft(tmp_path / "sft", drafter, target, regenerate=True).train()
    ids = drafter.draft_token_ids.tolist()
    trainer = DraftOPDTrainer(drafter, target, config, FOREIGN)
    trainer.train()
    assert drafter.draft_token_ids.tolist() == ids and "would choose" not in caplog.text
    sft, opd = trainer.training_record().stages
    assert sft.settings["draft_vocab_size"] == 20 and "draft_vocab_coverage" not in opd.settings


def test_a_run_that_resumes_has_the_same_ids_byte_for_byte(tmp_path, target, is_large):
    def run(place, steps, **settings):
        settings |= {"regenerate": True, "save_strategy": "steps", "save_steps": 1, "max_steps": steps}
        trainer = make_sft(tmp_path / place, make_drafter("eagle3", target), target, **settings)
        trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
        return load_file(tmp_path / place / f"checkpoint-{steps}" / "model.safetensors")

    whole = run("whole", 2)
    run("cut", 1)
    resumed = run("cut", 2, resume_from_checkpoint=True)
    assert whole["d2t"].shape == (20,)
    # The rate of a run of one step is another, so only what it does not touch can be compared.
    assert all(torch.equal(whole[name], resumed[name]) for name in ("d2t", "t2d"))


def test_a_loaded_drafter_chooses_anew_where_asked_and_keeps_what_nothing_beats(tmp_path, target, is_large, caplog):
    first = Dataset.from_dict({"prompt_ids": [[9, 10]], "completion_ids": [[20, 21, 22, 23, 24, EOS]]})
    second = Dataset.from_dict({"prompt_ids": [[9, 10]], "completion_ids": [[50, 21, 50, 51, EOS]]})
    drafter = make_drafter("eagle3", target)
    make_sft(tmp_path / "first", drafter, target, first, draft_vocab_size=6, learning_rate=1e-2).train()
    drafter.save_pretrained(tmp_path / "old")
    old = dict(zip(drafter.draft_token_ids.tolist(), drafter.lm_head.weight, strict=True))

    def adapt(place, steps, **settings):
        settings |= {"save_strategy": "steps", "save_steps": 1, "max_steps": steps, "draft_vocab_size": 6}
        return make_sft(tmp_path / place, str(tmp_path / "old"), target, second, **settings)

    caplog.clear()
    adapted = adapt("whole", 1).drafter
    # EOS and what is written; of the rest those it had come first, by their ids.
    assert adapted.draft_token_ids.tolist() == sorted([EOS, 50, 21, 51, 20, 22])
    assert "proposes 6 of the target's 64 tokens, 2 of them new to it, which cover 100.00%" in caplog.text
    of_target = target.causal_lm.get_output_embeddings().weight
    for token, row in zip(adapted.draft_token_ids.tolist(), adapted.lm_head.weight, strict=True):
        assert torch.equal(row, old.get(token, of_target[token]))
    kept = make_sft(tmp_path / "kept", str(tmp_path / "old"), target, second).drafter
    assert kept.draft_token_ids.tolist() == sorted(old) and "cover 40.00%" in caplog.text
    adapt("cut", 1).train()
    resumed = adapt("cut", 2, resume_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.drafter.draft_token_ids.tolist() == adapted.draft_token_ids.tolist()


def test_a_stream_is_counted_as_far_as_its_first_rows(tmp_path, target, is_large, monkeypatch):
    monkeypatch.setattr(draft_vocabulary, "STREAMED_ROWS", 4)

    def endless():
        row = 0
        while True:
            yield {"prompt_ids": [9, 10], "completion_ids": [20 + row % 40, EOS]}
            row += 1

    drafter = make_drafter("eagle3", target)
    make_sft(tmp_path, drafter, target, IterableDataset.from_generator(endless))
    assert drafter.draft_token_ids.tolist() == most_frequent([[20, EOS], [21, EOS], [22, EOS], [23, EOS]], 20)


@pytest.mark.parametrize(
    ("family", "options", "settings", "message"),
    [
        ("dflash2", {}, {"draft_vocab_size": 9}, "which a DFlash 2 drafter cannot have"),
        ("dflash", {}, {"draft_vocab_size": VOCAB + 1}, "must lie in 1..63"),
        (
            "eagle3",
            {"reduced": 24},
            {"draft_vocab_size": 0},
            "all 64 tokens, of which the drafter was made to propose",
        ),
        ("eagle3", {}, {"draft_vocab_size": VOCAB + 1}, "must lie in 1..63"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused_before_the_target_responds(
    tmp_path, target, family, options, settings, message
):
    if "reduced" in options:
        counts = torch.arange(VOCAB)
        options = {"draft_vocabulary": build_draft_vocabulary(counts, options["reduced"])}
    with pytest.raises(ValueError, match=message):
        make_sft(tmp_path, make_drafter(family, target, **options), target, regenerate=True, **settings)
    assert not (tmp_path / "_responses").exists()


def test_an_adapter_leaves_the_vocabulary_of_its_drafter(tmp_path, target, is_large):
    peft = pytest.importorskip("peft")
    make_drafter("eagle3", target).save_pretrained(tmp_path / "base")
    config = DraftSFTConfig(str(tmp_path / "run"), **RUN)
    adapted = DraftSFTTrainer(str(tmp_path / "base"), target, config, FOREIGN, peft_config=peft.LoraConfig(r=2))
    assert adapted.drafter.config.draft_vocab_size == VOCAB
    config = DraftSFTConfig(str(tmp_path / "run"), draft_vocab_size=9, **RUN)
    with pytest.raises(ValueError, match="drafter under the adapter"):
        DraftSFTTrainer(str(tmp_path / "base"), target, config, FOREIGN, peft_config=peft.LoraConfig(r=2))


def test_the_card_states_what_a_reduced_vocabulary_covers(tmp_path, target, is_large):
    drafter = make_drafter("eagle3", target)
    trainer = make_sft(tmp_path / "run", drafter, target, regenerate=True)
    trainer.train()
    record = trainer.training_record()
    coverage = record.stages[0].settings["draft_vocab_coverage"]
    embedding = target.causal_lm.get_input_embeddings().weight
    facts = TargetOfExport("org/target", target.causal_lm.config, embedding)
    export_drafter(drafter, tmp_path / "export", target=facts, record=record)
    card = (tmp_path / "export" / "README.md").read_text("utf-8")
    assert 0 < coverage < 1
    assert f"20 of 64 tokens, {coverage:.2%} of the response tokens it was trained on" in card
