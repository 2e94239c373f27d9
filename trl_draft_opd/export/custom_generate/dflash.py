# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decode with a DFlash drafter: `target.generate(**inputs, custom_generate="ORG/DRAFTER", trust_remote_code=True)`.

Takes every argument of `generate`, and `drafter`, the folder or Hub id of another drafter than the one beside this
file. Uses transformers' own DFlash decoding, which reads the `transformers/` folder of the repository: one sequence at
a time, any target whose cache can be cropped, and whole blocks alone.
"""

import inspect
from pathlib import Path
from typing import Any

from transformers import AutoModel


# Where the drafter lies if the call does not tell; filled in when it is published.
DRAFTER = None

# (source, device, dtype) to (which files, drafter).
_LOADED: dict[tuple, tuple] = {}


def _own_place() -> str | None:
    """
    Return the folder or repository that `generate` was loaded from, which holds its drafter: transformers hands a
    function everything but that, so it is looked up in the call. `None` where it was not called by that name.
    """
    call = inspect.currentframe()
    for _ in range(2):
        call = call and call.f_back
    place = call.f_locals.get("custom_generate") if call else None
    return place if isinstance(place, str) else None


def load_drafter(source: str | None, model: Any) -> Any:
    """Load the drafter in the target's precision, once per place, device and precision, and again once replaced."""
    source = source or DRAFTER
    if source is None:
        raise ValueError(
            'This file does not know where its drafter lies. Pass `drafter="ORG/NAME"`, or its local folder.'
        )
    source, weights = str(source), Path(source) / "transformers" / "model.safetensors"
    stamp = (weights.stat().st_ino, weights.stat().st_mtime_ns) if weights.is_file() else None
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    key = (source, device, dtype)
    if key not in _LOADED or _LOADED[key][0] != stamp:
        if Path(source).is_dir() and stamp is None:
            raise FileNotFoundError(
                f"{source!r} holds no 'transformers/model.safetensors', so it is no published DFlash drafter. Pass "
                '`drafter="ORG/NAME"`, or the folder of an export.'
            )
        try:
            drafter = AutoModel.from_pretrained(source, subfolder="transformers", dtype=dtype)
        except OSError as error:
            raise OSError(
                f"Could not read the folder transformers/ of the drafter {source!r}: {error} Pass "
                '`drafter="ORG/NAME"`, or the folder of an export.'
            ) from error
        _LOADED[key] = (stamp, drafter.to(device).eval())
    drafter = _LOADED[key][1]
    _check(drafter.config, model.config.get_text_config())
    return drafter


def _check(drafter: Any, target: Any) -> None:
    """Refuse a drafter of another target."""
    wrong = {
        name: (own, its)
        for name, own, its in (
            ("hidden_size", drafter.hidden_size, target.hidden_size),
            ("vocab_size", getattr(drafter, "vocab_size", target.vocab_size), target.vocab_size),
            ("layers", getattr(drafter, "num_target_layers", target.num_hidden_layers), target.num_hidden_layers),
        )
        if own != its
    }
    if wrong:
        raise ValueError(f"The drafter was made for another target: (drafter, target) {wrong}.")


def generate(model: Any, drafter: str | None = None, num_drafts: int | None = None, **kwargs: Any) -> Any:
    """
    Decode with the target, verifying blocks of the drafter; the result is `model.generate`'s own.

    Args:
        model (`PreTrainedModel`): The target; transformers passes it.
        drafter (`str`, *optional*): Folder or Hub id of the drafter; `draft_model` is understood, too.
        num_drafts (`int`, *optional*): Drafts per block; transformers drafts whole blocks, so only their number fits.
        kwargs: Arguments of `generate`.

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: If the drafter is unknown or of another target, or an argument asks for more than one sequence,
            beams, guidance, or blocks of another size.
        OSError: If the drafter cannot be found.
    """
    if kwargs.get("assistant_model") is not None:
        raise ValueError(
            "`assistant_model` is what this function supplies. Leave it out, or call `generate` without "
            "`custom_generate`."
        )
    config = kwargs.get("generation_config") or model.generation_config
    for name in ("num_beams", "guidance_scale"):
        # transformers would leave out the beams, and feed the guidance with drafts: another text, and no error.
        value = kwargs.get(name) or getattr(config, name, None) or 1
        if value != 1:
            raise ValueError(f"DFlash decoding cannot keep to {name}={value}. Leave it out, or call plain `generate`.")
    if drafter is None:
        drafter = kwargs.pop("draft_model", None)
    loaded = load_drafter(drafter or _own_place(), model)
    if num_drafts not in (None, loaded.config.block_size - 1):
        raise ValueError(
            f"transformers drafts whole blocks, {loaded.config.block_size - 1} drafts for this drafter, got "
            f"`num_drafts` {num_drafts}. Leave it out."
        )
    return model.generate(**kwargs | {"assistant_model": loaded, "speculation_type": "dflash"})
