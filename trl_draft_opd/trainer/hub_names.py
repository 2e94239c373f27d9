# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How a run's repository and its target are called on the Hub; what could not be pushed is refused by name."""

from ..drafters.auto import DRAFTER_CLASSES
from ..drafters.target_model import merging_line
from ..export import hub_id_of
from ..export.hub import create_repository, validate_repo_id
from ..target.frozen import FrozenTarget
from .common_config import DraftTrainingConfig
from .pair import Pair


def claim_repository(args: DraftTrainingConfig, pair: Pair) -> str | None:
    """
    With `push_to_hub=True`, check the names, then the token, by making the repository on the first rank alone, which
    gets its full name.
    """
    if not args.push_to_hub:
        return None
    family = pair.drafter.config.family
    validate_repo_id(repo_name(args, family), family)
    require_target_id(args, pair.target)
    return make_repository(args, family) if args.process_index == 0 else None


def make_repository(
    args: DraftTrainingConfig, family: str, token: str | None = None, private: bool | None = None
) -> str:
    """Make the repository if it is not there yet, and return its full name; see [`create_repository`]."""
    private = args.hub_private_repo if private is None else private
    return create_repository(repo_name(args, family), token=token or args.hub_token, private=private)


def repo_name(args: DraftTrainingConfig, family: str) -> str:
    """Return `hub_model_id`, or a name from the output folder that contains the family, as vLLM wants it."""
    if args.hub_model_id is not None:
        return args.hub_model_id
    name, word = args.output_folder.absolute().name, DRAFTER_CLASSES[family].config_class.exported.word
    return name if word.lower() in name.lower() else f"{name}-{word}"


def target_id(args: DraftTrainingConfig, target: FrozenTarget) -> str | None:
    """Return the Hub id by which a drafter names its target; `None` where only a path is known."""
    # A setting is an id even where a folder of that name lies beside the run.
    return args.hub_target_id or (None if target.is_merged else hub_id_of(target.config.name_or_path))


def require_target_id(args: DraftTrainingConfig, target: FrozenTarget) -> str:
    """Return the Hub id by which a published drafter names its target; raise `ValueError` if there is none."""
    name = target_id(args, target)
    if name is None and target.is_merged:
        adapter = target.config.name_or_path
        how = f"`{merging_line(adapter)}`" if adapter else "`merge_and_unload()`"
        raise ValueError(
            "A published drafter names its target by its Hub id, but this one is an adapter, which no server loads as "
            f"a model. Merge it ({how}), push the merged model, and set `hub_target_id` to its id."
        )
    if name is None:
        raise ValueError(
            "A published drafter names its target by its Hub id, but this target is known as "
            f"{target.config.name_or_path or 'an instance'!r} only. Set `hub_target_id='ORG/NAME'`."
        )
    return name
