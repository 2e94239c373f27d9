# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Runs the command line as `python -m trl_draft_opd`, which `accelerate launch -m trl_draft_opd` starts too."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
