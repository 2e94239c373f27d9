# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decoding with a published drafter in plain transformers: `target.generate(..., custom_generate=REPOSITORY,
trust_remote_code=True)`. The two files beside this one become `custom_generate/generate.py` of a repository: each stands alone.
"""

from pathlib import Path

from huggingface_hub.utils import validate_repo_id


_FAMILIES = ("eagle3", "dflash")
_PLACE = "DRAFTER = None\n"


def write_custom_generate(folder: str | Path, family: str, repo_id: str | None) -> None:
    """
    Write `custom_generate/generate.py` into the folder of an export.

    Args:
        folder (`str` or `Path`): The folder.
        family (`str`): `"eagle3"` or `"dflash"`.
        repo_id (`str` or `None`): Hub id the folder will have; without one, callers name the drafter: `drafter="..."`.

    Raises:
        ValueError: If `repo_id` cannot be a Hub id, or there is no such family.
    """
    if family not in _FAMILIES:
        raise ValueError(f"`family` must be one of {_FAMILIES}, got {family!r}.")
    source = (Path(__file__).parent / f"{family}.py").read_text("utf-8")
    if source.count(_PLACE) != 1:
        raise ValueError(f"{family}.py must hold {_PLACE!r} once.")
    if repo_id is not None:
        validate_repo_id(repo_id)
        source = source.replace(_PLACE, f"DRAFTER = {repo_id!r}\n")
    place = Path(folder) / "custom_generate"
    place.mkdir(parents=True, exist_ok=True)
    (place / "generate.py").write_text(source, encoding="utf-8")
