# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What the code does beside what it must, counted: `python -m benchmarks.roofline --count` writes the figures of layers,
kernels and waits anew, `tests/lab/test_roofline.py` counts some of them again.
"""

from .roofline import Counts, FamilyCounts


NOW = Counts(
    # The target's own code: norms in float32, rotation, residuals.
    read_bytes=199.5,
    read_launches=57,
    mask_share=0.0,
    # The fused kernels; with a reduced vocabulary, one pass over the target's logits and a copy of those picked.
    logit_bytes=None,
    reduced_bytes=3.0,
    # A float32 sum, read and written by the product that adds to it.
    head_gradient_bytes=8.0,
    # Written in bf16 and read once by the argmax.
    judged_bytes=4.0,
    # Attention in one kernel, no score leaves the chip.
    score_bytes=(0.0, 0.0),
    chunk_launches=25,
    block_launches=4,
    update_launches=100,
    # As in `rollout/replay.py`.
    blocks_at_once=32,
    rows_at_once=640,
    families={
        "eagle3": FamilyCounts(
            context_bytes=(31.9, 62.1),
            slot_bytes=(105.6, 272.4),
            weight_bytes=(6.0, 56.6),
            launches=(385, 492),
            syncs=6,
            walk_launches=(63, 370, 11),
            walk_syncs=(1, 1, 1),
        ),
        "dflash": FamilyCounts(
            context_bytes=(36.2, 108.1),
            slot_bytes=(416.5, 1181.4),
            weight_bytes=(6.0, 7.7),
            launches=(308, 381),
            syncs=6,
            walk_launches=(100, 236, 12),
            walk_syncs=(1, 1, 1),
        ),
        "dspark": FamilyCounts(
            context_bytes=(36.2, 108.1),
            slot_bytes=(426.9, 1201.8),
            weight_bytes=(6.0, 8.3),
            launches=(332, 399),
            syncs=7,
            walk_launches=(100, 247, 13),
            walk_syncs=(1, 1, 1),
        ),
        "dflash2": FamilyCounts(
            context_bytes=(36.2, 108.1),
            slot_bytes=(1386.2, 2783.2),
            weight_bytes=(6.0, 8.4),
            launches=(564, 921),
            syncs=6,
            walk_launches=(100, 485, 21),
            walk_syncs=(1, 1, 1),
        ),
    },
)
