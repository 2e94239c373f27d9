# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Today's public drafters, in the small: read as what they are, decoding the target's own text, adapted, and refused with
the reason that is true of them.
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_adapters import make_trainer
from test_published_checkpoints import assert_same, write
from test_rollout_replay import assert_same_blocks, roll_out, text_of

from helpers.oracle import greedy_text
from helpers.public_layouts import PUBLIC
from helpers.rollouts import Options, replay
from helpers.tiny import EOS, MASK, make_prompts, make_target
from trl_draft_opd import AutoDrafter


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    """Prompts with the target's greedy responses, without ids that no text may hold."""
    pairs = [(prompt, greedy_text(target, prompt, 12)[len(prompt) :]) for prompt in make_prompts(8, seed=2)]
    pairs = [(prompt, response) for prompt, response in pairs if not {EOS, MASK} & {*prompt, *response}][:2]
    prompts, responses = zip(*pairs, strict=True)
    return Dataset.from_dict({"prompt_ids": list(prompts), "completion_ids": list(responses)})


@pytest.mark.parametrize("layout", PUBLIC)
def test_a_public_drafter_is_read_as_what_it_is(tmp_path, layout):
    drafter, (config, tensors) = PUBLIC[layout]()
    loaded = AutoDrafter.from_pretrained(write(tmp_path, config, tensors))
    assert type(loaded) is type(drafter)
    assert_same(loaded, drafter)


@pytest.mark.parametrize("layout", PUBLIC)
def test_with_a_public_drafter_live_and_replay_give_the_targets_own_text(tmp_path, target, layout):
    drafter = AutoDrafter.from_pretrained(write(tmp_path, *PUBLIC[layout]()[1]))
    prompts = make_prompts(3)
    rollout = roll_out(target, drafter, prompts)
    assert rollout.responses() == [greedy_text(target, prompt, 20)[len(prompt) :] for prompt in prompts]
    replayed = replay(target, drafter, text_of(rollout), Options(keep_branch_hidden=True, segment_length=3))
    assert_same_blocks(rollout, replayed)


@pytest.mark.parametrize("layout", PUBLIC)
def test_a_public_drafter_is_adapted(tmp_path, target, rows, layout):
    folder = write(tmp_path / "public", *PUBLIC[layout]()[1])
    trainer = make_trainer("opd", tmp_path / "run", folder, target, rows, peft_config=LoraConfig(r=2), max_steps=1)
    trainer.train()
    trainer.save_model()
    adapted, public = AutoDrafter.from_pretrained(tmp_path / "run"), AutoDrafter.from_pretrained(folder)
    own, base = adapted.state_dict(), public.state_dict()
    changed = {name for name in own if not torch.equal(own[name], base[name])}
    # The layers, and neither head nor norms nor maps.
    assert changed and all(name.endswith(("proj.weight", "fc.weight", "markov_w2.weight")) for name in changed)
    assert adapted.config.to_diff_dict() == public.config.to_diff_dict() | {
        "target_model_name_or_path": adapted.config.target_model_name_or_path
    }
