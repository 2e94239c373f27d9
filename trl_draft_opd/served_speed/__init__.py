# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How fast a server writes under load, with a drafter and without one: a fixed number of requests at a time, the next of
which is sent as soon as one has ended.

Refuses to know models: only addresses, prompts, clocks and what an engine counts.
"""
