# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Load transformers' models whole on every rank, whatever the launcher asks for. Knows no target and no drafter."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import disable_fsdp_ram_efficient_loading
from transformers.integrations import deepspeed
from transformers.modeling_utils import is_fsdp_enabled  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def loading_whole() -> Iterator[None]:
    """
    Have `from_pretrained` load whole weights on every rank while the context lasts.

    Under ZeRO-3 it would shard every model, the frozen target too. Under FSDP's RAM-efficient loading only the first
    rank would read the file; that stays off, because our drafters are sharded from whole weights.
    """
    if is_fsdp_enabled():
        disable_fsdp_ram_efficient_loading()
    # transformers holds it weakly and has no public accessor for it; without one, nothing is sharded.
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)
