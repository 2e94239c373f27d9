# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The target's responses to prompts: written once by any engine, stored with who wrote them, and checked before use.

Refuses to know drafters and training: only the target, its distribution and files.
"""

from .audit import ResponseAudit, audit_responses, check_responses
from .client import ServerError, ServerSettings
from .generate import generate_missing, generate_responses
from .origin import Origin
from .server import ask_server
from .shards import StoredResponse
from .store import ResponseStore
from .write import CHECKED_ROWS, import_responses, summarize_store, write_responses


__all__ = [
    "CHECKED_ROWS",
    "Origin",
    "ResponseAudit",
    "ServerError",
    "ServerSettings",
    "StoredResponse",
    "ResponseStore",
    "ask_server",
    "audit_responses",
    "check_responses",
    "generate_missing",
    "generate_responses",
    "import_responses",
    "summarize_store",
    "write_responses",
]
