# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Who wrote a response, and under which distribution: the identity that stored responses carry. Knows no file format and
no engine.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.text_reader import TextReader
from ..rollout.acceptance import SamplingSettings
from ..target.frozen import FrozenTarget


SCHEMA_VERSION = 1
# Names of the target, under which the same weights may be found in several places.
_LABELS = ("target", "revision")
# Fields of a config that do not change which text the target writes. EOS ids have a field of their own.
_IDLE_CONFIG = {
    *("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict", "output_router_logits", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "attention_dropout"),
}
_ELEMENTS_PER_PARAMETER = 256


@dataclass(frozen=True)
class Origin:
    """
    Name the target that wrote responses, how it read prompts, and the distribution it drew tokens from.

    Two origins are the same when all fields but `target` and `revision` agree: those two are names, and the same
    weights may lie in several places. The precision of the weights and the engine are not part of it; they are kept
    per shard.

    Attributes:
        target (`str` or `None`), revision (`str` or `None`):
            Hub id or path, and commit, as far as known.
        config_hash (`str`):
            SHA-256 of the config's fields that shape the text; library version, precision and names are left out.
        weights_fingerprint (`str`):
            See [`fingerprint_weights`].
        vocab_size (`int`), max_positions (`int` or `None`):
            Valid token ids are `0..vocab_size - 1`; the longest text, in tokens.
        tokenizer_hash (`str` or `None`), chat_template_hash (`str` or `None`), chat_template_kwargs (`dict`):
            How text and chats became ids. `None`: there is none.
        temperature (`float`), top_k (`int`), top_p (`float`):
            The distribution. Greedy decoding is stored as `0.0, 0, 1.0`: filters do not change an argmax.
        max_new_tokens (`int`), eos_token_ids (`tuple[int, ...]`):
            What ends a response.
        schema_version (`int`):
            Layout of the files.
    """

    target: str | None
    revision: str | None
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
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    schema_version: int

    @classmethod
    def of(
        cls,
        target: FrozenTarget,
        reader: TextReader | None = None,
        *,
        sampling: SamplingSettings,
        max_new_tokens: int,
    ) -> "Origin":
        """
        Describe what a loaded target is about to write.

        Args:
            target ([`FrozenTarget`]): The target, with its tokenizer where prompts are text.
            reader ([`TextReader`], *optional*):
                How prompts are read: its chat template and the template's variables, plain JSON values.
            sampling ([`SamplingSettings`]): The distribution of its tokens.
            max_new_tokens (`int`): Longest response.

        Raises:
            ValueError: If `max_new_tokens` is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
        template = reader.chat_template if reader is not None else None
        if template is None and target.tokenizer is not None:
            template = target.tokenizer.chat_template
        config = target.config
        return cls(
            target=config.name_or_path or target.causal_lm.config.name_or_path or None,
            revision=getattr(target.causal_lm.config, "_commit_hash", None),
            config_hash=hash_config(config),
            weights_fingerprint=target.weights_fingerprint or fingerprint_weights(target.causal_lm),
            vocab_size=target.vocab_size,
            max_positions=getattr(config, "max_position_embeddings", None),
            tokenizer_hash=None if target.tokenizer is None else hash_tokenizer(target.tokenizer),
            chat_template_hash=None if template is None else _hash_json(template),
            # Through JSON and back, so that what is compared later is what a file gives back.
            chat_template_kwargs=json.loads(
                json.dumps((reader.chat_template_kwargs if reader is not None else None) or {})
            ),
            temperature=float(sampling.temperature),
            top_k=0 if sampling.is_greedy else sampling.top_k,
            top_p=1.0 if sampling.is_greedy else float(sampling.top_p),
            max_new_tokens=max_new_tokens,
            eos_token_ids=tuple(target.eos_token_ids),
            schema_version=SCHEMA_VERSION,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Origin":
        """
        Read what [`Origin.to_dict`] wrote.

        Raises:
            ValueError: If the layout is another version's, or fields are missing, unknown or of another type.
        """
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"the layout is version {version!r}, this release reads version {SCHEMA_VERSION}. Read it with the "
                "release that wrote it, or write the responses anew into another folder."
            )
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"the fields {sorted(set(values) ^ names)} are missing or unknown.")
        origin = cls(**values | {"eos_token_ids": tuple(values["eos_token_ids"])})
        numbers = (origin.vocab_size, origin.max_new_tokens, origin.top_k, *origin.eos_token_ids)
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"sizes and ids must be whole numbers, got {numbers}.")
        return origin

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @property
    def sampling(self) -> SamplingSettings:
        """The distribution of the tokens."""
        return SamplingSettings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def digest(self) -> str:
        """SHA-256 of everything but the target's names: equal iff two origins are the same."""
        return _hash_json({name: value for name, value in self.to_dict().items() if name not in _LABELS})

    def check_same(self, other: "Origin", where: str = "the stored responses") -> None:
        """
        Refuse responses of another origin.

        Args:
            other ([`Origin`]): Origin of what is stored.
            where (`str`): What to call it.

        Raises:
            ValueError: Naming each field that differs, both values, and the fix.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        lines = [
            f"  {name}: {theirs[name]!r} there, {mine[name]!r} here ({_meaning(name)})"
            for name in mine
            if name not in _LABELS and mine[name] != theirs[name]
        ]
        if lines:
            raise ValueError(
                f"{where} were written under other conditions, by target {other.target!r}; this run's is "
                f"{self.target!r}:\n"
                + "\n".join(lines)
                + "\nUse the settings and the target they were written with, or give another folder and write them "
                "anew with `trl-draft-opd generate`."
            )


def _meaning(name: str) -> str:
    """Return what a difference in a field means."""
    return {
        "config_hash": "another architecture",
        "weights_fingerprint": "other weights",
        "vocab_size": "another vocabulary",
        "max_positions": "longest text of the target",
        "tokenizer_hash": "another tokenizer",
        "chat_template_hash": "another chat template",
        "max_new_tokens": "longest response",
        "eos_token_ids": "what ends a response",
        "schema_version": "layout of the files",
    }.get(name, f"`{name}`")


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_config(config: Any) -> str:
    """
    Hash the fields of a config that shape the text.

    Fields that are unset or off count like absent ones: newer libraries add such fields to old checkpoints.
    """
    values = config.to_diff_dict()
    return _hash_json({k: v for k, v in values.items() if k not in _IDLE_CONFIG and v is not None and v is not False})


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Hash how a tokenizer turns text into ids: vocabulary, merges, added tokens, and its pipeline where it has one.

    Padding, truncation and which token pads are left out: they do not change the ids of a single text.
    """
    if not tokenizer.is_fast:
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        return _hash_json([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), added])
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    # As pairs, because older files spell a merge as one string; "special" turns on when a known token is made the pad
    # token.
    merges = pipeline["model"].get("merges", [])
    pipeline["model"]["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for token in pipeline["added_tokens"]:
        token.pop("special", None)
    return _hash_json({k: v for k, v in pipeline.items() if k not in ("padding", "truncation", "version")})


@torch.no_grad()
def fingerprint_weights(model: PreTrainedModel) -> str:
    """
    Hash names, shapes and up to 256 evenly spaced elements of every stored tensor, in the order of their names.

    Elements are rounded to bfloat16 first, so that a checkpoint gives one fingerprint in float32 and in bfloat16 (in
    float16 only where it was stored so). It tells apart models, fine-tunes and quantisations, at the cost of reading a
    few thousand numbers. It cannot see a change that spares every sampled element or stays below bfloat16's precision:
    the check of responses against the target is there for that. A tied head is the embedding itself and counts once;
    loading the same values untied gives another fingerprint. Of tensors that are offloaded to disk, names and shapes
    alone count.
    """
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        flat = tensor.detach().reshape(-1)
        count = min(_ELEMENTS_PER_PARAMETER, len(flat))
        places = torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)
        digest.update(flat[places].to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()
