"""Holds the Triton scan to the loop and prints by how much they differ: ``python triton_cases.py cpu|cuda``.

A process of its own, because Triton reads TRITON_INTERPRET when it is first imported.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from medarch.ssm.scan import selective_scan

# Odd lengths: one step, less than a block, several blocks and a rest; states that are no power of two.
CASES = {
    "everything": {"batch": 2, "channels": 3, "time": 37, "states": 5, "options": True, "strided": True},
    "one step": {"batch": 1, "channels": 2, "time": 1, "states": 3, "options": True, "strided": False},
    "bare": {"batch": 1, "channels": 2, "time": 33, "states": 4, "options": False, "strided": False},
    "whole block": {"batch": 1, "channels": 1, "time": 16, "states": 1, "options": False, "strided": True},
}
ON_A_GPU = {
    "everything": {"batch": 2, "channels": 67, "time": 1009, "states": 16, "options": True, "strided": True},
    "bare": {"batch": 3, "channels": 5, "time": 257, "states": 7, "options": False, "strided": False},
}


def inputs(
    batch: int, channels: int, time: int, states: int, options: bool, strided: bool, device: str = "cpu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + channels + time + states)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    along = (batch, time, channels) if strided else (batch, channels, time)
    made = {
        "u": normal(*along),
        "delta": normal(*along) if options else 0.3 * normal(*along).abs(),
        "A": -normal(channels, states).exp(),
        "B": normal(batch, states, time),
        "C": normal(batch, states, time),
    }
    if options:
        made |= {
            "D": normal(channels),
            "z": normal(batch, channels, time),
            "delta_bias": normal(channels) - 3,
            "initial_state": normal(batch, channels, states),
        }
    made = {name: tensor.to(device) for name, tensor in made.items()}
    if strided:
        made |= {name: made[name].transpose(1, 2) for name in ("u", "delta")}
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def differences(case: dict[str, int], device: str) -> dict[str, float]:
    """Largest difference to the loop over the largest value, for the output, the last state and every gradient."""
    given = inputs(**case, device=device)
    results = {}
    for method in ("loop", "triton"):
        y, last = selective_scan(**given, delta_softplus=bool(case["options"]), return_last_state=True, method=method)
        # A weighted sum, whose gradient for the output is an expanded tensor, as that of a plain sum would be.
        loss = (y.sum(1, keepdim=True).expand_as(y) * 0.5).mean() + (last * last.detach().cos()).sum()
        gradients = torch.autograd.grad(loss, list(given.values()))
        results[method] = {"y": y, "last": last, **dict(zip(given, gradients, strict=True))}
    expected, found = results["loop"], results["triton"]
    return {name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected}


if __name__ == "__main__":
    device = sys.argv[1]
    cases = ON_A_GPU if device == "cuda" else CASES
    print(json.dumps({name: differences(case, device) for name, case in cases.items()}))
