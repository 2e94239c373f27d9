# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What `benchmarks/gpu.py` finds out before it measures jobs: what the card reaches, what its torch can do, and whether a
small pair computes there what it computes on a CPU.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_jobs import GREEDY, Training, make_drafter, make_target, make_text
from benchmarks.gpu_rows import Clock, time_runs
from trl_draft_opd import FrozenTarget
from trl_draft_opd.costs.jobs import Job
from trl_draft_opd.losses import fused
from trl_draft_opd.losses.divergences import differentiate
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.live import rollout_live
from trl_draft_opd.rollout.replay import TargetText, rollout_replay
from trl_draft_opd.rollout.types import Rollout


# Rounding to nearest with eight binary digits.
BF16_ROUNDING = 2.0**-9
# Of float32 sums in another order: what a CPU's own backends differ by on this pair, tenfold.
FLOAT32_TOLERANCE = 1e-3


# -- what the card reaches, and what torch can do ---------------------------------------------------------------------


def card(bench: Any) -> None:
    """Measure a large bf16 product and a large copy."""
    device, size = bench.device, bench.sizes.product
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def products(_clock: Clock) -> None:
        for _ in range(10):
            torch.mm(left, right, out=out)

    spent = time_runs(products, device, repeats=5)["step"] / 10
    bench.rows.add("card", "product", size=size, seconds=spent, flops_per_s=2 * size**3 / spent)
    source = torch.randn(bench.sizes.copy_bytes // 4, device=device)
    place = torch.empty_like(source)
    spent = time_runs(lambda _clock: place.copy_(source), device, repeats=10)["step"]
    moved = 2 * source.numel() * 4
    bench.rows.add("card", "copy", bytes=moved, seconds=spent, bytes_per_s=moved / spent)


def probes(bench: Any) -> None:
    """Find out which newer parts of torch are there and right, each in a row of its own."""
    device = bench.device
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda}
    bench.rows.add("probe", "versions", **versions, has_muon=hasattr(torch.optim, "Muon"))
    for name, probe in {
        "addmm out_dtype": _addmm_probe,
        "flex attention": _flex_probe,
        "triton": _triton_probe,
    }.items():
        try:
            bench.rows.add("probe", name, **probe(device))
        except Exception as error:  # noqa: BLE001  what a probe raises is its result
            bench.rows.add("probe", name, works=False, error=f"{type(error).__name__}: {error}"[:500])


def _addmm_probe(device: torch.device) -> dict[str, Any]:
    left, right = (torch.randn(512, 512, device=device, dtype=torch.bfloat16) for _ in range(2))
    found: dict[str, Any] = {}
    total = torch.randn(512, 512, device=device)
    for name, run in {
        "mm": lambda: torch.mm(left, right, out_dtype=torch.float32),
        "addmm": lambda: torch.addmm(total, left, right, out_dtype=torch.float32),
    }.items():
        try:
            want = left.float() @ right.float() + (total if name == "addmm" else 0)
            found[name] = float((run() - want).norm() / want.norm())
        except (RuntimeError, TypeError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return {"works": all(isinstance(value, float) and value < 1e-3 for value in found.values())} | found


def _flex_probe(device: torch.device) -> dict[str, Any]:
    from trl_draft_opd.drafters.attention.backends import _try_flex

    if device.type != "cuda":
        return {"works": False, "error": "flex_attention has no backward pass on a CPU"}
    failure = _try_flex(device, torch.bfloat16, 32, 8, 128)
    return {"works": failure is None, "error": failure}


def _triton_probe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"works": False, "error": "the kernels run on CUDA"}
    logits, target = (torch.randn(64, 151_936, device=device, dtype=torch.bfloat16) for _ in range(2))
    worst = 0.0
    for loss_type in ("forward_kl", "reverse_kl", "jsd", "tv"):
        want, want_grad = differentiate(logits.float(), target.float(), loss_type)
        own, ones = logits.clone(), torch.ones(64, device=device)
        read = fused.read_target(target, None)
        assert read is not None, "the kernel did not run"
        logits_SD, statistics, _ = read
        places = torch.arange(64, device=device)
        got = fused.differentiate(own, logits_SD, statistics, places, None, ones, loss_type)
        assert got is not None, "the kernel did not run"
        worst = max(worst, float((got - want).norm() / want.norm()))
        worst = max(worst, float((own.float() - want_grad).norm() / want_grad.norm()))
    # The gradient is written in bfloat16.
    return {"works": worst < 4 * BF16_ROUNDING, "error": None, "largest_difference": worst}


# -- the small pair: the card against the CPU -------------------------------------------------------------------------


class Roundings(TorchDispatchMode):
    """Counts operations whose result was rounded to bfloat16."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        moves_only = func.is_view or "copy" in str(func) and all(leaf.dtype != torch.bfloat16 for leaf in leaves)
        self.count += not moves_only and any(leaf.dtype == torch.bfloat16 for leaf in leaves)
        return out


def small_pairs(bench: Any) -> None:
    """
    Hold loss and gradients of the small pair, both methods, on the card to those on the CPU in float32; and replay to
    live decoding.

    In bfloat16 every result is off by a part of 2 ** -9 at most, at random, and what lies on one path adds up in
    quadrature. So with `n` rounded operations in a step, loss and gradients differ by at most `sqrt(n) 2 ** -9` of
    their size, as long as no operation enlarges a relative error, which norms and residuals see to.
    """
    for family in ("eagle3", "dflash"):
        for tau in (None, 2.0):
            anchors = 8 if family == "dflash" and tau is None else None
            job = Job(f"small-{family}-{'sft' if tau is None else 'opd'}", family, num_anchors=anchors, tau=tau)
            compare_devices(bench, shortened(job))
        decode_and_replay(bench, family)


def shortened(job: Job) -> Job:
    """Return a job of two short rows."""
    return replace(job, segment=4 if job.family == "dflash" else 1, rows=2, length=64, prompt=24)


def compare_devices(bench: Any, job: Job) -> None:
    """Write how far loss and gradients on the card are from the CPU's, in float32 and in bfloat16; refuse too much."""
    cpu = torch.device("cpu")
    loss, gradients = small_training(bench, job, cpu, torch.float32).gradients()
    size = math.sqrt(sum(float(grad.norm()) ** 2 for grad in gradients.values()))
    # Counted on the CPU: what the card's compilers make of a step shows no single operations.
    with Roundings() as roundings:
        small_training(bench, job, cpu, torch.bfloat16).gradients()
    for dtype in (torch.float32, torch.bfloat16):
        own_loss, own = small_training(bench, job, bench.device, dtype).gradients()
        assert own.keys() == gradients.keys(), "another set of parameters has gradients"
        error = math.sqrt(sum(float((own[name] - grad).norm()) ** 2 for name, grad in gradients.items())) / size
        bound = FLOAT32_TOLERANCE if dtype == torch.float32 else math.sqrt(roundings.count) * BF16_ROUNDING
        values = {"loss": own_loss, "cpu_loss": loss, "loss_error": abs(own_loss - loss) / abs(loss)}
        values |= {"gradient_error": error, "bound": bound, "roundings": roundings.count}
        is_kept = values["loss_error"] <= bound and error <= bound
        name = str(dtype).removeprefix("torch.")
        bench.rows.add(job.name, f"against cpu, {name}", is_kept=is_kept, **values)
        assert is_kept, f"{job.name} in {name}: loss or gradients differ from the CPU's by more than {bound:.2g}"


def small_training(bench: Any, job: Job, device: torch.device, dtype: torch.dtype) -> Training:
    """Return a job on the small pair, with the same weights and text on every device."""
    target = load_small_target(bench, device, dtype)
    drafter = make_drafter(job.family, load_small_target(bench, torch.device("cpu"), torch.float32)).to(device)
    text = make_text(job, bench.shape("qwen3-7m").vocab, device)
    return Training(target, drafter, job, text, is_mixed=dtype == torch.bfloat16)


def decode_and_replay(bench: Any, family: str) -> None:
    """Decode live on the card in float32, replay the text, and count the rows on which the chains differ."""
    target = load_small_target(bench, bench.device, torch.float32)
    drafter = make_drafter(family, target).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, target.vocab_size - 1, (4, 24), generator=generator).tolist()
    settings = DraftingSettings(drafter.default_num_drafts, GREEDY, "greedy", keep_branch_hidden=False)
    options = {"max_completion_length": bench.sizes.decoded, "eos_token_ids": target.eos_token_ids}
    live = rollout_live(target, drafter, prompts, settings, DrawKeys(0, 0, range(4)), **options)
    text = TargetText(live.input_ids, live.attention_mask, live.completion_mask, range(4))
    again = rollout_replay(
        target, drafter, text, settings, DrawKeys(0, 0, range(4)), segment_length=4, chunk_bytes=2**26
    )
    different = sum(_chain(live, row) != _chain(again, row) for row in range(4))
    tokens = int(live.completion_mask.sum())
    bench.rows.add(f"small-{family}", "live against replay", rows=4, tokens=tokens, different=different)
    assert different == 0, f"{different} of 4 rows are replayed another way than they were decoded"


def _chain(rollout: Rollout, row: int) -> list[tuple[int, int]]:
    count = int(rollout.num_rounds[row])
    return list(zip(rollout.anchors[row, :count].tolist(), rollout.accepted[row, :count].tolist(), strict=True))


def load_small_target(bench: Any, device: torch.device, dtype: torch.dtype) -> FrozenTarget:
    """Return the small target: the trained one where `--shared` names its folder, a random one of its shape if not."""
    if bench.shared is not None:
        target = FrozenTarget.load(bench.shared / "targets" / "gsm8k-qwen3-7m", dtype=dtype)
    else:
        target = make_target(bench.shape("qwen3-7m"), torch.device("cpu"), torch.float32, 2048)
        target = FrozenTarget(target.causal_lm.to(dtype))
    target.place(device)
    return target
