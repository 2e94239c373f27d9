# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What the target writes and what it makes of it, once for all runs of the laboratory: its responses to every prompt of a
pair, by a server or in this process, and its readings of them.
"""

from pathlib import Path

from datasets import Dataset

from benchmarks.lab.workbench import Workbench
from trl_draft_opd import ReadingStore, ResponseStore, ServerSettings, write_readings, write_responses
from trl_draft_opd.responses.write import CHECKED_ROWS, summarize_store


READ_TOGETHER = 16


def write_all_responses(bench: Workbench, temperature: float, server: ServerSettings | None) -> ResponseStore:
    """
    Write the target's responses to every prompt of the pair, trained and measured on, to where the laboratory looks
    for them. What is there stays; a killed call resumes.

    Args:
        bench ([`Workbench`]): The pair.
        temperature (`float`): Of the responses.
        server ([`ServerSettings`], *optional*): A server of this target; this process if there is none.
    """
    store, size = bench.store(temperature), bench.machine.generation_batch_size
    store = write_responses(
        bench.target,
        Dataset.from_dict({"prompt_ids": bench.every_prompt()}),
        store.path,
        sampling=store.origin.sampling,
        max_completion_length=store.origin.max_completion_length,
        engine="transformers" if server is None else server.engine,
        server=server,
        batch_size=size,
        # The laboratory's own; a server draws in its own way.
        seed=0,
    )
    # A server of another model answers too.
    for line in summarize_store(store, bench.target, CHECKED_ROWS)["lines"]:
        print(line)
    return store


def read_all_responses(bench: Workbench, temperature: float, path: Path) -> ReadingStore:
    """
    Write what the target reads in every prompt with its response, at the pair's layers, in bfloat16. What is there
    stays; a killed call resumes.

    Raises:
        SystemExit: If the pair names no layers, or responses are missing.
    """
    layer_ids = bench.pair.drafter.get("target_layer_ids")
    if layer_ids is None:
        raise SystemExit(
            f"Pair {bench.pair.name!r} must name the layers to read, `target_layer_ids` of its `drafter`."
        )
    store, prompts = bench.store(temperature), bench.every_prompt()
    if missing := store.missing(prompts):
        raise SystemExit(
            f"{len(missing)} of {len(prompts)} prompts have no response in {str(store.path)!r}. Run the stage "
            "`responses` first."
        )
    # Texts of similar length together: less padding.
    texts = sorted(([*prompt, *store.find(prompt)] for prompt in prompts), key=len)
    return write_readings(bench.target, texts, path, layer_ids=layer_ids, dtype="bfloat16", batch_size=READ_TOGETHER)
