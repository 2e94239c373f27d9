# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The speculators library itself loads our speculators layout, and its classes compute from it what our drafters compute.
"""

import pytest
import torch

from helpers.tiny import make_drafter, make_target
from trl_draft_opd import AutoDrafter, build_draft_vocabulary
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.export import TargetOfExport, export_drafter


pytestmark = pytest.mark.conformance

VARIANTS = {
    "eagle3": {},
    "eagle3-reduced": {"reduced": 24},
    "eagle3-norms": {"fc_norm": True, "norm_output": True},
    "dflash": {},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A tiny target that also lies in a folder, where the library looks for its embedding and head."""
    target = make_target("llama")
    folder = tmp_path_factory.mktemp("target")
    target.causal_lm.save_pretrained(folder)
    target.folder = folder
    return target


@pytest.fixture(params=VARIANTS)
def pair(request, tmp_path, target):
    """Our drafter and the library's model, both loaded from the same export."""
    from speculators import SpeculatorModel

    options = dict(VARIANTS[request.param])
    if "reduced" in options:
        counts = torch.arange(1, 65)
        options = {"draft_vocabulary": build_draft_vocabulary(counts, options["reduced"], target.eos_token_ids)}
    drafter = make_drafter(request.param.split("-")[0], target, **options)
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
    if drafter.config.family == "eagle3":
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
        anchors, size = torch.tensor([[5, 8]]), drafter.config.block_size
        marks = torch.zeros(1, length, dtype=torch.bool).index_fill(1, anchors[0], True)
        with torch.no_grad():
            hidden, logits, *_, positions = model._backbone_forward(
                reading.features, ids, marks, reading.last_hidden, document, max_anchors=2
            )
        theirs = logits[0].view(2, size, -1)[:, 1:]
        assert positions.view(2, size)[:, 0].tolist() == [5, 8]
        recorded = torch.zeros(1, 2, size - 1, dtype=torch.long)
    with torch.no_grad():
        ours = drafter.draft_logits(
            run_blocks(drafter, reading.features, ids, anchors, recorded, target.embed), target.project
        )[0]
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.1
