# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Print what a rollout drafted: text, accepted and rejected drafts by colour. Display only.
"""

from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..rollout.types import Rollout


ACCEPTED, REJECTED, COMMITTED = "green", "red strike", "bold"
# What stands around a part where there are no colours, in a file for example.
MARKS = {ACCEPTED: "", REJECTED: "~", COMMITTED: "*"}
_LEGEND = (("accepted", ACCEPTED), ("rejected", REJECTED), ("target's own", COMMITTED))


def render_row(rollout: Rollout, row: int, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return one response with its blocks: accepted drafts green, the target's tokens bold, rejected drafts red."""
    start, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
    ids = rollout.input_ids[row].tolist()
    # Appended: a style of the whole text would apply to every part.
    styled = Text().append(_decode(tokenizer, ids[start : start + 1]), style=COMMITTED)
    for block in range(int(rollout.num_rounds[row])):
        anchor, accepted = int(rollout.anchors[row, block]), int(rollout.accepted[row, block])
        kept_end = anchor + accepted + 1
        styled.append(_decode(tokenizer, ids[anchor + 1 : kept_end]), style=ACCEPTED)
        if not bool(rollout.is_censored[row, block]):
            drafted_end = rollout.drafts.shape[-1] if rollout.has_suffix else accepted + 1
            refused = rollout.drafts[row, block, accepted:drafted_end].tolist()
            styled.append(_decode(tokenizer, refused), style=REJECTED)
        if kept_end < end:
            styled.append(_decode(tokenizer, ids[kept_end : kept_end + 1]), style=COMMITTED)
    return styled


def _marked(styled: Text) -> Text:
    """Return a text with marks in place of its styles."""
    parts = [(styled.plain[span.start : span.end], MARKS[str(span.style)]) for span in styled.spans]
    return Text("".join(f"{mark}{part}{mark}" for part, mark in parts if part))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str), "ids of one row are one text"
    return text


def print_rollout(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, *, num_rows: int, step: int, console: Console
) -> None:
    """Print the first rows of a rollout, prompt above and response below."""
    has_styles = (console.is_terminal or console.is_jupyter) and console.color_system is not None
    for row in range(min(num_rows, len(rollout.lengths))):
        prompt = _decode(tokenizer, rollout.input_ids[row, : int(rollout.prompt_lengths[row])].tolist())
        response = render_row(rollout, row, tokenizer)
        body = Text.assemble(Text(prompt, style="dim"), "\n", response if has_styles else _marked(response))
        legend = Text(" ").join(
            Text(name, style) if has_styles else Text(MARKS[style] + name + MARKS[style]) for name, style in _LEGEND
        )
        # Not behind a progress bar, on its line.
        with tqdm.external_write_mode(console.file):
            console.print(Panel(body, title=f"step {step}, row {row}", subtitle=legend))
