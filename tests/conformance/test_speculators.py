# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The speculators library itself loads our speculators layout, and its classes compute from it what our drafters compute.
"""

import pytest
import torch
from test_export import VARIANTS, make_variant

from helpers.tiny import make_target
from trl_draft_opd import AutoDrafter
from trl_draft_opd.drafters.attention import AttentionPlan, Sight, flex
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.export import TargetOfExport, export_drafter
from trl_draft_opd.parity.consumers import _follow


pytestmark = pytest.mark.conformance


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A tiny target that also lies in a folder, where the library looks for its embedding and head."""
    target = make_target("llama")
    folder = tmp_path_factory.mktemp("target")
    target.causal_lm.save_pretrained(folder)
    target.folder = folder
    return target


@pytest.fixture(params=[variant for variant in VARIANTS if "speculators" not in VARIANTS[variant][2]])
def pair(request, tmp_path, target):
    """Our drafter and the library's model, both loaded from the same export."""
    from speculators import SpeculatorModel

    drafter = make_variant(request.param, target)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            # Norms near one and matrices that keep a state's size, so that no logit outgrows float32's digits;
            # convolutions that mix in little, as trained ones do, because large ones multiply its rounding.
            parameter.mul_(0.1).add_(1) if "norm" in name else parameter.mul_(0.02 if "_conv" in name else 0.2)
            if name.endswith("base_kernel"):
                parameter[:, 0] += 1
    export_drafter(
        drafter,
        tmp_path / "out",
        to="speculators",
        target=TargetOfExport("org/target", target.causal_lm.config, target.causal_lm.get_input_embeddings().weight),
        dtype=torch.float32,
    )
    # The library fetches the target it is named; here that is a folder.
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"org/target"', f'"{target.folder}"'))
    theirs = [SpeculatorModel.from_pretrained(str(tmp_path / "out")).float().eval() for _ in range(3)]
    return AutoDrafter.from_pretrained(tmp_path / "out"), theirs


def test_every_load_gives_the_targets_embedding_and_our_weights(pair, target):
    drafter, models = pair
    embedding = target.causal_lm.get_input_embeddings().weight
    ours = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in drafter.state_dict().items()}
    for model in models:
        state = model.state_dict()
        assert torch.equal(state["embed_tokens.weight"], embedding)
        assert all(torch.equal(state[name], tensor) for name, tensor in ours.items())


def test_logits_of_two_steps_or_a_block_are_ours(pair, target):
    drafter, (model, *_) = pair
    # 128 pairs, because the library's attention works in blocks of so many.
    length, document = 129, torch.zeros(1, 129, dtype=torch.long)
    ids = torch.randint(7, 64, (1, length))
    reading = target.read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids).padded()
    if not drafter.config.drafts_whole_blocks:
        seen = []
        model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.no_grad():
            model(
                hidden_states=reading.features[:, :-1],
                input_ids=ids[:, 1:],
                document_ids=document[:, 1:],
                ttt_steps=2,
            )
        # Its steps read the text where drafts would stand, so ours do too; anchors need a token for slot 2 behind
        # them.
        anchors = torch.arange(1, length - 1)[None]
        recorded = torch.stack([ids[0, 2:], ids[0, 2:].roll(-1)], dim=-1)[None]
        theirs = torch.stack([step[0, : length - 2] for step in seen], dim=1)
    else:
        size = drafter.config.block_size
        # With windows, where they reach back to the first token.
        anchors = torch.tensor([[3, 4]] if drafter.config.sliding_window else [[5, 28]])
        marks = torch.zeros(1, length, dtype=torch.bool).index_fill(1, anchors[0], True)
        with torch.no_grad():
            hidden, logits, *_, positions = model._backbone_forward(
                reading.features, ids, marks, reading.last_hidden, document, max_anchors=2
            )
        assert positions.view(2, size)[:, 0].tolist() == anchors[0].tolist()
        # Slots that read the token before them read the text's.
        drafts = drafter.config.drafts_per_block
        before = ids[0, anchors[0][:, None] + torch.arange(drafts)]
        recorded = ids[:, anchors[0][:, None] + torch.arange(1, drafts + 1)]
        theirs = logits[0].view(2, size, -1)[:, size - drafts :]
        theirs = scores_of(model, hidden[0].view(2, size, -1)[:, size - drafts :], theirs, before)
    with torch.no_grad():
        ours = drafter.draft_logits(
            run_blocks(drafter, reading.features, ids, anchors, recorded, target.embed), target.project
        )[0]
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours[ours.isfinite()].std() > 0.1


@torch.no_grad()
def scores_of(model, hidden, logits, before):
    """Return what the library's class draws drafts from, given the tokens before its slots."""
    if getattr(model, "markov_head", None) is not None:
        return logits + model.markov_head.block_bias(prev_token_ids=before, hidden_states=hidden)
    if not hasattr(model, "candidate_selector"):
        return logits
    candidates = logits.topk(model.candidate_selector.top_k, dim=-1).indices
    scores = model.candidate_selector.score_candidates(logits, hidden, before, candidates)
    assert torch.equal(_follow(model, hidden, logits, before), candidates.gather(-1, scores.argmax(-1, True))[..., 0])
    return torch.full_like(logits, -torch.inf).scatter(-1, candidates, scores)


def test_windows_are_counted_from_the_anchor_by_the_library_and_from_the_slot_by_engines():
    # Why a drafter with windows is not for the library, see `ExportedDFlash`.
    from speculators.models.dflash.attention import create_anchor_block_mask_mod

    length, window = 32, 9
    document = torch.zeros(length, dtype=torch.long)
    sees, _, _ = create_anchor_block_mask_mod(document, length, torch.tensor([20]), 5, window, True)
    none = torch.tensor(0)
    seen = [
        [position for position in range(length) if sees(none, none, torch.tensor(slot), torch.tensor(position))]
        for slot in range(5)
    ]
    assert seen == [list(range(20 - window, 20))] * 5


def test_speculators_counts_a_window_from_the_anchor_and_we_as_engines_do_from_the_slot():
    from speculators.models.dflash.attention import create_anchor_block_mask_mod
    from torch.nn.attention.flex_attention import create_mask

    length, block, window = 40, 5, 9
    anchors = torch.tensor([3, 12, 39])
    for non_causal in (True, False):
        options = {"sliding_window": window, "sliding_window_non_causal": non_causal}
        ids = torch.zeros(length, dtype=torch.long)
        theirs, num_queries, num_keys = create_anchor_block_mask_mod(ids, length, anchors, block, **options)
        theirs = create_mask(theirs, 1, 1, num_queries, num_keys, device="cpu")[0, 0].unflatten(0, (3, block))
        mask = flex.block_mask(AttentionPlan(anchors[None]), block, length, (block,), Sight(window, not non_causal))
        ours = create_mask(mask.mask_mod, 1, 1, num_queries, num_keys, device="cpu")[0, 0].unflatten(0, (3, block))
        assert torch.equal(ours[..., length:], theirs[..., length:])
        slots = torch.arange(block)
        assert theirs[1:, :, :length].sum(dim=-1).eq(window).all()
        assert ours[1:, :, :length].sum(dim=-1).eq(window - 1 - slots).all()
        # A text that is shorter than the window shows no difference.
        assert torch.equal(ours[0], theirs[0]) and not (ours & ~theirs).any()
