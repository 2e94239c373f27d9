# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The decoding function that a published drafter carries: plain decoding's own text under every setting, the rounds of our own
decoding, and a file that stands alone.
"""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_export import export, make_variant
from tiny import EOS, PAD, make_causal_lm, make_drafter, make_prompts, make_target
from transformers import StoppingCriteria, StoppingCriteriaList

from trl_draft_opd import AutoDrafter, FrozenTarget, SamplingSettings
from trl_draft_opd.export.custom_generate import eagle3
from trl_draft_opd.rollout.live import LiveSettings, rollout_live


class Collected:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.has_ended = [], False

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.has_ended = True


class AfterToken(StoppingCriteria):
    """Stops behind the first occurrence of a token in the response."""

    def __init__(self, token, start):
        self.token, self.start = token, start

    def __call__(self, ids, scores, **options):
        return (ids[:, self.start :] == self.token).any(dim=1)


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, target):
    place = tmp_path_factory.mktemp("exports")
    variants = ("eagle3", "eagle3-reduced", "eagle3-norms", "dflash")
    for variant in variants:
        drafter = make_variant(variant, target)
        export(drafter, target, place / variant, dtype=torch.float32)
    return {variant: str(place / variant) for variant in variants}


def speculate(model, ids, folder, **options):
    return model.generate(ids, custom_generate=folder, trust_remote_code=True, drafter=folder, **options)


def as_ids(prompt):
    return torch.tensor([prompt])


@pytest.mark.parametrize("variant", ["eagle3", "eagle3-reduced", "eagle3-norms", "dflash"])
def test_greedy_text_is_the_targets_own(target, folders, variant):
    for prompt in make_prompts(4, longest=12):
        ids = as_ids(prompt)
        own = target.causal_lm.generate(ids, max_new_tokens=24, do_sample=False)
        assert torch.equal(speculate(target.causal_lm, ids, folders[variant], max_new_tokens=24, do_sample=False), own)


def test_greedy_text_of_an_untied_llama_is_its_own(tmp_path):
    target = make_target("llama", seed=4)
    export(make_variant("eagle3", target), target, tmp_path / "out", dtype=torch.float32)
    ids = as_ids([9])
    own = target.causal_lm.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(
        speculate(target.causal_lm, ids, str(tmp_path / "out"), max_new_tokens=30, do_sample=False), own
    )


@contextmanager
def widths_of(model):
    """Collect the number of new tokens in each forward pass of the target."""
    widths = []
    handle = model.register_forward_pre_hook(
        lambda module, arguments, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    yield widths
    handle.remove()


@pytest.mark.parametrize("variant", ["eagle3", "eagle3-reduced", "eagle3-norms"])
def test_rounds_are_those_of_our_own_decoding(target, folders, variant):
    model, drafter = target.causal_lm, AutoDrafter.from_pretrained(folders[variant])
    greedy = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    settings = LiveSettings(4, 24, greedy, "greedy", target.eos_token_ids, False)
    for prompt in make_prompts(3, seed=5):
        rollout = rollout_live(target, drafter, [prompt], settings, torch.Generator())
        with widths_of(model) as widths:
            speculate(model, as_ids(prompt), folders[variant], max_new_tokens=24, do_sample=False)
        assert widths[0] == len(prompt)
        assert len(widths) - 1 == int(rollout.num_rounds[0])
        assert max(widths[1:]) == 5


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.4}, {"do_sample": True}]
)
def test_right_drafts_are_kept_and_the_first_wrong_one_ends_a_block(target, folders, monkeypatch, options):
    model, ids = target.causal_lm, as_ids([9, 10, 11])
    options = {"max_new_tokens": 21, "top_k": 0, "eos_token_id": None} | options
    torch.manual_seed(0)
    truth = model.generate(ids, **options)[0].tolist()

    def planted(self, token, count, embed):
        # The committed text is read up to the anchor, whose position is therefore the number of keys.
        anchor = self.keys.shape[2]
        assert int(token) == truth[anchor]
        drafts = truth[anchor + 1 : anchor + 1 + count]
        wrong = 1 + anchor % 3
        return [7 if slot == wrong and draft != 7 else draft for slot, draft in enumerate(drafts)]

    monkeypatch.setattr(eagle3.Drafter, "draft", planted)
    torch.manual_seed(0)
    with widths_of(model) as widths:
        ours = eagle3.generate(model, drafter=folders["eagle3"], inputs=ids, **options)
    assert ours[0].tolist() == truth
    expected, anchor = [3], 3
    while anchor < len(truth) - 1:
        count = min(4, len(truth) - anchor - 2)
        expected.append(1 + count)
        drafts = truth[anchor + 1 : anchor + 1 + count]
        kept = next((k for k, draft in enumerate(drafts) if k == 1 + anchor % 3 and draft != 7), len(drafts))
        anchor += kept + 1
    assert widths == expected and len(widths) < 12


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"min_new_tokens": 20},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[17], [23]]},
        {"eos_token_id": [EOS, 17, 40]},
        {"max_length": 19, "max_new_tokens": None},
    ],
)
def test_processors_and_limits_act_as_in_plain_decoding(target, folders, options):
    for prompt in make_prompts(3, seed=2):
        options = {"max_new_tokens": 30, "do_sample": False} | options
        own = target.causal_lm.generate(as_ids(prompt), **options)
        assert torch.equal(speculate(target.causal_lm, as_ids(prompt), folders["eagle3"], **options), own)


@pytest.mark.parametrize("law", [{"temperature": 1.3}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}])
def test_drawn_text_is_plain_decodings_with_the_same_seed(target, folders, law):
    options = {"max_new_tokens": 25, "do_sample": True, "top_k": 0} | law
    texts = set()
    for seed in range(4):
        torch.manual_seed(seed)
        own = target.causal_lm.generate(as_ids([9, 10, 11]), **options)
        torch.manual_seed(seed)
        ours = speculate(target.causal_lm, as_ids([9, 10, 11]), folders["eagle3"], **options)
        assert torch.equal(ours, own)
        texts.add(tuple(own[0].tolist()))
    assert len(texts) == 4


def test_stopping_criteria_cut_a_block_where_plain_decoding_stops(target, folders):
    ids = as_ids([9, 10, 11])
    text = target.causal_lm.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    stop = StoppingCriteriaList([AfterToken(text[10], 3)])
    options = {"max_new_tokens": 20, "do_sample": False, "stopping_criteria": stop}
    own = target.causal_lm.generate(ids, **options)
    assert own.shape[1] <= 11
    assert torch.equal(speculate(target.causal_lm, ids, folders["eagle3"], **options), own)


def test_a_streamer_gets_every_token_once_and_the_end(target, folders):
    streamer = Collected()
    ids = as_ids([9, 10, 11])
    text = speculate(target.causal_lm, ids, folders["eagle3"], max_new_tokens=12, do_sample=False, streamer=streamer)
    assert streamer.tokens == text[0].tolist() and streamer.has_ended


def test_a_left_padded_prompt_gives_the_text_of_plain_decoding(target, folders):
    ids, mask = torch.tensor([[PAD, PAD, 9, 10, 11]]), torch.tensor([[0, 0, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False}
    own = target.causal_lm.generate(ids, **options)
    assert torch.equal(speculate(target.causal_lm, ids, folders["eagle3"], **options), own)


def test_a_dict_result_holds_sequences_and_scores_of_plain_decoding(target, folders):
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    own = target.causal_lm.generate(as_ids([9, 10]), **options)
    ours = speculate(target.causal_lm, as_ids([9, 10]), folders["eagle3"], **options)
    assert torch.equal(ours.sequences, own.sequences)
    assert len(ours.scores) == len(own.scores)
    torch.testing.assert_close(torch.cat(ours.scores), torch.cat(own.scores), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "ids, options, message",
    [
        ([[9], [10]], {}, "One sequence at a time, got 2"),
        ([[9]], {"num_beams": 2}, "num_beams=2"),
        ([[9]], {"cache_implementation": "static"}, "fresh DynamicCache"),
        ([[9]], {"num_drafts": 0}, "`num_drafts` must be at least 1"),
    ],
)
def test_what_blocks_cannot_do_is_refused(target, folders, ids, options, message):
    with pytest.raises(ValueError, match=message):
        speculate(target.causal_lm, torch.tensor(ids), folders["eagle3"], max_new_tokens=4, **options)


@pytest.mark.parametrize("variant", ["eagle3", "dflash"])
def test_a_drafter_of_another_target_is_refused(tmp_path, target, folders, variant):
    other = make_causal_lm("llama")
    other.config.num_hidden_layers = 9
    with pytest.raises(ValueError, match="made for another target"):
        speculate(other, as_ids([9]), folders[variant], max_new_tokens=4)


@pytest.mark.parametrize("variant", ["eagle3", "dflash"])
def test_a_file_that_names_no_drafter_says_how_to_name_it(target, folders, variant):
    with pytest.raises(ValueError, match='Pass `drafter="ORG/NAME"`'):
        target.causal_lm.generate(as_ids([9]), custom_generate=folders[variant], trust_remote_code=True)


def test_code_of_an_export_runs_only_when_trusted(target, folders):
    with pytest.raises(ValueError, match="trust_remote_code"):
        target.causal_lm.generate(as_ids([9]), custom_generate=folders["eagle3"], drafter=folders["eagle3"])


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_the_published_file_names_its_repository(tmp_path, target, family):
    export(make_drafter(family, target), target, tmp_path / "out", repo_id=f"org/tiny-{family}")
    text = (tmp_path / "out" / "custom_generate" / "generate.py").read_text()
    assert f"DRAFTER = 'org/tiny-{family}'\n" in text
    assert "trl_draft_opd" not in text


ALONE = """
import sys
sys.modules["trl_draft_opd"] = None
import json, torch
from transformers import AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[9, 10, 11]])
own = target.generate(ids, max_new_tokens=12, do_sample=False)
for folder in sys.argv[2:]:
    options = dict(custom_generate=folder, trust_remote_code=True, drafter=folder, max_new_tokens=12, do_sample=False)
    assert torch.equal(target.generate(ids, **options), own)
print("alone")
"""


def test_an_export_decodes_where_the_package_is_not_installed(tmp_path, target, folders):
    target.causal_lm.save_pretrained(tmp_path)
    words = [sys.executable, "-c", ALONE, str(tmp_path), folders["eagle3"], folders["dflash"]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("alone"), done.stderr[-2000:]


def test_a_real_target_decodes_to_its_own_text(tmp_path, shared_dir: Path):
    target = FrozenTarget.load(shared_dir / "targets" / "gsm8k-qwen3-7m", dtype=torch.float32)
    drafter = make_drafter("eagle3", target)
    export(drafter, target, tmp_path / "out", dtype=torch.float32)
    with (shared_dir / "data" / "gsm8k_test.jsonl").open(encoding="utf-8") as lines:
        question = json.loads(next(lines))["question"]
    chat = [{"role": "user", "content": question}]
    inputs = target.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    own = target.causal_lm.generate(**inputs, max_new_tokens=48, do_sample=False)
    options = {"custom_generate": str(tmp_path / "out"), "trust_remote_code": True, "drafter": str(tmp_path / "out")}
    assert torch.equal(target.causal_lm.generate(**inputs, **options, max_new_tokens=48, do_sample=False), own)
