# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What `plan` counts against what training takes: both trainers on a CPU, texts of the planned length, random ids.

    python -m benchmarks.planned TARGET_FOLDER --family eagle3 --prompt 64 --response 192 --draft-vocab 4000
"""

import argparse
import tempfile

import torch
from datasets import Dataset

from benchmarks.counters import PeakBytes
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer, FrozenTarget
from trl_draft_opd.cli.plan import Plan, PlanArguments, make_plan
from trl_draft_opd.drafters.auto import DRAFTER_CLASSES


TRAINERS = {"sft": (DraftSFTTrainer, DraftSFTConfig), "opd": (DraftOPDTrainer, DraftOPDConfig)}
ROWS = 2
# The second finds the optimizer's moments.
UPDATES = 2


def plan_of(folder: str, family: str, prompt: int, response: int, draft_vocab: int | None = None) -> Plan:
    """Return the plan of a fresh drafter, which keeps next to none of its drafts: tau is 1."""
    sizes = {"max_prompt_length": prompt, "max_completion_length": response, "per_device_train_batch_size": ROWS}
    return make_plan(
        PlanArguments(target=folder, gpu="cpu", family=family, draft_vocab_size=draft_vocab, tau=1.0, **sizes)
    )


def measured_peak(folder: str, plan: Plan, stage: str) -> int:
    """Return the bytes alive at most while `stage` trains: weights, gradients, optimizer and all that a step makes."""
    target = FrozenTarget.load(folder, dtype="bfloat16")
    kind = DRAFTER_CLASSES[plan.config.family]
    drafter = kind(plan.config)
    if drafter.draft_token_ids is not None:
        drafter.draft_token_ids.copy_(torch.arange(plan.config.draft_vocab_size))
    fits, run = plan.fits[stage], plan.run
    generator, size = torch.Generator().manual_seed(0), (fits.rows * fits.accumulation, run.length)
    # Without ids that may be special, and within what can be drafted.
    texts = torch.randint(3, run.drafter.vocab - 1, size, generator=generator).tolist()
    rows = Dataset.from_list([{"prompt_ids": t[: run.prompt], "completion_ids": t[run.prompt :]} for t in texts])
    trainer_class, config_class = TRAINERS[stage]
    lengths = {"max_prompt_length": run.prompt, "max_completion_length": run.response}
    # Random ids are no responses of the target's.
    own = {"completions_from_target": True, "warn_mismatch_share": 1.0, "max_mismatch_share": 1.0}
    lengths |= {"max_length": run.length} if stage == "sft" else own
    with tempfile.TemporaryDirectory() as out:
        config = config_class(
            out,
            use_cpu=True,
            bf16=True,
            max_steps=UPDATES,
            per_device_train_batch_size=fits.rows,
            gradient_accumulation_steps=fits.accumulation,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **lengths,
        )
        trainer = trainer_class(drafter, target, config, rows)
        with PeakBytes() as peak:
            trainer.train()
    weights = [*target.causal_lm.parameters(), *drafter.parameters()]
    return sum(weight.nbytes for weight in weights) + peak.peak


def main() -> None:
    """Print a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="folder of the target")
    parser.add_argument("--family", choices=list(DRAFTER_CLASSES), default="eagle3")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=384, help="tokens of a response")
    parser.add_argument("--draft-vocab", type=int, help="tokens that can be drafted; as `sft` chooses if unset")
    args = parser.parse_args()
    plan = plan_of(args.target, args.family, args.prompt, args.response, args.draft_vocab)
    for stage in TRAINERS:
        planned, measured = plan.fits[stage].peak, measured_peak(args.target, plan, stage)
        print(f"{stage}: planned {planned / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB, {planned / measured:.3f}")


if __name__ == "__main__":
    main()
