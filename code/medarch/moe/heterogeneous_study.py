"""Does a router find out what an input is, and does it help? Five systems on four kinds of input, over seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from medarch.bench.registry import benchmark
from medarch.moe.heterogeneous import KINDS, Mixture, Outcome, System, load_mixture, train_system
from medarch.moe.specialisation import specialisation_test
from medarch.moe.study import paired_difference, summary

NAME = "moe/heterogeneous-study"
SEEDS: tuple[int, ...] = tuple(range(10))
SYSTEMS: tuple[System, ...] = get_args(System)
PAIRS: tuple[tuple[System, System], ...] = (
    ("learned", "dense_active"),
    ("learned", "dense_total"),
    ("assigned", "dense_active"),
    ("assigned", "dense_total"),
    ("assigned", "learned"),
    ("learned", "identical"),
)


@benchmark(NAME, modules=["medarch.moe.heterogeneous", "medarch.moe.heterogeneous_study"])
def heterogeneous_study(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Accuracy and routing of general, mixed and assigned networks on four kinds of input, over ten seeds.

    All systems see the same inputs in the same order for the same number of steps. The seeds change the initial
    weights and the order, not the split.

    Args:
        device: Only ``"cpu"`` is measured.
        quick: Whether to train on a few inputs, to see that everything works.

    Returns:
        Each system's accuracy, on the whole and kind by kind; paired differences; how the learned router divides
        the kinds, with its null; and how well a small network tells the kinds when it is asked to.
    """
    seeds = SEEDS[:2] if quick else SEEDS
    epochs = 2 if quick else 20
    task = load_mixture(40, 12) if quick else load_mixture()
    outcomes: dict[System, list[Outcome]] = {
        system: [train_system(task, system, seed=seed, epochs=epochs) for seed in seeds] for system in SYSTEMS
    }
    accuracy = {system: [float(each.right.double().mean()) for each in found] for system, found in outcomes.items()}
    told = replace(
        task,
        train=task.train._replace(labels=task.train.kinds),
        test=task.test._replace(labels=task.test.kinds),
        answers=[("kind", kind) for kind in KINDS],
    )
    return {
        "repeats": len(seeds),
        "inputs": {"train": len(task.train.labels), "test": len(task.test.labels), "answers": len(task.answers)},
        "systems": {
            system: {
                "accuracy": summary(accuracy[system]),
                "by_kind": {
                    kind: summary([each.accuracy(task.test.kinds)[number] for each in outcomes[system]])
                    for number, kind in enumerate(KINDS)
                },
                "parameters": sum(weight.numel() for weight in outcomes[system][0].model.experts.parameters()),
            }
            for system in SYSTEMS
        },
        "differences": {
            f"{one}_minus_{other}": paired_difference(accuracy[one], accuracy[other]) for one, other in PAIRS
        },
        "routing": {system: _routing(task, outcomes[system], quick) for system in ("learned", "identical")},
        "kind_told_when_asked": summary(
            [
                float(train_system(told, "dense_active", seed=seed, epochs=epochs).right.double().mean())
                for seed in seeds
            ]
        ),
    }


def kinds_by_expert(task: Mixture, outcome: Outcome) -> Tensor:
    """For each kind the number of its test inputs that each expert answered."""
    experts = len(outcome.model.experts)
    flat = task.test.kinds * experts + outcome.experts
    return flat.bincount(minlength=len(KINDS) * experts).view(len(KINDS), experts)


def _routing(task: Mixture, outcomes: list[Outcome], quick: bool) -> dict[str, Any]:
    tests = [
        specialisation_test(
            torch.nn.functional.one_hot(each.experts, len(each.model.experts)), task.test.kinds,
            permutations=20 if quick else 500,
        )
        for each in outcomes
    ]  # fmt: skip
    tables = [kinds_by_expert(task, each) for each in outcomes]
    return {
        "nmi": summary([test.observed for test in tests]),
        "null_max": summary([test.null_max for test in tests]),
        "largest_p_value": max(test.p_value for test in tests),
        "own_expert": summary([float(table.diagonal().sum() / table.sum()) for table in tables]),
        "tables": [table.tolist() for table in tables],
    }
