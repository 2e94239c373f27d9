# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What is trained: the drafter families under one contract. Refuses to know targets, rollouts, losses and trainers."""

# The registry of families: whoever reads a published drafter, however deep below, must know them all.
from .auto import DRAFTER_CLASSES


__all__ = ["DRAFTER_CLASSES"]
