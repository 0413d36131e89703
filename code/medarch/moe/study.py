"""Does a mixture of experts classify better than a dense layer? Four classifiers over several seeds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import torch

from medarch.bench.partial import Partials
from medarch.bench.registry import benchmark, find
from medarch.moe.accounting import count_parameters
from medarch.moe.classifier import (
    Evaluation,
    Kind,
    Task,
    TextClassifier,
    accuracy_and_f1,
    default_config,
    evaluate,
    load_task,
    train_classifier,
)
from medarch.moe.specialisation import (
    experts_by_definition,
    predictability,
    routed_words,
    specialisation_test,
)

NAME = "moe/classifier-study"
KINDS: tuple[Kind, ...] = get_args(Kind)
SEEDS: tuple[int, ...] = tuple(range(8))
SELECTION_SEED = 1000  # not among those of the record
EPOCHS: tuple[int, ...] = (2, 4, 6, 8)


@benchmark(NAME, modules=["medarch.moe.classifier", "medarch.moe.specialisation", "medarch.moe.accounting"])
def classifier_study(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Accuracy of dense and sparse classifiers of organ systems over eight seeds, beside linear ones.

    All neural classifiers share split, optimiser, steps, batches and dropped words; they differ in the
    feed-forward layer alone. The number of epochs is chosen on validation definitions with a seed that the
    record does not use; learning rate, word dropout and batch size were settled beforehand, in trials with
    the mixture on the validation definitions. The test definitions serve for the final numbers alone. The
    seeds change the initial weights and the order of training, not the split, so their spread says nothing
    about other definitions; the binomial standard error does.

    Args:
        device: where to train, ``"cpu"`` or ``"cuda"``.
        quick: whether to train on a few definitions, to see that everything works.

    Returns:
        The task, the choice of epochs, each kind's results over the seeds, the linear classifiers', paired
        differences, and how the mixture's experts divide the words, trained and untrained.
    """
    task = load_task()
    parts = Partials(find(NAME), device, quick)
    seeds, candidates = SEEDS, EPOCHS
    if quick:
        seeds, candidates = SEEDS[:2], (1, 2)
        task = task.map(lambda part: part[:384])
    task = task.map(lambda part: part.to(device))

    validation: dict[Kind, dict[str, float]] = {
        kind: {
            str(epochs): parts.get(f"select-{kind}-{epochs}", partial(_select, task, kind, epochs))
            for epochs in candidates
        }
        for kind in KINDS
    }
    epochs = fewest_epochs(validation, len(task.validation.labels))
    runs: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in seeds:  # kinds take turns within a seed, so that their times can be compared
        for kind in KINDS:
            run = parts.get(f"run-{kind}-{epochs}-{seed}", partial(_run, task, kind, epochs, seed))
            print(f"{kind}, seed {seed}: accuracy {run['accuracy']:.4f}, {run['seconds']:.1f} s", flush=True)
            runs[kind].append(run)
    linear = parts.get("linear", partial(_linear, task))
    return {
        "repeats": len(seeds),
        "task": _describe(task),
        "selection": {"seed": SELECTION_SEED, "validation_accuracy": validation, "epochs": epochs},
        "models": {
            kind: {
                measure: summary([run[measure] for run in runs[kind]])
                for measure in ("accuracy", "macro_f1", "seconds")
            }
            | {"parameters": runs[kind][0]["parameters"]}
            for kind in KINDS
        },
        "baselines": linear,
        "differences": {
            f"moe_minus_{kind}": {
                measure: paired_difference([run[measure] for run in runs["moe"]], [run[measure] for run in runs[kind]])
                for measure in ("accuracy", "macro_f1")
            }
            for kind in KINDS
            if kind != "moe"
        },
        "specialisation": {
            state: {
                measure: summary([run["specialisation"][state][measure] for run in runs["moe"]])
                for measure in runs["moe"][0]["specialisation"][state]
            }
            for state in ("trained", "untrained")
        },
    }


_PARTS = ("train", "validation", "test")


def _select(task: Task, kind: Kind, epochs: int) -> float:
    training = train_classifier(task, kind, seed=SELECTION_SEED, epochs=epochs)
    accuracy = evaluate(training.model, task.validation).accuracy
    print(f"selection: {kind}, {epochs} epochs: validation accuracy {accuracy:.4f}", flush=True)
    return accuracy


def fewest_epochs(validation: dict[Kind, dict[str, float]], examples: int) -> int:
    """The fewest epochs whose accuracy, averaged over the kinds, is within one standard error of the best.

    Args:
        validation: accuracy of each kind by number of epochs.
        examples: validation examples, which the standard error comes from.
    """
    mean = {
        int(epochs): sum(by_epochs[epochs] for by_epochs in validation.values()) / len(validation)
        for epochs in next(iter(validation.values()))
    }
    best = max(mean.values())
    error = (best * (1 - best) / examples) ** 0.5
    return min(epochs for epochs, accuracy in mean.items() if accuracy >= best - error)


def _run(task: Task, kind: Kind, epochs: int, seed: int) -> dict[str, Any]:
    training = train_classifier(task, kind, seed=seed, epochs=epochs)
    result = evaluate(training.model, task.test)
    run: dict[str, Any] = {
        "accuracy": result.accuracy,
        "macro_f1": result.macro_f1,
        "seconds": training.seconds,
        "losses": training.losses,
        "parameters": _parameters(training.model),
    }
    if kind == "moe":
        untrained = TextClassifier(
            len(task.vocabulary),
            len(task.systems),
            default_config(),
            kind,
            torch.Generator().manual_seed(seed),
        ).to(task.test.tokens.device)
        run["specialisation"] = {
            "trained": _specialisation(task, training.model, result),
            "untrained": _specialisation(task, untrained, evaluate(untrained, task.test)),
        }
    return run


def _specialisation(task: Task, model: TextClassifier, result: Evaluation) -> dict[str, float]:
    known = evaluate(model, task.train)
    assert result.routing is not None
    assert known.routing is not None
    test = specialisation_test(experts_by_definition(result.routing, task.test.mask), task.test.labels)
    guesses = predictability(routed_words(known.routing, *task.train), routed_words(result.routing, *task.test))
    return {
        "nmi": test.observed,
        "null_mean": test.null_mean,
        "null_max": test.null_max,
        "p_value": test.p_value,
        "expert_guessed_from_nothing": guesses.nothing,
        "expert_guessed_from_system": guesses.system,
        "expert_guessed_from_word": guesses.word,
        "max_over_mean_load": result.routing.statistics.max_over_mean_load,
        "load_entropy": result.routing.statistics.entropy,
    }


def _parameters(model: TextClassifier) -> dict[str, int]:
    """Weights held and weights that one word meets; of the embedding, a word meets its own row."""
    layer = model.feed_forward
    held = sum(weight.numel() for weight in layer.parameters()) if layer is not None else 0
    used = held
    if model.kind == "moe" and layer is not None:
        used = count_parameters(layer.config).active
    total = sum(weight.numel() for weight in model.parameters())
    around = total - held - model.embedding.numel() + model.embedding.shape[1]
    return {
        "total": total,
        "active": around + used,
        "feed_forward_total": held,
        "feed_forward_active": used,
    }


def _linear(task: Task) -> dict[str, dict[str, float]]:
    """TF-IDF with logistic regression, its penalty chosen on validation, and the most frequent system."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    count = {part: len(getattr(task, part).labels) for part in _PARTS}
    texts = {part: [item.text for item in getattr(task.definitions, part)[: count[part]]] for part in _PARTS}
    labels = {part: getattr(task, part).labels.cpu() for part in _PARTS}
    start = time.process_time()
    vectorizer = TfidfVectorizer(sublinear_tf=True).fit(texts["train"])
    vectors = {part: vectorizer.transform(texts[part]) for part in _PARTS}
    best: tuple[float, float, Any] = (-1.0, 0.0, None)
    for strength in (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0):
        model = LogisticRegression(C=strength, max_iter=500).fit(vectors["train"], labels["train"].numpy())
        accuracy = float(model.score(vectors["validation"], labels["validation"].numpy()))
        if accuracy > best[0]:
            best = (accuracy, strength, model)
    seconds = time.process_time() - start
    named = torch.as_tensor(best[2].predict(vectors["test"]))
    accuracy, macro_f1 = accuracy_and_f1(named, labels["test"])
    most = Counter(labels["train"].tolist()).most_common(1)[0][0]
    majority = accuracy_and_f1(torch.full_like(labels["test"], most), labels["test"])
    return {
        "tfidf_logistic_regression": {
            "accuracy": accuracy,
            "macro_f1": macro_f1,
            "validation_accuracy": best[0],
            "C": best[1],
            "parameters": int(best[2].coef_.size + best[2].intercept_.size),
            "seconds": seconds,
        },
        "majority": {"accuracy": majority[0], "macro_f1": majority[1]},
    }


def _describe(task: Task) -> dict[str, Any]:
    tested = len(task.test.labels)
    return {
        "systems": task.systems,
        "vocabulary": len(task.vocabulary),
        "examples": {part: len(getattr(task, part).labels) for part in _PARTS},
        "words_per_definition": float(task.test.mask.sum() / tested),
        # Of an accuracy of 0.9 on this many definitions: what other test definitions would have changed.
        "standard_error_at_90_percent": (0.9 * 0.1 / tested) ** 0.5,
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1), least and greatest of some values, and the values."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {
        "mean": mean,
        "sd": variance**0.5,
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def paired_difference(left: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """Mean of the differences seed by seed, with Student's 95 % interval for it."""
    from scipy.stats import t

    described = summary([a - b for a, b in zip(left, right, strict=True)])
    count = len(described["values"])
    half = float(t.ppf(0.975, count - 1)) * described["sd"] / count**0.5
    return described | {"low": described["mean"] - half, "high": described["mean"] + half}
