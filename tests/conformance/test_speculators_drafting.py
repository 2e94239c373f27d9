# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
DSpark and DFlash 2 as the speculators library computes them: what its whole forward hands its losses, and its classes
as drafters of our decoding loop on real questions.
"""

from typing import Any

import pytest
import torch
from datasets import Dataset
from test_export import export, make_variant
from test_real_text import briefly_trained, decode, own_texts, read_prompts
from test_rollout_replay import assert_same_blocks
from test_speculators import scores_of

from helpers.tiny import make_target
from trl_draft_opd import AutoDrafter, FrozenTarget
from trl_draft_opd.drafters.base import DraftContext, Drafter, DraftState, run_blocks


pytestmark = pytest.mark.conformance


def read_both(drafter, target, target_folder, folder):
    """Export a drafter; return it as it is read again, and the library's model of the same file."""
    from speculators import SpeculatorModel, SpeculatorModelConfig

    export(drafter, target, folder, to="speculators", dtype=torch.float32)
    # The library fetches the target it is named; here that is a folder.
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"org/target"', f'"{target_folder}"'))
    config = SpeculatorModelConfig.from_pretrained(str(folder))
    # Unlike its own default, a kernel that takes any length.
    config.transformer_layer_config._attn_implementation = "sdpa"
    model = SpeculatorModel.from_pretrained(str(folder), config=config).float().eval()
    return AutoDrafter.from_pretrained(folder), model


# -- the whole forward ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    target, folder = make_target("llama"), tmp_path_factory.mktemp("target")
    target.causal_lm.save_pretrained(folder)
    return target, folder


@pytest.mark.parametrize("variant", ["dspark", "dspark-anchor", "dflash2", "dflash2-anchor"])
@torch.no_grad()
def test_what_its_forward_hands_its_losses_over_two_blocks_is_ours(variant, tiny, tmp_path, monkeypatch):
    target, target_folder = tiny
    drafter = make_variant(variant, target)
    for name, parameter in drafter.named_parameters():
        # Norms near one, convolutions that hand on more than they mix in, and matrices that keep a state's size: then
        # rounding stays what it is for a trained drafter.
        parameter.mul_(0.1).add_(1) if "norm" in name else parameter.mul_(0.05 if "kernel" in name else 0.2)
        if name.endswith("base_kernel"):
            parameter[:, 0] += 1
    ours, model = read_both(drafter, target, target_folder, tmp_path / "out")
    handed: dict[str, Any] = {}

    def note(logits=None, targets=None, confidence_logits=None, *others, **named):
        handed.update(named, logits=logits, confidence_logits=confidence_logits)
        return None, {}

    monkeypatch.setattr(f"{type(model).__module__}.compute_metrics", note)
    length, anchors = 40, torch.tensor([[5, 28]])
    ids = torch.randint(7, 64, (1, length))
    reading = target.read_text(ids, torch.ones_like(ids), ours.config.target_layer_ids).padded()
    marks = torch.zeros(1, length, dtype=torch.bool).index_fill(1, anchors[0], True)
    model(reading.features, ids, marks, reading.last_hidden, torch.zeros_like(ids), max_anchors=2)

    size, drafts = ours.config.block_size, ours.config.drafts_per_block
    handed = {
        name: value[0].unflatten(0, (2, size))[:, size - drafts :]
        for name, value in handed.items()
        if isinstance(value, torch.Tensor) and value.dim() > 1
    }
    # Slots read the text's tokens, as in its training.
    recorded = ids[:, anchors[0][:, None] + torch.arange(1, drafts + 1)]
    hidden = run_blocks(ours, reading.features, ids, anchors, recorded, target.embed)
    logits = ours.draft_logits(hidden, target.project)[0]
    exactly = {"atol": 1e-5, "rtol": 0}
    if ours.candidates is None:
        torch.testing.assert_close(logits, handed["logits"], **exactly)
        torch.testing.assert_close(ours.confidence_logits(hidden)[0], handed["confidence_logits"], **exactly)
        assert handed["confidence_logits"].std() > 0.1
    else:
        unary = target.project(hidden[..., : ours.config.hidden_size])[0]
        torch.testing.assert_close(unary, handed["unary_logits"], **exactly)
        # It trains with the target's token in the place of the weakest candidate; that one is never drafted.
        scores = logits.gather(-1, handed["training_candidate_ids"])
        is_ours = scores.isfinite()
        torch.testing.assert_close(scores[is_ours], handed["candidate_logits"][is_ours], **exactly)
        assert (~is_ours).sum(dim=-1).max() == 1 and is_ours.sum(dim=-1).min() >= ours.config.selector_top_k - 1
    assert logits[logits.isfinite()].std() > 0.1


# -- its classes as drafters ------------------------------------------------------------------------------------------


class SpeculatorsDrafter(Drafter):
    """
    The library's class behind our contract. Its context is the target's features; a block is a pass of the class over
    them, and a state holds what it makes of a slot and, as one more column, the id of the token before.
    """

    def __init__(self, ours: Drafter, model: Any):
        super().__init__(ours.config)
        self.config_class, self.model = type(ours.config), model

    @property
    def max_drafts(self) -> int:
        return self.config.drafts_per_block

    @property
    def default_num_drafts(self) -> int:
        return self.config.drafts_per_block

    def encode_context(self, target_features, next_ids, position_ids, embed):
        return DraftContext(keys=[], values=[], fused=target_features)

    def begin(self, context, anchors, anchor_tokens, num_drafts, embed):
        """Run the class over all rows as documents of one row; each has a block, behind which nothing is seen."""
        num_rows, size = len(anchors), self.config.block_size
        assert anchors.shape[1] == 1 and num_drafts == self.max_drafts
        features = torch.nn.functional.pad(context.fused, (0, 0, 0, size + 1))
        length = features.shape[1]
        ids = anchors.new_zeros(num_rows, length).scatter(1, anchors, anchor_tokens)
        is_anchor = torch.zeros_like(ids).scatter(1, anchors, 1)
        documents = torch.arange(num_rows)[:, None].expand(-1, length)
        positions = torch.arange(length).expand(num_rows, -1)
        states = features.new_zeros(1, num_rows * length, self.config.hidden_size)
        hidden, *_ = self.model._backbone_forward(
            features.flatten(0, 1)[None],
            ids.view(1, -1),
            is_anchor.view(1, -1),
            states,
            documents.reshape(1, -1),
            positions.reshape(1, -1),
            max_anchors=num_rows,
        )
        self.block = hidden.view(num_rows, 1, size, -1)[:, :, size - num_drafts :]
        return self._at(1, anchor_tokens)

    def advance(self, state, tokens, columns=None):
        assert columns is None
        return self._at(state.slot + 1, tokens)

    def _at(self, slot, before):
        return DraftState(slot, torch.cat([self.block[:, :, slot - 1], before[..., None].float()], dim=-1), None)

    def draft_logits(self, hidden, project):
        hidden, before = hidden[..., :-1], hidden[..., -1].long()
        return scores_of(self.model, hidden, self.model.lm_head(hidden), before)


@pytest.mark.parametrize("family", ["dspark", "dspark-masks", "dflash2"])
def test_rounds_on_50_questions_are_those_with_the_librarys_class_as_the_drafter(
    family, shared_dir, tmp_path, record_property
):
    target_folder = shared_dir / "targets" / "gsm8k-qwen3-7m"
    target = FrozenTarget.load(target_folder, dtype=torch.float32)
    prompts = read_prompts(shared_dir, target, 50)
    texts = own_texts(target, prompts, 64, 25)
    # Half of the texts are new to the drafter.
    rows = Dataset.from_dict({"prompt_ids": prompts[:25], "completion_ids": texts[:25]})
    settings = {"per_device_train_batch_size": 8, "num_anchors": 24, "learning_rate": 3e-3, "max_steps": 70}
    trained = briefly_trained(family, target, tmp_path / "run", rows, lr_scheduler_type="constant", **settings)
    ours, model = read_both(trained, target, target_folder, tmp_path / "out")
    theirs = SpeculatorsDrafter(ours, model)
    num_kept, num_blocks = 0, 0
    own, other = (decode(target, drafter, prompts, 10, 64) for drafter in (ours, theirs))
    for first, second in zip(own, other, strict=True):
        assert first.responses() == second.responses()
        assert torch.equal(first.num_rounds, second.num_rounds)
        assert_same_blocks(first, second)
        num_kept, num_blocks = num_kept + int(first.accepted.sum()), num_blocks + int(first.is_block.sum())
    assert [text for rollout in own for text in rollout.responses()] == texts
    # Drafts are kept, and refused.
    record_property("rounds and tokens of each", f"{num_blocks}, {1 + num_kept / num_blocks:.2f}")
    assert 1.2 < 1 + num_kept / num_blocks < ours.default_num_drafts
