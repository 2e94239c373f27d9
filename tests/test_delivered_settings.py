# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a run with `readings` refuses, before any work, and what it says to do instead."""

from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from helpers.delivered import LAYERS, make_folder, make_trainer, rows_in, texts_of, whole_target, write
from helpers.tiny import TINY_RUN, make_drafter
from trl_draft_opd import DraftOPDConfig, DraftSFTConfig, FrozenTarget, open_readings
from trl_draft_opd.readings.store import ReadingStore
from trl_draft_opd.responses.store import ResponseStore
from trl_draft_opd.trainer.card_memory import target_bytes
from trl_draft_opd.trainer.texts import open_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("delivered"))


CONFIGS = {"sft": DraftSFTConfig, "opd": DraftOPDConfig}
STORE = {"readings": "readings"}
SERVED = {"readings": "http://127.0.0.1:8000"}
REFUSED = [
    ("opd", STORE | {"rollout": "live"}, "rollout='replay'"),
    ("opd", STORE | {"rejected_scope": "suffix"}, "rejected_scope='first'"),
    ("sft", STORE | {"shard_target": True}, "Leave one of the two out"),
    ("sft", STORE | {"shared_folder": "states"}, "`http://...` in `readings`"),
    ("sft", {"shared_folder": "states"}, "`http://...` in `readings`"),
    ("sft", SERVED, "`shared_folder`"),
    ("sft", SERVED | {"shared_folder": "states", "shuffle_by_shard": True}, "the folder of a store"),
    ("sft", {"shuffle_by_shard": True}, "the folder of a store"),
    ("sft", STORE | {"shuffle_by_shard": True, "train_sampling_strategy": "sequential"}, "both order"),
    ("sft", STORE | {"api_key_file": "key"}, "leave `api_key_file` out"),
    ("sft", {"readings": "http://me:word@a:1"}, r"names servers.*`shared_folder`"),
    ("sft", STORE | {"prefetch_bytes": 0}, "`prefetch_bytes` must be at least 1"),
    ("sft", {"readings": ""}, "`readings` is empty"),
    ("sft", {"readings": ["http://a:1", "http://b:1"]}, "separated by commas"),
]


@pytest.mark.parametrize(("method", "settings", "fix"), REFUSED)
def test_settings_that_readings_have_no_use_for_are_refused_with_the_fix(tmp_path, method, settings, fix):
    with pytest.raises(ValueError, match=fix) as error:
        CONFIGS[method](output_dir=str(tmp_path), **TINY_RUN, **settings)
    assert "word" not in str(error.value)


def test_folders_may_be_paths(tmp_path):
    config = DraftSFTConfig(str(tmp_path), **TINY_RUN, readings=tmp_path / "a")
    assert config.readings == str(tmp_path / "a")


def test_a_stream_has_no_order_by_shard(tmp_path, folder):
    rows = rows_in(folder).to_iterable_dataset()
    with pytest.raises(ValueError, match="`train_dataset` is a stream"):
        make_trainer(
            folder,
            tmp_path,
            readings=str(folder / "float32"),
            shuffle_by_shard=True,
            train_sampling_strategy="random",
            rows=rows,
            max_steps=2,
        )


def test_the_source_of_a_run_is_not_that_of_the_next_one_on_the_same_target(tmp_path, folder):
    target = whole_target(folder)
    first = make_trainer(folder, tmp_path / "a", target=target, readings=str(folder / "float32"))
    assert first.target.source is not None
    second = make_trainer(folder, tmp_path / "b", target=target)
    assert second.target is target and target.source is None


def test_a_source_of_other_layers_than_the_drafters_is_refused(tmp_path, folder):
    target = whole_target(folder)
    target.source = open_readings(target, str(folder / "float32"), LAYERS[:1])
    with pytest.raises(ValueError, match=r"fetches the layers \[\d\] ahead, and the drafter taps"):
        make_trainer(folder, tmp_path / "a", target=target)
    target.source.close()


def test_suffixes_without_weight_need_no_body(tmp_path):
    DraftOPDConfig(str(tmp_path), **TINY_RUN, **STORE, rejected_scope="suffix", rejected_weight=0.0)


def test_a_folder_that_is_no_store_is_refused_by_what_it_is(tmp_path, folder):
    target, drafter = whole_target(folder), make_drafter("dflash", whole_target(folder))
    args = DraftOPDConfig(str(tmp_path / "run"), **TINY_RUN, responses=str(tmp_path / "responses"))
    open_store(target, args.fit_to(target.num_positions, drafter.default_num_drafts))
    (tmp_path / "empty").mkdir()
    for name, says in (
        ("missing", "is no folder. Write one with `trl-draft-opd read`"),
        ("responses", "holds responses.*Name it in `responses`"),
        ("empty", "`trl-draft-opd read`"),
    ):
        with pytest.raises(ValueError, match=says):
            make_trainer(folder, tmp_path / "out", readings=str(tmp_path / name))


@pytest.mark.parametrize("readings", ["http://127.0.0.1:8000, readings", "http://127.0.0.1:8000,ftp://a"])
def test_addresses_and_folders_do_not_mix(tmp_path, folder, readings):
    with pytest.raises(ValueError, match=r"Give addresses alone"):
        make_trainer(folder, tmp_path, readings=readings, shared_folder=str(tmp_path))


def test_a_store_without_the_drafters_layers_is_refused_before_a_row_is_read(tmp_path, folder):
    write(whole_target(folder), texts_of(rows_in(folder))[:1], tmp_path / "few", layer_ids=LAYERS[:1])
    with pytest.raises(ValueError, match="lack"):
        make_trainer(folder, tmp_path / "run", readings=str(tmp_path / "few"))


def test_a_store_of_another_precision_of_the_target_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="target_dtype"):
        make_trainer(folder, tmp_path, readings=str(folder / "float32"), target_dtype="bfloat16")


@pytest.fixture
def partial(tmp_path, folder) -> str:
    """A store without the sixth text and those behind it."""
    write(whole_target(folder), texts_of(rows_in(folder))[:5], tmp_path / "partial")
    return str(tmp_path / "partial")


@pytest.mark.parametrize("method", ["sft", "opd"])
def test_rows_that_a_store_lacks_are_counted_before_training(tmp_path, folder, partial, method):
    with pytest.raises(ValueError, match=r"11 of 16 texts of the dataset .* row 5\..*trl-draft-opd read"):
        make_trainer(folder, tmp_path / "run", method, readings=partial)
    rows = rows_in(folder)
    with pytest.raises(ValueError, match=r"1 of 2 texts of the evaluation dataset .* row 1\..*trl-draft-opd read"):
        make_trainer(
            folder, tmp_path / "run", method, readings=partial, rows=rows.select([0]), eval_rows=rows.select([4, 5])
        )


@pytest.mark.parametrize("method", ["sft", "opd"])
def test_a_row_of_a_stream_that_a_store_lacks_is_named_at_its_step(tmp_path, folder, partial, method):
    rows = IterableDataset.from_generator(lambda: iter(rows_in(folder)))
    trainer = make_trainer(folder, tmp_path / "run", method, readings=partial, rows=rows)
    with pytest.raises(ValueError, match=r"row 5\..*trl-draft-opd read"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_responses_that_are_not_written_are_counted_with_the_command_that_writes_them(tmp_path, folder):
    rows = rows_in(folder).select_columns(["prompt_ids"])
    prompts = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in ids) for ids in rows["prompt_ids"]]})
    options = {"readings": str(folder / "float32"), "rows": prompts}
    says = (
        r"16 prompts of the dataset have no .* row 0.*trl-draft-opd generate --target .* --max-completion-length \d+`"
    )
    with pytest.raises(ValueError, match=says):
        make_trainer(folder, tmp_path / "opd", "opd", completions_from_target=False, **options)
    with pytest.raises(ValueError, match=says):
        make_trainer(folder, tmp_path / "sft", "sft", regenerate=True, **options)
    # An evaluation that measures tau, of rows that do not hold the target's responses as ids.
    options |= {"rows": rows_in(folder), "eval_rows": prompts}
    for method in ("sft", "opd"):
        # A stream's own responses are looked for as it comes.
        stream = {"completions_from_target": False, "rows": rows_in(folder).to_iterable_dataset()}
        changes = {} if method == "sft" else stream
        with pytest.raises(ValueError, match=says.replace("the dataset", "the evaluation dataset")):
            make_trainer(folder, tmp_path / f"eval-{method}", method, **options | changes)
    for store in tmp_path.glob("*/_responses"):
        assert len(ResponseStore.read_only(store)) == 0


def test_a_target_without_a_body_needs_readings(tmp_path, folder):
    target = FrozenTarget.load(str(folder / "target"), body=False)
    with pytest.raises(ValueError, match="`readings` names nothing"):
        make_trainer(folder, tmp_path, target=target)


def test_the_card_is_asked_for_what_a_target_without_its_body_holds(tmp_path, folder):
    trainer = make_trainer(folder, tmp_path, readings=str(folder / "float32"))
    model = trainer.target.causal_lm
    held = {id(part): part.nbytes for part in model.parameters()}
    norm = trainer.target._final_norm
    expected = {id(part): part.nbytes for part in (model.get_input_embeddings().weight, *norm.parameters())}
    assert target_bytes(trainer.target) == sum(held.values()) == sum(expected.values())
    assert target_bytes(trainer.target) < 0.25 * target_bytes(whole_target(folder))


def test_readings_of_an_instance_with_its_body_leave_the_body_there(tmp_path, folder):
    trainer = make_trainer(folder, tmp_path, target=whole_target(folder), readings=str(folder / "float32"))
    assert trainer.target.has_body and isinstance(trainer.target.source.fetcher, ReadingStore)


def test_the_source_is_opened_with_the_runs_settings(tmp_path, folder):
    trainer = make_trainer(folder, tmp_path, readings=str(folder / "float32"), prefetch_bytes=12345)
    source = trainer.target.source
    assert source.limit_bytes == 12345
    assert source.layer_ids == tuple(trainer.drafter.config.target_layer_ids)
    assert Path(source.fetcher.path) == folder / "float32"
