# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Drafters: what is trained. Families live in folders of their own; nothing here knows trainers or rollouts."""
