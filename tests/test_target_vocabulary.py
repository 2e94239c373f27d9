# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The target's token ids and settings: the mask of DFlash is an id that text never uses, a tokenizer may know more tokens
than the target, and what servers would change about its text is said.
"""

import warnings

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

from helpers.tiny import (
    EOS,
    MASK,
    TEMPLATE,
    TINY_RUN,
    VOCAB,
    make_causal_lm,
    make_drafter,
    make_target,
    make_tokenizer,
)
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer, FrozenTarget
from trl_draft_opd.cli import main


def tokenizer_of(ids, added=(), **special):
    """Return a tokenizer with words at these ids, and further tokens that are added to it as special ones."""
    words = {"<pad>": 0, "<s>": 1, "</s>": EOS, "user": 4, "assistant": 5, "<unk>": 6} | {f"w{i}": i for i in ids}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    )
    fast.add_tokens([AddedToken(token, special=True) for token in added], special_tokens=True)
    fast.chat_template = TEMPLATE
    return fast


def target_of(tokenizer, **generation):
    model = make_causal_lm()
    model.generation_config = GenerationConfig(**{"eos_token_id": EOS} | generation)
    return FrozenTarget(model, tokenizer)


# -- the mask of DFlash -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "wanted"),
    [
        (lambda: make_tokenizer(), MASK),
        (lambda: tokenizer_of(range(7, VOCAB), mask_token="w9"), 9),
        (lambda: tokenizer_of([3, *range(7, 60)], added=["<|MASK|>"]), 60),
        # No token of its own: behind the last one.
        (lambda: tokenizer_of([3, *range(7, 50)]), 50),
        # Ids with gaps: the number of tokens, 60, is an id in use.
        (lambda: tokenizer_of([3, *range(7, 59), 60, 61]), 62),
        # Every row behind the last token is taken: a gap.
        (lambda: tokenizer_of([3, *range(7, 40), *range(41, VOCAB)]), 40),
        (lambda: tokenizer_of([3, *range(7, 62)], added=["<a>"]), 63),
        # The mask token lies beyond the embedding.
        (lambda: tokenizer_of([3, *range(7, 60)] + [VOCAB, VOCAB + 1], mask_token=f"w{VOCAB}"), 63),
        # It has another meaning as well.
        (lambda: tokenizer_of([3, *range(7, 50)], mask_token="</s>"), 50),
    ],
    ids=["named", "mask token", "named in capitals", "behind", "gaps", "a gap", "added", "mask beyond", "mask is eos"],
)
def test_the_mask_is_an_id_that_text_never_uses(tokenizer, wanted):
    target = target_of(tokenizer())
    found = target.find_mask_token_id()
    assert found == wanted and 0 <= found < VOCAB
    named = {"<|mask|>", "<|MASK|>", str(target.tokenizer.mask_token)}
    used = {token_id for token, token_id in target.tokenizer.get_vocab().items() if token not in named}
    assert found not in used | set(target.tokenizer.added_tokens_decoder) - {found}
    assert found not in target.special_token_ids


def test_a_target_without_a_tokenizer_has_no_mask_to_find():
    with pytest.raises(ValueError, match="no tokenizer to find a mask token in. Pass `mask_token_id=`"):
        FrozenTarget(make_causal_lm()).find_mask_token_id()


def test_the_mask_is_no_id_that_ends_text_by_the_generation_config():
    tokenizer = tokenizer_of([3, *range(7, 50)])
    assert target_of(tokenizer, eos_token_id=[EOS, 50]).find_mask_token_id() == 51
    assert target_of(tokenizer, bos_token_id=50, pad_token_id=51).find_mask_token_id() == 52


def test_a_mask_token_that_the_chat_template_writes_is_not_taken():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("assistant {%", "<|mask|> {%")
    with pytest.raises(ValueError, match="embedding rows is in use"):
        target_of(tokenizer).find_mask_token_id()


def test_where_no_row_is_free_the_error_lists_reserved_tokens_that_the_template_does_not_use(tmp_path, capsys):
    added = ["<repo>", "<file>", "<tool>", "<|reserved_7|>"]
    tokenizer = tokenizer_of([3, *range(7, VOCAB - 4)], added=added)
    tokenizer.chat_template = TEMPLATE + "<tool>"
    target = target_of(tokenizer)
    listed = "63 '<|reserved_7|>', 60 '<repo>', 61 '<file>'. Pass the id of one as `mask_token_id=`"
    with pytest.raises(ValueError, match="64 embedding rows is in use") as refusal:
        target.find_mask_token_id()
    assert listed in str(refusal.value) and "<tool>" not in str(refusal.value) and "</s>" not in str(refusal.value)
    # The command says the same, and takes one of them.
    target.causal_lm.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    flags = ["--target", str(tmp_path / "target"), "--family", "dflash", "--output", str(tmp_path / "fresh")]
    assert main(["init", *flags]) == 2 and listed in capsys.readouterr().err
    assert main(["init", *flags, "--mask-token-id", "61", "--block-size", "3", "--num-hidden-layers", "1"]) == 0


@pytest.mark.parametrize("trainer", ["sft", "opd", "opd-walk"])
def test_a_mask_token_in_a_later_row_of_a_stream_is_refused_by_row(tmp_path, trainer):
    target = make_target()
    drafter = make_drafter("dflash", target, mask_token_id=30)
    rows = [{"prompt": f"w{i} w9", "completion": "w20 w21 w22"} for i in range(8, 12)]
    rows[3] |= {"prompt": "w30 w9"}
    stream = IterableDataset.from_generator(lambda: iter(rows))
    options = TINY_RUN | {"max_steps": 4, "per_device_train_batch_size": 1, "max_completion_length": 4}
    if trainer == "sft":
        run = DraftSFTTrainer(drafter, target, DraftSFTConfig(str(tmp_path), **options), stream)
    else:
        options |= {"completions_from_target": trainer == "opd-walk", "max_mismatch_share": 1.0}
        run = DraftOPDTrainer(drafter, target, DraftOPDConfig(str(tmp_path), **options), stream)
    with pytest.raises(ValueError, match=r"`mask_token_id` 30 occurs in the data \(row 3\): choose an id"):
        run.train()
    # The rows before it are read as they came.
    read = iter(run.train_dataset)
    assert [next(read)["sample_id"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="occurs in the data"):
        next(read)


# -- a tokenizer that knows more tokens than the target ---------------------------------------------------------------


def wide_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    return tokenizer


def test_ids_beyond_the_embedding_are_allowed_unless_one_occurs():
    target = FrozenTarget(make_causal_lm(), wide_tokenizer())
    with pytest.warns(
        UserWarning, match=r"has 2 ids beyond the target's 64 embedding rows, the first is 64 \('<new>'\)"
    ):
        reader = target.text_reader()
    rows = {"prompt": ["w9 w10", "w11"], "completion": ["w20 w21", "w22 w23"]}
    plain = make_target().text_reader().read_texts(Dataset.from_dict(rows))
    assert reader.read_texts(Dataset.from_dict(rows))["input_ids"][:] == plain["input_ids"][:]
    for column in ("prompt", "completion"):
        wrong = rows | {column: [rows[column][0], "w9 <newer>"]}
        with pytest.raises(
            ValueError, match=r"Row 1 of the dataset: token id 65 \('<newer>'\) in `input_ids` is outside"
        ):
            reader.read_texts(Dataset.from_dict(wrong))
    with pytest.raises(ValueError, match=r"token id 64 \('<new>'\) in `prompt_ids` is outside.*it has no embedding"):
        reader.read_prompts(Dataset.from_dict({"prompt": ["<new> w9"]}))


def test_a_pad_token_that_was_added_to_the_tokenizer_alone_fills_no_row(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<fill>"})
    target = FrozenTarget(make_causal_lm(), tokenizer)
    assert tokenizer.pad_token_id == VOCAB and target.pad_token_id < VOCAB
    rows = Dataset.from_list([{"prompt": "w8 w9", "completion": "w20"}, {"prompt": "w8", "completion": "w20 w21 w22"}])
    config = DraftSFTConfig(str(tmp_path), **TINY_RUN, max_steps=1)
    with pytest.warns(UserWarning, match="has 1 ids beyond"):
        trainer = DraftSFTTrainer(make_drafter("dflash", target), target, config, rows)
    trainer.train()


def test_an_end_of_sequence_that_the_target_cannot_write_ends_nothing():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    target = FrozenTarget(make_causal_lm(), tokenizer)
    assert target.eos_token_ids == [EOS]


# -- settings that a server applies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.1},
        {"suppress_tokens": [5, 6], "begin_suppress_tokens": [7]},
        {"bad_words_ids": [[9]], "forced_bos_token_id": 4},
        {"no_repeat_ngram_size": 3, "min_new_tokens": 5, "min_length": 2},
        {"forced_eos_token_id": EOS, "stop_strings": ["w9"], "num_beams": 4},
        {"do_sample": True, "min_p": 0.1, "typical_p": 0.9},
        {"exponential_decay_length_penalty": (5, 1.1), "guidance_scale": 1.5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_that_change_the_text_of_a_server_are_named_in_one_warning(settings):
    with pytest.warns(UserWarning) as caught:
        target_of(make_tokenizer(), **settings)
    (message,) = [str(each.message) for each in caught if "generation config sets" in str(each.message)]
    assert all(f"{name}=" in message for name in settings if name != "do_sample")
    assert "--generation-config vllm" in message and "--sampling-defaults openai" in message


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "max_new_tokens": 100},
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0, "guidance_scale": 1},
        {"suppress_tokens": [], "min_p": 0.1, "do_sample": False},
    ],
)
def test_settings_that_change_nothing_or_are_settings_of_training_are_not_named(settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target_of(make_tokenizer(), **settings)
    assert not [each for each in caught if "generation config sets" in str(each.message)]


def test_a_target_without_a_generation_config_loads():
    model = make_causal_lm()
    model.generation_config = None
    assert FrozenTarget(model).special_token_ids >= {EOS}
