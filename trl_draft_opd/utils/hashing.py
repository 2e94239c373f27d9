# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The one hash of JSON values. Knows nothing of what they say."""

import hashlib
import json
from typing import Any


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a value as JSON, whatever the order of its keys; other values count as their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
