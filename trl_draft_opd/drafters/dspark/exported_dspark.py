# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How DSpark drafters are written, and who reads them."""

from typing import Any

from ..dflash.exported_dflash import ExportedDFlash
from ..published.exported import Verdict


_KEYS = "confidence_head_with_markov enable_confidence_head markov_head_type markov_rank".split()


class ExportedDSpark(ExportedDFlash):
    """DSpark as it is written: flat as DeepSpec's checkpoints, whose keys vLLM and SGLang read at the root."""

    word = "DSpark"
    method = "dspark"
    algorithm = "DSPARK"
    flat_architecture = "Qwen3DSparkModel"
    speculators_architecture = "DSparkDraftModel"
    papers = ("DSpark, [arXiv:2607.05147](https://arxiv.org/abs/2607.05147)", *ExportedDFlash.papers)
    has_native_class = False

    def speculators_sections(
        self, flat: dict[str, Any], boundaries: list[int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        own, layers = super().speculators_sections(flat, boundaries)
        return own | {name: flat[name] for name in _KEYS}, layers

    def readers(self, config: Any, architectures: set[str]) -> dict[str, Verdict]:
        found = super().readers(config, architectures)
        sglang = [reason for reason in found["SGLang"].refusals if "anchor" not in reason]
        llama = [reason for reason in found["llama.cpp's converter"].refusals if "anchor" not in reason]
        if not config.sample_from_anchor:
            sglang.append("it takes every slot for the next token's, and would read the drafts one place early")
        if config.markov_rank == 0:
            sglang.append("it refuses a drafter without a Markov head")
            llama.append("it knows DSpark by its Markov head")
        if config.enable_confidence_head and not config.confidence_head_with_markov:
            llama.append("its confidence head reads the token before")
        del found["z-lab's code"]
        deepspec = "it takes embedding and head from the drafter's file, which leaves both to the target"
        return found | {
            # There it is a method of its own, which drafts from the anchor's slot or not.
            "vLLM": Verdict([], found["vLLM"].conditions),
            "SGLang": Verdict(sglang),
            "llama.cpp's converter": Verdict(llama, found["llama.cpp's converter"].conditions),
            "DeepSpec's code": Verdict([deepspec]),
        }

    def needs_gpu_in_vllm(self, config: Any) -> str | None:
        return "its V2 runner alone has the Markov head"

    def facts(self, config: Any, num_drafts: int) -> list[tuple[str, Any]]:
        reads = "the token before the slot too" if config.confidence_head_with_markov else "the slot's state alone"
        return [
            *super().facts(config, num_drafts),
            ("Markov head", f"rank {config.markov_rank}" if config.markov_rank else "none"),
            ("confidence head", f"reads {reads}" if config.enable_confidence_head else "none"),
        ]
