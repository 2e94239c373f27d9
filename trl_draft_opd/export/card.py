# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The model card: what the drafter is, how to serve it, what was measured. Written from the training record; a number
that was not measured is not there.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .costs import cost_table, drafter_parameters
from .curves import curve_panels, curve_table, draw_panel
from .publication import Publication
from .record import Measurement, StageRecord
from .served import ServedSpeed, describe_served, served_rows
from .serving import SERVING_FILE


logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
CURVE_FILE = "training_curve.png"
_NOTES = re.compile(r"<!-- notes -->(.*?)<!-- /notes -->", re.DOTALL)
_MEASURED = ("prompts", "temperature", "drafts", "tau", "acceptance per slot", "decoded with")
_METHODS = {"sft": "supervised fine-tuning", "opd": "Draft-OPD (on-policy distillation)"}
_HUB_LICENCES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl "
    "gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa "
    "unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown "
    "other".split()
)


def write_card(
    folder: str | Path,
    publication: Publication,
    settings: dict[str, Any],
    *,
    notes_of: Path | None = None,
    draws_curve: bool = True,
    is_adapter: bool = False,
) -> None:
    """
    Write `README.md`, and the picture of the training curve where there is one to draw.

    Args:
        folder (`str` or `Path`): The folder.
        publication ([`Publication`]): What is published.
        settings (`dict`): See [`serving_settings`].
        notes_of (`Path`, *optional*):
            The folder of an earlier card, whose notes between the markers are kept; `folder` by default.
        draws_curve (`bool`, *optional*, defaults to `True`): Draw the curve; else it is a table in the card.
        is_adapter (`bool`, *optional*, defaults to `False`): The folder holds a LoRA adapter, which no engine reads.
    """
    folder = Path(folder)
    record, readers, estimate = publication.record, settings["readers"], settings["break_even"]
    stages = record.stages if record is not None else []
    measurements = record.measurements if record is not None else []
    config = publication.config
    name = config.title
    content = {
        "publication": publication,
        "title": plain(publication.repo_id.split("/")[-1] if publication.repo_id else f"{name} drafter"),
        "family_name": name,
        "drafts_whole_blocks": config.drafts_whole_blocks,
        "papers": config.exported.papers,
        "target_link": plain(publication.target_id),
        "methods": list(dict.fromkeys(_METHODS[stage.method] for stage in stages)),
        "facts": _table(["", ""], _facts(publication)),
        "serving": settings,
        "serves": {reader: _can_read(readers, reader) for reader in readers},
        "readers": _table(["reader", "loads it as it is, by the rules it reads files with"], list(readers.items())),
        "serving_file": SERVING_FILE,
        "measurements": _table(_MEASURED, [_measurement(m) for m in measurements]) if measurements else None,
        "calibrated": [_calibration(m) for m in measurements if m.calibration_error is not None],
        "has_replays": any(m.is_replay for m in measurements),
        "compared": [_comparison(m) for m in measurements if m.num_different is not None],
        "served": [_served(each) for each in record.served] if record is not None else [],
        "estimate": estimate,
        "costs": _table(*cost_table(estimate["rows"])) if estimate else None,
        "stages": [_stage(stage) for stage in stages],
        "curve_file": CURVE_FILE if draws_curve and _draw_curve(stages, folder) else None,
        "curve": _curve_table(stages),
        "temperatures": [f"{temperature:g}" for temperature in sorted({m.temperature for m in measurements})],
        "versions": [f"{plain(each)} {plain(version)}" for each, version in record.versions.items()] if record else [],
        "notes": _earlier_notes(notes_of or folder),
        "is_adapter": is_adapter,
    }
    template = Path(__file__).parent / "card.md.jinja"
    card = ModelCard.from_template(_metadata(publication, readers), template_path=str(template), **content)
    card.save(folder / CARD_FILE)


def _can_read(readers: dict[str, str], name: str) -> bool:
    return not readers.get(name, "no").startswith("no")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows))


def plain(text: Any) -> str:
    """Return text that Markdown and YAML take for text: one line, its special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|#!$])", r"\\\1", " ".join(str(text).split()))


def _metadata(publication: Publication, readers: dict[str, str]) -> ModelCardData:
    stages = publication.record.stages if publication.record is not None else []
    readable = {"vllm": "vLLM", "sglang": "SGLang", "speculators": "speculators"}
    readable |= {"transformers": "transformers (assistant_model)"}
    tags = ["speculative-decoding", publication.family, "draft-model"]
    tags += [tag for tag, name in readable.items() if _can_read(readers, name)]
    tags += ["custom_generate"] if publication.has_custom_generate else []
    names = list(dict.fromkeys(stage.dataset.name for stage in stages if stage.dataset.name))
    given = publication.license
    # The Hub refuses a card that names a licence it does not list.
    license = given if given is None else given.lower() if given.lower() in _HUB_LICENCES else "other"
    return ModelCardData(
        base_model=publication.target_id,
        library_name="speculators" if publication.layouts[0] == "speculators" else "transformers",
        pipeline_tag="text-generation",
        datasets=names or None,
        tags=[*tags, "trl", "draft-opd"],
        license=license,
        license_name=None if license != "other" else given,
    )


def _facts(publication: Publication) -> list[tuple[str, Any]]:
    config, drafts = publication.config, publication.num_drafts
    target = publication.record.target if publication.record is not None else None
    revision = f" at revision {plain(target.revision)}" if target is not None and target.revision else ""
    facts: list[tuple[str, Any]] = [("target", f"{plain(publication.target_id or 'not on the Hub')}{revision}")]
    if target is not None and target.chat_template_sha256:
        arguments = ", ".join(f"{plain(name)}={plain(value)}" for name, value in target.chat_template_kwargs.items())
        switched = f"; trained with {arguments}" if arguments else "; no switch for thinking was set"
        facts.append(("chat template", f"the target's, sha256 {target.chat_template_sha256[:12]}{switched}"))
    own = config.exported.facts(config, drafts)
    covered = [
        (name, f"{value}{_coverage(publication)}" if name == "draft vocabulary" else value) for name, value in own
    ]
    return [
        *facts,
        ("family", config.title),
        ("parameters", f"{drafter_parameters(config):,}, {config.exported.not_counted}"),
        *covered,
        ("target layers read", f"{publication.layer_ids} (0-based), that is after {publication.boundaries} layers"),
        ("width, heads", f"{config.hidden_size}, {config.num_attention_heads} / {config.num_key_value_heads}"),
        ("longest text", f"{config.max_position_embeddings} tokens"),
        ("precision", str(publication.dtype).removeprefix("torch.")),
    ]


def _coverage(publication: Publication) -> str:
    """Return what the record states of a reduced vocabulary's coverage, of the last stage that counted it."""
    stages = publication.record.stages if publication.record is not None else []
    shares = [stage.settings["draft_vocab_coverage"] for stage in stages if "draft_vocab_coverage" in stage.settings]
    return f", {shares[-1]:.2%} of the response tokens it was trained on" if shares else ""


def _measurement(m: Measurement) -> list[str]:
    ending = (", end of sequence ignored" if m.ignore_eos else "") + (", by replay" if m.is_replay else "")
    return [
        f"{plain(m.prompt_set)} ({m.num_prompts})",
        f"{m.temperature:g}" + (", drawn drafts" if m.draft_sampling == "sample" else ""),
        str(m.num_drafts),
        f"{m.tau:.3f} [{m.tau_low:.3f}, {m.tau_high:.3f}]",
        " ".join(f"{rate:.2f}" for rate in m.acceptance_per_slot),
        f"{m.target_dtype}, batch {m.batch_size}, at most {m.max_completion_length} tokens{ending}",
    ]


def _comparison(m: Measurement) -> str:
    same = m.num_prompts - (m.num_different or 0)
    return (
        f"{same} of {m.num_prompts} greedy outputs on {plain(m.prompt_set)} equal the target's own ({m.target_dtype})"
    )


def _served(served: ServedSpeed) -> dict[str, Any]:
    return {"table": _table(*served_rows(served)), **describe_served(served, plain)}


def _calibration(m: Measurement) -> str:
    brier = "" if m.brier_score is None else f", Brier score {m.brier_score:.3f}"
    return f"expected calibration error {m.calibration_error:.3f}{brier} on {plain(m.prompt_set)} at {m.temperature:g}"


def _stage(stage: StageRecord) -> dict[str, str]:
    data = stage.dataset
    rows = f"{data.num_rows} rows of " if data.num_rows else ""
    origin = "text the target wrote" if data.completions == "target" else "the dataset's own text"
    licence = f", licence {plain(data.licence)}" if data.licence else ", licence not given"
    settings = ", ".join(f"{name} {value}" for name, value in stage.settings.items())
    return {
        "method": _METHODS[stage.method],
        "steps": str(stage.steps),
        "dataset": f"{rows}{plain(data.name) if data.name else 'local data'} ({origin}{licence})",
        "settings": f"<details><summary>Settings</summary>{plain(settings)}</details>" if settings else "",
    }


def _earlier_notes(folder: Path) -> str:
    path = folder / CARD_FILE
    if not path.is_file():
        return "\n"
    if (found := _NOTES.search(path.read_text("utf-8"))) is not None:
        return found.group(1)
    logger.warning("%s has no `<!-- notes -->` ... `<!-- /notes -->` to keep, so all of it is replaced.", path)
    return "\n"


def _curve_table(stages: Sequence[StageRecord]) -> str | None:
    """Return about twelve points of the curves as a table, in place of the picture; `None` if there is no curve."""
    panels = curve_panels(stages)
    return _table(*curve_table(panels)) if panels else None


def _draw_curve(stages: Sequence[StageRecord], folder: Path) -> bool:
    """Draw the losses of each stage and tau over steps; return whether there is a picture."""
    panels = curve_panels(stages)
    if not panels:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed, so the card has a table for a curve (`pip install matplotlib`).")
        return False
    figure = Figure(figsize=(4.5 * len(panels), 3.0), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, panel, ("#0072B2", "#D55E00", "#009E73", "#000000"))
    figure.savefig(folder / CURVE_FILE, dpi=120)
    return True
