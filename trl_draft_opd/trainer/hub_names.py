# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a run publishes to and what it calls its target: names, settled before anything is trained.
"""

from pathlib import Path

from ..drafters.base import Drafter
from ..export import hub_id_of
from ..export.hub import create_repository, validate_repo_id
from ..target.frozen import FrozenTarget
from .common_config import DraftTrainingConfig


_FAMILY_WORDS = {"eagle3": "EAGLE3", "dflash": "DFlash"}


def check_publishing(args: DraftTrainingConfig, drafter: Drafter, target: FrozenTarget) -> None:
    """
    Settle where a run with `push_to_hub=True` publishes to, before the target answers or anything is trained: checks the names,
    then the token, by making the repository.

    Raises:
        ValueError: If the repository's name is refused, the target has no Hub id to be named by, or the repository is public
            where `hub_private_repo=True`.
        PermissionError, ConnectionError: If the Hub refuses or cannot be reached.
    """
    if not args.push_to_hub:
        return
    args.hub_model_id = repository_name(args, drafter)
    validate_repo_id(args.hub_model_id, drafter.config.family)
    require_target_id(args, target)
    if args.process_index == 0:
        args.hub_model_id = create_repository(args.hub_model_id, token=args.hub_token, private=args.hub_private_repo)


def repository_name(args: DraftTrainingConfig, drafter: Drafter) -> str:
    """Return `hub_model_id`, or a name from the output folder that says the family, as vLLM wants it."""
    if args.hub_model_id is not None:
        return args.hub_model_id
    name, word = Path(args.output_dir).absolute().name, _FAMILY_WORDS[drafter.config.family]
    return name if word.lower() in name.lower() else f"{name}-{word}"


def target_id_of(args: DraftTrainingConfig, target: FrozenTarget) -> str | None:
    """Return the Hub id by which a drafter names its target, or `None` where only a path is known."""
    # A setting is an id even where a folder of that name lies beside the run.
    return args.hub_target_id or hub_id_of(target.config.name_or_path)


def require_target_id(args: DraftTrainingConfig, target: FrozenTarget) -> str:
    """
    Return the Hub id by which a published drafter names its target.

    Raises:
        ValueError: If there is none.
    """
    found = target_id_of(args, target)
    if found is None:
        raise ValueError(
            f"A published drafter names its target by its Hub id, in the card and in the speculators config, but this target is known as "
            f"{target.config.name_or_path or 'an instance'!r} only. Set `hub_target_id='ORG/NAME'`."
        )
    return found
