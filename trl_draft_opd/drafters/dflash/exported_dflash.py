# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How DFlash drafters are written, and who reads them; the families built on DFlash add theirs."""

from collections.abc import Iterator
from typing import Any

from ..published.exported import ExportedFamily, Verdict, vllm_conditions, vocabulary_fact


# Targets whose classes hand out no layers for drafters of whole blocks in SGLang 0.5.
_NOT_IN_SGLANG = ("Qwen2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
_PLACES = ("block_size", "mask_token_id")


class ExportedDFlash(ExportedFamily):
    """DFlash as it is written."""

    word = "DFlash"
    method = "dflash"
    algorithm = "DFLASH"
    flat_architecture = "DFlashDraftModel"
    speculators_architecture = "DFlashDraftModel"
    layer_type = "qwen3"
    not_counted = "the target's embedding and head, which it uses, not counted"
    papers = (
        "DFlash: Block Diffusion for Flash Speculative Decoding, [arXiv:2602.06036](https://arxiv.org/abs/2602.06036)",
    )
    #: Whether transformers' own class computes the family's plain form.
    has_native_class = True

    def names(self, layout: str) -> tuple[str, str | None]:
        is_native = layout == "transformers"
        return ("MuseGlimmerAssistantModel", "muse_glimmer_assistant") if is_native else super().names(layout)

    def find_refusal(self, config: Any, layout: str) -> str | None:
        if layout == "transformers":
            lacking = [] if self.has_native_class else [f"what {config.title} adds to DFlash"]
            lacking += self.variants(config)
            if lacking:
                return (
                    f"transformers' own DFlash class cannot express {', '.join(lacking)}. The flat layout carries "
                    "`custom_generate/`, with which `target.generate(..., custom_generate=REPOSITORY, "
                    "trust_remote_code=True)` decodes with one"
                )
        if layout == "speculators":
            if config.attention_sinks or config.attention_value_scale != 1:
                return "its attention has neither sinks nor a scale of values"
            if config.is_causal and "full_attention" in config.layer_types:
                return "its layers of full attention see the whole block, the drafter's see no slot behind"
            if config.is_causal is None and "full_attention" in config.layer_types:
                return (
                    "vLLM, which serves that layout, would take causal blocks in sliding layers for causal blocks in "
                    "all layers"
                )
        return None

    @staticmethod
    def variants(config: Any) -> list[str]:
        """Return what a drafter has beyond the DFlash that was first published, in words."""
        found = []
        if config.sliding_window is not None:
            found.append(f"windows of {config.sliding_window} tokens")
        if config.is_causal is not False:
            found.append("causal blocks")
        if config.attention_sinks:
            found.append("attention sinks")
        if config.attention_value_scale != 1:
            found.append("scaled values")
        if config.attention_bias:
            found.append("biases")
        if config.has_reduced_vocabulary:
            found.append("a reduced vocabulary")
        if config.sample_from_anchor:
            found.append("a draft in the anchor's slot")
        return found

    def speculators_sections(
        self, flat: dict[str, Any], boundaries: list[int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        own = {
            "aux_hidden_state_layer_ids": boundaries,
            "block_size": flat["block_size"],
            "draft_vocab_size": flat.get("draft_vocab_size", flat["vocab_size"]),
            "mask_token_id": flat["mask_token_id"],
            "sample_from_anchor": flat["sample_from_anchor"],
            # In sliding layers; vLLM turns `false`, the library's own default, into causal attention in every layer.
            "sliding_window_non_causal": flat.get("is_causal") is False,
        }
        copied = "is_causal layer_types max_window_layers sliding_window use_sliding_window".split()
        return own, {name: flat[name] for name in copied if name in flat}

    def layer_id_places(self, layout: str, ids: list[int]) -> dict[tuple[str, ...], list[int]]:
        if layout == "speculators":
            return {("aux_hidden_state_layer_ids",): [i + 1 for i in ids]}
        # vLLM and SGLang look into the nested section first.
        nested = {("dflash_config", "target_layer_ids"): ids} if layout == "flat" else {}
        return {("target_layer_ids",): ids} | nested

    def find_problems(self, layout: str, raw: dict[str, Any], shape: dict[str, Any]) -> Iterator[tuple[str, str]]:
        kinds, is_causal = shape.get("layer_types") or [], shape.get("is_causal")
        is_sliding = "sliding_attention" in kinds
        # Without the key, engines take blocks for causal in sliding layers alone.
        is_stated = isinstance(is_causal, bool) or (is_causal is None and is_sliding)
        if layout != "transformers" and not is_stated:
            yield "C8", f"is_causal is {is_causal!r}; without false, engines may hide later slots of a block."
        if len(kinds) != shape.get("num_hidden_layers"):
            yield "C8", f"layer_types is {kinds}; it must name every layer, full_attention or sliding_attention."
        nested = raw.get("dflash_config") or {}
        for name in _PLACES if layout == "flat" else ():
            own, other = raw.get(name), nested.get(name)
            if own is None or other != own:
                yield "C8", f"{name} is {own}, in dflash_config {other}; it must stand in both places."
        if layout == "flat" and "eagle_aux_hidden_state_layer_ids" in raw:
            yield "C8", "eagle_aux_hidden_state_layer_ids is written; vLLM reads it before dflash_config."
        mask, vocabulary = raw.get("mask_token_id"), shape["vocab_size"]
        if mask is None or mask >= vocabulary:
            yield "C8", f"mask_token_id is {mask}, it must lie in 0..{vocabulary - 1}."
        is_open = raw.get("sliding_window_non_causal") is True
        if layout == "speculators" and is_open != (is_causal is False):
            yield "C9", "sliding_window_non_causal must be true, or false for causal blocks; vLLM reads no other key."

    def sglang_flags(self, config: Any, num_drafts: int) -> dict[str, Any]:
        # The anchor counts among the draft tokens.
        return {"speculative-num-draft-tokens": num_drafts + 1}

    def readers(self, config: Any, architectures: set[str]) -> dict[str, Verdict]:
        # Shared by all families of whole blocks: what engines' classes of DFlash layers can and cannot do.
        from_anchor = ["it takes no draft from the anchor's slot"] if config.sample_from_anchor else []
        reduced = ["it drafts through the target's head alone"] if config.has_reduced_vocabulary else []
        special = ["its layers have neither sinks nor a scale of values"] if self._is_special(config) else []
        foreign = sorted(architectures & set(_NOT_IN_SGLANG))
        handed = [f"its class for {foreign[0]} hands out no layers to such drafters"] if foreign else []
        return {
            "vLLM": Verdict(list(from_anchor), self.vllm_conditions(config, architectures)),
            "SGLang": Verdict([*from_anchor, *reduced, *special, *handed]),
            "transformers (custom_generate)": Verdict(),
            "speculators": Verdict(self._differing_windows(config)),
            "z-lab's code": Verdict([*from_anchor, *reduced, *special]),
            "llama.cpp's converter": Verdict(
                [*from_anchor, *self._refused_by_llama_cpp(config)], ["with `--target-model-dir TARGET`"]
            ),
            "transformers (assistant_model)": Verdict(),
        }

    def vllm_conditions(self, config: Any, architectures: set[str]) -> list[str]:
        """Return under which conditions vLLM serves a drafter."""
        conditions = vllm_conditions(architectures)
        if config.is_causal is not True:
            conditions.append("with an attention backend that can be non-causal (FlashAttention, FlexAttention)")
        reason = self.needs_gpu_in_vllm(config)
        return conditions + ([] if reason is None else [f"on a GPU: {reason}"])

    def needs_gpu_in_vllm(self, config: Any) -> str | None:
        mixes = len(set(config.layer_types)) > 1
        return "its V2 runner alone mixes windows and full attention" if mixes else None

    @staticmethod
    def _differing_windows(config: Any) -> list[str]:
        counted = "it counts the window of every slot from the anchor, where engines count it from the slot itself"
        return [] if config.sliding_window is None else [counted]

    @staticmethod
    def _is_special(config: Any) -> bool:
        return config.attention_sinks or config.attention_value_scale != 1

    @staticmethod
    def _refused_by_llama_cpp(config: Any) -> list[str]:
        lacking = []
        if config.attention_bias:
            lacking.append("its layers have no biases")
        if config.attention_value_scale != 1:
            lacking.append("its layers do not scale values")
        if config.is_causal is not False:
            lacking.append("it is not known to hide later slots of a block")
        if config.has_reduced_vocabulary:
            lacking.append("it is not known to keep the vocabulary's map")
        return lacking

    def facts(self, config: Any, num_drafts: int) -> list[tuple[str, Any]]:
        anchor = (
            "each drafts the token behind it" if config.sample_from_anchor else f"the anchor and {num_drafts} drafts"
        )
        variants = ", ".join(each for each in self.variants(config) if "draft" not in each and "vocab" not in each)
        rows: list[tuple[str, Any]] = [
            ("block", f"{config.block_size} slots: {anchor}"),
            ("layers", f"{config.num_hidden_layers}{', ' * bool(variants)}{variants}"),
            ("mask token", config.mask_token_id),
        ]
        return rows + ([vocabulary_fact(config)] if config.has_reduced_vocabulary else [])
