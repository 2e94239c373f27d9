# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Who wrote a response, and under which distribution: the identity that stored responses carry. Knows no file format.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..data.text_reader import TextReader
from ..rollout.acceptance import SamplingSettings
from ..target.frozen import FrozenTarget
from ..utils.hashing import hash_json


# Fields of a config that do not change which text the target writes. EOS ids have a field of their own.
_IDLE_CONFIG = {
    *("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict", "output_router_logits", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "attention_dropout"),
}


@dataclass(frozen=True)
class Origin:
    """
    Name the target that wrote responses, how it read prompts, and the distribution it drew tokens from.

    Two origins are equal when all fields but `target` and `revision` agree: those are names, and the same weights may
    lie in several places. Precision and engine are not part of it; they are kept per shard.

    Attributes:
        target (`str` or `None`), revision (`str` or `None`):
            Hub id or path, and commit, as far as known.
        config_hash (`str`):
            SHA-256 of the config's fields that shape the text; library version, precision and names are left out.
        weights_fingerprint (`str`):
            Of every element, rounded to bfloat16; see [`FrozenTarget.weights_fingerprint`].
        vocab_size (`int`), max_positions (`int` or `None`):
            Valid token ids are `0..vocab_size - 1`; the longest text, in tokens.
        tokenizer_hash (`str` or `None`), chat_template_hash (`str` or `None`), chat_template_kwargs (`dict`):
            How text and chats became ids. `None`: there is none.
        temperature (`float`), top_k (`int`), top_p (`float`):
            The distribution. Greedy decoding is stored as `0.0, 0, 1.0`: filters do not change an argmax.
        max_completion_length (`int`), eos_token_ids (`tuple[int, ...]`):
            What ends a response.
    """

    target: str | None = field(compare=False)
    revision: str | None = field(compare=False)
    config_hash: str
    weights_fingerprint: str
    vocab_size: int
    max_positions: int | None
    tokenizer_hash: str | None
    chat_template_hash: str | None
    chat_template_kwargs: dict[str, Any]
    temperature: float
    top_k: int
    top_p: float
    max_completion_length: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(
        cls,
        target: FrozenTarget,
        reader: TextReader | None = None,
        *,
        sampling: SamplingSettings,
        max_completion_length: int,
    ) -> "Origin":
        """
        Describe what a loaded target is about to write.

        Args:
            target ([`FrozenTarget`]): The target, with its tokenizer where prompts are text.
            reader ([`TextReader`], *optional*):
                How prompts are read: its chat template and the template's variables, plain JSON values.
            sampling ([`SamplingSettings`]): The distribution of its tokens.
            max_completion_length (`int`): Longest response.

        Raises:
            ValueError: If `max_completion_length` is below 1.
        """
        if max_completion_length < 1:
            raise ValueError(f"`max_completion_length` must be at least 1, got {max_completion_length}.")
        template = reader.chat_template if reader is not None else None
        if template is None and target.tokenizer is not None:
            template = target.tokenizer.chat_template
        template_kwargs = reader.chat_template_kwargs if reader is not None else None
        config = target.config
        return cls(
            target=config.name_or_path or target.causal_lm.config.name_or_path or None,
            revision=getattr(target.causal_lm.config, "_commit_hash", None),
            config_hash=hash_config(config),
            weights_fingerprint=target.weights_fingerprint,
            vocab_size=target.vocab_size,
            max_positions=target.num_positions,
            tokenizer_hash=None if target.tokenizer is None else hash_tokenizer(target.tokenizer),
            chat_template_hash=None if template is None else hash_json(template),
            # Through JSON and back, so that what is compared later is what a file gives back.
            chat_template_kwargs=json.loads(json.dumps(template_kwargs or {})),
            temperature=float(sampling.temperature),
            top_k=0 if sampling.is_greedy else sampling.top_k,
            top_p=1.0 if sampling.is_greedy else float(sampling.top_p),
            max_completion_length=max_completion_length,
            eos_token_ids=tuple(target.eos_token_ids),
        )

    @property
    def sampling(self) -> SamplingSettings:
        """The distribution of the tokens."""
        return SamplingSettings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def digest(self) -> str:
        """SHA-256 of what is compared: equal iff two origins are."""
        return hash_json({each.name: getattr(self, each.name) for each in fields(self) if each.compare})

    def finish_reason(self, completion_ids: Sequence[int]) -> str:
        """Return `"stop"` for a response that ends with an end-of-sequence id, else `"length"`."""
        return "stop" if completion_ids[-1] in self.eos_token_ids else "length"

    def check_same(self, other: "Origin", where: str = "the stored responses") -> None:
        """
        Refuse responses of another origin.

        Args:
            other ([`Origin`]): Origin of what is stored.
            where (`str`): What to call it.

        Raises:
            ValueError: Naming each field that differs, both values, and the fix.
        """
        if self == other:
            return
        pairs = [(each.name, getattr(other, each.name), getattr(self, each.name)) for each in fields(self)]
        lines = [
            f"  {name}: {_shown(there)} there, {_shown(here)} here\n" for name, there, here in pairs if there != here
        ]
        fix = "Use the settings and the target they were written with"
        if self.max_completion_length != other.max_completion_length:
            fix += f" (here `max_completion_length={other.max_completion_length}`)"
        raise ValueError(
            f"{where} were written under other conditions:\n{''.join(lines)}{fix}, or give another folder and write "
            "them anew with `trl-draft-opd generate`."
        )


def _shown(value: Any) -> str:
    """Return a value for print; of a SHA-256, the first digits tell it from another."""
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return value[:8] if is_hash else repr(value)


def hash_config(config: PreTrainedConfig) -> str:
    """
    Hash the fields of a config that shape the text.

    Fields that are unset or off count like absent ones: newer libraries add such fields to old checkpoints.
    """
    values = config.to_diff_dict()
    return hash_json({k: v for k, v in values.items() if k not in _IDLE_CONFIG and v is not None and v is not False})


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Hash how a tokenizer turns text into ids: vocabulary, merges, added tokens, and its pipeline where it has one.

    Padding, truncation and which token pads are left out: they do not change the ids of a single text.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        return hash_json([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), added])
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in pipeline["added_tokens"]:
        # Turns on when a known token is made the pad token.
        token.pop("special", None)
    return hash_json({k: v for k, v in pipeline.items() if k not in ("padding", "truncation", "version")})
