# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How EAGLE-3 drafters are written, and who reads them."""

from collections.abc import Iterator
from typing import Any

from ..published.exported import ExportedFamily, Verdict, vllm_conditions, vocabulary_fact


_IDS = "eagle_aux_hidden_state_layer_ids"
_NORM_FLAGS = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
# Targets of SGLang's class `deepseek_v2`: it takes layer ids for those of layers only where the first is 1, and for
# counts of layers that have run otherwise.
_READ_AS_COUNTS = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "KimiK25ForConditionalGeneration",
    "KimiVLForConditionalGeneration",
)


class ExportedEagle3(ExportedFamily):
    """EAGLE-3 as it is written."""

    word = "EAGLE3"
    method = "eagle3"
    algorithm = "EAGLE3"
    flat_architecture = "LlamaForCausalLMEagle3"
    speculators_architecture = "Eagle3DraftModel"
    layer_type = "llama"
    carries_embedding = True
    not_counted = "the copy of the target's embedding not counted"
    papers = (
        "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test, "
        "[arXiv:2503.01840](https://arxiv.org/abs/2503.01840)",
    )

    def find_refusal(self, config: Any, layout: str) -> str | None:
        if layout == "transformers":
            return (
                "transformers has no class for EAGLE-3 drafters. The flat layout carries `custom_generate/`, with "
                "which `target.generate(..., custom_generate=REPOSITORY, trust_remote_code=True)` decodes with one"
            )
        return None

    def speculators_sections(
        self, flat: dict[str, Any], boundaries: list[int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        # `ttt_steps` is not needed by the library, and kept so that the drafter comes back as it was.
        own = {name: flat[name] for name in ("draft_vocab_size", *_NORM_FLAGS, "ttt_steps")}
        # vLLM takes three layers for granted where the layer's section does not say how many.
        return own | {_IDS: boundaries, "embed_requires_grad": False}, {"num_aux_hidden_states": len(boundaries)}

    def layer_id_places(self, layout: str, ids: list[int]) -> dict[tuple[str, ...], list[int]]:
        boundaries = [i + 1 for i in ids]
        # vLLM reads the key at the root, SGLang the nested one.
        return {(_IDS,): boundaries} | ({("eagle_config", _IDS): ids} if layout == "flat" else {})

    def find_problems(self, layout: str, raw: dict[str, Any], shape: dict[str, Any]) -> Iterator[tuple[str, str]]:
        unwritten = [flag for flag in _NORM_FLAGS if not isinstance(raw.get(flag), bool)]
        if unwritten:
            yield "C1", f"{unwritten} must be written as true or false; engines take different defaults."
        if raw.get("draft_vocab_size") is None:
            yield "C11", "draft_vocab_size is not written; SGLang and TensorRT-LLM need it."

    def sglang_flags(self, config: Any, num_drafts: int) -> dict[str, Any]:
        # One chain and no tree. SGLang counts the anchor among the draft tokens.
        return {
            "speculative-num-steps": num_drafts,
            "speculative-eagle-topk": 1,
            "speculative-num-draft-tokens": num_drafts + 1,
        }

    def readers(self, config: Any, architectures: set[str]) -> dict[str, Verdict]:
        flags = ", ".join(name for name in _NORM_FLAGS if getattr(config, name))
        layers, ids = config.num_target_layers, list(config.target_layer_ids or ())
        is_default = layers is not None and ids == [1, layers // 2 - 1, layers - 4]
        fixed = [f"it always reads the layers [1, N // 2 - 1, N - 4], the drafter reads {ids}"]
        convention = [] if is_default else fixed
        biases = ["its layer has no biases"] if config.attention_bias else []
        eagle = convention + ([f"it has no {flags}"] if flags else []) + biases
        if config.head_dim not in (None, config.hidden_size / config.num_attention_heads):
            eagle.append("it takes the head size for hidden_size / num_attention_heads")
        if (config.rope_parameters or {}).get("rope_type", "default") != "default":
            eagle.append("its RoPE knows linear and dynamic scaling alone")
        sglang = (["it has no norm_before_residual"] if config.norm_before_residual else []) + biases
        counted = sorted(architectures & set(_READ_AS_COUNTS))
        if counted and ids[:1] != [1]:
            sglang.append(
                f"its class for {counted[0]} takes layer ids whose first is not 1 for counts of layers that have run, "
                f"and would read {ids} one layer too early"
            )
        return {
            "vLLM": Verdict([], vllm_conditions(architectures)),
            "SGLang": Verdict(sglang),
            "transformers (custom_generate)": Verdict(),
            "speculators": Verdict(),
            "EAGLE's code": Verdict(eagle, ["if the target's weights lie in several files with an index"]),
            "llama.cpp's converter": Verdict(
                convention + ([f"it is not known to carry {flags}"] if flags else []) + biases,
                ["with `--target-model-dir TARGET`"],
            ),
        }

    def facts(self, config: Any, num_drafts: int) -> list[tuple[str, Any]]:
        norms = ", ".join(f"`{name}`" for name in _NORM_FLAGS if getattr(config, name))
        return [
            ("drafts in training", num_drafts),
            ("norms", norms or "as in EAGLE-3's own code, no further ones"),
            vocabulary_fact(config),
        ]
