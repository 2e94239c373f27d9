# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The public names and their homes: checkers read them here, and `__init__.py` imports each on first use."""

from .drafters.auto import AutoDrafter as AutoDrafter
from .drafters.dflash import DFlashDraftConfig as DFlashDraftConfig
from .drafters.dflash import DFlashDraftModel as DFlashDraftModel
from .drafters.dflash2 import DFlash2DraftConfig as DFlash2DraftConfig
from .drafters.dflash2 import DFlash2DraftModel as DFlash2DraftModel
from .drafters.draft_vocabulary import DraftVocabulary as DraftVocabulary
from .drafters.draft_vocabulary import build_draft_vocabulary as build_draft_vocabulary
from .drafters.draft_vocabulary import count_tokens as count_tokens
from .drafters.dspark import DSparkDraftConfig as DSparkDraftConfig
from .drafters.dspark import DSparkDraftModel as DSparkDraftModel
from .drafters.eagle3 import Eagle3DraftConfig as Eagle3DraftConfig
from .drafters.eagle3 import Eagle3DraftModel as Eagle3DraftModel
from .evaluation import EvaluationReport as EvaluationReport
from .evaluation import evaluate_drafter as evaluate_drafter
from .export import ExportResult as ExportResult
from .export import TargetOfExport as TargetOfExport
from .export import export_drafter as export_drafter
from .export import read_target as read_target
from .export.record import TrainingRecord as TrainingRecord
from .parity import VerificationReport as VerificationReport
from .parity import verify_drafter as verify_drafter
from .readings.opening import open_readings as open_readings
from .readings.store import ReadingStore as ReadingStore
from .readings.write import write_readings as write_readings
from .responses import Origin as Origin
from .responses import ResponseStore as ResponseStore
from .responses import ServerSettings as ServerSettings
from .responses import StoredResponse as StoredResponse
from .responses import audit_responses as audit_responses
from .responses import check_responses as check_responses
from .responses import generate_responses as generate_responses
from .responses import import_responses as import_responses
from .responses import write_responses as write_responses
from .rollout.acceptance import SamplingSettings as SamplingSettings
from .target.frozen import FrozenTarget as FrozenTarget
from .traffic import TrafficReport as TrafficReport
from .traffic import import_traffic as import_traffic
from .trainer.draft_opd_config import DraftOPDConfig as DraftOPDConfig
from .trainer.draft_opd_trainer import DraftOPDTrainer as DraftOPDTrainer
from .trainer.draft_sft_config import DraftSFTConfig as DraftSFTConfig
from .trainer.draft_sft_trainer import DraftSFTTrainer as DraftSFTTrainer

__version__: str
