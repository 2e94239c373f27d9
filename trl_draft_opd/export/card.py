# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The model card: what the drafter is, how to serve it, what was measured. Written from the training record; a number that was not
measured is not there.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .record import Measurement, StageRecord, TrainingRecord

from .serving import (
    SERVING_FILE,
    drafter_parameters,
    family_of,
    layer_ids_of,
    measured_facts,
    num_drafts_of,
    placeholder,
    serving_settings,
)


logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
CURVE_FILE = "training_curve.png"
_NOTES = re.compile(r"<!-- notes -->(.*?)<!-- /notes -->", re.DOTALL)
_FAMILY_NAMES = {"eagle3": "EAGLE-3", "dflash": "DFlash"}
_METHODS = {"sft": "supervised fine-tuning", "opd": "Draft-OPD (on-policy distillation)"}
_HUB_LICENCES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0 "
    "bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 "
    "cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
    "cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 "
    "gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa "
    "unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other".split()
)


def write_card(
    folder: str | Path,
    *,
    config: dict[str, Any],
    record: TrainingRecord | None,
    repo_id: str | None,
    layouts: Sequence[str],
    target_id: str | None = None,
    target_architectures: Sequence[str] = (),
    license: str | None = None,
    draws_curve: bool = True,
    is_adapter: bool = False,
) -> None:
    """
    Write `README.md`, and the picture of the training curve where there is one to draw.

    Args:
        folder (`str` or `Path`): The folder; notes between the markers of an earlier card in it are kept.
        config (`dict`): The flat config.
        record ([`TrainingRecord`] or `None`): What was trained and measured.
        repo_id (`str` or `None`): Hub id of the drafter.
        layouts (`Sequence[str]`): Layouts in the folder, the one at its root first.
        target_id (`str`, *optional*), target_architectures (`Sequence[str]`, *optional*): The target.
        license (`str`, *optional*): Licence of the drafter, as its author gives it; never guessed from data or target.
        draws_curve (`bool`, *optional*, defaults to `True`): Draw the curve; else it is a table in the card.
        is_adapter (`bool`, *optional*, defaults to `False`): Whether the folder holds a LoRA adapter, which no engine reads.

    Raises:
        ValueError: If an id is no Hub id, or the record is another drafter's or holds what must not be published. Nothing is
            written then.
    """
    folder = Path(folder)
    family = family_of(config)
    if record is not None:
        _check_fits(record, config)
    target_id = target_id or (record.target.name if record is not None else None)
    stages = list(record.stages) if record is not None else []
    serving = serving_settings(
        config,
        target_id=target_id,
        repo_id=repo_id,
        target_architectures=target_architectures,
        layouts=layouts,
        **measured_facts(record, config),
    )
    content = _content(config, record, serving, repo_id=repo_id, target_id=target_id, layouts=layouts)
    has_curve = draws_curve and _draw_curve(stages, folder)
    content |= {"has_curve": has_curve, "notes": _earlier_notes(folder), "is_adapter": is_adapter}
    card = ModelCard.from_template(
        _metadata(family, layouts, stages, target_id, serving["readers"], license),
        template_path=str(Path(__file__).parent / "card.md.jinja"),
        **content,
    )
    card.save(folder / CARD_FILE)


def _content(
    config: dict[str, Any],
    record: TrainingRecord | None,
    serving: dict[str, Any],
    *,
    repo_id: str | None,
    target_id: str | None,
    layouts: Sequence[str],
) -> dict[str, Any]:
    """Return what the template names, but for what depends on the folder."""
    family = family_of(config)
    stages = list(record.stages) if record is not None else []
    measurements = list(record.measurements) if record is not None else []
    repo = repo_id or placeholder(config)
    break_even = serving["break_even"]
    target_link = f"[{plain(target_id)}](https://huggingface.co/{target_id})"
    return {
        "title": plain(repo_id.split("/")[-1] if repo_id else f"{_FAMILY_NAMES[family]} drafter"),
        "family": family,
        "article": "An" if family == "eagle3" else "A",
        "family_name": _FAMILY_NAMES[family],
        "target_text": target_link if target_id else "a target that is not on the Hub",
        "drafts": num_drafts_of(config),
        "stages_text": _stages_text(stages),
        "facts": _facts(config, record, target_id),
        "serving": serving,
        "serves": {name: not answer.startswith("no") for name, answer in serving["readers"].items()},
        "serving_file": SERVING_FILE,
        "is_placeholder": repo_id is None or target_id is None,
        "speculators_command": f"vllm serve {repo}-speculators" if "speculators" in layouts[1:] else None,
        "measurements": [_measurement(m) for m in measurements],
        "lossless": _lossless(measurements),
        "verify_command": f"trl-draft-opd verify {repo} --target {target_id or 'ORG/TARGET'} --prompts prompts.jsonl",
        "break_even": break_even,
        "break_even_taus": list(break_even["rows"][0]["speedup"]) if break_even else [],
        "has_best": bool(break_even and break_even["rows"][0]["best_drafts"]),
        "stages": [_stage(stage) for stage in stages],
        "curve_file": CURVE_FILE,
        "curve_rows": _curve_rows(stages),
        "temperature_limit": _temperature_limit(measurements),
        "versions": _versions(record),
    }


def _check_fits(record: TrainingRecord, config: dict[str, Any]) -> None:
    """Raise `ValueError` if a record must not be published, or tells of another drafter."""
    record.check()
    own = (family_of(config), config["vocab_size"], config["target_hidden_size"])
    other = (record.family, record.target.vocab_size, record.target.hidden_size)
    if own != other:
        raise ValueError(
            f"The training record is another drafter's: family, vocabulary and target width are {other}, here they are {own}. Give the "
            "record of this drafter, or none."
        )


def plain(text: Any) -> str:
    """Return text that Markdown and YAML take for text: one line, its special characters escaped."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#!$])", r"\\\1", one_line)


def _metadata(
    family: str,
    layouts: Sequence[str],
    stages: Sequence[StageRecord],
    target_id: str | None,
    readers: dict[str, str],
    license: str | None,
) -> ModelCardData:
    def reads(name: str) -> bool:
        return not readers.get(name, "no").startswith("no")

    tags = ["speculative-decoding", family, "draft-model"]
    tags += [
        tag for tag, name in (("vllm", "vLLM"), ("sglang", "SGLang"), ("speculators", "speculators")) if reads(name)
    ]
    tags += ["transformers"] if reads("transformers (assistant_model)") else []
    tags += ["custom_generate"] if layouts[0] == "flat" and (family == "eagle3" or "transformers" in layouts) else []
    tags += ["trl", "draft-opd"]
    names = list(dict.fromkeys(stage.dataset.name for stage in stages if stage.dataset.name))
    return ModelCardData(
        base_model=target_id,
        library_name="speculators" if layouts[0] == "speculators" else "transformers",
        pipeline_tag="text-generation",
        datasets=names or None,
        tags=tags,
        **_licence(license),
    )


def _licence(given: str | None) -> dict[str, str]:
    """Return the card's licence in the Hub's words."""
    if given is None:
        return {}
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", given):
        raise ValueError(f"`license` must be an identifier such as 'apache-2.0' or 'cc-by-4.0', got {given!r}.")
    # The Hub refuses a card that names a licence it does not list.
    listed = given.lower() in _HUB_LICENCES
    return {"license": given.lower()} if listed else {"license": "other", "license_name": given}


def _stages_text(stages: Sequence[StageRecord]) -> str:
    names = list(dict.fromkeys(_METHODS[stage.method] for stage in stages))
    return f" by {', then '.join(names)}" if names else ""


def _facts(config: dict[str, Any], record: TrainingRecord | None, target_id: str | None) -> list[tuple[str, str]]:
    target = record.target if record is not None else None
    revision = f" at revision {plain(target.revision)}" if target is not None and target.revision else ""
    facts = [("target", f"{plain(target_id or 'not on the Hub')}{revision}")]
    if target is not None and target.chat_template_sha256:
        arguments = ", ".join(f"{plain(name)}={plain(value)}" for name, value in target.chat_template_kwargs.items())
        switched = f"; trained with {arguments}" if arguments else "; no switch for thinking was set"
        facts.append(("chat template", f"the target's, sha256 {target.chat_template_sha256[:12]}{switched}"))
    facts.append(("family", _FAMILY_NAMES[family_of(config)]))
    facts.append(("parameters", f"{drafter_parameters(config):,}, {_not_counted(config)}"))
    if family_of(config) == "dflash":
        facts.append(("block", f"{config['block_size']} slots: the anchor and {num_drafts_of(config)} drafts"))
        facts.append(("layers", str(config["num_hidden_layers"])))
        facts.append(("mask token", str(config["mask_token_id"])))
    else:
        facts.append(("drafts in training", str(num_drafts_of(config))))
        facts.append(("norms", _norms(config)))
        part = "all" if config["draft_vocab_size"] == config["vocab_size"] else f"{config['draft_vocab_size']}"
        facts.append(("draft vocabulary", f"{part} of {config['vocab_size']} tokens"))
    ids = layer_ids_of(config)
    facts.append(("target layers read", f"{ids} (0-based), that is after {[i + 1 for i in ids]} layers"))
    facts.append(
        ("width, heads", f"{config['hidden_size']}, {config['num_attention_heads']} / {config['num_key_value_heads']}")
    )
    facts.append(("longest text", f"{config['max_position_embeddings']} tokens"))
    facts.append(("precision", config["dtype"]))
    return facts


def _not_counted(config: dict[str, Any]) -> str:
    if family_of(config) == "dflash":
        return "the target's embedding and head, which it uses, not counted"
    return "the copy of the target's embedding not counted"


def _norms(config: dict[str, Any]) -> str:
    flags = [name for name in ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output") if config[name]]
    return ", ".join(f"`{name}`" for name in flags) or "as in EAGLE-3's own code, no further ones"


def _measurement(m: Measurement) -> dict[str, str]:
    distribution = f"{m.temperature:g}" + (", drawn drafts" if m.draft_sampling == "sample" else "")
    ending = ", end of sequence ignored" if m.ignore_eos else ""
    return {
        "prompts": f"{plain(m.prompt_set)} ({m.num_prompts})",
        "temperature": distribution,
        "drafts": str(m.num_drafts),
        "how": f"{m.target_dtype}, batch {m.batch_size}, at most {m.max_new_tokens} tokens{ending}",
        "tau": f"{m.tau:.3f} [{m.tau_low:.3f}, {m.tau_high:.3f}]",
        "slots": " ".join(f"{rate:.2f}" for rate in m.acceptance_per_slot),
    }


def _lossless(measurements: Sequence[Measurement]) -> str:
    compared = [m for m in measurements if m.num_different is not None]
    if not compared:
        return "Not compared with plain decoding yet."
    parts = [
        f"{m.num_prompts - m.num_different} of {m.num_prompts} greedy outputs on {plain(m.prompt_set)} equal the target's own ({m.target_dtype})"
        for m in compared
    ]
    return "; ".join(parts) + "."


def _temperature_limit(measurements: Sequence[Measurement]) -> str:
    measured = sorted({m.temperature for m in measurements})
    if not measured:
        return "Nothing was measured yet, at any temperature."
    return f"Measured at temperature {', '.join(f'{t:g}' for t in measured)} alone."


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


def _versions(record: TrainingRecord | None) -> str:
    if record is None or not record.versions:
        return ""
    return (
        "Versions: " + ", ".join(f"{plain(name)} {plain(version)}" for name, version in record.versions.items()) + "."
    )


def _earlier_notes(folder: Path) -> str:
    path = folder / CARD_FILE
    if not path.is_file():
        return "\n"
    found = _NOTES.search(path.read_text("utf-8"))
    if found is None:
        logger.warning(
            "%s has no `<!-- notes -->` ... `<!-- /notes -->`, so all of it is replaced. Text between these two survives.",
            path,
        )
    return found.group(1) if found else "\n"


def _curve(stages: Sequence[StageRecord], *names: str) -> list[tuple[int, int, float]]:
    """Return `(stage, step over all stages, value)` of the first of `names` that a point has."""
    points, start = [], 0
    for index, stage in enumerate(stages):
        for point in stage.curve:
            value = next((point[name] for name in names if name in point), None)
            if value is not None:
                points.append((index, start + point["step"], value))
        start += stage.steps
    return points


def _curve_rows(stages: Sequence[StageRecord]) -> list[dict[str, str]]:
    """Return at most twelve points of the curve, for a table in place of the picture."""
    losses, taus = (
        {point[:2]: point[2] for point in _curve(stages, *names)} for names in (("loss",), ("eval_tau", "tau"))
    )
    places = sorted(losses | taus)
    picked = places[:: max(1, len(places) // 12)]
    return [
        {
            "stage": str(index + 1),
            "step": str(step),
            "loss": f"{losses[index, step]:.3f}" if (index, step) in losses else "",
            "tau": f"{taus[index, step]:.3f}" if (index, step) in taus else "",
        }
        for index, step in picked
    ]


def _draw_curve(stages: Sequence[StageRecord], folder: Path) -> bool:
    """Draw loss and tau over steps; return whether there is a picture."""
    losses, taus = _curve(stages, "loss"), _curve(stages, "eval_tau", "tau")
    if not losses and not taus:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            "matplotlib is not installed: the card shows the training curve as a table (`pip install trl-draft-opd[plots]`)."
        )
        return False
    drawn = [(points, name) for points, name in ((losses, "loss"), (taus, "tau")) if points]
    figure = Figure(figsize=(4.5 * len(drawn), 3.0), layout="constrained")
    for axes, (points, name) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for index, stage in enumerate(stages):
            own = [(step, value) for where, step, value in points if where == index]
            if own:
                axes.plot(*zip(*own, strict=True), label=stage.method, marker="." if len(own) < 20 else None)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if len(stages) > 1:
            axes.legend(frameon=False)
    figure.savefig(folder / CURVE_FILE, dpi=120)
    return True
