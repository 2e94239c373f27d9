# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One of two processes: trains the chosen cases, or every one, under every backend, and leaves `<backend>_<rank>.pt` for
each backend that came to its end.

Run as `accelerate launch --config_file multi_cpu.yaml -m helpers.distributed.worker FOLDER [--all]`. One launch for
all, because importing takes longer than training.
"""

import gc
import os
import sys
import time
from pathlib import Path

import torch

from helpers.distributed.backends import BACKENDS, launched_as
from helpers.distributed.cases import names_under, run_case


def main(folder: Path, is_whole: bool) -> None:
    torch.set_num_threads(1)
    # Every training run ends in a full garbage collection, which passes over all modules otherwise.
    gc.freeze()
    rank = int(os.environ["RANK"])
    for backend in BACKENDS:
        if backend.startswith("zero"):
            import deepspeed

            # It would be compiled for minutes; gloo does without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        results = {}
        for name in names_under(backend, is_whole):
            start = time.monotonic()
            with launched_as(backend) as launch:
                results[name] = run_case(name, folder, folder / backend / name, launch, 2, rank)
            sys.stderr.write(f"{backend} {name}: {time.monotonic() - start:.1f} s\n")
        start = folder / backend / "adamw" / "checkpoint-2"
        with launched_as(backend) as launch:
            results["resumed"] = run_case("adamw", folder, folder / backend / "resumed", launch, 2, rank, resume=start)
        torch.save(results, folder / f"{backend}_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--all" in sys.argv[2:])
