"""How far back can a trained state reach? S4D with four spectra, and a gated recurrent unit, on the delay task."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, get_args

import torch

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.ssm.delay import BATCH, TIME, Kind, Listener, train_listener

NAME = "ssm/delay"
KINDS: tuple[Kind, ...] = get_args(Kind)
HIDDEN: dict[Kind, int] = {kind: 128 if kind == "gru" else 16 for kind in KINDS}
RATES = (0.001, 0.003, 0.01)
SELECTION_SEED, SELECTION_LAG = 1000, 10


@benchmark(NAME, modules=["medarch.ssm.delay"])
def delay_study(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Error on the delay task for lags of 10, 30 and 100 steps, over three seeds.

    The GRU has 128 numbers in its state, more than the longest lag, so that it could hold what is asked of it, and
    about fifty times as many weights as S4D. All kinds get the same batches and steps. The learning rate of each is the
    best of three at a lag of 10, with a seed that the record does not use.

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
    seeds, steps, lags, rates = ((0, 1), 3, (5,), RATES[1:]) if quick else ((0, 1, 2), 400, (10, 30, 100), RATES)
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        selection = {
            str(rate): parts.get(
                f"select-{kind}-{rate}", partial(_run, kind, min(SELECTION_LAG, lags[0]), SELECTION_SEED, steps, rate)
            )["error"]
            for rate in rates
        }
        rate = float(min(selection, key=lambda name: selection[name]))
        found = {}
        for lag in lags:
            runs = [parts.get(f"{kind}-{lag}-{seed}", partial(_run, kind, lag, seed, steps, rate)) for seed in seeds]
            found[f"lag_{lag}"] = {
                measure: _summary([run[measure] for run in runs]) for measure in ("error", "seconds")
            }
            print(f"{kind}, lag {lag}: error {found[f'lag_{lag}']['error']['mean']:.3f}", flush=True)
        model = Listener(kind, torch.Generator().manual_seed(0), HIDDEN[kind])
        kinds[kind] = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "state_numbers": model.state_numbers,
            "selection": selection,
            "learning_rate": rate,
            "lags": found,
        }
    return {"repeats": len(seeds), "steps": steps, "batch": BATCH, "time": TIME, "kinds": kinds}


def _run(kind: Kind, lag: int, seed: int, steps: int, rate: float) -> dict[str, float]:
    trained = train_listener(kind, lag, seed, steps, rate, HIDDEN[kind])
    return {"error": trained.error, "seconds": trained.seconds}


def _summary(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "values": values}
