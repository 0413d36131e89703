"""How fast the selective scan is: against other implementations in PyTorch, and against two limits of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medarch.bench import benchmark, compare
from medarch.bench.memory import peak_memory
from medarch.ssm.scan import selective_scan

Scan = Callable[..., Tensor]

BASELINE = "mambapy"
FLOORS = ("states_once", "inputs_once")
BATCH, CHANNELS, STATES = 2, 256, 16
# Longest sequence that a variant takes part with, forward and with backward: beyond it, it needs seconds or gigabytes.
LIMITS = {
    "loop": {"forward": 1024, "forward_backward": 1024},
    "associative": {"forward": 1024, "forward_backward": 1024},
    "transformers": {"forward": 2048, "forward_backward": 256},
}


@benchmark("ssm/scan-speed", modules=["medarch.ssm.scan", "medarch.bench.timing", "medarch.bench.memory"])
def scan_speed(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Time of the selective scan over that of mambapy's parallel scan, forward and with backward, one thread.

    Two sequences, 256 channels, 16 states. The first floor writes one number for each state and step to memory and
    reads it again: what is faster keeps the states out of memory. The second floor reads two inputs and writes one
    output: nothing can be faster.

    Args:
        device: Where to run, ``"cpu"`` or ``"cuda"``; on the latter the Triton kernels take part.
        quick: Whether to run small sizes, to see that everything works.

    Returns:
        For each length and mode one comparison and the peak memory in bytes of each variant; and how the time of
        our own form grows with the length.

    Raises:
        ValueError: If two variants disagree (what is wrong is not timed), or a package is missing.
    """
    lengths = (32, 64) if quick else (256, 512, 1024, 2048, 4096, 8192)
    rounds, channels = (3, 5) if quick else (7, CHANNELS)
    variants = build_variants(device)
    check_agreement(variants, make_inputs(61, device, 7), device)
    results: dict[str, Any] = {
        "sizes": {"batch": BATCH, "channels": channels, "states": STATES},
        "repeats": rounds,
        "lengths": {},
    }
    for length in lengths:
        inputs, cotangent = make_inputs(length, device, channels), make_cotangent(length, device, channels)
        results["lengths"][str(length)] = {}
        for mode in ("forward", "forward_backward"):
            calls = {
                name: without_gradient(scan, inputs) if mode == "forward" else with_backward(scan, inputs, cotangent)
                for name, scan in variants.items()
                if length <= LIMITS.get(name, {}).get(mode, length) and (mode == "forward" or name not in FLOORS)
            }
            timed = compare(calls, baseline=BASELINE, rounds=rounds, threads=1, device=device).to_dict()
            # Transformers' backward pass makes a gradient of full size for each step. As the profiler takes memory in
            # between, the allocator does not find the same room twice, and 512 steps occupy 17 GB.
            told = [name for name in calls if (name, mode) != ("transformers", "forward_backward")]
            memory = {name: peak_memory(calls[name], device=device) for name in told}
            results["lengths"][str(length)][mode] = timed | {"peak_bytes": memory}
    ours = {name: scan for name, scan in variants.items() if name in ("chunked", "triton")}
    return results | {"growth": growth(ours, lengths, channels, rounds, device)}


def make_inputs(length: int, device: str, channels: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of usual sizes: step sizes from thousandths to tenths, rates from 1 to the number of states."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made = {
        "u": normal(BATCH, channels, length),
        "delta": F.softplus(normal(BATCH, channels, length) - 4),
        "A": -torch.arange(1.0, STATES + 1).repeat(channels, 1),
        "B": normal(BATCH, STATES, length),
        "C": normal(BATCH, STATES, length),
        "D": normal(channels),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def make_cotangent(length: int, device: str, channels: int) -> Tensor:
    """What comes back from the loss."""
    return torch.randn(BATCH, channels, length, generator=torch.Generator().manual_seed(1)).to(device)


def build_variants(device: str) -> dict[str, Scan]:
    """Each competitor as a function of the same arguments, and the two floors.

    Raises:
        ValueError: If a package that is compared with is not installed.
    """
    try:
        from mambapy.pscan import pscan
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    except ImportError as missing:
        raise ValueError(
            "ssm/scan-speed compares with mambapy and transformers, which are not installed: run `make test` once"
        ) from missing

    def ours(method: Any) -> Scan:
        return lambda **inputs: selective_scan(**inputs, method=method)

    def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        # Its own Mamba block has time before channels in memory, and with another order it takes twice as long.
        u, delta, B, C = (each.transpose(1, 2).contiguous() for each in (u, delta, B, C))
        added = (delta * u)[..., None] * B[:, :, None]
        states = pscan(torch.exp(delta[..., None] * A), added)
        return ((states @ C[..., None]).squeeze(3) + D * u).transpose(1, 2)

    def transformers(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return mamba_selective_scan(u, delta, A, B, C, D)

    room: dict[int, Tensor] = {}

    def states_once(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        batch, channels, length = u.shape
        if length not in room:
            room.clear()
            room[length] = u.new_empty(batch, A.shape[1], channels, length)
        torch.mul(delta[:, None], B[:, :, None], out=room[length])
        return room[length].sum(1)

    def inputs_once(u: Tensor, delta: Tensor, **_: Tensor) -> Tensor:
        return u + delta

    variants: dict[str, Scan] = {
        BASELINE: mambapy,
        "transformers": transformers,
        "loop": ours("loop"),
        "associative": ours("associative"),
        "chunked": ours("chunked"),
        "states_once": states_once,
        "inputs_once": inputs_once,
    }
    return variants | ({"triton": ours("triton")} if device == "cuda" else {})


def without_gradient(scan: Scan, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One inference."""

    def call() -> Tensor:
        with torch.no_grad():
            return scan(**inputs)

    return call


def with_backward(scan: Scan, inputs: dict[str, Tensor], cotangent: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass, which returns the gradient of every input."""
    given = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    return lambda: torch.autograd.grad(scan(**given), list(given.values()), cotangent)


def check_agreement(variants: dict[str, Scan], inputs: dict[str, Tensor], device: str) -> None:
    """Holds every variant to the loop: its output and all its gradients.

    Raises:
        ValueError: Naming the variant and the quantity that differ.
    """
    _, channels, length = inputs["u"].shape
    cotangent = make_cotangent(length, device, channels)

    def outcome(scan: Scan) -> list[Tensor]:
        return [without_gradient(scan, inputs)(), *with_backward(scan, inputs, cotangent)()]

    expected = outcome(variants["loop"])
    for name, scan in variants.items():
        if name in FLOORS:
            continue
        for quantity, value, other in zip(("y", *inputs), expected, outcome(scan), strict=True):
            try:
                torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
            except AssertionError as difference:
                raise ValueError(f"{name} disagrees with the loop in {quantity}: {difference}") from difference


def growth(scans: dict[str, Scan], lengths: tuple[int, ...], channels: int, rounds: int, device: str) -> dict[str, Any]:
    """The times of one scan at all lengths, taken in turns, over those at the shortest, forward and with backward.

    In turns, because the times of two lengths that were measured minutes apart differ by what else the machine did.
    """
    grown: dict[str, Any] = {}
    for name, scan in scans.items():
        calls: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "forward_backward": {}}
        for length in lengths:
            inputs, cotangent = make_inputs(length, device, channels), make_cotangent(length, device, channels)
            calls["forward"][str(length)] = without_gradient(scan, inputs)
            calls["forward_backward"][str(length)] = with_backward(scan, inputs, cotangent)
        grown[name] = {
            mode: compare(each, baseline=str(lengths[0]), rounds=rounds, threads=1, device=device).to_dict()
            for mode, each in calls.items()
        }
    return grown
