# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decode with a DFlash drafter: `target.generate(**inputs, custom_generate="ORG/DRAFTER", trust_remote_code=True)`.

Takes every argument of `generate`, and `drafter`, the folder or Hub id of the drafter, in place of the one named below. Uses
transformers' own DFlash decoding: one sequence at a time, any target whose cache can be cropped.
"""

import torch
from transformers import AutoModel


# Where the drafter lies; filled in when it is published.
DRAFTER = None

_LOADED: dict = {}


def load_drafter(source: str | None, model: torch.nn.Module) -> torch.nn.Module:
    """Load the drafter in the target's precision, once per place, device and precision."""
    source = source or DRAFTER
    if source is None:
        raise ValueError(
            'This file does not know where its drafter lies. Pass `drafter="ORG/NAME"`, or its local folder.'
        )
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    key = (str(source), device, dtype)
    if key not in _LOADED:
        drafter = AutoModel.from_pretrained(source, subfolder="transformers", dtype=dtype)
        _LOADED[key] = drafter.to(device).eval()
    _check(_LOADED[key].config, model.config.get_text_config())
    return _LOADED[key]


def _check(drafter, target) -> None:
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


def generate(model: torch.nn.Module, drafter: str | None = None, **kwargs):
    """
    Decode with the target, verifying blocks of the drafter; the result is `model.generate`'s own.

    Args:
        model (`PreTrainedModel`): The target; transformers passes it.
        drafter (`str`, *optional*): Folder or Hub id of the drafter.
        kwargs: Arguments of `generate`.

    Raises:
        ValueError: If the drafter is unknown or of another target.
    """
    if kwargs.get("assistant_model") is not None:
        raise ValueError(
            "`assistant_model` is what this function supplies. Leave it out, or call `generate` without `custom_generate`."
        )
    kwargs["assistant_model"] = load_drafter(drafter, model)
    return model.generate(speculation_type="dflash", **kwargs)
