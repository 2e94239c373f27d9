# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The laboratory's figures, from results of any number of pairs. Draws what the tables compute; runs nothing.

Every figure is made to be read at 700 pixels, in colours that colour-blind readers tell apart (Okabe and Ito). A
figure whose data are missing is left out, and a line says what is missing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .tables import CONTINUED, START, ArmRow, Condition, arm_rows, conditions


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH_INCHES, DPI = 7.0, 100
STATES = {"accepted": "accepted", "first_rejected": "first rejected", "suffix": "suffix"}
MEASURES = {
    "forward_kl": "forward KL (nats)",
    "tv": "total variation",
    "is_wrong": "share of wrong drafts",
    "target_entropy": "target entropy (nats)",
}
Results = dict[str, Any]


def draw_all(results: Sequence[Results], folder: Path, *, formats: Sequence[str] = ("png",)) -> list[Path]:
    """
    Draw every figure the results have data for.

    Args:
        results (`Sequence[dict]`): Results of pairs, as [`load_results`] reads them.
        folder (`Path`): Where the files go.
        formats (`Sequence[str]`, *optional*, defaults to `("png",)`): Of `"png"` and `"svg"`.

    Returns:
        `list[Path]`: the files written.
    """
    tiers = sorted({condition.tier for pair in results for condition in conditions(pair)})
    paths = draw_sft_curve(results, folder, formats=formats)
    for tier in tiers:
        paths += draw_gains(results, folder, tier=tier, formats=formats)
    paths += draw_slots(results, folder, formats=formats)
    paths += draw_mismatch(results, folder, formats=formats)
    return paths + draw_predictors(results, folder, formats=formats)


def draw_sft_curve(results: Sequence[Results], folder: Path, *, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw tau of SFT against compute, a panel per pair, the plateau marked."""
    shown = [pair for pair in results if pair.get("sft", {}).get("history")]
    if not shown:
        return _skip("sft_curve", "no pair has `sft.history`")
    figure, axes = panels(len(shown), height=2.6)
    for axis, pair in zip(axes, shown, strict=True):
        history = pair["sft"]["history"]
        axis.plot([h["tflop"] for h in history], [h["tau"] for h in history], marker="o", ms=3, color=COLOURS[0])
        plateau = pair["sft"].get("plateau_update")
        at = [h["tflop"] for h in history if h["update"] == plateau]
        if at:
            axis.axvline(at[0], color=COLOURS[1], linestyle="--", linewidth=1.2)
            axis.annotate(
                f"plateau, update {plateau:,}",
                (at[0], 0.04),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                color=COLOURS[1],
                fontsize=8,
            )
        label(axis, pair["pair"] + ("" if at else " (no plateau reached)"), "TFLOP of SFT", "tau")
    return save(figure, folder, "sft_curve", formats)


def draw_gains(
    results: Sequence[Results], folder: Path, *, tier: int, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Draw the gain of every arm of a tier over continued SFT with its interval, a panel per pair."""
    name = f"gains_tier{tier}"
    panels = []
    for pair in results:
        by_condition = {
            condition: [row for row in arm_rows(pair, condition) if row.over_continued is not None]
            for condition in conditions(pair)
            if condition.tier == tier
        }
        by_condition = {condition: rows for condition, rows in by_condition.items() if rows}
        if by_condition:
            panels.append((pair["pair"], by_condition))
    if not panels:
        return _skip(name, f"no pair has arms of tier {tier} beside `{CONTINUED}` on the same prompts")
    most = max(len(_arms(by_condition)) for _, by_condition in panels)
    distributions = list(
        dict.fromkeys(_distribution(condition) for _, by_condition in panels for condition in by_condition)
    )
    figure, axes = panels(
        len(panels), height=1.2 + 0.12 * most * (1 + len(distributions)), columns=1 if most > 10 else 2
    )
    for axis, (title, by_condition) in zip(axes, panels, strict=True):
        _forest(axis, by_condition, distributions)
        label(axis, title, "gain in tau over continued SFT (%)", "")
    _share_legend(figure, axes, ncols=min(len(distributions), 3))
    return save(figure, folder, name, formats)


def _forest(axis: Axes, by_condition: dict[Condition, list[ArmRow]], distributions: list[str]) -> None:
    arms = _arms(by_condition)
    for condition, rows in by_condition.items():
        number = distributions.index(_distribution(condition))
        shift = 0.6 * ((number + 0.5) / len(distributions) - 0.5)
        places = [arms.index(row.arm) + shift for row in rows]
        gains = [row.over_continued for row in rows]
        axis.errorbar(
            [100 * gain.value for gain in gains],
            places,
            xerr=_error_bars(gains),
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            ms=4,
            capsize=2,
            linewidth=1.2,
            label=_distribution(condition),
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()


def draw_slots(results: Sequence[Results], folder: Path, *, formats: Sequence[str] = ("png",)) -> list[Path]:
    """
    Draw acceptance per slot of the start, continued SFT, Draft-OPD and the best arm of tier 1, a panel per pair and
    prompt set.
    """
    panels = []
    for pair in results:
        for condition in conditions(pair):
            rows = {row.arm: row for row in arm_rows(pair, condition)} if condition.tier == 1 else {}
            if START in rows and len(rows) > 1:
                panels.append((f"{pair['pair']}: {_distribution(condition)}", rows))
    if not panels:
        return _skip("slots", f"no pair has `{START}` and another arm of tier 1 on the same prompts")
    figure, axes = panels(len(panels), height=2.7)
    for axis, (title, rows) in zip(axes, panels, strict=True):
        best = max(rows.values(), key=lambda row: row.tau.value).arm
        shown = [arm for arm in dict.fromkeys((START, CONTINUED, "opd", best)) if arm in rows]
        for number, arm in enumerate(shown):
            rates = rows[arm].slot_acceptance
            label = f"{arm} (best)" if arm == best else arm
            axis.plot(
                range(1, len(rates) + 1),
                rates,
                color=COLOURS[number],
                marker=MARKERS[number],
                ms=4,
                lw=1.2,
                label=label,
            )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        label(axis, title, "slot", "blocks that keep it")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    return save(figure, folder, "slots", formats)


def draw_mismatch(results: Sequence[Results], folder: Path, *, formats: Sequence[str] = ("png",)) -> list[Path]:
    """
    Draw, one figure per pair and prompt set, how far drafter and target differ by the kind of state, before and after.
    """
    tables = [(pair, condition) for pair in results for condition in conditions(pair) if condition.tier == 1]
    if not tables:
        return _skip("mismatch", "no pair has arms of tier 1")
    paths = []
    for pair, condition in tables:
        arms = _mismatch_by_arm(pair, condition)
        name = f"mismatch_{pair['pair']}_{condition.prompts}"
        if len(arms) < 2:
            paths += _skip(name, f"needs `mismatch` of `{START}` and of another arm, found {sorted(arms)}")
            continue
        figure, axes = panels(len(MEASURES), height=2.1)
        for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
            _state_bars(axis, {arm: by_state.get(measure, {}) for arm, by_state in arms.items()})
            label(axis, label, "", "")
        axes[0].legend(fontsize=7)
        figure.suptitle(f"{pair['pair']}: {_distribution(condition)}", fontsize=10)
        paths += save(figure, folder, name, formats)
    return paths


def _mismatch_by_arm(pair: Results, condition: Condition) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean over seeds by arm, measure and state; a state that a run never met is left out."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in pair["runs"]:
        evaluation = run["evals"].get(condition.prompts)
        if run["arm"] not in (START, CONTINUED, "opd") or evaluation is None or not evaluation.get("mismatch"):
            continue
        if not condition.holds(condition.prompts, evaluation) or run["tier"] != condition.tier:
            continue
        for state, numbers in evaluation["mismatch"].items():
            for measure, value in numbers.items():
                values.setdefault(run["arm"], {}).setdefault(measure, {}).setdefault(state, []).append(value)
    order = [arm for arm in (START, CONTINUED, "opd") if arm in values]
    means = {
        arm: {m: {s: sum(v) / len(v) for s, v in by_state.items()} for m, by_state in values[arm].items()}
        for arm in order
    }
    return means if START in means else {}


def _state_bars(axis: Axes, by_arm: dict[str, dict[str, float]]) -> None:
    width = 0.8 / len(by_arm)
    for number, (arm, by_state) in enumerate(by_arm.items()):
        known = [(place, by_state[state]) for place, state in enumerate(STATES) if state in by_state]
        places = [place + (number + 0.5) * width - 0.4 for place, _ in known]
        axis.bar(places, [value for _, value in known], width=0.9 * width, color=COLOURS[number], label=arm)
    axis.set_xticks(range(len(STATES)), STATES.values())


def draw_predictors(results: Sequence[Results], folder: Path, *, formats: Sequence[str] = ("png",)) -> list[Path]:
    """
    Draw the gain of the Draft-OPD arms of tier 1 over continued SFT against what may predict it: tau at the start,
    entropy, block size, prompts.
    """
    points = []
    for pair in results:
        pools = _pools(pair)
        for condition in conditions(pair):
            rows = {row.arm: row for row in arm_rows(pair, condition)}
            for row in rows.values():
                # Of the other tiers, only the arms that vary the pool say something about these axes.
                is_shown = row.arm.startswith("opd") if condition.tier == 1 else row.arm in pools
                if is_shown and row.over_continued is not None:
                    distribution = f"{pair['pair']}: {_distribution(condition)}"
                    points.append((row, distribution, _predictors(pair, row, rows.get(START), pools)))
    if not points:
        return _skip("predictors", f"no pair has an arm `opd` beside `{CONTINUED}` in tier 1")
    names = [name for name in points[0][2] if any(point[2][name] is not None for point in points)]
    figure, axes = panels(len(names), height=2.4 + 0.08 * len(points))
    places = list(dict.fromkeys(place for _, place, _ in points))
    arms = list(dict.fromkeys(row.arm for row, _, _ in points))
    for axis, name in zip(axes, names, strict=True):
        for row, place, predictors in points:
            if predictors[name] is None:
                continue
            axis.errorbar(
                predictors[name],
                100 * row.over_continued.value,
                yerr=_error_bars([row.over_continued]),
                fmt=MARKERS[arms.index(row.arm) % len(MARKERS)],
                color=COLOURS[places.index(place) % len(COLOURS)],
                ms=4,
                capsize=2,
                linewidth=1,
                label=f"{place}, {row.arm}",
            )
        axis.axhline(0, color="black", linewidth=0.8)
        if name in ("block size", "prompts in the pool"):
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        label(axis, "", name, "gain (%)")
    _share_legend(figure, axes, ncols=2)
    figure.suptitle("Gain over continued SFT against what may predict it", fontsize=10)
    return save(figure, folder, "predictors", formats)


def _pools(pair: Results) -> dict[str, int]:
    """Return the prompts of the arms that were given a part of the pool only."""
    return {run["arm"]: run["settings"]["pool"] for run in pair["runs"] if run.get("settings", {}).get("pool")}


def _predictors(pair: Results, row: ArmRow, start: ArmRow | None, pools: dict[str, int]) -> dict[str, float | None]:
    entropy = row.target_entropy if start is None or start.target_entropy is None else start.target_entropy
    num_drafts = pair.get("num_drafts")
    return {
        "tau at the start": None if start is None else start.tau.value,
        "target entropy (nats)": entropy,
        "block size": None if num_drafts is None else num_drafts + 1,
        "prompts in the pool": pools.get(row.arm, pair.get("responses", {}).get("num_prompts")),
    }


def _arms(by_condition: dict[Condition, list[ArmRow]]) -> list[str]:
    return list(dict.fromkeys(row.arm for rows in by_condition.values() for row in rows))


def _distribution(condition: Condition) -> str:
    """Return what tells two conditions of a tier apart; greedy decoding, the usual one, is not said."""
    if condition.temperature == 0:
        return condition.prompts
    return f"{condition.prompts}, T={condition.temperature:g}, drafts {condition.draft_sampling}"


def _error_bars(gains: Sequence) -> list[list[float]]:
    # A percentile interval need not hold the estimate when there are few prompts; a bar of negative length cannot be
    # drawn.
    below = [max(100 * (gain.value - gain.low), 0.0) for gain in gains]
    above = [max(100 * (gain.high - gain.value), 0.0) for gain in gains]
    return [below, above]


def panels(count: int, *, height: float, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many panels, each `height` inches high."""
    columns = min(columns, count)
    num_rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH_INCHES, height * num_rows + 0.3), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    axes = figure.subplots(num_rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(labelsize=8)
    return figure, axes[:count]


def _share_legend(figure: Figure, axes: Sequence[Axes], *, ncols: int) -> None:
    """Put one legend for all panels below them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=ncols, fontsize=7)


def label(axis: Axes, title: str, x: str, y: str) -> None:
    """Name a panel and its axes."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
    """Write a figure in each of the formats and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in formats]
    # Without date and random ids the same data give the same file.
    with rc_context({"svg.hashsalt": name}):
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _skip(name: str, missing: str) -> list[Path]:
    print(f"figure {name} left out: {missing}")
    return []
