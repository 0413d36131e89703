"""How far back can a trained state reach? S4D with and without oscillation, and a gated recurrent unit."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.ssm.delay import BATCH, TIME, Kind, Listener, train_listener

NAME = "ssm/delay"
HIDDEN: dict[Kind, int] = {"lin": 16, "real": 16, "gru": 64}
RATES: dict[Kind, float] = {"lin": 0.01, "real": 0.01, "gru": 0.003}


@benchmark(NAME, modules=["medarch.ssm.delay"])
def delay_study(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Error on the delay task for lags of 10 and 50 steps, over three seeds.

    The GRU has 64 numbers in its state, more than the longest lag, so that it could hold what is asked of it, and
    several times as many weights as S4D. All kinds get the same batches and steps. The learning rates are usual
    ones and were not searched for.

    Args:
        device: ``"cpu"``; the models are too small for anything else.
        quick: Whether to train for a few steps, to see that everything works.

    Returns:
        For each kind its sizes, its learning rate, and error and processor time over the seeds at each lag.

    Raises:
        ValueError: If another device is asked for.
    """
    if device != "cpu":
        raise ValueError(f"{NAME} runs on the CPU alone, got device={device!r}")
    parts = Partials(find(NAME), device, quick)
    seeds, steps, lags = ((0, 1), 3, (5,)) if quick else ((0, 1, 2), 300, (10, 50))
    kinds: dict[str, Any] = {}
    for kind, hidden in HIDDEN.items():
        found = {}
        for lag in lags:
            runs = [parts.get(f"{kind}-{lag}-{seed}", partial(_run, kind, lag, seed, steps)) for seed in seeds]
            found[str(lag)] = {measure: _summary([run[measure] for run in runs]) for measure in ("error", "seconds")}
            print(f"{kind}, lag {lag}: error {found[str(lag)]['error']['mean']:.3f}", flush=True)
        model = Listener(kind, torch.Generator().manual_seed(0), hidden)
        kinds[kind] = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "state_numbers": model.state_numbers,
            "learning_rate": RATES[kind],
            "lags": found,
        }
    return {"repeats": len(seeds), "steps": steps, "batch": BATCH, "time": TIME, "kinds": kinds}


def _run(kind: Kind, lag: int, seed: int, steps: int) -> dict[str, float]:
    trained = train_listener(kind, lag, seed, steps, RATES[kind], HIDDEN[kind])
    return {"error": trained.error, "seconds": trained.seconds}


def _summary(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "values": values}
