# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The laboratory's tables say what the results hold, a check finds an arm that moved, and every figure is drawn and not
blank.
"""

import copy
import json

import pytest
from matplotlib.image import imread

from benchmarks.lab import families, figures, tables
from benchmarks.lab.tables import Condition


pytestmark = pytest.mark.lab


MISMATCH = {"forward_kl": 0.5, "tv": 0.25, "is_wrong": 0.1, "target_entropy": 1.0}


def evaluation(rounds, accepted, slots=(0.5, 0.25), **options):
    values = {"temperature": 0.0, "draft_sampling": "greedy", "rounds": rounds, "accepted": accepted}
    mismatch = {state: dict(MISMATCH) for state in ("accepted", "first_rejected", "suffix")}
    return values | {"slot_acceptance": list(slots), "target_entropy": 1.25, "mismatch": mismatch} | options


def run(arm, seed, kept, *, tier=1, updates=100, slots=(0.5, 0.25), **options):
    """Return a run that keeps `kept` drafts in each of ten rounds on four prompts alike."""
    evals = {"math": evaluation([10] * 4, [10 * kept] * 4, slots, **options)}
    values = {"arm": arm, "tier": tier, "seed": seed, "updates": updates, "flops_per_update": 1e9}
    return values | {"tflop": updates / 10, "settings": {}, "evals": evals}


def make_results(pair="gsm8k-eagle3"):
    runs = [
        run("zz_late", 0, 3, tier=2, updates=50),
        run("opd", 0, 2, slots=(0.75, 0.5)),
        run("opd", 1, 4, slots=(0.25, 0.0)),
        run("sft_continued", 0, 1, updates=300),
        run("sft_continued", 1, 2, updates=300),
        run("sft_start", 0, 1, updates=0),
        run("sft_continued", 0, 2, tier=2, updates=90),
    ]
    history = [{"update": 100 * i, "tflop": 4.0 * i, "tau": 3 - 1 / i} for i in range(1, 8)]
    return {
        "pair": pair,
        "family": "eagle3",
        "target": "a-target",
        "num_drafts": 2,
        "responses": {"num_prompts": 4000, "tokens": 500000, "tflop": 12.3},
        "sft": {"flops_per_update": 4e10, "history": history, "plateau_update": 500},
        "budgets": {"1": 8.0, "2": 3.0},
        "runs": runs,
    }


def of_family(family, start, kept):
    """Return results of a family whose start and arms keep so many drafts, two seeds each."""
    runs = [run("sft_start", 0, start)]
    runs += [run(arm, seed, kept[arm] + seed) for arm in kept for seed in (0, 1)]
    sft = {"flops_per_update": 5e10, "history": [], "updates": 90, "cooldown_updates": 10, "parameters": 1_500_000}
    return make_results() | {"family": family, "sft": sft, "runs": runs}


def test_families_stand_beside_the_first_and_what_an_arm_adds_beside_what_it_adds_there():
    found = [
        of_family("dflash", 1, {"sft_continued": 1, "opd": 1}),
        of_family("dspark", 2, {"sft_continued": 2, "opd": 3}),
    ]
    starts, gains = families.render_families(found, "math", num_resamples=500).strip().split("\n\n")
    assert starts.splitlines()[2:] == [
        "| DFlash | 1.50 | 100 | 5.0 | 2.000 [2.000, 2.000] | – | 0.50 0.25 |",
        "| DSpark | 1.50 | 100 | 5.0 | 3.000 [3.000, 3.000] | +50.0 % [+50.0, +50.0] | 0.50 0.25 |",
    ]
    # 5 over 4 and 4 over 3, 4.5 over 3.5 pooled; nothing in the other family.
    assert gains.splitlines()[2:] == [
        "| DFlash | opd | +0.0 % [+0.0, +0.0] | – | 2 |",
        "| DSpark | opd | +28.6 % [+25.0, +33.3] | +28.6 [+25.0, +33.3] | 2 |",
    ]
    with pytest.raises(ValueError, match="one target"):
        families.render_families([found[0], found[1] | {"target": "another"}], "math", num_resamples=500)


def test_families_that_gain_alike_differ_by_nothing_however_their_prompts_scatter():
    first, second = (of_family(family, 1, {"sft_continued": 1, "opd": 2}) for family in ("dflash", "dspark"))
    for results in (first, second):
        for each in results["runs"]:
            each["evals"]["math"]["rounds"] = [4, 8, 15, 16]
    table = families.render_families([first, second], "math", num_resamples=500)
    assert "+0.0 [+0.0, +0.0] | 2 |" in table


def test_tables_hold_exactly_these_lines():
    text = tables.render(make_results())
    tier_1, tier_2 = text.split("### ")[1:]
    assert tier_1.splitlines()[:4] == [
        "gsm8k-eagle3: tier 1, math, temperature 0, drafts greedy",
        "",
        "4 prompts. tau and gains with 95 % intervals over prompts and seeds, gains paired.",
        "",
    ]
    assert tier_1.splitlines()[6:9] == [
        "| sft_start | 0 | 0 | 2.000 [2.000, 2.000] | – | – | 0.50 0.25 | 1 |",
        # tau is 2 with seed 0 and 3 with seed 1, so 2.5 pooled.
        "| sft_continued | 300 | 30 | 2.500 [2.000, 3.000] | – | +25.0 % [+0.0, +50.0] | 0.50 0.25 | 2 |",
        # Paired seed by seed: 3 over 2 and 5 over 3, and 4 over 2.5 pooled.
        "| opd | 100 | 10 | 4.000 [3.000, 5.000] | +60.0 % [+50.0, +66.7] | +100.0 % [+50.0, +150.0] | 0.50 0.25 | 2 "
        "|",
    ]
    # Continued SFT is that of the tier; the start is that of all tiers.
    assert tier_2.splitlines()[6:] == [
        "| sft_start | 0 | 0 | 2.000 [2.000, 2.000] | – | – | 0.50 0.25 | 1 |",
        "| sft_continued | 90 | 9 | 3.000 [3.000, 3.000] | – | +50.0 % [+50.0, +50.0] | 0.50 0.25 | 1 |",
        "| zz_late | 50 | 5 | 4.000 [4.000, 4.000] | +33.3 % [+33.3, +33.3] | +100.0 % [+100.0, +100.0] | 0.50 0.25 | "
        "1 |",
    ]
    assert "4,000 prompts, 500,000 tokens, 12.3 TFLOP" in text


def test_slots_are_weighted_by_rounds():
    results = make_results()
    results["runs"][1]["evals"]["math"]["rounds"] = [30] * 4
    rows = tables.arm_rows(results, tables.conditions(results)[0], num_resamples=50)
    assert rows[2].arm == "opd"
    assert rows[2].slot_acceptance == pytest.approx((0.75 * 3 / 4 + 0.25 / 4, 0.5 * 3 / 4))


def test_every_distribution_and_prompt_set_has_its_own_table():
    results = make_results()
    results["runs"] += [run("opd_hot", 0, 1, tier=2, temperature=1.0, draft_sampling="sample")]
    results["runs"][1]["evals"]["code"] = evaluation([5] * 3, [5] * 3)
    assert tables.conditions(results) == [
        Condition(1, "code", 0.0, "greedy"),
        Condition(1, "math", 0.0, "greedy"),
        Condition(2, "math", 0.0, "greedy"),
        Condition(2, "math", 1.0, "sample"),
    ]
    (hot,) = tables.arm_rows(results, Condition(2, "math", 1.0, "sample"), num_resamples=50)
    # Nothing to compare with under this distribution, which a dash says.
    assert (hot.arm, hot.over_continued, hot.over_start) == ("opd_hot", None, None)
    assert tables.render_rows([hot]).splitlines()[-1].split(" | ")[4:6] == ["–", "–"]


def test_a_baseline_trained_under_another_distribution_is_found_by_its_name():
    results = make_results()
    hot = {"tier": 2, "temperature": 1.0}
    results["runs"] += [run("opd_hot", 0, 3, **hot), run("sft_continued_hot", 0, 1, **hot)]
    rows = tables.arm_rows(results, Condition(2, "math", 1.0, "greedy"), num_resamples=50)
    assert {row.arm: row.over_continued and row.over_continued.value for row in rows} == {
        "sft_continued_hot": None,
        "opd_hot": 1.0,
    }


def test_two_runs_of_one_seed_are_refused():
    results = make_results()
    results["runs"].append(run("opd", 0, 2))
    with pytest.raises(ValueError, match="two runs of seed 0"):
        tables.render(results)


def test_results_agree_with_themselves_and_with_a_part():
    results = make_results()
    assert tables.check(results, results) == []
    part = make_results()
    part["runs"] = [r for r in part["runs"] if r["tier"] == 1]
    assert tables.check(part, results) == []


def test_a_check_finds_the_arm_that_moved():
    committed, fresh = make_results(), make_results()
    for row in fresh["runs"]:
        if row["arm"] == "opd":
            row["evals"]["math"]["accepted"] = [60] * 4
    found = tables.check(fresh, committed)
    assert [line.split(": ")[:2] for line in found] == [["tier 1, math, temperature 0, drafts greedy", "opd"]] * 4
    assert "fresh tau 7.000 is outside the committed [3.000, 5.000]" in found[0]
    assert "committed tau 4.000 is outside the fresh [7.000, 7.000]" in found[1]
    assert "gain over SFT continued is +180.0 %" in found[2]
    assert "gain over SFT start is +250.0 %" in found[3]


def test_a_check_names_arms_and_tables_that_only_one_side_has():
    committed, fresh = make_results(), make_results()
    committed["runs"] = [r for r in committed["runs"] if r["tier"] == 1]
    fresh["runs"] = [r for r in fresh["runs"] if r["arm"] != "opd"]
    found = tables.check(fresh, committed)
    assert found == [
        "tier 1, math, temperature 0, drafts greedy: opd is only in the committed results",
        "tier 2, math, temperature 0, drafts greedy: there is no such table in the committed results",
    ]


def test_a_check_of_nothing_is_refused():
    committed, fresh = make_results(), make_results()
    with pytest.raises(ValueError, match="'another'"):
        tables.check(make_results("another"), committed)
    fresh["runs"] = [r for r in fresh["runs"] if r["tier"] == 2]
    committed["runs"] = [r for r in committed["runs"] if r["tier"] == 1]
    with pytest.raises(ValueError, match="No table in common"):
        tables.check(fresh, committed)


def test_a_file_that_holds_no_results_is_refused(tmp_path):
    path = tmp_path / "pair.json"
    path.write_text(json.dumps(make_results()))
    assert tables.load_results(path) == make_results()
    path.write_text('{"pair": "x"}')
    with pytest.raises(ValueError, match="no family, runs"):
        tables.load_results(path)


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """All figures of two pairs, and the results before and after drawing."""
    results = [make_results(), make_results("gsm8k-dflash") | {"num_drafts": 7}]
    before = copy.deepcopy(results)
    return figures.draw_all(results, tmp_path_factory.mktemp("figures")), before, results


def test_every_figure_is_drawn_small_and_not_blank(drawn):
    paths, _, _ = drawn
    assert [path.name for path in paths] == [
        "sft_curve.png",
        "gains_tier1.png",
        "gains_tier2.png",
        "slots.png",
        "mismatch_gsm8k-eagle3_math.png",
        "mismatch_gsm8k-dflash_math.png",
        "predictors.png",
    ]
    for path in paths:
        pixels = imread(path)
        assert pixels.shape[1] == 700, path
        # Axes without anything in them make some 2 % of the pixels.
        assert (pixels[..., :3] != 1).any(axis=-1).mean() > 0.02, path
        assert path.stat().st_size < 120_000, path


def test_drawing_leaves_the_results_as_they_are(drawn):
    _, before, after = drawn
    assert after == before


@pytest.mark.parametrize("name", ["draw_sft_curve", "draw_slots", "draw_mismatch"])
def test_the_drawn_data_change_the_picture(tmp_path, name):
    first, second = make_results(), make_results()
    second["sft"]["plateau_update"] = None
    for row in second["runs"]:
        row["evals"]["math"]["mismatch"]["suffix"]["tv"] = 0.9
        row["evals"]["math"]["slot_acceptance"] = [0.1, 0.0]
    draw = getattr(figures, name)
    paths = [draw([results], tmp_path / f"{i}")[0] for i, results in enumerate((first, second, second))]
    assert paths[0].read_bytes() != paths[1].read_bytes() == paths[2].read_bytes()


def test_vector_figures_are_the_same_on_every_run(tmp_path):
    first = figures.draw_gains([make_results()], tmp_path / "a", tier=1, formats=("png", "svg"))
    second = figures.draw_gains([make_results()], tmp_path / "b", tier=1, formats=("svg",))
    assert [path.suffix for path in first] == [".png", ".svg"]
    assert b"<dc:date>" not in first[1].read_bytes()
    assert first[1].read_bytes() == second[0].read_bytes()


def test_a_figure_without_data_is_left_out_and_says_why(tmp_path, capsys):
    results = make_results()
    results["sft"] = {}
    results["runs"] = [r for r in results["runs"] if r["arm"] in ("sft_start", "opd") and r["tier"] == 1]
    for row in results["runs"]:
        row["evals"]["math"].pop("mismatch")
    paths = figures.draw_all([results], tmp_path)
    assert [path.name for path in paths] == ["slots.png"]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" left out: ")[0].removeprefix("figure ") for line in said] == [
        "sft_curve",
        "gains_tier1",
        "mismatch_gsm8k-eagle3_math",
        "predictors",
    ]
    assert "`sft.history`" in said[0] and "`sft_continued`" in said[1] and "`mismatch`" in said[2]
