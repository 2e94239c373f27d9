# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decoding with a published drafter in plain transformers: `target.generate(..., custom_generate=REPOSITORY,
trust_remote_code=True)`. The two files beside this one become the folder `custom_generate/` of a repository, of
whatever family, and import nothing of this package.
"""

from pathlib import Path

from huggingface_hub.utils import validate_repo_id


#: Files of the folder.
FILES = ("drafters.py", "generate.py")
_PLACE = "DRAFTER = None\n"


def write_custom_generate(folder: str | Path, repo_id: str | None) -> None:
    """
    Write `custom_generate/` into the folder of an export that will be `repo_id` on the Hub. Its function reads the
    drafter beside it; the name is for calls that do not tell where it was loaded from.
    """
    if repo_id is not None:
        validate_repo_id(repo_id)
    place = Path(folder) / "custom_generate"
    place.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        source = (Path(__file__).parent / name).read_text("utf-8")
        if name == "generate.py":
            assert source.count(_PLACE) == 1
            source = source if repo_id is None else source.replace(_PLACE, f"DRAFTER = {repo_id!r}\n")
        (place / name).write_text(source, encoding="utf-8")
