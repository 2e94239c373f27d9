# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of a target without its body against the whole one, saved and loaded, over families.
"""

import gc
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutputWithPast

from helpers.tiny import EOS, PAD, VOCAB, make_tokenizer
from trl_draft_opd import FrozenTarget, SamplingSettings, verify_drafter
from trl_draft_opd.drafters.packing import RowPacking
from trl_draft_opd.drafters.published.checkpoint import CheckpointSource
from trl_draft_opd.evaluation import explain_replay
from trl_draft_opd.responses.generate import generate_missing
from trl_draft_opd.responses.origin import Origin
from trl_draft_opd.responses.store import ResponseStore
from trl_draft_opd.rollout.live import rollout_live
from trl_draft_opd.target import bodiless
from trl_draft_opd.target.branches import score_branches
from trl_draft_opd.target.reading import TextReading
from trl_draft_opd.trainer.card_memory import target_bytes


SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "initializer_range": 0.4,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
# Class and settings of its config.
FAMILIES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", EXPERTS),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3", {"query_pre_attn_scalar": 8}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "glm4": ("Glm4", {}),
    "gpt2": ("GPT2", {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def make_model(family, seed=0):
    name, settings = FAMILIES[family]
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM"))
    shape = {key: SHAPE[key] for key in ("vocab_size", "eos_token_id", "bos_token_id")} if name == "GPT2" else SHAPE
    torch.manual_seed(seed)
    made = model(config(**shape | settings))
    # Norms of their own, so that a wrong one shows.
    for name, parameter in made.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made.eval()


def save(family, path, **options):
    make_model(family).save_pretrained(path, **options)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:Target of type")
@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_norm_head_and_fingerprint_are_the_whole_targets(tmp_path, family):
    save(family, tmp_path)
    whole, target = FrozenTarget.load(tmp_path), FrozenTarget.load(tmp_path, body=False)
    assert whole.has_body and not target.has_body
    ids = torch.randint(4, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(target.embed(ids), whole.embed(ids))
    hidden = torch.randn(2, 7, 32)
    assert torch.equal(target.norm(hidden), whole.norm(hidden))
    assert torch.equal(target.project(hidden), whole.project(hidden))
    # What leaves the last layer is what the norm takes.
    left = []
    handle = whole.layers[-1].register_forward_hook(lambda *call: left.append(call[2]))
    reading = whole.read_text(ids, torch.ones_like(ids), []).padded()
    handle.remove()
    states = torch.cat([(each if isinstance(each, torch.Tensor) else each[0]).reshape(-1, 32) for each in left])
    assert torch.equal(target.norm(states), reading.last_hidden.reshape(-1, 32))
    in_memory = FrozenTarget(make_model(family))
    assert target.weights_fingerprint == whole.weights_fingerprint == in_memory.weights_fingerprint
    assert target.num_parameters == whole.num_parameters and target.num_layers == whole.num_layers == 3


@pytest.mark.parametrize("family", ["llama", "llama tied", "qwen3_moe", "gemma2"])
def test_the_target_is_the_whole_one_to_whoever_asks_what_it_is(tmp_path, family):
    save(family, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    whole, target = FrozenTarget.load(tmp_path), FrozenTarget.load(tmp_path, body=False)
    origins = [
        Origin.of(each, sampling=SamplingSettings(0.0, 0, 1.0), max_completion_length=8) for each in (whole, target)
    ]
    assert origins[0] == origins[1] and origins[0].target == origins[1].target == str(tmp_path)
    assert target.eos_token_ids == whole.eos_token_ids == [EOS, 7, 9]
    for name in ("num_positions", "vocab_size", "pad_token_id", "special_token_ids", "num_logit_buffers", "is_merged"):
        assert getattr(target, name) == getattr(whole, name), name
    assert target.causal_lm.dtype == whole.causal_lm.dtype == torch.float32
    assert len(target.tokenizer) == VOCAB and not target.causal_lm.training
    assert not any(parameter.requires_grad for parameter in target.causal_lm.parameters())


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_weights_are_in_the_precision_of_the_whole_target(tmp_path, dtype):
    make_model("gemma2").to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    whole, target = (FrozenTarget.load(tmp_path, dtype=dtype, body=body) for body in (True, False))
    assert whole.causal_lm.dtype == target.causal_lm.dtype == target.causal_lm.config.dtype
    ids, hidden = torch.arange(4, 12)[None], torch.randn(8, 32).to(target.causal_lm.dtype)
    assert torch.equal(target.embed(ids), whole.embed(ids))
    assert torch.equal(target.norm(hidden), whole.norm(hidden))
    assert torch.equal(target.project(hidden), whole.project(hidden))
    assert target.weights_fingerprint == whole.weights_fingerprint


# -- how checkpoints lie in files -------------------------------------------------------------------------------------


def rewrite(path, change, file="model.safetensors"):
    """Save what `change` makes of a file's tensors in its place."""
    tensors = change(load_file(path / file))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path / file, {"format": "pt"})


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def head_for_embedding(tensors):
    return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()}


def both(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def both_apart(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}


def without_prefix(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_buffers(tensors):
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


WAYS = {
    "the head for both": ("llama tied", head_for_embedding),
    "both, equal": ("llama tied", both),
    "both, of which one is another": ("llama tied", both_apart),
    "a backbone alone": ("gpt2", without_prefix),
    "buffers of an old release": ("llama", with_buffers),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_read_as_the_whole_target_is(tmp_path, way):
    family, change = WAYS[way]
    rewrite(save(family, tmp_path), change)
    whole, target = FrozenTarget.load(tmp_path), FrozenTarget.load(tmp_path, body=False)
    ids, hidden = torch.arange(4, 12)[None], torch.randn(8, 32)
    assert torch.equal(target.embed(ids), whole.embed(ids))
    assert torch.equal(target.project(hidden), whole.project(hidden))
    assert target.weights_fingerprint == whole.weights_fingerprint
    assert held_bytes(target) == held_bytes(whole) - bytes_of(whole.layers)


def test_shards_are_read_as_one_file(tmp_path):
    save("qwen3_moe", tmp_path / "one")
    save("qwen3_moe", tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (FrozenTarget.load(tmp_path / name, body=False) for name in ("one", "many"))
    assert one.weights_fingerprint == many.weights_fingerprint
    assert torch.equal(one.causal_lm.lm_head.weight, many.causal_lm.lm_head.weight)


def test_of_a_repository_only_the_files_with_held_tensors_are_fetched_until_the_fingerprint(tmp_path, monkeypatch):
    path = save("llama", tmp_path, max_shard_size="20KB")
    found = []
    own = CheckpointSource.find

    def find(self, file):
        found.append(file)
        return own(self, file)

    monkeypatch.setattr(CheckpointSource, "find", find)
    # Of a folder, all are looked for; a name that is none stands for a repository here.
    monkeypatch.setattr(bodiless, "Path", lambda name: tmp_path / "none")
    target = FrozenTarget.load(path, body=False)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    held = {index[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    assert {file for file in found if file.endswith("safetensors")} - {"model.safetensors"} == held
    assert target.weights_fingerprint == FrozenTarget.load(path).weights_fingerprint
    assert set(index.values()) > held and set(index.values()) <= set(found)


# -- quantised checkpoints --------------------------------------------------------------------------------------------


def quantized(path, method):
    """Make a saved model look as a quantiser leaves it, without the quantiser."""

    def change(tensors):
        changed = {}
        for name, tensor in tensors.items():
            if "layers" not in name or "proj" not in name:
                changed[name] = tensor
            elif method == "fp8":
                changed[name] = tensor.to(torch.float8_e4m3fn)
                changed[f"{name}_scale_inv"] = torch.ones(1, 1)
            elif method == "bitsandbytes":
                changed[name] = torch.ones(tensor.numel() // 2, 1, dtype=torch.uint8)
                changed[f"{name}.scale"] = torch.ones(4)
            elif method == "awq":
                stem = name.removesuffix("weight")
                changed[f"{stem}qweight"] = torch.ones(tensor.shape[1], tensor.shape[0] // 8, dtype=torch.int32)
                changed[f"{stem}qzeros"] = torch.ones(1, tensor.shape[0] // 8, dtype=torch.int32)
                changed[f"{stem}scales"] = torch.ones(1, tensor.shape[0], dtype=torch.float16)
            else:
                changed[f"{name}_packed"] = torch.ones(tensor.shape[0], tensor.shape[1] // 8, dtype=torch.int32)
                changed[f"{name}_shape"], changed[f"{name}_scale"] = torch.tensor(tensor.shape), torch.ones(1)
        # Of a quantised cache: beside the projections, in no module of the class.
        return changed | {"model.layers.0.self_attn.k_scale": torch.ones(1)}

    rewrite(path, change)
    edit_config(path, quantization_config={"quant_method": method})
    return path


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("method", ["fp8", "awq", "compressed-tensors", "bitsandbytes"])
def test_a_quantised_checkpoint_needs_no_quantiser(tmp_path, family, method):
    plain = FrozenTarget.load(save(family, tmp_path), body=False)
    unquantized = plain.weights_fingerprint
    target = FrozenTarget.load(quantized(tmp_path, method), body=False)
    ids, hidden = torch.arange(4, 12)[None], torch.randn(8, 32)
    assert torch.equal(target.embed(ids), plain.embed(ids))
    assert torch.equal(target.project(target.norm(hidden)), plain.project(plain.norm(hidden)))
    assert held_bytes(target) == held_bytes(plain)
    target.place(torch.device("cpu"))
    first = target.weights_fingerprint
    assert first != unquantized
    # Scales count, too.
    rewrite(tmp_path, lambda tensors: {n: t * 2 if "scale" in n else t for n, t in tensors.items()})
    assert FrozenTarget.load(tmp_path, body=False).weights_fingerprint != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"lm_head.weight_scale": torch.ones(1)}, "holds 'lm_head.weight_scale': its embedding, norm"),
        (lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}, "'lm_head.weight' has type"),
        (lambda t: {n.replace("lm_head.weight", "lm_head.qweight"): v for n, v in t.items()}, "lm_head.qweight"),
    ],
)
def test_a_quantised_head_is_refused_by_name(tmp_path, change, message):
    rewrite(quantized(save("llama", tmp_path), "fp8"), change)
    with pytest.raises(ValueError, match=message):
        FrozenTarget.load(tmp_path, body=False)


# -- bytes ------------------------------------------------------------------------------------------------------------


def bytes_of(*modules):
    tensors = {id(each): each for module in modules for each in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values() if not tensor.is_meta)


def held_bytes(target):
    return bytes_of(target.causal_lm)


@pytest.mark.parametrize("family", ["llama", "llama tied", "gemma2", "gemma3_text", "mixtral"])
def test_the_target_holds_embedding_norm_head_and_buffers_and_nothing_else(tmp_path, family):
    target = FrozenTarget.load(save(family, tmp_path), body=False)
    rows = VOCAB * 32 * 4
    expected = rows * (1 if target.config.tie_word_embeddings else 2) + 32 * 4
    assert bytes_of(target.causal_lm) - sum(buffer.nbytes for buffer in target.causal_lm.buffers()) == expected
    assert not any(tensor.is_meta for tensor in (*target.causal_lm.parameters(), *target.causal_lm.buffers()))
    assert target_bytes(target) == expected
    whole = FrozenTarget.load(tmp_path)
    assert held_bytes(whole) == held_bytes(target) + bytes_of(whole.layers)


def peak_bytes(load):
    """Return by how much the memory of this process grows at most while `load` runs."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    load()
    return read_status("VmHWM") - before


def read_status(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak where Linux tells it")
def test_the_layers_are_never_allocated(tmp_path):
    # 3 layers of 64 MB beside an embedding of 0.3 MB.
    config = transformers.LlamaConfig(**SHAPE | {"hidden_size": 1024, "intermediate_size": 5120, "head_dim": 16})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    make_tokenizer().save_pretrained(tmp_path / "large")
    FrozenTarget.load(save("llama", tmp_path / "small"))
    bodiless = peak_bytes(lambda: FrozenTarget.load(tmp_path / "large", body=False))
    whole = peak_bytes(lambda: FrozenTarget.load(tmp_path / "large"))
    assert bodiless < 20e6 and whole > 150e6, (bodiless, whole)


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return FrozenTarget.load(save("llama", tmp_path_factory.mktemp("target")), body=False)


IDS = torch.tensor([[5, 6, 7]])
ONES = torch.ones_like(IDS)
ANCHORS, DRAFTS, IS_BRANCH = torch.tensor([[0]]), torch.tensor([[[4, 5]]]), torch.tensor([[[False, True]]])
READING = TextReading(torch.zeros(3, 0), torch.zeros(3, 32), RowPacking.of(ONES))
DECODING = {
    "step": lambda target, path: target.step(IDS, ONES, torch.arange(3)[None], None, []),
    "the model": lambda target, path: target.causal_lm(input_ids=IDS),
    "generate": lambda target, path: target.causal_lm.generate(IDS, max_new_tokens=1),
    "branches": lambda target, path: score_branches(target, READING, ANCHORS, DRAFTS, IS_BRANCH),
    "live rollout": lambda target, path: decode_live(target),
    "shard": lambda target, path: target.shard(torch.device("cpu")),
    "verify": lambda target, path: verify_drafter(path, target, prompts=[[5, 6]]),
    "responses": lambda target, path: write_missing(target, path),
}


def write_missing(target, path):
    origin = Origin.of(target, sampling=SamplingSettings(0.0, 0, 1.0), max_completion_length=4)
    store = ResponseStore.open(path, origin)
    generate_missing(store, target, [[5, 6]], batch_size=1, seed=0, shard_size=1, show_progress=False)


def decode_live(target):
    settings = SimpleNamespace(num_drafts=1)
    rollout_live(target, None, [[5, 6]], settings, None, max_completion_length=4, eos_token_ids=[])


@pytest.mark.parametrize("way", DECODING)
def test_whatever_decodes_is_refused_with_what_needs_no_body(target, tmp_path, way):
    with pytest.raises(ValueError, match=r"needs the target's body.*rejected_scope='first'.*generate --engine vllm"):
        DECODING[way](target, tmp_path)


def test_a_text_is_read_from_a_source_or_not_at_all(target):
    with pytest.raises(ValueError, match="without its body, so it reads no text by itself. .*open_readings"):
        target.read_text(IDS, ONES, [0])


def test_evaluation_goes_by_replay_for_a_reason_that_is_given(target):
    why = explain_replay(target.rollback_reason)
    assert why.startswith("The target was loaded without its body: tau is measured by replay")


def test_an_instance_keeps_its_body():
    for given in (make_model("llama"), FrozenTarget(make_model("llama"))):
        with pytest.raises(ValueError, match="`body=False` was given with an instantiated target.*id or path"):
            FrozenTarget.load(given, body=False)


def test_settings_of_the_body_are_refused_and_those_of_the_files_are_read(tmp_path):
    save("llama", tmp_path / "inside")
    with pytest.raises(ValueError, match=r"`target_init_kwargs` \['attn_implementation', 'device_map'\] are about"):
        FrozenTarget.load(tmp_path, init_kwargs={"device_map": "auto", "attn_implementation": "sdpa"}, body=False)
    loaded = FrozenTarget.load(tmp_path, init_kwargs={"subfolder": "inside"}, body=False)
    assert loaded.num_layers == 3


def test_a_family_without_a_final_norm_is_refused_by_name(tmp_path, monkeypatch):
    save("llama", tmp_path)

    def forward(self, input_ids, **others):
        return BaseModelOutputWithPast(last_hidden_state=2 * self.norm(self.embed_tokens(input_ids)))

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(ValueError, match="'llama' does not end its layers with a norm that can be applied alone"):
        FrozenTarget.load(tmp_path, body=False)


def test_a_family_whose_layers_are_elsewhere_is_refused_by_name(tmp_path):
    config = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'opt' has no list of 3 decoder layers"):
        FrozenTarget.load(tmp_path, body=False)
