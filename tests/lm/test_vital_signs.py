"""The forecasting task: what a sequence holds, who is in which part, gaps of one length, and the table for trees."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from medarch.data.glucose_cohort import Cohort, CohortConfig, draw_cohort
from medarch.lm.signal_model import SignalConfig, SignalModel
from medarch.lm.vital_signs import (
    FEATURES,
    HORIZON,
    Readings,
    as_readings,
    carried_forward,
    forecast_change,
    make_task,
    planted_gaps,
    squared_errors,
    summarise,
    table_of_lags,
    train_forecaster,
)

GONE = math.nan


def by_hand() -> Cohort:
    """Two people, ten steps; the second one's sensor is silent at steps 0, 1, 4, 5 and 7."""
    readings = np.arange(20.0).reshape(2, 10)
    readings[1, [0, 1, 4, 5, 7]] = GONE
    entered, insulin = np.zeros((2, 10)), np.zeros((2, 10))
    entered[1, [1, 4, 6, 9]] = [10, 20, 30, 40]
    insulin[1, [4, 9]] = [1, 2]
    return Cohort(np.zeros((2, 10)), readings, entered, entered, insulin)


def test_a_sequence_by_hand() -> None:
    found = as_readings(by_hand(), range(2))
    # Of the entries while nothing is heard, that before the first reading is left out.
    assert found.row.tolist() == [list(range(10)), [2, 3, 4, 6, 8, 9, -1, -1, -1, -1]]
    assert found.elapsed[1].tolist() == [1, 1, 1, 2, 2, 1, 1, 1, 1, 1]
    assert found.silence[1].tolist() == [1, 1, 0, 3, 2, 1, 0, 0, 0, 0]
    # Half an hour after row 2 is row 8, after row 3 row 9; further on there is nothing to compare with.
    assert found.change[1, :2].tolist() == [6, 6]
    assert bool(found.change[1, 2:].isnan().all())
    assert found.change[0, :4].tolist() == [6] * 4
    column = {name: found.samples[1, :6, index] for index, name in enumerate(FEATURES)}
    torch.testing.assert_close(column["reading"] * 4 + 8, torch.tensor([12.0, 13, 13, 16, 18, 19]))
    assert column["heard"].tolist() == [1, 1, 0, 1, 1, 1]
    torch.testing.assert_close(column["carbohydrates"] * 50, torch.tensor([0.0, 0, 20, 30, 0, 40]))
    torch.testing.assert_close(column["insulin"] * 3, torch.tensor([0.0, 0, 1, 0, 0, 2]))
    torch.testing.assert_close(column["log of elapsed time"].exp(), torch.tensor([1.0, 1, 1, 2, 2, 1]))
    torch.testing.assert_close(column["log of silence"].exp(), torch.tensor([1.0, 1, 1, 3, 2, 1]))
    assert float(found.samples[1, 6:].abs().max()) == 0


def test_whoever_is_trained_on_is_not_tested_on() -> None:
    task = make_task(train=3, validation=2, test=2, days=1)
    seen = [set(part) for part in task.people.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 7
    assert [len(part.samples) for part in (task.train, task.validation, task.test)] == [3, 2, 2]
    again = make_task(train=3, validation=2, test=2, days=1)
    torch.testing.assert_close(again.test.samples, task.test.samples, rtol=0, atol=0)
    counts = task.test.change.isfinite()
    assert bool((task.test.row[counts] + HORIZON < 288).all())
    with pytest.raises(ValueError, match="test=0"):
        make_task(train=3, validation=2, test=0)


def test_gaps_of_one_length() -> None:
    full = draw_cohort(CohortConfig(subjects=1, days=1, gaps_per_day=0, lost=0), 2)
    same, first = planted_gaps(full, 0, present=24)
    np.testing.assert_array_equal(same.readings, full.readings)
    assert first.tolist() == list(range(24, 288, 24))
    cut, first = planted_gaps(full, 7, present=24)
    assert first.tolist() == list(range(31, 288, 31))
    found = as_readings(cut, range(1))
    after = torch.isin(found.row[0], torch.as_tensor(first))
    assert set(found.silence[0][after].tolist()) == {8}
    assert set(found.silence[0][~after].tolist()) <= {0, 1}
    # The same seed without gaps has the readings that gaps leave standing.
    own = draw_cohort(CohortConfig(subjects=1, days=1), 2)
    seen = np.isfinite(own.readings)
    np.testing.assert_array_equal(own.readings[seen], full.readings[seen])
    with pytest.raises(ValueError, match="the cohort has gaps of its own"):
        planted_gaps(own, 3)


def test_the_table_holds_what_the_sequence_tells() -> None:
    cohort = by_hand()
    table = table_of_lags(cohort, as_readings(cohort, [1]), [1])
    assert table.shape == (5, 13 + 8 + 3)
    np.testing.assert_array_equal(table[2, :7], [16, GONE, GONE, 13, 12, GONE, GONE])
    # Carbohydrates of the last 30 minutes at row 6 are those of rows 1 to 6; at row 9 those of rows 4 to 9.
    assert table[2, 13] == 60
    assert table[4, 13:17].tolist() == [90, 100, 100, 100]
    assert table[4, 17] == 3
    torch.testing.assert_close(torch.tensor(table[:, 21]).exp(), torch.tensor([1.0, 1, 3, 2, 1]).double())
    filled = carried_forward(table)
    assert filled[2, :7].tolist() == [16, 13, 13, 13, 12, 12, 12]
    np.testing.assert_array_equal(filled[:, 13:], table[:, 13:])


def test_errors_are_counted_where_there_is_something_to_compare_with() -> None:
    readings = Readings(
        torch.zeros(2, 3, 8),
        torch.ones(2, 3),
        torch.tensor([[1.0, 4, 9], [1, 1, 0]]),
        torch.tensor([[1.0, 2, 3], [4, GONE, GONE]]),
        torch.tensor([[0, 4, 13], [0, 1, -1]]),
    )
    found = summarise(squared_errors(np.zeros((2, 3)), readings), readings)
    assert found["rmse"] == pytest.approx(math.sqrt(30 / 4))
    assert found["by_person"] == pytest.approx([math.sqrt(14 / 3), 4])
    assert found["by_gap"] == pytest.approx(
        {"no gap": math.sqrt(17 / 2), "10 to 25 minutes": 2, "30 minutes and more": 3}
    )
    assert found["counts"] == {"no gap": 2, "10 to 25 minutes": 1, "30 minutes and more": 1}


def test_training_learns_and_a_seed_repeats_it() -> None:
    cohort = draw_cohort(CohortConfig(subjects=3, days=1), 4)
    readings = as_readings(cohort, range(3))
    runs = []
    for seed in (0, 0, 1):
        model = SignalModel(SignalConfig(len(FEATURES), "clock", 8), torch.Generator().manual_seed(0))
        before = summarise(squared_errors(forecast_change(model, readings), readings), readings)["rmse"]
        losses = train_forecaster(
            model, readings, learning_rate=1e-2, steps=30, batch_size=4, length=96, warm_up=8, seed=seed
        )
        after = summarise(squared_errors(forecast_change(model, readings), readings), readings)["rmse"]
        assert after < 0.95 * before
        runs.append(losses)
    assert runs[0] == runs[1] != runs[2]


def test_targets_do_not_leak_into_what_is_seen() -> None:
    """Changing every reading from some row on changes no sample before it."""
    cohort = draw_cohort(CohortConfig(subjects=1, days=1), 6)
    later = dataclasses.replace(cohort, readings=np.where(np.arange(288) >= 200, cohort.readings + 3, cohort.readings))
    first, second = as_readings(cohort, [0]), as_readings(later, [0])
    early = first.row[0] < 200
    torch.testing.assert_close(first.samples[0][early], second.samples[0][early], rtol=0, atol=0)
    assert not torch.equal(first.change[0][early].nan_to_num(), second.change[0][early].nan_to_num())
