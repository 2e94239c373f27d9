# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Wrong input gets one clear sentence that names the value and the fix, before anything is computed or updated.
"""

import warnings

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from helpers.oracle import greedy_text
from helpers.tiny import EOS, MASK, PAD, TINY_RUN, VOCAB, make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import (
    DFlashDraftConfig,
    DFlashDraftModel,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    Eagle3DraftModel,
    FrozenTarget,
)


KINDS = ["sft", "opd"]
ROWS = {"prompt": ["w9 w10", "w11"], "completion": ["w20 w21", "w22 w23"]}


@pytest.fixture(scope="module")
def target():
    return make_target()


def make_args(kind, tmp_path, **changes):
    options = {
        "output_dir": str(tmp_path),
        **TINY_RUN,
        "save_strategy": "no",
        "max_steps": 1,
        "max_completion_length": 8,
        "per_device_train_batch_size": 2,
    }
    return (DraftSFTConfig if kind == "sft" else DraftOPDConfig)(**options | changes)


def make_trainer(kind, tmp_path, drafter, target, columns=None, **changes):
    trainer_class = DraftSFTTrainer if kind == "sft" else DraftOPDTrainer
    rows = Dataset.from_dict(ROWS if columns is None else columns)
    return trainer_class(drafter, target, make_args(kind, tmp_path, **changes), rows)


def other_target(num_layers=8, vocab_size=VOCAB, hidden_size=32):
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=1,
    )
    return FrozenTarget(Qwen3ForCausalLM(config), make_tokenizer())


def refuses(match):
    return pytest.raises(ValueError, match=match)


# -- the pair ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_a_drafter_of_another_vocabulary(tmp_path, target, kind, family):
    drafter = make_drafter(family, other_target(vocab_size=80))
    with refuses(r"vocab_size 80 but the target has 64.*share one tokenizer.*Build the drafter with `\w+.from_target"):
        make_trainer(kind, tmp_path, drafter, target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_of_another_width(tmp_path, target, kind):
    drafter = make_drafter("dflash", other_target(hidden_size=16))
    with refuses("width 16 per layer but the target's hidden size is 32.*from_target"):
        make_trainer(kind, tmp_path, drafter, target)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_ids_of_another_target(tmp_path, target, kind):
    drafter = make_drafter("eagle3", other_target(num_layers=12))
    with refuses(r"layer ids \[1, 5, 8\] belong to a target of 12 layers, but this one has 8.*from_target"):
        make_trainer(kind, tmp_path, drafter, target)


@pytest.mark.parametrize("ids", [[1, 3, 7], [-1, 3, 5]])
@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_layer_ids_out_of_range(target, family, ids):
    with refuses(r"`target_layer_ids` must lie in 0\.\.6 for a target of 8 layers, got \[-?\d, 3, \d\]"):
        make_drafter(family, target, target_layer_ids=ids)


@pytest.mark.parametrize("ids", [[3, 1, 5], [1, 1, 3], []])
def test_layer_ids_out_of_order(target, ids):
    with refuses(r"`target_layer_ids` must be strictly ascending and not empty, got \["):
        DFlashDraftConfig(target_layer_ids=ids)


def test_a_small_target_without_layer_ids():
    with refuses(r"The target has 4 layers; the default layer ids need at least 7. Pass `target_layer_ids=\[...\]`"):
        Eagle3DraftModel.from_target(other_target(num_layers=4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_larger_than_the_targets_vocabulary(tmp_path, kind):
    words = {f"w{i}": i for i in range(100)} | {"<unk>": 100, "</s>": 101}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>", eos_token="</s>"
    )
    target = FrozenTarget(make_causal_lm(), tokenizer)
    columns = {"prompt": ["w9", "w70"], "completion": ["w9", "w9"]}
    with (
        pytest.warns(UserWarning, match="has 38 ids beyond the target's 64 embedding rows"),
        refuses(r"Row \d of the dataset: token id \d+ \('(w70|<unk>|</s>)'\) in `.*` is outside the target's"),
    ):
        make_trainer(kind, tmp_path, make_drafter("eagle3", target), target, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_an_instance_without_a_tokenizer(tmp_path, target, kind):
    with refuses("No tokenizer: the target was given as an instance. Pass `processing_class`"):
        make_trainer(kind, tmp_path, make_drafter("dflash", target), make_causal_lm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_no_drafter(tmp_path, target, kind):
    with pytest.raises(
        TypeError, match="`model` must be a drafter, its id or its path, got Qwen3ForCausalLM.*from_target"
    ):
        make_trainer(kind, tmp_path, make_causal_lm(), target)


def test_an_instance_with_loading_arguments(tmp_path, target):
    with refuses(r"`target_init_kwargs` \['dtype'\] were given with an instantiated target"):
        FrozenTarget.load(make_causal_lm(), init_kwargs={"dtype": "float32"})


# -- the mask token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_token_id", [-1, VOCAB, 1000])
def test_a_mask_token_outside_the_vocabulary(target, mask_token_id):
    with refuses(rf"`mask_token_id` {mask_token_id} lies outside the target's vocabulary 0\.\.63. Choose"):
        DFlashDraftModel.from_target(target, mask_token_id=mask_token_id)


@pytest.mark.parametrize("mask_token_id", [EOS, PAD, 1])
def test_a_mask_token_with_another_meaning(mask_token_id):
    with refuses(f"`mask_token_id` {mask_token_id} is the target's eos, bos or pad token. Choose an id"):
        DFlashDraftModel.from_target(other_target(), mask_token_id=mask_token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_token_that_ends_responses_by_the_generation_config(tmp_path, kind):
    target = make_target()
    drafter = make_drafter("dflash", target)
    target.causal_lm.generation_config.eos_token_id = [EOS, MASK]
    with refuses(f"`mask_token_id` {MASK} is an eos, bos or pad token of the target. Choose an id"):
        make_trainer(kind, tmp_path, drafter, target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_token_in_the_data(tmp_path, target, kind):
    drafter = make_drafter("dflash", target, mask_token_id=11)
    with refuses(r"`mask_token_id` 11 occurs in the data \(row 1\): choose an id"):
        make_trainer(kind, tmp_path, drafter, target)


def test_a_mask_token_in_the_completions_that_replay_walks(tmp_path, target):
    drafter = make_drafter("dflash", target, mask_token_id=22)
    with refuses(r"`mask_token_id` 22 occurs in the data \(row 1"):
        make_trainer("opd", tmp_path, drafter, target, rollout="replay", completions_from_target=True)
    # Completions that nobody reads do not matter.
    make_trainer("opd", tmp_path, drafter, target)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 0, -3])
def test_a_block_without_a_draft(target, block_size):
    with refuses(f"`block_size` counts the anchor, so it must be at least 2, got {block_size}"):
        make_drafter("dflash", target, block_size=block_size)


def test_no_step_of_training_time_test(target):
    with refuses("`ttt_steps` must be at least 1, got 0"):
        make_drafter("eagle3", target, ttt_steps=0)


@pytest.mark.parametrize("kind", KINDS)
def test_more_drafts_than_the_drafters_blocks_hold(tmp_path, target, kind):
    with refuses(
        "`num_drafts` 5 exceeds the 4 drafts of the drafter's blocks. Lower it, or make a drafter with a larger"
    ):
        make_trainer(kind, tmp_path, make_drafter("dflash", target), target, num_drafts=5)


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_dataset_is_an_error_at_once(tmp_path, target, kind):
    with refuses("The dataset is empty. Check its split and its filters"):
        make_trainer(kind, tmp_path, make_drafter("dflash", target), target, {"prompt": [], "completion": []})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_prompt_names_its_row(tmp_path, target, kind, empty):
    columns = {"prompt": ["w9", empty], "completion": ["w20", "w21"]}
    with refuses("Row 1 of the dataset: the prompt is empty.*Fill it or drop the row"):
        make_trainer(kind, tmp_path, make_drafter("dflash", target), target, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_are_skipped_and_counted(tmp_path, target, kind):
    columns = {"prompt": ["w9 w10 w11", "w12"], "completion": ["w20 w21", "w22 w23"]}
    drafter = make_drafter("dflash", target)
    with pytest.warns(UserWarning, match="Skipped 1 of 2 rows: 1 have a prompt longer than `max_prompt_length`"):
        trainer = make_trainer(kind, tmp_path, drafter, target, columns, max_prompt_length=2)
    assert trainer.train_dataset["sample_id"][:] == [1]
    with refuses("No row is left: 2 have a prompt longer than `max_prompt_length`"):
        columns = {"prompt": ["w9 w10 w11"] * 2, "completion": ["w20"] * 2}
        make_trainer(kind, tmp_path, drafter, target, columns, max_prompt_length=2)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_columns_name_the_accepted_forms(tmp_path, target, kind):
    message = (
        r"The dataset has columns \['query', 'output'\], but needs .*`prompt`.*`messages`.*`prompt_ids`.*map\(lambda"
    )
    with refuses(message):
        make_trainer(kind, tmp_path, make_drafter("dflash", target), target, {"query": ["w9"], "output": ["w8"]})


def test_replay_without_stored_completions(tmp_path, target):
    with refuses("The rows have prompts but no responses.*in Draft-OPD, leave out `completions_from_target`"):
        make_trainer(
            "opd",
            tmp_path,
            make_drafter("dflash", target),
            target,
            {"prompt": ["w9"]},
            rollout="replay",
            completions_from_target=True,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary(tmp_path, target, kind):
    columns = {"prompt_ids": [[9], [64]], "completion_ids": [[8], [7]]}
    with refuses("Row 1 of the dataset: token id 64 in `prompt_ids` is outside the target's vocabulary of 64 tokens"):
        make_trainer(kind, tmp_path, make_drafter("dflash", target), target, columns)


def test_regenerating_a_streamed_dataset_is_refused(tmp_path, target):
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "w9", "completion": "w10"}]))
    with refuses(
        "`regenerate=True`, and evaluation by replay, need a dataset of known length, got an `IterableDataset`"
    ):
        args = make_args("sft", tmp_path, regenerate=True)
        DraftSFTTrainer(make_drafter("dflash", target), target, args, rows)


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, target, kind):
    drafter = make_drafter("eagle3", target)
    with torch.no_grad():
        drafter.norm.weight[0] = float("nan")
    before = {name: p.clone() for name, p in drafter.named_parameters()}
    text = greedy_text(target, [9, 10], 8)
    columns = {"prompt_ids": [[9, 10]] * 2, "completion_ids": [text[2:]] * 2}
    trainer = make_trainer(kind, tmp_path, drafter, target, columns)
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 0 on samples \[[01], [01]\].*Nothing was updated"
    ):
        trainer.train()
    assert all(torch.equal(before[n], p) or n == "norm.weight" for n, p in drafter.named_parameters())
    assert torch.equal(before["norm.weight"][1:], drafter.norm.weight[1:])


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_setting_is_named(tmp_path, kind):
    with pytest.raises(TypeError, match=r"Draft(SFT|OPD)Config.__init__\(\) got an unexpected keyword argument 'foo'"):
        make_args(kind, tmp_path, foo=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes,match",
    [
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "`use_reentrant=True` .* would lose the gradient",
        ),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "`every_n_layers` is 2, but .*Leave it out"),
        ({"accepted_loss": "kl"}, r"`accepted_loss` must be one of \('forward_kl', .*got 'kl'"),
        ({"position_decay": 0.0}, r"`position_decay` must be in \(0, 1\], got 0.0. 1 weighs all slots alike"),
        ({"position_decay": 1.5}, r"`position_decay` must be in \(0, 1\], got 1.5"),
        ({"temperature": -1.0}, r"`temperature` must be 0.0 \(greedy\) or in .*got -1.0"),
        ({"top_k": -1}, "`top_k` must be an integer >= 0, got -1"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"draft_sampling": "argmax"}, r"`draft_sampling` must be one of \('greedy', 'sample'\), got 'argmax'"),
        ({"max_prompt_length": 0}, "`max_prompt_length` must be at least 1, got 0"),
        ({"max_completion_length": 0}, "`max_completion_length` must be at least 1, got 0"),
        ({"loss_chunk_bytes": 0}, "`loss_chunk_bytes` must be at least 1, got 0"),
        ({"blocks_per_pass": 0}, "`blocks_per_pass` must be at least 1, got 0"),
        ({"num_drafts": 0}, "`num_drafts` must be at least 1, got 0"),
        ({"blocks_per_pass": 1.5}, "`blocks_per_pass` must be an integer, got 1.5"),
        ({"num_drafts": True}, "`num_drafts` must be an integer, got True"),
        ({"loss_chunk_bytes": "64MB"}, "`loss_chunk_bytes` must be an integer, got '64MB'"),
        ({"muon_learning_rate": "3e-3"}, "`muon_learning_rate` must be a number, got '3e-3'"),
        ({"muon_learning_rate": True}, "`muon_learning_rate` must be a number, got True"),
    ],
)
def test_a_setting_out_of_range(tmp_path, kind, changes, match):
    with refuses(match):
        make_args(kind, tmp_path, **changes)


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"rollout": "live", "completions_from_target": True}, "`completions_from_target=True` walks .*Leave one"),
        ({"responses": "t", "completions_from_target": True}, "`completions_from_target=True` walks .*Leave one"),
        ({"reading_bytes": -1}, "`reading_bytes` must be at least 0, got -1"),
        ({"replay_segment_length": 0}, "`replay_segment_length` must be at least 1, got 0"),
        ({"warn_mismatch_share": 0.5}, "Mismatch shares must rise within .*0.5.*0.1"),
        ({"rollout": "offline"}, r"`rollout` must be one of \('live', 'replay'\), got 'offline'"),
        ({"rejected_scope": "last"}, r"`rejected_scope` must be one of \('suffix', 'first'\), got 'last'"),
        ({"rejected_loss": "k3"}, "`rejected_loss` must be one of .*got 'k3'"),
        ({"accepted_weight": -1.0}, "must not be negative nor all 0, got -1.0, 1.0, 0.0"),
        ({"accepted_weight": 0.0, "rejected_weight": 0.0}, "must not be negative nor all 0, got 0.0, 0.0, 0.0"),
    ],
)
def test_an_opd_setting_out_of_range(tmp_path, changes, match):
    with refuses(match):
        make_args("opd", tmp_path, **changes)


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"num_anchors": -1}, "`num_anchors` must be at least 0, got -1"),
        ({"max_length": 1}, "`max_length` must be at least 2, got 1"),
    ],
)
def test_an_sft_setting_out_of_range(tmp_path, changes, match):
    with refuses(match):
        make_args("sft", tmp_path, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_good_input_gives_no_warning_of_ours(tmp_path, target, kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(kind, tmp_path, make_drafter("dflash", target), target)
    said = [str(w.message) for w in caught if "trl_draft_opd" in w.filename]
    # SFT says whose text it is.
    assert [words[:32] for words in said] == (["The completions are the dataset'"] if kind == "sft" else [])
