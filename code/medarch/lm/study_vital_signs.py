"""Who foretells glucose best from readings with gaps: six small networks, boosted trees, a line, and no model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.data.glucose_cohort import CohortConfig, draw_cohort
from medarch.lm.signal_model import SignalModel
from medarch.lm.vital_signs import (
    Readings,
    Task,
    as_readings,
    carried_forward,
    configs,
    forecast_change,
    make_task,
    planted_gaps,
    squared_errors,
    summarise,
    table_of_lags,
    train_forecaster,
)

NAME = "lm/vital-signs"
RATES = (1e-2, 3e-2)
SEEDS = (1, 2, 3)  # the learning rate is chosen with another, 0
STEPS = 120
SILENT = (0, 12, 24, 36)  # lengths of planted gaps, in steps of five minutes
SHOWN = ("clock", "selective", "boosted trees")  # whose forecasts for one person are kept


@benchmark(NAME, modules=["medarch.lm.vital_signs", "medarch.lm.signal_model", "medarch.data.glucose_cohort"])
def vital_signs(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Error of forecasts half an hour ahead on simulated glucose with gaps, split by person.

    Six networks of about the same number of weights, boosted trees and ridge regression on a table of lags, and
    "no change". Each network is tried with two learning rates; with the one of the least error on the validation
    people it is then trained from three other seeds. A seed sets the initial weights and the order of the data.

    Args:
        device: ``"cpu"``; the models are too small for anything else.
        quick: Whether to take few people and steps, to see that everything works.

    Returns:
        Errors on the test people of each method, overall, by person and by the time since the reading before; the
        differences from boosted trees with an interval over people; errors by the length of planted gaps; and one
        person's readings with some forecasts.
    """
    parts = Partials(find(NAME), device, quick)
    sizes = {"train": 3, "validation": 2, "test": 2, "days": 1} if quick else {}
    task, steps = make_task(**sizes), 3 if quick else STEPS
    seeds: Sequence[int] = SEEDS[:2] if quick else SEEDS
    rates: Sequence[float] = RATES[:1] if quick else RATES
    silent: Sequence[int] = SILENT[:2] if quick else SILENT
    gapped = _with_planted_gaps(task, silent)
    methods: dict[str, dict[str, Any]] = {}
    for name in configs():
        tried = {
            rate: parts.get(f"{name}-{rate:g}", partial(_validation_error, name, rate, steps, task)) for rate in rates
        }
        rate = min(tried, key=lambda each: tried[each])
        runs = [
            parts.get(f"{name}-{rate:g}-{seed}", partial(_network, name, rate, seed, steps, task, gapped))
            for seed in seeds
        ]
        methods[name] = _joined(runs) | {
            "learning_rate": rate,
            "validation_by_rate": {f"{each:g}": error for each, error in tried.items()},
        }
        print(f"{name}: {methods[name]['rmse']['mean']:.3f} mmol/L", flush=True)
    for name, method in (("boosted trees", _boosted), ("ridge", _ridge), ("no change", _no_change)):
        methods[name] = _joined([parts.get(name.replace(" ", "-"), partial(method, task, gapped, quick))])
        print(f"{name}: {methods[name]['rmse']['mean']:.3f} mmol/L", flush=True)
    return {
        "repeats": len(seeds),
        "seeds": list(seeds),
        "steps": steps,
        "people": {name: len(part) for name, part in task.people.items()},
        "missing": float(np.isnan(task.cohort.readings).mean()),
        "floor": floor(CohortConfig()),
        "silent_minutes": [5 * count for count in silent],
        "methods": methods,
        "minus_boosted_trees": {
            name: difference(entry["by_person"], methods["boosted trees"]["by_person"])
            for name, entry in methods.items()
            if name != "boosted trees"
        },
        "clock_minus_count": {
            "by_person": difference(methods["clock"]["by_person"], methods["count"]["by_person"]),
            "by_silence": [
                difference(own, other)
                for own, other in zip(
                    methods["clock"]["planted_by_person"], methods["count"]["planted_by_person"], strict=True
                )
            ],
        },
        "example": _example(task, {name: methods[name] for name in SHOWN}),
    }


def floor(config: CohortConfig, minutes: float = 30.0) -> float:
    """Error that would be left to someone who knew the glucose of the future and the sensor's error of now, mmol/L.

    The sensor's error forgets with ``exp(-minutes / noise_minutes)``; what it picks up new cannot be foretold.
    """
    return config.noise * math.sqrt(1 - math.exp(-2 * minutes / config.noise_minutes))


def difference(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean difference over people with Student's 95 % interval, mmol/L.

    Args:
        own, other: one error a person, in the same order, two or more.
    """
    from scipy.stats import t

    gaps = [a - b for a, b in zip(own, other, strict=True)]
    mean = statistics.fmean(gaps)
    half = float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return {"mean": mean, "low": mean - half, "high": mean + half}


Gapped = list[tuple[Any, Readings, np.ndarray]]


def _with_planted_gaps(task: Task, silent: Sequence[int]) -> Gapped:
    """The test people once more without gaps of their own, and then with gaps of each length.

    The gaps are the last thing that is drawn, so the same seed gives the same days and the same noise.
    """
    steps = task.cohort.readings.shape[1]
    count = sum(map(len, task.people.values()))
    full = draw_cohort(CohortConfig(subjects=count, days=steps // 288, gaps_per_day=0, lost=0), 0)
    results: Gapped = []
    for length in silent:
        cohort, first = planted_gaps(full, length)
        readings = as_readings(cohort, task.people["test"])
        results.append((cohort, readings, np.isin(readings.row.numpy(), first)))
    return results


def _measured(forecast: Callable[[Any, Readings, range], np.ndarray], task: Task, gapped: Gapped) -> dict[str, Any]:
    """All errors of one method, whose forecasts are a function of a cohort, its sequences and its people."""
    people = task.people["test"]
    found = {name: forecast(task.cohort, getattr(task, name), task.people[name]) for name in ("validation", "test")}
    errors = {name: squared_errors(found[name], getattr(task, name)) for name in found}
    planted = []
    for cohort, readings, first in gapped:
        after = np.where(first, squared_errors(forecast(cohort, readings, people), readings), np.nan)
        planted.append(np.sqrt(np.nanmean(after, axis=1)).tolist())
    shown = found["test"][0][task.test.silence[0].numpy() > 0]
    return summarise(errors["test"], task.test) | {
        "validation": float(np.sqrt(np.nanmean(errors["validation"]))),
        "planted_by_person": planted,
        "shown": [round(float(value), 3) for value in shown],
    }


def _trained(name: str, rate: float, seed: int, steps: int, task: Task) -> SignalModel:
    model = SignalModel(configs()[name], torch.Generator().manual_seed(seed))
    train_forecaster(model, task.train, learning_rate=rate, steps=steps, batch_size=16, length=160, seed=seed)
    return model.eval()


def _validation_error(name: str, rate: float, steps: int, task: Task) -> float:
    model = _trained(name, rate, 0, steps, task)
    return float(np.sqrt(np.nanmean(squared_errors(forecast_change(model, task.validation), task.validation))))


def _network(name: str, rate: float, seed: int, steps: int, task: Task, gapped: Gapped) -> dict[str, Any]:
    start = time.process_time()
    model = _trained(name, rate, seed, steps, task)
    seconds = time.process_time() - start
    return _measured(lambda _cohort, readings, _people: forecast_change(model, readings), task, gapped) | {
        "seconds": seconds,
        "weights": model.parameter_count,
    }


def _tabular(
    task: Task,
    gapped: Gapped,
    fit: Callable[[np.ndarray, np.ndarray], Any],
    prepare: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Any]:
    start = time.process_time()
    table = prepare(table_of_lags(task.cohort, task.train, task.people["train"]))
    target = task.train.change[task.train.silence > 0].numpy()
    model = fit(table[np.isfinite(target)], target[np.isfinite(target)])
    seconds = time.process_time() - start

    def forecast(cohort: Any, readings: Readings, people: range) -> np.ndarray:
        filled = np.full(readings.row.shape, np.nan)
        filled[readings.silence.numpy() > 0] = model.predict(prepare(table_of_lags(cohort, readings, people)))
        return filled

    return _measured(forecast, task, gapped) | {"seconds": seconds}


def _least(runs: dict[float, dict[str, Any]]) -> dict[str, Any]:
    """The setting with the least error on the validation people."""
    setting = min(runs, key=lambda key: runs[key]["validation"])
    return runs[setting] | {"learning_rate": setting}


def _boosted(task: Task, gapped: Gapped, quick: bool) -> dict[str, Any]:
    from sklearn.ensemble import HistGradientBoostingRegressor

    def run(rate: float) -> dict[str, Any]:
        trees = HistGradientBoostingRegressor(
            learning_rate=rate, max_iter=5 if quick else 300, early_stopping=False, random_state=0
        )
        return _tabular(task, gapped, trees.fit, lambda table: table)

    return _least({rate: run(rate) for rate in ((0.1,) if quick else (0.02, 0.05, 0.1))})


def _ridge(task: Task, gapped: Gapped, quick: bool) -> dict[str, Any]:
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def run(alpha: float) -> dict[str, Any]:
        return _tabular(task, gapped, make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit, carried_forward)

    return _least({alpha: run(alpha) for alpha in (1.0, 10.0, 100.0)})


def _no_change(task: Task, gapped: Gapped, quick: bool) -> dict[str, Any]:
    return _measured(lambda _cohort, readings, _people: np.zeros(readings.row.shape), task, gapped) | {"seconds": 0.0}


def _joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one method with several seeds as one entry; errors by person are means over the seeds."""

    def spread(values: Sequence[float]) -> dict[str, Any]:
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.fmean(values), "sd": deviation, "values": list(values)}

    planted = np.mean([run["planted_by_person"] for run in runs], axis=0)
    entry = {
        "rmse": spread([run["rmse"] for run in runs]),
        "by_gap": {name: spread([run["by_gap"][name] for run in runs]) for name in runs[0]["by_gap"]},
        "counts": runs[0]["counts"],
        "by_person": np.mean([run["by_person"] for run in runs], axis=0).tolist(),
        "planted": [statistics.fmean(row) for row in planted.tolist()],
        "planted_by_person": planted.tolist(),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "shown": runs[0]["shown"],
    }
    return entry | {name: runs[0][name] for name in ("weights", "learning_rate") if name in runs[0]}


def _example(task: Task, methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The first test person's readings, and the forecasts for half an hour after each."""
    row = task.test.row[0][task.test.silence[0] > 0].numpy()
    reading = task.cohort.readings[task.people["test"][0]][row]
    return {
        "minutes": (5 * row).tolist(),
        "reading": [round(float(value), 3) for value in reading],
        "forecast": {
            name: [round(float(a + b), 3) for a, b in zip(reading, entry["shown"], strict=True)]
            for name, entry in methods.items()
        },
    }
