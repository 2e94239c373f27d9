# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Every call of the guard into the package.

A name that changes in the package changes here and nowhere else in this folder. What is recorded, and what the cases
ask for, keeps the names it was first recorded under.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import trl_draft_opd
from helpers.tiny import make_drafter, make_target, make_tokenizer  # noqa: F401
from trl_draft_opd import (
    AutoDrafter,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    DraftVocabulary,
    FrozenTarget,
    SamplingSettings,
    evaluate_drafter,
    export_drafter,
    generate_responses,
    verify_drafter,
)
from trl_draft_opd.cli import main
from trl_draft_opd.cli.rows import load_rows  # noqa: F401
from trl_draft_opd.data.text_reader import TextReader
from trl_draft_opd.export import TargetOfExport
from trl_draft_opd.losses import Head, chunked_divergence
from trl_draft_opd.losses.divergences import LOSS_TYPES  # noqa: F401
from trl_draft_opd.rollout.acceptance import (
    choose_tokens,
    sample_posterior,
    settle_blocks,
    token_probs,
    verify_greedy,
    verify_sampled,
)
from trl_draft_opd.rollout.blocks import mark_slots, sample_anchors
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.live import rollout_live
from trl_draft_opd.rollout.replay import TargetText, rollout_replay


# Today's name of a setting, a metric (without `eval_`) or an exception, by its name in the record. What is not listed
# kept its name.
SETTINGS: dict[str, str] = {"trajectories": "responses"}
METRICS: dict[str, str] = {}
EXCEPTIONS: dict[str, str] = {}
# Today's flag of a command, by the name the cases use. `None` stands for a positional argument. What is not listed is
# given as `--NAME`.
FLAGS: dict[tuple[str, str], str | None] = {}


def recorded_name(names: dict[str, str], today: str) -> str:
    """Return the name in the record of what is called `today` in one of the tables above."""
    return {new: old for old, new in names.items()}.get(today, today)


def recorded_metric(today: str) -> str:
    """Return the name in the record of a metric that a trainer logs."""
    prefix = "eval_" if today.startswith("eval_") else ""
    return prefix + recorded_name(METRICS, today.removeprefix(prefix))


def version() -> str:
    return trl_draft_opd.__version__


def installed_versions() -> dict[str, str]:
    """Return the versions of what numbers rest on."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def command(name: str, **flags: Any) -> int:
    """Run a command of the command line, e.g. `command("sft", target="t", max_steps=1, use_cpu=True)`."""
    words = [name]
    for key, value in flags.items():
        key = SETTINGS.get(key, key).replace("_", "-")
        flag = FLAGS.get((name, key), f"--{key}")
        values = [] if value is True else [str(part) for part in (value if isinstance(value, list) else [value])]
        words += values if flag is None else [flag, *values]
    return main(words)


# -- training ---------------------------------------------------------------------------------------------------------


def make_config(method: str, folder: str | Path, **settings: Any):
    settings = {SETTINGS.get(name, name): value for name, value in settings.items()}
    if method == "sft":
        return DraftSFTConfig(str(folder), **settings)
    # The default when the record was made.
    return DraftOPDConfig(str(folder), **{"rejected_loss": "reverse_kl"} | settings)


def make_trainer(
    method, drafter, target, folder, rows, eval_rows=None, tokenizer=None, peft_config=None, **settings: Any
):
    trainer_class = DraftSFTTrainer if method == "sft" else DraftOPDTrainer
    args = make_config(method, folder, **settings)
    return trainer_class(drafter, target, args, rows, eval_rows, processing_class=tokenizer, peft_config=peft_config)


def make_reduced_vocabulary(is_known: torch.Tensor) -> DraftVocabulary:
    """Return a draft vocabulary of the ids that are marked."""
    ids = is_known.nonzero()[:, 0]
    return DraftVocabulary(d2t=ids - torch.arange(len(ids)), t2d=is_known, coverage=1.0)


def load_drafter(folder: str | Path, **options: Any):
    return AutoDrafter.from_pretrained(folder, **options)


def load_target(folder: str | Path, **options: Any) -> FrozenTarget:
    return FrozenTarget.load(str(folder), **options)


def make_frozen_target(model, tokenizer) -> FrozenTarget:
    return FrozenTarget(model, tokenizer)


# -- rollouts and blocks ----------------------------------------------------------------------------------------------


def make_sampling(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> SamplingSettings:
    return SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)


def roll_out_live(
    target,
    drafter,
    prompts,
    sampling,
    draft_sampling,
    *,
    keeps_branches,
    num_drafts=4,
    max_completion_length=20,
    seed=7,
):
    return rollout_live(
        target,
        drafter,
        prompts,
        DraftingSettings(num_drafts, sampling, draft_sampling, keeps_branches),
        DrawKeys(seed, 3, range(len(prompts))),
        max_completion_length=max_completion_length,
        eos_token_ids=target.eos_token_ids,
    )


def replay(target, drafter, text, sampling, draft_sampling, *, keeps_branches, segment_length, num_drafts=4, seed=7):
    """Replay the text of a live rollout."""
    rows = range(len(text.input_ids))
    return rollout_replay(
        target,
        drafter,
        TargetText(text.input_ids, text.attention_mask, text.completion_mask, rows),
        DraftingSettings(num_drafts, sampling, draft_sampling, keeps_branches),
        DrawKeys(seed, 3, rows),
        segment_length=segment_length,
        chunk_bytes=4096,
    )


def rollout_values(rollout) -> dict[str, Any]:
    """Return what a rollout defines, by recorded name: entries that may hold anything are 0."""
    slots = torch.arange(1, rollout.drafts.shape[-1] + 1)
    accepted, is_block = rollout.accepted[..., None], rollout.is_block[..., None]
    is_branch = (slots > accepted + 1) & is_block & ~rollout.is_censored[..., None]
    is_drafted = is_block & (rollout.has_suffix | (slots <= accepted + 1 - rollout.is_censored[..., None].long()))
    names = "input_ids attention_mask completion_mask anchors accepted is_censored is_counted".split()
    names += ["num_refused", "num_target_forwards"]
    values = {name: getattr(rollout, name) for name in names}
    values["drafts"] = rollout.drafts * is_drafted
    if rollout.branch_hidden is not None:
        values["branch_hidden"] = rollout.branch_hidden.masked_fill(~is_branch[..., None], 0)
    return values


def _block_values(blocks) -> dict[str, torch.Tensor]:
    names = "anchors drafts labels is_accepted is_rejected is_branch"
    return {name: getattr(blocks, name) for name in names.split()}


def marked_slots(rollout, scope: str, eos_token_ids) -> dict[str, torch.Tensor]:
    """Return which slots of a rollout are trained, by recorded name."""
    values = _block_values(mark_slots(rollout, rejected_scope=scope, eos_token_ids=eos_token_ids))
    values["drafts"] = rollout_values(rollout)["drafts"]
    return values


def sampled_blocks(input_ids, completion_mask, sample_ids, num_anchors, seed, epoch) -> dict[str, torch.Tensor]:
    """Return the blocks of supervised training, by recorded name."""
    keys = {"num_anchors": num_anchors, "num_drafts": 4, "seed": seed, "epoch": epoch}
    return _block_values(sample_anchors(input_ids, completion_mask, sample_ids, **keys))


def respond(target, prompts, sampling, *, batch_size: int, seed: int) -> list[list[int]]:
    return generate_responses(
        target,
        prompts,
        max_completion_length=20,
        sampling=sampling,
        batch_size=batch_size,
        seed=seed,
        show_progress=False,
    )


def evaluate(target, drafter, prompts, sampling, draft_sampling) -> dict[str, Any]:
    """Return the report of an evaluation, without what a clock says."""
    options = {"max_completion_length": 20, "batch_size": 3, "num_resamples": 200, "seed": 5, "show_progress": False}
    report = evaluate_drafter(
        target, drafter, prompts, sampling=sampling, draft_sampling=draft_sampling, **options
    ).to_dict()
    return {name: value for name, value in report.items() if name != "speedup"}


# -- arithmetic -------------------------------------------------------------------------------------------------------


def accept_and_draw(p, q, uniforms, sampling) -> dict[str, torch.Tensor]:
    """
    Return the results of every function that decides on drafts.

    Args:
        p (`torch.Tensor` of shape `(B, K + 1, V)`): Logits of the target.
        q (`torch.Tensor` of shape `(B, K, V)`): Logits of the drafter.
        uniforms (`torch.Tensor` of shape `(3, B, K)`): Numbers in [0, 1).
        sampling: The settings that turn logits into probabilities.
    """
    target_probs, draft_probs = token_probs(p, sampling), token_probs(q, sampling)
    drafts = choose_tokens(draft_probs, uniforms[0])
    committed = choose_tokens(target_probs[:, :-1], uniforms[2])
    num_blocks, num_drafts = committed.shape
    is_in_text = torch.arange(num_drafts) < torch.arange(num_blocks)[:, None] % (num_drafts + 1)
    kept, following = verify_sampled(drafts, draft_probs, target_probs, uniforms[1], uniforms[2, :, 0])
    argmax_kept, argmax_following = verify_sampled(
        q.argmax(dim=-1), None, target_probs, uniforms[1], uniforms[2, :, 0]
    )
    greedy_kept, greedy_following = verify_greedy(q.argmax(dim=-1), p.argmax(dim=-1))
    posterior_drafts, posterior_kept = sample_posterior(
        committed, draft_probs, target_probs[:, :-1], uniforms[0], uniforms[1], is_in_text
    )
    anchors = torch.arange(num_blocks) % 3
    outcome = settle_blocks(kept, anchors, anchors + torch.arange(num_blocks) % 5, num_drafts)
    return {
        "target probabilities": target_probs,
        "drafts": drafts,
        "sampled: kept": kept,
        "sampled: next token": following,
        "argmax drafts: kept": argmax_kept,
        "argmax drafts: next token": argmax_following,
        "greedy: kept": greedy_kept,
        "greedy: next token": greedy_following,
        "posterior: drafts": posterior_drafts,
        "posterior: kept": posterior_kept,
        "settled: accepted": outcome.accepted,
        "settled: is_censored": outcome.is_censored,
        "settled: is_counted": outcome.is_counted,
    }


def loss_of_rows(hidden, head, target_hidden, target_head, rows, labels, weights, loss_type, draft_token_ids):
    """Return the weighted loss (differentiable), the losses, and the target's mass outside the draft vocabulary."""
    result = chunked_divergence(
        hidden,
        Head.linear(head),
        target_hidden,
        Head.linear(target_head),
        target_rows_N=rows,
        labels_N=labels,
        weights_N=weights,
        loss_type=loss_type,
        draft_token_ids=draft_token_ids,
        chunk_bytes=16384,
    )
    return result.total, result.rows_N, result.lost_mass_N


# -- data -------------------------------------------------------------------------------------------------------------


def read_texts(rows: Dataset, max_length: int | None = None, max_prompt_length: int | None = None) -> list[dict]:
    """Return rows as supervised training reads them: ids, marks and sample ids."""
    reader = TextReader(make_tokenizer(), (2,), 64, max_length=max_length, max_prompt_length=max_prompt_length)
    return list(reader.read_texts(rows))


def read_prompts(rows: Dataset, keeps_completions: bool = False, max_prompt_length: int | None = None) -> list[dict]:
    """Return rows as rollouts read them: prompt ids and sample ids, with or without the completion."""
    reader = TextReader(make_tokenizer(), (2,), 64, max_prompt_length=max_prompt_length)
    return list(reader.read_responses(rows) if keeps_completions else reader.read_prompts(rows))


# -- publishing -------------------------------------------------------------------------------------------------------


def export(drafter, target_model, folder, **options: Any):
    """Export a drafter of an unwrapped target; returns the layouts that were written and those that were refused."""
    facts = {
        "hub_id": options.pop("target_id", "org/target"),
        "config": options.pop("target_config", target_model.config),
        "embedding": options.pop("embedding", target_model.get_input_embeddings().weight),
    }
    result = export_drafter(drafter, folder, target=TargetOfExport(**facts), **options)
    return sorted(result.layouts), sorted(result.refused)


def verify(folder, target, prompts, **options: Any) -> dict[str, Any]:
    """Return what a verification counted, by recorded name."""
    report = verify_drafter(folder, target, prompts, max_completion_length=18, **options)
    values: dict[str, Any] = {"ok": report.ok, "num_drafts": report.num_drafts}
    for row in report.rows:
        numbers = [row.tau, *row.acceptance_per_slot, row.num_rounds, row.num_different, row.num_other_chains]
        values[f"row {row.name}"] = [None if number is None else float(number) for number in numbers]
    return values
