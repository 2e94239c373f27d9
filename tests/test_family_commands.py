# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The commands that make and train drafters, once for every family, on a tiny pair and offline."""

import inspect
import json

import pytest
import torch

from helpers.files import save_target, write_rows
from helpers.tiny import EOS
from trl_draft_opd import AutoDrafter, FrozenTarget
from trl_draft_opd.cli import main
from trl_draft_opd.cli.training import FreshDrafterArguments, make_drafter
from trl_draft_opd.demo.run import DemoSettings
from trl_draft_opd.demo.run import _make_drafter as make_demo_drafter
from trl_draft_opd.drafters.auto import DRAFTER_CLASSES
from trl_draft_opd.drafters.base import run_blocks


SMALL = {
    "dflash": ["--num-hidden-layers", "1", "--block-size", "4"],
    "dflash2": ["--num-hidden-layers", "1", "--block-size", "4", "--selector-rank", "4", "--selector-top-k", "5"],
    "dspark": ["--num-hidden-layers", "1", "--block-size", "4", "--markov-rank", "4"],
    "eagle3": ["--ttt-steps", "3"],
}
TRAINING = "--max_steps 1 --warmup_steps 0 --use_cpu --report_to none --save_strategy no --disable_tqdm true".split()
TRAINING += ["--max-completion-length", "8", "--per-device-train-batch-size", "2"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rows = ({"prompt": f"w{8 + i} w9 w10"} for i in range(4))
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def dflash(target, tmp_path_factory):
    """A DFlash drafter whose drafts vary."""
    folder = tmp_path_factory.mktemp("dflash")
    assert main(["init", "--family", "dflash", "--target", target, "--output", str(folder), *SMALL["dflash"]]) == 0
    return str(folder)


def refusal(argv, capsys):
    assert main(argv) == 2
    return capsys.readouterr().err


def test_every_family_has_its_commands_here():
    assert SMALL.keys() == DRAFTER_CLASSES.keys()


@pytest.mark.parametrize("family", SMALL)
def test_a_fresh_drafter_is_trained_by_sft_and_then_by_opd(family, target, rows, tmp_path, capsys):
    base = ["--target", target, "--dataset", rows, *TRAINING]
    sft, opd = str(tmp_path / "sft"), str(tmp_path / "opd")
    assert main(["sft", "--family", family, *SMALL[family], "--regenerate", *base, "--output_dir", sft]) == 0
    assert main(["opd", "--drafter", sft, *base, "--output_dir", opd]) == 0
    drafter = AutoDrafter.from_pretrained(opd)
    # The anchor's position drafts too where the family does so.
    drafts = 4 if getattr(drafter.config, "sample_from_anchor", False) else 3
    assert drafter.config.family == family and drafter.default_num_drafts == drafts
    words = ["evaluate", "--target", target, "--drafter", opd, "--dataset", rows, "--max-completion-length", "8"]
    assert main([*words, "--json", str(tmp_path / "numbers.json")]) == 0
    assert 1 <= json.loads((tmp_path / "numbers.json").read_text("utf-8"))["tau"] <= 1 + drafts


@pytest.mark.parametrize("family", ["dflash", "dspark", "eagle3"])
def test_init_keeps_a_part_of_the_vocabulary_for_every_family_that_can(family, target, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w8", "completion": "w9 w10 w10"}\n', "utf-8")
    out = str(tmp_path / "out")
    words = ["init", "--family", family, *SMALL[family], "--target", target, "--output", out, "--dataset", str(rows)]
    assert main([*words, "--draft-vocab-size", "5"]) == 0
    drafter = AutoDrafter.from_pretrained(out)
    assert drafter.config.draft_vocab_size == 5 and {EOS, 9, 10} <= set(drafter.draft_token_ids.tolist())
    rows_of_target = FrozenTarget.load(target, dtype="float32").causal_lm.get_output_embeddings().weight
    assert torch.equal(drafter.lm_head.weight, rows_of_target[drafter.draft_token_ids])


@pytest.mark.parametrize("family", ["dflash2", "dspark"])
def test_init_widens_a_dflash_drafter_whose_drafts_stay(family, target, dflash, tmp_path, capsys):
    out = str(tmp_path / "out")
    own = SMALL[family][4:]
    words = ["init", "--family", family, "--drafter", dflash, "--target", target, "--output", out, *own]
    assert main(words) == 0
    assert f"Started from {dflash}, a {DRAFTER_CLASSES[family].config_class.title}" in capsys.readouterr().out
    loaded, start = AutoDrafter.from_pretrained(out), AutoDrafter.from_pretrained(dflash)
    assert loaded.config.family == family and loaded.config.block_size == 4
    pair = FrozenTarget.load(target, dtype="float32")
    ids, anchors = torch.arange(10, 22)[None], torch.tensor([[2, 5, 9]])
    features = pair.read_text(ids, torch.ones_like(ids), start.config.target_layer_ids).padded().features
    argmaxes = []
    for drafter in (start, loaded):
        drafts = torch.arange(9)[None].view(1, 3, 3) + 20
        with torch.no_grad():
            hidden = run_blocks(drafter, features, ids, anchors, drafts, pair.embed)
            argmaxes.append(drafter.draft_logits(hidden, pair.project).argmax(-1))
    assert torch.equal(*argmaxes)


def test_what_cannot_be_widened_is_refused(target, dflash, tmp_path, capsys):
    init = ["init", "--target", target, "--output", str(tmp_path / "out"), "--drafter"]
    error = refusal([*init, dflash, "--family", "eagle3"], capsys)
    assert "only ['dflash2', 'dspark'] start from another one's drafter" in error
    error = refusal([*init, dflash, "--family", "dspark", "--block-size", "8"], capsys)
    assert "`--block-size`: no setting that a DSpark drafter adds to the DFlash one it starts from" in error
    eagle3 = str(tmp_path / "eagle3")
    assert main(["init", "--family", "eagle3", "--target", target, "--output", eagle3]) == 0
    error = refusal([*init, eagle3, "--family", "dflash2"], capsys)
    assert "A DFlash 2 drafter starts from a DFlash drafter, not from this EAGLE-3 drafter" in error


@pytest.mark.parametrize("family", SMALL)
def test_every_flag_of_a_fresh_drafter_is_an_option_of_a_family_and_others_are_refused(family, target):
    pair = FrozenTarget.load(target, dtype="float32")
    flags = set(FreshDrafterArguments.__dataclass_fields__)
    known = {name: set(inspect.signature(each.from_target).parameters) for name, each in DRAFTER_CLASSES.items()}
    assert flags <= set.union(*known.values())
    for name in sorted(flags - known[family]):
        with pytest.raises(ValueError, match=f"`{name}`: no setting that a"):
            make_drafter(pair, family, {name: 1})


@pytest.mark.parametrize("family", SMALL)
def test_the_demo_makes_a_drafter_of_every_family_with_as_many_drafts(family, target):
    settings = DemoSettings(family=family, num_drafts=3)
    assert make_demo_drafter(settings, FrozenTarget.load(target, dtype="float32")).default_num_drafts == 3
