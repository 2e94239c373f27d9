# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Names that differ between versions of a dependency: chosen in one module, by what is installed or handed over.
"""

import ast
from functools import wraps
from pathlib import Path

import pytest
import torch

import trl_draft_opd
from helpers.tiny import make_causal_lm, make_drafter, make_target
from trl_draft_opd import FrozenTarget
from trl_draft_opd.utils.versions import CACHE_NAME, TRANSPORT_ERRORS, cache_in, cache_name_of, switch_checkpointing


RENAMED = {"past_key_values", "httpx", "httpx2"} | {
    f"{kind}_checkpointing_{state}" for kind in ("activation", "gradient") for state in ("enable", "disable")
}
# A drafter's `forward` is called by transformers, and a published file stands alone.
OTHER_PLACES = {"drafters/dflash/modeling_dflash.py", "export/custom_generate/generate.py"}


def words_of(tree: ast.AST) -> set[str]:
    """Return every name, argument, attribute, import and text of a file."""
    found = set()
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name", "module", "value"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                found.add(word)
    return found


def test_a_renamed_name_is_written_in_one_module():
    root = Path(trl_draft_opd.__file__).parent
    places = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if words_of(ast.parse(path.read_text("utf-8"))) & RENAMED
    }
    assert places == {"utils/versions.py"} | OTHER_PLACES


def with_old_name(forward):
    @wraps(forward)
    def wrapped(past_key_values=None, **rest):
        assert rest.get("cache") is None
        return forward(**rest | ({} if past_key_values is None else {CACHE_NAME: past_key_values}))

    del wrapped.__wrapped__
    return wrapped


def with_new_name(forward):
    @wraps(forward)
    def wrapped(cache=None, **rest):
        assert rest.get("past_key_values") is None
        return forward(**rest | ({} if cache is None else {CACHE_NAME: cache}))

    del wrapped.__wrapped__
    return wrapped


def test_the_name_of_a_cache_is_the_one_that_the_forward_takes():
    model = make_causal_lm()
    assert cache_name_of(model.base_model.forward) == CACHE_NAME
    assert cache_name_of(with_old_name(model.base_model.forward)) == "past_key_values"
    assert cache_name_of(with_new_name(model.base_model.forward)) == "cache"
    # What says nothing is the library's.
    assert cache_name_of(lambda *arguments, **options: None) == CACHE_NAME


def test_a_cache_is_found_under_both_names():
    assert cache_in({"past_key_values": 1, "use_cache": True}) == cache_in({"cache": 1}) == 1
    assert cache_in({"cache": None, "past_key_values": None}) is cache_in({}) is None


@pytest.mark.parametrize("rename", [with_old_name, with_new_name])
def test_a_target_whose_own_code_has_either_name_is_read_through_its_cache(rename):
    ids = torch.arange(7, 19)[None]
    mask, places = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
    whole = make_target().read_text(ids, mask, [1, 4]).padded()
    model = make_causal_lm()
    model.base_model.forward = rename(model.base_model.forward)
    target = FrozenTarget(model)
    reading = target.read_text(ids[:, :8], mask[:, :8], [1, 4], keep_cache=True)
    cache = reading.caches[0].cache
    rest = target.step(ids[:, 8:], mask, places[:, 8:], cache, [1, 4])
    assert cache.get_seq_length() == ids.shape[1]
    read = torch.cat([reading.padded().features, rest.features], dim=1)
    torch.testing.assert_close(read, whole.features, rtol=1e-3, atol=1e-3)


def test_activation_checkpointing_is_switched_under_the_name_there_is():
    drafter = make_drafter("eagle3", make_target())
    switch_checkpointing(drafter, "enable")
    assert drafter.gradient_checkpointing
    switch_checkpointing(drafter, "disable")
    assert not drafter.gradient_checkpointing


def test_the_errors_of_the_hubs_own_client_are_known():
    from huggingface_hub.utils import get_session

    package = type(get_session()).__module__.split(".")[0]
    assert package in {error.__module__.split(".")[0] for error in TRANSPORT_ERRORS}
