# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What is trained: the drafter families under one contract. Refuses to know targets, rollouts, losses and trainers."""
