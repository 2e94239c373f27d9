# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What every rank of the distributed test runs: two steps of each trainer on rows of unequal weight.

Run as `torchrun ddp_worker.py FOLDER`, or import `train_all` to run the same in one process.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from oracle import greedy_text
from tiny import MASK, make_drafter, make_prompts, make_target

from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer


GLOBAL_BATCH = 4
RUNS = [("sft", "dflash"), ("sft", "eagle3"), ("opd", "dflash"), ("opd", "eagle3")]


def train_all(folder: Path, num_processes: int) -> dict[str, torch.Tensor]:
    """Train every pair of trainer and family; return all final weights, the logged losses and tau."""
    torch.set_num_threads(1)
    target = make_target()
    texts = [(prompt, greedy_text(target, prompt, 14)[len(prompt) :]) for prompt in make_prompts(14, seed=4)]
    # A random target may write its mask token.
    texts = [(prompt, response) for prompt, response in texts if MASK not in response][:8]
    prompts, responses = [prompt for prompt, _ in texts], [response for _, response in texts]
    # Ids that end some responses early: ranks hold different numbers of blocks and slots.
    target.causal_lm.generation_config.eos_token_id = [responses[0][2], responses[1][5], responses[3][8]]
    cut = [response[: 2 + row * 3 % 13] for row, response in enumerate(responses)]
    rows = Dataset.from_dict({"prompt_ids": prompts, "completion_ids": cut})
    results = {}
    for kind, family in RUNS:
        trainer_class, config_class = (
            (DraftSFTTrainer, DraftSFTConfig) if kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
        )
        args = config_class(
            output_dir=str(folder / f"{kind}_{family}_{num_processes}"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=GLOBAL_BATCH // num_processes // 2,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=GLOBAL_BATCH // num_processes,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_completion_length=14,
        )
        trainer = trainer_class(make_drafter(family, target), target, args, rows, rows.select(range(4)))
        assert trainer.accelerator.num_processes == num_processes
        trainer.train()
        tau = trainer.evaluate()["eval_tau"]
        drafter = trainer.accelerator.unwrap_model(trainer.model)
        results |= {f"{kind}.{family}.{name}": p.detach().clone() for name, p in drafter.named_parameters()}
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results |= {f"{kind}.{family}.losses": torch.tensor(losses), f"{kind}.{family}.tau": torch.tensor(tau)}
    return results


if __name__ == "__main__":
    output = Path(sys.argv[1])
    trained = train_all(output, num_processes=2)
    torch.save(trained, output / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
