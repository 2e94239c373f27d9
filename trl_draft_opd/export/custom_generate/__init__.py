# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decoding with a published drafter in plain transformers: `target.generate(..., custom_generate=REPOSITORY,
trust_remote_code=True)`. The two files beside this one become `custom_generate/generate.py` of a repository: each
stands alone.
"""

from pathlib import Path

from huggingface_hub.utils import validate_repo_id


_FAMILIES = ("eagle3", "dflash")
_PLACE = "DRAFTER = None\n"


def write_custom_generate(folder: str | Path, family: str, repo_id: str | None) -> None:
    """
    Write `custom_generate/generate.py` into the folder of an export that will be `repo_id` on the Hub. The function
    reads the drafter beside it; the name is for calls that do not tell where it was loaded from.
    """
    if family not in _FAMILIES:
        raise ValueError(f"`family` must be one of {_FAMILIES}, got {family!r}.")
    source = (Path(__file__).parent / f"{family}.py").read_text("utf-8")
    assert source.count(_PLACE) == 1
    if repo_id is not None:
        validate_repo_id(repo_id)
        source = source.replace(_PLACE, f"DRAFTER = {repo_id!r}\n")
    place = Path(folder) / "custom_generate"
    place.mkdir(parents=True, exist_ok=True)
    (place / "generate.py").write_text(source, encoding="utf-8")
