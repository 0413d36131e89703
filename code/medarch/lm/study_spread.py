"""How much of a model's result is luck? The book's two recipes, shortened, from several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.lm.evaluation import Evaluation, evaluate
from medarch.lm.recipes import RECIPES, Recipe, count_parameters, load_text
from medarch.lm.training import train

NAME = "lm/checkpoint-spread"
KINDS = ("dense", "moe")
PARTS = ("test", "out_of_domain")
SEEDS = (1, 2, 3)  # that of the committed checkpoints, 0, is not among them
STEPS = 300
STRETCH = 10  # updates that one point of a curve is the mean of


@benchmark(NAME, modules=["medarch.lm.recipes", "medarch.lm.training", "medarch.lm.evaluation"])
def checkpoint_spread(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Bits per byte of the dense and the sparse recipe after 300 steps, from three seeds each.

    A seed sets the initial weights and the order of the data; split, tokenizer and settings stay. The whole
    schedule, warm-up and cosine, is shortened with the run. Beside the spread over seeds stands the standard error
    over documents, which says what other documents of the same kind would have changed.

    Args:
        device: Where to train, ``"cpu"`` or ``"cuda"``.
        quick: Whether to take a few steps only, to see that everything works.

    Returns:
        For each recipe its results over the seeds and its curves, and the differences, seed by seed.
    """
    parts = Partials(find(NAME), device, quick)
    steps, seeds, documents = (3, SEEDS[:2], 12) if quick else (STEPS, SEEDS, None)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in seeds:  # in turns, so that a machine that slows down slows both
        for kind in KINDS:
            recipe = RECIPES[kind].change(steps=steps, seed=seed, eval_every=0)
            run = parts.get(f"{kind}-{seed}", partial(_run, recipe, device, documents))
            print(f"{kind}, seed {seed}: {run['test']['bits_per_byte']:.4f} bits per byte on test", flush=True)
            runs[kind].append(run)
    return {
        "repeats": len(seeds),
        "steps": steps,
        "stretch": STRETCH,
        "seeds": list(seeds),
        "models": {kind: _describe(kind, runs[kind]) for kind in KINDS},
        "moe_minus_dense": {
            part: summary(
                [
                    sparse[part]["bits_per_byte"] - dense[part]["bits_per_byte"]
                    for sparse, dense in zip(runs["moe"], runs["dense"], strict=True)
                ]
            )
            | {
                "standard_errors_over_documents": [
                    error_of_difference(sparse[part], dense[part])
                    for sparse, dense in zip(runs["moe"], runs["dense"], strict=True)
                ]
            }
            for part in PARTS
        },
    }


def _run(recipe: Recipe, device: str, documents: int | None) -> dict[str, Any]:
    text = load_text()
    model = recipe.build(device)
    log = train(model, text.tokens, recipe.training)
    losses = log.column("cross_entropy")
    return {
        "curve": [statistics.fmean(losses[first : first + STRETCH]) for first in range(0, len(losses), STRETCH)],
        "seconds": log.seconds,
    } | {
        part: _measured(
            evaluate(model, text.tokenizer, getattr(text.corpus, part)[:documents], context=recipe.training.length)
        )
        for part in PARTS
    }


def _measured(result: Evaluation) -> dict[str, Any]:
    return {
        "bits_per_byte": result.bits_per_byte,
        "standard_error": result.standard_error,
        "perplexity_per_token": result.perplexity,
        "document_nats": list(result.document_nats),
        "document_bytes": list(result.document_bytes),
    }


def _describe(kind: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    total, active = count_parameters(RECIPES[kind].model)
    return {
        "parameters": {"total": total, "active": active},
        "curves": [run["curve"] for run in runs],
        "seconds": summary([run["seconds"] for run in runs]),
    } | {
        part: {
            name: summary([run[part][name] for run in runs])
            for name in ("bits_per_byte", "standard_error", "perplexity_per_token")
        }
        for part in PARTS
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean of some runs with Student's 95 % interval for it, standard deviation (n - 1), and the values.

    Args:
        values: One of each run, two or more.
    """
    from scipy.stats import t

    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return {"mean": mean, "sd": deviation, "low": mean - half, "high": mean + half, "values": list(values)}


def error_of_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Standard error, over documents, of the difference in bits per byte of two models on the same documents.

    Most of what makes a document hard makes it hard for both, and falls out of the difference.

    Args:
        left: ``document_nats`` and ``document_bytes`` of one model.
        right: The same of the other.

    Raises:
        ValueError: If the documents are not the same.
    """
    sizes = left["document_bytes"]
    if sizes != right["document_bytes"]:
        raise ValueError("the two models were measured on different documents: their difference has no meaning")
    gaps = [a - b for a, b in zip(left["document_nats"], right["document_nats"], strict=True)]
    ratio, count = sum(gaps) / sum(sizes), len(sizes)
    squares = math.fsum((gap - ratio * size) ** 2 for gap, size in zip(gaps, sizes, strict=True))
    return math.sqrt(squares * count / (count - 1)) / (math.log(2) * sum(sizes))
