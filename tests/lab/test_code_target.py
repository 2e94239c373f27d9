# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The laboratory's second target: what its script writes is an ordinary target that both families can tap, its held-out
rows stay unseen, a killed run resumes to the same weights, and bad input is refused with the fix.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from benchmarks.lab import code_target
from benchmarks.lab.code_target import CodeTargetConfig, train_code_target
from trl_draft_opd import Eagle3DraftModel, FrozenTarget
from trl_draft_opd.utils.versions import CACHE_NAME


pytestmark = pytest.mark.lab


NUM_ROWS, NUM_HELD_OUT = 12, 3


def write_rows(path: Path, **changes: str) -> Path:
    """Write synthetic rows; `changes` go into the last one."""
    rows = [
        {"instruction": f"Add {n} to x.", "input": f"x = {n}" if n % 2 else "", "output": f"x = x + {n}\nprint(x)"}
        for n in range(NUM_ROWS)
    ]
    rows[-1] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_config(folder: Path, name: str = "target", **options) -> CodeTargetConfig:
    defaults = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "row_length": 96, "batch_size": 2}
    defaults |= {"held_out": NUM_HELD_OUT, "steps": 2, "warmup_steps": 1, "save_steps": 2}
    data = folder / "rows.jsonl"
    return CodeTargetConfig(data=str(data), out=str(folder / name), **defaults | options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> CodeTargetConfig:
    folder = tmp_path_factory.mktemp("code-target")
    write_rows(folder / "rows.jsonl")
    config = tiny_config(folder)
    train_code_target(config)
    return config


# ---- what it writes -------------------------------------------------------------------------------------------------


def test_the_folder_is_a_llama_that_loads_as_a_target(trained):
    target = FrozenTarget.load(trained.out)
    assert isinstance(target.causal_lm, LlamaForCausalLM)
    assert target.causal_lm.dtype == torch.float32
    assert (target.config.num_attention_heads, target.config.num_key_value_heads) == (4, 2)
    assert target.eos_token_ids == [target.tokenizer.convert_tokens_to_ids("<|end|>")]
    assert target.causal_lm.generation_config.eos_token_id == target.tokenizer.eos_token_id
    assert target.config.use_cache and target.causal_lm.generation_config.use_cache
    assert len(target.tokenizer) == target.vocab_size
    target.require_rollback()


def test_its_mask_token_is_its_own_and_no_text_holds_it(trained):
    target = FrozenTarget.load(trained.out)
    assert target.find_mask_token_id() == target.tokenizer.convert_tokens_to_ids("<|mask|>")
    rows = code_target.read_rows(Path(trained.data))
    packed = code_target.pack_rows(rows, target.tokenizer, trained.row_length)
    assert all(target.find_mask_token_id() not in row["input_ids"] for row in packed)


def test_eight_layers_give_three_distinct_taps(trained):
    target = FrozenTarget.load(trained.out)
    layer_ids = Eagle3DraftModel.from_target(target, ttt_steps=2).config.target_layer_ids
    assert len(set(layer_ids)) == 3
    ids = torch.tensor([[5, 6, 7, 8]])
    features = target.read_text(ids, torch.ones_like(ids), layer_ids).padded().features
    low, middle, high = features.chunk(3, dim=-1)
    assert not torch.equal(low, middle) and not torch.equal(middle, high)


def test_a_prompt_ends_open_and_the_answer_goes_on_from_it(trained):
    tokenizer = FrozenTarget.load(trained.out).tokenizer
    chat = code_target.chat_of({"instruction": "Add.", "input": "1", "output": "x = 1\n"})
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert prompt == "<|user|>Add.\n1<|assistant|>"
    assert whole == prompt + "x = 1\n<|end|>"
    ids = [tokenizer(text)["input_ids"] for text in (prompt, whole)]
    assert ids[1][: len(ids[0])] == ids[0] and ids[1][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1]) == whole


def test_a_role_that_the_template_lacks_is_refused(trained):
    tokenizer = FrozenTarget.load(trained.out).tokenizer
    with pytest.raises(Exception, match="roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_the_report_says_how_the_target_was_made(trained):
    report = json.loads((Path(trained.out) / "training.json").read_text(encoding="utf-8"))
    assert report["steps"] == 2 and report["seed"] == 0
    assert (report["training_rows"], report["held_out_rows"]) == (NUM_ROWS - NUM_HELD_OUT, NUM_HELD_OUT)
    assert 0 < report["tokens_seen"] <= 2 * 2 * 96
    assert report["parameters"] == LlamaForCausalLM.from_pretrained(trained.out).num_parameters()
    # Two steps of a tiny model: near the loss of a uniform guess, log(300) = 5.7.
    assert 5.0 < report["final_loss"] < 6.5 and 5.0 < report["held_out_loss"] < 6.5


# ---- what it trains on ----------------------------------------------------------------------------------------------


def test_held_out_rows_are_the_last_and_are_never_trained_on(tmp_path, monkeypatch):
    # The last row asks what the first one asks: the first one has to go too.
    write_rows(tmp_path / "rows.jsonl", instruction="Add 0 to x.", input="", output="zebra")
    seen = []
    for name in ("train_tokenizer", "pack_rows"):
        whole = getattr(code_target, name)
        monkeypatch.setattr(
            code_target, name, lambda rows, *rest, whole=whole: (seen.append(list(rows)), whole(rows, *rest))[1]
        )
    train_code_target(tiny_config(tmp_path))
    rows = code_target.read_rows(tmp_path / "rows.jsonl")
    for_tokenizer, for_training, for_the_held_out_loss = seen
    assert for_tokenizer == for_training == rows[1:-NUM_HELD_OUT]
    assert for_the_held_out_loss == rows[-NUM_HELD_OUT:]


def test_packed_chats_do_not_see_each_other(trained):
    target = FrozenTarget.load(trained.out)
    rows = code_target.read_rows(Path(trained.data))
    packed = code_target.pack_rows(rows, target.tokenizer, row_length=200)
    assert len(packed) < len(rows) and {len(row["input_ids"]) for row in packed} == {200}
    total, count = 0.0, 0
    for row in rows:
        chat = code_target.chat_of(row)
        ids = target.tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        total += float(target.causal_lm(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert code_target.mean_loss(target.causal_lm, packed, batch_size=2) == pytest.approx(total / count, rel=1e-5)


def test_training_keeps_no_cache_that_would_unmask_packed_chats(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl")
    forward, caches = LlamaForCausalLM.forward, []

    def records_its_cache(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        caches.append((self.training, getattr(output, CACHE_NAME)))
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", records_its_cache)
    train_code_target(tiny_config(tmp_path))
    assert [cache for training, cache in caches if training] == [None, None]


# ---- a killed run ---------------------------------------------------------------------------------------------------


def weights(config: CodeTargetConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "model.safetensors")


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl")
    whole, killed = (tiny_config(tmp_path, name, steps=5, save_steps=2) for name in ("whole", "killed"))
    expected = train_code_target(whole)

    forward, calls = LlamaForCausalLM.forward, []

    def dies_in_the_fourth_step(self, *args, **kwargs):
        calls.append(self.training)
        if calls.count(True) == 4:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", dies_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        train_code_target(killed)
    assert not (tmp_path / "killed" / "training.json").exists()

    report = train_code_target(killed)
    # Two steps stood in the checkpoint: after the fourth call, which died, steps 3 to 5 are what is left.
    assert calls.count(True) == 4 + 3
    assert report == expected
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(killed)[name], tensor), name


def test_a_finished_run_is_not_repeated(trained, monkeypatch):
    monkeypatch.setattr(code_target, "Trainer", None)
    report = json.loads((Path(trained.out) / "training.json").read_text(encoding="utf-8"))
    assert train_code_target(trained) == report


def test_other_settings_in_the_same_folder_are_refused(trained):
    with pytest.raises(ValueError, match=r"other settings.*'seed': \(0, 1\).*another `--out`"):
        train_code_target(replace(trained, seed=1))


def test_other_data_in_the_same_folder_is_refused(trained, tmp_path):
    other = write_rows(tmp_path / "rows.jsonl", output="other")
    with pytest.raises(ValueError, match="other settings.*data_sha256"):
        train_code_target(replace(trained, data=str(other)))


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"No data file at .*rows\.jsonl.*`--data`"):
        train_code_target(tiny_config(tmp_path))
    assert not (tmp_path / "target").exists()


def test_a_missing_field_is_refused_with_its_line(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    with path.open("a", encoding="utf-8") as lines:
        lines.write('{"instruction": "Add.", "output": "x"}\n')
    with pytest.raises(ValueError, match=rf"line {NUM_ROWS + 1}: 'input' missing or no string"):
        train_code_target(tiny_config(tmp_path))


@pytest.mark.parametrize(("line", "complaint"), [("{", "line 1: no JSON"), ("[]", "line 1: 'instruction', 'input'")])
def test_a_line_that_is_no_object_is_refused(tmp_path, line, complaint):
    (tmp_path / "rows.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        train_code_target(tiny_config(tmp_path))


def test_holding_out_every_row_is_refused(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="leave none to train on"):
        train_code_target(tiny_config(tmp_path, held_out=NUM_ROWS))


def test_rows_too_short_for_any_chat_are_refused(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="Raise `row_length`"):
        train_code_target(tiny_config(tmp_path, row_length=8))


@pytest.mark.parametrize("options", [{"num_heads": 3}, {"hidden_size": 18}, {"held_out": 0}, {"steps": 0}])
def test_sizes_that_cannot_be_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        tiny_config(tmp_path, **options)
