# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What is published of DFlash 2 drafters: z-lab, SpecForge, and the speculators format."""

from typing import Any

from ..dflash.published_dflash import PublishedDFlash
from ..published.sections import Sections, agreed, integer


# As the speculators library fills in what is not written.
_DEFAULTS = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}


class PublishedDFlash2(PublishedDFlash):
    """DFlash 2 as it is published."""

    family = "dflash2"
    architectures = {"DFlash2DraftModel": "flat"}
    speculators_architectures = frozenset({"DFlash2DraftModel"})
    projector = "dflash2"
    keys = PublishedDFlash.keys | frozenset(_DEFAULTS)
    unread = {}
    default_non_causal = True

    def arguments(self, sections: Sections, shared: dict[str, Any]) -> dict[str, Any]:
        own = {key: agreed(key, sections.stated(key)) for key in _DEFAULTS}
        if sections.layout == "speculators":
            own = _DEFAULTS | {key: value for key, value in own.items() if value is not None}
        missing = [key for key, value in own.items() if value is None]
        if missing:
            raise ValueError(
                f"config.json does not say {missing}, which the weights were trained with. Add them to its "
                "dflash_config."
            )
        return super().arguments(sections, shared) | {key: integer(key, value, 1) for key, value in own.items()}
