# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What `plan` says is what docs/do/scaling.md and the roofline say of the same shapes, and what training takes that runs.
Its commands are ones that the program takes.
"""

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3NextConfig

from benchmarks import scaling
from benchmarks.planned import measured_peak, plan_of
from benchmarks.scaling import FAMILIES
from trl_draft_opd import DraftOPDConfig, DraftSFTConfig
from trl_draft_opd.cli import main
from trl_draft_opd.cli.arguments import parse
from trl_draft_opd.cli.decoding import GenerateArguments
from trl_draft_opd.cli.plan import PlanArguments, make_plan
from trl_draft_opd.cli.reading import ReadArguments
from trl_draft_opd.cli.training import OPDArguments, SFTArguments
from trl_draft_opd.costs import planning
from trl_draft_opd.costs.counted import NOW
from trl_draft_opd.costs.gpus import GPUS
from trl_draft_opd.costs.jobs import JOBS
from trl_draft_opd.costs.memory import LAUNCHES, launch_bytes
from trl_draft_opd.costs.roofline import predict
from trl_draft_opd.costs.shapes import KNOWN_ARCHITECTURES, TARGETS, TargetShape


PARSED = {
    "generate": [GenerateArguments],
    "read": [ReadArguments],
    "sft": [SFTArguments, DraftSFTConfig],
    "opd": [OPDArguments, DraftOPDConfig],
}
# The workload of the page's tables.
PAGE = {"max_prompt_length": 512, "max_completion_length": 1536, "per_device_train_batch_size": 2}


@pytest.fixture
def folder_of(tmp_path):
    def save(name):
        scaling.make_target(name, "meta", torch.bfloat16).config.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def parsed(command):
    """Read a command of a plan as the program would; what launches it is passed over."""
    words = shlex.split(command)
    name = next(word for word in words if word in PARSED)
    return name, parse(name, PARSED[name], words[words.index(name) + 1 :])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b", "llama3-70b"])
def test_memory_is_that_of_the_page_for_its_shapes(folder_of, name, family):
    tau = 3 if family == "eagle3" else 5
    plan = make_plan(PlanArguments(target=folder_of(name), gpu="400", family=family, tau=tau, **PAGE))
    expected = scaling.stages_of(name, family)
    assert plan.fits["opd"].stages == expected
    assert plan.fits["opd"].peak == launch_bytes(expected, LAUNCHES[0], 1)
    assert [plan.run.target, plan.run.drafter] == list(scaling.pair_of(name, family))


@pytest.mark.parametrize("job", [job for job in JOBS if job.num_anchors in (None, 64)], ids=lambda job: job.name)
def test_time_is_that_of_the_roofline_for_its_jobs(folder_of, job):
    options = {"draft_vocab_size": 0} if job.draft_vocab is None else {}
    sizes = PAGE | {"per_device_train_batch_size": job.rows, "num_prompts": 400}
    target = folder_of("qwen3-8b")
    plan = make_plan(PlanArguments(target=target, gpu="400", family=job.family, **sizes, **options))
    machine, stage = planning.Machine.of("h100"), "sft" if job.tau is None else "opd"
    found = planning.training_seconds(plan.run, stage, plan.fits[stage], machine, delivered=False)
    drafter = scaling.shape_of(job.family, TARGETS["qwen3-8b"], job.draft_vocab)
    expected = predict(job, TARGETS["qwen3-8b"], drafter, GPUS["h100"], NOW)
    # 400 texts by four, three passes of SFT and one of Draft-OPD.
    assert found == pytest.approx({"sft": 300, "opd": 100}[stage] * expected.total)


def test_readings_take_on_disk_what_the_page_says_of_a_token(folder_of):
    plan = make_plan(PlanArguments(target=folder_of("qwen3-8b"), gpu="80", family="eagle3", num_prompts=1000, **PAGE))
    assert plan.run.readings_bytes == 1000 * 2048 * 32_768


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_the_shared_target_takes_what_is_planned_within_15_percent(shared_dir, family):
    folder = str(shared_dir / "targets" / "gsm8k-qwen3-7m")
    plan = plan_of(folder, family, prompt=128, response=384)
    for stage in ("sft", "opd"):
        measured = measured_peak(folder, plan, stage)
        assert plan.fits[stage].peak == pytest.approx(measured, rel=0.15), (stage, plan.fits[stage].peak, measured)


@pytest.mark.parametrize("architecture", KNOWN_ARCHITECTURES)
def test_the_weights_of_known_architectures_are_counted_within_1_percent(architecture):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 1000, "num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(architecture, **sizes, moe_intermediate_size=128, head_dim=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = TargetShape.of_known(config).parameters
    assert counted == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


def test_a_target_that_is_not_there_is_refused_by_its_name(tmp_path, capsys):
    assert main(["plan", "--target", str(tmp_path / "none")]) == 2
    assert f"There is no folder '{tmp_path / 'none'}'" in capsys.readouterr().err


def test_an_unknown_architecture_is_refused_by_name_with_those_that_are_known(tmp_path, capsys):
    Qwen3NextConfig().save_pretrained(tmp_path)
    assert main(["plan", "--target", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "'qwen3_next'" in error and all(known in error for known in KNOWN_ARCHITECTURES)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gpu": "80", "family": "dflash"}, ["generate", "sft", "opd"]),
        ({"gpu": "80", "readings": True, "thinking": False}, ["generate", "read", "sft", "opd"]),
        ({"gpu": "24", "family": "eagle3", "draft_vocab_size": 16_000}, ["generate", "read", "sft", "opd"]),
        ({"gpu": "h100", "gpus": 8, "family": "dspark"}, ["generate", "sft", "opd"]),
        ({"gpu": "cpu", "thinking": True, "family": "eagle3"}, ["generate", "sft", "opd"]),
    ],
    ids=["in process", "readings", "small card", "eight cards", "cpu"],
)
def test_every_command_is_one_that_the_program_takes_with_the_sizes_that_were_planned(folder_of, options, expected):
    plan = make_plan(PlanArguments(target=folder_of("qwen3-8b"), **options))
    names = []
    for name, settings in map(parsed, plan.commands):
        names.append(name)
        if name in plan.fits:
            fits, config = plan.fits[name], settings[-1]
            assert config.max_prompt_length + config.max_completion_length == plan.run.length
            assert config.per_device_train_batch_size == fits.rows
            assert config.gradient_accumulation_steps == fits.accumulation
            assert bool(config.activation_checkpointing) is fits.checkpointing
            assert (config.readings is not None) is ("read" in expected)
    assert names == expected


def test_what_fits_is_planned_and_what_does_not_is_refused_with_sizes(folder_of):
    target = folder_of("llama3-70b")
    for gpus, launch in ((1, planning.DELIVERED), (8, "FSDP2, target sharded")):
        plan = make_plan(PlanArguments(target=target, gpu="80", gpus=gpus))
        assert plan.launch == launch
        assert all(fits.peak <= 0.9 * 80 * 2**30 for fits in plan.fits.values())
    # The recommended family is larger, and the card too small for it.
    assert make_plan(PlanArguments(target=target, gpu="80")).run.drafter.family == "eagle3"
    with pytest.raises(ValueError, match=r"Nothing fits: .* of a card of 24\.0 GiB"):
        make_plan(PlanArguments(target=target, gpu="24"))


@pytest.mark.parametrize(("name", "slowest"), [("80", "a100"), ("48", "l40s"), ("24", "4090"), ("40", None)])
def test_gigabytes_stand_for_the_slowest_card_that_is_sold_with_as_many(name, slowest):
    machine = planning.Machine.of(name)
    assert machine.memory == int(name) * 2**30
    assert machine.gpu == (None if slowest is None else GPUS[slowest])


@pytest.mark.parametrize("name", ["h1000", "-5", "0", "80gb", "3090"])
def test_a_card_that_is_not_known_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match="Give one of 4090, a100"):
        planning.Machine.of(name)


def test_every_line_says_what_it_rests_on_in_text_and_in_json(folder_of, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main(["plan", "--target", folder_of("qwen3-8b"), "--gpu", "80", "--json", str(path)]) == 0
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    for line in written["lines"]:
        assert line["basis"].startswith(("computed", "rule of thumb", "given", "as published")), line
        assert line["value"] in printed and line["basis"] in printed
    assert {"memory, sft", "memory, opd", "disk, readings", "disk, responses", "time, generate", "time, opd"} <= {
        line["name"] for line in written["lines"]
    }
    assert all(command in printed for command in written["commands"])


def test_the_page_quotes_a_plan_as_it_is_printed(folder_of, tmp_path, monkeypatch, capsys):
    (tmp_path / "Qwen").mkdir()
    folder_of("qwen3-8b")
    (tmp_path / "qwen3-8b").rename(tmp_path / "Qwen" / "Qwen3-8B")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--target", "Qwen/Qwen3-8B", "--gpu", "80"]) == 0
    page = (Path(__file__).parents[1] / "docs" / "do" / "planning.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
