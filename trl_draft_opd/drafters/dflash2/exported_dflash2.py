# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How DFlash 2 drafters are written, and who reads them."""

from typing import Any

from ..dflash.exported_dflash import ExportedDFlash
from ..published.exported import Verdict


_KEYS = "conv_group_size conv_kernel_size selector_rank selector_top_k".split()


class ExportedDFlash2(ExportedDFlash):
    """DFlash 2 as it is written; engines know it by its class, and draft with it as with DFlash."""

    word = "DFlash2"
    flat_architecture = "DFlash2DraftModel"
    speculators_architecture = "DFlash2DraftModel"
    papers = ("DFlash 2, [inco.ai/blog/dflash2](https://inco.ai/blog/dflash2)", *ExportedDFlash.papers)
    has_native_class = False

    def speculators_sections(
        self, flat: dict[str, Any], boundaries: list[int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        own, layers = super().speculators_sections(flat, boundaries)
        return own | {name: flat["dflash_config"][name] for name in _KEYS}, layers

    def readers(self, config: Any, architectures: set[str]) -> dict[str, Verdict]:
        found = super().readers(config, architectures)
        llama = found["llama.cpp's converter"]
        width, rows = config.hidden_size, config.selector_top_k * (config.selector_top_k + 1)
        small = [f"it keeps {rows} scores of a slot in {width} channels"] if width < rows else []
        return found | {
            "llama.cpp's converter": Verdict([*llama.refusals, *small], llama.conditions),
        }

    def needs_gpu_in_vllm(self, config: Any) -> str | None:
        return "its V2 runner alone has the selector"

    def facts(self, config: Any, num_drafts: int) -> list[tuple[str, Any]]:
        taps, groups = config.conv_kernel_size, config.hidden_size // config.conv_group_size
        return [
            *super().facts(config, num_drafts),
            ("convolutions", f"{taps} taps, {groups} groups of channels"),
            ("selector", f"rank {config.selector_rank}, among the {config.selector_top_k} likeliest tokens"),
        ]
