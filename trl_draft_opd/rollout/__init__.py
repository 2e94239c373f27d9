# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Rollouts: which blocks the current drafter proposes and how far the target keeps them."""
