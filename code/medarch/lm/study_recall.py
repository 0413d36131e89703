"""What can each architecture keep? Copying, recall and search, at equal size, beyond the trained length, and why."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.lm.parallel_parts import compute_parts
from medarch.lm.recall_models import ModelSpec, sizes
from medarch.lm.recall_tasks import Copying, Induction, MultiQueryRecall, PlantedFact, SelectiveCopying, Task
from medarch.lm.recall_training import Trial, score_on_tasks, train_on_tasks

NAME = "lm/recall-tasks"
KINDS = ("gru", "attention", "mamba", "hybrid")
"""On every task; Mamba-2 takes part in recall, where its larger state is to show."""
ABLATED = ("fixed-step", "fixed-B-C", "fixed-all")
"""Mamba with its step size, its B and C, or all three made independent of the input."""
RATES = (3e-3, 1e-2)
"""Learning rates on recall and on selective copying, which not all learn; each architecture counts with the better one.
The other tasks are learned by all at the first."""
BOTH = ("recall", "selective copying")
SEEDS = (1, 2, 3)
STRETCHES = (1, 2, 4, 8, 16)
"""Lengths at which a trained model is tested, over the length that it was trained at."""
STATES = (4, 16, 64)

TASKS: dict[str, tuple[Task, ...]] = {
    "copying": (Copying(length=32, items=4, symbols=8),),
    "selective copying": (SelectiveCopying(length=32, items=4, symbols=8),),
    "induction": (Induction(length=32, symbols=8),),
    "recall": tuple(
        MultiQueryRecall(length=32, pairs=pairs, keys=16, values=16, questions=32 - 2 * pairs) for pairs in (2, 4)
    ),
    "planted fact": (PlantedFact(length=48, facts=2, keys=8, values=8, fillers=16, questions=4),),
}
"""What is trained on; where there are several, batches alternate between them, and the last is the one tested."""
STEPS = {"recall": 2000}
"""Updates at most, where they are not ``USUAL``: finding a value by its key takes longest to learn."""
USUAL = 1000


@benchmark(NAME, modules=["medarch.lm.recall_tasks", "medarch.lm.recall_models", "medarch.lm.recall_training"])
def recall_tasks(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Accuracy of architectures of equal size on five tasks of memory, three seeds, at 1 to 16 times the length.

    Every model has two layers of width 64 and as many weights as the Mamba. It is trained for at most
    1,000 updates of 32 sequences (2,000 on recall), on the hard tasks at two learning rates, and stops where it has the
    task right. With
    ``MEDARCH_WORKERS`` in the environment, so many trials run side by side.

    Args:
        device: ``"cpu"``; the trials are too small for a graphics card.
        quick: Whether to take a few updates only, to see that everything works.

    Returns:
        For each task and architecture the accuracies by learning rate and length, the learning curves and the number
        of updates; for each architecture its sizes; and the same for the ablated Mambas and for other state sizes.
    """
    steps, seeds, kinds, ablated = (None, SEEDS, KINDS, ABLATED)
    stretches = STRETCHES
    if quick:
        steps, seeds, kinds, ablated, stretches = 2, SEEDS[:2], ("gru", "mamba"), ABLATED[:1], (1, 2)  # type: ignore[assignment]
    wanted = [(task, ModelSpec(kind)) for task in TASKS for kind in kinds_of(task, kinds)]
    wanted += [("selective copying", ModelSpec(kind)) for kind in ablated]
    wanted += [("recall", ModelSpec("mamba2", state_size=states)) for states in (STATES[:1] if quick else STATES)]
    wanted = list(dict.fromkeys(wanted))
    jobs = {
        part_name(task, spec, rate, seed): partial(run_trial, task, spec, rate, seed, stretches, steps)
        for task, spec in sorted(wanted, key=_longest_first)
        for rate in rates(task)
        for seed in seeds
    }
    runs = compute_parts(Partials(find(NAME), device, quick), jobs, _report)
    described = {
        (task, spec): {
            str(rate): _describe([runs[part_name(task, spec, rate, seed)] for seed in seeds]) for rate in rates(task)
        }
        for task, spec in wanted
    }
    plain = {(task, spec.kind): each for (task, spec), each in described.items() if spec.state_size == 16}
    return {
        "repeats": len(seeds),
        "seeds": list(seeds),
        "rates": {task: list(rates(task)) for task in TASKS},
        "stretches": list(stretches),
        "chance": {task: trained[-1].chance for task, trained in TASKS.items()},
        "length": {task: trained[-1].length for task, trained in TASKS.items()},
        "updates": {task: STEPS.get(task, USUAL) for task in TASKS},
        "models": {
            kind: sizes(ModelSpec(kind).build(TASKS["recall"][-1].vocab_size, 0), TASKS["recall"][-1].length)
            for kind in (*kinds, "mamba2", *ablated)
        },
        "tasks": {
            task: {kind: plain[task, kind] for kind in kinds_of(task, kinds) if (task, kind) in plain} for task in TASKS
        },
        "ablation": {kind: plain["selective copying", kind] for kind in ("mamba", *ablated)},
        "states": {
            str(spec.state_size): each
            for (task, spec), each in described.items()
            if (task, spec.kind) == ("recall", "mamba2")
        },
    }


def run_trial(
    task: str, spec: ModelSpec, rate: float, seed: int, stretches: Sequence[int], steps: int | None = None
) -> dict[str, Any]:
    """One model trained once, and its accuracy at the length that it was trained at and at multiples of it."""
    trained = TASKS[task]
    model, told = train_on_tasks(Trial(spec, trained, rate, steps or STEPS.get(task, USUAL), seed=seed))
    longer = [trained[-1].at_length(trained[-1].length * stretch) for stretch in stretches]
    return told | {"accuracy": score_on_tasks(model, longer, sequences=256)}


def kinds_of(task: str, kinds: Sequence[str] = KINDS) -> tuple[str, ...]:
    """The architectures that a task is learned by."""
    return (*kinds, "mamba2") if task == "recall" else tuple(kinds)


def rates(task: str) -> tuple[float, ...]:
    """The learning rates that a task is trained with."""
    return RATES if task in BOTH else RATES[:1]


def best_rate(by_rate: dict[str, Any]) -> str:
    """The learning rate with the better mean accuracy at the trained length; the smaller where they are level.

    Args:
        by_rate: One entry of ``tasks``, ``ablation`` or ``states``.
    """
    return max(by_rate, key=lambda rate: (by_rate[rate]["accuracy"][0]["mean"], -float(rate)))


def part_name(task: str, spec: ModelSpec, rate: float, seed: int) -> str:
    """Name of a trial's file."""
    return f"{task.replace(' ', '-')}-{spec.kind}-{spec.state_size}-{rate:g}-{seed}"


def _longest_first(wanted: tuple[str, ModelSpec]) -> tuple[bool, bool, str]:
    task, spec = wanted
    return (not spec.kind.startswith("fixed"), task != "recall", spec.kind)


def _describe(runs: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = zip(*(run["accuracy"] for run in runs), strict=True)
    return {
        "accuracy": [{"mean": statistics.fmean(each), "least": min(each), "most": max(each)} for each in accuracies],
        "curves": [[round(value, 4) for value in run["curve"]] for run in runs],
        "updates": [run["steps"] for run in runs],
    }


def _report(part: str, run: dict[str, Any]) -> None:
    shown = " ".join(f"{value:.2f}" for value in run["accuracy"])
    print(f"{part}: {shown} after {run['steps']} updates, {run['seconds']:.0f} s", flush=True)
