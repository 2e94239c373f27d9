# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What is counted of verified blocks: accepted length (tau), its interval, and acceptance per slot. Numbers of each
prompt, which add up over batches, steps and ranks and are divided once. Knows no model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .types import Rollout


@dataclass(frozen=True)
class Counts:
    """
    Counted blocks of some prompts; `+` puts the prompts of two behind each other.

    Attributes:
        blocks (`tuple[int, ...]`): Per prompt, its counted blocks.
        kept (`tuple[tuple[int, ...], ...]`):
            Per prompt, its counted blocks that keep at least `k` drafts, for `k = 1..K`.
        verified (`tuple[int, ...]` or `None`): Per prompt, drafts of its counted blocks that the target verified;
            `None` where it verified all.
    """

    blocks: tuple[int, ...] = ()
    kept: tuple[tuple[int, ...], ...] = ()
    verified: tuple[int, ...] | None = None

    @classmethod
    def of_rollout(cls, rollout: Rollout) -> "Counts":
        """Count the blocks that lie inside the text by geometry, one prompt per row."""
        counted = rollout.is_counted
        slots = torch.arange(1, rollout.drafts.shape[-1] + 1, device=counted.device)
        kept = ((rollout.accepted[..., None] >= slots) & counted[..., None]).sum(dim=1)
        verified = None if rollout.verified is None else tuple((rollout.verified * counted).sum(dim=1).tolist())
        return cls(tuple(counted.sum(dim=1).tolist()), tuple(map(tuple, kept.tolist())), verified)

    @classmethod
    def of_chains(cls, chains: Iterable[Sequence[int]], num_drafts: int) -> "Counts":
        """Count all blocks of chains, the accepted drafts of each block of one prompt's response."""
        chains = list(chains)
        kept = [tuple(sum(r >= slot for r in chain) for slot in range(1, num_drafts + 1)) for chain in chains]
        return cls(tuple(len(chain) for chain in chains), tuple(kept))

    def __add__(self, other: "Counts") -> "Counts":
        is_whole = self.verified is None and other.verified is None
        verified = None if is_whole else self.verified_drafts + other.verified_drafts
        return Counts(self.blocks + other.blocks, self.kept + other.kept, verified)

    def row(self, index: int) -> "Counts":
        """Return the counts of one prompt."""
        verified = None if self.verified is None else (self.verified[index],)
        return Counts((self.blocks[index],), (self.kept[index],), verified)

    def pooled(self) -> "Counts":
        """Return the sums as those of a single prompt, as engines count."""
        verified = None if self.verified is None else (sum(self.verified),)
        return Counts((self.num_blocks,), (self.kept_at_slot,), verified)

    @property
    def num_blocks(self) -> int:
        """Counted blocks."""
        return sum(self.blocks)

    @property
    def kept_at_slot(self) -> tuple[int, ...]:
        """Blocks that keep at least `k` drafts, for `k = 1..K`; empty without prompts."""
        return tuple(map(sum, zip(*self.kept, strict=True)))

    @property
    def verified_drafts(self) -> tuple[int, ...]:
        """Per prompt, drafts of its counted blocks that the target verified."""
        if self.verified is not None:
            return self.verified
        return tuple(blocks * len(kept) for blocks, kept in zip(self.blocks, self.kept, strict=True))

    @property
    def drafts_per_block(self) -> float:
        """Drafts that the target verified per block, K where it verifies all; NaN without blocks."""
        return sum(self.verified_drafts) / self.num_blocks if self.num_blocks else float("nan")

    @property
    def kept_share(self) -> float:
        """Share of the verified drafts that were kept; NaN without blocks."""
        return sum(self.kept_at_slot) / sum(self.verified_drafts) if self.num_blocks else float("nan")

    @property
    def accepted_sums(self) -> list[int]:
        """Per prompt, `sum (r + 1)`: tokens of its counted blocks, the bonus included."""
        return [blocks + sum(kept) for blocks, kept in zip(self.blocks, self.kept, strict=True)]

    @property
    def tau(self) -> float:
        """Accepted length, the bonus counted: `sum (r + 1) / blocks`; NaN without blocks."""
        return sum(self.accepted_sums) / self.num_blocks if self.num_blocks else float("nan")

    @property
    def acceptance_per_slot(self) -> list[float]:
        """Share of blocks that keep at least `k` drafts, for `k = 1..K`; empty without blocks."""
        return [kept / self.num_blocks for kept in self.kept_at_slot] if self.num_blocks else []

    def interval(self, *, num_resamples: int, seed: int) -> tuple[float, float]:
        """Return the 95 % interval of tau, resampling prompts."""
        taus = resampled_taus(self.accepted_sums, self.blocks, num_resamples, seed)
        # A resample may miss every prompt that has a block: it says nothing about tau.
        return interval(taus[taus.isfinite()])


def resampled_taus(accepted_sums: Sequence[int], blocks: Sequence[int], num_resamples: int, seed: int) -> torch.Tensor:
    """Return tau of each resample of prompts, NaN where it holds no block. Equal seeds pick equal prompts."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(blocks), (num_resamples, len(blocks)), generator=generator)
    sums, counts = (torch.tensor(values, dtype=torch.float64)[picks].sum(dim=1) for values in (accepted_sums, blocks))
    return sums / counts


def describe_tau(tau: float, low: float | None, high: float | None) -> str:
    """Return tau with its interval for print; without one where there is none, as of a single prompt."""
    has_interval = low is not None and high is not None and low < high
    return f"{tau:.3f} [{low:.3f}, {high:.3f}]" if has_interval else f"{tau:.3f}"


def interval(values: torch.Tensor) -> tuple[float, float]:
    """Return the central 95 % of resampled values."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
