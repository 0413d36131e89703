"""The study of recall at a small size: every part of the answer is there, and the better rate counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from medarch.bench import partial as partials
from medarch.lm import study_recall
from medarch.lm.recall_models import ModelSpec


def test_every_task_and_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(partials, "repository_root", lambda: tmp_path)
    monkeypatch.setattr(
        study_recall, "TASKS", {name: study_recall.TASKS[name] for name in ("selective copying", "recall")}
    )
    monkeypatch.setattr(study_recall, "RATES", (1e-3,))
    results = study_recall.recall_tasks(quick=True)
    assert list(results["tasks"]) == ["selective copying", "recall"]
    assert list(results["tasks"]["recall"]) == ["gru", "mamba", "mamba2"]
    assert list(results["ablation"]) == ["mamba", "fixed-step"]
    assert sorted(results["states"]) == ["16", "4"]
    entry = results["tasks"]["recall"]["mamba"]["0.001"]
    assert [set(each) for each in entry["accuracy"]] == [{"mean", "least", "most"}] * 2
    assert entry["updates"] == [2, 2]
    assert results["models"]["mamba"]["parameters"] == pytest.approx(results["models"]["gru"]["parameters"], rel=0.05)


def test_the_better_rate_counts() -> None:
    def rated(mean: float) -> dict[str, object]:
        return {"accuracy": [{"mean": mean}, {"mean": 1 - mean}]}

    assert study_recall.best_rate({"0.003": rated(0.5), "0.01": rated(0.7)}) == "0.01"
    assert study_recall.best_rate({"0.003": rated(0.5), "0.01": rated(0.5)}) == "0.003"


def test_a_trial_is_the_same_each_time() -> None:
    run = [study_recall.run_trial("induction", ModelSpec("gru"), 3e-3, 1, (1,), steps=3) for _ in range(2)]
    for each in run:
        each.pop("seconds")
    assert run[0] == run[1]
