# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The commands that make and train drafters: `init`, `sft` and `opd`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .reading import (
    FAMILY_OPTIONS,
    FRESH_OPTIONS,
    READING,
    DraftScriptArguments,
    command_parser,
    count_supervised,
    given,
    load_rows,
    lora_config,
    make_drafter,
    parse_flags,
    parse_training,
)


if TYPE_CHECKING:
    import torch

    from ..trainer.common_config import DraftTrainingConfig


def run_sft(argv: Sequence[str]) -> int:
    """Train a drafter on text its target wrote."""
    from ..trainer.draft_sft_config import DraftSFTConfig
    from ..trainer.draft_sft_trainer import DraftSFTTrainer

    script, args = parse_training("sft", DraftSFTConfig, argv)
    fresh = given(script, FRESH_OPTIONS)
    if (script.model_name_or_path is None) == (script.family is None) or (script.model_name_or_path and fresh):
        raise ValueError(
            "Give either `model_name_or_path` to go on from a drafter, or `family` to make a fresh one, to which "
            f"{', '.join(FRESH_OPTIONS)} belong."
        )
    if args.regenerate and script.draft_vocab_size is not None:
        raise ValueError(
            "`draft_vocab_size` counts the dataset's completions, which `regenerate` replaces. Leave one of the two out."
        )
    return train(DraftSFTTrainer, script, args)


def run_opd(argv: Sequence[str]) -> int:
    """Improve a trained drafter by on-policy distillation."""
    from ..trainer.draft_opd_config import DraftOPDConfig
    from ..trainer.draft_opd_trainer import DraftOPDTrainer

    script, args = parse_training("opd", DraftOPDConfig, argv)
    fresh = sorted(given(script, ("family", *FRESH_OPTIONS)))
    if script.model_name_or_path is None or fresh:
        what = f"got {fresh}" if fresh else "got none"
        raise ValueError(
            f"`opd` starts from a trained drafter, `model_name_or_path`; {what}. Train a fresh one by `sft`."
        )
    return train(DraftOPDTrainer, script, args)


def train(trainer_class: type, script: DraftScriptArguments, args: DraftTrainingConfig) -> int:
    """Load, train, save, and push if asked for."""
    from transformers import set_seed

    from ..export import hub_id_of
    from ..trainer.pair import load_target

    peft_config = lora_config(script)
    rows = load_rows(script.dataset_name, script.dataset_config, script.dataset_train_split)
    held_out = None
    if script.dataset_test_split is not None:
        held_out = load_rows(script.dataset_name, script.dataset_config, script.dataset_test_split)
    if args.dataset_id is None:
        # So that a push between two saves knows it, too; a local file or folder is none.
        args.dataset_id = hub_id_of(script.dataset_name)
    target = load_target(script.target_model_name_or_path, args, None)
    drafter = script.model_name_or_path
    if drafter is None:
        reading = {name: getattr(args, name) for name in (*READING[:3], "max_length")}
        reading["num_proc"] = args.dataset_num_proc
        set_seed(args.seed)
        options = given(script, FRESH_OPTIONS)
        drafter = make_drafter(target, script.family, options, lambda: count_supervised(target, rows, reading))
    trainer = trainer_class(drafter, target, args, train_dataset=rows, eval_dataset=held_out, peft_config=peft_config)
    trainer.train()
    if args.push_to_hub:
        # Saves first, so that a push that fails loses nothing.
        commit = trainer.push_to_hub()
    else:
        trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        print(f"The drafter is in {args.output_dir}")
        if args.push_to_hub:
            print(f"and published as {commit}")
    return 0


def run_init(argv: Sequence[str]) -> int:
    """Make a fresh drafter for a target and save it."""
    integers = "block-size num-hidden-layers mask-token-id ttt-steps draft-vocab-size seed"
    parser = command_parser(run_init, "target output", integers)
    parser.add_argument("--family", required=True, choices=FAMILY_OPTIONS)
    parser.add_argument("--target-layer-ids", type=int, nargs="+", metavar="N", help="0-based, ascending")
    parser.add_argument("--dataset", help="text of the target, whose commonest tokens --draft-vocab-size keeps")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parse_flags(parser, argv)
    if (options.draft_vocab_size is None) != (options.dataset is None):
        raise ValueError("`--draft-vocab-size` and `--dataset` go together: the commonest tokens of the one are kept.")
    from transformers import set_seed

    from ..target.frozen import FrozenTarget

    target = FrozenTarget.load(options.target, trust_remote_code=options.trust_remote_code)

    def count() -> torch.Tensor:
        rows = load_rows(options.dataset, options.dataset_config, options.split)
        return count_supervised(target, rows, dict.fromkeys((*READING, "max_length")))

    if options.seed is not None:
        set_seed(options.seed)
    drafter = make_drafter(target, options.family, given(options, FRESH_OPTIONS), count)
    drafter.save_pretrained(options.output)
    print(f"A fresh {options.family} drafter of {drafter.num_parameters():,} parameters is in {options.output}")
    return 0
