# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The decoding function that a published drafter carries: plain decoding's own text under every setting, the rounds of
our own decoding, and a file that stands alone.
"""

import ast
import copy
import importlib.util
import json
import shutil
import string
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import VARIANTS, export, make_variant
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.rollouts import Options, decode
from helpers.tiny import EOS, PAD, make_drafter, make_target
from trl_draft_opd import AutoDrafter, Eagle3DraftModel, FrozenTarget
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.export.custom_generate import drafters, generate, write_custom_generate
from trl_draft_opd.rollout.blocks import sample_anchors
from trl_draft_opd.utils.versions import CACHE_NAME


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


TRAINED_ON = [[9, 10, 11], [40, 21]]


def make_trained(target):
    """Overfit a drafter to the target's continuations of two prompts, so that blocks are kept in part and in full."""
    drafter = make_drafter("eagle3", target)
    texts = [
        target.causal_lm.generate(as_ids(p), max_new_tokens=40, do_sample=False, eos_token_id=None) for p in TRAINED_ON
    ]
    for text, prompt, width in zip(texts, TRAINED_ON, (43, 42), strict=True):
        assert text.shape == (1, width) and text[0, : len(prompt)].tolist() == prompt
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    for step in range(60):
        text, start = texts[step % 2], len(TRAINED_ON[step % 2])
        mask = torch.ones_like(text)
        is_response = (torch.arange(text.shape[1]) >= start)[None]
        features = target.read_text(text, mask, drafter.config.target_layer_ids).padded().features
        anchors = sample_anchors(text, is_response, [0], num_anchors=None, num_drafts=4, seed=0, epoch=0)
        hidden = run_blocks(drafter, features, text, anchors.anchors, anchors.drafts, target.embed)
        logits = drafter.draft_logits(hidden, target.project)[anchors.is_accepted]
        loss = torch.nn.functional.cross_entropy(logits, anchors.labels[anchors.is_accepted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()


def make_normed(target):
    """Return a drafter with the two options of speculators that `from_target` does not offer."""
    config = copy.deepcopy(make_drafter("eagle3", target).config)
    config.norm_before_fc = config.norm_before_residual = True
    drafter = Eagle3DraftModel(config)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_()
    return drafter.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, target):
    place = tmp_path_factory.mktemp("exports")
    drafters = {name: make_variant(name, target) for name in VARIANTS}
    drafters |= {"eagle3-prenorms": make_normed(target), "trained": make_trained(target)}
    for name, drafter in drafters.items():
        export(drafter, target, place / name, dtype=torch.float32)
    return {name: str(place / name) for name in drafters}


def speculate(model, ids, folder, **options):
    return model.generate(ids, custom_generate=folder, trust_remote_code=True, drafter=folder, **options)


def as_ids(prompt):
    return torch.tensor([prompt])


def test_greedy_text_of_an_untied_llama_is_its_own(tmp_path):
    target = make_target("llama", seed=4)
    export(make_variant("eagle3", target), target, tmp_path / "out", dtype=torch.float32)
    ids = as_ids([9])
    own = target.causal_lm.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(
        speculate(target.causal_lm, ids, str(tmp_path / "out"), max_new_tokens=30, do_sample=False), own
    )


@contextmanager
def blocks_of(model):
    """Collect what each forward pass of the target reads: the position of its first token, and the tokens."""
    blocks = []

    def keep(module, arguments, given):
        blocks.append((int(given["position_ids"][0, 0]), given["input_ids"][0].tolist()))

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    yield blocks
    handle.remove()


@pytest.mark.parametrize("variant", [*VARIANTS, "eagle3-prenorms", "trained"])
def test_text_is_the_targets_own_and_rounds_are_ours_draft_by_draft(target, folders, variant):
    model, drafter = target.causal_lm, AutoDrafter.from_pretrained(folders[variant])
    options = Options(4, eos_token_ids=target.eos_token_ids)
    accepted = 0
    for prompt in (*TRAINED_ON, [17]) if variant == "trained" else TRAINED_ON[1:]:
        rollout = decode(target, drafter, [prompt], options)
        own = model.generate(as_ids(prompt), max_new_tokens=24, do_sample=False)
        with blocks_of(model) as blocks:
            text = speculate(model, as_ids(prompt), folders[variant], max_new_tokens=24, do_sample=False)
        assert torch.equal(text, own)
        assert blocks[0] == (0, prompt)
        assert len(blocks) - 1 == int(rollout.num_rounds[0])
        accepted += int(rollout.accepted.sum())
        for number, (position, block) in enumerate(blocks[1:]):
            assert position == int(rollout.anchors[0, number])
            # No draft is made that could not be kept, because the target adds one token of its own.
            room = len(prompt) + 24 - position - 2
            drafts = rollout.drafts[0, number, : max(0, min(4, room))].tolist()
            assert block == [int(rollout.input_ids[0, position]), *drafts]
    assert accepted > 30 or variant != "trained"


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.4}, {"do_sample": True}]
)
def test_right_drafts_are_kept_and_the_first_wrong_one_ends_a_block(target, folders, monkeypatch, options):
    model, ids = target.causal_lm, as_ids([9, 10, 11])
    options = {"max_new_tokens": 21, "top_k": 0, "eos_token_id": None} | options
    torch.manual_seed(0)
    truth = model.generate(ids, **options)[0].tolist()

    def planted(self, token, count, embed, project):
        # The committed text is read up to the anchor, whose position is therefore the number of keys.
        anchor = self.keys[0].shape[2]
        assert int(token) == truth[anchor]
        drafts = truth[anchor + 1 : anchor + 1 + count]
        wrong = 1 + anchor % 3
        return torch.tensor([[7 if slot == wrong and draft != 7 else draft for slot, draft in enumerate(drafts)]])[
            :, :count
        ]

    monkeypatch.setattr(drafters.Eagle3Drafter, "draft", planted)
    torch.manual_seed(0)
    with blocks_of(model) as blocks:
        ours = generate.generate(model, drafter=folders["eagle3"], inputs=ids, **options)
    assert ours[0].tolist() == truth
    expected, anchor = [3], 3
    while anchor < len(truth) - 1:
        count = min(4, len(truth) - anchor - 2)
        expected.append(1 + count)
        drafts = truth[anchor + 1 : anchor + 1 + count]
        kept = next((k for k, draft in enumerate(drafts) if k == 1 + anchor % 3 and draft != 7), len(drafts))
        anchor += kept + 1
    assert [len(block) for _, block in blocks] == expected and len(blocks) < 12


PENALTY = {"repetition_penalty": 1.3}


@pytest.mark.parametrize(
    "variant, options",
    [
        ("trained", PENALTY),
        ("dflash", PENALTY),
        ("trained", {"min_new_tokens": 14, "eos_token_id": [EOS, 4, 60]}),
        ("dflash", {"min_new_tokens": 14, "eos_token_id": [EOS, 4, 60]}),
        ("trained", {"no_repeat_ngram_size": 2}),
        ("trained", {"bad_words_ids": [[17], [23]]}),
        ("trained", {"max_length": 13, "max_new_tokens": None}),
        # The processor runs the target between our own passes.
        ("trained", {"guidance_scale": 1.3}),
        ("trained", {"generation_config": GenerationConfig(max_new_tokens=9, eos_token_id=[EOS, 17], **PENALTY)}),
        ("trained", {"prefix_allowed_tokens_fn": lambda row, ids: list(range(8, 30))}),
    ],
)
def test_processors_and_limits_act_as_in_plain_decoding(target, folders, variant, options):
    model, limits = (
        target.causal_lm,
        {} if "generation_config" in options else {"max_new_tokens": 20, "do_sample": False},
    )
    for prompt in (TRAINED_ON[0], [33]):
        own = model.generate(as_ids(prompt), **limits | options)
        assert torch.equal(speculate(model, as_ids(prompt), folders[variant], **limits | options), own)


@pytest.mark.parametrize("distribution", [{"temperature": 0.4}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.6}])
def test_drawn_text_is_plain_decodings_with_the_same_seed(target, folders, distribution):
    # The same random numbers choose the same tokens, so the distribution is plain decoding's too, whatever the drafts.
    options = {"max_new_tokens": 25, "do_sample": True, "top_k": 0} | distribution
    texts, num_tokens, num_rounds = set(), 0, 0
    for seed in range(3):
        torch.manual_seed(seed)
        own = target.causal_lm.generate(as_ids(TRAINED_ON[0]), **options)
        torch.manual_seed(seed)
        with blocks_of(target.causal_lm) as blocks:
            ours = speculate(target.causal_lm, as_ids(TRAINED_ON[0]), folders["trained"], **options)
        assert torch.equal(ours, own)
        texts.add(tuple(own[0].tolist()))
        num_tokens, num_rounds = num_tokens + own.shape[1] - 4, num_rounds + len(blocks) - 1
    assert len(texts) == 3 and num_rounds < num_tokens


def test_stopping_criteria_cut_a_block_where_plain_decoding_stops(target, folders):
    model, ids = target.causal_lm, as_ids(TRAINED_ON[0])
    text = model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    lengths = set()
    for place in (5, 8, 10, 13):
        stop = StoppingCriteriaList([AfterToken(text[place], 3)])
        options = {"max_new_tokens": 20, "do_sample": False, "stopping_criteria": stop}
        own = model.generate(ids, **options)
        ours = speculate(model, ids, folders["trained"], **options, return_dict_in_generate=True)
        assert torch.equal(ours.sequences, own)
        # All but the last token, which no pass has read, and no draft behind the end.
        assert ours[CACHE_NAME].get_seq_length() == own.shape[1] - 1
        lengths.add(own.shape[1])
    assert len(lengths) > 1


def make_letter_tokenizer():
    """Return a tokenizer with a letter per token, whose text can be searched for strings."""
    vocabulary = {f"<{i}>": i for i in range(7)} | dict(zip(string.ascii_letters + "01234", range(7, 64), strict=True))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("is_in_config", [False, True])
def test_stop_strings_end_a_text_as_in_plain_decoding(target, folders, is_in_config):
    model, ids = target.causal_lm, as_ids(TRAINED_ON[0])
    text = model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    tokenizer = make_letter_tokenizer()
    word = tokenizer.decode(text[8:10])
    assert word not in tokenizer.decode(text[3:9])
    options = {"max_new_tokens": 20, "do_sample": False, "stop_strings": [word]}
    if is_in_config:
        options = {"generation_config": GenerationConfig(**options, eos_token_id=EOS)}
    own = model.generate(ids, tokenizer=tokenizer, **copy.deepcopy(options))
    assert own.shape == (1, 10)
    assert torch.equal(speculate(model, ids, folders["trained"], tokenizer=tokenizer, **options), own)
    assert not is_in_config or options["generation_config"].stop_strings == [word]
    with pytest.raises(ValueError, match="Pass `tokenizer=`"):
        speculate(model, ids, folders["trained"], **options)


def test_a_streamer_gets_every_token_once_and_the_end(target, folders):
    streamer = Collected()
    ids = as_ids(TRAINED_ON[0])
    text = speculate(target.causal_lm, ids, folders["trained"], max_new_tokens=12, do_sample=False, streamer=streamer)
    assert streamer.tokens == text[0].tolist() and streamer.has_ended


def test_a_call_inside_of_a_call_leaves_both_as_they_are(target, folders):
    model, folder = target.causal_lm, folders["trained"]
    options = {"max_new_tokens": 20, "do_sample": False}

    class Nested(Collected):
        inner = None

        def put(self, tokens):
            super().put(tokens)
            if len(self.tokens) == 10:
                self.inner = speculate(model, as_ids(TRAINED_ON[1]), folder, **options)

    with blocks_of(model) as apart:
        texts = [speculate(model, as_ids(prompt), folder, **options) for prompt in TRAINED_ON]
    streamer = Nested()
    with blocks_of(model) as nested:
        outer = speculate(model, as_ids(TRAINED_ON[0]), folder, **options, streamer=streamer)
    assert torch.equal(outer, texts[0]) and torch.equal(streamer.inner, texts[1])
    assert sorted(map(str, nested)) == sorted(map(str, apart)) and nested != apart


def test_another_thread_on_the_same_target_changes_no_draft(target, folders):
    model, options, own = target.causal_lm, {"max_new_tokens": 12, "do_sample": False}, threading.get_ident()
    with blocks_of(model) as alone:
        speculate(model, as_ids(TRAINED_ON[0]), folders["trained"], **options)

    def disturb(*arguments):
        # Behind the tapped layers, before the pass is over.
        if threading.get_ident() == own:
            other = threading.Thread(target=model, kwargs={"input_ids": as_ids([50]), "position_ids": as_ids([0])})
            other.start()
            other.join()

    handle = model.lm_head.register_forward_hook(disturb)
    with blocks_of(model) as both:
        speculate(model, as_ids(TRAINED_ON[0]), folders["trained"], **options)
    handle.remove()
    assert [block for block in both if block != (0, [50])] == alone and len(both) == 2 * len(alone)


def test_a_left_padded_prompt_gives_the_text_of_plain_decoding(target, folders):
    ids, mask = torch.tensor([[PAD, PAD, 9, 10, 11]]), torch.tensor([[0, 0, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False}
    own = target.causal_lm.generate(ids, **options)
    assert torch.equal(speculate(target.causal_lm, ids, folders["eagle3"], **options), own)


def test_a_dict_result_holds_sequences_and_scores_of_plain_decoding(target, folders):
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    plain = speculate(target.causal_lm, as_ids(TRAINED_ON[0]), folders["trained"], **options)
    assert plain.scores is None and plain.logits is None
    options |= {"output_scores": True, "output_logits": True, "repetition_penalty": 1.1}
    own = target.causal_lm.generate(as_ids(TRAINED_ON[0]), **options)
    ours = speculate(target.causal_lm, as_ids(TRAINED_ON[0]), folders["trained"], **options)
    assert torch.equal(ours.sequences, own.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(own[name])
        torch.testing.assert_close(torch.cat(ours[name]), torch.cat(own[name]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "ids, options, message",
    [
        ([[9], [10]], {}, "One sequence at a time, got 2"),
        ([[9]], {"num_beams": 2}, "num_beams=2"),
        ([[9]], {"cache_implementation": "static"}, "fresh DynamicCache"),
        ([[9]], {"use_cache": False}, "fresh DynamicCache"),
        ([[9]], {"num_return_sequences": 2, "do_sample": True}, "One sequence at a time, got 2"),
        ([[9]], {"num_drafts": 0}, "`num_drafts` must be at least 1"),
        ([[9]], {"position_ids": torch.tensor([[4]])}, "`position_ids` must count"),
        ([[9]], {"inputs_embeds": torch.zeros(1, 1, 32)}, r"not with \['inputs_embeds'\]"),
        ([[9]], {"return_dict_in_generate": True, "output_attentions": True}, r"not with \['output_attentions'\]"),
        ([[9, 9]], {"attention_mask": torch.tensor([[1, 0]])}, "hides tokens inside of the prompt"),
        ([[9]], {"assistant_model": 1}, "has no part here"),
    ],
)
def test_what_blocks_cannot_do_is_refused(target, folders, ids, options, message):
    with pytest.raises(ValueError, match=message):
        speculate(target.causal_lm, torch.tensor(ids), folders["eagle3"], max_new_tokens=4, **options)


@pytest.mark.parametrize("count", [0, 5])
def test_more_drafts_than_a_block_holds_are_refused(target, folders, count):
    with pytest.raises(ValueError, match=f"at most 4, the drafter's block, got {count}"):
        speculate(target.causal_lm, as_ids([9]), folders["dflash"], max_new_tokens=4, num_drafts=count)


def test_hooks_are_taken_off_a_target_that_failed(target, folders):
    def fail(ids, scores):
        raise RuntimeError("broken")

    layers = target.causal_lm.get_decoder().layers
    before = [list(layer._forward_hooks) for layer in layers]
    with pytest.raises(RuntimeError, match="broken"):
        speculate(target.causal_lm, as_ids([9]), folders["eagle3"], max_new_tokens=4, logits_processor=[fail])
    assert [list(layer._forward_hooks) for layer in layers] == before


def test_a_target_with_an_encoder_is_refused(folders):
    config = T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="has an encoder"):
        speculate(T5ForConditionalGeneration(config), as_ids([9]), folders["eagle3"], max_new_tokens=2)


@pytest.mark.parametrize("variant", ["eagle3", "dflash"])
@pytest.mark.parametrize("name, value", [("num_hidden_layers", 9), ("hidden_size", 64), ("vocab_size", 65)])
def test_a_drafter_of_another_target_is_refused(target, folders, variant, name, value):
    other = copy.deepcopy(target.causal_lm)
    setattr(other.config, name, value)
    with pytest.raises(ValueError, match=f"made for another target.*{value}"):
        generate.generate(other, drafter=folders[variant], inputs=as_ids([9]), max_new_tokens=4)


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("{missing}", ValueError, "neither a folder on this machine nor a Hub id"),
        ("org/nowhere", OSError, "Could not get 'config.json' of the drafter 'org/nowhere'"),
        ("{empty}", OSError, "holds no 'config.json', so it is no published drafter"),
        ("{dflash}/transformers", ValueError, "no drafter in the flat layout .*: architectures .'MuseGlimmerAssist"),
        ("{eagle3}/speculators", ValueError, "no drafter in the flat layout"),
    ],
)
def test_what_is_no_published_drafter_is_named_with_the_way_out(tmp_path, target, folders, source, error, message):
    source = source.format(missing=tmp_path / "a" / "b", empty=tmp_path, **folders)
    with pytest.raises(error, match=message):
        generate.generate(target.causal_lm, drafter=source, inputs=as_ids([9]))


def test_weights_that_do_not_fit_the_config_are_listed(tmp_path, target, folders):
    folder = Path(shutil.copytree(folders["eagle3"], tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    tensors["mystery"] = tensors.pop("fc.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['fc.weight'\], unexpected \['mystery'\]"):
        generate.generate(target.causal_lm, drafter=str(folder), inputs=as_ids([9]))


def test_a_drafter_is_loaded_once_and_again_when_its_folder_is_replaced(tmp_path, target, folders):
    model, folder = target.causal_lm, tmp_path / "out"
    shutil.copytree(folders["eagle3"], folder)
    first = generate.load_drafter(str(folder), model)
    assert generate.load_drafter(str(folder), model) is first
    shutil.rmtree(folder)
    shutil.copytree(folders["trained"], folder)
    again = generate.load_drafter(str(folder), model)
    assert not torch.equal(again.tensors["fc.weight"], first.tensors["fc.weight"])
    # A checkpoint of training has no embedding.
    AutoDrafter.from_pretrained(folder).save_pretrained(tmp_path / "checkpoint")
    assert "embed_tokens.weight" not in load_file(tmp_path / "checkpoint" / "model.safetensors")
    bare = generate.load_drafter(str(tmp_path / "checkpoint"), model)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in bare.tensors.items())


def test_a_file_that_names_no_drafter_says_how_to_name_it(target):
    with pytest.raises(ValueError, match='Pass `drafter="ORG/NAME"`'):
        generate.generate(target.causal_lm, inputs=as_ids([9]))


@pytest.mark.parametrize("variant", ["eagle3", "dflash"])
def test_a_local_folder_decodes_with_its_own_drafter_whatever_name_it_was_published_under(
    tmp_path, target, folders, variant, monkeypatch
):
    place = shutil.copytree(folders[variant], tmp_path / f"local-{variant}")
    write_custom_generate(place, "no-such-org/renamed-since")
    ids, limits = as_ids([9, 10, 11]), {"max_new_tokens": 8, "do_sample": False}
    own = target.causal_lm.generate(ids, **limits)
    options = limits | {"trust_remote_code": True}
    assert torch.equal(target.causal_lm.generate(ids, custom_generate=str(place), **options), own)
    # By a path that is relative, too.
    monkeypatch.chdir(tmp_path)
    assert torch.equal(target.causal_lm.generate(ids, custom_generate=place.name, **options), own)
    # And nothing but that drafter: without its weights there is none.
    (place / "model.safetensors").unlink()
    with pytest.raises(OSError):
        target.causal_lm.generate(ids, custom_generate=str(place), **options)


def test_code_of_an_export_runs_only_when_trusted(target, folders):
    with pytest.raises(ValueError, match="trust_remote_code"):
        target.causal_lm.generate(as_ids([9]), custom_generate=folders["eagle3"], drafter=folders["eagle3"])


def test_the_published_files_name_their_repository_and_import_no_more_than_they_may(tmp_path):
    write_custom_generate(tmp_path, "org/tiny-eagle3")
    trees = {path.name: ast.parse(path.read_text()) for path in (tmp_path / "custom_generate").iterdir()}
    body = trees["generate.py"].body
    values = [ast.literal_eval(node.value) for node in body if ast.unparse(node).startswith("DRAFTER = ")]
    assert values == ["org/tiny-eagle3"] and trees.keys() == {"generate.py", "drafters.py"}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {"." * node.level + node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    allowed = sys.stdlib_module_names | {"torch", "transformers", "safetensors", "huggingface_hub"}
    assert {name.split(".")[0] for name in imported - {".drafters"}} <= allowed


@pytest.mark.parametrize("repo_id", ["org/na'me", 'org/"', "org/a\nimport os", "org/../x", "a/b/c", "org/na me"])
def test_a_name_that_is_no_hub_id_never_gets_into_code(tmp_path, repo_id):
    with pytest.raises(ValueError):
        write_custom_generate(tmp_path, repo_id)
    assert list(tmp_path.iterdir()) == []


ALONE = """
import sys
sys.modules["trl_draft_opd"] = None
import json, torch
from transformers import AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[9, 10, 11]])
own = target.generate(ids, max_new_tokens=12, do_sample=False)
for folder in sys.argv[2:]:
    options = dict(custom_generate=folder, trust_remote_code=True, max_new_tokens=12, do_sample=False)
    assert torch.equal(target.generate(ids, **options), own)
print("alone")
"""


class Renamed:
    """A target in a transformers that calls keys and values by `name`, whatever the installed one does."""

    def __init__(self, model, name):
        self.model, self.name = model, name

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, **options):
        cache = options.pop(self.name)
        return self.model(**options, **{CACHE_NAME: cache})

    def generate(self, *arguments, custom_generate, **options):
        def renamed(model, ids, **rest):
            cache = rest.pop(CACHE_NAME)
            return custom_generate(self, ids, **rest, **{self.name: cache})

        return self.model.generate(*arguments, custom_generate=renamed, **options)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_an_export_decodes_whatever_transformers_calls_the_cache(monkeypatch, target, folders, name):
    # A package, because one file imports the other.
    folder = Path(folders["trained"])
    spec = importlib.util.spec_from_file_location("carried", folder / "custom_generate" / "generate.py")
    spec.submodule_search_locations = [str(folder / "custom_generate")]
    exported = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "carried", exported)
    spec.loader.exec_module(exported)
    monkeypatch.setattr(exported, "GenerateDecoderOnlyOutput", SimpleNamespace)
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    own = target.causal_lm.generate(as_ids(TRAINED_ON[0]), **options)
    with blocks_of(target.causal_lm) as blocks:
        ours = exported.generate(
            Renamed(target.causal_lm, name), inputs=as_ids(TRAINED_ON[0]), drafter=folders["trained"], **options
        )
    assert torch.equal(ours.sequences, own.sequences) and len(blocks) < 20
    assert getattr(ours, name).get_seq_length() == own.sequences.shape[1] - 1


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
