# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
vLLM's own parser takes our exports with the settings they carry, and the `load_weights` of its model classes, built
without an engine, consume every tensor: each weight of the class is written exactly once, by the value it has in the
file.

Serving is another matter: DSpark, DFlash 2 and windows mixed with full attention are drafted with by vLLM's V2 runner
alone, which its build for the CPU does not have. That runner was not run here.
"""

import json
import re
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from test_export import VARIANTS, export, make_variant

from helpers.tiny import make_target
from helpers.vllm_process import require_vllm


pytestmark = pytest.mark.conformance

# What a class can take from a drafter's file, and takes from the target where the file holds none.
SHARED = re.compile(r"(model\.embed_tokens|lm_head)\.weight|model\.mask_embedding")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    require_vllm()
    target, folder = make_target(), tmp_path_factory.mktemp("target")
    target.causal_lm.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    target.folder = folder
    return target


@pytest.fixture(scope="module")
def engine(target, tmp_path_factory):
    """vLLM's config of the target alone, in a process group of one."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(str(target.folder), dtype="bfloat16", max_model_len=128, enforce_eager=True)
    config = config.create_engine_config()
    place = tmp_path_factory.mktemp("group") / "store"
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=1, rank=0, distributed_init_method=f"file://{place}", local_rank=0, backend="gloo"
        )
        initialize_model_parallel(1, 1)
    return config


def settings_in(folder, **more):
    """Return the settings that an export names for vLLM, with its folder in place of its Hub id."""
    named = json.loads((folder / "speculative_config.json").read_text())["vllm"]["speculative_config"]
    return named | more


def build(engine, settings, monkeypatch):
    """Build vLLM's class for a drafter, every weight marked as not written."""
    from vllm.config import SpeculativeConfig, set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    speculative = SpeculativeConfig(
        **settings, target_model_config=engine.model_config, target_parallel_config=engine.parallel_config
    )
    monkeypatch.setattr(engine, "speculative_config", speculative)
    # The class of mixed layers asks; the runner itself is not needed to build it.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    # Layers are listed by name in the config, once each.
    monkeypatch.setattr(engine.compilation_config, "static_forward_context", {})
    with set_current_vllm_config(engine):
        model = initialize_model(engine, model_config=speculative.draft_model_config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan") if parameter.is_floating_point() else -(2**40))
    return model


def unwritten(model):
    def is_whole(tensor):
        return bool((tensor.isfinite() if tensor.is_floating_point() else tensor != -(2**40)).all())

    return {name for name, tensor in model.named_parameters() if not is_whole(tensor)}


def values_of(tensors):
    """Count the values of tensors, whatever their shapes: rows stacked in another order are the same values."""
    return Counter(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).tolist())


@pytest.mark.parametrize("layout", ["flat", "speculators"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_read_and_every_weight_written_once(tmp_path, target, engine, monkeypatch, variant, layout):
    if layout in VARIANTS[variant][2]:
        pytest.skip(f"there is no {layout} layout of it")
    folder = export(make_variant(variant, target), target, tmp_path / "out", to=layout).folder
    model = build(engine, settings_in(folder, model=str(folder)), monkeypatch)
    tensors = load_file(folder / "model.safetensors")
    model.load_weights(list(tensors.items()))
    # `t2d` is read in training; a copy of the target's embedding counts as one more tensor.
    read = {name: tensor for name, tensor in tensors.items() if name != "t2d"}
    left = unwritten(model)
    assert all(SHARED.fullmatch(name) for name in left), left
    written = {name: tensor for name, tensor in model.named_parameters() if name not in left}
    for name, module in model.named_modules():
        # Rows up to a round number, which stand for no token.
        if f"{name}.weight" in written and hasattr(module, "org_vocab_size"):
            written[f"{name}.weight"] = module.weight[: module.org_vocab_size]
    assert ("lm_head.weight" in written) == ("lm_head.weight" in read)
    own, theirs = values_of(read.values()), values_of(written.values())
    assert (own - theirs).total() == (theirs - own).total() == 0


def test_a_tensor_too_many_and_one_too_few_are_seen(tmp_path, target, engine, monkeypatch):
    folder = export(make_variant("dspark", target), target, tmp_path / "out", to="flat").folder
    tensors = load_file(folder / "model.safetensors")
    missing = tensors.pop("markov_head.markov_w2.weight")
    model = build(engine, settings_in(folder, model=str(folder)), monkeypatch)
    model.load_weights(list(tensors.items()))
    assert "model.markov_head.markov_w2.weight" in unwritten(model)
    again = build(engine, settings_in(folder, model=str(folder)), monkeypatch)
    with pytest.raises(ValueError, match="no module or parameter named"):
        again.load_weights([*tensors.items(), ("markov_head.markov_w3.weight", missing)])


@pytest.mark.parametrize("variant", ["eagle3", "dflash", "dspark", "dflash2"])
def test_drafts_can_be_drawn_with_every_method(tmp_path, target, engine, variant):
    from vllm.config import SpeculativeConfig

    folder = export(make_variant(variant, target), target, tmp_path / "out", to="flat").folder
    for method in ("greedy", "probabilistic"):
        settings = settings_in(folder, model=str(folder), draft_sample_method=method)
        made = SpeculativeConfig(
            **settings, target_model_config=engine.model_config, target_parallel_config=engine.parallel_config
        )
        assert made.draft_sample_method == method


@pytest.mark.parametrize("variant", ["dspark", "dflash2", "dflash-mixed"])
def test_the_runner_of_a_cpu_refuses_what_our_settings_call_for_a_gpu_for(tmp_path, target, engine, variant):
    from vllm.engine.arg_utils import EngineArgs

    folder = export(make_variant(variant, target), target, tmp_path / "out", to="flat").folder
    assert "on a GPU" in json.loads((folder / "speculative_config.json").read_text())["readers"]["vLLM"]
    arguments = EngineArgs(
        str(target.folder),
        dtype="bfloat16",
        max_model_len=128,
        enforce_eager=True,
        speculative_config=settings_in(folder, model=str(folder)),
    )
    with pytest.raises(ValueError, match="(?i)runner"):
        arguments.create_engine_config()
