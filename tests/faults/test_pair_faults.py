# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Targets, tokenizers, drafters and settings that cannot work, and folders that hold something else: refused before
anything is computed.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from helpers.tiny import (
    EOS,
    FAMILIES,
    PAD,
    TARGETS,
    TINY_RUN,
    VOCAB,
    make_causal_lm,
    make_drafter,
    make_target,
    make_tokenizer,
)
from trl_draft_opd import (
    AutoDrafter,
    DFlash2DraftConfig,
    DFlashDraftConfig,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    DSparkDraftConfig,
    Eagle3DraftConfig,
    FrozenTarget,
)
from trl_draft_opd.drafters import attention
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.readings.write import write_readings
from trl_draft_opd.responses import Origin, ResponseStore
from trl_draft_opd.rollout.acceptance import SamplingSettings
from trl_draft_opd.target.checks import NotFiniteError
from trl_draft_opd.trainer import texts as responses


KINDS = ["sft", "opd"]
# A weight of each family; of those that DFlash's families add, one that they do not share with it.
OWN_WEIGHTS = {
    "dflash": "fc.weight",
    "dflash2": "candidate_selector.successor_codebook",
    "dspark": "markov_head.markov_w1.weight",
    "eagle3": "lm_head.weight",
}
TRAINERS = {"sft": (DraftSFTTrainer, DraftSFTConfig), "opd": (DraftOPDTrainer, DraftOPDConfig)}
ROWS = [{"prompt": f"w{8 + i} w9", "completion": "w20 w21 w22 w23"} for i in range(2)]


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def drafter_folders(target, tmp_path_factory):
    """A saved drafter of each family; not to be changed."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        make_drafter(family, target).save_pretrained(folder)
    return folders


@pytest.fixture
def copies(drafter_folders, tmp_path):
    """A copy of each that may be changed."""
    return {family: shutil.copytree(folder, tmp_path / family) for family, folder in drafter_folders.items()}


def make_trainer(kind, tmp_path, drafter, target, rows=ROWS, tokenizer=None, **settings):
    trainer_class, config_class = TRAINERS[kind]
    settings = {
        "max_steps": 1,
        **TINY_RUN,
        "save_strategy": "no",
        "max_completion_length": 8,
        "per_device_train_batch_size": 2,
    } | settings
    args = config_class(str(tmp_path), **settings)
    return trainer_class(drafter, target, args, Dataset.from_list(rows), processing_class=tokenizer)


def refuses(match):
    return pytest.raises(ValueError, match=match)


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- tokenizers (fault 13) --------------------------------------------------------------------------------------------


def shuffled_tokenizer():
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["w20"], vocabulary["w21"] = vocabulary["w21"], vocabulary["w20"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return tokenizer


@pytest.mark.parametrize("as_instance", [True, False])
def test_another_models_tokenizer_of_the_same_size_is_named_by_the_first_token_that_differs(tmp_path, as_instance):
    folder = str(tmp_path / "target")
    make_causal_lm().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    target = type(make_causal_lm()).from_pretrained(folder) if as_instance else folder
    drafter = make_drafter("dflash", make_target())
    with refuses(
        r"`processing_class` is another model's tokenizer: id 20 is 'w21' there and 'w20' in the target's own.*"
        "2 tokens differ"
    ):
        make_trainer("sft", tmp_path / "out", drafter, target, tokenizer=shuffled_tokenizer())
    extended = make_tokenizer()
    extended.chat_template = "another"
    extended.add_tokens([])
    make_trainer("sft", tmp_path / "out", drafter, target, tokenizer=extended)


# -- sizes and names (faults 20 and 22) -------------------------------------------------------------------------------


def test_a_block_longer_than_all_positions_is_refused(target):
    with refuses("`block_size` 257 exceeds the target's 256 positions. Published is 16"):
        make_drafter("dflash", target, block_size=257)


@pytest.mark.parametrize("config_class", [DraftSFTConfig, DraftOPDConfig])
@pytest.mark.parametrize("typo, meant", [("learning_rte", "learning_rate"), ("num_draft", "num_drafts")])
def test_a_misspelt_setting_names_the_nearest_one(tmp_path, config_class, typo, meant):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{typo}'. Did you mean '{meant}'?"):
        config_class(str(tmp_path), **{typo: 1})


@pytest.mark.parametrize(
    "config_class, typo, meant",
    [
        (DFlashDraftConfig, "blok_size", "block_size"),
        (Eagle3DraftConfig, "norm_outptu", "norm_output"),
        (DSparkDraftConfig, "markov_ranks", "markov_rank"),
        (DFlash2DraftConfig, "selector_topk", "selector_top_k"),
    ],
)
def test_a_misspelt_option_of_a_drafter_names_the_nearest_one(config_class, typo, meant):
    with refuses(f"{config_class.__name__} has '{typo}', which is not read. Did you mean '{meant}'?"):
        config_class(**{typo: 4})


@pytest.mark.parametrize(
    "family, section, typo, meant",
    [
        ("eagle3", None, "norm_outptu", "norm_output"),
        ("eagle3", None, "draft_vocabsize", "draft_vocab_size"),
        ("dflash", None, "rms_norm_ep", "rms_norm_eps"),
        ("dflash", "dflash_config", "mask_token_ids", "mask_token_id"),
        ("dspark", None, "markov_ranks", "markov_rank"),
        ("dflash2", "dflash_config", "selector_topk", "selector_top_k"),
    ],
)
def test_a_misspelt_key_of_a_published_config_names_the_nearest_one(copies, family, section, typo, meant):
    path = copies[family] / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config)[typo] = 1
    path.write_text(json.dumps(config))
    with refuses(f"config.json has '{typo}', which is not read. Did you mean '{meant}'\\? Rename or remove it"):
        AutoDrafter.from_pretrained(copies[family])
    (config[section] if section else config)["something_else"] = config.pop(typo, 1)
    config.get(section, {}).pop(typo, None)
    path.write_text(json.dumps(config))
    AutoDrafter.from_pretrained(copies[family])


# -- weights (faults 23 and 27) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, name", OWN_WEIGHTS.items())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_by_every_way_to_load_it(tmp_path, copies, target, family, name, value):
    path = copies[family] / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    match = f"'{name}' holds NaN or infinite values; the checkpoint is damaged"
    with refuses(match):
        AutoDrafter.from_pretrained(copies[family])
    with refuses(match):
        make_trainer("sft", tmp_path / "out", str(copies[family]), target)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_unexpected_weights_are_listed_and_never_made_up(copies, family):
    path = copies[family] / "model.safetensors"
    tensors = load_file(path)
    tensors["extra.weight"] = tensors.pop("fc.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with refuses("do not fit its config: 'fc.weight' is missing; 'extra.weight' is unexpected. Check"):
        AutoDrafter.from_pretrained(copies[family])


# -- targets (faults 24, 25 and 28) -----------------------------------------------------------------------------------


_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
}


@pytest.fixture(scope="module")
def recurrent():
    torch.manual_seed(0)
    return FrozenTarget(Qwen3NextForCausalLM(Qwen3NextConfig(**_SHAPE, **_LINEAR)).eval(), make_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recurrent_target_is_refused_for_live_rollouts_and_trains_by_replay(tmp_path, recurrent, family):
    drafter = make_drafter(family, recurrent)
    offer = "keeps a recurrent state.*`rollout='replay'` and `rejected_scope='first'`"
    for settings in ({"rollout": "live"}, {"rejected_scope": "suffix"}):
        with refuses(offer):
            make_trainer("opd", tmp_path, drafter, recurrent, **settings)
    before = {name: p.clone() for name, p in drafter.named_parameters()}
    trainer = make_trainer("opd", tmp_path, drafter, recurrent, rejected_scope="first", warmup_steps=0)
    trainer.train()
    assert any(not torch.equal(before[name], p) for name, p in drafter.named_parameters())


def test_a_state_space_target_is_refused_for_live_rollouts_and_offers_replay():
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))
    with refuses("'mamba' keeps a recurrent state.*trains by replay, supervised or.*evaluated by replay"):
        FrozenTarget(model).require_rollback()


def on_meta(part):
    model = make_causal_lm("llama")
    getattr(model, part).to("meta") if part == "lm_head" else model.model.embed_tokens.to("meta")
    return model


def without_head():
    model = make_causal_lm("llama")
    model.lm_head = torch.nn.Identity()
    return model


def with_quantised_head():
    model = make_causal_lm("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: on_meta("lm_head"), "has its head on the meta device: it was offloaded.*Load it without offloading"),
        (
            lambda: on_meta("embedding"),
            "has its embedding on the meta device: it was offloaded.*Load it without offloading",
        ),
        (
            without_head,
            r"\(LlamaForCausalLM\) has no head with a plain `weight`.*AutoModelForCausalLM.*modules_to_not_convert",
        ),
        (lambda: make_causal_lm("llama").model, r"\(LlamaModel\) has no head with a plain `weight`"),
        (with_quantised_head, "has its head in torch.int8. Leave it out of the quantisation"),
    ],
)
def test_a_target_whose_head_or_embedding_cannot_be_read_says_why(make, reason):
    with refuses(f"Target of type 'llama' .*{reason}"):
        FrozenTarget(make())


def test_a_target_that_was_never_loaded_is_refused():
    with torch.device("meta"):
        model = TARGETS["llama"]()
    with refuses("on the meta device"):
        FrozenTarget(model)


def test_a_target_that_reads_everything_as_nan_is_refused_when_it_is_made():
    model = make_causal_lm("llama")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NotFiniteError, match="hidden states are NaN or infinite.*Its weights are damaged"):
        FrozenTarget(model)


@pytest.fixture(scope="module")
def half_broken():
    """A target that reads any text with `w50` in it as NaN."""
    model = make_causal_lm("llama")
    model.model.embed_tokens.weight.data[50] = float("nan")
    return FrozenTarget(model, make_tokenizer())


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_reading_that_is_not_finite_names_its_rows_and_padding_does_not_count(target, monkeypatch, value, is_padded):
    ids, mask = torch.full((3, 5), 9), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    norm = target.backbone.norm.forward
    monkeypatch.setattr(target, "_padding_reason", "is told to" if is_padded else None)

    def broken(states):
        states = norm(states)
        # The fourth token of the third text: of padded rows, or of 5 + 2 + 4 tokens end to end.
        if is_padded:
            states[1, 3:], states[2, 3, 7] = value, value
        else:
            states[0, 5 + 2 + 3 :, 7] = value
        return states

    monkeypatch.setattr(target.backbone.norm, "forward", broken)
    with pytest.raises(NotFiniteError, match=r"NaN or infinite in rows \[2\] of the text"):
        target.read_text(ids, mask, [1])
    mask[2, 3] = 0
    target.read_text(ids, mask, [1])


def test_another_precision_is_offered_where_numbers_may_have_overflowed():
    message = str(NotFiniteError([0], torch.float16))
    assert "overflow in torch.float16" in message and "`target_dtype='float32'`" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_the_target_reads_as_nan_stops_training_before_any_update(tmp_path, monkeypatch, half_broken, kind):
    drafter = make_drafter("dflash", half_broken)
    before = {name: p.clone() for name, p in drafter.named_parameters()}
    rows = [
        {"prompt": "w9" + " w8" * 2048, "completion": "w20"},
        ROWS[0],
        {"prompt": "w50 w9", "completion": "w20 w21 w22"},
    ]
    settings = {}
    if kind == "opd":
        settings = {"completions_from_target": True, "warn_mismatch_share": 1.0, "max_mismatch_share": 1.0}
        # The check of the stored text reads it first, and knows no rows.
        monkeypatch.setattr(responses, "check_responses", lambda *_, **__: SimpleNamespace(share=0.0))
    trainer = make_trainer(kind, tmp_path, drafter, half_broken, rows, **settings)
    with pytest.raises(
        FloatingPointError, match=r"The target's hidden states are NaN or infinite in rows \[2\] of the dataset"
    ):
        trainer.train()
    with pytest.raises(FloatingPointError, match=r"in rows \[2\] of the dataset"):
        make_trainer("opd", tmp_path, drafter, half_broken, rows, rollout="live").train()
    assert all(torch.equal(before[name], p) for name, p in drafter.named_parameters())


def test_no_response_is_stored_of_a_target_that_reads_its_prompt_as_nan(tmp_path, half_broken):
    rows = [{"prompt": "w9 w10 w11"}, {"prompt": "w50 w9"}, {"prompt": "w9"}]
    drafter = make_drafter("dflash", half_broken)
    with pytest.raises(NotFiniteError, match=r"in rows \[1\] of the dataset"):
        make_trainer("opd", tmp_path, drafter, half_broken, rows, per_device_train_batch_size=3).train()
    with pytest.raises(NotFiniteError, match=r"in rows \[1\] of the dataset"):
        make_trainer("sft", tmp_path, drafter, half_broken, rows, regenerate=True)
    assert len(ResponseStore.read_only(tmp_path / "_responses")) == 0


# -- attention (fault 26) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_without_the_fused_kernel_masks_as_the_cpu_does(target, monkeypatch, family):
    drafter = make_drafter(family, target)
    ids = torch.randint(7, VOCAB, (2, 24))
    features = target.read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids).padded().features
    anchors, drafts = torch.tensor([[3, 9, 20], [1, 2, 15]]), torch.randint(7, VOCAB, (2, 3, 4))

    def states(changed):
        return run_blocks(drafter, features + changed, ids, anchors, drafts, target.embed)

    later = torch.zeros_like(features)
    later[:, 15:] = 100.0
    fused = [states(torch.zeros_like(features)), states(later)]
    monkeypatch.setattr(attention, "choose_backend", lambda *args: "products")
    plain = [states(torch.zeros_like(features)), states(later)]
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for unchanged, changed in (fused, plain):
        # No block sees what stands at or behind its anchor; the last of the first row does see position 15.
        is_blind = anchors <= 15
        torch.testing.assert_close(unchanged[is_blind], changed[is_blind])
        assert not torch.allclose(unchanged[~is_blind], changed[~is_blind])


# -- folders that hold something else (faults 37 and 39) --------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def refuse_to_train_in(folder, target, match, kind="sft", family="dflash"):
    before = content_of(folder)
    with refuses(match):
        make_trainer(kind, folder, make_drafter(family, target), target)
    assert content_of(folder) == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_folder_with_an_export_is_left_alone(folder, target, kind):
    make_trainer(kind, folder.parent / "a", make_drafter("dflash", target), target, hub_target_id="org/target").export(
        folder
    )
    refuse_to_train_in(
        folder, target, "holds an export, of which a save would replace one layout.*another `output_dir`", kind
    )


def test_an_output_folder_with_responses_is_left_alone(folder, target):
    sampling = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    origin = Origin.of(target, sampling=sampling, max_completion_length=8)
    ResponseStore.open(folder, origin)
    refuse_to_train_in(folder, target, "holds responses.*name the folder in `responses`")


def test_an_output_folder_with_readings_is_left_alone(folder, target):
    write_readings(target, [[8, 9]], folder, layer_ids=[1], show_progress=False)
    refuse_to_train_in(folder, target, "holds readings.*name the folder in `readings`")


def test_an_output_folder_with_the_target_itself_is_left_alone(folder, target):
    make_causal_lm("llama").save_pretrained(folder)
    refuse_to_train_in(
        folder, target, "holds a model that a save would replace, and it is no drafter.*another `output_dir`"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_output_folder_with_a_drafter_of_another_target_is_left_alone(folder, target, recurrent, family):
    make_drafter(family, recurrent).save_pretrained(folder)
    refuse_to_train_in(folder, target, "another family or target: its hidden_size is 16, here it is 32", family=family)


def test_an_output_folder_with_a_drafter_of_another_family_is_left_alone(folder, target):
    make_drafter("eagle3", target).save_pretrained(folder)
    refuse_to_train_in(folder, target, "or target: its family is 'eagle3', here it is 'dflash'")


def test_an_output_folder_with_a_drafter_of_another_target_of_the_same_shape_is_left_alone(
    folder, target, monkeypatch
):
    drafter = make_drafter("dflash", target)
    drafter.config.target_model_name_or_path = "org/base"
    drafter.save_pretrained(folder)
    monkeypatch.setattr(target.config, "name_or_path", "org/chat")
    refuse_to_train_in(folder, target, "or target: its target is 'org/base', here it is 'org/chat'")


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_folder_of_the_same_pair_or_of_a_save_cut_short_is_gone_on_with(folder, target, kind):
    make_drafter("dflash", target).save_pretrained(folder)
    make_trainer(kind, folder, str(folder), target)
    (folder / "config.json").write_text('{"archit')
    make_trainer(kind, folder, make_drafter("dflash", target), target)


def test_responses_of_another_target_in_the_output_folder_stop_the_run(folder, target, recurrent):
    make_trainer("opd", folder, make_drafter("dflash", target), target).train()
    held = content_of(folder / "_responses")
    trainer = make_trainer("opd", folder, make_drafter("dflash", recurrent), recurrent)
    hashes = "weights_fingerprint: [0-9a-f]{8} there, [0-9a-f]{8} here\n"
    with refuses(f"(?s)were written under other conditions.*{hashes}.*give another folder"):
        trainer.train()
    assert content_of(folder / "_responses") == held
