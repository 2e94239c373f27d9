# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What the guard records: trainings, rollouts, responses, losses, rows, exports, commands and refusals of tiny models.

Every case is a function without arguments that returns plain values by quantity. It reaches the package through
`adapter` alone. Most drafters were trained beforehand, so that the target keeps some drafts (`drafters.safetensors`).
"""

import contextlib
import hashlib
import io
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import adapter
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from helpers.tiny import EOS, MASK, TINY_RUN, VOCAB, make_causal_lm, make_prompts, make_tokenizer


DRAFTERS_FILE = Path(__file__).with_name("drafters.safetensors")
# Steps of a training; rows it trains on, and rows that no training sees; longest response.
NUM_STEPS, NUM_ROWS, NUM_NEW_ROWS, LENGTH = 20, 10, 2, 16
# What a clock says, or depends on the machine alone.
UNRECORDED = re.compile("runtime|per_second|total_flos|epoch|^step$")
REDUCED = torch.arange(VOCAB) % 3 != 0
DRAFTERS = {
    "eagle3": ("eagle3", {}),
    "eagle3-reduced": ("eagle3", {"reduced": True}),
    "eagle3-norms": ("eagle3", {"fc_norm": True, "norm_output": True}),
    "dflash": ("dflash", {}),
}
SAMPLED = {"temperature": 0.8, "draft_sampling": "sample"}
ARGMAX_DRAFTS = {"temperature": 0.8, "draft_sampling": "greedy"}
LORA = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1}

# Settings of each training. `target`, `rows` and `lora` are the guard's own, the others are the config's.
TRAININGS = {
    "sft/eagle3": {},
    "sft/eagle3-reduced-until-fail-chat": {"slot_scope": "until_fail", "rows": "chat"},
    "sft/eagle3-lora-sampled-eval": {"lora": LORA, **SAMPLED},
    "sft/eagle3-regenerate-d-pace": {"regenerate": True, "slot_weighting": "d_pace", "temperature": 0.7, "top_k": 9},
    "sft/dflash": {"num_anchors": 6},
    "sft/dflash-accumulated-llama": {
        "target": "llama",
        "rows": "text",
        "slot_weighting": "d_pace",
        "slot_scope": "until_fail",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "activation_checkpointing": True,
    },
    "sft/dflash-lora": {"lora": {"r": 2, "modules_to_save": ["norm"]}, "num_anchors": 0},
    "opd/eagle3-replay-first": {},
    "opd/eagle3-replay-suffix": {"rejected_scope": "suffix"},
    "opd/eagle3-live-first": {"rollout": "live"},
    "opd/eagle3-live-suffix-sampled": {"rollout": "live", "rejected_scope": "suffix", **SAMPLED},
    "opd/eagle3-replay-suffix-sampled": {"rejected_scope": "suffix", **SAMPLED},
    "opd/eagle3-replay-first-argmax-drafts": {**ARGMAX_DRAFTS, "replay_segment_length": 5, "reading_bytes": 0},
    "opd/eagle3-reduced-live-suffix": {"rollout": "live", "rejected_scope": "suffix"},
    "opd/eagle3-reduced-replay-first-sampled": {**SAMPLED, "top_k": 8, "accepted_loss": "ce"},
    "opd/eagle3-lora-replay-first": {"lora": LORA},
    "opd/eagle3-supervised-turns-llama": {
        "target": "llama",
        "rows": "turns",
        "completions_from_target": True,
        "supervised_weight": 0.7,
        "supervised_anchors": "error",
        "activation_checkpointing": True,
    },
    "opd/eagle3-norms-losses-moe": {
        "target": "moe",
        "accepted_loss": "jsd",
        "rejected_loss": "lk",
        "accepted_weight": 0.5,
        "position_decay": 0.6,
        "num_drafts": 3,
    },
    "opd/dflash-replay-first": {"replay_segment_length": 5},
    "opd/dflash-replay-suffix": {"rejected_scope": "suffix"},
    "opd/dflash-live-first-argmax-drafts": {"rollout": "live", **ARGMAX_DRAFTS},
    "opd/dflash-live-suffix": {"rollout": "live", "rejected_scope": "suffix"},
    "opd/dflash-live-suffix-sampled": {"rollout": "live", "rejected_scope": "suffix", **SAMPLED},
    "opd/dflash-replay-suffix-sampled": {"rejected_scope": "suffix", **SAMPLED, "top_p": 0.9},
    "opd/dflash-lora-live-first": {"lora": LORA, "rollout": "live"},
    "opd/dflash-accumulated-supervised-d-pace": {
        "slot_weighting": "d_pace",
        "supervised_weight": 0.5,
        "num_supervised_anchors": 5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "opd/dflash-losses-gemma2": {"target": "gemma2", "accepted_loss": "lk_hybrid", "rejected_loss": "tv"},
}


# -- values -----------------------------------------------------------------------------------------------------------


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def digest_tensor(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's type, shape and bits."""
    tensor = tensor.detach().cpu().contiguous()
    return digest(
        f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.view(-1).view(torch.uint8).numpy().tobytes()
    )


def plain(value: Any) -> Any:
    """Return a value as the record holds it: tensors as hashes, floats as exact hexadecimal text."""
    if isinstance(value, torch.Tensor):
        return digest_tensor(value)
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def digest_json(value: Any) -> str:
    return digest(json.dumps(value, sort_keys=True).encode())


# -- material ---------------------------------------------------------------------------------------------------------


@cache
def target_of(kind: str):
    return adapter.make_target(kind)


@cache
def greedy_texts(kind: str) -> list[tuple[list[int], list[int]]]:
    """Return prompts with the target's greedy continuations of 9 to 16 tokens, none of which holds the mask token."""
    model, texts, count = make_causal_lm(kind), [], NUM_ROWS + NUM_NEW_ROWS
    for prompt in make_prompts(3 * count, seed=4):
        ids = greedy_continuation(model, prompt, 9 + len(texts) % 8)
        if MASK not in ids and len(texts) < count:
            texts.append((prompt, ids[len(prompt) :]))
    assert len(texts) == count
    return texts


@torch.no_grad()
def greedy_continuation(model, prompt: list[int], num_tokens: int) -> list[int]:
    """Return a prompt and what a model says to it, without cache; the end of sequence ends nothing."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


def in_words(ids: list[int]) -> str:
    return make_tokenizer().decode(ids)


@cache
def rows_of(kind: str, form: str, start: int, stop: int) -> Dataset:
    """Return rows `start..stop-1` of a target's texts: as ids, as text, as chats, or as two answers in one row."""
    texts = greedy_texts(kind)[start:stop]
    if form == "ids":
        return Dataset.from_list([{"prompt_ids": prompt, "completion_ids": answer} for prompt, answer in texts])
    if form == "text":
        return Dataset.from_list([{"prompt": in_words(p), "completion": " " + in_words(a)} for p, a in texts])
    if form == "chat":
        turns = [[in_words(p), in_words(a[:4]), in_words(a[4:6]), in_words(a[6:])] for p, a in texts]
        roles = ["user", "assistant"] * 2
        return Dataset.from_list(
            [{"messages": [{"role": r, "content": c} for r, c in zip(roles, t, strict=True)]} for t in turns]
        )
    rows, model = [], make_causal_lm(kind)
    for prompt, answer in texts:
        first = prompt + answer[:7]
        whole = greedy_continuation(model, first + prompt, 6)
        marks = [0] * len(prompt) + [1] * 7 + [0] * len(prompt) + [1] * 6
        rows.append({"input_ids": whole, "completion_mask": marks})
    return Dataset.from_list(rows)


def make_drafter(name: str, kind: str = "qwen3"):
    """Return a trained drafter, whose drafts are often right, while `train_drafters` has not removed their file."""
    family, options = DRAFTERS[name]
    if "reduced" in options:
        options = {"draft_vocabulary": adapter.make_reduced_vocabulary(REDUCED)}
    drafter = adapter.make_drafter(family, target_of(kind), **options)
    if DRAFTERS_FILE.exists():
        weights = load_file(DRAFTERS_FILE)
        with torch.no_grad():
            for key, parameter in drafter.named_parameters():
                parameter.copy_(weights[f"{kind}/{name}/{key}"])
    return drafter


def train_drafters() -> None:
    """Train the drafters that the cases start from, and write them to a file as bfloat16."""
    DRAFTERS_FILE.unlink(missing_ok=True)
    tensors = {}
    pairs = [("qwen3", name) for name in DRAFTERS]
    pairs += [("llama", "eagle3"), ("llama", "dflash"), ("moe", "eagle3-norms"), ("gemma2", "dflash")]
    for kind, name in pairs:
        with tempfile.TemporaryDirectory() as folder:
            drafter = make_drafter(name, kind)
            settings = SETTINGS | {"max_steps": 90, "num_anchors": 0}
            rows = rows_of(kind, "ids", 0, NUM_ROWS)
            adapter.make_trainer("sft", drafter, target_of(kind), folder, rows, **settings).train()
        for key, parameter in drafter.named_parameters():
            tensors[f"{kind}/{name}/{key}"] = parameter.detach().bfloat16()
    save_file(tensors, DRAFTERS_FILE)
    DRAFTERS_FILE.chmod(0o644)  # safetensors writes for the owner alone


# -- trainings --------------------------------------------------------------------------------------------------------


SETTINGS = {
    **TINY_RUN,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": NUM_STEPS,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "learning_rate": 5e-3,
    "max_completion_length": LENGTH,
    "seed": 11,
}


def record_training(name: str) -> dict[str, Any]:
    """Train for 20 steps and evaluate: metrics by step, the weights before and behind, and the evaluation."""
    settings = dict(TRAININGS[name])
    method, _, variant = name.partition("/")
    drafter_name = max((known for known in DRAFTERS if variant.startswith(known)), key=len)
    kind, form, lora = settings.pop("target", "qwen3"), settings.pop("rows", "ids"), settings.pop("lora", None)
    rows, eval_rows = rows_of(kind, form, 0, NUM_ROWS), rows_of(kind, "ids", NUM_ROWS - 2, NUM_ROWS + NUM_NEW_ROWS)
    with tempfile.TemporaryDirectory() as folder:
        drafter = make_drafter(drafter_name, kind)
        if lora is not None:
            # An adapter names the folder of its drafter.
            drafter.save_pretrained(f"{folder}/base")
            drafter = adapter.load_drafter(f"{folder}/base")
        trainer = adapter.make_trainer(
            method,
            drafter,
            target_of(kind),
            f"{folder}/out",
            rows,
            eval_rows,
            peft_config=None if lora is None else LoraConfig(**lora),
            **SETTINGS | settings,
        )
        values = {"weights before": digest_json(weights_of(trainer.model, ""))}
        trainer.train()
        steps = [log for log in trainer.state.log_history if "loss" in log]
        assert len(steps) == NUM_STEPS
        # Loss and gradient norm first: they say at which step a run left the recorded one.
        for metric in sorted(
            {metric for log in steps for metric in log}, key=lambda m: (m != "loss", m != "grad_norm", m)
        ):
            if not UNRECORDED.search(metric):
                values[f"step {adapter.recorded_metric(metric)}"] = [plain(log.get(metric)) for log in steps]
        values |= weights_of(trainer.model, "weights")
        for metric, value in trainer.evaluate().items():
            if not UNRECORDED.search(metric):
                values[adapter.recorded_metric(metric)] = plain(value)
    return values


def weights_of(model: torch.nn.Module, label: str) -> dict[str, str]:
    return {f"{label} {name}": digest_tensor(tensor) for name, tensor in sorted(model.state_dict().items())}


# -- rollouts ---------------------------------------------------------------------------------------------------------


DISTRIBUTIONS = {
    "greedy": ({}, "greedy"),
    "argmax-drafts": ({"temperature": 0.8}, "greedy"),
    "sampled": ({"temperature": 0.8}, "sample"),
    "sampled-filtered": ({"temperature": 1.1, "top_k": 12, "top_p": 0.9}, "sample"),
}


def record_rollouts(drafter_name: str, case: str) -> dict[str, Any]:
    """Roll out live and by replay, with branches kept and not; the slots that are trained on; an evaluation."""
    target, drafter = target_of("qwen3"), make_drafter(drafter_name)
    sampling, draft_sampling = adapter.make_sampling(**DISTRIBUTIONS[case][0]), DISTRIBUTIONS[case][1]
    # Four prompts that were trained on, so that blocks are kept in part and in full, and four others.
    prompts = [prompt for prompt, _ in greedy_texts("qwen3")][:4] + make_prompts(4, seed=9)
    pair = (target, drafter)
    values = {}

    def add(label: str, found: dict[str, Any]) -> None:
        values.update({f"{label} {name}": plain(value) for name, value in found.items()})

    for keeps in (True, False):
        label = "branches" if keeps else "no branches"
        live = adapter.roll_out_live(*pair, prompts, sampling, draft_sampling, keeps_branches=keeps)
        add(f"live, {label}:", adapter.rollout_values(live))
        for length in (1, 5, 100):
            replayed = adapter.replay(
                *pair, live, sampling, draft_sampling, keeps_branches=keeps, segment_length=length
            )
            add(f"replay, {label}, segments of {length}:", adapter.rollout_values(replayed))
            if length == 1:
                for scope in ("first", "suffix") if keeps else ("first",):
                    add(f"slots, {label}, {scope}:", adapter.marked_slots(replayed, scope, [EOS]))
    if case == "sampled-filtered":
        # Text with tokens that the filters rule out: its rows are refused.
        foreign = adapter.roll_out_live(
            *pair, prompts, adapter.make_sampling(temperature=1.6), draft_sampling, keeps_branches=False
        )
        replayed = adapter.replay(*pair, foreign, sampling, draft_sampling, keeps_branches=True, segment_length=5)
        add("replay, foreign text:", adapter.rollout_values(replayed))
    add("evaluation:", adapter.evaluate(*pair, prompts, sampling, draft_sampling))
    return values


def record_responses() -> dict[str, Any]:
    """The target's plain responses, alone and in batches, and the blocks that supervised training samples."""
    values, prompts = {}, make_prompts(7, seed=5)
    for kind in ("qwen3", "gemma2"):
        for case, (options, _) in DISTRIBUTIONS.items():
            sampling = adapter.make_sampling(**options)
            for size in (1, 3):
                responses = adapter.respond(target_of(kind), prompts, sampling, batch_size=size, seed=2)
                values[f"{kind} {case}, batches of {size}"] = digest_json(responses)
    return values


def record_sampled_blocks() -> dict[str, Any]:
    """The blocks that supervised training samples."""
    generator, values = torch.Generator().manual_seed(8), {}
    input_ids = torch.randint(7, VOCAB, (3, 40), generator=generator)
    mask = torch.rand(3, 40, generator=generator) < 0.8
    for num_anchors in (None, 5):
        for epoch in (0, 1):
            found = adapter.sampled_blocks(input_ids, mask, [0, 5, 1_000_003], num_anchors, seed=3, epoch=epoch)
            values |= {f"{num_anchors} anchors, epoch {epoch}: {name}": plain(value) for name, value in found.items()}
    return values


# -- arithmetic and rows ----------------------------------------------------------------------------------------------


def record_acceptance() -> dict[str, Any]:
    """Acceptance, the posterior of replay, and draws, on numbers of their own."""
    generator, values = torch.Generator().manual_seed(6), {}
    p, q = 2 * torch.randn(64, 5, 24, generator=generator), 2 * torch.randn(64, 4, 24, generator=generator)
    q = torch.where(torch.rand(64, 1, 1, generator=generator) < 0.5, p[:, :-1] + 0.3 * q, q)
    uniforms = torch.rand(3, 64, 4, generator=generator, dtype=torch.float64)
    for name, options in {"plain": {"temperature": 1.0}, "filtered": {"temperature": 0.7, "top_p": 0.9}}.items():
        found = adapter.accept_and_draw(p, q, uniforms, adapter.make_sampling(**options))
        values |= {f"{name} {quantity}": plain(value) for quantity, value in found.items()}
    return values


def record_losses() -> dict[str, Any]:
    """Every divergence with its gradients, over the full and a reduced vocabulary, in chunks."""
    values = {}
    for loss_type in adapter.LOSS_TYPES:
        for is_reduced in (False, True):
            generator = torch.Generator().manual_seed(1)
            ids = REDUCED.nonzero()[:, 0] if is_reduced else torch.arange(VOCAB)
            hidden = torch.randn(37, 8, generator=generator, requires_grad=True)
            head = torch.randn(len(ids), 8, generator=generator, requires_grad=True)
            target_hidden, target_head = (torch.randn(n, 12, generator=generator) for n in (20, VOCAB))
            rows = torch.randint(0, 20, (37,), generator=generator)
            labels = ids[torch.randint(0, len(ids), (37,), generator=generator)]
            weights = torch.rand(37, generator=generator) * (torch.rand(37, generator=generator) < 0.8)
            total, losses, lost_mass = adapter.loss_of_rows(
                hidden, head, target_hidden, target_head, rows, labels, weights, loss_type, ids if is_reduced else None
            )
            total.backward()
            found = {"total": float(total), "rows": losses, "hidden gradient": hidden.grad, "head gradient": head.grad}
            if is_reduced:
                found["lost mass"] = lost_mass
            label = f"{loss_type}, {'reduced' if is_reduced else 'full'}:"
            values |= {f"{label} {name}": plain(value) for name, value in found.items()}
    return values


def record_rows() -> dict[str, Any]:
    """Rows of every form, as both trainers read them, with those that are skipped."""
    user, system = {"role": "user", "content": "w9 w10"}, {"role": "system", "content": "w7"}
    answer, other = {"role": "assistant", "content": "w11 w12 w13"}, {"role": "assistant", "content": "w14"}
    forms = {
        "text": [{"text": "w9 w10 w11 w12"}, {"text": "w13"}],
        "prompt": [{"prompt": "w9 w10", "completion": " w11 w12"}, {"prompt": "w13 w13 w13 w13", "completion": "w7"}],
        "prompt alone": [{"prompt": "w9 w10"}, {"prompt": "w9 w10"}, {"prompt": "w11"}],
        "chat prompt": [{"prompt": [system, user], "completion": [answer]}, {"prompt": [user], "completion": [other]}],
        "chat": [{"messages": [user, answer]}, {"messages": [system, user, answer, user, other]}],
        "open chat": [{"messages": [user, answer, user]}, {"messages": [user, answer]}],
        "ids": [{"prompt_ids": [9, 10], "completion_ids": [11, 2]}, {"prompt_ids": [9], "completion_ids": [11]}],
        "prompt ids": [{"prompt_ids": [9, 10]}, {"prompt_ids": [9]}],
        "marked ids": [{"input_ids": [9, 10, 11, 12], "completion_mask": [0, 1, 0, 1]}],
    }
    readers = {
        "texts": adapter.read_texts,
        "cut texts": partial(adapter.read_texts, max_length=5),
        "short texts": partial(adapter.read_texts, max_prompt_length=3),
        "prompts": adapter.read_prompts,
        "short prompts": partial(adapter.read_prompts, max_prompt_length=3),
        "prompts and completions": partial(adapter.read_prompts, keeps_completions=True),
    }
    columns = ("input_ids", "completion_mask", "prompt_ids", "completion_ids", "sample_id")
    values = {}
    for form, rows in forms.items():
        for name, read in readers.items():
            try:
                found = [{c: row[c] for c in columns if c in row} for row in read(Dataset.from_list(rows))]
            except ValueError as error:
                found = type(error).__name__
            values[f"{form} as {name}"] = json.dumps(found, sort_keys=True)
    return values


# -- publishing and commands ------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, str]:
    """Return a hash of every file of an export, without the package's version; of a picture only that it is there."""
    values = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = f"file {path.relative_to(folder).as_posix()}", path.read_bytes()
        if path.suffix == ".png":
            values[name] = "a picture"
            continue
        if path.suffix != ".safetensors":
            content = content.replace(adapter.version().encode(), b"VERSION")
        values[name] = digest(content)
        if path.name == "README.md":
            values[f"{name}, front matter"] = digest(content.split(b"---\n")[1])
    return values


def record_export(drafter_name: str) -> dict[str, Any]:
    """Every file of an export in all layouts, and what reading the export back gives."""
    model, drafter = make_causal_lm("qwen3"), make_drafter(drafter_name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        written, refused = adapter.export(drafter, model, out, to="all", repo_id="org/tiny", license="mit")
        values = {"layouts": written, "refused layouts": refused} | files_of(out)
        for layout in written:
            place = out if layout == "flat" else out / layout
            values |= weights_of(adapter.load_drafter(place), f"{layout}, read again:")
    return values


def save_target(folder: Path) -> None:
    make_causal_lm("qwen3").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write_rows(path: Path) -> None:
    rows = [{"prompt": in_words(p), "completion": in_words(a)} for p, a in greedy_texts("qwen3")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def record_commands(family: str) -> dict[str, Any]:
    """The way of a drafter through the commands: made, trained, improved, measured, exported and verified."""
    run = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": "true", "logging_steps": 1}
    run |= {"max_steps": 3, "warmup_steps": 0, "max_completion_length": 12, "learning_rate": 0.01}
    shape = {"dflash": {"num_hidden_layers": 1, "block_size": 4}, "eagle3": {"ttt_steps": 3}}[family]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        save_target(place / "target")
        write_rows(place / "rows.jsonl")
        pair = {"target": place / "target", "dataset": place / "rows.jsonl"}
        if family == "eagle3":
            shape |= {"draft_vocab_size": 40, "dataset": pair["dataset"]}
        codes = {
            "init": adapter.command(
                "init", family=family, target=pair["target"], output=place / "init", seed=3, **shape
            )
        }
        # Steps enough that some drafts are kept.
        codes["sft"] = adapter.command(
            "sft", drafter=place / "init", output_dir=place / "sft", **pair, **run | {"max_steps": 40}
        )
        if family == "eagle3":
            run |= {"use_peft": True, "lora_r": 2, "lora_target_modules": ["fc", "down_proj"]}
        held_out = {"eval_split": "train[:3]", "eval_strategy": "steps", "eval_steps": 3}
        codes["opd"] = adapter.command(
            "opd", drafter=place / "sft", output_dir=place / "opd", **pair, **run, **held_out
        )
        report = place / "report.json"
        case = {
            "temperature": 0.6,
            "draft_sampling": "sample",
            "max_completion_length": 14,
            "num_prompts": 4,
            "json": report,
        }
        codes["evaluate"] = adapter.command("evaluate", drafter=place / "sft", **pair, **case)
        measured = json.loads(report.read_text("utf-8"))
        out = place / "out"
        codes["export"] = adapter.command(
            "export", drafter=place / "opd", target=pair["target"], target_id="org/target", output=out
        )
        codes["verify"] = adapter.command(
            "verify",
            drafter=out,
            checkpoint=place / "opd",
            num_prompts=2,
            max_completion_length=12,
            consumers=["transformers"],
            **pair,
        )
        codes["generate"] = adapter.command(
            "generate", output=place / "store", max_completion_length=12, num_prompts=4, **pair
        )
        values = {f"exit code of {name}": code for name, code in codes.items()}
        for name in ("init", "sft", "opd"):
            weights = load_file(next((place / name).glob("*model.safetensors")))
            values |= {f"{name} {key}": digest_tensor(tensor) for key, tensor in sorted(weights.items())}
        values |= {f"evaluate {key}": plain(value) for key, value in measured.items() if key != "speedup"}
        values |= files_of(out)
        target = adapter.load_target(place / "target", dtype="float32")
        prompts = [prompt for prompt, _ in greedy_texts("qwen3")[:2]]
        options = {"consumers": ["transformers", "custom_generate"], "trust_remote_code": True}
        found = adapter.verify(out, target, prompts, checkpoint=place / "opd", **options)
        values |= {f"verify {key}": plain(value) for key, value in found.items()}
    return values


def in_silence(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a case without its warnings and without what trainers and commands print."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        return case()


def all_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return every case by name."""
    from refusals import record_refusals

    return {
        **{f"train/{name}": partial(record_training, name) for name in TRAININGS},
        **{
            f"rollout/{name}-{case}": partial(record_rollouts, name, case)
            for name in ("eagle3", "eagle3-reduced", "dflash")
            for case in DISTRIBUTIONS
        },
        "responses": record_responses,
        "sampled-blocks": record_sampled_blocks,
        "acceptance": record_acceptance,
        "losses": record_losses,
        "rows": record_rows,
        **{f"export/{name}": partial(record_export, name) for name in DRAFTERS},
        **{f"commands/{family}": partial(record_commands, family) for family in ("eagle3", "dflash")},
        "refusals": record_refusals,
    }
