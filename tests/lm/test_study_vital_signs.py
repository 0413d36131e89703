"""The forecasting study: a quick run, its differences over people, and the floor that the sensor leaves."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest

from medarch.data.glucose_cohort import CohortConfig, noise
from medarch.lm import study_vital_signs as study
from medarch.lm.vital_signs import make_task, planted_gaps


def test_differences_carry_students_interval() -> None:
    found = study.difference([1.0, 2, 4], [0.5, 1, 1])
    assert found["mean"] == pytest.approx(1.5)
    half = 4.302653 * statistics.stdev([0.5, 1, 3]) / math.sqrt(3)
    assert (found["low"], found["high"]) == pytest.approx((1.5 - half, 1.5 + half))


def test_the_floor_is_what_the_best_guess_of_the_noise_leaves() -> None:
    config = CohortConfig()
    error = noise((200, 2000), config.noise, config.noise_minutes, np.random.default_rng(1))
    left = error[:, 6:] - math.exp(-30 / config.noise_minutes) * error[:, :-6]
    assert study.floor(config) == pytest.approx(float(left.std()), rel=0.02)


def test_planted_gaps_are_of_the_same_days() -> None:
    task = make_task(train=2, validation=1, test=2, days=1)
    (same, readings, first), (_, gapped, after) = study._with_planted_gaps(task, (0, 12))
    seen = np.isfinite(task.cohort.readings)
    np.testing.assert_array_equal(same.readings[seen], task.cohort.readings[seen])
    assert first.sum() == 2 * len(range(24, 288, 24))
    assert set(gapped.silence.numpy()[after].tolist()) == {13}
    assert planted_gaps(same, 12)[1].tolist() == list(range(36, 288, 36))
    assert len(readings.samples) == 2


def test_a_quick_run_measures_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unkept:
        def __init__(self, *_: object) -> None: ...

        def get(self, _: str, compute: object) -> object:
            return json.loads(json.dumps(compute()))  # type: ignore[operator]

    monkeypatch.setattr(study, "Partials", Unkept)
    two = {name: config for name, config in study.configs().items() if name in ("clock", "count")}
    monkeypatch.setattr(study, "configs", lambda: two)
    monkeypatch.setattr(study, "SHOWN", ("clock", "boosted trees"))
    found = study.vital_signs(quick=True)
    assert set(found["methods"]) == {"clock", "count", "boosted trees", "ridge", "no change"}
    for entry in found["methods"].values():
        assert len(entry["by_person"]) == found["people"]["test"] == 2
        assert len(entry["planted"]) == len(found["silent_minutes"]) == 2
    assert found["methods"]["no change"]["rmse"]["mean"] > found["floor"]
    example = found["example"]
    assert len(example["minutes"]) == len(example["reading"]) == len(example["forecast"]["clock"])


def test_nothing_is_fitted_on_the_people_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(train=3, validation=2, test=2, days=1)
    trained, tables = [], []
    monkeypatch.setattr(study, "train_forecaster", lambda _model, readings, **_: trained.append(readings))
    study._trained("selective", 0.01, 0, 1, task)
    assert trained == [task.train]

    def table(cohort: object, readings: object, people: range) -> np.ndarray:
        tables.append((readings, people))
        return lags(cohort, readings, people)

    lags = study.table_of_lags
    monkeypatch.setattr(study, "table_of_lags", table)
    study._ridge(task, [], True)
    assert tables[0][0] is task.train
    assert tables[0][1] == task.people["train"]
    assert not set(task.people["train"]) & set(task.people["test"])
