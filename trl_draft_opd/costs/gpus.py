# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Cards, as their makers publish them, and what of that is reached in practice.
"""

from dataclasses import dataclass


# What large products and copies reach of the published figures: an H100's 700 of 989.4 TFLOP/s and 3.0 of 3.35 TB/s.
REACHED_FLOPS = 700 / 989.4
REACHED_BANDWIDTH = 3.0 / 3.35
# Of the reached peak: flash kernels make about 400 TFLOP/s on an H100, forward and backward together.
ATTENTION_SHARE = 0.57
LAUNCH_SECONDS = 5.5e-6  # of an eager kernel
# A wait of the host: until what runs has ended, and for the next kernels to be under way.
SYNC_SECONDS = 40e-6


@dataclass(frozen=True)
class Gpu:
    """
    A card.

    Attributes:
        name (`str`): How it is called.
        peak (`float`): Dense bf16 FLOP/s with float32 sums, as published.
        bandwidth (`float`): Bytes per second of its memory, as published.
        memory (`int`): Bytes of its memory that torch reports, somewhat less than is sold.
        source (`str`): Where the figures are from.
    """

    name: str
    peak: float
    bandwidth: float
    memory: int
    source: str

    @property
    def flops(self) -> float:
        """FLOP/s that large products reach."""
        return self.peak * REACHED_FLOPS

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second that copies reach."""
        return self.bandwidth * REACHED_BANDWIDTH


GIB = 2**30
GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 312e12, 2.039e12, int(79.2 * GIB), "NVIDIA A100 datasheet, June 2021"),
    "h100": Gpu("H100 SXM 80 GB", 989.4e12, 3.35e12, int(79.1 * GIB), "NVIDIA H100 datasheet: 1,979 TFLOPS if sparse"),
    "h200": Gpu("H200 SXM", 989.4e12, 4.8e12, int(139.8 * GIB), "NVIDIA H200 datasheet: 1,979 TFLOPS if sparse"),
    "l40s": Gpu("L40S", 362.05e12, 864e9, int(44.4 * GIB), "NVIDIA L40S datasheet: 362.05 TFLOPS dense"),
    "4090": Gpu("RTX 4090", 165.2e12, 1.008e12, int(23.6 * GIB), "NVIDIA Ada architecture whitepaper, appendix A"),
    "b200": Gpu("B200 SXM", 2.25e15, 8e12, int(178 * GIB), "NVIDIA HGX B200: 4.5 PFLOPS if sparse, at 1,000 W"),
}
