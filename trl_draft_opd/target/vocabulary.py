# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Which token ids text uses, which have a meaning of their own, and which are free. Knows no model."""

import re
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase


# Names of a token that was made to stand for what is to be filled in.
_MASK_NAMES = ("<|mask|>", "<|MASK|>")
# Names by which vocabularies call tokens that they keep free.
_RESERVED_NAME = re.compile(r"[<\[].*(unused|reserved|placeholder).*[>\]]", re.IGNORECASE)
_LISTED = 12
_SPECIAL_NAMES = ("bos", "eos", "pad", "unk", "sep", "cls", "decoder_start")


def eos_ids(config: PreTrainedConfig, generation: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the ids that end a response: the generation config's, else the config's; and the tokenizer's own."""
    configured: Any = generation.eos_token_id if generation else None
    configured = configured if configured is not None else config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    if tokenizer is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return sorted({i for i in ids if i is not None and i < config.vocab_size})


def pad_id(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, eos: list[int]) -> int:
    """Return an id to fill rows with: the tokenizer's, the config's, or one that ends a response."""
    own: Any = tokenizer.pad_token_id if tokenizer else None
    for candidate in (own, config.pad_token_id):
        # A pad token that was added to the tokenizer alone has no row of the embedding.
        if candidate is not None and 0 <= candidate < config.vocab_size:
            return candidate
    return eos[0] if eos else 0


def special_ids(*holders: Any) -> set[int]:
    """Return the ids that configs and tokenizers name as special."""
    ids = [getattr(holder, f"{name}_token_id", None) for holder in holders for name in _SPECIAL_NAMES]
    return {token_id for token_id in ids if isinstance(token_id, int)}


def find_unused_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int, special_ids: Collection[int]) -> int:
    """
    Return an id below `vocab_size` that text never uses: the mask token's, else a row of the embedding that the
    tokenizer has no token for, behind its last one if there is any. `special_ids` have another meaning.

    Raises:
        ValueError: If every row is some token's, with the tokens that the chat template does not use.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = {token_id: token for token, token_id in vocabulary.items()}
    tokens |= {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
    template = str(tokenizer.chat_template or "")
    usable = {
        token_id: token
        for token_id, token in sorted(tokens.items())
        if token_id < vocab_size and token_id not in special_ids and token not in template
    }
    for name in (tokenizer.mask_token, *_MASK_NAMES):
        if name is not None and vocabulary.get(str(name)) in usable:
            return vocabulary[str(name)]
    free = [token_id for token_id in range(vocab_size) if token_id not in tokens and token_id not in special_ids]
    if free:
        last = max(tokens)
        return next((token_id for token_id in free if token_id > last), free[-1])
    raise ValueError(
        f"Every one of the target's {vocab_size} embedding rows is in use by its tokenizer, so DFlash needs a token "
        f"that your text never contains as its mask. {_describe_reserved(tokenizer, usable)}"
    )


def _describe_reserved(tokenizer: PreTrainedTokenizerBase, usable: dict[int, str]) -> str:
    """Return a sentence about tokens, by id, that text is unlikely to contain."""
    added: Any = tokenizer.added_tokens_decoder
    reserved = [
        token_id
        for token_id, token in usable.items()
        if (token_id in added and added[token_id].special) or _RESERVED_NAME.fullmatch(token)
    ]
    if not reserved:
        return "Pass `mask_token_id=` (`--mask-token-id`) with the id of one."
    # Those that say so first.
    reserved.sort(key=lambda token_id: _RESERVED_NAME.fullmatch(usable[token_id]) is None)
    listed = ", ".join(f"{token_id} {usable[token_id]!r}" for token_id in reserved[:_LISTED])
    more = f" and {len(reserved) - _LISTED} more" if len(reserved) > _LISTED else ""
    return (
        f"Reserved tokens that its chat template does not use: {listed}{more}. Pass the id of one as `mask_token_id=` "
        "(`--mask-token-id`)."
    )


def describe_beyond(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    """Return a sentence about a tokenizer's ids that the target has no embedding row for, or `None`."""
    beyond = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size}
    if not beyond:
        return None
    first = min(beyond)
    return (
        f"The tokenizer has {len(beyond)} ids beyond the target's {vocab_size} embedding rows, the first is {first} "
        f"({beyond[first]!r}). A text with one of them is refused. Is it the target's own tokenizer?"
    )
