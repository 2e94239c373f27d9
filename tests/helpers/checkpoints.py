# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints compared, byte for byte."""

import json


def read(folder):
    """
    Every file's bytes; of the log all but how long an evaluation took, and of the manifest nothing, which holds its
    hash.
    """
    held = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    state = json.loads(held["trainer_state.json"])
    for entry in state["log_history"]:
        for name in [name for name in entry if name.endswith(("_runtime", "_per_second"))]:
            del entry[name]
    return held | {"trainer_state.json": state}


def differing(first, second):
    """Names of the files that differ."""
    first, second = read(first), read(second)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
