# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Both trainers from delivered readings, without the target's body: the run in process, bit for bit."""

import pytest
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from helpers.checkpoints import differing
from helpers.delivered import (
    BATCH,
    METHODS,
    STEPS,
    assert_same,
    losses,
    make_folder,
    make_trainer,
    rows_in,
    texts_of,
    train,
    weights,
    whole_target,
    write,
)
from helpers.extraction_server import serving
from helpers.tiny import FAMILIES
from trl_draft_opd.readings.prefetch import PrefetchingSource
from trl_draft_opd.readings.store import ReadingStore
from trl_draft_opd.trainer.delivery import LookAhead
from trl_draft_opd.trainer.texts import open_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("delivered"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_updates_from_a_float32_store_are_those_in_process_bit_for_bit(tmp_path, folder, family, method):
    inside = train(folder, tmp_path / "in", method, family)
    outside = train(folder, tmp_path / "out", method, family, readings=str(folder / "float32"))
    assert not outside.target.has_body and inside.target.has_body
    assert losses(outside) == losses(inside) and len(losses(inside)) == STEPS
    assert_same(weights(outside), weights(inside))


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_from_a_bfloat16_store_is_within_two_parts_in_ten_thousand(tmp_path, folder, method):
    options = {"max_steps": 1, "per_device_train_batch_size": STEPS * BATCH}
    inside = train(folder, tmp_path / "in", method, **options)
    outside = train(folder, tmp_path / "out", method, readings=str(folder / "bfloat16"), **options)
    assert losses(outside) == pytest.approx(losses(inside), rel=2e-4)
    assert losses(outside) != losses(inside)


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_eight_updates_from_a_server_are_those_in_process(tmp_path, folder, method):
    inside = train(folder, tmp_path / "in", method)
    layer_ids = inside.drafter.config.target_layer_ids
    (tmp_path / "states").mkdir()
    with serving(whole_target(folder), layer_ids, tmp_path / "states") as server:
        served = {"readings": server.url, "shared_folder": str(tmp_path / "states")}
        outside = train(folder, tmp_path / "out", method, **served)
        outside.target.source.close()
    assert losses(outside) == pytest.approx(losses(inside), rel=1e-5) and len(losses(outside)) == STEPS
    assert not outside.target.has_body


@pytest.mark.parametrize("method", METHODS)
def test_gradient_accumulation_over_stored_responses_ends_as_in_process(tmp_path, folder, method):
    # Five rows an update, of which two epochs leave a remainder; read one by one, so that regrouping changes no shape.
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}
    if method == "opd":
        # Nothing is kept from the rollout, so that the loss reads again.
        options |= {"completions_from_target": False, "responses": str(tmp_path / "responses"), "reading_bytes": 0}
    inside = train(folder, tmp_path / "in", method, **options)
    texts = texts_of(rows_in(folder))
    if method == "opd":
        store = open_store(inside.target, inside.args)
        texts = [prompt + store.find(prompt) for prompt in rows_in(folder)["prompt_ids"]]
    write(inside.target, texts, tmp_path / "store", batch_size=1)
    outside = train(folder, tmp_path / "out", method, readings=str(tmp_path / "store"), **options)
    assert losses(outside) == losses(inside) and len(losses(inside)) == STEPS
    assert_same(weights(outside), weights(inside))


# -- a run that stops and goes on -------------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "max_steps": 5}
CUTS = {
    "whole batches": {},
    "workers, and a remainder": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 5,
        "dataloader_num_workers": 2,
    },
    "shuffled": {"train_sampling_strategy": "random", "per_device_train_batch_size": 4},
    "by shard": {
        "train_sampling_strategy": "random",
        "shuffle_by_shard": True,
        "per_device_train_batch_size": 4,
        "draft_sampling": "sample",
        "temperature": 0.8,
    },
}


@pytest.fixture(scope="module")
def sharded(folder) -> str:
    """A store of four shards."""
    texts = texts_of(rows_in(folder))
    for start in range(0, len(texts), 4):
        write(whole_target(folder), texts[start : start + 4], folder / "sharded")
    assert len(list((folder / "sharded").glob("shard-*.safetensors"))) == 4
    return str(folder / "sharded")


# One trainer draws ahead as the other does.
QUICK = {("sft", "workers, and a remainder"), ("sft", "shuffled"), ("opd", "whole batches"), ("opd", "by shard")}
CASES = [
    pytest.param(method, cut, marks=() if (method, cut) in QUICK else pytest.mark.slow)
    for method in METHODS
    for cut in CUTS
]


@pytest.mark.parametrize(("method", "cut"), CASES)
def test_a_run_goes_on_bit_for_bit_from_every_update(tmp_path, folder, sharded, method, cut):
    options = SAVING | CUTS[cut] | {"readings": sharded}
    train(folder, tmp_path / "whole", method, **options)
    for step in (2, 4):
        trainer = make_trainer(folder, tmp_path / f"from-{step}", method, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        whole, resumed = (tmp_path / name / "checkpoint-5" for name in ("whole", f"from-{step}"))
        assert differing(whole, resumed) == [], f"resumed from step {step}"


@pytest.mark.parametrize(("method", "cut"), CASES)
def test_drawing_an_update_ahead_changes_no_byte_of_any_checkpoint(
    tmp_path, folder, sharded, method, cut, monkeypatch
):
    options = SAVING | CUTS[cut] | {"readings": sharded}
    train(folder, tmp_path / "ahead", method, **options)
    with monkeypatch.context() as patched:
        patched.setattr(LookAhead, "draw", lambda self, count: [])
        train(folder, tmp_path / "plain", method, **options)
    for step in range(1, 6):
        assert differing(*(tmp_path / name / f"checkpoint-{step}" for name in ("ahead", "plain"))) == []


def test_ignoring_the_position_in_the_data_is_the_same_with_and_without_drawing_ahead(tmp_path, folder, monkeypatch):
    options = SAVING | {"readings": str(folder / "float32"), "ignore_data_skip": True}
    train(folder, tmp_path / "whole", **options)
    for name in ("ahead", "plain"):
        with monkeypatch.context() as patched:
            if name == "plain":
                patched.setattr(LookAhead, "draw", lambda self, count: [])
            trainer = make_trainer(folder, tmp_path / name, **options)
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differing(*(tmp_path / name / "checkpoint-5" for name in ("ahead", "plain"))) == []


def test_a_run_that_goes_on_with_another_store_is_told(tmp_path, folder, caplog):
    train(folder, tmp_path / "run", **SAVING | {"readings": str(folder / "float32"), "max_steps": 2})
    for name, says in (("float32", False), ("bfloat16", True)):
        caplog.clear()
        trainer = make_trainer(folder, tmp_path / "run", **SAVING | {"readings": str(folder / name)})
        trainer.train(resume_from_checkpoint=True)
        assert ("readings: " in caplog.text) == says


# -- what is announced ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_update_but_the_first_finds_its_texts_announced_in_the_order_of_reading(
    tmp_path, folder, method, monkeypatch
):
    announced, read = [], []
    plain_expect, plain_read = PrefetchingSource.expect, PrefetchingSource.read

    def expect(self, texts):
        announced.extend(texts)
        plain_expect(self, texts)

    def noted_read(self, texts, layer_ids):
        if layer_ids:
            read.extend(texts)
            assert all(list(text) in announced for text in texts)
        return plain_read(self, texts, layer_ids)

    monkeypatch.setattr(PrefetchingSource, "expect", expect)
    monkeypatch.setattr(PrefetchingSource, "read", noted_read)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 6}
    trainer = train(folder, tmp_path, method, readings=str(folder / "float32"), **options)
    assert announced == read and len(read) == 24
    assert trainer.target.source.held_bytes == 0


class Beginning(TrainerCallback):
    is_training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_training = True


def test_nothing_is_drawn_behind_the_last_batch_of_an_epoch():
    drawn = []

    def batches():
        for batch in range(3):
            drawn.append(batch)
            yield batch
        drawn.append("what ends an epoch")

    ahead = LookAhead(batches(), lambda: drawn == [0, 1, 2])
    assert ahead.draw(2) == [0, 1] and next(ahead) == 0 and ahead.draw(5) == [1, 2]
    assert drawn == [0, 1, 2] and list(ahead) == [1, 2]


def test_a_row_that_cannot_be_read_costs_no_update_before_its_own(tmp_path, folder):
    rows, begun = rows_in(folder), Beginning()

    def stream():
        for number, row in enumerate(rows):
            # Not when the run's identity is taken of the first rows.
            if number == 3 * BATCH + 1 and begun.is_training:
                raise OSError("the eighth row is gone")
            yield row

    options = SAVING | {"readings": str(folder / "float32"), "rows": IterableDataset.from_generator(stream)}
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
    trainer = make_trainer(folder, tmp_path, **options)
    trainer.add_callback(begun)
    with pytest.raises(OSError, match="eighth row"):
        trainer.train()
    assert trainer.state.global_step == 3


class Logs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_the_share_of_waiting_is_logged_and_kept_out_of_checkpoints(tmp_path, folder):
    trainer = make_trainer(folder, tmp_path, readings=str(folder / "float32"), max_steps=3)
    logs = Logs()
    trainer.add_callback(logs)
    trainer.train()
    assert [0 <= entry["reading_wait"] <= 1 for entry in logs.seen if "loss" in entry] == [True] * 3
    assert not any("reading_wait" in entry for entry in trainer.state.log_history)


# -- order by shard ---------------------------------------------------------------------------------------------------


def test_rows_by_shard_come_shard_after_shard_and_otherwise_in_every_epoch(tmp_path, folder, sharded):
    options = {"readings": sharded, "shuffle_by_shard": True, "train_sampling_strategy": "random"}
    trainer = make_trainer(folder, tmp_path, **options)
    store, texts = ReadingStore.read_only(sharded), texts_of(rows_in(folder))
    orders = []
    for epoch in range(3):
        trainer.state.epoch = float(epoch)
        orders.append(list(trainer._get_train_sampler()))
        assert sorted(orders[-1]) == list(range(16))
        shards = store.shards_of(texts)[orders[-1]]
        assert all(len(set(shards[start : start + 4].tolist())) == 1 for start in range(0, 16, 4))
    assert len({tuple(order) for order in orders}) == 3


# -- evaluation without a body ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The target was loaded without")
@pytest.mark.parametrize("method", METHODS)
def test_tau_is_measured_by_replay_while_training_and_is_that_of_live_decoding(tmp_path, folder, method):
    rows = rows_in(folder).select(range(4))
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "eval_rows": rows}
    inside = train(folder, tmp_path / "in", method, **evaluating)
    outside = train(folder, tmp_path / "out", method, readings=str(folder / "float32"), **evaluating)
    taus = [
        [entry["eval_tau"] for entry in trainer.state.log_history if "eval_tau" in entry]
        for trainer in (inside, outside)
    ]
    assert taus[0] == taus[1] and len(taus[0]) == 2
    records = [trainer.training_record().measurements[-1].is_replay for trainer in (inside, outside)]
    assert records == [False, True]


def test_a_target_with_its_body_decodes_evaluation_prompts_and_trains_from_the_store(tmp_path, folder):
    rows = rows_in(folder).select(range(4))
    target = whole_target(folder)
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "eval_rows": rows, "method": "opd"}
    inside = train(folder, tmp_path / "in", **options)
    outside = train(folder, tmp_path / "out", target=target, readings=str(folder / "float32"), **options)
    assert target.has_body and not outside.training_record().measurements[-1].is_replay
    results = [
        [entry[name] for entry in trainer.state.log_history for name in ("eval_tau", "eval_loss") if name in entry]
        for trainer in (inside, outside)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-6) and len(results[0]) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_chat_with_several_responses_is_checked_and_trained_from_its_whole_text(tmp_path, folder, method):
    words = [f"w{number}" for number in range(10, 40)]
    # No text is the beginning of another, as the first response of one with all before it would be.
    chats = [
        [
            {"role": role, "content": " ".join(words[first + i : first + i + 3])}
            for i, role in enumerate(["user", "assistant"] * 2)
        ]
        for first in (0, 10)
    ]
    rows = Dataset.from_dict({"messages": chats})
    limits = {} if method == "sft" else {"warn_mismatch_share": 1.0, "max_mismatch_share": 1.0}
    options = {"rows": rows, "max_steps": 2, "max_completion_length": 40, **limits}
    inside = make_trainer(folder, tmp_path / "in", method, **options)
    texts = inside.train_dataset["input_ids"]
    write(whole_target(folder), texts, tmp_path / "store")
    inside.train()
    outside = train(folder, tmp_path / "out", method, readings=str(tmp_path / "store"), **options)
    assert_same(weights(outside), weights(inside))
