# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What is published of DSpark drafters: DeepSpec, SpecForge, ModelOpt, and the speculators format. DeepSpec's DFlash
drafters are of the same class, without a Markov head (`markov_rank` 0), and so are read as this family.
"""

from typing import Any

import torch

from ..dflash.published_dflash import PublishedDFlash, stated_drafts
from ..published.sections import Sections, agreed, integer, refusal


class PublishedDSpark(PublishedDFlash):
    """DSpark as it is published."""

    family = "dspark"
    architectures = {"Qwen3DSparkModel": "flat", "DSparkDraftModel": "flat"}
    speculators_architectures = frozenset({"DSparkDraftModel", "DSparkSpeculator", "Qwen3DSparkModel"})
    projector = "dspark"
    keys = PublishedDFlash.keys | frozenset(
        "markov_rank dspark_markov_rank markov_head_type enable_confidence_head confidence_head_with_markov "
        "dspark_bonus_anchor".split()
    )
    refused = PublishedDFlash.refused | {
        "logit_scale": ((None, 1.0), "scaled logits"),
        "enable_hidden_correction": ((None, False), "DFly (a correction of hidden states)"),
    }
    unread = {
        "Gemma4DSparkModel": "DSpark with the layers of Gemma 4",
        "Qwen3OmniDSparkModel": "DSpark for a multimodal target",
        "K3DSparkModel": "DSpark with latent attention (Kimi K3)",
        "DeepseekV4DSparkModel": "DSpark with the layers of DeepSeek V4",
    }
    default_non_causal = False

    def arguments(self, sections: Sections, shared: dict[str, Any]) -> dict[str, Any]:
        rank = agreed("markov_rank", sections.stated("markov_rank", "dspark_markov_rank"))
        if rank is None:
            raise ValueError("config.json does not say `markov_rank`, the width of its Markov head; 0 is none.")
        head_type = agreed("markov_head_type", sections.stated("markov_head_type"))
        if integer("markov_rank", rank, 0) and head_type not in (None, "vanilla"):
            if head_type not in ("gated", "rnn"):
                raise ValueError(
                    f"config.json has markov_head_type={head_type!r}; it must be 'vanilla'. 'gated' and 'rnn' are "
                    "published too, and not supported."
                )
            meaning = "a Markov head that reads more than the token before, which vLLM's class does not have either"
            raise refusal("markov_head_type", head_type, meaning)
        # Where it is not written, engines take it for absent and the speculators library for present: what the file
        # lacks or holds then is told when it is loaded.
        is_speculators = sections.layout == "speculators"
        has_head = sections.flag("enable_confidence_head")
        has_head = is_speculators if has_head is None else has_head
        with_markov = sections.flag("confidence_head_with_markov")
        return {
            **super().arguments(sections, shared),
            "markov_rank": rank,
            "enable_confidence_head": has_head,
            "confidence_head_with_markov": has_head and (is_speculators if with_markov is None else with_markov),
        }

    def completed(self, tensors: dict[str, torch.Tensor], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = sorted(name for name in tensors if name.startswith("confidence_head."))
        if found and not arguments["enable_confidence_head"]:
            raise ValueError(
                f"The weights hold {found[0]!r}, but `enable_confidence_head` in config.json is false or not written, "
                "which engines take for no such head. Set it to true, and `confidence_head_with_markov` as the "
                "drafter was trained; or take the tensors out."
            )
        return super().completed(tensors, arguments)

    def samples_from_anchor(self, sections: Sections) -> bool:
        stated, bonus = sections.flag("sample_from_anchor"), sections.flag("dspark_bonus_anchor")
        if stated is not None and stated is bonus:
            raise ValueError(f"Contradiction: sample_from_anchor={stated}, dspark_bonus_anchor={bonus}. Remove one.")
        if stated is not None or bonus is not None:
            return bonus is False if stated is None else stated
        # DeepSpec's and SpecForge's checkpoints never say it and always do.
        return sections.layout != "speculators" or _drafts_whole_block(sections)


def _drafts_whole_block(sections: Sections) -> bool:
    """
    Whether a speculators config drafts as many tokens as a block has positions. Its library and vLLM read configs
    without `sample_from_anchor`, as older versions wrote them, in opposite ways.
    """
    block_size = agreed("block_size", sections.stated("block_size"))
    drafts = stated_drafts(sections)
    if drafts not in (block_size, block_size - 1):
        raise ValueError(
            f"config.json has no `sample_from_anchor`, and its {drafts} speculative_tokens in blocks of {block_size} "
            "do not tell either. Write what the drafter was trained with."
        )
    return drafts == block_size
