"""Simulated days: seeds, gaps, noise, and what is entered of what is eaten."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from medarch.data.glucose_cohort import CARD, STEP, CohortConfig, draw_cohort, gaps, noise

SMALL = CohortConfig(subjects=3, days=1)


def test_a_seed_makes_the_cohort_and_another_makes_another() -> None:
    first, again, other = draw_cohort(SMALL, 5), draw_cohort(SMALL, 5), draw_cohort(SMALL, 6)
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
        assert getattr(first, field.name).shape == (3, 288)
    assert not np.array_equal(first.glucose, other.glucose)
    assert first.minutes[-1] == 1435
    assert np.isfinite(first.glucose).all()
    assert first.glucose.min() > 1


def test_without_noise_and_gaps_the_sensor_follows_the_blood_late() -> None:
    plain = draw_cohort(dataclasses.replace(SMALL, noise=0, gaps_per_day=0, lost=0), 1)
    assert np.isfinite(plain.readings).all()
    inside = (plain.glucose[:, :-1] > 2.5) & (plain.glucose[:, :-1] < 22)
    # The lag of ten minutes: the reading's rate is the distance to the blood, over the lag.
    rate = np.diff(plain.readings, axis=1) / STEP
    middle = (plain.glucose[:, :-1] + plain.glucose[:, 1:] - plain.readings[:, :-1] - plain.readings[:, 1:]) / 2
    np.testing.assert_allclose(rate[inside], middle[inside] / 10, atol=0.02)


def test_noise_has_its_deviation_and_its_memory() -> None:
    error = noise((40, 4000), 0.5, 40.0, np.random.default_rng(0))
    assert error.std() == pytest.approx(0.5, rel=0.03)
    assert error[:, 0].std() == pytest.approx(0.5, rel=0.35)  # stationary from the first step on
    lagged = np.corrcoef(error[:, :-8].ravel(), error[:, 8:].ravel())[0, 1]
    assert lagged == pytest.approx(np.exp(-1), abs=0.03)


def test_gaps_cover_the_share_they_should() -> None:
    shape, generator = (50, 2880), np.random.default_rng(2)
    assert not gaps(shape, CohortConfig(gaps_per_day=0, lost=0), generator).any()
    single = gaps(shape, CohortConfig(gaps_per_day=0, lost=0.1), generator)
    assert single.mean() == pytest.approx(0.1, abs=0.005)
    long = gaps(shape, CohortConfig(gaps_per_day=2, gap_minutes=90, lost=0), generator)
    # Gaps that begin at random and overlap leave free what a Poisson number of covers leaves free.
    mean_steps = 1 / (1 - np.exp(-STEP / 90))  # of an exponential length, rounded up
    assert long.mean() == pytest.approx(1 - np.exp(-2 / 288 * mean_steps), abs=0.02)
    ends = np.flatnonzero(np.diff(long[0].astype(int)))
    assert np.diff(ends).max() > 6


def test_only_what_is_told_is_entered_and_dosed() -> None:
    silent = draw_cohort(dataclasses.replace(SMALL, told=0.0, rescue=0.1), 3)
    assert silent.entered.sum() == 0
    assert silent.insulin.sum() == 0
    assert (silent.carbohydrates > 0).sum() == 12
    exact = draw_cohort(dataclasses.replace(SMALL, told=1.0, counting_spread=0.0), 3)
    np.testing.assert_allclose(exact.entered, exact.carbohydrates)
    assert (exact.insulin > 0).sum() == 12
    assert ((exact.insulin > 0) <= (exact.entered > 0)).all()


def test_card_and_bad_input() -> None:
    assert "Synthetic" in CARD.source
    assert len(CARD.sha256) == 64
    with pytest.raises(ValueError, match="subjects must be at least 1"):
        CohortConfig(subjects=0)
    with pytest.raises(ValueError, match=r"told is a share and must lie in \[0, 1\], got 1.2"):
        CohortConfig(told=1.2)
    with pytest.raises(ValueError, match="gap_minutes must be positive"):
        CohortConfig(gap_minutes=0)
    with pytest.raises(ValueError, match="noise must not be negative"):
        CohortConfig(noise=-1)
    with pytest.raises(ValueError, match="swing=1"):
        CohortConfig(swing=1.0)
