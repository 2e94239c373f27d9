# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""One self-contained HTML file about a drafter: what was measured, and how its training went."""
