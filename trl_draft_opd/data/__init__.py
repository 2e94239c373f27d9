# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""From dataset rows to token ids, marks and padded batches. Knows tokenizers and templates, no model or trainer."""
