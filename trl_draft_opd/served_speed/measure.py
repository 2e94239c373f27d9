# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Measures servers level by level, two of them in turns, so that what a machine does meanwhile befalls both."""

from collections.abc import Callable, Sequence
from typing import Any

from ..responses.client import ServerClient, ServerError, ServerSettings
from ..responses.protocols import WrongReply
from .counters import read_counts
from .load import run_load
from .report import LoadSettings, SpeedReport
from .requests import build_body


def measure_servers(
    servers: Sequence[ServerSettings],
    prompts: Sequence[Any],
    settings: LoadSettings,
    *,
    prompts_sha256: str,
    eos_token_ids: Sequence[int],
    keep: Callable[[list[SpeedReport]], None],
) -> list[SpeedReport]:
    """
    Measure one server or several, each run of one beside the same run of the others.

    Args:
        servers (`Sequence[ServerSettings]`): Where they are.
        prompts (`Sequence`): Token ids, texts or chats, by `settings.form`; a run asks each once.
        settings ([`LoadSettings`]): What to ask.
        prompts_sha256 (`str`): See [`prompts_digest`].
        eos_token_ids (`Sequence[int]`): What ends a response.
        keep (`Callable`): Called with the reports after each run, so that nothing measured is lost.

    Returns:
        `list[SpeedReport]`: one per server.

    Raises:
        ServerError: If a server could not be reached, fell silent or failed.
        ValueError: If a server refused a request or did not answer as it should, or there are fewer prompts than
            requests at a time.
    """
    if len(prompts) < settings.concurrency[-1]:
        raise ValueError(
            f"{settings.concurrency[-1]} requests at a time need at least as many prompts, and there are "
            f"{len(prompts)}. Raise `--num-prompts`, give more rows, or lower `--concurrency`."
        )
    clients = [ServerClient(server) for server in servers]
    reports, bodies = [], []
    for client in clients:
        model, version = client.describe()
        counts = read_counts(client.read_page("/metrics"))
        engine = None if counts is None else counts.engine
        reports.append(SpeedReport(settings, prompts_sha256, len(prompts), engine, version))
        bodies.append(
            [
                build_body(
                    prompt,
                    settings.form,
                    model=model,
                    max_completion_length=settings.max_completion_length,
                    temperature=settings.temperature,
                    ignore_eos=settings.ignore_eos,
                    eos_token_ids=eos_token_ids,
                )
                for prompt in prompts
            ]
        )
    for concurrency in settings.concurrency:
        for repeat in range(-1, settings.repeats):
            places = list(range(len(clients)))
            # In turns, the other one first each time.
            for place in places[:: 1 if repeat % 2 else -1]:
                asked = bodies[place]
                if repeat < 0:
                    asked = (asked * settings.warmup)[: concurrency * settings.warmup]
                if not asked:
                    continue
                try:
                    run = run_load(clients[place], asked, concurrency=concurrency, max_seconds=settings.max_seconds)
                except (ServerError, WrongReply) as error:
                    what = f"repeat {repeat + 1}" if repeat >= 0 else "the warm-up"
                    failure = type(error)(f"{servers[place].root}, {concurrency} at a time, {what}, {error}")
                else:
                    if repeat >= 0:
                        reports[place].runs.append(run)
                        keep(reports)
                    continue
                # Out of the handler, so that no traceback shows more than the message.
                raise failure
    return reports
