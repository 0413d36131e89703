"""Dense, mixture, Mamba and hybrid from several seeds: which differences outlast the luck of a run?"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.lm.catalogue import count_parameters, find_recipe, recipe_names
from medarch.lm.parallel_parts import compute_parts
from medarch.lm.study_spread import PARTS, STRETCH, error_of_difference, summary
from medarch.lm.study_spread import _run as train_and_measure  # public there, the long record behind it would be stale

NAME = "lm/architecture-spread"
SEEDS = (1, 2, 3)  # that of the committed checkpoints, 0, is not among them
STEPS = {"cpu": 300, "cuda": 600}


@benchmark(NAME, modules=["medarch.lm.hybrid_recipes", "medarch.lm.training", "medarch.lm.evaluation"])
def architecture_spread(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Bits per byte of the book's four recipes from three seeds each.

    A seed sets the initial weights and the order of the data; split, tokenizer and settings stay, and are the same
    for all four. The schedule is shortened with the run: to two fifths on a graphics card, to a fifth on a processor.

    Args:
        device: Where to train, ``"cpu"`` or ``"cuda"``.
        quick: Whether to take a few steps only, to see that everything works.

    Returns:
        For each recipe its results over the seeds and its curves, and every pair's differences, seed by seed.
    """
    parts = Partials(find(NAME), device, quick)
    steps, seeds, documents = (3, SEEDS[:2], 6) if quick else (STEPS[device], SEEDS, None)
    smaller = {"batch_size": 2, "length": 32} if quick else {}
    names = recipe_names()
    jobs = {
        f"{name}-{seed}": partial(
            train_and_measure,
            find_recipe(name).change(steps=steps, seed=seed, eval_every=0, **smaller),
            device,
            documents,
        )
        for seed in seeds
        for name in names
    }
    runs = compute_parts(
        parts, jobs, lambda part, run: print(f"{part}: {run['test']['bits_per_byte']:.4f} bits per byte", flush=True)
    )
    return {
        "repeats": len(seeds),
        "steps": steps,
        "stretch": STRETCH,
        "seeds": list(seeds),
        "models": {name: _describe(name, [runs[f"{name}-{seed}"] for seed in seeds]) for name in names},
        "differences": {
            f"{left}_minus_{right}": {
                part: _difference(part, [(runs[f"{left}-{seed}"], runs[f"{right}-{seed}"]) for seed in seeds])
                for part in PARTS
            }
            for right, left in itertools.combinations(names, 2)
        },
    }


def _describe(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    total, active = count_parameters(find_recipe(name).model)
    return {
        "parameters": {"total": total, "active": active},
        "curves": [run["curve"] for run in runs],
        "seconds": summary([run["seconds"] for run in runs]),
    } | {part: {"bits_per_byte": summary([run[part]["bits_per_byte"] for run in runs])} for part in PARTS}


def _difference(part: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    gaps = [left[part]["bits_per_byte"] - right[part]["bits_per_byte"] for left, right in pairs]
    errors = [error_of_difference(left[part], right[part]) for left, right in pairs]
    return summary(gaps) | {"standard_errors_over_documents": errors}
