# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Bad input that must be refused, and how: the type of the exception, or the exit code of a command. Messages may change.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import adapter
import torch
from cases import SETTINGS, greedy_texts, make_drafter, save_target, target_of, write_rows
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PrefixTuningConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from helpers.tiny import EOS, MASK, VOCAB, make_causal_lm, make_tokenizer


Attempt = Callable[[], Any]
ROWS = {"prompt": ["w9 w10", "w11"], "completion": ["w20 w21", "w22 w23"]}

SETTINGS_REFUSED = {
    "sft": [
        {"accepted_loss": "kl"},
        {"position_decay": 0.0},
        {"position_decay": 1.5},
        {"temperature": -1.0},
        {"temperature": 1e-7},
        {"top_k": -1},
        {"top_p": 0.0},
        {"draft_sampling": "argmax"},
        {"max_prompt_length": 0},
        {"max_completion_length": 0},
        {"generation_batch_size": 0},
        {"loss_chunk_bytes": 0},
        {"num_drafts": 0},
        {"num_anchors": -1},
        {"max_length": 1},
        {"slot_scope": "all"},
        {"slot_weighting": "linear"},
        {"d_pace_floor": 2.0},
        {"on_nonfinite": "ignore"},
        {"max_skipped_updates": -1},
        {"hub_target_id": "a/b/c"},
        {"save_on_each_node": True},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"no_such_setting": 1},
    ],
    "opd": [
        {"rejected_loss": "k3"},
        {"rollout": "offline"},
        {"rejected_scope": "last"},
        {"supervised_anchors": "all"},
        {"num_supervised_anchors": -1},
        {"reading_bytes": -1},
        {"replay_segment_length": 0},
        {"warn_mismatch_share": 0.5},
        {"accepted_weight": -1.0},
        {"accepted_weight": 0.0, "rejected_weight": 0.0},
        {"rollout": "live", "completions_from_target": True},
        {"trajectories": "t", "completions_from_target": True},
        {"slot_weighting": "d_pace", "rejected_scope": "suffix"},
        {"no_such_setting": 1},
    ],
}


def outcome_of(attempt: Attempt) -> str:
    """Return the type of the exception an attempt ends in, the exit code of a command, or that it was taken."""
    try:
        code = attempt()
    except SystemExit as end:
        code = end.code or 0
    except Exception as error:
        return adapter.recorded_name(adapter.EXCEPTIONS, type(error).__name__)
    return f"exit code {code}" if type(code) is int else "accepted"


def record_refusals() -> dict[str, str]:
    """How each bad input is refused; that files which are there already are left as they were."""
    with tempfile.TemporaryDirectory() as place:
        attempts = all_refusals(Path(place))
        return {name: outcome_of(attempt) for name, attempt in attempts.items()}


def all_refusals(place: Path) -> dict[str, Attempt]:
    groups = {
        "setting": refused_settings(place),
        "pair": refused_pairs(place),
        "data": refused_data(place),
        "adapter": refused_adapters(place),
        "rollout": refused_rollouts(),
        "checkpoint": refused_checkpoints(place),
        "export": refused_exports(place),
        "verify": refused_verifications(place),
        "command": refused_commands(place),
    }
    return {f"{group}: {name}": attempt for group, attempts in groups.items() for name, attempt in attempts.items()}


def refused_settings(place: Path) -> dict[str, Attempt]:
    return {
        f"{method} {json.dumps(settings)}": partial(adapter.make_config, method, place / "out", **settings)
        for method, cases in SETTINGS_REFUSED.items()
        for settings in cases
    }


def other_target(num_layers: int = 8, vocab_size: int = VOCAB, hidden_size: int = 32):
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=1,
    )
    return adapter.make_frozen_target(Qwen3ForCausalLM(config), make_tokenizer())


def attempt_training(place: Path, method: str, drafter, target=None, rows=None, trains=False, **options: Any) -> None:
    rows = Dataset.from_dict(ROWS) if rows is None else rows
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    extra = {name: options.pop(name) for name in ("tokenizer", "peft_config") if name in options}
    settings = SETTINGS | {"max_steps": 1} | options
    trainer = adapter.make_trainer(
        method, drafter, target or target_of("qwen3"), place / "out", rows, None, **extra, **settings
    )
    if trains:
        trainer.train()


def refused_pairs(place: Path) -> dict[str, Attempt]:
    target, build = target_of("qwen3"), adapter.make_drafter
    words = {f"w{i}": i for i in range(100)} | {"<unk>": 100, "</s>": 101}
    large = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>", eos_token="</s>"
    )
    train = partial(attempt_training, place)

    def ended_by_mask() -> None:
        model = make_causal_lm()
        own = adapter.make_frozen_target(model, make_tokenizer())
        drafter = build("dflash", own)
        model.generation_config.eos_token_id = [EOS, MASK]
        train("sft", drafter, own)

    def not_finite(method: str) -> None:
        drafter = make_drafter("eagle3")
        with torch.no_grad():
            drafter.norm.weight[0] = float("nan")
        train(method, drafter, trains=True)

    return {
        "another vocabulary": lambda: train("sft", build("eagle3", other_target(vocab_size=80))),
        "another width": lambda: train("opd", build("dflash", other_target(hidden_size=16))),
        "layers of another target": lambda: train("opd", build("eagle3", other_target(num_layers=12))),
        "layer ids out of range": lambda: build("dflash", target, target_layer_ids=[1, 3, 7]),
        "layer ids out of order": lambda: build("eagle3", target, target_layer_ids=[3, 1, 5]),
        "a small target": lambda: build("eagle3", other_target(num_layers=4)),
        "a mask token outside the vocabulary": lambda: build("dflash", target, mask_token_id=VOCAB),
        "a mask token that ends text": lambda: build("dflash", target, mask_token_id=EOS),
        "a mask token that ends text by the generation config": ended_by_mask,
        "a mask token in the data": lambda: train("sft", build("dflash", target, mask_token_id=11)),
        "a block without drafts": lambda: build("dflash", target, block_size=1),
        "a block longer than all positions": lambda: build("dflash", target, block_size=257),
        "no step": lambda: build("eagle3", target, ttt_steps=0),
        "more drafts than a block holds": lambda: train("opd", make_drafter("dflash"), num_drafts=5),
        "a model that is no drafter": lambda: train("sft", make_causal_lm()),
        "no tokenizer": lambda: train("opd", make_drafter("dflash"), make_causal_lm()),
        "a tokenizer that is too large": lambda: train(
            "sft", make_drafter("eagle3"), adapter.make_frozen_target(make_causal_lm(), large)
        ),
        "a drafter that does not exist": lambda: train("sft", place / "nowhere"),
        "a loss that is not finite in sft": lambda: not_finite("sft"),
        "a loss that is not finite in opd": lambda: not_finite("opd"),
    }


def refused_data(place: Path) -> dict[str, Attempt]:
    drafter = make_drafter("dflash")
    train = partial(attempt_training, place)
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "w9", "completion": "w10"}]))
    chat = [{"messages": [{"role": "user", "content": "w9"}, {"role": "gpt", "content": "w10"}]}]
    foreign = [{"prompt_ids": prompt, "completion_ids": [7, 8, 9, 10]} for prompt, _ in greedy_texts("qwen3")]
    (place / "cut.jsonl").write_text('{"prompt": "w9"}\n{"prompt": "w1', "utf-8")

    def answers_of_another() -> None:
        train("opd", drafter, trains=True)
        other = adapter.make_target(seed=5)
        train("opd", adapter.make_drafter("dflash", other), other, trains=True)

    return {
        "no rows": lambda: train("sft", drafter, rows=Dataset.from_dict({"prompt": [], "completion": []})),
        "an empty prompt": lambda: train("opd", drafter, rows=[{"prompt": "w9"}, {"prompt": ""}]),
        "missing columns": lambda: train("sft", drafter, rows=[{"question": "w9"}]),
        "prompts that are all too long": lambda: train(
            "sft", drafter, max_prompt_length=1, rows=[{"prompt": "w9 w9", "completion": "w8"}]
        ),
        "ids outside the vocabulary": lambda: train(
            "sft", drafter, rows=[{"prompt_ids": [64], "completion_ids": [8]}]
        ),
        "replay without completions": lambda: train(
            "opd", drafter, rows=[{"prompt": "w9"}], completions_from_target=True
        ),
        "text of another model": lambda: train(
            "opd", drafter, rows=foreign, completions_from_target=True, trains=True
        ),
        "responses of another target": answers_of_another,
        "a stream to be regenerated": lambda: train("sft", drafter, rows=stream, regenerate=True),
        "a role that the template does not know": lambda: adapter.read_texts(Dataset.from_list(chat)),
        "a NUL character": lambda: adapter.read_prompts(Dataset.from_list([{"prompt": "w9 w\x008"}])),
        "messages that are none": lambda: adapter.read_texts(Dataset.from_list([{"messages": "hi"}])),
        "marks that do not fit": lambda: adapter.read_texts(
            Dataset.from_list([{"input_ids": [7, 8, 9], "completion_mask": [0, 1]}])
        ),
        "a file that was cut off": lambda: adapter.load_rows(str(place / "cut.jsonl"), None, "train"),
        "a file that is not there": lambda: adapter.load_rows(str(place / "none.jsonl"), None, "train"),
    }


def refused_adapters(place: Path) -> dict[str, Attempt]:
    make_drafter("dflash").save_pretrained(place / "base")

    def train(config, drafter=None) -> None:
        drafter = adapter.load_drafter(place / "base") if drafter is None else drafter
        attempt_training(place, "sft", drafter, peft_config=config)

    return {
        "prompt learning": lambda: train(PrefixTuningConfig(num_virtual_tokens=2)),
        "a task": lambda: train(LoraConfig(task_type="CAUSAL_LM")),
        "rewritten weights": lambda: train(LoraConfig(init_lora_weights="pissa")),
        "a layer it lacks": lambda: train(LoraConfig(target_modules=["fc", "lm_head"])),
        "nothing to train": lambda: train(LoraConfig(inference_mode=True)),
        "a drafter that was never saved": lambda: train(LoraConfig(), make_drafter("dflash")),
    }


def refused_rollouts() -> dict[str, Attempt]:
    target, drafter, greedy = target_of("qwen3"), make_drafter("dflash"), adapter.make_sampling()
    live = partial(adapter.roll_out_live, target, drafter, keeps_branches=False)
    return {
        "no prompt": lambda: live([], greedy, "greedy"),
        "an empty prompt": lambda: live([[9], []], greedy, "greedy"),
        "more drafts than a block holds": lambda: live([[9]], greedy, "greedy", num_drafts=5),
        "more tokens than the target's positions": lambda: live([[9]], greedy, "greedy", max_completion_length=256),
        "no new tokens": lambda: live([[9]], greedy, "greedy", max_completion_length=0),
        "a response to an empty prompt": lambda: adapter.respond(target, [[]], greedy, batch_size=1, seed=0),
        "an evaluation without prompts": lambda: adapter.evaluate(target, drafter, [], greedy, "greedy"),
        "a loss of an unknown kind": lambda: adapter.loss_of_rows(
            *torch.ones(4, 3, 2), None, None, torch.ones(3), "kl", None
        ),
    }


def refused_checkpoints(place: Path) -> dict[str, Attempt]:
    folders = {}
    for name in ("not finite", "another tensor", "a misspelt key", "no config", "a pickle"):
        folders[name] = place / name
        make_drafter("eagle3").save_pretrained(folders[name])
    weights = load_file(folders["not finite"] / "model.safetensors")
    fc = weights["fc.weight"]
    changes = {"not finite": {"fc.weight": fc * float("nan")}, "another tensor": {"extra.weight": fc.clone()}}
    for name, change in changes.items():
        save_file(weights | change, folders[name] / "model.safetensors", metadata={"format": "pt"})
    path = folders["a misspelt key"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_outptu": True}))
    (folders["no config"] / "config.json").unlink()
    (folders["a pickle"] / "model.safetensors").rename(folders["a pickle"] / "pytorch_model.bin")
    return {name: partial(adapter.load_drafter, folder) for name, folder in folders.items()}


def refused_exports(place: Path) -> dict[str, Attempt]:
    model = make_causal_lm("qwen3")
    (place / "foreign").mkdir()
    (place / "foreign" / "thesis.tex").write_text("years of work")
    make_drafter("dflash").save_pretrained(place / "checkpoint")
    deeper = make_causal_lm("qwen3").config
    deeper.num_hidden_layers = 9

    def not_finite() -> None:
        drafter = make_drafter("dflash")
        with torch.no_grad():
            drafter.fc.weight[0, 0] = torch.nan
        adapter.export(drafter, model, place / "export")

    def export(name: str, folder: str = "export", **options: Any) -> None:
        adapter.export(make_drafter(name), model, place / folder, **options)

    return {
        "into a folder with other things": lambda: export("dflash", "foreign"),
        "into a checkpoint": lambda: export("dflash", "checkpoint"),
        "an unknown layout": lambda: export("dflash", to="onnx"),
        "eagle3 for transformers": lambda: export("eagle3", to="transformers"),
        "eagle3 without an embedding": lambda: export("eagle3", embedding=None),
        "an embedding of another shape": lambda: export("eagle3", embedding=torch.zeros(VOCAB, 31)),
        "speculators without a target": lambda: export("dflash", to="speculators", target_id=None),
        "another target": lambda: export("dflash", target_config=deeper),
        "scaled embeddings": lambda: adapter.export(
            make_drafter("dflash", "gemma2"), make_causal_lm("gemma2"), place / "export", to="flat"
        ),
        "weights that are not finite": not_finite,
    }


def refused_verifications(place: Path) -> dict[str, Attempt]:
    save_target(place / "verified target")
    adapter.export(make_drafter("dflash"), make_causal_lm("qwen3"), place / "exported")
    target = adapter.load_target(place / "verified target", dtype="float32")
    half = adapter.load_target(place / "verified target", dtype="bfloat16")
    verify = adapter.verify
    return {
        "an unknown consumer": lambda: verify(place / "exported", target, [[9]], consumers=["llamacpp"]),
        "no prompt": lambda: verify(place / "exported", target, []),
        "a target in bfloat16": lambda: verify(place / "exported", half, [[9]]),
        "no folder": lambda: verify(place / "nowhere", target, [[9]]),
    }


def refused_commands(place: Path) -> dict[str, Attempt]:
    save_target(place / "target")
    write_rows(place / "rows.jsonl")
    make_drafter("dflash").save_pretrained(place / "drafter")
    other = other_target(vocab_size=80)
    adapter.make_drafter("dflash", other).save_pretrained(place / "other drafter")
    (place / "bad.yaml").write_text("rejected_scop: first\n")
    command, names = adapter.command, {"target": "t", "dataset": "d", "use_cpu": True}
    there = {"target": place / "target", "dataset": place / "rows.jsonl"}
    saved = {"drafter": place / "drafter", "target": place / "target", "output": place / "out of command"}

    def broken_export() -> int:
        """Return what verifying an export with a spoilt config ends in."""
        shutil.copytree(place / "exported", place / "spoilt", dirs_exist_ok=True)
        for path in (place / "spoilt").rglob("config.json"):
            config = json.loads(path.read_text())
            # In all the places that a layout writes it, so that no contradiction gives it away.
            for section in (config, config.get("dflash_config", {})):
                for key in ("target_layer_ids", "aux_hidden_state_layer_ids"):
                    if key in section:
                        section[key][0] -= 1
            path.write_text(json.dumps(config))
        options = {
            "checkpoint": place / "drafter",
            "consumers": ["transformers"],
            "max_completion_length": 12,
            "num_prompts": 2,
        }
        return command("verify", drafter=place / "spoilt", **there, **options)

    return {
        "no command": lambda: adapter.main([]),
        "an unknown command": lambda: adapter.main(["train"]),
        "help": lambda: adapter.main(["--help"]),
        "help of a command": lambda: adapter.main(["opd", "--help"]),
        "an unknown flag": lambda: command("opd", drafter="m", **names, positon_decay=0.5),
        "an unknown flag of evaluate": lambda: command("evaluate", drafter="m", target="t", dataset="d", sed=1),
        "the beginning of a flag": lambda: command("opd", drafter="m", **names, position_dec=0.5),
        "a missing flag": lambda: command("evaluate", drafter="m", target="t"),
        "a missing flag of sft": lambda: command("sft", drafter="m", target="t", use_cpu=True),
        "a flag that is no number": lambda: command("evaluate", drafter="m", target="t", dataset="d", seed="x"),
        "an unknown family": lambda: command("init", family="medusa", target="t", output=place / "init"),
        "a value out of range": lambda: command("opd", drafter="m", **names, position_decay=2),
        "an unknown key of a config file": lambda: command("opd", drafter="m", **names, config=place / "bad.yaml"),
        "no config file": lambda: command("sft", drafter="m", **names, config=place / "missing.yaml"),
        "sft of nothing": lambda: command("sft", **names),
        "sft of a drafter and a fresh one": lambda: command("sft", **names, family="dflash", drafter="m"),
        "opd of a fresh drafter": lambda: command("opd", **names, family="dflash"),
        "an adapter that was not asked for": lambda: command("sft", drafter="m", **names, lora_r=2),
        "a vocabulary without text": lambda: command(
            "init", family="eagle3", target="t", output=place / "init", draft_vocab_size=9
        ),
        "a demo of a target without text": lambda: command("demo", target="t"),
        "a dataset that is not there": lambda: command(
            "evaluate", drafter=place / "drafter", target=place / "target", dataset=place / "none.jsonl"
        ),
        "a split that is not there": lambda: command("evaluate", drafter=place / "drafter", split="test", **there),
        "a drafter of another target": lambda: command("evaluate", drafter=place / "other drafter", **there),
        "a target that is not there": lambda: command(
            "evaluate", drafter=place / "drafter", target=place / "none", dataset=place / "rows.jsonl"
        ),
        "a server without an address": lambda: command("generate", **there, output=place / "store", engine="vllm"),
        "an export under a name that engines misread": lambda: command("export", **saved, repo_id="org/My-EAGLE-3"),
        "an export for a target by path": lambda: command("export", **saved, target_id="/somewhere/else"),
        "an export for speculators without an id": lambda: command("export", **saved, to="speculators"),
        "a push of no export": lambda: command("push", drafter=place / "foreign", repo_id="org/tiny-dflash"),
        "a push under a bad name": lambda: command("push", drafter=place / "exported", repo_id="org/../x"),
        "a verification of nothing": lambda: command("verify", drafter=place / "none", **there),
        "a verification of a spoilt export": broken_export,
    }
