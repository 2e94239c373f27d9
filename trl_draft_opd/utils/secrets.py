# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Takes keys, tokens and passwords out of text that is printed or stored."""

import html
import json
import re
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote


def read_key(path: str | Path) -> str:
    """Return the key in a file, without the white space around it; raises `OSError` if there is none."""
    return Path(path).read_text("utf-8").strip()


def without_secret(text: str, secret: str | None) -> str:
    """Return a text without a secret as a server may echo it: as it is, in JSON, HTML, an address, or base64."""
    if not secret:
        return text
    escaped = json.dumps(secret)[1:-1]
    forms = {secret, escaped, escaped.replace("/", "\\/"), repr(secret)[1:-1], html.escape(secret)}
    forms |= {quote(secret), quote(secret, safe=""), b64encode(secret.encode()).decode()}
    # The longest first: one form may begin another.
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def without_users(text: str) -> str:
    """Return a text without the `user:password@` of the addresses in it."""
    return re.sub(r"(?<=://)[^\s/?#]*@", "***@", text)
