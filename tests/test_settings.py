# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What no setting can be, whoever gives it: not finite, empty, or a zero that is taken for "unset"; options of
transformers' Trainer that do nothing for a drafter; and what `--help` says about each flag.
"""

import math
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from helpers.tiny import TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer, verify_drafter
from trl_draft_opd.cli import arguments, bench, decoding, demo, publishing, training
from trl_draft_opd.cli.arguments import parse
from trl_draft_opd.demo.run import DemoSettings
from trl_draft_opd.demo.tiny_target import TinyTargetSettings
from trl_draft_opd.parity import EngineSettings
from trl_draft_opd.trainer.metrics import best_model_metrics
from trl_draft_opd.trainer.unusable_options import UNUSABLE_OPTIONS


CONFIGS = {"sft": DraftSFTConfig, "opd": DraftOPDConfig}
ROWS = [{"prompt": "w9 w10", "completion": "w20 w21"}, {"prompt": "w11", "completion": "w22"}]
# Each command's dataclasses, and the flags it cannot do without.
TARGET, DRAFTER, DATASET = ["--target", "t"], ["--drafter", "d"], ["--dataset", "r"]
COMMANDS = {
    "demo": ([demo.DemoArguments], []),
    "generate": ([decoding.GenerateArguments], [*TARGET, *DATASET, "--output", "o"]),
    "init": ([training.InitArguments], [*TARGET, "--family", "eagle3", "--output", "o"]),
    "sft": ([training.SFTArguments, DraftSFTConfig], [*TARGET, *DATASET, "--use-cpu"]),
    "opd": ([training.OPDArguments, DraftOPDConfig], [*TARGET, *DATASET, *DRAFTER, "--use-cpu"]),
    "evaluate": ([decoding.EvaluateArguments], [*TARGET, *DATASET, *DRAFTER]),
    "bench": ([bench.BenchArguments], [*TARGET, *DATASET, "--base-url", "http://a"]),
    "export": ([publishing.ExportArguments], [*DRAFTER, "--output", "o"]),
    "verify": ([publishing.VerifyArguments], [*TARGET, *DATASET, *DRAFTER]),
    "push": ([publishing.PushArguments], [*DRAFTER, "--repo-id", "me/it"]),
}
# Flags whose 0 is a value of its own, or is refused by what they are handed to.
ZERO_IS_ZERO = {
    *(
        "temperature",
        "top_k",
        "seed",
        "data_seed",
        "check_rows",
        "report_text",
        "num_anchors",
        "num_supervised_anchors",
    ),
    *("max_skipped_updates", "reading_bytes", "draft_vocab_size", "d_pace_floor", "warn_mismatch_share"),
    *("accepted_weight", "rejected_weight", "supervised_weight", "mask_token_id", "target_layer_ids", "lora_dropout"),
    *("confidence_loss_weight", "selector_loss_weight", "markov_rank", "warmup"),
    *("learning_rate", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("label_smoothing_factor", "eval_delay", "dataloader_num_workers", "ddp_bucket_cap_mb", "ddp_timeout"),
    *("local_rank", "lora_alpha", "dataloader_prefetch_factor"),
}
REFUSED_LATER = {
    *("top_p", "timeout", "concurrency", "num_prompts", "max_completion_length", "sft_epochs", "opd_epochs"),
    *("block_size", "num_hidden_layers", "ttt_steps", "selector_rank", "selector_top_k", "lora_r"),
}


def refuses(match):
    return pytest.raises(ValueError, match=match)


def make_args(kind, tmp_path, **changes):
    return CONFIGS[kind](str(tmp_path), **TINY_RUN, **changes)


def every_flag(kinds):
    """Return the command and the name of every flag whose type has one of these names."""
    for command, (types, _) in COMMANDS.items():
        for owner in types:
            hints = get_type_hints(owner)
            for setting in fields(owner):
                if setting.init and any(kind in str(hints[setting.name]) for kind in kinds):
                    yield command, setting.name


def parse_with(command, name, value):
    types, needed = COMMANDS[command]
    return parse(command, types, [*needed, f"--{name}={value}"])


# ---- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_flag_takes_a_number_that_is_not_finite(value):
    flags = list(every_flag(["float"]))
    assert len(flags) > 40
    for command, name in flags:
        # The parser ends the process where the number is not even a whole one.
        with pytest.raises((ValueError, SystemExit), match="must be a finite number|2"):
            parse_with(command, name, value)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_these_tests_are_taken_without_what_they_add(command):
    types, needed = COMMANDS[command]
    parse(command, types, needed)


def test_no_flag_takes_an_empty_text(capsys):
    # `debug` is empty by default.
    flags = [(command, name) for command, name in every_flag(["str"]) if name not in ("debug", "liger_kernel_config")]
    for command, name in flags:
        with pytest.raises((ValueError, SystemExit)):
            parse_with(command, name, "")


def test_a_zero_is_a_value_of_its_own_or_refused(capsys):
    for command, name in every_flag(["int", "float"]):
        if name in ZERO_IS_ZERO | REFUSED_LATER:
            continue
        with pytest.raises((ValueError, SystemExit)):
            parse_with(command, name, "0")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "changes,place",
    [
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"d_pace_floor": math.nan}, "d_pace_floor"),
        ({"lr_scheduler_kwargs": {"min_lr": math.nan}}, "lr_scheduler_kwargs.min_lr"),
        ({"target_init_kwargs": '{"a": [1, NaN]}'}, r"target_init_kwargs.a\[1\]"),
    ],
)
def test_a_config_takes_no_number_that_is_not_finite(kind, changes, place, tmp_path):
    with refuses(f"`{place}` must be a finite number, got (nan|inf)"):
        make_args(kind, tmp_path, **changes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DemoSettings(sft_learning_rate=math.nan),
        lambda: TinyTargetSettings(learning_rate=math.inf),
        lambda: EngineSettings(timeout=math.nan),
        lambda: verify_drafter("folder", make_target(), [[9]], tolerance=math.nan),
        lambda: verify_drafter("folder", make_target(), [[9]], tolerance=math.inf),
    ],
)
def test_other_settings_are_finite_too(make):
    with refuses("must be a finite number|is a share of tau"):
        make()


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"responses": ""}, "`responses` is empty"),
        ({"max_steps": 0}, "`max_steps` must be at least 1, got 0"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "`eval_steps` must be above 0, got 0"),
        ({"save_total_limit": 0}, "`save_total_limit` must be at least 1, got 0"),
        ({"num_train_epochs": 0}, "`num_train_epochs` must be above 0"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be at least 1"),
        ({"learning_rate": -1e-3}, "`learning_rate` must be at least 0, got -0.001"),
        ({"dataset_num_proc": 0}, "`dataset_num_proc` must be at least 1"),
    ],
)
def test_a_setting_that_would_be_taken_for_another_is_refused(changes, match, tmp_path):
    with refuses(match):
        make_args("sft", tmp_path, **changes)


# ---- options of transformers' Trainer -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "changes",
    [
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1},
        {"use_liger_kernel": True},
        {"auto_find_batch_size": True},
        {"include_num_input_tokens_seen": "all"},
        {"include_for_metrics": ["inputs"]},
        {"batch_eval_metrics": True},
        {"label_names": ["labels"]},
        {"bf16_full_eval": True},
        {"fp16_full_eval": True},
        {"enable_jit_checkpoint": True},
        {"remove_unused_columns": True},
        {"save_on_each_node": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_option_that_cannot_work_is_refused_with_a_sentence(kind, changes, tmp_path):
    (name,) = changes
    with refuses(f"`{name}=.*` is not supported: .*Leave it out"):
        make_args(kind, tmp_path, **changes)


def test_the_defaults_of_every_option_are_taken(tmp_path):
    for name, (off, _) in UNUSABLE_OPTIONS.items():
        for value in off:
            make_args("sft", tmp_path, **{name: value})


def test_rows_are_not_grouped_by_a_length_that_is_not_known_yet(tmp_path):
    with refuses("'group_by_length'` sorts rows by their whole text"):
        make_args("opd", tmp_path, train_sampling_strategy="group_by_length")
    make_args("opd", tmp_path, train_sampling_strategy="group_by_length", completions_from_target=True)


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential"])
def test_sft_reads_its_rows_in_the_order_that_is_asked_for(strategy, tmp_path):
    args = make_args("sft", tmp_path, train_sampling_strategy=strategy, max_steps=1, save_strategy="no")
    target = make_target()
    DraftSFTTrainer(make_drafter("eagle3", target), target, args, Dataset.from_list(ROWS)).train()


def test_a_reporter_that_is_not_installed_or_not_known_is_refused_before_any_work(tmp_path, monkeypatch):
    options = TINY_RUN | {"report_to": "wandb"}
    monkeypatch.setattr(
        "trl_draft_opd.trainer.unusable_options.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    with refuses("`report_to` names 'wandb', which is not installed.*installed: tensorboard"):
        DraftSFTConfig(str(tmp_path), **options)
    with refuses("wandbb is not supported, only .*wandb"):
        DraftSFTConfig(str(tmp_path), **options | {"report_to": ["tensorboard", "wandbb"]})


@pytest.mark.parametrize(
    "trainer,config", [(DraftSFTTrainer, DraftOPDConfig), (DraftOPDTrainer, DraftSFTConfig), (DraftSFTTrainer, None)]
)
def test_settings_of_another_trainer_are_refused_before_anything_is_loaded(trainer, config, tmp_path):
    args = TrainingArguments(str(tmp_path)) if config is None else config(str(tmp_path), **TINY_RUN)
    with refuses(f"`args` must be a `Draft.*Config`, got a `{type(args).__name__}`"):
        trainer("no/drafter", "no/target", args, Dataset.from_list(ROWS))


@pytest.mark.parametrize("changes", [{"eval_strategy": "steps"}, {"eval_on_start": True}])
def test_an_evaluation_without_rows_is_refused_before_anything_is_loaded(changes, tmp_path):
    with refuses("there is no `eval_dataset`. Give one"):
        DraftSFTTrainer("no/drafter", "no/target", make_args("sft", tmp_path, **changes), Dataset.from_list(ROWS))


# ---- the best model -----------------------------------------------------------------------------------------------


def test_metrics_to_choose_a_model_by_are_those_that_an_evaluation_has(tmp_path):
    target = make_target()
    rows = Dataset.from_list(ROWS)
    args = make_args("opd", tmp_path, max_completion_length=12, responses=str(tmp_path / "responses"))
    trainer = DraftOPDTrainer(make_drafter("eagle3", target), target, args, rows, eval_dataset=rows)
    measured = trainer.evaluate()
    names = best_model_metrics(args.trained_streams, num_drafts=4)
    assert len(names) == 10
    assert {f"eval_{name}" for name in names} <= set(measured)


@pytest.mark.parametrize(
    "kind,metric,known",
    [("sft", "eval_accuracy", "loss, loss/accepted, tau"), ("opd", "tua", "loss/rejected, tau"), ("sft", "", "empty")],
)
def test_an_unknown_metric_is_answered_with_those_there_are_before_training(kind, metric, known, tmp_path):
    target, trainer = make_target(), DraftSFTTrainer if kind == "sft" else DraftOPDTrainer
    with refuses(known):
        args = make_args(kind, tmp_path, metric_for_best_model=metric)
        trainer(make_drafter("eagle3", target), target, args, Dataset.from_list(ROWS), Dataset.from_list(ROWS))


def test_without_rollouts_there_is_no_tau_to_choose_by(tmp_path):
    target, rows = make_target(), Dataset.from_list(ROWS)
    args = make_args("sft", tmp_path, metric_for_best_model="tau", eval_rollouts=False)
    with refuses("`metric_for_best_model='tau'` is not measured. There are: loss, loss/accepted"):
        DraftSFTTrainer(make_drafter("eagle3", target), target, args, rows, rows)
    args = make_args("sft", tmp_path, metric_for_best_model="held_out_tau")
    DraftSFTTrainer(make_drafter("eagle3", target), target, args, rows, {"held_out": rows})


def test_a_smaller_loss_is_better_and_a_larger_tau(tmp_path):
    for metric, greater in {"loss": False, "loss/accepted": False, "eval_loss": False, "tau": True}.items():
        assert make_args("sft", tmp_path, metric_for_best_model=metric).greater_is_better is greater


# ---- evaluation and precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_raw_rows_are_read_when_they_are_evaluated(kind, tmp_path):
    target, trainer_class = make_target(), DraftSFTTrainer if kind == "sft" else DraftOPDTrainer
    rows = Dataset.from_list(ROWS)
    args = make_args(kind, tmp_path, max_completion_length=12)
    trainer = trainer_class(make_drafter("eagle3", target), target, args, rows, eval_dataset=rows)
    own = trainer.evaluate()
    assert trainer.evaluate(rows)["eval_tau"] == own["eval_tau"]
    assert trainer.evaluate({"held_out": rows})["eval_held_out_tau"] == own["eval_tau"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to train on")
def test_bf16_on_a_cpu_needs_no_other_setting(tmp_path):
    args = DraftSFTConfig(
        str(tmp_path), bf16=True, report_to="none", disable_tqdm=True, max_steps=1, save_strategy="no"
    )
    target = make_target()
    trainer = DraftSFTTrainer(make_drafter("eagle3", target), target, args, Dataset.from_list(ROWS))
    assert trainer.train().training_loss > 0 and trainer.accelerator.mixed_precision == "bf16"


# ---- help ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parsers(monkeypatch):
    """Parsers by command, as `--help` prints them."""
    made = {}

    class Stop(Exception):
        pass

    def keep(self, *args, **kwargs):
        made[self.prog.split()[-1]] = self
        raise Stop

    monkeypatch.setattr(arguments._Parser, "parse_args_and_config", keep)
    for command, (types, _) in COMMANDS.items():
        with pytest.raises(Stop):
            parse(command, types, [])
    return made


def test_every_flag_has_a_help_text(parsers):
    assert parsers.keys() == COMMANDS.keys()
    silent = [
        f"{command} {action.option_strings[0]}"
        for command, parser in parsers.items()
        for action in parser._actions
        if not action.help
    ]
    assert silent == []


def test_a_flag_that_takes_one_of_a_few_words_lists_them(parsers):
    listed = {
        action.dest
        for command in ("sft", "opd")
        for action in parsers[command]._actions
        if action.choices and action.dest in {each.name for config in CONFIGS.values() for each in fields(config)}
    }
    assert {
        *("accepted_loss", "rejected_loss", "slot_weighting", "draft_sampling", "on_nonfinite", "rollout"),
        *("rejected_scope", "supervised_anchors", "slot_scope", "lr_scheduler_type"),
    } <= listed
