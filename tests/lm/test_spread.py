"""The study of the spread over seeds, and what the book says of its record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from medarch.bench.records import load_named
from medarch.bench.registry import find
from medarch.lm import study_spread
from medarch.lm.recipes import RECIPES, count_parameters
from medarch.lm.study_spread import error_of_difference, summary


def test_the_interval_by_hand() -> None:
    """Of 1, 2, 4: mean 7/3, variance 7/3, and Student's quantile for two degrees of freedom is 4.3027."""
    found = summary([1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["sd"] == pytest.approx(math.sqrt(7 / 3))
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * math.sqrt(7 / 9))
    assert found["low"] + found["high"] == pytest.approx(2 * found["mean"])
    assert found["values"] == [1.0, 2.0, 4.0]


def measured(nats: Sequence[float], sizes: Sequence[int] = (10, 20, 30)) -> dict[str, Any]:
    return {"document_nats": list(nats), "document_bytes": list(sizes)}


def test_what_is_hard_for_both_falls_out_of_the_difference() -> None:
    left, right = measured([17.0, 3.0, 40.0]), measured([16.0, 1.0, 37.0])
    assert error_of_difference(left, right) == pytest.approx(0.0)  # 0.1 nat a byte more, in each of them
    # Gaps 2, 2, 2 over 60 bytes: 0.1 a byte; residuals 1, 0, -1.
    gap = error_of_difference(measured([3.0, 4.0, 5.0]), measured([1.0, 2.0, 3.0]))
    assert gap == pytest.approx(math.sqrt(2 * 3 / 2) / (math.log(2) * 60))
    with pytest.raises(ValueError, match="different documents"):
        error_of_difference(left, measured([1, 2, 3], (10, 20, 31)))


def test_the_study_is_resumable_and_tells_seeds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Kept:
        def __init__(self, *_: object) -> None:
            pass

        def get(self, key: str, compute: Any) -> Any:
            if key not in made:
                made[key] = compute()
            return made[key]

    def run(recipe: Any, device: str, documents: int | None) -> dict[str, Any]:
        value = recipe.training.seed / 10 + (recipe.name == "moe")
        part = {"bits_per_byte": value, "standard_error": 0.1, "perplexity_per_token": 2.0, **measured([value] * 3)}
        return {"curve": [value], "seconds": 1.0, "test": part, "out_of_domain": part}

    find(study_spread.NAME)  # a study imported while this one is patched would keep what is patched
    monkeypatch.setattr(study_spread, "Partials", Kept)
    monkeypatch.setattr(study_spread, "_run", run)
    results = study_spread.checkpoint_spread()
    assert sorted(made) == [f"{kind}-{seed}" for kind in ("dense", "moe") for seed in (1, 2, 3)]
    assert results["models"]["dense"]["test"]["bits_per_byte"]["values"] == pytest.approx([0.1, 0.2, 0.3])
    assert results["moe_minus_dense"]["test"]["mean"] == pytest.approx(1.0)
    assert results["moe_minus_dense"]["test"]["sd"] == pytest.approx(0.0, abs=1e-12)
    assert results["models"]["moe"]["parameters"]["total"] > results["models"]["dense"]["parameters"]["total"]
    assert (results["repeats"], results["steps"]) == (3, 300)


def test_the_record_says_what_the_page_says_of_it() -> None:
    record = load_named(study_spread.NAME)
    assert record.repeats == len(study_spread.SEEDS) == 3
    results = record.results
    assert results["steps"] == study_spread.STEPS
    for kind, model in results["models"].items():
        assert len(model["curves"]) == 3
        assert all(len(curve) == study_spread.STEPS // study_spread.STRETCH for curve in model["curves"])
        assert model["parameters"]["total"] == count_parameters(RECIPES[kind].model)[0]
    gaps = results["moe_minus_dense"]
    for part, gap in gaps.items():
        sparse, dense = (results["models"][kind][part]["bits_per_byte"]["values"] for kind in ("moe", "dense"))
        assert gap["values"] == pytest.approx([a - b for a, b in zip(sparse, dense, strict=True)])
        assert gap["low"] < 0 < gap["high"]
    assert sorted(value > 0 for value in gaps["test"]["values"]) == [False, True, True]
    pairs = zip(gaps["test"]["values"], gaps["test"]["standard_errors_over_documents"], strict=True)
    assert all(abs(value) > 4 * error for value, error in pairs)
