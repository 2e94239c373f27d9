# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Does Draft-OPD help on real text? Both families, one small real target, GSM8K prompts.

    python benchmarks/gsm8k.py --shared PATH --family dflash

Writes the target's responses once, trains a drafter by SFT until tau on held-out prompts stops rising, and goes on from
that checkpoint in two ways of equal counted FLOPs: more SFT, and Draft-OPD. All drafters are then measured on GSM8K test
prompts. Every phase leaves its result under `--out` and is not repeated by a second call.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.counters import FlopCount
from trl_draft_opd import (
    AutoDrafter,
    DFlashDraftModel,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    Eagle3DraftModel,
    EvaluationReport,
    FrozenTarget,
    SamplingSettings,
    evaluate_drafter,
    generate_responses,
)
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.evaluation import paired_gain


GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder that holds targets/ and data/")
    parser.add_argument("--out", type=Path, default=Path("outputs/gsm8k"))
    parser.add_argument("--family", choices=("dflash", "eagle3"), required=True)
    parser.add_argument("--prompts", type=int, default=1600, help="training prompts")
    parser.add_argument("--dev-prompts", type=int, default=64, help="training prompts held out to find the plateau")
    parser.add_argument("--test-prompts", type=int, default=320, help="GSM8K test prompts, at most 640")
    parser.add_argument("--compared-prompts", type=int, default=32, help="test prompts also decoded plainly")
    parser.add_argument("--sft-anchors", type=int, default=48, help="anchors per response in SFT")
    parser.add_argument("--max-sft-epochs", type=int, default=20)
    parser.add_argument("--opd-epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32, help="prompts per update")
    parser.add_argument("--sft-learning-rate", type=float, default=1e-3)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the two arms that go on from SFT")
    parser.add_argument("--rejected-scope", choices=("suffix", "first"), default="suffix")
    parser.add_argument("--opd-name", default="opd", help="name of the OPD arm, to run several settings side by side")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def read_prompts(path: Path, target: FrozenTarget, count: int, start: int = 0) -> list[list[int]]:
    """Return chat prompts of GSM8K questions as token ids."""
    with path.open(encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in lines][start : start + count]
    chats = [[{"role": "user", "content": question}] for question in questions]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return [target.tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]


def target_responses(args: argparse.Namespace, target: FrozenTarget) -> Dataset:
    """Return training prompts with the target's greedy responses, written on first use."""
    path = args.out / f"responses-{args.prompts}.json"
    if not path.exists():
        prompts = read_prompts(args.shared / "data" / "gsm8k_train.jsonl", target, args.prompts)
        responses = generate_responses(
            target,
            prompts,
            max_new_tokens=args.max_new_tokens,
            sampling=GREEDY,
            batch_size=64,
            seed=args.seed,
            show_progress=True,
        )
        rows = [{"prompt_ids": p, "completion_ids": r} for p, r in zip(prompts, responses, strict=True)]
        path.write_text(json.dumps(rows), encoding="utf-8")
    return Dataset.from_list(json.loads(path.read_text(encoding="utf-8")))


def fresh_drafter(args: argparse.Namespace, target: FrozenTarget) -> Drafter:
    """Return an untrained drafter of the family: two DFlash layers with 7 drafts, or EAGLE-3 with 5 steps."""
    torch.manual_seed(args.seed)
    if args.family == "dflash":
        mask_token_id = target.find_mask_token_id()
        return DFlashDraftModel.from_target(target, mask_token_id=mask_token_id, num_hidden_layers=2, block_size=8)
    return Eagle3DraftModel.from_target(target, ttt_steps=5)


class PlateauCallback(TrainerCallback):
    """Measures tau on held-out prompts after every epoch and stops once 20 % more compute gives less than 1 %."""

    def __init__(self, args: argparse.Namespace, target: FrozenTarget, prompts: list[list[int]], path: Path):
        self.args, self.target, self.prompts, self.path = args, target, prompts, path
        self.taus: list[float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        report = measure(self.args, self.target, model, self.prompts, compare=False)
        epoch = round(state.epoch)
        self.taus = [*self.taus[: epoch - 1], report.tau]
        self.path.write_text(json.dumps(self.taus), encoding="utf-8")
        earlier = int(epoch / 1.2)
        print(
            f"SFT epoch {epoch}: tau on held-out prompts {report.tau:.3f} [{report.tau_low:.3f}, {report.tau_high:.3f}]"
        )
        # Over the mean of two epochs, because one evaluation alone is noisy at this size.
        if epoch >= 6 and earlier >= 2:
            now, then = sum(self.taus[-2:]) / 2, sum(self.taus[earlier - 2 : earlier]) / 2
            control.should_training_stop = now < 1.01 * then
        return control


def measure(
    args: argparse.Namespace, target: FrozenTarget, drafter: Drafter, prompts: list[list[int]], *, compare: bool
) -> EvaluationReport:
    """Evaluate greedily; eight prompts at a time where plain decoding is timed beside it."""
    return evaluate_drafter(
        target,
        drafter,
        prompts,
        max_new_tokens=args.max_new_tokens,
        batch_size=8 if compare else 32,
        compare_with_target=compare,
        show_progress=False,
    )


def common_settings(args: argparse.Namespace, folder: Path) -> dict:
    """Return the settings every arm shares."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": args.batch_size // 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 25,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
        "seed": args.seed,
        "disable_tqdm": True,
    }


def sft_trainer(args, target, drafter, rows, folder, **options) -> DraftSFTTrainer:
    """Return an SFT trainer."""
    settings = {"save_strategy": "no"} | common_settings(args, folder) | options
    config = DraftSFTConfig(num_anchors=args.sft_anchors, **settings)
    return DraftSFTTrainer(drafter, target, config, rows)


def opd_trainer(args, target, drafter, rows, folder, **options) -> DraftOPDTrainer:
    """Return an OPD trainer that drafts along the stored responses, which at temperature 0 are those of live decoding."""
    config = DraftOPDConfig(
        **common_settings(args, folder),
        save_strategy="no",
        rollout="replay",
        completions_from_target=True,
        rejected_scope=args.rejected_scope,
        **options,
    )
    return DraftOPDTrainer(drafter, target, config, rows)


def train_sft(args: argparse.Namespace, target: FrozenTarget, rows: Dataset) -> Path:
    """Train a fresh drafter by SFT to its plateau and return its folder."""
    folder = args.out / args.family / "sft"
    if not (folder / "history.json").exists():
        dev = read_prompts(
            args.shared / "data" / "gsm8k_train.jsonl", target, args.dev_prompts, start=7473 - args.dev_prompts
        )
        plateau = PlateauCallback(args, target, dev, folder / "dev_taus.json")
        # A constant rate, so that the plateau is the method's and not the schedule's.
        options = {
            "learning_rate": args.sft_learning_rate,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 20,
            "num_train_epochs": args.max_sft_epochs,
            "save_strategy": "epoch",
            "save_total_limit": 1,
        }
        folder.mkdir(parents=True, exist_ok=True)
        trainer = sft_trainer(args, target, fresh_drafter(args, target), rows, folder, **options)
        trainer.add_callback(plateau)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
        trainer.model.save_pretrained(folder)
        history = {"dev_tau_per_epoch": plateau.taus, "steps": trainer.state.global_step}
        (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")
    return folder


def counted_flops(args, target: FrozenTarget, rows: Dataset, start: Path, make_trainer) -> float:
    """Return FLOPs of one update, rollout included, counted over two updates, attention included."""
    settings = {"max_steps": 2, "learning_rate": 0.0}
    trainer = make_trainer(args, target, AutoDrafter.from_pretrained(start), rows, args.out / "flops", **settings)
    with FlopCount() as counter:
        trainer.train()
    return counter.total / 2


def train_arms(args: argparse.Namespace, target: FrozenTarget, rows: Dataset, start: Path) -> dict[str, Path]:
    """Go on from SFT by Draft-OPD and by SFT for the same counted FLOPs; return the folders by arm."""
    steps = args.opd_epochs * (len(rows) // args.batch_size)
    folders = {
        args.opd_name: args.out / args.family / args.opd_name,
        "sft_continued": args.out / args.family / "sft_continued",
    }
    makers = {args.opd_name: opd_trainer, "sft_continued": sft_trainer}
    flops_path = args.out / args.family / "flops.json"
    if not flops_path.exists():
        flops = {name: counted_flops(args, target, rows, start, make) for name, make in makers.items()}
        flops_path.write_text(json.dumps(flops), encoding="utf-8")
    flops = json.loads(flops_path.read_text(encoding="utf-8"))
    opd_flops = flops.get(args.opd_name, flops.get("opd"))
    for name, folder in folders.items():
        if (folder / "config.json").exists():
            continue
        num_steps = steps if name == args.opd_name else round(steps * opd_flops / flops["sft_continued"])
        print(f"{args.family} {name}: {num_steps} updates")
        settings = {"max_steps": num_steps, "learning_rate": args.learning_rate}
        trainer = makers[name](args, target, AutoDrafter.from_pretrained(start), rows, folder, **settings)
        trainer.train()
        trainer.model.save_pretrained(folder)
    return folders


def read_report(path: Path, make_report) -> EvaluationReport:
    """Return a stored report, made on first use."""
    if not path.exists():
        path.write_text(json.dumps(make_report().to_dict()), encoding="utf-8")
    return EvaluationReport(**json.loads(path.read_text(encoding="utf-8")))


def evaluate_all(args: argparse.Namespace, target: FrozenTarget, folders: dict[str, Path]) -> None:
    """Measure every drafter on the same test prompts and print a table with paired gains over SFT and continued SFT."""
    prompts = read_prompts(args.shared / "data" / "gsm8k_test.jsonl", target, args.test_prompts)
    few = prompts[: args.compared_prompts]
    reports: dict[str, EvaluationReport] = {}
    compared: dict[str, EvaluationReport] = {}
    for name, folder in folders.items():
        drafter = AutoDrafter.from_pretrained(folder)
        reports[name] = read_report(
            folder / f"test-{len(prompts)}.json", partial(measure, args, target, drafter, prompts, compare=False)
        )
        compared[name] = read_report(
            folder / f"compared-{len(few)}.json", partial(measure, args, target, drafter, few, compare=True)
        )
    print(
        f"\n| {args.family} | tau | 95 % | over SFT | over continued SFT | acceptance per slot | equal outputs | speed, batch 8 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, report in reports.items():
        gains = [paired_gain(reports[base], report) for base in ("sft", "sft_continued")]
        cells = " | ".join(f"{gain:+.1%} [{low:+.1%}, {high:+.1%}]" for gain, low, high in gains)
        slots = " ".join(f"{rate:.2f}" for rate in report.acceptance_per_slot)
        same = compared[name].num_prompts - compared[name].num_different
        print(
            f"| {name} | {report.tau:.3f} | {report.tau_low:.3f}-{report.tau_high:.3f} | {cells} | {slots} | "
            f"{same} of {len(few)} | {compared[name].speedup:.2f}x |"
        )


def main() -> None:
    """Run all phases."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    target = FrozenTarget.load(args.shared / "targets" / "gsm8k-qwen3-7m", dtype=torch.float32)
    rows = target_responses(args, target)
    start = train_sft(args, target, rows)
    arms = train_arms(args, target, rows, start)
    evaluate_all(args, target, {"sft": start, **arms})


if __name__ == "__main__":
    main()
