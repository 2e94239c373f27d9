# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What consumers make of an export, by readers written from their descriptions (`published.py`): the numbers EAGLE's and
z-lab's code compute from the files, the parameters that vLLM and SGLang fill, the layers that every convention taps.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_export import VARIANTS, export, make_variant
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from helpers.published import (
    boundaries_of,
    eagle_drafts,
    engine_parameters,
    sglang_parameters,
    vllm_parameters,
    zlab_hidden,
)
from helpers.rollouts import Options, decode
from helpers.tiny import MASK, make_drafter, make_prompts, make_target
from helpers.trained import overfit, own_text
from trl_draft_opd import (
    AutoDrafter,
    DFlashDraftModel,
    Eagle3DraftModel,
    FrozenTarget,
)
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.export import TargetOfExport, export_drafter


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def exports(tmp_path_factory, target):
    folder = tmp_path_factory.mktemp("exports")
    return {variant: export(make_variant(variant, target), target, folder / variant).layouts for variant in VARIANTS}


def read(target, ids):
    with torch.no_grad():
        output = target.causal_lm(ids[None, :-1], output_hidden_states=True)
    return tuple(states[0] for states in output.hidden_states)


def features_of(target, drafter, ids):
    return target.read_text(ids[None], torch.ones_like(ids[None]), drafter.config.target_layer_ids).padded().features


@pytest.mark.parametrize("variant", ["eagle3", "eagle3-reduced"])
def test_eagles_own_forward_drafts_what_we_draft(exports, target, variant):
    drafter = AutoDrafter.from_pretrained(exports[variant]["flat"])
    ids = torch.randint(7, 64, (11,))
    drafts, logits = eagle_drafts(exports[variant]["flat"], read(target, ids), ids, num_drafts=4)
    anchor = torch.tensor([[10]])
    with torch.no_grad():
        hidden = run_blocks(
            drafter, features_of(target, drafter, ids), ids[None], anchor, torch.tensor([[drafts]]), target.embed
        )
        ours = drafter.draft_logits(hidden, target.project)[0, 0]
    # The second slot and those behind it read the state that was fed back.
    torch.testing.assert_close(ours, torch.stack(logits), atol=1e-4, rtol=1e-4)
    assert drafter.to_target_ids(ours.argmax(-1)).tolist() == drafts
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


def test_zlabs_own_forward_gives_the_states_we_draft_from(exports, target):
    drafter = AutoDrafter.from_pretrained(exports["dflash"]["flat"])
    ids = torch.randint(7, 64, (11,))
    block = torch.tensor([int(ids[-1]), *[MASK] * 4])
    with torch.no_grad():
        theirs = zlab_hidden(exports["dflash"]["flat"], read(target, ids), target.embed(block))
        no_drafts = torch.zeros(1, 1, 4, dtype=torch.long)
        ours = run_blocks(
            drafter, features_of(target, drafter, ids), ids[None], torch.tensor([[10]]), no_drafts, target.embed
        )
    torch.testing.assert_close(ours[0, 0], theirs[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["flat", "speculators", "transformers"])
def test_engines_fill_every_parameter_from_the_names_in_the_file(exports, variant, layout):
    if layout not in exports[variant]:
        assert layout in VARIANTS[variant][2]
        return
    config = json.loads((exports[variant]["flat"] / "config.json").read_text())
    names = set(load_file(exports[variant][layout] / "model.safetensors"))
    wanted, embedding = engine_parameters(config), {"model.embed_tokens.weight"}
    allowed = wanted | (embedding if "eagle3" in variant else set())
    is_reduced = variant.endswith("-reduced")
    assert vllm_parameters(names, config) == allowed | ({"draft_id_to_target_id"} if is_reduced else set())
    if layout == "flat":
        assert sglang_parameters(names) == allowed


def test_the_ports_of_the_loaders_see_a_name_that_would_be_lost():
    config = {"architectures": ["LlamaForCausalLMEagle3"], "fc_norm": False, "norm_before_fc": False}
    config |= {"vocab_size": 64, "draft_vocab_size": 24}
    names = {"fc.weight", "norm.weight", "lm_head.weight", "midlayer.hidden_norm.weight"}
    assert sglang_parameters(names) < engine_parameters(config) > vllm_parameters(names, config)
    # A `model.` too many is an unknown parameter in vLLM.
    assert vllm_parameters({"model.fc.weight"}, config) == {"model.model.fc.weight"}


@pytest.mark.parametrize("num_layers", [8, 24, 28, 32, 36, 48])
@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_every_convention_names_the_layers_the_drafter_reads(tmp_path, num_layers, family):
    shape = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4}
    config = LlamaConfig(num_hidden_layers=num_layers, num_key_value_heads=1, max_position_embeddings=64, **shape)
    model = LlamaForCausalLM(config).eval()
    if family == "eagle3":
        drafter, readers = Eagle3DraftModel.from_target(model), ("vllm", "sglang", "convention")
    else:
        drafter = DFlashDraftModel.from_target(model, mask_token_id=3, num_hidden_layers=1, block_size=4)
        readers = ("vllm", "sglang", "z-lab", "transformers")
    embedding = model.get_input_embeddings().weight
    export_drafter(drafter, tmp_path, target=TargetOfExport("org/target", config, embedding))
    flat, speculators = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("", "speculators"))
    # What the drafter was trained on, read off a forward pass: boundary b is the b-th hidden state.
    ids = torch.randint(4, 40, (1, 5))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    taps = {tuple(state.flatten().tolist()): index for index, state in enumerate(states)}
    features = (
        FrozenTarget(model).read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids).padded().features
    )
    trained = [taps[tuple(part.flatten().tolist())] for part in features.chunk(features.shape[-1] // 8, dim=-1)]
    assert len(set(trained)) == len(drafter.config.target_layer_ids)
    for reader in readers:
        assert boundaries_of(flat, reader, num_layers) == trained, reader
    assert boundaries_of(speculators, "speculators", num_layers) == trained


# ---- whole decodings ------------------------------------------------------------------------------------------------


PROMPTS, NUM_TOKENS = make_prompts(3, seed=2), 40


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, target):
    """Drafters that are often right, by family, with their exports."""
    folder, found = tmp_path_factory.mktemp("pairs"), {}
    for family in ("eagle3", "dflash"):
        drafter = overfit(target, make_drafter(family, target), PROMPTS[:2])
        found[family] = drafter, export(drafter, target, folder / family).layouts
    return found


def rounds_of(target, prompt, draft):
    """Decode greedily with drafts of a function of the committed text; return the text and what each round kept."""
    ids = torch.tensor(own_text(target, prompt, 1))
    kept = []
    while len(ids) < len(prompt) + NUM_TOKENS:
        drafts = draft(ids)
        room = len(prompt) + NUM_TOKENS - len(ids)
        with torch.no_grad():
            logits = target.causal_lm(torch.cat([ids, torch.tensor(drafts)])[None]).logits[0, len(ids) - 1 :]
        own = logits.argmax(-1).tolist()
        accepted = next((k for k, draft in enumerate(drafts) if draft != own[k]), len(drafts))
        kept.append(min(accepted, room))
        ids = torch.cat([ids, torch.tensor(own[: min(accepted + 1, room)])])
    return ids.tolist(), kept


def ours(target, drafter, prompt):
    rollout = decode(target, drafter, [prompt], Options(max_completion_length=NUM_TOKENS))
    return rollout.input_ids[0].tolist(), rollout.accepted[0][rollout.is_block[0]].tolist()


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_decoding_with_the_reference_forwards_keeps_what_we_keep(target, pairs, family):
    drafter, layouts = pairs[family]

    def draft(ids):
        states = read(target, ids)
        if family == "eagle3":
            return eagle_drafts(layouts["flat"], states, ids, num_drafts=4)[0]
        block = target.embed(torch.tensor([int(ids[-1]), *[MASK] * 4]))
        with torch.no_grad():
            return target.project(zlab_hidden(layouts["flat"], states, block)[1:]).argmax(-1).tolist()

    total = 0
    for prompt in PROMPTS:
        text, kept = rounds_of(target, prompt, draft)
        assert (text, kept) == ours(target, drafter, prompt)
        assert text == own_text(target, prompt, NUM_TOKENS)
        total += sum(kept)
    # Drafts are really kept, a good part of all tokens.
    assert total > NUM_TOKENS


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_decoding_in_transformers_takes_our_number_of_target_forwards(target, pairs, family):
    drafter, layouts = pairs[family]
    model, options = target.causal_lm, {"do_sample": False, "max_new_tokens": NUM_TOKENS, "eos_token_id": None}
    if family == "dflash":
        assistant = AutoModel.from_pretrained(layouts["transformers"], dtype=torch.float32)
        ways = [{"assistant_model": assistant, "speculation_type": "dflash"}]
    else:
        ways = []
    folder = str(layouts["flat"])
    ways.append({"custom_generate": folder, "drafter": folder, "trust_remote_code": True})
    for way in ways:
        for prompt in PROMPTS:
            ids, calls = torch.tensor([prompt]), []
            handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            text = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **way)[0].tolist()
            handle.remove()
            own, kept = ours(target, drafter, prompt)
            assert text == own and len(calls) == 1 + len(kept)


def test_layers_off_by_one_keep_fewer_drafts(target, pairs):
    # What makes the equalities above a proof.
    for family in ("eagle3", "dflash"):
        drafter = pairs[family][0]
        right = sum(sum(ours(target, drafter, prompt)[1]) for prompt in PROMPTS[:2])
        ids = list(drafter.config.target_layer_ids)
        drafter.config.target_layer_ids = [i + 1 for i in ids]
        wrong = sum(sum(ours(target, drafter, prompt)[1]) for prompt in PROMPTS[:2])
        drafter.config.target_layer_ids = ids
        # By little: neighbouring layers of a tiny random target are alike. One draft breaks the equalities.
        assert wrong < right
