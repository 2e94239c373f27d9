# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Train the same few updates on live and on replayed rollouts. At temperature 0 both walk the same chain, so they must
coincide.
"""

from typing import Any

import torch

from .arms import make_trainer
from .plan import Arm
from .start import make_start
from .workbench import Workbench, write_json


UPDATES = 4
COMPARED = ("loss", "tau", "rounds", "slots/accepted", "slots/rejected")


def compare_rollouts(bench: Workbench) -> dict[str, Any]:
    """
    Return what both engines logged, and the largest difference between the weights they end with beside the largest
    step.

    The response lies under `out/<pair>/live.json` too.
    """
    rows, start = bench.training_rows(pool=256), make_start(bench)
    logs, weights = {}, {}
    for rollout in ("live", "replay"):
        drafter = bench.load_drafter(start)
        begun = [parameter.detach().clone() for parameter in drafter.parameters()]
        settings = {"rollout": rollout} | ({"completions_from_target": False} if rollout == "live" else {})
        arm = Arm(name=rollout, tiers=(2,), trainer="opd")
        options = {"max_steps": UPDATES, "save_strategy": "no", "logging_steps": 1}
        trainer = make_trainer(bench, arm, drafter, rows, bench.folder / "live", 0, **settings, **options)
        trainer.train()
        logs[rollout] = [
            {key: float(row[key]) for key in COMPARED} for row in trainer.state.log_history if "tau" in row
        ]
        weights[rollout] = [parameter.detach() for parameter in trainer.model.parameters()]
    apart = max(float((a - b).abs().max()) for a, b in zip(weights["live"], weights["replay"], strict=True))
    moved = max(float((a - b).abs().max()) for a, b in zip(weights["replay"], begun, strict=True))
    result = {"logs": logs, "weights_apart": apart, "weights_moved": moved, "torch": torch.__version__}
    write_json(bench.folder / "live.json", result)
    return result
