# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The launch configs of examples/ are what accelerate's own launcher takes, and say what their names say.
"""

import pytest

from helpers.distributed.backends import CONFIGS, launch_environment


NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
MEANT = {
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_every_launch_config(name):
    found = launch_environment(name)
    assert found.items() >= MEANT.get(name, {}).items()
    assert ("ACCELERATE_USE_FSDP" in found, "ACCELERATE_USE_DEEPSPEED" in found) == (
        name == "fsdp2",
        name.startswith("zero"),
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_launch_config_says_when_to_use_it(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    header = [line for line in lines[1:] if line.startswith("#")]
    assert len(header) >= 1 and len(" ".join(header)) > 40


def test_there_is_a_config_for_every_way_to_launch():
    assert {"single_cpu", "multi_cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2", "zero2", "zero3"} <= set(
        NAMES
    )
