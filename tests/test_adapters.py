# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Training a LoRA adapter: nothing in training, rollouts, saving and publishing may pass it by, and nothing else may
move.
"""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from test_export import make_variant
from torch import nn

from helpers import rollouts
from helpers.oracle import greedy_text
from helpers.rollouts import Options
from helpers.tiny import EOS, MASK, TINY_RUN, make_prompts, make_target
from trl_draft_opd import (
    AutoDrafter,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
)
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.export.record import read_record
from trl_draft_opd.rollout.acceptance import SamplingSettings
from trl_draft_opd.rollout.blocks import mark_slots, sample_anchors
from trl_draft_opd.trainer import adapters
from trl_draft_opd.trainer.adapters import (
    adapt_drafter,
    check_adapter_launch,
    load_adapter_weights,
    merged_drafter,
    save_drafter,
)
from trl_draft_opd.trainer.step import Objective, PreparedBatch, SlotRules, StreamSettings, step_loss, weight_sums
from trl_draft_opd.trainer.texts import join_responses


VARIANTS = ("dflash", "dspark", "dflash2", "eagle3", "eagle3-reduced")
LINEAR = {"fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# What PEFT's "all-linear" means for a family that has more layers.
MORE_LINEAR = {"dflash2": {"kernel_projection", "hidden_projection"}}
HEAD = {"target_modules": [*LINEAR, "lm_head"]}
# Which layers: all but the head, the head too, and layers trained as a whole, the head among them.
CONFIGS = {
    "dflash": ({}, {"modules_to_save": ["fc", "norm"]}, {"use_dora": True}, {"modules_to_save": ["mlp"]}),
    "dspark": ({}, {"target_modules": [*LINEAR, "markov_w2"]}, {"modules_to_save": ["markov_head"]}),
    "dflash2": ({}, {"modules_to_save": ["candidate_selector", "fc"]}, {"target_modules": ["kernel_projection"]}),
    "eagle3": ({}, HEAD, {"modules_to_save": ["lm_head", "mlp"]}, HEAD | {"use_dora": True, "use_rslora": True}),
    "eagle3-reduced": ({}, HEAD, {"modules_to_save": ["lm_head"]}),
}
RUNS = [
    ("sft", "dflash", False),
    ("opd", "dflash", True),
    ("opd", "dspark", False),
    ("opd", "dflash2", False),
    ("sft", "eagle3", True),
    ("opd", "eagle3", False),
]
CASES = [(variant, options) for variant in VARIANTS for options in CONFIGS[variant]]


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def bases(target, tmp_path_factory):
    """A saved drafter of each variant."""
    folder = tmp_path_factory.mktemp("bases")
    for variant in VARIANTS:
        torch.manual_seed(3)
        drafter = make_variant(variant, target)
        with torch.no_grad():
            for parameter in drafter.parameters():
                # Weights of order one would make the layers deaf to adapters.
                parameter.mul_(0.3)
        drafter.save_pretrained(folder / variant)
    return folder


@pytest.fixture(scope="module")
def text(target):
    """Prompts with the target's greedy responses of 14 tokens."""
    pairs = [(prompt, greedy_text(target, prompt, 14)[len(prompt) :]) for prompt in make_prompts(10, seed=2)]
    pairs = [(prompt, response) for prompt, response in pairs if not {EOS, MASK} & {*prompt, *response}][:4]
    assert len(pairs) == 4
    prompts, responses = zip(*pairs, strict=True)
    return join_responses(prompts, responses, range(4), target.pad_token_id, target.device)


@pytest.fixture(scope="module")
def rows(text):
    starts = text.completion_mask.long().argmax(dim=1).tolist()
    ids = [row[mask.bool()].tolist() for row, mask in zip(text.input_ids, text.attention_mask, strict=True)]
    return Dataset.from_dict(
        {
            "prompt_ids": [row[:start] for row, start in zip(ids, starts, strict=True)],
            "completion_ids": [row[start:] for row, start in zip(ids, starts, strict=True)],
        }
    )


def adapt(folder, *, seed=0, **options):
    """Return a drafter with an adapter whose weights are no constants."""
    adapted = adapt_drafter(AutoDrafter.from_pretrained(folder), LoraConfig(r=3, **options), seed=seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def make_trainer(kind, output_dir, drafter, target, rows, eval_rows=None, peft_config=None, **changes):
    options = {
        "output_dir": str(output_dir),
        **TINY_RUN,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_completion_length": 14,
    }
    if kind == "sft":
        return DraftSFTTrainer(
            drafter, target, DraftSFTConfig(**options | changes), rows, eval_rows, peft_config=peft_config
        )
    options |= {"completions_from_target": True, "rejected_scope": "suffix"}
    return DraftOPDTrainer(
        drafter, target, DraftOPDConfig(**options | changes), rows, eval_rows, peft_config=peft_config
    )


def clones(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def replay(target, drafter, text, **changes):
    return rollouts.replay(
        target, drafter, text, Options(**{"keep_branch_hidden": True, "segment_length": 4} | changes)
    )


def hand_merged(adapted):
    """Return the drafter's weights with every adapter added by hand, `W + s B A`."""
    trained = {name.removeprefix("base_model.model."): p.detach() for name, p in adapted.named_parameters()}
    config = adapted.peft_config["default"]
    merged = {}
    for name, tensor in trained.items():
        if "lora_" in name or "modules_to_save" in name:
            continue
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        stem = plain.removesuffix(".weight")
        if f"{stem}.lora_B.default.weight" in trained:
            product = trained[f"{stem}.lora_B.default.weight"] @ trained[f"{stem}.lora_A.default.weight"]
            tensor = tensor + product * (config.lora_alpha / config.r)
        whole = name.replace(".original_module.", ".modules_to_save.default.")
        merged[plain] = trained[whole] if whole != name else tensor
    return merged


# -- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family", "bf16"), RUNS)
def test_only_the_adapter_moves_in_training(tmp_path, target, bases, rows, kind, family, bf16):
    trainer = make_trainer(
        kind, tmp_path, bases / family, target, rows, rows, LoraConfig(r=2, lora_dropout=0.1), bf16=bf16
    )
    model = trainer.model
    assert isinstance(model, PeftModel)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-4] for name in trained} == LINEAR | MORE_LINEAR.get(family, set())
    assert all("lora_" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    before = clones(model)
    trainer.train()
    after = clones(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    metrics = trainer.evaluate()
    assert metrics["eval_tau"] >= 1
    assert not any("peft" in name.lower() for name in vars(trainer.target))


@pytest.mark.parametrize(("variant", "options"), CASES)
def test_a_fresh_adapter_changes_no_bit_of_what_is_drafted(target, bases, text, variant, options):
    plain = AutoDrafter.from_pretrained(bases / variant)
    adapted = adapt_drafter(AutoDrafter.from_pretrained(bases / variant), LoraConfig(**options), seed=0)
    anchors = torch.tensor([[3, 9]]).expand(4, 2)
    drafts = torch.randint(4, 60, (4, 2, 4))
    features = target.read_text(text.input_ids, text.attention_mask, plain.config.target_layer_ids).padded().features
    outputs = [
        drafter.draft_logits(
            run_blocks(drafter, features, text.input_ids, anchors, drafts, target.embed), target.project
        )
        for drafter in (plain, adapted)
    ]
    # A magnitude of DoRA divides by a norm and multiplies by it again.
    tolerance = 1e-5 if options.get("use_dora") else 0.0
    torch.testing.assert_close(*outputs, rtol=0, atol=tolerance)


def test_the_adapter_is_drawn_from_the_seed_and_moves_no_other_draw(monkeypatch, bases):
    drafters = [AutoDrafter.from_pretrained(bases / "eagle3") for _ in range(3)]
    weights = []
    for drafter, seed in zip(drafters, (1, 1, 2), strict=True):
        monkeypatch.setattr(adapters, "_checked_base", lambda drafter: "org/base")
        torch.manual_seed(7)
        expected = torch.rand(1)
        torch.manual_seed(7)
        weights.append(get_peft_model_state_dict(adapt_drafter(drafter, LoraConfig(), seed=seed)))
        assert torch.equal(torch.rand(1), expected)
    first, second, other = weights
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


class _Loss(nn.Module):
    """A step's loss as a module's forward, so that its drafter's weights can be swapped for tensors with a graph."""

    def __init__(self, drafter, arguments):
        super().__init__()
        self.drafter, self.arguments = drafter, arguments

    def forward(self):
        return step_loss(self.drafter, *self.arguments).loss


@pytest.mark.parametrize("d_pace", [None, 0.5])
@pytest.mark.parametrize(("variant", "options"), [case for case in CASES if not case[1].get("use_dora")])
def test_gradients_are_those_of_merged_weights(target, bases, text, variant, options, d_pace):
    adapted = adapt(bases / variant, **options)
    plain = AutoDrafter.from_pretrained(bases / variant)
    rollout = replay(target, adapted, text)
    anchors = mark_slots(rollout, rejected_scope="suffix", eos_token_ids=[EOS])
    streams = {"accepted": StreamSettings("forward_kl", 1.0, 1.0), "rejected": StreamSettings("reverse_kl", 1.0, 0.8)}
    sums = weight_sums([anchors], streams, plain.draft_token_ids)
    batch, objective = PreparedBatch(text, rollout, anchors, None), Objective(streams, SlotRules(d_pace), 4096, sums)
    arguments = (target, batch, objective)
    loss = step_loss(adapted, *arguments).loss
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    found = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    leaves = {n: p.detach().requires_grad_() for n, p in trained.items()}
    merged = {}
    for name, parameter in plain.named_parameters():
        module, leaf = name.rsplit(".", 1)
        stem = f"base_model.model.{module}"
        whole = next(
            (n for n in leaves if "modules_to_save" in n and _without(n, "modules_to_save.default.") == name), None
        )
        if whole is not None:
            merged[f"drafter.{name}"] = leaves[whole]
        elif f"{stem}.lora_A.default.weight" in leaves:
            product = leaves[f"{stem}.lora_B.default.weight"] @ leaves[f"{stem}.lora_A.default.weight"]
            merged[f"drafter.{name}"] = parameter.detach() + product * (8 / 3)
    expected_loss = torch.func.functional_call(_Loss(plain, arguments), merged, ())
    torch.testing.assert_close(loss, expected_loss)
    expected = torch.autograd.grad(expected_loss, list(leaves.values()))
    for (name, gradient), wanted in zip(found.items(), expected, strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _without(name, part):
    return name.removeprefix("base_model.model.").replace(part, "")


# -- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_sampling", ["greedy", "sample"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_replays_draft_with_the_adapter_and_without_its_dropout(target, bases, text, variant, draft_sampling):
    heads = {"dflash": {}, "dflash2": {}, "dspark": CONFIGS["dspark"][1]}.get(variant, HEAD)
    adapted = adapt(bases / variant, lora_dropout=0.6, **heads).train()
    distribution = {"draft_sampling": draft_sampling}
    if draft_sampling == "sample":
        distribution["sampling"] = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0)
    own, merged, plain = (
        replay(target, drafter, text, **distribution)
        for drafter in (adapted, merged_drafter(adapted), AutoDrafter.from_pretrained(bases / variant))
    )
    assert adapted.training
    assert torch.equal(own.anchors, merged.anchors) and torch.equal(own.drafts, merged.drafts)
    assert torch.equal(own.accepted, merged.accepted)
    assert own.drafts.shape != plain.drafts.shape or not torch.equal(own.drafts, plain.drafts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_adapters_dropout_reaches_the_loss_in_training_alone(target, bases, text, variant):
    options = {"target_modules": ["lm_head"] if "eagle3" in variant else ["fc"]}
    adapted = adapt(bases / variant, lora_dropout=0.5, **options)
    anchors = sample_anchors(
        text.input_ids, text.completion_mask, [0, 1, 2, 3], num_anchors=3, num_drafts=4, seed=0, epoch=0
    )
    streams = {"accepted": StreamSettings("forward_kl", 1.0, 1.0)}
    objective = Objective(streams, SlotRules(), 2**20, torch.ones(3))
    arguments = (target, PreparedBatch(text, None, anchors, None), objective)
    losses = {}
    for mode in (True, False):
        adapted.train(mode)
        losses[mode] = [step_loss(adapted, *arguments).loss.item() for _ in range(2)]
    assert losses[True][0] != losses[True][1] and losses[False][0] == losses[False][1]


# -- saving, loading, publishing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_adapter_loads_as_the_drafter_with_it_merged_in(tmp_path, target, bases, rows, variant):
    config = LoraConfig(r=2, lora_alpha=3, modules_to_save=["norm"])
    trainer = make_trainer(
        "opd", tmp_path, str(bases / variant), target, rows, peft_config=config, hub_target_id="org/target"
    )
    trainer.train()
    trainer.save_model()
    assert config.target_modules is None and config.base_model_name_or_path is None
    assert {path.name for path in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "training_record.json",
        "README.md",
    }
    assert not (tmp_path / "model.safetensors").exists()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(bases / variant) and saved["inference_mode"]
    assert "holds a LoRA adapter" in (tmp_path / "README.md").read_text()
    (stage,) = read_record(tmp_path).stages
    assert (stage.settings["lora_r"], stage.settings["lora_alpha"]) == (2, 3)
    wanted = hand_merged(trainer.model)
    loaded = AutoDrafter.from_pretrained(tmp_path)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    own = clones(loaded)
    assert own.keys() == wanted.keys() and all(torch.equal(own[name], wanted[name]) for name in own)
    assert any(not torch.equal(own[n], p) for n, p in AutoDrafter.from_pretrained(bases / variant).named_parameters())
    half = AutoDrafter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, wanted[name].bfloat16()) for name, tensor in clones(half).items())


def test_training_goes_on_from_an_adapters_folder_and_its_record(tmp_path, target, bases, rows):
    first = make_trainer("opd", tmp_path / "first", bases / "eagle3", target, rows, peft_config=LoraConfig(r=1))
    first.train()
    first.save_model()
    again = make_trainer("sft", tmp_path / "more", tmp_path / "first", target, rows, peft_config=LoraConfig(r=1))
    again.train()
    again.save_model()
    assert [stage.method for stage in read_record(tmp_path / "more").stages] == ["opd", "sft"]
    own, wanted = clones(AutoDrafter.from_pretrained(tmp_path / "more")), hand_merged(again.model)
    assert all(torch.equal(own[name], wanted[name]) for name in own)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_is_the_merged_drafter_and_training_goes_on(tmp_path, target, bases, rows, variant):
    trainer = make_trainer(
        "sft", tmp_path, bases / variant, target, rows, peft_config=LoraConfig(), hub_target_id="org/target"
    )
    trainer.train()
    before = clones(trainer.model)
    folder = trainer.export()
    wanted, stored = hand_merged(trainer.model), load_file(folder / "model.safetensors")
    names = set(stored) - {"embed_tokens.weight", "d2t", "t2d"}
    assert names == set(wanted) and all(torch.equal(stored[name], wanted[name].bfloat16()) for name in names)
    assert "LoRA adapter" not in (folder / "README.md").read_text()
    after = clones(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_best_adapter_is_loaded_at_the_end(tmp_path, target, bases, rows):
    trainer = make_trainer(
        "sft",
        tmp_path,
        bases / "eagle3",
        target,
        rows,
        rows,
        LoraConfig(),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    stored, own = load_file(f"{best}/adapter_model.safetensors"), get_peft_model_state_dict(trainer.model)
    assert stored.keys() == own.keys() and all(torch.equal(stored[name], own[name]) for name in own)


def test_the_weights_of_an_adapter_are_loaded_or_refused_as_a_whole(tmp_path, bases):
    trained = adapt(bases / "eagle3", modules_to_save=["norm"])
    save_drafter(trained, tmp_path)
    fresh = adapt_drafter(
        AutoDrafter.from_pretrained(bases / "eagle3"), LoraConfig(r=3, modules_to_save=["norm"]), seed=9
    )
    load_adapter_weights(fresh, tmp_path)
    first, second = clones(trained), clones(fresh)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = adapt_drafter(AutoDrafter.from_pretrained(bases / "eagle3"), LoraConfig(r=2), seed=9)
    with pytest.raises(ValueError, match="has another `peft_config` than this run"):
        load_adapter_weights(other, tmp_path)
    with pytest.raises(FileNotFoundError, match="trained without `peft_config`"):
        load_adapter_weights(fresh, bases)


def test_an_adapter_whose_drafter_is_gone_says_how_to_give_it(tmp_path, bases):
    adapted = adapt(bases / "dflash")
    adapted.peft_config["default"].base_model_name_or_path = "../not-here"
    save_drafter(adapted, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"trained on '\.\./not-here'.*Give its drafter as `base`"):
        AutoDrafter.from_pretrained(tmp_path)
    own, wanted = clones(AutoDrafter.from_pretrained(tmp_path, base=bases / "dflash")), hand_merged(adapted)
    assert all(torch.equal(own[name], wanted[name]) for name in own)
    with pytest.raises(ValueError, match="is a whole drafter, so `base` means nothing"):
        AutoDrafter.from_pretrained(bases / "dflash", base=tmp_path)
    AutoDrafter.from_pretrained(bases / "dflash").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter .* and a whole model"):
        AutoDrafter.from_pretrained(tmp_path, base=bases / "dflash")


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "prompt learning": (PrefixTuningConfig(num_virtual_tokens=2), "is a PrefixTuningConfig"),
    "another method": (IA3Config(), "takes `peft.LoraConfig` only"),
    "a task": (LoraConfig(task_type="CAUSAL_LM"), "leave `task_type` out"),
    "rewritten weights": (LoraConfig(init_lora_weights="pissa"), "'pissa' rewrites the drafter's own weights"),
    "replication": (LoraConfig(layer_replication=[(0, 1)]), r"sets \['layer_replication'\]"),
    "a layer it lacks": (
        LoraConfig(target_modules=["fc", "lm_head"]),
        r"names \['lm_head'\].*dflash drafter does not",
    ),
    "a whole layer it lacks": (LoraConfig(modules_to_save=["embed_tokens"]), r"`modules_to_save` names \['embed_to"),
    "nothing to train": (LoraConfig(inference_mode=True), "nothing would be trained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_a_drafter_cannot_take_are_refused(bases, case):
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        adapt_drafter(AutoDrafter.from_pretrained(bases / "dflash"), config, seed=0)


def test_a_drafter_that_lies_nowhere_as_it_is_must_be_saved_first(target, bases):
    with pytest.raises(ValueError, match="was never saved. Save it with"):
        adapt_drafter(make_variant("eagle3", target), LoraConfig(), seed=0)
    trained = AutoDrafter.from_pretrained(bases / "eagle3")
    with torch.no_grad():
        trained.norm.weight[0] += 1
    with pytest.raises(ValueError, match="trained since it was loaded from"):
        adapt_drafter(trained, LoraConfig(), seed=0)
    half = AutoDrafter.from_pretrained(bases / "eagle3", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="drafter is in torch.bfloat16"):
        adapt_drafter(copy.deepcopy(half), LoraConfig(modules_to_save=["norm"]), seed=0)
    adapted = adapt_drafter(half, LoraConfig(), seed=0)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_a_model_that_has_an_adapter_already_is_refused(tmp_path, target, bases, rows):
    with pytest.raises(ValueError, match="is a PeftModel with an adapter in it already"):
        make_trainer("sft", tmp_path, adapt(bases / "dflash"), target, rows)
    # What transformers' own `add_adapter` leaves behind, which asks for a newer PEFT than some that work.
    drafter = inject_adapter_in_model(LoraConfig(target_modules=["fc"]), AutoDrafter.from_pretrained(bases / "dflash"))
    drafter.peft_config = {"default": LoraConfig(target_modules=["fc"])}
    with pytest.raises(ValueError, match="is a DFlashDraftModel with an adapter in it already"):
        make_trainer("opd", tmp_path, drafter, target, rows)


def test_without_peft_the_error_names_what_to_install(monkeypatch, bases):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install trl-draft-opd\[peft\]"):
        adapt_drafter(AutoDrafter.from_pretrained(bases / "dflash"), SimpleNamespace(), seed=0)


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_sharding_an_adapted_drafter_is_refused(bases, kind):
    plugin = SimpleNamespace(zero_stage=3) if kind == "zero3" else None
    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin),
        distributed_type=DistributedType.FSDP if kind == "fsdp" else DistributedType.DEEPSPEED,
    )
    plain = AutoDrafter.from_pretrained(bases / "dflash")
    check_adapter_launch(plain, accelerator)
    with pytest.raises(ValueError, match=r"`peft_config` under FSDP or ZeRO-3 is not supported.*ZeRO-2"):
        check_adapter_launch(adapt_drafter(plain, LoraConfig(), seed=0), accelerator)
