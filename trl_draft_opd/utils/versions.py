# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Names that differ between the supported versions of a dependency. Each is decided by what is installed, never by a
version's number, and nowhere else in the package:

- Keys and values, in a model's `forward`, its output and `generate`: `past_key_values` until transformers 5.23,
  `cache` since 5.24.
- A model's switch for activation checkpointing: `gradient_checkpointing_enable` until transformers 5.22,
  `activation_checkpointing_enable` since 5.23.
- The package that sends the Hub's requests: `httpx` until huggingface_hub 1, `httpx2` since 2.

Not used, because transformers may ask for a PEFT that is not out (5.24 for 0.22): its own `add_adapter`. Adapters here
are those of [`~peft.PeftModel`], which asks for none.

Published files cannot import this package: `export/custom_generate/` decides by what `generate` hands it.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


#: What the Hub's client raises where no answer came. Both packages may be there, whichever it uses.
TRANSPORT_ERRORS: tuple[type[Exception], ...] = ()
with suppress(ImportError):
    import httpx  # pyright: ignore[reportMissingImports]

    TRANSPORT_ERRORS += (httpx.TransportError,)
with suppress(ImportError):
    import httpx2  # pyright: ignore[reportMissingImports]

    TRANSPORT_ERRORS += (httpx2.TransportError,)

_CACHE_NAMES = ("past_key_values", "cache")
#: What transformers calls keys and values in the outputs of its models.
CACHE_NAME = next(name for name in _CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)


def cache_name_of(forward: Callable[..., Any]) -> str:
    """Return the argument of a model's `forward` for keys and values; a model's own code may be older."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), CACHE_NAME)


def cache_in(options: Mapping[str, Any]) -> Any:
    """Return the keys and values among the arguments of a model's `forward`, or `None`."""
    return next((options[name] for name in _CACHE_NAMES if options.get(name) is not None), None)


def switch_checkpointing(model: PreTrainedModel, state: str, options: dict[str, Any] | None = None) -> None:
    """Turn activation checkpointing on, with torch's `options`, or off: `state` is `"enable"` or `"disable"`."""
    names = (f"activation_checkpointing_{state}", f"gradient_checkpointing_{state}")
    getattr(model, next(name for name in names if hasattr(model, name)))(*([options] if options else []))
