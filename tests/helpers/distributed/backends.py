# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The launch configs of examples/accelerate_configs as accelerate's own launcher reads them, and one process group for
all of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


CONFIGS = Path(__file__).parents[3] / "examples" / "accelerate_configs"
# By backend: the config, and what a careless user may have set beside it.
BACKENDS = {
    "ddp": ("multi_cpu", {}),
    "fsdp2": (
        "fsdp2",
        {
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        },
    ),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}),
}


def launch_environment(config: str, *options: str) -> dict[str, str]:
    """Return what `accelerate launch` hands to its processes through the environment for a config of examples/."""
    command = ["--config_file", str(CONFIGS / f"{config}.yaml"), *options, "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@contextmanager
def launched_as(backend: str) -> Iterator[dict]:
    """Make this process one of a launch of `backend` on the CPU; yields the training arguments that this takes."""
    config, careless = BACKENDS[backend]
    before = dict(os.environ)
    os.environ.update(launch_environment(config, "--num_processes", "2", "--mixed_precision", "no") | careless)
    try:
        if backend == "fsdp2":
            # accelerate knows FSDP on accelerators only; the process group is gloo's all the same.
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            yield {"accelerator_config": {"use_configured_state": True}}
        elif backend == "ddp":
            # Nothing but the config, as a user launches it.
            yield {}
        else:
            yield {"ddp_backend": "gloo"}
    finally:
        os.environ.clear()
        os.environ.update(before)
