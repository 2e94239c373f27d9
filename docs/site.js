// Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
// The theme wraps wide tables and code in elements of its own: what scrolls is reached by keyboard, and
// each copy button has a landmark of its own name.
document$.subscribe(() => setTimeout(() => {
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((each) => { each.tabIndex = 0; });
  document.querySelectorAll(".md-code__nav").forEach((each, index) => { each.ariaLabel = `Code ${index + 1}`; });
}));
