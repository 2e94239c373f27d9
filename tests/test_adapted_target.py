# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A target that is a LoRA adapter is the model that it would be merged and saved, in every place that takes a target; and
nothing that is published names what no server can load.
"""

import json
import shlex
import shutil
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.tiny import TINY_RUN, make_causal_lm, make_drafter, make_prompts, make_tokenizer
from trl_draft_opd import (
    DFlashDraftModel,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    FrozenTarget,
)
from trl_draft_opd.cli import main
from trl_draft_opd.export import read_target
from trl_draft_opd.export.record import read_record
from trl_draft_opd.parity import verify_drafter
from trl_draft_opd.responses.origin import Origin, hash_config
from trl_draft_opd.rollout.acceptance import SamplingSettings
from trl_draft_opd.trainer.hub_names import target_id


LAYERS = ["q_proj", "v_proj", "up_proj"]
WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}
# Kind of the base, options of the adapter, and rows of the embedding where tokens were added or taken off.
VARIANTS = {
    "plain": ("llama", {}, None),
    "tied": ("qwen3", {}, None),
    "by an expression": ("llama", {"target_modules": r".*layers\.[0-3]\..*\.(q|v)_proj"}, None),
    "all linear layers": ("llama", {"target_modules": "all-linear"}, None),
    "some excluded": ("llama", {"exclude_modules": r".*layers\.0\..*"}, None),
    "some layers": ("llama", {"layers_to_transform": [1, 2], "layers_pattern": "layers"}, None),
    "ranks by layer": (
        "llama",
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"^model.layers.2.self_attn.q_proj": 3}},
        None,
    ),
    "dora": ("llama", {"use_dora": True, "use_rslora": True}, None),
    "head": ("llama", {"target_modules": [*LAYERS, "lm_head"]}, None),
    "embedding": ("llama", {"target_modules": [*LAYERS, "embed_tokens"]}, None),
    "whole layers": ("llama", WHOLE, None),
    "whole head of two tied": ("qwen3", {"modules_to_save": ["lm_head"]}, None),
    "both of two tied": ("qwen3", WHOLE, None),
    "rows of tokens": ("qwen3", {"trainable_token_indices": [60, 61]}, None),
    "new tokens": ("llama", {}, 70),
    "new tokens, tied": ("qwen3", {}, 70),
    "new tokens, trained whole": ("llama", WHOLE, 70),
    "new tokens, their rows alone": ("qwen3", {"trainable_token_indices": [60, 66]}, 70),
    "fewer rows": ("llama", {}, 62),
    "experts": ("moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}, None),
}


def make_base(folder, kind="llama", dtype=torch.float32):
    make_causal_lm(kind).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_adapter(folder, base, *, rows=None, task_type="CAUSAL_LM", **options):
    """Train, as it were, an adapter by PEFT itself, and save it; return the `PeftModel`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": LAYERS, "task_type": task_type} | options))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.eval().save_pretrained(folder)
    return adapted


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base in bfloat16, an adapter of it, and what PEFT's own merge of both saves."""
    folder = tmp_path_factory.mktemp("adapted")
    base = make_base(folder / "base", dtype=torch.bfloat16)
    make_adapter(folder / "adapter", base)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder / "adapter"))
    merged.merge_and_unload().save_pretrained(folder / "merged")
    make_tokenizer().save_pretrained(folder / "merged")
    return folder


ROWS = Dataset.from_list([{"prompt": f"w{i} w9", "completion": "w20 w21 w22"} for i in range(8, 12)])


# -- its weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_model_writes_what_the_adapted_one_writes(tmp_path, variant):
    kind, options, rows = VARIANTS[variant]
    adapted = make_adapter(tmp_path / "adapter", make_base(tmp_path / "base", kind), rows=rows, **options)
    ids = torch.tensor([[7, 9, 60, 61, 66 if rows == 70 else 12]])
    with torch.no_grad():
        wanted = adapted(ids).logits
        loaded, wrapped = FrozenTarget.load(tmp_path / "adapter"), FrozenTarget.load(adapted)
        for target in (loaded, wrapped):
            assert torch.allclose(target.causal_lm(ids).logits, wanted, atol=1e-4) and target.is_merged
            assert target.vocab_size == (rows or 64)
        # What was given as an instance is as it was, adapter and all.
        assert isinstance(adapted, PeftModel) and torch.equal(adapted(ids).logits, wanted)
        # Saved, as it has to be for a server, it is the same model.
        loaded.causal_lm.save_pretrained(tmp_path / "saved")
        again = FrozenTarget.load(tmp_path / "saved", tokenizer=make_tokenizer())
        assert torch.equal(again.causal_lm(ids).logits, loaded.causal_lm(ids).logits) and not again.is_merged


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_a_target_is_what_its_merged_folder_is_to_the_last_bit(place, dtype):
    adapted, merged = (FrozenTarget.load(place / name, dtype=dtype) for name in ("adapter", "merged"))
    weights = merged.causal_lm.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapted.causal_lm.state_dict().items())
    assert adapted.causal_lm.dtype == merged.causal_lm.dtype
    assert adapted.weights_fingerprint == merged.weights_fingerprint
    assert adapted.weights_fingerprint != FrozenTarget.load(place / "base").weights_fingerprint
    assert hash_config(adapted.config) == hash_config(merged.config)
    settings = {"sampling": SamplingSettings(temperature=0.0, top_k=0, top_p=1.0), "max_completion_length": 8}
    assert Origin.of(adapted, **settings) == Origin.of(merged, **settings)
    # What it is called is the adapter, not the base.
    assert Origin.of(adapted, **settings).target == str(place / "adapter")


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_in_one_of_two_tied_layers_is_refused(tmp_path, layer):
    base = make_base(tmp_path / "base", "qwen3")
    adapted = make_adapter(tmp_path / "adapter", base, target_modules=[*LAYERS, layer])
    for target in (tmp_path / "adapter", adapted):
        with pytest.raises(ValueError, match=rf"changes '(model\.)?{layer}', whose weight the model shares"):
            FrozenTarget.load(target)


def test_new_tokens_whose_embedding_was_not_saved_are_refused(tmp_path):
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, rows=70, target_modules=[*LAYERS, "lm_head"])
    with pytest.raises(ValueError, match=r"lora_B.weight' has shape \(70, 4\), not \(64, 4\)\. Check that the base"):
        FrozenTarget.load(tmp_path / "adapter")


def test_the_tokenizer_beside_an_adapter_goes_before_its_bases(place, tmp_path):
    assert FrozenTarget.load(place / "adapter").tokenizer.get_vocab() == make_tokenizer().get_vocab()
    make_adapter(tmp_path, place / "base", rows=65)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens("<new>")
    tokenizer.save_pretrained(tmp_path)
    target = FrozenTarget.load(tmp_path)
    assert target.tokenizer.convert_tokens_to_ids("<new>") == 64 < target.vocab_size == 65


def test_an_adapter_on_an_adapter_is_merged_after_it(place, tmp_path):
    first = FrozenTarget.load(place / "adapter", dtype="float32")
    second = make_adapter(tmp_path, place / "merged", target_modules=["k_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = str(place / "adapter")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    both = FrozenTarget.load(tmp_path)
    assert torch.equal(
        both.causal_lm.get_parameter("model.layers.0.self_attn.k_proj.weight"),
        second.merge_and_unload().get_parameter("model.layers.0.self_attn.k_proj.weight"),
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(both.causal_lm.get_parameter(name).float(), first.causal_lm.get_parameter(name))


# -- every place that takes a target ----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_instance", [False, True])
@pytest.mark.parametrize(
    ("trainer", "config"), [(DraftSFTTrainer, DraftSFTConfig), (DraftOPDTrainer, DraftOPDConfig)], ids=["sft", "opd"]
)
def test_training_on_an_adapter_is_training_on_its_merged_folder(place, tmp_path, trainer, config, as_instance):
    adapter = place / "adapter"
    if as_instance:
        adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), adapter)
    weights = []
    for name, target in {"adapter": adapter, "merged": place / "merged"}.items():
        drafter = DFlashDraftModel.from_target(
            place / "base", mask_token_id=3, num_hidden_layers=1, block_size=3, target_layer_ids=[1, 3]
        )
        with torch.no_grad():
            for index, parameter in enumerate(drafter.parameters()):
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter) + 0.01 * index)
        options = TINY_RUN | {"max_steps": 2, "max_completion_length": 6, "learning_rate": 1e-2}
        run = trainer(
            drafter, target, config(str(tmp_path / name), **options), ROWS, processing_class=make_tokenizer()
        )
        run.train()
        run.save_model()
        weights.append(run.drafter.state_dict())
        stated = json.loads((tmp_path / name / "config.json").read_text("utf-8"))["target_model_name_or_path"]
        # The checkpoint names what it was trained on: never the base, and of an instance nothing.
        assert stated == (None if as_instance and name == "adapter" else str(place / name))
        assert read_record(tmp_path / name).target.name is None
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_every_command_takes_an_adapter(place, tmp_path, capsys):
    adapter, rows = str(place / "adapter"), tmp_path / "rows.jsonl"
    ROWS.to_json(rows)
    fresh = ["--family", "dflash", "--mask-token-id", "3", "--num-hidden-layers", "1", "--block-size", "3"]
    assert main(["init", "--target", adapter, "--output", str(tmp_path / "fresh"), "--seed", "0", *fresh]) == 0
    on = ["--target", adapter, "--dataset", str(rows)]
    assert main(["generate", *on, "--output", str(tmp_path / "responses"), "--max-completion-length", "4"]) == 0
    run = ["--output-dir", str(tmp_path / "run"), "--use-cpu", "--max-steps", "1", "--report-to", "none"]
    assert main(["sft", *on, *run, "--drafter", str(tmp_path / "fresh")]) == 0
    measured = ["--target-dtype", "float32", "--max-completion-length", "4"]
    assert main(["evaluate", *on, "--drafter", str(tmp_path / "run"), *measured]) == 0
    # A server needs a whole model, so that the export does too.
    exported = ["--drafter", str(tmp_path / "run"), "--output", str(tmp_path / "export")]
    assert main(["export", *exported]) == 2
    error = capsys.readouterr().err
    assert f"The target {adapter!r} is a PEFT adapter, which no server loads as a model. Merge it" in error
    assert not (tmp_path / "export").exists()
    whole = ["--target", str(place / "merged"), "--target-id", "org/merged"]
    assert main(["export", *exported, *whole]) == 0
    verified = ["verify", "--drafter", str(tmp_path / "export"), "--dataset", str(rows), "--num-prompts", "2"]
    capsys.readouterr()
    assert main([*verified, "--target", adapter, "--max-completion-length", "4"]) == 0
    assert "not run  rule C12: the target's files are not known" in " ".join(capsys.readouterr().out.split("\n"))


def test_verify_compares_with_the_merged_model(place, tmp_path):
    target = FrozenTarget.load(place / "adapter", dtype="float32")
    drafter = make_drafter("dflash", target)
    drafter.save_pretrained(tmp_path)
    report = verify_drafter(
        tmp_path, target, make_prompts(2), max_completion_length=4, target_name=str(place / "adapter")
    )
    # Engines would load the folder of the adapter, so that they are given none.
    assert report.ok and report.num_prompts == 2


# -- what is published ------------------------------------------------------------------------------------------------


def test_a_published_drafter_never_names_an_adapter_as_its_target(place, tmp_path):
    target = FrozenTarget.load(place / "adapter")
    target.config.name_or_path = "org/adapter"
    args = DraftSFTConfig(str(tmp_path), **TINY_RUN)
    assert target_id(args, target) is None
    trainer = DraftSFTTrainer(make_drafter("dflash", target), target, args, ROWS)
    with pytest.raises(ValueError, match=r'this one is an adapter.*Merge it.*"org/adapter".*`hub_target_id`'):
        trainer.export(tmp_path / "export")
    trainer.args.hub_target_id = "org/merged"
    folder = trainer.export(tmp_path / "export")
    assert json.loads((folder / "speculative_config.json").read_text("utf-8"))["target"] == "org/merged"
    assert "org/adapter" not in "".join(path.read_text("utf-8") for path in folder.glob("*.[jm][sd]*"))


def test_a_push_of_a_drafter_for_an_adapter_is_refused_before_training(place, tmp_path):
    args = DraftSFTConfig(str(tmp_path), **TINY_RUN, push_to_hub=True, hub_model_id="org/drafter-DFlash")
    target = FrozenTarget.load(place / "adapter")
    with pytest.raises(ValueError, match=r"this one is an adapter, which no server loads"):
        DraftSFTTrainer(make_drafter("dflash", target), target, args, ROWS)


def test_the_line_that_merges_an_adapter_does_so(place, tmp_path, monkeypatch):
    # A name in which a shell would find something to run.
    adapter = shutil.copytree(place / "adapter", tmp_path / 'my "own" $(exit 3)\'s')
    with pytest.raises(ValueError, match="Merge it, `python -c") as refusal:
        read_target(adapter)
    *_, code = shlex.split(str(refusal.value).split("Merge it, `")[1].split("`, and give")[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "line", "exec"), {})
    merged = FrozenTarget.load("MERGED")
    assert merged.weights_fingerprint == FrozenTarget.load(place / "merged").weights_fingerprint
    assert merged.tokenizer.get_vocab() == make_tokenizer().get_vocab()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_without_peft_an_adapter_is_refused_with_the_line_that_merges_it(place, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"is a PEFT adapter. Merge it where.*python -c.*pip install"):
        FrozenTarget.load(place / "adapter")
    flags = ["--target", str(place / "adapter"), "--family", "eagle3", "--output", str(tmp_path / "fresh")]
    assert main(["init", *flags]) == 2
    assert capsys.readouterr().err.startswith("trl-draft-opd init: The target ")


def test_a_quantised_base_is_refused_because_merging_would_round(place):
    quantised = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    with pytest.raises(ValueError, match="merging it into quantised weights would round it. Merge it first"):
        FrozenTarget.load(place / "adapter", init_kwargs=quantised)


def test_a_plain_model_with_an_adapter_in_its_layers_is_refused(place):
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / "adapter")
    with pytest.raises(ValueError, match="has an adapter in its layers .*Give the `PeftModel` itself"):
        FrozenTarget(adapted.get_base_model())


def test_prompt_learning_is_refused(place):
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    adapted = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="cannot be merged into one transformers model. Give a whole model"):
        FrozenTarget.load(adapted, tokenizer=make_tokenizer())


def test_an_adapter_whose_base_is_gone_says_where_to_write_another(place, tmp_path):
    make_adapter(tmp_path, place / "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    for base, reason in {"../gone": "There is no folder", "org/gone": "no model of that name in the cache"}.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(FileNotFoundError, match=f"was trained on '{base}'.*{reason}.*Write where the base is"):
            FrozenTarget.load(tmp_path)
