# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Reports: what is counted of rejections by hand, what stands in the page, and that the page asks for nothing.
"""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from test_record import make_record

from helpers.tiny import FAMILIES, VOCAB, make_drafter, make_prompts, make_target, make_tokenizer
from trl_draft_opd import evaluate_drafter
from trl_draft_opd.cli import main
from trl_draft_opd.data.token_classes import TOKEN_CLASSES, token_class, token_classes
from trl_draft_opd.export.curves import curve_panels
from trl_draft_opd.export.record import DatasetFacts, StageRecord, write_record
from trl_draft_opd.export.served import ServedLevel, ServedSpeed
from trl_draft_opd.reports.completions import Completion, CompletionCollector, Piece, completion_of
from trl_draft_opd.reports.content import drafter_page, estimate_break_even
from trl_draft_opd.reports.page import render
from trl_draft_opd.reports.preferences import Preference, read_preferences
from trl_draft_opd.rollout.rejections import rejection_sums
from trl_draft_opd.rollout.types import Rollout


LOADING = {"src", "srcset", "data", "poster", "action", "formaction", "background"}


class Reader(HTMLParser):
    """Collects tags and attributes, ids, and the text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def make_rollout(**changes) -> Rollout:
    """
    Two prompt tokens and seven of the response. Blocks of two drafts: the first keeps one and its second draft is
    rejected, the second keeps both, the third is cut by the end of the text.
    """
    fields = dict(
        input_ids=torch.tensor([[7, 8, 10, 11, 12, 13, 14, 15, 16]]),
        attention_mask=torch.ones(1, 9, dtype=torch.long),
        completion_mask=torch.arange(9)[None] >= 2,
        anchors=torch.tensor([[2, 4, 7]]),
        drafts=torch.tensor([[[11, 30], [13, 14], [16, 31]]]),
        accepted=torch.tensor([[1, 2, 1]]),
        is_censored=torch.tensor([[False, False, True]]),
        is_counted=torch.tensor([[True, True, False]]),
        branch_hidden=None,
        has_suffix=False,
        num_refused=0,
        num_target_forwards=4,
    )
    return Rollout(**fields | changes)


@pytest.fixture(scope="module")
def evaluated():
    """An evaluation of a random drafter, with the responses that it kept."""
    target = make_target()
    collector = CompletionCollector(make_tokenizer(), 2)
    report = evaluate_drafter(
        target,
        make_drafter("dflash", target),
        make_prompts(3),
        max_completion_length=16,
        num_resamples=50,
        show_progress=False,
        on_rollout=collector,
    )
    return report, collector.kept


# ---- what is counted ------------------------------------------------------------------------------------------------


def test_rejections_are_counted_by_class_and_position_as_by_hand():
    classes = torch.zeros(64, dtype=torch.long)
    classes[12] = 1
    assert rejection_sums(make_rollout(), classes, ("word", "digit")) == {
        "rejection/class_word": (0.0, 3.0),
        "rejection/class_digit": (1.0, 1.0),
        "rejection/from_token_0": (1.0, 4.0),
    }


def test_a_draft_that_was_not_verified_is_not_rejected():
    rollout = make_rollout(verified=torch.tensor([[1, 2, 1]]))
    assert rejection_sums(rollout, None, ()) == {"rejection/from_token_0": (0.0, 3.0)}


def test_positions_count_from_the_start_of_each_response_of_a_chat():
    length = 80
    is_written = torch.zeros(1, length, dtype=torch.bool)
    is_written[0, 2:70], is_written[0, 72:] = True, True
    rollout = make_rollout(
        input_ids=torch.ones(1, length, dtype=torch.long),
        attention_mask=torch.ones(1, length, dtype=torch.long),
        completion_mask=is_written,
        anchors=torch.tensor([[2, 66, 72]]),
        accepted=torch.tensor([[0, 0, 0]]),
        is_counted=torch.tensor([[True, True, True]]),
    )
    assert rejection_sums(rollout, None, ()) == {
        "rejection/from_token_0": (2.0, 2.0),
        "rejection/from_token_64": (1.0, 1.0),
    }


def test_the_rejections_of_an_evaluation_add_up_to_its_tau(evaluated):
    report, _ = evaluated
    for kind in ("class_", "from_token_"):
        pairs = [pair for name, pair in report.rejections.items() if name.startswith(f"rejection/{kind}")]
        assert sum(decided - rejected for rejected, decided in pairs) == sum(report.accepted_sums) - report.num_blocks


@pytest.mark.parametrize(
    "piece, text, expected",
    [
        ("Ġthe", " the", "word_start"),
        ("▁der", "der", "word_start"),
        ("ing", "ing", "word_part"),
        ("42", "42", "digit"),
        ("Ġ", " ", "whitespace"),
        ("Ċ", "\n", "whitespace"),
        ("({", "({", "code_symbol"),
        ("Ġ=", " =", "code_symbol"),
        (".", ".", "punctuation"),
        ("),", "),", "punctuation"),
        ("ð", "�", "other"),
        ("", "", "other"),
    ],
)
def test_a_token_has_the_class_a_reader_would_give_it(piece, text, expected):
    assert token_class(piece, text) == expected


def test_special_tokens_and_ids_beyond_the_tokenizer_have_classes_of_their_own():
    tokenizer = make_tokenizer()
    classes = token_classes(tokenizer, VOCAB + 3)
    assert TOKEN_CLASSES[classes[tokenizer.eos_token_id]] == "special"
    assert [TOKEN_CLASSES[each] for each in classes[-3:]] == ["other"] * 3


# ---- completions ----------------------------------------------------------------------------------------------------


def test_a_completion_names_what_became_of_every_token_and_what_the_target_preferred():
    completion = completion_of(make_rollout(), make_tokenizer(), number=1)
    assert [(piece.kind, piece.text) for piece in completion.pieces] == [
        ("bonus", "w10"),
        ("accepted", "w11"),
        ("rejected", "w30"),
        ("bonus", "w12"),
        ("accepted", "w13 w14"),
        ("bonus", "w15"),
        ("accepted", "w16"),
    ]
    assert completion.pieces[2].note == "slot 2: drafted “w30”, the target preferred “w12”"
    assert completion.tau == 2.5


def test_a_token_of_blanks_alone_can_be_seen():
    assert Piece("rejected", "\n").shown == "↵" and Piece("bonus", " ").shown == "␣"
    assert Piece("bonus", "\n").shown == "↵\n" and Piece("accepted", "\n").shown == "\n"


def test_a_completion_without_its_rejected_drafts_is_the_response():
    target = make_target()
    collector = CompletionCollector(make_tokenizer(), 3)
    rollouts = []
    evaluate_drafter(
        target,
        make_drafter("eagle3", target),
        make_prompts(3),
        max_completion_length=12,
        show_progress=False,
        on_rollout=lambda rollout: (rollouts.append(rollout), collector(rollout)),
    )
    for rollout, completion in zip(rollouts, collector.kept, strict=True):
        text = " ".join(piece.text for piece in completion.pieces if piece.kind != "rejected")
        assert text == make_tokenizer().decode(rollout.responses()[0])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_preferences_are_those_of_the_models_where_the_rejected_draft_was_made(family):
    target = make_target()
    drafter, ids = make_drafter(family, target), torch.randint(8, VOCAB, (1, 16))
    # Blocks of four drafts that keep none, two and one; the last one is cut by the end of the text.
    anchors, accepted = torch.tensor([[3, 4, 7, 13]]), torch.tensor([[0, 2, 1, 2]])
    drafts = ids[:, (anchors[0, :, None] + torch.arange(1, 5)).clamp(max=15)]
    drafts.scatter_(2, accepted[..., None], drafts.gather(2, accepted[..., None]) % 8)  # no id of the text
    rollout = make_rollout(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        completion_mask=torch.arange(16)[None] >= 3,
        anchors=anchors,
        drafts=drafts,
        accepted=accepted,
        is_censored=torch.tensor([[False, False, False, True]]),
        is_counted=torch.tensor([[True, True, True, False]]),
    )
    found = read_preferences(target, drafter, rollout)
    assert list(found) == [4, 7, 9]
    reading = target.step(ids, None, torch.arange(16)[None], None, drafter.config.target_layer_ids)
    context = drafter.encode_text(reading.features, ids, target.embed)
    for anchor, block, kept in zip(anchors[0, :3], drafts[0], accepted[0], strict=False):
        # Slot by slot, as live decoding drafts.
        state = drafter.begin(context, anchor.view(1, 1), ids[:, anchor].view(1, 1), 4, target.embed)
        for draft in block[:kept]:
            state = drafter.advance(state, draft.view(1, 1))
        own = drafter.to_target_probs(drafter.draft_logits(state.hidden[0, 0], target.project).softmax(dim=-1))
        place = int(anchor + kept) + 1
        probs = target.causal_lm(ids[:, :place]).logits[0, -1].softmax(dim=-1)
        draft, token = block[kept], ids[0, place]
        expected = [float(each) for each in (probs[draft], own[draft], probs[token], own[token])]
        assert found[place] == pytest.approx(expected, rel=1e-4)


def test_a_note_says_what_both_models_gave_the_two_tokens():
    preferences = {4: Preference(0.125, 0.75, 0.5, 0.0004)}
    pieces = completion_of(make_rollout(), make_tokenizer(), number=1, preferences=preferences).pieces
    assert pieces[2].note == (
        "slot 2: drafted “w30” (drafter 75.0 %, target 12.5 %), the target preferred “w12” (target 50.0 %, drafter "
        "under 0.1 %)"
    )


# ---- the curves -----------------------------------------------------------------------------------------------------


def make_stages() -> list[StageRecord]:
    facts = DatasetFacts("org/data", "mit", 100, "target")
    measured = {"eval_tau": 1.5, "eval_tau_low": 1.4, "eval_tau_high": 1.6}
    sft = [{"step": 0, **measured}, {"step": 5, "loss": 9.0}, {"step": 10, "loss": 8.0, **measured}]
    opd = [{"step": 5, "loss": 0.3, "tau": 1.7}, {"step": 10, "loss": 0.2, "tau": 1.8, **measured}]
    return [StageRecord("sft", 10, {}, facts, sft), StageRecord("opd", 10, {}, facts, opd)]


def test_losses_of_two_stages_never_share_a_panel_and_tau_of_sft_is_shown():
    panels = curve_panels(make_stages())
    assert [panel.measure for panel in panels] == ["loss of SFT", "loss of Draft-OPD", "tau"]
    assert [line.points for line in panels[1].lines] == [[(15, 0.3), (20, 0.2)]]
    taus = {line.name: line for line in panels[2].lines}
    assert taus["SFT, evaluation"].points == [(0, 1.5), (10, 1.5)]
    assert taus["SFT, evaluation"].intervals == [(1.4, 1.6), (1.4, 1.6)]
    assert set(taus) == {"SFT, evaluation", "Draft-OPD, evaluation", "Draft-OPD, training rows"}


# ---- the page -------------------------------------------------------------------------------------------------------


def test_a_page_holds_every_measure_with_a_figure_and_the_table_of_its_numbers(evaluated):
    pytest.importorskip("matplotlib")
    report, completions = evaluated
    html = render(drafter_page("d for t", make_record(stages=make_stages()), report, report, completions))
    page = Reader(html)
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert titles == ["Tau", "Acceptance per slot", "Training curves", "Where drafts are rejected", "Completions"]
    assert f"{report.tau:.3f}" in page.text and "Gain in tau: +0.0%" in page.text
    assert "bench --record" in page.text and "`" not in page.text
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(svgs) == 7 and all(svg["role"] == "img" and svg["aria-label"] for svg in svgs)
    assert len([tag for tag, _ in page.tags if tag == "caption"]) == 5


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1, "Not told apart from before"), (2, "Better than before"), (0.5, "Worse than before")]
)
def test_a_page_says_first_whether_the_drafter_got_better(evaluated, factor: float, verdict: str):
    pytest.importorskip("matplotlib")
    before = evaluated[0]
    sums = [total * factor for total in before.accepted_sums]
    after = replace(before, tau=before.tau * factor, accepted_sums=sums)
    first, second, *_ = drafter_page("d for t", None, after, before).facts
    assert first == f"A pass of the target yields {after.tau:.2f} tokens (tau), where plain decoding has 1."
    assert second.startswith(f"{verdict} on these prompts: {factor - 1:+.1%}")
    assert drafter_page("d for t", None, after).facts[1].startswith("Measured")


@pytest.mark.parametrize(("tau", "word"), [(1.4, "no faster"), (1.6, "faster")])
def test_a_page_says_whether_the_drafter_pays_and_with_how_many_drafts(evaluated, tau: float, word: str):
    pytest.importorskip("matplotlib")
    row = {"batch": 1, "break_even_tau": 1.5, "speedup": {f"{tau:.2f}": 1.0}, "best_drafts": None}
    report = replace(evaluated[0], tau=tau, num_drafts=7)
    for best, ending in (
        (None, "per block."),
        ({"num_drafts": 2, "speedup": 1.2}, "2 drafts per block would be 1.20 times as fast as without."),
    ):
        estimate = {"ridge_tokens": 1, "draft_cost": 0.1, "rows": [row | {"best_drafts": best}]}
        said = drafter_page("d for t", None, report, estimate=estimate).facts[1]
        assert (
            f"decoded {word} with it than without" in said
            and "above 1.50 at 7 drafts" in said
            and said.endswith(ending)
        )


def test_break_even_is_an_estimate_where_no_server_was_measured_and_says_so(evaluated):
    config, report = make_drafter("dflash", make_target()).config, evaluated[0]
    estimate = estimate_break_even(config, 10**6, None, report)
    assert list(estimate["rows"][0]["speedup"]) == [f"{report.tau:.2f}"]
    page = drafter_page("d", make_record(), estimate=estimate)
    section = {section.name: section for section in page.sections}["served"]
    assert section.title == "Break-even, estimated" and "not a measurement" in section.sentences[0]
    assert [row[1] for row in section.tables[0].rows] == [f"{row['break_even_tau']:.2f}" for row in estimate["rows"]]
    pytest.importorskip("matplotlib")
    levels = [ServedLevel(1, 10.0, 9.0, 1.1, 1.0, 1.2, 2.0, 0.1, 0.01, None, None)]
    served = ServedSpeed("x", "a" * 64, 3, "two CPU cores", "vllm", None, 8, 0.0, False, 1, levels)
    sections = drafter_page("d", make_record(served=[served]), estimate=estimate).sections
    assert "Break-even, estimated" not in [each.title for each in sections]


def test_an_estimate_without_an_evaluation_takes_tau_from_the_record():
    config, record = make_drafter("dflash", make_target()).config, make_record(stages=make_stages())
    for num_drafts, tau in ((config.drafts_per_block, "2.25"), (9, "1.50")):
        measured = replace(record.measurements[0], num_drafts=num_drafts, tau=2.25)
        estimate = estimate_break_even(config, 10**6, replace(record, measurements=[measured]))
        assert list(estimate["rows"][0]["speedup"]) == [tau]


def test_a_page_asks_a_browser_for_nothing(evaluated):
    pytest.importorskip("matplotlib")
    report, completions = evaluated
    html = render(drafter_page("d", make_record(stages=make_stages()), report, None, completions))
    page = Reader(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "image"}
    for _, attributes in page.tags:
        assert not LOADING & set(attributes)
        assert all(value.startswith("#") for name, value in attributes.items() if name.endswith("href"))
    assert "@import" not in html and all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", html))
    assert "default-src 'none'" in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_text_of_models_and_names_is_shown_as_text():
    attack = '"><script>alert(1)</script>'
    pieces = [Piece("accepted", attack), Piece("rejected", attack, f"drafted “{attack}”"), Piece("bonus", attack)]
    html = render(replace(drafter_page(attack, None), completions=[Completion(1, None, pieces)]))
    page = Reader(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(attack) == 5
    assert [attributes["data-note"] for _, attributes in page.tags if "data-note" in attributes] == [
        f"drafted “{attack}”"
    ]


def test_what_became_of_a_draft_is_told_by_more_than_colour_and_reached_by_keyboard(evaluated):
    report, completions = evaluated
    html = render(replace(drafter_page("d", None), completions=completions))
    for kind, mark in (("accepted", "border-bottom"), ("rejected", "line-through"), ("bonus", "font-weight: 700")):
        assert re.search(rf"\.{kind} {{[^}}]*{mark}", html)
    rejected = [attributes for _, attributes in Reader(html).tags if attributes.get("class") == "rejected"]
    assert len(rejected) > 1
    # The first one is the legend's.
    assert all(each["tabindex"] == "0" and "preferred" in each["aria-label"] for each in rejected[1:])


def _luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_colours_of_both_modes_meet_wcag_aa():
    styles = re.findall(r":root {(.*?)}", render(drafter_page("d", None)), re.DOTALL)
    assert len(styles) == 2
    for style in styles:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", style))
        for ground in ("ground", "panel", "refused"):
            assert _contrast(colours["ink"], colours[ground]) >= 4.5
        for ground in ("ground", "panel"):
            assert _contrast(colours["quiet"], colours[ground]) >= 4.5
            # A link is text, the others are lines.
            assert _contrast(colours["line1"], colours[ground]) >= 4.5
            for line in ("line2", "line3", "focus"):
                assert _contrast(colours[line], colours[ground]) >= 3


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_needs_its_record_alone_and_holds_no_text(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    write_record(make_record(stages=make_stages()), tmp_path)
    out = tmp_path / "run.html"
    assert main(["report", "--drafter", str(tmp_path), "--output", str(out)]) == 0
    assert "holds no text" in capsys.readouterr().out
    html = out.read_text("utf-8")
    assert "SFT, step 10" in html and "1.400 to 1.600" in html and "Completions</h2>" not in html
    assert str(tmp_path.parent) not in html


def test_a_report_that_could_not_be_written_is_refused_before_anything_is_loaded(tmp_path: Path, capsys, monkeypatch):
    words = ["evaluate", "--target", "no/target", "--dataset", "none", "--drafter", "no/drafter"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"tau": 2.0}), "utf-8")
    page = str(tmp_path / "r.html")
    for flags, message in (
        (["--report", str(tmp_path)], "is a folder"),
        (["--report", str(tmp_path / "none" / "r.html")], "is in no folder"),
        (["--before", str(other)], "of this version wrote"),
        (["--before", str(tmp_path / "gone.json")], "`--before` must be a file of `evaluate --json`"),
        (["--report", page, "--report-text", "-1"], "--report-text"),
    ):
        assert main([*words, *flags]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*words, "--report", page]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert main(["report", "--drafter", str(tmp_path), "--output", page]) == 2


def test_evaluate_writes_a_report_whose_text_is_as_much_as_was_asked_for(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    from helpers.tiny import make_causal_lm

    target, drafter, rows = tmp_path / "target", tmp_path / "drafter", tmp_path / "rows.jsonl"
    make_causal_lm().save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    rows.write_text("".join(json.dumps({"prompt": f"w{8 + i} w9 w10"}) + "\n" for i in range(3)), "utf-8")
    small = ["--num-hidden-layers", "1", "--block-size", "4"]
    assert main(["init", "--family", "dflash", "--target", str(target), "--output", str(drafter), *small]) == 0
    words = ["evaluate", "--target", str(target), "--drafter", str(drafter), "--max-completion-length", "12"]
    words += ["--dataset", str(rows), "--report", str(tmp_path / "r.html")]
    before = tmp_path / "before.json"
    assert main([*words, "--json", str(before), "--report-text", "2"]) == 0
    assert "the text of 2 responses" in capsys.readouterr().out
    html = (tmp_path / "r.html").read_text("utf-8")
    assert html.count("<details") == 2 and "This file holds text" in html and str(tmp_path) not in html
    after = tmp_path / "after.json"
    assert main([*words, "--report-text", "0", "--before", str(before), "--json", str(after)]) == 0
    assert "Gain in tau: +0.0% [+0.0%, +0.0%]" in capsys.readouterr().out
    assert json.loads(after.read_text())["gain_in_tau"] == {"gain": 0.0, "low": 0.0, "high": 0.0}
    html = (tmp_path / "r.html").read_text("utf-8")
    assert "<details" not in html and "Gain in tau" in html and "before: decided" in html
    assert "Break-even, estimated" in html
    others = tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps({"prompt": f"w{9 + i} w9 w10"}) + "\n" for i in range(3)), "utf-8")
    for flags, what in (
        (["--num-prompts", "2"], "other number of prompts: 3, now 2"),
        (["--dataset", str(others)], "other prompts, though as many"),
        (["--max-completion-length", "10"], "other `--max-completion-length`: 12, now 10"),
        (["--ignore-eos"], "other `--ignore-eos`"),
    ):
        assert main([*words, "--before", str(after), *flags]) == 2
        assert what in capsys.readouterr().err
