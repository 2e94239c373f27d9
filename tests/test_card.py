# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Model cards: metadata the Hub reads, the facts that were recorded, nothing that was not, and nothing private."""

import json
import logging
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from test_record import CANARIES, make_record

from helpers.tiny import make_drafter, make_target
from trl_draft_opd.export import Publication, TargetOfExport, export_drafter
from trl_draft_opd.export.card import CARD_FILE, CURVE_FILE, plain, write_card
from trl_draft_opd.export.record import read_record
from trl_draft_opd.export.serving import serving_settings


FAMILIES = ("eagle3", "dflash", "dspark", "dflash2")
LAYOUTS = dict.fromkeys(FAMILIES, ("flat", "speculators")) | {"dflash": ("flat", "speculators", "transformers")}
UNKNOWN = ("Not measured yet.", "Not recorded.", "Not estimated", "Not compared with plain decoding yet.")


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture
def card(target, tmp_path):
    """Write a card and return it parsed."""

    def write(family="eagle3", target_id=None, architectures=(), **options):
        described = TargetOfExport(target_id, SimpleNamespace(architectures=architectures))
        record = make_record(family=family)
        facts = {"record": record, "repo_id": f"org/tiny-{family}", "layouts": LAYOUTS[family], "target": described}
        publication = Publication.of(make_drafter(family, target), **facts | options)
        write_card(tmp_path, publication, serving_settings(publication))
        return ModelCard.load(tmp_path / CARD_FILE)

    return write


def table_rows(text, heading):
    """Return the cells of the table below a heading."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


# ---- metadata -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_metadata_is_what_the_hub_finds_drafters_by(card, family):
    data = card(family, license="mit").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/target", "transformers", "text-generation")
    assert (data.license, data.datasets) == ("mit", ["org/data"])
    wanted = {"speculative-decoding", family, "draft-model", "vllm", "speculators", "custom_generate", "trl"}
    # SGLang takes every slot of a DSpark block for the next token's; these leave the anchor's alone.
    wanted |= set() if family == "dspark" else {"sglang"}
    assert set(data.tags) == wanted | {"draft-opd"} | ({"transformers"} if family == "dflash" else set())
    assert "base_model_relation" not in data.to_dict()


def test_a_speculators_repository_says_so_in_its_metadata(card):
    written = card(layouts=("speculators",))
    assert written.data.library_name == "speculators"
    assert not {"sglang", "custom_generate"} & set(written.data.tags)
    assert "```bash\nvllm serve org/tiny-eagle3\n```" in written.text
    assert "sglang.launch_server" not in written.text and "from_pretrained" not in written.text


def test_a_card_tells_what_a_family_adds_and_how_well_its_confidence_is_calibrated(card):
    plain_text = card("dspark").text
    assert "| Markov head | rank 8 |" in plain_text and "A **DSpark** drafter" in plain_text
    assert "arXiv:2607.05147" in plain_text and "**Confidence.**" not in plain_text
    measured = replace(make_record().measurements[0], calibration_error=0.0312, brier_score=0.11)
    text = card("dspark", record=make_record(family="dspark", measurements=[measured])).text
    assert "expected calibration error 0.031, Brier score 0.110 on org/prompts:test at 0" in text
    assert "| selector | rank 6, among the 32 likeliest tokens |" in card("dflash2").text


def test_a_tag_goes_with_an_engine_that_can_load_it(card):
    written = card("dflash", architectures=["Qwen2ForCausalLM"])
    assert "sglang" not in written.data.tags and "sglang.launch_server" not in written.text
    assert "hands out no layers to such drafters" in written.text
    assert "sglang" in card("eagle3", architectures=["Qwen2ForCausalLM"]).data.tags


@pytest.mark.parametrize(
    ("given", "licence", "name"),
    [("MIT", "mit", None), ("acme-1.0", "other", "acme-1.0"), (None, None, None)],
)
def test_a_licence_is_given_in_the_hubs_words_or_as_other(card, given, licence, name):
    data = card(license=given).data
    assert (data.license, getattr(data, "license_name", None)) == (licence, name)


def test_the_licence_of_the_data_is_not_taken_for_the_drafters(card):
    written = card()
    assert "licence mit" in written.text and written.data.license is None
    with pytest.raises(ValueError, match="must be an identifier"):
        card(license="do what you like, really")


# ---- facts ----------------------------------------------------------------------------------------------------------


def test_the_facts_of_an_eagle3_drafter_stand_in_the_table(card, target):
    facts = dict(table_rows(card().text, "Facts"))
    assert facts["target"] == "org/target at revision main"
    assert facts["chat template"] == r"the target's, sha256 aaaaaaaaaaaa; trained with enable\_thinking=False"
    assert facts["drafts in training"] == "4" and facts["draft vocabulary"] == "all of 64 tokens"
    assert facts["target layers read"] == "[1, 3, 4] (0-based), that is after [2, 4, 5] layers"
    assert facts["longest text"] == "256 tokens" and facts["precision"] == "bfloat16"
    count = sum(parameter.numel() for parameter in make_drafter("eagle3", target).parameters())
    assert facts["parameters"].startswith(f"{count:,},")


def test_the_facts_of_a_dflash_drafter_stand_in_the_table(card):
    facts = dict(table_rows(card("dflash").text, "Facts"))
    assert facts["block"] == "5 slots: the anchor and 4 drafts" and facts["mask token"] == "3"
    assert facts["layers"] == "2" and "draft vocabulary" not in facts


def test_results_stand_with_interval_slots_and_how_they_were_decoded(card):
    written = card()
    assert table_rows(written.text, "Measured")[-1] == [
        "org/prompts:test (50)",
        "0",
        "4",
        "2.500 [2.400, 2.600]",
        "0.70 0.50 0.20 0.10",
        "float32, batch 1, at most 64 tokens",
    ]
    assert "50 of 50 greedy outputs on org/prompts:test equal the target's own (float32)." in written.text
    assert "trl-draft-opd verify --drafter org/tiny-eagle3 --target org/target --dataset" in written.text


def test_outputs_that_differ_are_not_called_equal(card):
    record = make_record()
    worse = replace(record.measurements[0], num_different=3)
    text = card(record=replace(record, measurements=[worse, replace(worse, num_different=None)])).text
    assert "47 of 50 greedy outputs" in text and "50 of 50" not in text


def test_stages_stand_with_settings_data_and_licence(card):
    text = card().text
    assert "1. **Draft-OPD (on-policy distillation)**, 20 steps on 100 rows of org/data" in text
    assert "(text the target wrote, licence mit)" in text
    assert r"rejected\_loss reverse\_kl" in text and r"learning\_rate 0.0003" in text
    assert "torch 2.13.0+cpu" in text


def test_the_break_even_table_holds_measured_tau_and_every_batch(card):
    head, _, *rows = table_rows(card().text, "When it pays")
    wanted = ["requests at a time", "tau to break even", "speed-up at tau 2.50", "best number of drafts"]
    assert head == wanted and [row[0] for row in rows] == ["1", "8", "32", "64", "128", "256"]
    assert all(len(row) == 4 for row in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_papers_are_cited_for_the_family_alone(card, family):
    text = card(family).text
    assert "arXiv:2605.29343" in text
    papers = ("arXiv:2503.01840", "arXiv:2602.06036", "arXiv:2607.05147", "inco.ai/blog/dflash2")
    cited = (family == "eagle3", family != "eagle3", family == "dspark", family == "dflash2")
    assert tuple(paper in text for paper in papers) == cited


# ---- nothing invented, nothing private ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_card_without_a_record_says_what_is_not_known(card, family):
    written = card(family, record=None, repo_id=None)
    assert all(text in written.text for text in UNKNOWN)
    assert written.data.base_model is None and written.data.license is None and written.data.datasets is None
    assert "Trained with" not in written.text and "tau is the accepted length" not in written.text
    assert "ORG/NAME-" in written.text and "Put the real name" in written.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_card_says_nothing_is_unknown(card, family):
    text = card(family).text
    assert not [unknown for unknown in UNKNOWN if unknown in text]
    assert "ORG/" not in text and "None" not in text and "{{" not in text


@pytest.mark.parametrize("canary", CANARIES[:3])
@pytest.mark.parametrize(
    "place", ["target", "dataset", "licence", "settings", "prompts", "dtype", "versions", "kwargs"]
)
def test_a_canary_in_the_record_stops_the_card(card, tmp_path, place, canary):
    record = make_record()
    stage, measured = record.stages[0], record.measurements[0]
    leaking = {
        "target": {"target": replace(record.target, name=canary)},
        "kwargs": {"target": replace(record.target, chat_template_kwargs={"enable_thinking": canary})},
        "dataset": {"stages": [replace(stage, dataset=replace(stage.dataset, name=canary))]},
        "licence": {"stages": [replace(stage, dataset=replace(stage.dataset, licence=canary))]},
        "settings": {"stages": [replace(stage, settings={"optim": canary})]},
        "prompts": {"measurements": [replace(measured, prompt_set=canary)]},
        "dtype": {"measurements": [replace(measured, target_dtype=canary)]},
        "versions": {"versions": {"torch": canary}},
    }[place]
    with pytest.raises(ValueError) as caught:
        card(record=replace(record, **leaking))
    assert canary not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("canary", CANARIES[:3:2])
def test_a_path_or_sentence_is_no_name_of_a_repository(card, tmp_path, canary):
    for option in ("repo_id", "target_id"):
        with pytest.raises(ValueError):
            card(**{option: canary})
    assert list(tmp_path.iterdir()) == []


def test_a_local_target_in_the_config_does_not_reach_the_card(target, tmp_path):
    drafter = make_drafter("eagle3", target)
    drafter.config.target_model_name_or_path = drafter.config.name_or_path = CANARIES[0]
    publication = Publication.of(drafter, layouts=("flat",))
    write_card(tmp_path, publication, serving_settings(publication))
    assert "canary" not in (tmp_path / CARD_FILE).read_text("utf-8").lower()


def test_the_record_of_another_drafter_is_refused(card):
    with pytest.raises(ValueError, match="another drafter's"):
        card("dflash", record=make_record())
    record = make_record()
    with pytest.raises(ValueError, match="another drafter's"):
        card(record=replace(record, target=replace(record.target, vocab_size=65)))


def test_text_of_others_is_text_in_markdown():
    assert plain("a|b\n# c [d](e) <f> `g` *h*") == r"a\|b \# c \[d\](e) \<f\> \`g\` \*h\*"


# ---- notes and curve ------------------------------------------------------------------------------------------------


def test_notes_of_the_author_survive_a_new_card(card, tmp_path):
    card()
    path = tmp_path / CARD_FILE
    notes = "\n## Mine\n\nKeep *this*: {{ braces }}, \\1 and {% raw %}.\n"
    text = path.read_text("utf-8")
    assert text.count("<!-- notes -->") == text.count("<!-- /notes -->") == 1
    path.write_text(text.replace("<!-- notes -->\n", "<!-- notes -->" + notes), "utf-8")
    for record in (None, make_record()):
        written = card(record=record).content
        assert f"<!-- notes -->{notes}<!-- /notes -->" in written


def test_a_card_that_has_no_place_for_notes_is_replaced_with_a_warning(card, tmp_path, caplog):
    (tmp_path / CARD_FILE).write_text("# By hand\n", "utf-8")
    with caplog.at_level(logging.WARNING, logger="trl_draft_opd.export.card"):
        card()
    assert "all of it is replaced" in caplog.text
    caplog.clear()
    card()
    assert caplog.text == ""


def test_the_curve_is_a_picture_where_matplotlib_is(card, tmp_path):
    pytest.importorskip("matplotlib")
    text = card().text
    assert f"![training curve]({CURVE_FILE})" in text
    assert (tmp_path / CURVE_FILE).read_bytes().startswith(b"\x89PNG")


def test_the_curve_is_a_table_where_matplotlib_is_not(card, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING, logger="trl_draft_opd.export.card"):
        text = card().text
    assert "matplotlib is not installed" in caplog.text and not (tmp_path / CURVE_FILE).exists()
    assert CURVE_FILE not in text
    assert table_rows(text, "Training")[-2:] == [["10", "2.500"], ["20", "2.000"]]


def test_one_point_is_no_curve(card, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    record = make_record()
    record = replace(record, stages=[replace(record.stages[0], curve=[{"step": 2, "eval_tau": 1.0}])])
    with caplog.at_level(logging.WARNING, logger="trl_draft_opd.export.card"):
        text = card(record=record).text
    assert "matplotlib" not in caplog.text and "| step |" not in text


def test_a_second_stage_goes_on_where_the_first_ended(card, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    record = make_record()
    text = card(record=replace(record, stages=[replace(record.stages[0], method="sft"), *record.stages])).text
    assert [row[:3] for row in table_rows(text, "Training")[2:]] == [
        ["10", "2.500", ""],
        ["20", "2.000", ""],
        ["30", "", "2.500"],
        ["40", "", "2.000"],
    ]
    assert "by supervised fine-tuning, then Draft-OPD" in text


def test_an_export_carries_record_card_and_settings_that_agree(target, tmp_path):
    drafter = make_drafter("eagle3", target)
    described = TargetOfExport("org/target", embedding=target.causal_lm.get_input_embeddings().weight)
    record = make_record()
    export_drafter(drafter, tmp_path / "out", record=record, repo_id="org/tiny-eagle3", target=described)
    assert read_record(tmp_path / "out") == record
    settings = json.loads((tmp_path / "out" / "speculative_config.json").read_text("utf-8"))
    text = ModelCard.load(tmp_path / "out" / CARD_FILE).text
    assert settings["vllm"]["command"] in text and settings["sglang"]["command"] in text
    for row in settings["break_even"]["rows"]:
        assert f"\n| {row['batch']} | {row['break_even_tau']:.2f} |" in text
