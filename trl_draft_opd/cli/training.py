# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The commands that make and train drafters: `init`, `sft` and `opd`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import set_seed

from ..data.columns import PROMPT_FORMS, TEXT_FORMS, find_format
from ..drafters.auto import DRAFTER_CLASSES, AutoDrafter
from ..drafters.base import Drafter
from ..drafters.draft_vocabulary import build_draft_vocabulary, check_draft_vocab_size, count_tokens
from ..drafters.published.adapter import require_peft
from ..export import hub_id_of
from ..responses import Origin, ResponseStore
from ..target.frozen import FrozenTarget
from ..trainer.common_config import DraftTrainingConfig
from ..trainer.draft_opd_config import DraftOPDConfig
from ..trainer.draft_opd_trainer import DraftOPDTrainer
from ..trainer.draft_sft_config import DRAFT_VOCAB_SIZE, LARGE_VOCABULARY, DraftSFTConfig
from ..trainer.draft_sft_trainer import DraftSFTTrainer
from ..trainer.pair import check_pair, load_target
from ..utils.atomic_files import check_place, explaining_failure, leaving_no_empty_folder, writing_files
from .arguments import HELD_OUT, TargetArguments, flag, parse, print_next, unless_default
from .rows import load_rows


if TYPE_CHECKING:
    from peft import LoraConfig


FAMILIES = sorted(DRAFTER_CLASSES)


@dataclass(kw_only=True)
class FreshDrafterArguments:
    """Options of a fresh drafter; those that are unset are left to its `from_target` or `from_dflash`."""

    _argument_group_name = "fresh drafter"

    target_layer_ids: list[int] | None = flag("Target layers to read, from 0 and ascending.", default=None)
    ttt_steps: int | None = flag("EAGLE-3: steps of training-time test.", default=None)
    block_size: int | None = flag("All but EAGLE-3: positions of a block, the anchor's included.", default=None)
    num_hidden_layers: int | None = flag("All but EAGLE-3: number of layers.", default=None)
    mask_token_id: int | None = flag(
        "All but EAGLE-3: an id that text never uses; searched for if unset.", default=None
    )
    sample_from_anchor: bool | None = flag(
        "All but EAGLE-3: whether the anchor's position drafts too, and every one the token behind it. Of DFlash and "
        "DFlash 2, no engine serves such drafters.",
        default=None,
    )
    markov_rank: int | None = flag("DSpark: rank of the head that reads the token before a slot.", default=None)
    enable_confidence_head: bool | None = flag("DSpark: whether it predicts what is accepted.", default=None)
    selector_rank: int | None = flag("DFlash 2: width of the selector's codebooks.", default=None)
    selector_top_k: int | None = flag("DFlash 2: tokens that the selector chooses among.", default=None)

    def given(self) -> dict[str, Any]:
        """Return the options that were set."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(FreshDrafterArguments)}
        return {name: value for name, value in values.items() if value is not None}


def make_drafter(target: FrozenTarget, family: str, options: dict[str, Any], drafter: str | None = None) -> Drafter:
    """
    Return a fresh drafter by the options that were set, or one that starts from a DFlash `drafter`, which is an id or
    a path.
    """
    if family not in DRAFTER_CLASSES:
        raise ValueError(f"`family` must be one of {FAMILIES}, got {family!r}.")
    family_class, title = DRAFTER_CLASSES[family], DRAFTER_CLASSES[family].config_class.title
    make: Any = getattr(family_class, "from_target" if drafter is None else "from_dflash", None)
    if make is None:
        raise ValueError(
            f"{drafter!r} was given to start from, but of all families only {_widening_families()} start from another "
            "one's drafter. Leave it out, or train it as it is with `sft --drafter`."
        )
    known = inspect.signature(make).parameters
    foreign = sorted(set(options) - set(known))
    if foreign:
        names = ", ".join(f"`{name}`" for name in foreign)
        where = (
            f"a {title} drafter has" if drafter is None else f"a {title} drafter adds to the DFlash one it starts from"
        )
        raise ValueError(f"{names}: no setting that {where}. Leave it out.")
    if drafter is not None:
        start = AutoDrafter.from_pretrained(drafter, num_target_layers=target.num_layers)
        check_pair(start, target)
        return make(start, **options)
    if "mask_token_id" in known and "mask_token_id" not in options:
        options = options | {"mask_token_id": target.find_mask_token_id()}
    return make(target, **options)


def _widening_families() -> list[str]:
    """Return the families whose drafters can start from a DFlash drafter."""
    return [family for family in FAMILIES if hasattr(DRAFTER_CLASSES[family], "from_dflash")]


@dataclass(kw_only=True)
class InitArguments(TargetArguments, FreshDrafterArguments):
    """Flags of `init`."""

    _argument_group_name = "drafter"

    family: str = flag("Family of the drafter.", choices=FAMILIES)
    drafter: str | None = flag(
        f"Hub id or path of a DFlash drafter to start from; families {_widening_families()}.", default=None
    )
    output: str = flag("Folder to save the drafter in.")
    draft_vocab_size: int | None = flag(
        "Propose only this many tokens, the most frequent of the responses; all of them if unset.", default=None
    )
    responses: str | None = flag("Folder of responses whose tokens --draft-vocab-size counts.", default=None)
    dataset: str | None = flag("Rows with responses, in place of --responses.", default=None)
    dataset_config: str | None = flag("Name of the dataset's configuration.", default=None)
    split: str = flag("Split of the dataset.", default="train")
    seed: int | None = flag("Seed of the random weights.", default=None)

    def check_vocabulary(self) -> None:
        """Raise `ValueError` unless a reduced vocabulary was asked for with the text to choose it by, or none was."""
        given = [name for name in ("responses", "dataset") if getattr(self, name) is not None]
        if not given and not self.draft_vocab_size:
            return
        DRAFTER_CLASSES[self.family].config_class.check_reducible()
        if len(given) != 1 or not self.draft_vocab_size:
            raise ValueError(
                "`--draft-vocab-size` goes together with one of `--responses` (a folder that `generate` wrote) and "
                f"`--dataset` (rows with responses), whose most frequent tokens are kept; got {given or 'neither'}"
                f"{'' if self.draft_vocab_size else ' and no size'}. Without all of them, `sft` chooses when it "
                "trains."
            )

    def count_tokens(self, target: FrozenTarget, rows: Dataset | None) -> torch.Tensor:
        """Count the tokens of the responses in a store or in a dataset's `rows`."""
        if rows is None:
            assert self.responses is not None, "`check_vocabulary`"
            store = ResponseStore.read_only(self.responses)
            stored, template = store.origin, ("chat_template_hash", "chat_template_kwargs")
            own = Origin.of(target, sampling=stored.sampling, max_completion_length=stored.max_completion_length)
            # Of the same target; how its prompts were written is of no account here.
            own = replace(own, **{name: getattr(stored, name) for name in template})
            own.check_same(stored, f"The responses in {self.responses}")
            rows = store.to_dataset()
        return count_tokens(target.text_reader().read_texts(rows), target.vocab_size)

    def load_responses(self) -> Dataset | None:
        """Return the dataset's rows, `None` without a dataset; raise `ValueError` if they hold prompts alone."""
        if self.dataset is None:
            return None
        rows = load_rows(self.dataset, self.dataset_config, self.split)
        try:
            find_format(rows.column_names, TEXT_FORMS)
        except ValueError as error:
            raise ValueError(
                f"The rows of {self.dataset!r} hold {rows.column_names} and no responses, whose tokens "
                "`--draft-vocab-size` counts. Have the target write them with `trl-draft-opd generate` and give its "
                "folder as `--responses`; or leave both out, and `sft --regenerate` chooses when it trains."
            ) from error
        return rows


def run_init(argv: Sequence[str]) -> int:
    """Make a fresh drafter for a target and save it."""
    (args,) = parse("init", [InitArguments], argv)
    args.check_vocabulary()
    check_place(Path(args.output), "`--output`")
    rows = args.load_responses()
    target = args.load_target()
    if args.seed is not None:
        set_seed(args.seed)
    drafter = make_drafter(target, args.family, args.given(), args.drafter)
    if args.draft_vocab_size:
        # Before the text is read.
        check_draft_vocab_size(args.draft_vocab_size, target.vocab_size, target.eos_token_ids)
        counts = args.count_tokens(target, rows)
        vocabulary = build_draft_vocabulary(counts, args.draft_vocab_size, target.eos_token_ids)
        drafter.reduce_vocabulary(vocabulary, target)
        print(
            f"Draft vocabulary of {args.draft_vocab_size} tokens covers {vocabulary.coverage:.2%} of the response "
            "tokens."
        )
    with explaining_failure("The drafter", "Make room, or name another folder, and run the command again"):
        with writing_files(Path(args.output), "init") as staged:
            drafter.save_pretrained(staged)
    origin = "A fresh" if args.drafter is None else f"Started from {args.drafter}, a"
    print(f"{origin} {drafter.config.title} drafter of {drafter.num_parameters():,} parameters is in {args.output}")
    if drafter.vocabulary_is_open and target.vocab_size > LARGE_VOCABULARY:
        print(
            f"It proposes all {target.vocab_size:,} tokens. `sft --draft-vocab-size {DRAFT_VOCAB_SIZE}` reduces it to "
            "the most frequent ones of the responses, which makes it much smaller."
        )
    print_next(
        "sft",
        drafter=args.output,
        target=args.target,
        dataset=args.dataset or "PROMPTS.jsonl",
        regenerate=True,
        responses=args.responses,
        # The store takes no other.
        max_completion_length=None
        if args.responses is None
        else ResponseStore.read_only(args.responses).origin.max_completion_length,
    )
    return 0


@dataclass(kw_only=True)
class LoraArguments:
    """The adapter that is trained in place of the whole drafter; options that are unset are left to PEFT."""

    _argument_group_name = "LoRA"

    use_peft: bool = flag("Train a LoRA adapter in place of the whole drafter.", default=False)
    lora_r: int | None = flag("Rank of the adapter.", default=None)
    lora_alpha: int | None = flag("Scale of the adapter, times its rank.", default=None)
    lora_dropout: float | None = flag("Dropout in the adapter.", default=None)
    lora_target_modules: list[str] | None = flag(
        "Layers with an adapter; every linear layer but the head if unset.", default=None
    )
    lora_modules_to_save: list[str] | None = flag("Layers trained as a whole.", default=None)

    def lora_config(self) -> LoraConfig | None:
        """Return the adapter's config, or `None` without `use_peft`."""
        options = {
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.lora_target_modules,
            "modules_to_save": self.lora_modules_to_save,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if self.use_peft:
            return require_peft("`use_peft`").LoraConfig(**options)
        if options:
            raise ValueError(f"{sorted(options)} describe an adapter, which needs `use_peft`. Set it.")
        return None


@dataclass(kw_only=True)
class TrainArguments(LoraArguments):
    """What `sft` and `opd` train on."""

    _argument_group_name = "target and data"

    target: str = flag("Hub id or path of the target.")
    dataset: str = flag("Training rows: Hub id, folder, or files (.jsonl, .parquet, .csv, ...; also a pattern).")
    dataset_config: str | None = flag("Name of the dataset's configuration.", default=None)
    train_split: str = flag("Split to train on.", default="train")
    eval_dataset: str | None = flag(
        "Rows to measure tau on, as --dataset; without --eval-strategy once, after training.", default=None
    )
    eval_split: str | None = flag(
        "Split of --eval-dataset (`train` if unset), or of --dataset, to measure tau on.", default=None
    )

    def load_eval_rows(self) -> Dataset | None:
        """Return the rows to evaluate on, if any were named."""
        if self.eval_dataset is not None:
            return load_rows(self.eval_dataset, None, "train" if self.eval_split is None else self.eval_split)
        return None if self.eval_split is None else load_rows(self.dataset, self.dataset_config, self.eval_split)


@dataclass(kw_only=True)
class SFTArguments(TrainArguments, FreshDrafterArguments):
    """Flags of `sft`, besides those of [`DraftSFTConfig`]."""

    _argument_group_name = "drafter"

    drafter: str | None = flag("Hub id or path of a drafter to train further; give this or --family.", default=None)
    family: str | None = flag("Train a fresh drafter of this family.", default=None, choices=FAMILIES)


@dataclass(kw_only=True)
class OPDArguments(TrainArguments):
    """Flags of `opd`, besides those of [`DraftOPDConfig`]."""

    _argument_group_name = "drafter"

    drafter: str = flag("Hub id or path of the trained drafter, in any published layout.")


def run_sft(argv: Sequence[str]) -> int:
    """Train a drafter on its target's responses; see [`DraftSFTTrainer`]."""
    args, config = parse("sft", [SFTArguments, DraftSFTConfig], argv)
    if (args.drafter is None) == (args.family is None) or (args.drafter is not None and args.given()):
        flags = ", ".join(f"`--{setting.name.replace('_', '-')}`" for setting in fields(FreshDrafterArguments))
        raise ValueError(
            "Give either `--drafter`, to train one further, or `--family`, to make a fresh one. Only a fresh drafter "
            f"takes {flags}."
        )
    if args.family is not None and config.draft_vocab_size:
        DRAFTER_CLASSES[args.family].config_class.check_reducible()

    def fresh_drafter(target: FrozenTarget) -> Drafter:
        set_seed(config.seed)
        return make_drafter(target, args.family, args.given())

    columns = _train(DraftSFTTrainer, args, config, fresh_drafter if args.drafter is None else args.drafter)
    if columns is not None and _have_prompts(columns):
        print_next(
            "opd",
            drafter=config.output_dir,
            target=args.target,
            target_dtype=unless_default(config, "target_dtype"),
            dataset=args.dataset,
            responses=config.responses,
            readings=config.readings,
            shared_folder=config.shared_folder,
            max_completion_length=unless_default(config, "max_completion_length"),
            use_cpu=config.use_cpu or None,
            # On a CPU it was asked for; a GPU has it by default.
            bf16="true" if config.use_cpu and config.bf16 else None,
        )
    return 0


def run_opd(argv: Sequence[str]) -> int:
    """Improve a trained drafter by on-policy distillation; see [`DraftOPDTrainer`]."""
    args, config = parse("opd", [OPDArguments, DraftOPDConfig], argv)
    if _train(DraftOPDTrainer, args, config, args.drafter) is not None:
        print_next(
            "evaluate",
            drafter=config.output_dir,
            target=args.target,
            target_dtype=unless_default(config, "target_dtype"),
            dataset=HELD_OUT,
            max_completion_length=unless_default(config, "max_completion_length"),
            # Without the target's body, along responses that were read as well.
            responses=None if config.readings is None else "RESPONSES_TO_HELD_OUT",
            readings=config.readings if config.shared_folder or config.readings is None else "READINGS_OF_HELD_OUT",
            shared_folder=config.shared_folder,
        )
    return 0


def _have_prompts(columns: list[str]) -> bool:
    """Whether rows hold prompts, which Draft-OPD needs: text alone has none."""
    try:
        find_format(columns, PROMPT_FORMS)
    except ValueError:
        return False
    return True


def _train(
    trainer_class: Callable[..., DraftSFTTrainer | DraftOPDTrainer],
    args: TrainArguments,
    config: DraftTrainingConfig,
    drafter: str | Callable[[FrozenTarget], Drafter],
) -> list[str] | None:
    """
    Load the pair and the rows, train, save, and push if asked for; return the rows' columns, or `None` where another
    process speaks for all.
    """
    if config.learning_rate == 0:
        raise ValueError("`--learning-rate 0` trains nothing. To measure a drafter, use `trl-draft-opd evaluate`.")
    peft_config = args.lora_config()
    check_place(config.output_folder, "`--output-dir`")
    rows = load_rows(args.dataset, args.dataset_config, args.train_split)
    held_out = args.load_eval_rows()
    if config.dataset_id is None:
        # For the card; `None` for a local file or folder.
        config.dataset_id = hub_id_of(args.dataset)
    target = load_target(args.target, config, None)
    model = drafter if isinstance(drafter, str) else drafter(target)
    with leaving_no_empty_folder(config.output_folder):
        trainer = trainer_class(
            model, target, config, train_dataset=rows, eval_dataset=held_out, peft_config=peft_config
        )
        trainer.train()
    if held_out is not None and config.eval_strategy == "no":
        # Before it is saved, so that the card has it; the log prints what it finds.
        trainer.evaluate()
    _save(trainer, config.output_folder)
    commit = trainer.push_to_hub() if config.push_to_hub else None
    speaks = trainer.is_world_process_zero()
    if speaks:
        print(f"The drafter is in {config.output_dir}")
        if commit is not None:
            print(f"and published as {commit}")
    return rows.column_names if speaks else None


def _save(trainer: DraftSFTTrainer | DraftOPDTrainer, folder: Path) -> None:
    """Save the drafter; where that fails, in a temporary folder, because this process ends and its memory with it."""
    try:
        # A call of transformers' own, which pushes nothing yet.
        trainer.save_model(str(folder), _internal_call=True)
    except OSError as error:
        # Ranks besides the first write nothing and leave an empty folder.
        rescue = mkdtemp(prefix="drafter-")
        trainer.save_model(rescue, _internal_call=True)
        raise OSError(f"{error}. It was saved in {rescue!r} instead: move it from there") from error
