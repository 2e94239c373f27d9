# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The same short runs under every launch (one process, DDP, FSDP2, ZeRO-2, ZeRO-3), their losses side by side.

    python -m benchmarks.backends --target TARGET --prompts PROMPTS.jsonl --output out --dtype bfloat16

Trains fresh drafters of both families, supervised and by Draft-OPD, on the target's own answers to the first prompts
of the file (rows with `question`), each launch in processes of its own, and prints a table of losses, largest
differences from DDP, and peak memory of the device. Every launch runs on the device at hand; on a CPU `--launches one
ddp` are those that need no GPU.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from trl_draft_opd import (
    DFlashDraftModel,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    Eagle3DraftModel,
    FrozenTarget,
    SamplingSettings,
    generate_responses,
)


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate_configs"
LAUNCHES = ("one", "ddp", "fsdp2", "zero2", "zero3")
RUNS = [(kind, family) for kind in ("sft", "opd") for family in ("eagle3", "dflash")]


def command(launch: str, num_processes: int, arguments: list[str]) -> list[str]:
    """Return the command that runs this file's worker under a launch."""
    worker = ["-m", "benchmarks.backends", "--worker", launch, *arguments]
    if launch == "one":
        return [sys.executable, *worker]
    if launch == "ddp":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={num_processes}",
            *worker,
        ]
    config = str(CONFIGS / f"{launch}.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    return [*launcher, "--num_processes", str(num_processes), *worker]


def run_worker(options: argparse.Namespace) -> None:
    """
    Train every pair of trainer and family under the launch this process belongs to; the first process writes the logs.
    """
    rows = Dataset.from_dict(json.loads((options.output / "answers.json").read_text()))
    results: dict[str, Any] = {}
    for kind, family in RUNS:
        # Settings before models: a ZeRO-3 launch shapes how these are loaded.
        args = (DraftSFTConfig if kind == "sft" else DraftOPDConfig)(
            str(options.output / f"{options.worker}-{kind}-{family}"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            max_completion_length=options.max_completion_length,
            bf16=options.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            target_dtype=options.dtype,
            **({} if kind == "sft" else {"completions_from_target": True, "max_mismatch_share": 1.0}),
        )
        target = FrozenTarget.load(options.target, dtype=options.dtype)
        torch.manual_seed(0)
        if family == "eagle3":
            drafter = Eagle3DraftModel.from_target(target, target_layer_ids=options.layer_ids)
        else:
            drafter = DFlashDraftModel.from_target(
                target,
                mask_token_id=target.find_mask_token_id(),
                target_layer_ids=options.layer_ids,
                num_hidden_layers=2,
            )
        trainer = (DraftSFTTrainer if kind == "sft" else DraftOPDTrainer)(drafter, target, args, rows)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        results[f"{kind} {family}"] = {
            "losses": [entry["loss"] for entry in logs],
            "grad_norms": [entry.get("grad_norm") for entry in logs],
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "wrapper": type(trainer.model_wrapped).__name__,
        }
        is_first = trainer.is_world_process_zero()
    if is_first:
        (options.output / f"{options.worker}.json").write_text(json.dumps(results, indent=2))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def write_answers(options: argparse.Namespace) -> None:
    """Have the target answer the prompts once, for all launches."""
    target = FrozenTarget.load(options.target, dtype=options.dtype)
    target.place(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    questions = [json.loads(line)["question"] for line in options.prompts.open(encoding="utf-8")][
        : options.num_prompts
    ]
    prompts = [
        target.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]
    answers = generate_responses(
        target,
        prompts,
        max_completion_length=options.max_completion_length,
        sampling=SamplingSettings(0.0, 0, 1.0),
        batch_size=64,
        seed=0,
        show_progress=False,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "answers.json").write_text(json.dumps({"prompt_ids": prompts, "completion_ids": answers}))


def table(output: Path) -> str:
    """Return the logs that are there as a table in markdown."""
    found = {
        launch: json.loads(path.read_text()) for launch in LAUNCHES if (path := output / f"{launch}.json").is_file()
    }
    base = "ddp" if "ddp" in found else next(iter(found))
    lines = [
        f"| run | launch (wrapper) | loss of each update | largest difference from {base} | peak MB |",
        "|---|---|---|---|---|",
    ]
    for name in next(iter(found.values())):
        reference = found[base][name]["losses"]
        for launch, results in found.items():
            run = results[name]
            gap = max(abs(a - b) / abs(b) for a, b in zip(run["losses"], reference, strict=True))
            peak = "-" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**20:.0f}"
            losses = " ".join(f"{loss:.4f}" for loss in run["losses"])
            lines.append(f"| {name} | {launch} ({run['wrapper']}) | {losses} | {gap:.1e} | {peak} |")
    return "\n".join(lines)


def main() -> int:
    """Answer, launch, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=LAUNCHES, help=argparse.SUPPRESS)
    parser.add_argument("--target", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--layer-ids", type=int, nargs="+", default=None)
    parser.add_argument("--launches", nargs="+", default=list(LAUNCHES), choices=LAUNCHES)
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--max-completion-length", type=int, default=96)
    options = parser.parse_args()
    if options.worker:
        run_worker(options)
        return 0
    write_answers(options)
    arguments = sys.argv[1:]
    failed = []
    for launch in options.launches:
        with (options.output / f"{launch}.log").open("w") as log:
            run = subprocess.run(
                command(launch, options.num_processes, arguments), stdout=log, stderr=subprocess.STDOUT, check=False
            )
        if run.returncode:
            failed.append(launch)
            print(f"{launch} failed with {run.returncode}:", *log_tail(options.output / f"{launch}.log"), sep="\n")
    print(table(options.output))
    return len(failed)


def log_tail(path: Path) -> list[str]:
    """Return the end of a log."""
    return path.read_text(errors="replace").splitlines()[-25:]


if __name__ == "__main__":
    sys.exit(main())
