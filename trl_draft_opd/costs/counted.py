# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What the code does beside what it must, counted: `python -m benchmarks.roofline --count` writes the figures of layers,
kernels and waits anew, `tests/test_roofline.py` counts some of them again.
"""

from .roofline import Counts, FamilyCounts


NOW = Counts(
    # The target's own code: norms in float32, rotation, residuals.
    read_bytes=191.5,
    read_launches=54,
    mask_share=0.0,
    # The fused divergence: both rows twice, the gradient once, in bf16.
    logit_bytes=10.0,
    reduced_bytes=8.0,
    # A float32 sum, read and written by the product that adds to it.
    head_gradient_bytes=8.0,
    # Written in bf16 and read once by the argmax.
    judged_bytes=4.0,
    # Attention in one kernel, no score leaves the chip.
    score_bytes=(0.0, 0.0),
    chunk_launches=25,
    block_launches=4,
    update_launches=100,
    families={
        "eagle3": FamilyCounts(
            context_bytes=(170.3, 208.6),
            slot_bytes=(313.9, 699.0),
            weight_bytes=(6.7, 58.2),
            launches=(637, 930),
            walk_launches=(48, 198.75),
            syncs=54,
            walk_syncs=(4, 8.875),
        ),
        "dflash": FamilyCounts(
            context_bytes=(264.0, 496.8),
            slot_bytes=(1224.8, 3312.2),
            weight_bytes=(6.0, 7.7),
            launches=(508, 847),
            walk_launches=(229, 601.0),
            syncs=50,
            walk_syncs=(8, 12.0),
        ),
    },
)
