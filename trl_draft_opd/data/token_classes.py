# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What kind of token an id is: a digit, the start of a word, punctuation, and so on, for counts by kind."""

import unicodedata

import torch
from transformers import PreTrainedTokenizerBase


# In the order of their indices.
TOKEN_CLASSES = ("special", "whitespace", "digit", "word_start", "word_part", "code_symbol", "punctuation", "other")
_CODE_SYMBOLS = frozenset("{}[]()<>=+-*/\\|&^%$#@~`_")
# How byte-level and SentencePiece tokenizers write the space before a token.
_SPACE_MARKS = ("Ġ", "▁", " ")


def token_class(piece: str, text: str) -> str:
    """
    Return the class of an ordinary token.

    Args:
        piece (`str`): The token as its vocabulary writes it, which tells whether a space is before it.
        text (`str`): The token decoded.
    """
    core = text.strip()
    if not core:
        return "whitespace" if text else "other"
    if all(mark.isdecimal() for mark in core):
        return "digit"
    if any(mark.isalpha() for mark in core):
        return "word_start" if piece.startswith(_SPACE_MARKS) else "word_part"
    if all(mark in _CODE_SYMBOLS for mark in core):
        return "code_symbol"
    is_punctuation = all(mark in _CODE_SYMBOLS or unicodedata.category(mark).startswith("P") for mark in core)
    return "punctuation" if is_punctuation else "other"


def token_classes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """Return the index in `TOKEN_CLASSES` of every id of a target, `(vocab_size,)` int64."""
    special = {*tokenizer.all_special_ids}
    special |= {token_id for token_id, added in tokenizer.added_tokens_decoder.items() if added.special}
    index = {name: number for number, name in enumerate(TOKEN_CLASSES)}
    classes = torch.full((vocab_size,), index["other"])
    ids = range(min(vocab_size, len(tokenizer)))
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    texts = tokenizer.batch_decode([[token_id] for token_id in ids])
    for token_id, piece, text in zip(ids, pieces, texts, strict=True):
        name = "special" if token_id in special else token_class(piece or "", text)
        classes[token_id] = index[name]
    return classes
