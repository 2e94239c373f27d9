# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The laboratory's fine-tuned targets: a model that solves GSM8K, trained a little further to write its solutions in
another form, whole or by an adapter that is merged.

    python -m benchmarks.lab.tuned_target --origin PATH/targets/gsm8k-qwen3-7m --data PATH/data/gsm8k_train.jsonl \
        --prompts PATH/data/gsm8k_test.jsonl --out outputs/lab/targets/gsm8k-steps
    python -m benchmarks.lab.tuned_target --origin outputs/real/SmolLM2-135M-Instruct-Q4_1 \
        --data PATH/data/gsm8k_train.jsonl --prompts PATH/data/gsm8k_test.jsonl --start-row 5000 --num-rows 750 \
        --lora-r 16 --learning-rate 1e-3 --batch-size 4 --row-length 384 --steps 100 --save-steps 25 --bf16 \
        --num-compared 64 --compared-tokens 192 \
        --out outputs/real/SmolLM2-135M-Instruct-Q4_1-steps

It stands for what users do to a public model whose drafter was trained before: same architecture, same tokenizer,
other text. The calculator notes of the dataset go, lines become numbered steps, and the answer stands in a sentence. A
killed run resumes from its last checkpoint. Writes an ordinary model folder, with `training.json` saying how it was
made, how many greedy answers changed, and how long they are.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from trl_draft_opd import FrozenTarget, SamplingSettings
from trl_draft_opd.responses import generate_responses

from .code_target import last_twentieth, open_run, pack_rows, stack_rows, training_arguments


_NOTE = re.compile(r"<<[^<>]*>>")
_ANSWER = "#### "


@dataclass(frozen=True)
class TunedTargetConfig:
    """Data and training of the fine-tuned target; a default lives here and nowhere else."""

    origin: str = field(metadata={"help": "Folder of the target to train further."})
    data: str = field(metadata={"help": "JSON lines with `question` and `answer`, in GSM8K's form."})
    prompts: str = field(metadata={"help": "JSON lines with `question`, whose greedy answers are compared."})
    out: str = field(metadata={"help": "Folder of the new target; checkpoints go to `checkpoints/` below it."})
    num_rows: int = field(default=4000, metadata={"help": "Rows of the data, trained on."})
    start_row: int = field(default=0, metadata={"help": "The first of them."})
    num_compared: int = field(default=100, metadata={"help": "Prompts whose greedy answers are compared."})
    compared_tokens: int = field(default=96, metadata={"help": "Tokens of each answer that are compared."})
    lora_r: int = field(default=0, metadata={"help": "Rank of an adapter on all linear layers; 0 trains the whole."})
    bf16: bool = field(default=False, metadata={"help": "Train under bf16 autocast."})
    row_length: int = field(default=320, metadata={"help": "Tokens per packed row; longer chats are left out."})
    batch_size: int = field(default=6, metadata={"help": "Packed rows per step."})
    steps: int = field(default=150, metadata={"help": "Optimiser steps."})
    warmup_steps: int = field(default=10, metadata={"help": "Steps over which the learning rate rises."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Highest learning rate of AdamW; a cosine to 0."})
    save_steps: int = field(default=50, metadata={"help": "Steps between checkpoints."})
    seed: int = field(default=0, metadata={"help": "Of the order of rows."})


def in_steps(answer: str) -> str:
    """
    Return a GSM8K solution as numbered steps, without calculator notes.

    Raises:
        ValueError: If it does not end in a line `#### NUMBER`.
    """
    *lines, last = answer.strip().split("\n")
    if not last.startswith(_ANSWER) or not lines:
        raise ValueError(f"A solution must end in a line {_ANSWER + 'NUMBER'!r}, got {answer[-60:]!r}.")
    steps = [f"Step {number}: {_NOTE.sub('', line).strip()}" for number, line in enumerate(lines, 1)]
    return "\n".join([*steps, f"So the answer is {last.removeprefix(_ANSWER).strip()}."])


def styled_rows(path: Path, start: int, num_rows: int) -> list[dict[str, str]]:
    """
    Return rows of a file of solutions in the new form, as chats are made of them elsewhere in the laboratory.

    Raises:
        ValueError: If the file has too few rows.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if start < 0 or start + num_rows > len(lines):
        raise ValueError(f"{path} has {len(lines)} rows; {num_rows} from row {start} on were asked for.")
    lines = lines[start : start + num_rows]
    rows = [json.loads(line) for line in lines]
    return [{"instruction": row["question"], "input": "", "output": in_steps(row["answer"])} for row in rows]


def greedy_answers(folder: str | Path, questions: Sequence[str], num_tokens: int) -> list[list[int]]:
    """Return the first tokens of a target's greedy answers to questions, in the precision it is stored in."""
    target = FrozenTarget.load(folder)
    prompts = [
        target.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]
    return generate_responses(
        target,
        prompts,
        max_completion_length=num_tokens,
        sampling=SamplingSettings(temperature=0.0, top_k=0, top_p=1.0),
        batch_size=32,
        seed=0,
        show_progress=False,
    )


def compare_answers(
    origin: str | Path, tuned: str | Path, questions: Sequence[str], num_tokens: int
) -> dict[str, float]:
    """
    Compare the greedy answers of two targets of one tokenizer.

    Returns:
        `dict`: share of questions whose answers differ within `num_tokens`; of each target the mean length in tokens,
        and the share of answers that end before.
    """
    before, after = (greedy_answers(folder, questions, num_tokens) for folder in (origin, tuned))
    compared = {
        "share_of_answers_changed": sum(map(list.__ne__, before, after)) / len(questions),
    }
    for name, answers in {"origin": before, "tuned": after}.items():
        compared[f"{name}_mean_length"] = sum(map(len, answers)) / len(answers)
        compared[f"{name}_share_ended"] = sum(len(answer) < num_tokens for answer in answers) / len(answers)
    return compared


def tune_target(config: TunedTargetConfig) -> dict:
    """
    Train the target further, save it with its tokenizer in `config.out`, and return what `training.json` says.

    Weights are in float32 while they are trained, and saved in the precision of the origin. A finished run is not
    repeated; one that was killed resumes from its last checkpoint.

    Raises:
        ValueError: If there are too few rows, a solution has another form, or `config.out` holds a run with other
            settings.
    """
    out = Path(config.out)
    settings = open_run(config, out)
    report_path = out / "training.json"
    if report_path.exists():
        return json.loads(report_path.read_text(encoding="utf-8"))
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(config.origin)
    packed = pack_rows(styled_rows(Path(config.data), config.start_row, config.num_rows), tokenizer, config.row_length)
    set_seed(config.seed)
    stored_dtype = AutoConfig.from_pretrained(config.origin).dtype
    model = AutoModelForCausalLM.from_pretrained(config.origin, dtype=torch.float32)
    if config.lora_r:
        model = get_peft_model(
            model, LoraConfig(r=config.lora_r, lora_alpha=2 * config.lora_r, target_modules="all-linear")
        )
    arguments = training_arguments(config, bf16=config.bf16)
    trainer = Trainer(model=model, args=arguments, train_dataset=packed, data_collator=stack_rows)
    checkpoints = out / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    model = model.merge_and_unload() if config.lora_r else model
    model.config.use_cache = True
    model.to(stored_dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()[: config.num_compared]
    questions = [json.loads(line)["question"] for line in lines]
    report = {
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "first_loss": next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        "final_loss": last_twentieth(trainer.state.log_history),
        **compare_answers(config.origin, out, questions, config.compared_tokens),
        **settings,
    }
    report_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Read the command line, train, and say what came out."""
    (config,) = HfArgumentParser(TunedTargetConfig, description=__doc__).parse_args_into_dataclasses()
    print(json.dumps(tune_target(config), indent=2))


if __name__ == "__main__":
    main()
