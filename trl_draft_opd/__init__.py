# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Public names of trl-draft-opd, imported on first use. No logic lives here."""

import importlib
from pathlib import Path
from typing import Any


__version__ = (Path(__file__).parent / "VERSION").read_text(encoding="utf-8").strip()

# Public name -> module that defines it; importing the package alone loads neither torch nor transformers.
_PUBLIC = {
    "AutoDrafter": "drafters.auto",
    "DFlashDraftConfig": "drafters.dflash",
    "DFlashDraftModel": "drafters.dflash",
    "Eagle3DraftConfig": "drafters.eagle3",
    "Eagle3DraftModel": "drafters.eagle3",
    "DraftVocabulary": "drafters.eagle3",
    "build_draft_vocabulary": "drafters.eagle3",
    "count_tokens": "drafters.eagle3",
    "DraftOPDConfig": "trainer.draft_opd_config",
    "DraftOPDTrainer": "trainer.draft_opd_trainer",
    "DraftSFTConfig": "trainer.draft_sft_config",
    "DraftSFTTrainer": "trainer.draft_sft_trainer",
    "EvaluationReport": "evaluation",
    "ExportResult": "export",
    "FrozenTarget": "target.frozen",
    "Origin": "responses",
    "SamplingSettings": "rollout.acceptance",
    "ServerSettings": "responses",
    "TrainingRecord": "export.record",
    "StoredResponse": "responses",
    "ResponseStore": "responses",
    "VerificationReport": "parity",
    "audit_responses": "responses",
    "check_responses": "responses",
    "evaluate_drafter": "evaluation",
    "export_drafter": "export",
    "generate_responses": "responses",
    "import_responses": "responses",
    "verify_drafter": "parity",
    "write_responses": "responses",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trl_draft_opd' has no attribute {name!r}; public names are {sorted(_PUBLIC)}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)  # noqa: TID251


def __dir__() -> list[str]:
    return sorted(__all__)
