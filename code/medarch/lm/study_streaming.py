"""What it costs to follow a signal for a long time: a state, a window and an ever longer memory, beside one another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.data.pulse import load_recordings
from medarch.lm.attention import CausalSelfAttention
from medarch.lm.cache import KeyValueCache
from medarch.lm.signal_mixers import Attentive
from medarch.lm.signal_model import SignalConfig, SignalModel, SignalState

NAME = "lm/streaming"
HIDDEN, HEADS, LAYERS, WINDOW = 64, 4, 2, 256
INTERMEDIATE = 86  # gives attention as many weights as Mamba has
STEPS, BLOCK = 10_000, 500
PIECE = 1_000
LENGTHS = (10_000, 100_000, 1_000_000)
MODELS = ("mamba", "window", "full")


class FullAttention(Attentive):
    """Attention over everything since the beginning, with keys and values in memory reserved once."""

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        super().__init__(HIDDEN, HEADS, WINDOW, INTERMEDIATE, generator)
        self.attention = CausalSelfAttention(self.attention.config, generator)  # type: ignore[assignment]
        self.capacity = capacity

    def new_cache(self, batch_size: int, capacity: int | None = None) -> KeyValueCache:  # type: ignore[override]
        """An empty cache with room for the capacity given here, or the model's own."""
        return self.attention.new_cache(batch_size, capacity or self.capacity)  # type: ignore[return-value]


def build(name: str, capacity: int, device: str) -> SignalModel:
    """One of ``MODELS`` with random weights, two layers of width 64, reading one number a sample.

    Args:
        name: ``"mamba"``; ``"window"``, attention over the last 256 samples; ``"full"``, over all.
        capacity: samples that full attention has room for.
        device: where it lies.
    """
    generator = torch.Generator().manual_seed(0)
    mixer = "selective" if name == "mamba" else "attention"
    config = SignalConfig(
        1, mixer, HIDDEN, LAYERS, state_size=16, heads=HEADS, window=WINDOW, intermediate_size=INTERMEDIATE
    )
    model = SignalModel(config, generator)
    if name == "full":
        model.mixers = torch.nn.ModuleList(FullAttention(capacity, generator) for _ in range(LAYERS))
    with torch.no_grad():
        model.out_proj.weight.normal_(generator=generator)
    return model.to(device).eval()


def held(state: SignalState) -> int:
    """Bytes that a stream's memory occupies now."""
    return sum(
        layer.bytes_per_position * layer.length if isinstance(layer, KeyValueCache) else layer.used_bytes
        for layer in state.layers
    )


def signal(length: int) -> Tensor:
    """The longer pulse recording at mean 0 and deviation 1, repeated to this length: (1, length, 1)."""
    recording = load_recordings()[1].signal
    scaled = (recording - recording.mean()) / recording.std()
    return torch.as_tensor(np.resize(scaled, length), dtype=torch.float32)[None, :, None]


@benchmark(NAME, modules=["medarch.lm.signal_model", "medarch.lm.attention", "medarch.data.pulse"])
@torch.no_grad()
def streaming(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Time and memory of following a pulse: Mamba, attention over a window, and attention over everything.

    Two layers of width 64, one stream, one thread. First every sample comes by itself, 10,000 of them, in blocks that
    the models take in turns. Then the signal comes in pieces of 1,000 samples, up to a million where that is linear in
    the length; what is extrapolated says so.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        quick: Whether to take short signals, to see that everything works.

    Returns:
        For each model its weights, the seconds a step and the bytes held after each block, the largest difference
        between the two ways of reading as a share of the largest forecast, and seconds by length; and the sampling
        rate of the recording.
    """
    parts = Partials(find(NAME), device, quick)
    steps, block, piece = (60, 20, 30) if quick else (STEPS, BLOCK, PIECE)
    lengths = (60, 120) if quick else LENGTHS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        blocks = parts.get("steps", partial(step_by_step, steps, block, piece, device))
        results = {}
        for name in MODELS:
            measured = lengths if name != "full" else lengths[:1]
            whole = {
                str(length): parts.get(f"{name}-{length}", partial(in_pieces, name, length, piece, device))
                for length in measured
            }
            results[name] = describe(blocks[name], whole, lengths)
            print(f"{name}: {1e3 * results[name]['seconds_per_step']:.3f} ms a step", flush=True)
    finally:
        torch.set_num_threads(threads)
    return {
        "repeats": steps // block,
        "sizes": {"hidden": HIDDEN, "heads": HEADS, "layers": LAYERS, "window": WINDOW, "states": 16},
        "steps": steps,
        "block": block,
        "piece": piece,
        "lengths": list(lengths),
        "rate": load_recordings()[1].rate,
        "models": results,
    }


def timer(device: str) -> Callable[[], float]:
    """Seconds of this process on a CPU, of the clock on a GPU once it has finished."""
    if device == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def step_by_step(steps: int, block: int, piece: int, device: str) -> dict[str, dict[str, Any]]:
    """Every sample by itself; the models take turns, block by block. Then, untimed, once more in pieces."""
    samples, now = signal(steps).to(device), timer(device)
    models = {name: build(name, steps, device) for name in MODELS}
    states = {name: model.new_state() for name, model in models.items()}
    found: dict[str, dict[str, Any]] = {
        name: {"weights": model.parameter_count, "seconds": [], "bytes": []} for name, model in models.items()
    }
    outputs: dict[str, list[Tensor]] = {name: [] for name in MODELS}
    for name in MODELS:  # what happens only once is not counted
        models[name](samples[:, :1], state=models[name].new_state())
    for start in range(0, steps, block):
        for name, model in models.items():
            began = now()
            for step in range(start, start + block):
                outputs[name].append(model(samples[:, step : step + 1], state=states[name]))
            found[name]["seconds"].append((now() - began) / block)
            found[name]["bytes"].append(held(states[name]))
    for name, model in models.items():
        stepwise, state = torch.cat(outputs[name], 1), model.new_state()
        pieces = torch.cat([model(part, state=state) for part in samples.split(piece, dim=1)], 1)
        found[name]["difference"] = float((stepwise - pieces).detach().abs().max() / pieces.detach().abs().max())
    return found


def in_pieces(name: str, length: int, piece: int, device: str) -> float:
    """Seconds to read a signal of this length in pieces, state carried."""
    model, samples, now = build(name, length, device), signal(length).to(device), timer(device)
    model(samples[:, :piece], state=model.new_state())
    state, began = model.new_state(), now()
    for part in samples.split(piece, dim=1):
        model(part, state=state)
    return now() - began


def describe(blocks: dict[str, Any], whole: dict[str, float], lengths: tuple[int, ...]) -> dict[str, Any]:
    """One model's measurements, and what follows from them for the lengths that were not measured.

    A state and a window cost the same at every sample, which the blocks show; attention over everything costs in
    proportion to what it has read, so that a whole signal grows with the square of its length.
    """
    seconds = blocks["seconds"]
    fifth = max(len(seconds) // 5, 1)
    typical = statistics.median(seconds)
    growth = statistics.median(seconds[-fifth:]) / statistics.median(seconds[:fifth])
    longest = max(whole, key=int)
    return {
        "weights": blocks["weights"],
        "seconds_by_block": seconds,
        "bytes_by_block": blocks["bytes"],
        "difference": blocks["difference"],
        "seconds_per_step": typical,
        "last_fifth_over_first": growth,
        "in_pieces": {
            str(length): {"seconds": whole[str(length)], "measured": True}
            if str(length) in whole
            else {"seconds": whole[longest] * (length / int(longest)) ** 2, "measured": False}
            for length in lengths
        },
    }
