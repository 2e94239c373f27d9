# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A drafter follows its traffic: a server's log becomes responses, and Draft-OPD trains along them.

    python examples/from_traffic.py --target Qwen/Qwen3-4B --drafter drafter-opd --log traffic.jsonl

Expect what of the log was taken, what was left out and why, and tau along the traffic after training. How to have a
server write the log: docs/do/traffic.md.
"""

from dataclasses import dataclass, field

from trl import TrlParser

from trl_draft_opd import (
    DraftOPDConfig,
    DraftOPDTrainer,
    FrozenTarget,
    ResponseStore,
    SamplingSettings,
    import_traffic,
)


@dataclass
class TrafficArguments:
    """Flags of this script."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    drafter: str = field(metadata={"help": "The drafter to train, in any published layout."})
    log: str = field(metadata={"help": "JSON lines with `request` and `response`, of requests at temperature 0."})


if __name__ == "__main__":
    args, config = TrlParser((TrafficArguments, DraftOPDConfig)).parse_args_and_config()
    target = FrozenTarget.load(args.target)
    folder = config.responses or "traffic"
    report = import_traffic(
        target,
        [args.log],
        folder,
        sampling=SamplingSettings(temperature=0.0, top_k=0, top_p=1.0),
        max_completion_length=config.max_completion_length or 2048,
    )
    print("\n".join(report.lines()))
    rows = ResponseStore.read_only(folder).to_dataset().train_test_split(0.1, seed=0)
    DraftOPDTrainer(args.drafter, target, config, rows["train"], rows["test"]).train()
