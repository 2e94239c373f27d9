# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Logs into a store of responses: those of one distribution, checked against the target before any is written.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.text_reader import TextReader
from ..drafters.base import Drafter
from ..responses import Origin, ResponseAudit, ResponseStore, StoredResponse, check_responses
from ..responses.audit import score_responses
from ..responses.shards import why_impossible
from ..rollout.acceptance import SamplingSettings
from ..target.frozen import FrozenTarget
from .reading import ServedResponse, TrafficReader
from .records import Unusable, read_exchange, read_lines
from .sampling import read_defaults
from .served import ServedComparison, compare_served


# Responses that are checked against the target.
NUM_CHECKED = 32
# Nats per token. Precision and kernels cost hundredths; another model, whole nats.
_LOGPROB_WARN = 0.1
_PLAIN = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0)


@dataclass(frozen=True)
class TrafficReport:
    """
    What became of the lines of a log. Counts and measures only: nothing of their text.

    Attributes:
        num_lines (`int`), num_usable (`int`), num_written (`int`):
            Lines read, those that hold a response of the distribution, and responses that the store did not have.
        num_repeated (`int`):
            Usable ones whose prompt came before, in the log or in the store; the first response is kept.
        num_unfinished (`int`), num_shortened (`int`):
            Usable ones that a limit or a stop of the request ended, kept as far as they go; and those longer than
            `max_completion_length`, cut there.
        skipped (`dict[str, int]`):
            Lines left out, by reason.
        others (`dict[str, int]`):
            Usable lines of other distributions, by the flags that import them.
        check ([`ResponseAudit`] or `None`):
            How well the checked ones fit the target.
        logprob_gap (`float` or `None`):
            Mean distance, in nats, between the log-probabilities in the log and the target's own at temperature 1;
            `None` where the log has none.
        served ([`ServedComparison`] or `None`):
            The server's rounds beside the drafter's.
    """

    num_lines: int
    num_usable: int
    num_written: int
    num_repeated: int
    num_unfinished: int
    num_shortened: int
    skipped: dict[str, int]
    others: dict[str, int]
    check: ResponseAudit | None
    logprob_gap: float | None
    served: ServedComparison | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        served = None if self.served is None else asdict(self.served) | {"differs": self.served.differs}
        return asdict(self) | {"served": served}

    def lines(self) -> list[str]:
        """Return the lines to print."""
        lines = [
            f"{self.num_usable} of {self.num_lines} lines hold a response of this distribution; {self.num_written} "
            f"are new, {self.num_repeated} are to a prompt that has one ({self.num_unfinished} ended by a limit or a "
            f"stop, {self.num_shortened} cut at `max_completion_length`)."
        ]
        lines += _count_lines(self.others, self.skipped)
        if self.check is not None:
            lines.append(f"Checked {self.check.num_responses} with the target: {self.check.describe()}.")
        if self.logprob_gap is not None:
            lines.append(f"Their log-probabilities are {self.logprob_gap:.3f} nats from the target's, on average.")
        return lines + ([] if self.served is None else [self.served.describe()])


def import_traffic(
    target: FrozenTarget,
    logs: Sequence[str | Path],
    path: str | Path,
    *,
    sampling: SamplingSettings,
    max_completion_length: int,
    reader: TextReader | None = None,
    generation_config: str = "auto",
    served_model_name: str | None = None,
    drafter: Drafter | None = None,
    num_checked: int = NUM_CHECKED,
    shard_size: int = 512,
) -> TrafficReport:
    """
    Put the responses of one distribution from logs of a server into a store. What is there already is kept.

    Nothing of a log is printed, and nothing is written but token ids and log-probabilities into the store.

    Args:
        target ([`FrozenTarget`]):
            The target, with its tokenizer.
        logs (`Sequence[str | Path]`):
            Files of JSON lines, see `traffic/records.py`; `.gz` is unpacked. They are held in memory as token ids.
        path (`str` or `Path`):
            Folder of the store; made, or added to.
        sampling ([`SamplingSettings`]), max_completion_length (`int`):
            The distribution to take, and where longer responses are cut.
        reader ([`TextReader`], *optional*):
            How chats are rendered; `target.text_reader()` by default, which takes prompts of any length.
        generation_config (`str`, *optional*, defaults to `"auto"`):
            As vLLM's flag of that name: what filled in the sampling settings that requests leave open. `"auto"`: the
            target's own generation config; `"vllm"`: neutral values.
        served_model_name (`str`, *optional*):
            The server's name for the target; needed where the log has several.
        drafter ([`Drafter`], *optional*):
            The drafter that was served, to compare its rounds, see [`compare_served`].
        num_checked (`int`, *optional*, defaults to 32):
            Responses to check against the target, and to compare the drafter on; evenly spaced.
        shard_size (`int`, *optional*, defaults to 512):
            Responses per file.

    Returns:
        [`TrafficReport`]

    Raises:
        FileNotFoundError: If there is no such log.
        ValueError: If the log has several models, no line is usable, the target did not write the responses, or the
            folder is of another origin. Nothing is written then.
    """
    if generation_config not in ("auto", "vllm"):
        raise ValueError(f"`generation_config` must be 'auto' or 'vllm', got {generation_config!r}.")
    if num_checked < 0:
        raise ValueError(f"`num_checked` must be at least 0, got {num_checked}.")
    reader = reader or target.text_reader()
    origin = Origin.of(target, reader, sampling=sampling, max_completion_length=max_completion_length)
    defaults = read_defaults(getattr(target.causal_lm, "generation_config", None), generation_config)
    usable, skipped, others = _read(logs, TrafficReader(reader, defaults, served_model_name), origin)
    num_usable, num_lines = len(usable), len(usable) + skipped.total() + others.total()
    if not usable:
        raise ValueError(
            "\n".join(
                [
                    f"None of {num_lines} lines holds a response of this distribution. A line is a request and its "
                    "response as JSON, see docs/do/traffic.md.",
                    *_count_lines(others, skipped),
                ]
            )
        )
    sample = [usable[index * num_usable // num_checked] for index in range(num_checked)]
    sample = usable if num_usable <= num_checked else sample
    texts = [_text(each, origin) for each in sample]
    check = check_responses(target, texts, sampling) if texts else None
    gap = _logprob_gap(target, sample, origin) if texts else None
    served = None if drafter is None or not texts else compare_served(target, drafter, sample, sampling)
    store = ResponseStore.open(path, origin)
    num_written = store.add_in_shards(
        _rows(usable, origin), shard_size=shard_size, provenance={"engine": "traffic", "num_checked": len(sample)}
    )
    return TrafficReport(
        num_lines=num_lines,
        num_usable=num_usable,
        num_written=num_written,
        num_repeated=num_usable - num_written,
        num_unfinished=sum(each.completion_ids[-1] not in origin.eos_token_ids for each in usable),
        num_shortened=sum(len(each.completion_ids) > max_completion_length for each in usable),
        skipped=dict(skipped.most_common()),
        others=dict(others.most_common()),
        check=check,
        logprob_gap=gap,
        served=served,
    )


def _read(
    logs: Sequence[str | Path], reader: TrafficReader, origin: Origin
) -> tuple[list[ServedResponse], Counter[str], Counter[str]]:
    """Return the responses of a distribution, what is left out by reason, and those of other distributions."""
    usable: list[ServedResponse] = []
    skipped: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for line in (line for log in logs for line in read_lines(Path(log))):
        try:
            response = reader.read(read_exchange(line))
        except Unusable as reason:
            skipped[str(reason)] += 1
            continue
        if response.sampling != origin.sampling:
            others[_flags(response.sampling)] += 1
        elif why_impossible(next(_rows([response], origin)), origin) is not None:
            skipped["no response that this target could have written: too long, or not its ids"] += 1
        else:
            usable.append(response)
    if len(reader.models) > 1:
        raise ValueError(
            f"The logs hold replies of {len(reader.models)} models. Name the one that is the target with "
            "`--served-model-name` (`served_model_name`)."
        )
    return usable, skipped, others


def _rows(responses: Sequence[ServedResponse], origin: Origin) -> Iterator[StoredResponse]:
    """Return responses as they are stored; longer ones are cut, as the target would have been."""
    for each in responses:
        prompt, completion = _text(each, origin)
        logprobs = None if each.logprobs is None else each.logprobs[: len(completion)]
        yield StoredResponse(prompt, completion, logprobs, origin.finish_reason(completion))


def _text(response: ServedResponse, origin: Origin) -> tuple[list[int], list[int]]:
    return response.prompt_ids.tolist(), response.completion_ids[: origin.max_completion_length].tolist()


def _flags(sampling: SamplingSettings) -> str:
    return f"--temperature {sampling.temperature:g} --top-k {sampling.top_k} --top-p {sampling.top_p:g}"


def _count_lines(others: dict[str, int], skipped: dict[str, int]) -> list[str]:
    """Return a line for each other distribution and each reason."""
    lines = [
        f"  {count} of another distribution, which `{flags}` imports into another folder"
        for flags, count in others.items()
    ]
    return lines + [f"  {count} left out: {reason}" for reason, count in skipped.items()]


def _logprob_gap(target: FrozenTarget, sample: Sequence[ServedResponse], origin: Origin) -> float | None:
    """Return how far the log's log-probabilities are from the target's, and warn where that is far."""
    rows = [each for each in sample if each.logprobs is not None]
    if not rows:
        return None
    total, count = 0.0, 0
    for index, scores in score_responses(target, [_text(each, origin) for each in rows], _PLAIN):
        logged = scores.logprobs.new_tensor((rows[index].logprobs or [])[: len(scores.logprobs)])
        total, count = total + float((logged - scores.logprobs).abs().sum()), count + len(logged)
    if total > _LOGPROB_WARN * count:
        warnings.warn(
            f"The log-probabilities in the log are {total / count:.3f} nats from the target's own, on average (warned "
            f"above {_LOGPROB_WARN}). Expected under another `--logprobs-mode` of vLLM's own; otherwise other weights "
            "are served."
        )
    return total / count
