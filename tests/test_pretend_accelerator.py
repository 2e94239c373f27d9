# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The pretend accelerator itself: it refuses what CUDA refuses, computes what the CPU does, and counts by line."""

import torch
from torch import nn

from helpers.pretend_accelerator import DEVICE, pretend_accelerator


def mixed():
    """Try operands of two devices; return what was refused."""
    refused = []
    with pretend_accelerator():
        here, there, places = torch.ones(3), torch.ones(3, device=DEVICE), torch.tensor([0, 2])
        tries = {
            "sum": lambda: there + here,
            "product": lambda: here @ there,
            "gather": lambda: there.gather(0, places),
            "in place on the host": lambda: here.add_(there),
            "a scalar": lambda: there + torch.tensor(2.0),
            "an index": lambda: there[places],
            "a copy": lambda: here.copy_(there),
        }
        for name, attempt in tries.items():
            try:
                attempt()
            except RuntimeError as error:
                assert "same device" in str(error)
                refused.append(name)
    return refused


def test_operands_of_two_devices_are_refused_where_cuda_refuses_them(call):
    assert call(mixed) == ["sum", "product", "gather", "in place on the host"]


def waits():
    """Return the waits and uploads that each of some operations takes."""
    found = {}
    with pretend_accelerator() as counts:
        there = torch.arange(4.0, device=DEVICE)
        whole = there.long()
        tries = {
            "item": lambda: there[0].item(),
            "int": lambda: int(there[0]),
            "bool": lambda: bool(there[0] > 0),
            "tolist": lambda: there.tolist(),
            "cpu": lambda: there.cpu(),
            "nonzero": lambda: there.nonzero(),
            "mask": lambda: there[there > 0],
            "write at a mask": lambda: there.__setitem__(there > 0, 1.0),
            "unique": lambda: whole.unique(),
            "repeat by a tensor": lambda: whole.repeat_interleave(whole),
            "repeat with a size": lambda: whole.repeat_interleave(whole, output_size=6),
            "places": lambda: there[whole],
            "where": lambda: torch.where(there > 0, there, 0),
            "a new tensor": lambda: torch.zeros(3, device=DEVICE),
            "a tensor of numbers": lambda: torch.tensor([1.0], device=DEVICE),
            "upload without a wait": lambda: torch.ones(3).to(DEVICE, non_blocking=True),
        }
        for name, attempt in tries.items():
            counts.clear()
            attempt()
            found[name] = (counts.totals()["syncs"], counts.totals()["uploads"])
    return found


def test_waits_of_the_host_are_counted_and_nothing_else(call):
    found = call(waits)
    assert found.pop("a tensor of numbers") == (0, 1)
    free = {"repeat with a size", "places", "where", "a new tensor", "upload without a wait"}
    assert found == {name: (int(name not in free), 0) for name in found}


def train(device):
    """Train a small network a few steps under autocast; return its weights, and the dtypes it went through."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    inputs = torch.randn(5, 4)
    with pretend_accelerator() as counts:
        network, inputs = network.to(device), inputs.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        for _ in range(3):
            counts.clear()
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                logits = network(inputs)
                dtypes = (network[0](inputs).dtype, logits.dtype, logits.softmax(dim=-1).dtype)
            logits.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        totals = counts.totals()
        return [weight.detach().cpu() for weight in network.parameters()], dtypes, totals


def test_training_under_autocast_has_cudas_dtypes_and_the_cpus_weights(call):
    weights, dtypes, totals = call(train, DEVICE)
    expected, _, none = call(train, "cpu")
    assert dtypes == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert totals["launches"] > 30 and totals["syncs"] == 0
    assert none == {"launches": 0, "syncs": 0, "uploads": 0}
    # The norm is in float32 here, as on CUDA.
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=0.05)


def by_line():
    with pretend_accelerator() as counts:
        torch.ones(3, device=DEVICE).sum().item()
        return counts.table("syncs"), counts.table("launches")


def test_counts_name_the_line(call):
    syncs, launches = call(by_line)
    assert syncs.splitlines()[0] == "1 syncs" and "test_pretend_accelerator.py:" in syncs
    assert launches.splitlines()[0] == "2 launches"
