# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What an engine has counted since it started, read from its `/metrics` page: written tokens, verification rounds and
accepted drafts. Two readings around a load tell what the load made of them.

vLLM counts rounds and accepted drafts (`vllm/v1/spec_decode/metrics.py`, 0.32). SGLang, with `--enable-metrics`,
counts verification rounds, written tokens and requests when a request ends (`srt/observability/metrics_collector.py`);
the first token of each comes from the prompt's pass, and every round writes its accepted drafts and one more.
"""

import re
from dataclasses import dataclass


_LINE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>[-+.\deE]+)(?:\s+\d+)?")
_SLOT = re.compile(r'(?:^|,)position="(\d+)"')


@dataclass(frozen=True)
class DraftCounts:
    """
    Verified blocks.

    Attributes:
        rounds (`int`): Blocks that were drafted and verified.
        accepted (`int`): Drafts of them that were kept.
        kept_at_slot (`tuple[int, ...]`): Rounds that kept at least `k` drafts, for `k = 1..K`; empty where the engine
            does not count them.
    """

    rounds: int
    accepted: int
    kept_at_slot: tuple[int, ...] = ()

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        slots = max(len(self.kept_at_slot), len(other.kept_at_slot))
        kept = zip(_padded(self.kept_at_slot, slots), _padded(other.kept_at_slot, slots), strict=True)
        return DraftCounts(
            self.rounds + other.rounds, self.accepted + other.accepted, tuple(own + more for own, more in kept)
        )

    @property
    def tau(self) -> float | None:
        """Accepted length, the bonus counted; `None` without rounds."""
        return 1 + self.accepted / self.rounds if self.rounds > 0 else None


def _padded(counts: tuple[int, ...], length: int) -> tuple[int, ...]:
    return counts + (0,) * (length - len(counts))


@dataclass(frozen=True)
class EngineCounts:
    """
    What an engine has counted.

    Attributes:
        engine (`str`): `"vllm"` or `"sglang"`.
        written (`int`): Tokens of responses.
        drafts ([`DraftCounts`] or `None`): `None` where nothing drafts.
    """

    engine: str
    written: int
    drafts: DraftCounts | None

    def since(self, before: "EngineCounts") -> "EngineCounts":
        """Return what was counted after an earlier reading."""
        drafts = self.drafts
        if drafts is not None and before.drafts is not None:
            earlier = before.drafts
            drafts += DraftCounts(-earlier.rounds, -earlier.accepted, tuple(-kept for kept in earlier.kept_at_slot))
        return EngineCounts(self.engine, self.written - before.written, drafts)


def read_counts(page: str | None) -> EngineCounts | None:
    """Return what a `/metrics` page says, summed over a server's engines; `None` if it is no page of a known one."""
    totals: dict[str, float] = {}
    slots: dict[int, float] = {}
    for line in (page or "").splitlines():
        found = _LINE.fullmatch(line.strip())
        if found is None:
            continue
        name, value = found["name"], float(found["value"])
        totals[name] = totals.get(name, 0.0) + value
        slot = _SLOT.search(found["labels"] or "")
        if name == "vllm:spec_decode_num_accepted_tokens_per_pos_total" and slot is not None:
            slots[int(slot[1])] = slots.get(int(slot[1]), 0.0) + value
    count = {name: int(value) for name, value in totals.items() if name.endswith("_total")}
    if "vllm:generation_tokens_total" in count:
        drafts = None
        if "vllm:spec_decode_num_drafts_total" in count:
            kept = tuple(int(slots.get(slot, 0)) for slot in range(max(slots, default=-1) + 1))
            accepted = count.get("vllm:spec_decode_num_accepted_tokens_total", 0)
            drafts = DraftCounts(count["vllm:spec_decode_num_drafts_total"], accepted, kept)
        return EngineCounts("vllm", count["vllm:generation_tokens_total"], drafts)
    if "sglang:generation_tokens_total" in count:
        written, drafts = count["sglang:generation_tokens_total"], None
        if "sglang:spec_verify_calls_total" in count and "sglang:num_requests_total" in count:
            rounds = count["sglang:spec_verify_calls_total"]
            drafts = DraftCounts(rounds, written - count["sglang:num_requests_total"] - rounds)
        return EngineCounts("sglang", written, drafts)
    return None
