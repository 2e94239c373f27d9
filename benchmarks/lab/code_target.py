# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The laboratory's second target: a small Llama trained from scratch on code, another architecture, domain and chat
format.

    python -m benchmarks.lab.code_target --data PATH/data/codealpaca.jsonl --out outputs/lab/targets/code-llama

Reads rows with `instruction`, `input` and `output` (CodeAlpaca's form). The last rows of the file are held out:
neither the tokenizer nor the model ever sees them, so that prompts for development and test can be drawn from them. A
killed run resumes from its last checkpoint when it is started again. Knows data and transformers. Refuses to know
drafters: what comes out is an ordinary model folder, with `training.json` saying how it was made.

Took 28 minutes on about half a CPU core.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


FIELDS = ("instruction", "input", "output")
PAD, END, USER, ASSISTANT, MASK = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|mask|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('This target knows the roles user and assistant, not ' + message['role'] + '.') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IGNORED = -100
PLACES = ("data", "prompts", "origin", "out")  # settings that say where things lie, not what is made


@dataclass(frozen=True)
class CodeTargetConfig:
    """Data, shape and training of the target; a default lives here and nowhere else."""

    data: str = field(metadata={"help": "JSON lines with `instruction`, `input` and `output`."})
    out: str = field(metadata={"help": "Folder of the target; checkpoints go to `checkpoints/` below it."})
    held_out: int = field(default=400, metadata={"help": "Last rows of the file, never trained on."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens, 256 bytes and 5 special ones included."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=512, metadata={"help": "Width of its feed-forward layers."})
    num_layers: int = field(default=8, metadata={"help": "Decoder layers; 8 give three distinct layers to tap."})
    num_heads: int = field(default=4, metadata={"help": "Query heads; half as many key/value heads."})
    row_length: int = field(default=320, metadata={"help": "Tokens per packed row; longer chats are left out."})
    batch_size: int = field(default=6, metadata={"help": "Packed rows per step."})
    steps: int = field(default=420, metadata={"help": "Optimiser steps."})
    warmup_steps: int = field(default=40, metadata={"help": "Steps over which the learning rate rises."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Highest learning rate of AdamW; a cosine to 0."})
    save_steps: int = field(default=100, metadata={"help": "Steps between checkpoints."})
    seed: int = field(default=0, metadata={"help": "Of weights and order."})

    def __post_init__(self):
        if self.num_heads % 2 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"`num_heads` must be even and divide `hidden_size`, got {self.num_heads} and {self.hidden_size}."
            )
        for name in ("held_out", "steps", "save_steps", "batch_size", "row_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")


# ---- data -----------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    """
    Read CodeAlpaca rows.

    Raises:
        ValueError: If the file is missing, or a line is no JSON object with three strings and a non-empty output.
    """
    if not path.is_file():
        raise ValueError(f"No data file at {path}. Give `--data` a JSON-lines file with {', '.join(FIELDS)}.")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: no JSON ({error}). Every line must be one object."
                ) from error
            wrong = [name for name in FIELDS if not isinstance(row, dict) or not isinstance(row.get(name), str)]
            if wrong:
                raise ValueError(
                    f"{path}, line {number}: {', '.join(map(repr, wrong))} missing or no string. Every row needs the "
                    f"strings {', '.join(FIELDS)}; `input` may be empty."
                )
            rows.append({name: row[name] for name in FIELDS})
    return rows


def user_message(row: dict[str, str]) -> str:
    """Return what the user says in a row's chat: the instruction and, where there is one, its input."""
    return f"{row['instruction']}\n{row['input']}" if row["input"].strip() else row["instruction"]


def split_rows(rows: Sequence[dict[str, str]], num_held_out: int) -> tuple[list[dict], list[dict]]:
    """
    Split rows into those to train on and the last `num_held_out`, leaving out of the former what the latter ask too.

    Raises:
        ValueError: If nothing is left to train on.
    """
    held_out = list(rows[-num_held_out:])
    asked = {user_message(row) for row in held_out}
    training = [row for row in rows[:-num_held_out] if user_message(row) not in asked]
    if not training:
        raise ValueError(
            f"{len(rows)} rows, of which `held_out={num_held_out}` are kept, leave none to train on. Lower `held_out`."
        )
    return training, held_out


def chat_of(row: dict[str, str]) -> list[dict[str, str]]:
    """Return a row as a chat of two turns."""
    return [{"role": "user", "content": user_message(row)}, {"role": "assistant", "content": row["output"]}]


def train_tokenizer(rows: Sequence[dict[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer; every digit is a token, and `<|mask|>` one that text never uses.

    Args:
        rows (`Sequence[dict]`): Rows to learn merges from.
        vocab_size (`int`): Tokens, the 256 bytes and 5 special ones included.
    """
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, USER, ASSISTANT, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((message["content"] for row in rows for message in chat_of(row)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        mask_token=MASK,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def pack_rows(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast, row_length: int) -> Dataset:
    """
    Pack whole chats into rows of `row_length` tokens.

    Positions start anew with every chat, from which `transformers` makes a mask that keeps chats apart. Nothing is
    learned from padding, nor is a chat's first token predicted from the chat before it.

    Args:
        rows (`Sequence[dict]`): Rows; those longer than `row_length` tokens are left out.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): The target's tokenizer.
        row_length (`int`): Tokens per packed row.

    Returns:
        `Dataset` with `input_ids`, `position_ids` and `labels`, each of `row_length` integers.

    Raises:
        ValueError: If no chat fits.
    """
    chats = tokenizer.apply_chat_template([chat_of(row) for row in rows], tokenize=True, return_dict=True)["input_ids"]
    packs: list[list[list[int]]] = []
    open_packs: list[int] = []
    room: list[int] = []
    # Longest first, into the first row with room: hardly any padding.
    for ids in sorted((ids for ids in chats if len(ids) <= row_length), key=len, reverse=True):
        pack = next((index for index in open_packs if room[index] >= len(ids)), None)
        if pack is None:
            pack = len(packs)
            packs.append([])
            room.append(row_length)
            open_packs.append(pack)
        packs[pack].append(ids)
        room[pack] -= len(ids)
        if room[pack] < 8:
            open_packs.remove(pack)
    if not packs:
        raise ValueError(f"No chat has {row_length} tokens or fewer. Raise `row_length`.")
    return Dataset.from_list([_packed_row(pack, row_length, tokenizer.pad_token_id) for pack in packs])


def _packed_row(chats: list[list[int]], row_length: int, pad_token_id: int) -> dict[str, list[int]]:
    padding = row_length - sum(len(ids) for ids in chats)
    row: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
    for ids in chats:
        row["input_ids"] += ids
        row["position_ids"] += range(len(ids))
        row["labels"] += [IGNORED, *ids[1:]]
    row["input_ids"] += [pad_token_id] * padding
    row["position_ids"] += range(padding)
    row["labels"] += [IGNORED] * padding
    return row


def stack_rows(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stack packed rows, all of one length, into a batch."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


# ---- model and training ---------------------------------------------------------------------------------------------


def make_target(config: CodeTargetConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama with grouped queries and tied embeddings."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads // 2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def training_arguments(config: CodeTargetConfig, bf16: bool = False) -> TrainingArguments:
    """Return the settings of the training loop, under bf16 autocast or in float32."""
    return TrainingArguments(
        output_dir=str(Path(config.out) / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=max(config.steps // 40, 1),
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        include_num_input_tokens_seen="all",
        dataloader_pin_memory=False,
        # With a cache, `transformers` makes no mask between packed chats.
        use_cache=False,
        report_to="none",
        disable_tqdm=True,
    )


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, packed: Dataset, batch_size: int) -> float:
    """Return the cross-entropy per learned token of packed rows, in nats."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(packed), batch_size):
        batch = stack_rows([packed[i] for i in range(start, min(start + batch_size, len(packed)))])
        num_tokens = int((batch["labels"] != IGNORED).sum())
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total += float(model(**batch, use_cache=False).loss) * num_tokens
        count += num_tokens
    return total / count


def last_twentieth(log_history: Sequence[dict]) -> float:
    """Return the mean training loss over the last twentieth of the logged steps."""
    losses = [entry["loss"] for entry in log_history if "loss" in entry]
    last = losses[-max(math.ceil(len(losses) / 20), 1) :]
    return sum(last) / len(last)


def open_run(config: CodeTargetConfig, out: Path) -> dict:
    """
    Begin a run in `out`, or make sure that the one begun there is this one.

    Returns:
        `dict`: the run's settings and the SHA-256 of its data, as they stand in `settings.json`.

    Raises:
        ValueError: If the folder holds a run with other settings or other data.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in PLACES}
    settings["data_sha256"] = hashlib.sha256(Path(config.data).read_bytes()).hexdigest()
    path = out / "settings.json"
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        other = {name: (begun.get(name), value) for name, value in settings.items() if begun.get(name) != value}
        if other:
            raise ValueError(
                f"{out} holds a run with other settings (there, now): {other}. Give another `--out`, or delete it."
            )
        return settings
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return settings


def train_code_target(config: CodeTargetConfig) -> dict:
    """
    Train tokenizer and target, save both in `config.out`, and return what `training.json` says.

    A finished run is not repeated; one that was killed resumes from its last checkpoint.

    Raises:
        ValueError: If the data cannot be read, or `config.out` holds a run with other settings.
    """
    rows = read_rows(Path(config.data))
    training, held_out = split_rows(rows, config.held_out)
    out = Path(config.out)
    settings = open_run(config, out)
    report_path = out / "training.json"
    if report_path.exists():
        return json.loads(report_path.read_text(encoding="utf-8"))
    if not (out / "tokenizer_config.json").exists():
        train_tokenizer(training, config.vocab_size).save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    packed = pack_rows(training, tokenizer, config.row_length)
    set_seed(config.seed)
    model = make_target(config, tokenizer)
    trainer = Trainer(model=model, args=training_arguments(config), train_dataset=packed, data_collator=stack_rows)
    checkpoints = out / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    model.config.use_cache = True
    model.save_pretrained(out)
    report = {
        "parameters": model.num_parameters(),
        "training_rows": len(training),
        "held_out_rows": len(held_out),
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "final_loss": last_twentieth(trainer.state.log_history),
        "held_out_loss": mean_loss(model, pack_rows(held_out, tokenizer, config.row_length), config.batch_size),
        **settings,
    }
    report_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Read the command line, train, and say what came out."""
    (config,) = HfArgumentParser(CodeTargetConfig, description=__doc__).parse_args_into_dataclasses()
    print(json.dumps(train_code_target(config), indent=2))


if __name__ == "__main__":
    main()
