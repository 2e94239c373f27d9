# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Options of DFlash drafters through rollouts, trainers and folders: a reduced vocabulary, and drafts of the anchor's own
position. `test_reference.py` compares states, losses and gradients of both with plain code.
"""

import pytest
import torch

from helpers.oracle import greedy_rows
from helpers.rollouts import Options, decode, replay
from helpers.tiny import EOS, MASK, TINY_RUN, VOCAB, make_drafter, make_prompts, make_target
from helpers.trained import overfit, own_text
from trl_draft_opd import AutoDrafter, DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.costs.shapes import DrafterShape
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.drafters.draft_vocabulary import build_draft_vocabulary
from trl_draft_opd.rollout.replay import TargetText


# Every third token is missing; the end of sequence is in.
VOCABULARY = build_draft_vocabulary(torch.tensor([int(i % 3 != 0) for i in range(VOCAB)]), 42, always_include=(EOS,))
# Another third is missing, and fewer are kept.
OTHER_VOCABULARY = build_draft_vocabulary(
    torch.tensor([int(i % 3 != 1) for i in range(VOCAB)]), 30, always_include=(EOS,)
)
VARIANTS = {
    "reduced": ("dflash", {"draft_vocabulary": VOCABULARY}),
    "reduced dspark": ("dspark", {"draft_vocabulary": VOCABULARY}),
    # As many drafts as the others.
    "anchor": ("dflash", {"sample_from_anchor": True, "block_size": 4}),
}
RUN = TINY_RUN | {"max_steps": 2, "warmup_steps": 0, "per_device_train_batch_size": 2, "max_completion_length": 12}
RUN |= {"learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1}


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    return greedy_rows(target, 6, 10)


def make_variant(variant, target):
    family, options = VARIANTS[variant]
    return make_drafter(family, target, **options)


def make_trainer(kind, place, drafter, target, rows, **changes):
    trainer_class, config = (DraftSFTTrainer, DraftSFTConfig) if kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
    return trainer_class(drafter, target, config(str(place), **RUN | changes), rows)


def logits_of(drafter, target, hidden):
    with torch.no_grad():
        return drafter.draft_logits(hidden, target.project)


# -- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_is_the_targets_own_and_drafts_are_accepted(target, variant):
    prompts = make_prompts(4)
    family, options = VARIANTS[variant]
    whole = {name: value for name, value in options.items() if name != "draft_vocabulary"}
    drafter = overfit(target, make_drafter(family, target, **whole), prompts, num_tokens=20, steps=60)
    if whole != options:
        drafter.reduce_vocabulary(VOCABULARY, target)
    rollout = decode(target, drafter, prompts, Options(max_completion_length=20))
    assert rollout.responses() == [own_text(target, prompt, 20)[len(prompt) :] for prompt in prompts]
    accepted = rollout.accepted[rollout.is_block]
    assert set(accepted.tolist()) >= {0, 4}, "blocks that are kept whole, and blocks of which nothing is"
    if "reduced" in variant:
        assert torch.isin(rollout.drafts[rollout.is_block], VOCABULARY.token_ids).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_live_replay_and_training_see_the_same_blocks(target, variant):
    drafter = make_variant(variant, target)
    live = decode(target, drafter, make_prompts(3), Options(max_completion_length=16))
    text = TargetText(live.input_ids, live.attention_mask, live.completion_mask, range(3))
    replayed = replay(target, drafter, text, Options(chunk_bytes=4 * VOCAB * 7))
    is_block = live.is_block
    assert torch.equal(live.anchors, replayed.anchors)
    assert torch.equal(live.accepted[is_block], replayed.accepted[is_block])
    layer_ids = drafter.config.target_layer_ids
    features = target.read_text(live.input_ids, live.attention_mask, layer_ids).padded().features
    with torch.no_grad():
        hidden = run_blocks(drafter, features, live.input_ids, live.anchors, live.drafts, target.embed)
    drafted = drafter.to_target_ids(logits_of(drafter, target, hidden).argmax(-1))
    assert torch.equal(drafted[is_block], live.drafts[is_block])


# -- reducing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dflash", "dspark", "eagle3"])
def test_what_is_left_of_a_vocabulary_has_the_logits_it_had(target, family):
    drafter = make_drafter(family, target)
    width = sum(part.width for part in drafter.head_parts)
    hidden = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    whole = logits_of(drafter, target, hidden)
    drafter.reduce_vocabulary(VOCABULARY, target)
    torch.testing.assert_close(logits_of(drafter, target, hidden), whole[..., VOCABULARY.token_ids])
    assert drafter.draft_token_ids.tolist() == VOCABULARY.token_ids.tolist()
    assert drafter.lm_head.weight.requires_grad == (family == "eagle3")


@pytest.mark.parametrize("family", ["dflash", "dspark", "eagle3"])
def test_an_exchanged_vocabulary_keeps_what_was_learned_and_begins_the_rest_with_the_targets_rows(target, family):
    drafter = make_drafter(family, target)
    hidden = torch.randn(2, 3, drafter.config.hidden_size, generator=torch.Generator().manual_seed(0))
    of_target = target.project(hidden)
    rest = sum(part.width for part in drafter.head_parts) - hidden.shape[-1]
    hidden = torch.cat([hidden, torch.randn(2, 3, rest)], dim=-1)
    drafter.reduce_vocabulary(VOCABULARY, target)
    with torch.no_grad():
        for part in drafter.head_parts:
            part.module.weight.mul_(2)
    before, had = logits_of(drafter, target, hidden), VOCABULARY.token_ids.tolist()
    drafter.reduce_vocabulary(OTHER_VOCABULARY, target)
    after, has = logits_of(drafter, target, hidden), drafter.draft_token_ids.tolist()
    assert has == OTHER_VOCABULARY.token_ids.tolist() and set(has) - set(had) and set(had) & set(has)
    for place, token in enumerate(has):
        expected = before[..., had.index(token)] if token in had else of_target[..., token]
        torch.testing.assert_close(after[..., place], expected)
    assert drafter.lm_head.weight.requires_grad == (family == "eagle3")
    assert drafter.lm_head.out_features == len(has) == drafter.config.draft_vocab_size


def test_a_head_of_rows_is_refused_where_the_targets_head_does_more(target):
    capped = make_target("gemma2")
    drafter = make_drafter("dflash", capped)
    with pytest.raises(ValueError, match="head of target type 'gemma2' scales, caps or shifts its logits"):
        drafter.reduce_vocabulary(VOCABULARY, capped)
    exchanged = make_drafter("eagle3", capped)
    for vocabulary in (VOCABULARY, OTHER_VOCABULARY):
        exchanged.reduce_vocabulary(vocabulary, capped)  # its head is trained, so other rows are only where it begins
    with pytest.raises(ValueError, match="built over 40 tokens cannot reduce a drafter of a target with 64"):
        exchanged.reduce_vocabulary(build_draft_vocabulary(torch.arange(40), 9), capped)
    with pytest.raises(ValueError, match="which a DFlash 2 drafter cannot have"):
        make_drafter("dflash2", target).reduce_vocabulary(VOCABULARY, target)


@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"draft_vocab_size": 20}], ids=str)
@pytest.mark.parametrize("family", ["dflash", "dspark", "eagle3"])
def test_costs_count_the_weights_that_are_trained(target, family, options):
    drafter = make_drafter(family, target)
    for name, value in options.items():
        setattr(drafter.config, name, value)
    drafter = type(drafter)(drafter.config)
    trained = sum(parameter.numel() for parameter in drafter.parameters() if parameter.requires_grad)
    assert DrafterShape.of(drafter.config).parameters == trained


# -- trainers and folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "opd"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_moves_all_but_the_targets_rows_and_the_folder_drafts_alike(tmp_path, target, rows, variant, kind):
    drafter = make_variant(variant, target)
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    trainer = make_trainer(kind, tmp_path, drafter, target, rows)
    trainer.train()
    same = {name for name, tensor in drafter.state_dict().items() if torch.equal(tensor, before[name])}
    frozen = {"lm_head.weight"} if "reduced" in variant else set()
    assert same == (frozen | {"d2t", "t2d"} if frozen else set())
    trainer.save_model()
    loaded = AutoDrafter.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, drafter.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert {name for name, each in loaded.named_parameters() if not each.requires_grad} == frozen
    assert loaded.default_num_drafts == 4 and loaded.config.sample_from_anchor == drafter.config.sample_from_anchor


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_bit_for_bit(tmp_path, target, rows, variant):
    def run(place, **changes):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3} | changes
        trainer = make_trainer("opd", tmp_path / place, make_variant(variant, target), target, rows, **options)
        trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
        return trainer.drafter.state_dict()

    whole = run("whole")
    resumed = run("cut", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_run_that_chose_its_vocabulary_resumes_before_the_target_responds_again(tmp_path, target, rows):
    prompts = rows.remove_columns([name for name in rows.column_names if name != "prompt_ids"])

    def run(**changes):
        options = {"regenerate": True, "draft_vocab_size": 20, "save_strategy": "steps", "save_steps": 1} | changes
        trainer = make_trainer("sft", tmp_path, make_drafter("dflash", target), target, prompts, **options)
        trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
        return trainer

    first = run(max_steps=1)
    assert first.drafter.config.draft_vocab_size == 20 and EOS in first.drafter.draft_token_ids
    assert MASK not in first.drafter.draft_token_ids
    resumed = run(max_steps=2, resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert torch.equal(resumed.drafter.d2t, first.drafter.d2t)
    settings = resumed.training_record().stages[0].settings
    assert settings["draft_vocab_size"] == 20 and 0 < settings["draft_vocab_coverage"] <= 1


def test_an_adapter_trains_beside_a_reduced_head_and_merges_into_a_drafter_like_it(tmp_path, target, rows):
    peft = pytest.importorskip("peft")
    make_variant("reduced", target).save_pretrained(tmp_path / "base")
    config = DraftSFTConfig(str(tmp_path / "run"), **RUN)
    trainer = DraftSFTTrainer(str(tmp_path / "base"), target, config, rows, peft_config=peft.LoraConfig(r=2))
    trainer.train()
    trainer.save_model()
    merged, base = AutoDrafter.from_pretrained(tmp_path / "run"), AutoDrafter.from_pretrained(tmp_path / "base")
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight) and not merged.lm_head.weight.requires_grad
    assert not torch.equal(merged.layers[0].mlp.up_proj.weight, base.layers[0].mlp.up_proj.weight)
    assert all(each.requires_grad for name, each in merged.named_parameters() if name != "lm_head.weight")
