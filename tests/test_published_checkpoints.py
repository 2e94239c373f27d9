# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Loading drafters from every published layout: the tensors arrive bit for bit, and whatever does not fit is an error.
"""

import json
import os
import pickle
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

from trl_draft_opd.drafters.dflash import DFlashDraftConfig, DFlashDraftModel
from trl_draft_opd.drafters.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from trl_draft_opd.drafters.published import checkpoint as importing
from trl_draft_opd.drafters.published.checkpoint import CheckpointSource


V, DV, H = 48, 20, 16
SHAPE = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "num_target_layers": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 50000.0}
IDS = "eagle_aux_hidden_state_layer_ids"


def randomise(drafter):
    """Give norms and everything else distinct values, so that no two tensors can be exchanged unseen."""
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_()
        if getattr(drafter.config, "has_reduced_vocabulary", False):
            token_ids = torch.randperm(V)[:DV].sort().values
            drafter.d2t.copy_(token_ids - torch.arange(DV))
            drafter.t2d.copy_(torch.zeros(V, dtype=torch.bool).index_fill(0, token_ids, True))
    return drafter


def eagle3(**changes):
    settings = SHAPE | {"rope_parameters": dict(ROPE), "draft_vocab_size": DV, "target_layer_ids": [1, 3, 4]} | changes
    return randomise(Eagle3DraftModel(Eagle3DraftConfig(**settings)))


def dflash(**changes):
    settings = SHAPE | {"num_hidden_layers": 2, "block_size": 4, "mask_token_id": 47, "target_layer_ids": [1, 3, 5]}
    return randomise(DFlashDraftModel(DFlashDraftConfig(**settings, rope_parameters=dict(ROPE), **changes)))


def state(drafter):
    return {name: tensor.clone() for name, tensor in drafter.state_dict().items()}


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def write_shards(folder, tensors):
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name].contiguous() for name in held}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def assert_same(loaded, drafter):
    own, other = state(drafter), state(loaded)
    assert own.keys() == other.keys()
    differing = [
        name for name in own if own[name].dtype != other[name].dtype or not torch.equal(own[name], other[name])
    ]
    assert differing == []
    ignored = {"_name_or_path", "architectures", "dtype", "target_model_name_or_path", "transformers_version"}
    mine, theirs = (
        {k: v for k, v in model.config.to_dict().items() if k not in ignored} for model in (drafter, loaded)
    )
    assert theirs == mine


def renamed(tensors, *pairs):
    out = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        out[name] = tensor
    return out


# ---- published layouts ----------------------------------------------------------------------------------------------


FLAT = SHAPE | {"rope_theta": 50000.0, "rope_scaling": None, "num_target_layers": 8}
FLAT_EAGLE3 = FLAT | {"model_type": "llama", "num_hidden_layers": 1, "draft_vocab_size": DV, IDS: [2, 4, 5]}
FLAT_DFLASH = FLAT | {"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 2}
DFLASH_KEYS = {"block_size": 4, "mask_token_id": 47}


def specforge(drafter):
    nested = {IDS: [1, 3, 4], "use_aux_hidden_state": True}
    config = {key: value for key, value in FLAT_EAGLE3.items() if key != IDS} | {"eagle_config": nested}
    return config | {"architectures": ["LlamaForCausalLMEagle3"]}, state(drafter)


def angelslim(drafter):
    config = FLAT_EAGLE3 | {"architectures": ["Eagle3LlamaForCausalLM"]}
    return config, renamed(state(drafter) | {"embed_tokens.weight": torch.zeros(V, H)}, ("", "model."))


def torchspec(drafter):
    tensors = renamed(state(drafter), ("midlayer.", "layers.0."))
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return FLAT_EAGLE3 | {"architectures": ["LlamaForCausalLM"]}, tensors


def speculators(drafter, **own):
    name = "Eagle3DraftModel" if drafter.config.family == "eagle3" else "DFlashDraftModel"
    layer = {key: value for key, value in SHAPE.items() if key != "num_target_layers"}
    layer |= {"rope_theta": 50000.0, "num_hidden_layers": drafter.config.num_hidden_layers}
    return {
        "architectures": [name],
        "speculators_model_type": drafter.config.family,
        "speculators_config": {"verifier": {"name_or_path": "org/target"}},
        "transformer_layer_config": layer | {"model_type": "llama" if name == "Eagle3DraftModel" else "qwen3"},
        "num_target_layers": 8,
        **own,
    }


def speculators_eagle3(drafter):
    own = {"draft_vocab_size": DV, IDS: [2, 4, 5], "norm_before_residual": False}
    tensors = renamed(state(drafter), ("midlayer.", "layers.0.")) | {"embed_tokens.weight": torch.zeros(V, H)}
    return speculators(drafter, **own), tensors | {"verifier_norm.weight": torch.zeros(H)}


def zlab(drafter):
    return FLAT_DFLASH | {
        "block_size": 4,
        "dflash_config": {"mask_token_id": 47, "target_layer_ids": [1, 3, 5]},
    }, state(drafter)


def specforge_dflash(drafter):
    config = FLAT_DFLASH | {"dflash_config": DFLASH_KEYS | {"target_layer_ids": [1, 3, 5], "projector_type": "dflash"}}
    return config, renamed(state(drafter), ("", "model.")) | {"model.embed_tokens.weight": torch.zeros(V, H)}


def aliased_dflash(drafter):
    pairs = (("fc.", "encoder.fc."), ("hidden_norm.", "encoder.output_norm_enc."))
    return FLAT_DFLASH | DFLASH_KEYS | {"target_layer_ids": [1, 3, 5]}, renamed(state(drafter), *pairs)


def speculators_dflash(drafter):
    own = DFLASH_KEYS | {"aux_hidden_state_layer_ids": [2, 4, 6], "draft_vocab_size": V}
    of_target = {"embed_tokens.weight": torch.zeros(V, H), "lm_head.weight": torch.zeros(V, H)}
    return speculators(drafter, **own), state(drafter) | of_target | {"verifier_lm_head.weight": torch.zeros(V, H)}


LAYOUTS = {
    "specforge": (eagle3, specforge),
    "angelslim": (eagle3, angelslim),
    "torchspec": (eagle3, torchspec),
    "speculators_eagle3": (eagle3, speculators_eagle3),
    "zlab": (dflash, zlab),
    "specforge_dflash": (dflash, specforge_dflash),
    "aliased_dflash": (dflash, aliased_dflash),
    "speculators_dflash": (dflash, speculators_dflash),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_gives_tensors_and_config_bit_for_bit(tmp_path, layout):
    build, publish = LAYOUTS[layout]
    drafter = build()
    loaded = type(drafter).from_pretrained(write(tmp_path, *publish(drafter)))
    assert_same(loaded, drafter)
    assert loaded.config.name_or_path == str(tmp_path) and not loaded.training


def test_the_reference_layout_of_eagle3_is_read_with_its_pickle(tmp_path):
    drafter = eagle3()
    config = {key: value for key, value in FLAT_EAGLE3.items() if key not in (IDS, "num_target_layers")}
    write(tmp_path, config | {"architectures": ["LlamaForCausalLM"]}, None)
    torch.save(state(drafter), tmp_path / "pytorch_model.bin")
    loaded = Eagle3DraftModel.from_pretrained(tmp_path, num_target_layers=8, allow_pickle_weights=True)
    assert_same(loaded, drafter)


def test_a_native_dflash_of_transformers_gives_the_same_states(tmp_path):
    shape = {key: value for key, value in SHAPE.items() if key != "num_target_layers"}
    config = MuseGlimmerAssistantConfig(
        **shape,
        **DFLASH_KEYS,
        rope_parameters=dict(ROPE),
        num_hidden_layers=2,
        layer_types=["full_attention"] * 2,
        target_layer_ids=[1, 3, 5],
    )
    native = randomise(MuseGlimmerAssistantModel(config))
    native.save_pretrained(tmp_path)
    loaded = DFlashDraftModel.from_pretrained(tmp_path)
    theirs = renamed(native.state_dict(), ("encoder.fc.", "fc."), ("encoder.output_norm_enc.", "hidden_norm."))
    ours = state(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.config.rms_norm_eps == config.rms_norm_eps == 1e-5
    inputs = {"noise_embeds": torch.randn(1, 4, H), "context_hidden_states": torch.randn(1, 6, 3 * H)}
    with torch.no_grad():
        expected = native(**inputs).last_hidden_state
        torch.testing.assert_close(loaded(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize(
    "build",
    [
        eagle3,
        lambda: eagle3(draft_vocab_size=None, fc_norm=True, norm_output=True, ttt_steps=3),
        lambda: eagle3(norm_before_fc=True, norm_before_residual=True, target_layer_ids=[0, 2], eos_token_id=[2, 3]),
        lambda: eagle3(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}, bos_token_id=1),
        dflash,
        lambda: dflash(target_model_name_or_path="org/target", target_model_revision="main", rms_norm_eps=1e-5),
    ],
)
def test_what_we_save_we_load_bit_for_bit(tmp_path, build):
    drafter = build()
    drafter.save_pretrained(tmp_path)
    loaded = type(drafter).from_pretrained(tmp_path)
    assert_same(loaded, drafter)
    assert loaded.config.target_model_name_or_path == drafter.config.target_model_name_or_path
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saved_files_hold_exactly_the_published_names(tmp_path):
    layer = "self_attn.{q,k,v,o}_proj mlp.{gate,up,down}_proj".split()
    layer = [
        part.split("{")[0] + x + "_proj"
        for part in layer
        for x in part[part.index("{") + 1 : part.index("}")].split(",")
    ]
    norms = ["input_layernorm", "post_attention_layernorm"]
    eagle3().save_pretrained(tmp_path / "e")
    expected = {f"midlayer.{x}.weight" for x in (*layer, *norms, "hidden_norm")}
    expected |= {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    saved = load_file(tmp_path / "e/model.safetensors")
    assert set(saved) == expected
    assert saved["d2t"].dtype == torch.int64 and saved["t2d"].dtype == torch.bool
    eagle3(draft_vocab_size=None, fc_norm=True).save_pretrained(tmp_path / "full")
    expected = expected - {"d2t", "t2d"} | {f"fc_norm.{i}.weight" for i in range(3)}
    assert set(load_file(tmp_path / "full/model.safetensors")) == expected
    dflash().save_pretrained(tmp_path / "d")
    parts = (*layer, *norms, "self_attn.q_norm", "self_attn.k_norm")
    expected = {f"layers.{i}.{x}.weight" for i in range(2) for x in parts}
    expected |= {"fc.weight", "hidden_norm.weight", "norm.weight"}
    assert set(load_file(tmp_path / "d/model.safetensors")) == expected
    for folder in ("e", "full", "d"):
        assert sorted(os.listdir(tmp_path / folder)) == ["config.json", "model.safetensors"]


def test_precision_changes_weights_but_not_rotary_frequencies(tmp_path):
    drafter = eagle3()
    config, tensors = specforge(drafter)
    halved = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    write(tmp_path, config, halved)
    full = Eagle3DraftModel.from_pretrained(tmp_path)
    assert {p.dtype for p in full.parameters()} == {full.config.dtype} == {torch.float32}
    assert torch.equal(full.fc.weight, halved["fc.weight"].float())
    half = Eagle3DraftModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {half.config.dtype} == {torch.bfloat16}
    assert torch.equal(half.fc.weight, halved["fc.weight"]) and torch.equal(half.d2t, drafter.d2t)
    assert torch.equal(half.rotary_emb.inv_freq, drafter.rotary_emb.inv_freq)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_shards_are_read_through_their_index(tmp_path):
    drafter = eagle3()
    config, tensors = specforge(drafter)
    write_shards(write(tmp_path, config, None), tensors)
    assert_same(Eagle3DraftModel.from_pretrained(tmp_path), drafter)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "x.bin", "a\\b.safetensors"]
)
def test_an_index_cannot_name_a_path(tmp_path, shard):
    drafter = eagle3()
    config, tensors = specforge(drafter)
    folder = write(tmp_path / "drafter", config, None)
    index = write_shards(folder, tensors)
    shutil.copy(folder / "model-00002-of-00002.safetensors", tmp_path / "secret.safetensors")
    index["weight_map"] = {
        name: shard if held.startswith("model-00002") else held for name, held in index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a plain safetensors file name"):
        Eagle3DraftModel.from_pretrained(folder)


def test_an_index_that_does_not_match_its_shards_is_refused(tmp_path):
    config, tensors = specforge(eagle3())
    index = write_shards(write(tmp_path, config, None), tensors)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"extra": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"lists \['extra'\], which no shard holds"):
        Eagle3DraftModel.from_pretrained(tmp_path)
    path.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ValueError, match="no `weight_map`"):
        Eagle3DraftModel.from_pretrained(tmp_path)
    path.write_text(json.dumps(index))
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="repeats .*'lm_head.weight'"):
        Eagle3DraftModel.from_pretrained(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="'model-00002-of-00002.safetensors', which is missing"):
        Eagle3DraftModel.from_pretrained(tmp_path)


def test_pickled_weights_are_read_only_when_asked_for(tmp_path):
    drafter = dflash()
    config, tensors = zlab(drafter)
    write(tmp_path, config, None)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pass `allow_pickle_weights=True`"):
        DFlashDraftModel.from_pretrained(tmp_path)
    assert_same(DFlashDraftModel.from_pretrained(tmp_path, allow_pickle_weights=True), drafter)
    # A safetensors file is preferred, so the pickle is not even looked at.
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    write(tmp_path, config, tensors)
    assert_same(DFlashDraftModel.from_pretrained(tmp_path, allow_pickle_weights=True), drafter)


class Malicious:
    def __init__(self, proof: Path):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_malicious_pickle_is_not_executed(tmp_path, protocol):
    config, tensors = zlab(dflash())
    folder, proof = write(tmp_path / "drafter", config, None), tmp_path / "proof"
    content = tensors | {"fc.weight": Malicious(proof)}
    if protocol == "torch":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Malicious(proof)}))
    words = "posix.mkdir" if protocol == "torch" else "cannot be read safely"
    with pytest.raises(ValueError, match=words):
        DFlashDraftModel.from_pretrained(folder, allow_pickle_weights=True)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Malicious(proof)))
    assert proof.exists(), "the pickle would have done nothing anyway"


def test_a_pickle_of_something_else_is_refused(tmp_path):
    config, tensors = zlab(dflash())
    write(tmp_path, config, None)
    torch.save({"state_dict": tensors}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no table of tensors"):
        DFlashDraftModel.from_pretrained(tmp_path, allow_pickle_weights=True)


def test_missing_files_are_named_by_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        DFlashDraftModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.*`subfolder=`"):
        DFlashDraftModel.from_pretrained(tmp_path)
    drafter = dflash()
    config, tensors = zlab(drafter)
    write(tmp_path, config, None)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors, .* nor pytorch_model.bin"):
        DFlashDraftModel.from_pretrained(tmp_path)
    write(tmp_path / "weights", config, tensors)
    assert_same(DFlashDraftModel.from_pretrained(tmp_path, subfolder="weights"), drafter)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json of .* is not valid JSON"):
        DFlashDraftModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no JSON object but a list"):
        DFlashDraftModel.from_pretrained(tmp_path)


def cached_repository(cache, config, tensors, subfolder):
    """Write what the Hub's cache looks like after a download of `user/drafter`."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--user--drafter"
    write(repository / "snapshots" / commit / subfolder, config, tensors)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("subfolder", ["", "transformers"])
@pytest.mark.parametrize("local_files_only", [True, False])  # the tests run offline, which must do the same
def test_a_repository_in_the_cache_is_read_offline(tmp_path, subfolder, local_files_only):
    drafter = dflash()
    cached_repository(tmp_path, *zlab(drafter), subfolder)
    options = {"cache_dir": tmp_path, "subfolder": subfolder, "local_files_only": local_files_only}
    assert_same(DFlashDraftModel.from_pretrained("user/drafter", **options), drafter)
    with pytest.raises(OSError, match="user/other|cannot find|Cannot find"):
        DFlashDraftModel.from_pretrained("user/other", **options)


def test_a_cached_repository_without_weights_says_so(tmp_path):
    cached_repository(tmp_path, zlab(dflash())[0], None, "")
    with pytest.raises(FileNotFoundError, match="'user/drafter' has no weights"):
        DFlashDraftModel.from_pretrained("user/drafter", cache_dir=tmp_path, local_files_only=True)
    source = CheckpointSource("user/drafter", None, "", None, tmp_path, True)
    assert source.find("model.safetensors") is None and source.find("config.json").is_file()


def test_an_unreachable_hub_is_not_taken_for_a_missing_file(tmp_path, monkeypatch):
    cached_repository(tmp_path, *zlab(dflash()), "")
    offline = CheckpointSource("user/drafter", None, "", None, tmp_path, True)
    online = CheckpointSource("user/drafter", None, "", None, tmp_path, False)
    with pytest.raises(FileNotFoundError, match="no folder 'user/other' here, and no model of that name in the cache"):
        CheckpointSource("user/other", None, "", None, tmp_path, True).find("model.safetensors")
    monkeypatch.setattr(importing, "is_offline_mode", lambda: False)
    for error, source, found in (
        (LocalEntryNotFoundError("no connection"), online, LocalEntryNotFoundError),
        (LocalEntryNotFoundError("not in the cache"), offline, None),
        (EntryNotFoundError("404"), online, None),
        (PermissionError("gated"), online, PermissionError),
    ):
        monkeypatch.setattr(importing, "hf_hub_download", Mock(side_effect=error))
        if found is None:
            assert source.find("absent") is None
        else:
            with pytest.raises(found):
                source.find("absent")


# ---- tensors --------------------------------------------------------------------------------------------------------


def refusal(tmp_path, config, tensors, cls=Eagle3DraftModel):
    with pytest.raises(ValueError) as error:
        cls.from_pretrained(write(tmp_path, config, tensors))
    return str(error.value)


def test_every_missing_unexpected_or_misshapen_tensor_is_listed(tmp_path):
    config, tensors = specforge(eagle3())
    del tensors["norm.weight"], tensors["lm_head.weight"]
    tensors |= {
        "fc.weight": torch.zeros(H, 2 * H),
        "midlayer.self_attn.q_norm.weight": torch.zeros(8),
        "fc.bias": torch.zeros(H),
    }
    message = refusal(tmp_path, config, tensors)
    assert message == (
        f"The weights of the drafter {str(tmp_path)!r} do not fit its config: 'lm_head.weight' is missing; "
        "'norm.weight' is missing; 'fc.bias' is unexpected; 'midlayer.self_attn.q_norm.weight' is unexpected; "
        f"'fc.weight' has shape {(H, 2 * H)}, not {(H, 3 * H)}. Check that config.json and the weights belong "
        "together, or save or download both again."
    )


def test_of_many_tensors_that_do_not_fit_the_first_are_listed(tmp_path):
    config, tensors = specforge(eagle3())
    extra = {f"extra.{number}": torch.zeros(1) for number in range(9)}
    message = refusal(tmp_path, config, tensors | extra)
    assert "'extra.4' is unexpected and 4 more. Check" in message and "extra.5" not in message


def test_only_listed_tensors_are_left_out(tmp_path):
    config, tensors = specforge(eagle3())
    # These are dropped in another layout or family only.
    message = refusal(
        tmp_path, config, tensors | {"verifier_norm.weight": torch.zeros(H), "optimizer": torch.zeros(1)}
    )
    assert "'optimizer' is unexpected; 'verifier_norm.weight' is unexpected." in message
    config, tensors = zlab(dflash())
    message = refusal(tmp_path, config, tensors | {"fc_norm.0.weight": torch.zeros(H)}, DFlashDraftModel)
    assert "'fc_norm.0.weight' is unexpected." in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, value):
    config, tensors = specforge(eagle3())
    tensors["midlayer.mlp.up_proj.weight"][3, 2] = value
    assert "'midlayer.mlp.up_proj.weight' holds NaN or infinite" in refusal(tmp_path, config, tensors)


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path):
    config, tensors = specforge(eagle3())
    message = refusal(tmp_path, config, tensors | {"fc.weight": torch.zeros(H, 3 * H, dtype=torch.int8)})
    assert "'fc.weight' has type torch.int8" in message


def test_an_embedding_of_another_shape_is_refused(tmp_path):
    config, tensors = specforge(eagle3())
    message = refusal(tmp_path, config, tensors | {"embed_tokens.weight": torch.zeros(V, 2 * H)})
    assert "'embed_tokens.weight' has shape (48, 32), but the target's would be (48, 16)" in message


def test_a_mask_embedding_of_its_own_is_refused(tmp_path):
    (tmp_path / "mask_embedding.pt").write_bytes(b"")
    assert "has a mask_embedding.pt" in refusal(tmp_path, *zlab(dflash()), DFlashDraftModel)
    config, tensors = specforge(eagle3())
    Eagle3DraftModel.from_pretrained(write(tmp_path, config, tensors))


def test_two_names_for_one_tensor_are_refused(tmp_path):
    config, tensors = specforge(eagle3())
    message = refusal(tmp_path, config, tensors | {"model.fc.weight": torch.zeros(H, 3 * H)})
    assert "'model.fc.weight'" in message and "which are both 'fc.weight'" in message


def test_legacy_feature_norms_get_their_numbers(tmp_path):
    drafter = eagle3(fc_norm=True)
    config, tensors = specforge(drafter)
    legacy = renamed(tensors, *((f"fc_norm.{i}.", f"aux_norm_{x}.") for i, x in enumerate(("low", "mid", "high"))))
    assert "aux_norm_mid.weight" in legacy
    assert_same(Eagle3DraftModel.from_pretrained(write(tmp_path, config | {"fc_norm": True}, legacy)), drafter)


def test_a_missing_t2d_is_derived_from_d2t(tmp_path):
    drafter = eagle3()
    config, tensors = specforge(drafter)
    without = {name: tensor for name, tensor in tensors.items() if name != "t2d"}
    assert_same(Eagle3DraftModel.from_pretrained(write(tmp_path, config, without)), drafter)
    beyond = without | {"d2t": torch.full((DV,), V)}
    assert "maps to token ids 48..67, outside of the target's 0..47" in refusal(tmp_path, config, beyond)
    del without["d2t"]
    assert "'d2t' is missing; 't2d' is missing." in refusal(tmp_path, config, without)


def test_vocabulary_maps_that_disagree_are_refused(tmp_path):
    config, tensors = specforge(eagle3())
    assert "inconsistent" in refusal(tmp_path, config, tensors | {"t2d": torch.arange(V) < DV})
    assert "do not increase strictly" in refusal(tmp_path, config, tensors | {"d2t": -torch.arange(DV)})
    assert "must be a vector of integers" in refusal(tmp_path, config, tensors | {"d2t": torch.zeros(DV)})
    shorter = {"d2t": torch.zeros(4, dtype=torch.long), "t2d": torch.arange(V) < 4}
    assert "'d2t' has shape (4,), not" in refusal(tmp_path, config, tensors | shorter)


def test_identity_maps_of_a_full_vocabulary_are_left_out(tmp_path):
    drafter = eagle3(draft_vocab_size=None)
    config, tensors = specforge(drafter)
    config["draft_vocab_size"] = V
    identity = {"d2t": torch.zeros(V, dtype=torch.long), "t2d": torch.ones(V, dtype=torch.bool)}
    assert_same(Eagle3DraftModel.from_pretrained(write(tmp_path, config, tensors | identity)), drafter)
    identity["d2t"][5] = 1
    assert "'d2t' is not the identity" in refusal(tmp_path, config, tensors | identity)
    assert "'t2d' is not the identity" in refusal(tmp_path, config, tensors | {"t2d": torch.arange(V) < DV})


def test_a_class_refuses_the_other_family(tmp_path):
    with pytest.raises(ValueError, match="holds a dflash drafter .* Eagle3DraftModel reads eagle3 .* `AutoDrafter"):
        Eagle3DraftModel.from_pretrained(write(tmp_path, *zlab(dflash())))
