# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Count what a step does beside its products: bytes, kernels and waits of the host, on a pair of tiny width.

Kernels depend on no width. Bytes beside products and attention are linear in text tokens, in slots and in the head
size, so two sizes of each give the numbers of a large pair. Runs on the accelerator that the tests pretend to have.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.scaling import FAMILIES, Scene, make_target_of
from trl_draft_opd import FrozenTarget, SamplingSettings
from trl_draft_opd.costs.memory import Workload
from trl_draft_opd.costs.roofline import FamilyCounts
from trl_draft_opd.costs.shapes import DrafterShape, TargetShape
from trl_draft_opd.drafters import precision
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.replay import ReplayWalk, TargetText


ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
NO_KERNELS = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten._unsafe_view, aten.detach}
PICKING = {aten.index_select, aten.embedding, aten.index, aten.gather, aten._unsafe_index}
HEADS, KV_HEADS = 32, 8


def size(tensor: torch.Tensor) -> int:
    """Return the bytes of what a tensor shows of its memory: an expanded dimension costs nothing."""
    numel = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= length if stride else 1
    return numel * tensor.element_size()


class Traffic(TorchDispatchMode):
    """
    Counts bytes beside products, and kernels, by the part of the package that asks for them.

    Attributes:
        bytes (`Counter`), launches (`Counter`): By part: `"attention"`, `"losses"` or `"layers"` for all else.
    """

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if func.is_view or packet in NO_KERNELS:
            return out
        part = _part()
        self.launches[part] += 1
        if packet not in PRODUCTS:
            written = {id(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
            read = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            moved = sum(map(size, written.values()))
            # Of a table, only the rows that are picked are read.
            self.bytes[part] += 2 * moved if packet in PICKING else moved + sum(map(size, read.values()))
        return out


class _Norm(torch.autograd.Function):
    """Moves the bytes of a card's one kernel for an RMSNorm: reads one and writes one, backward reads two."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *options: Any) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad + ctx.saved_tensors[0], None, None, None


def _part() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/trl_draft_opd/drafters/attention" in name:
            return "attention"
        if "/trl_draft_opd/losses/" in name:
            return "losses"
        frame = frame.f_back
    return "layers"


@dataclass(frozen=True)
class Size:
    """A pair and a micro-batch to count: head size, text tokens and blocks of each of two rows."""

    head_dim: int = 4
    length: int = 64
    blocks: int = 16
    layers: int = 8


def make_scene(family: str, device: str, at: Size) -> Scene:
    """Return a pair whose widths have the proportions of Qwen3-8B's, with random text."""
    torch.manual_seed(0)
    width = HEADS * at.head_dim
    shape = TargetShape(width, 3 * width, at.layers, HEADS, KV_HEADS, at.head_dim, 512, False, True)
    target = FrozenTarget(make_target_of(shape, "cpu", torch.bfloat16).to(device))
    scene = Scene.make(target, family, Workload(2, at.length, at.blocks, 1, False))
    scene.drafter.to(device)
    return scene


def count_read(device: str) -> tuple[float, int]:
    """Return bytes beside products, per token and unit of H, and kernels of one layer of the target."""
    found = []
    for layers in (8, 9):
        scene = make_scene("eagle3", device, Size(layers=layers, head_dim=16))
        with Traffic() as traffic:
            scene.read()
        found.append((traffic.bytes.total() / (2 * 64 * HEADS * 16), traffic.launches.total()))
    return found[1][0] - found[0][0], found[1][1] - found[0][1]


@dataclass(frozen=True)
class StepCount:
    """
    A micro-batch of a tiny pair.

    Attributes:
        bytes (`list[int]`), launches (`list[int]`): Of forward and backward, beside losses and attention.
        weights (`int`): Of the drafter's matrices, its head left out.
        width (`int`): Positions of a block that go through the layers.
        syncs (`int`): Waits of the host, the target's read included.
    """

    bytes: list[int]
    launches: list[int]
    weights: int
    width: int
    syncs: int


def count_step(family: str, device: str, at: Size, counts: Any) -> StepCount:
    """Count a micro-batch of a tiny pair, forward and backward."""
    scene = make_scene(family, device, at)
    counts.clear()
    scene.read()
    with Traffic() as forward:
        scene.forward()
    with Traffic() as backward:
        scene.backward()
    shape, parts = DrafterShape.of(scene.drafter.config), (forward, backward)
    moved, launched = [p.bytes["layers"] for p in parts], [p.launches["layers"] for p in parts]
    return StepCount(moved, launched, shape.body, shape.width, counts.totals()["syncs"])


def count_layers(family: str, device: str, counts: Any) -> dict[str, Any]:
    """Return `context_bytes`, `slot_bytes`, `weight_bytes`, `launches` and `syncs` of [`FamilyCounts`]."""
    base, rates = Size(), {"context_bytes": [], "slot_bytes": [], "weight_bytes": []}
    found = {}
    for head_dim in (4, 8):
        for at in (replace(base, head_dim=head_dim), replace(base, head_dim=head_dim, length=128)):
            found[at] = count_step(family, device, at, counts)
        more = replace(base, head_dim=head_dim, blocks=32)
        found[more] = count_step(family, device, more, counts)
    for i in (0, 1):
        text, slot, weight = [], [], []
        for head_dim in (4, 8):
            at = replace(base, head_dim=head_dim)
            here, slots = found[at].bytes[i], found[at].width
            per_text = (found[replace(at, length=128)].bytes[i] - here) / 128
            per_slot = (found[replace(at, blocks=32)].bytes[i] - here) / (32 * slots)
            text.append(per_text)
            slot.append(per_slot)
            weight.append((here - 128 * per_text - 32 * slots * per_slot) / found[at].weights)
        # What does not grow with the head size is left out: at 128 it is below 1 %.
        rates["context_bytes"].append((text[1] - text[0]) / (HEADS * 4))
        rates["slot_bytes"].append((slot[1] - slot[0]) / (HEADS * 4))
        rates["weight_bytes"].append(weight[1])
    rounded = {name: (round(a, 1), round(b, 1)) for name, (a, b) in rates.items()}
    return rounded | {"launches": tuple(found[base].launches), "syncs": found[base].syncs}


def count_walk(family: str, device: str, counts: Any) -> dict[str, tuple[int, int, int]]:
    """
    Return `walk_launches` and `walk_syncs` of [`FamilyCounts`].

    A random drafter is right next to never: every round has one read, so a read is watched for itself.
    """
    found, reads = [], []
    for segment in (4, 12):
        scene = make_scene(family, device, Size())
        scene.read()
        mask = torch.ones_like(scene.input_ids)
        text = TargetText(scene.input_ids, mask, mask.bool() & (mask.cumsum(1) > 16), range(2))
        greedy = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
        settings = DraftingSettings(scene.drafter.default_num_drafts, greedy, "greedy", keep_branch_hidden=False)
        with Traffic() as traffic, scene.autocast():
            walk = ReplayWalk(
                scene.target, scene.drafter, text, settings, DrawKeys(0, 0, range(2)), 2**30, scene.reading
            )
            judge, rounds = walk._judge, []

            def watched(*args: Any, judge: Any = judge, traffic: Traffic = traffic, rounds: list = rounds) -> Any:
                before = traffic.launches.total()
                result = judge(*args)
                rounds.append(traffic.launches.total() - before)
                return result

            walk._judge = watched
            counts.clear()
            begun = traffic.launches["layers"]
            with scene.drafter.evaluating(), torch.no_grad():
                walk.run(segment)
        found.append((begun, traffic.launches["layers"] - begun, counts.totals()["syncs"], len(rounds)))
        reads += rounds
    (begun, launches, syncs, rounds), _ = found
    read = round(sum(reads) / len(reads))
    return {
        "walk_launches": (begun, round(launches / rounds) - read, read),
        "walk_syncs": (1, round(syncs / rounds) - 1, 1),
    }


def count_family(family: str, device: str, counts: Any) -> FamilyCounts:
    """Count a family's drafter."""
    return FamilyCounts(**count_layers(family, device, counts), **count_walk(family, device, counts))


def on_pretended(run: Callable[[str, Any], Any]) -> Any:
    """Run `run(device, counts)` on the accelerator of the tests, which stays registered in this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.pretend_accelerator import DEVICE, pretend_accelerator

    with pretend_accelerator() as counts, whole_norms():
        return run(DEVICE, counts)


@contextmanager
def whole_norms() -> Iterator[None]:
    """Have norms that a card runs as one kernel count as one: elsewhere torch runs their parts. Values are wrong."""
    in_parts = precision.rms_norm
    precision.rms_norm = _Norm.apply
    try:
        yield
    finally:
        precision.rms_norm = in_parts


def counted(device: str, counts: Any) -> str:
    """Return the lines of trl_draft_opd/costs/counted.py that can be counted."""
    read_bytes, read_launches = count_read(device)
    lines = [f"read_bytes={read_bytes:.1f},", f"read_launches={read_launches},", "families={"]
    for family in FAMILIES:
        found = vars(count_family(family, device, counts))
        inner = "".join(f"        {name}={value},\n" for name, value in found.items())
        lines.append(f'    "{family}": FamilyCounts(\n{inner}    ),')
    return "\n".join([*lines, "},"])
