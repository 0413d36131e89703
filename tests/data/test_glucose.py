"""The simulated glucose: balances, closed forms, units, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import expm

from medarch.data.glucose import (
    GRAM,
    STATES,
    Physiology,
    derivative,
    lost_in_urine,
    simulate,
    steady_state,
    uptake_without_insulin,
)

MANY = Physiology(
    weight=np.array([56.0, 75.0, 93.0]), si1=np.array([3e-3, 5.12e-3, 9e-3]), tmax_g=np.array([29.0, 40.0, 61.0])
)


def fasting_day(body: Physiology, subjects: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((subjects, steps)), np.zeros((subjects, steps))


@pytest.mark.parametrize("level", [4.1, 6.3, 9.7])
def test_nothing_changes_in_the_steady_state(level: float) -> None:
    state, basal = steady_state(MANY, level)
    assert state.shape == (len(STATES), 3)
    np.testing.assert_allclose(derivative(MANY, state, basal), 0, atol=1e-15)
    np.testing.assert_allclose(state[STATES.index("plasma")] / MANY.vg, level)
    rows, _ = simulate(MANY, level, *fasting_day(MANY, 3, 37))
    np.testing.assert_allclose(rows[:, -1].T, state, rtol=1e-9)


def test_basal_insulin_is_of_the_order_of_a_pump() -> None:
    _, basal = steady_state(Physiology(), 5.5)
    units_per_hour = float(basal[0]) * 75.0 * 60 / 1000
    assert 0.2 < units_per_hour < 2  # published basal rates of adults are around one unit an hour


def test_gut_and_depot_follow_their_closed_forms() -> None:
    """A dose d leaves d (t / tau) exp(-t / tau) in the second compartment."""
    carbohydrates, boluses = fasting_day(MANY, 3, 41)
    carbohydrates[:, 0], boluses[:, 0] = 53.0, 2.5
    rows, _ = simulate(MANY, 6.0, carbohydrates, boluses)
    start, _ = steady_state(MANY, 6.0)
    time = np.arange(41) * 5.0
    for name, dose, tau in (
        ("gut 2", 0.8 * 53.0 / 0.18016 / MANY.weight, MANY.tmax_g),
        ("depot 2", 2500 / MANY.weight, np.full(3, 55.0)),
    ):
        index = STATES.index(name)
        expected = dose[:, None] * (time / tau[:, None]) * np.exp(-time / tau[:, None])
        np.testing.assert_allclose(rows[:, 1:, index] - start[index][:, None], expected[:, 1:], rtol=1e-5, atol=1e-7)


def test_the_insulin_path_is_linear_and_matches_the_matrix_exponential() -> None:
    body = Physiology()
    boluses = np.zeros((1, 30))
    boluses[0, 0] = 3.0
    rows, _ = simulate(body, 6.0, np.zeros((1, 30)), boluses)
    start, _ = steady_state(body, 6.0)
    names = ["depot 1", "depot 2", "insulin", "x1", "x2", "x3"]
    chosen = [STATES.index(name) for name in names]
    matrix = np.zeros((6, 6))
    matrix[0, 0] = matrix[1, 1] = -1 / body.tmax_i
    matrix[1, 0] = 1 / body.tmax_i
    matrix[2, 1], matrix[2, 2] = 1 / body.tmax_i / body.vi, -body.ke
    for row, (rate, sensitivity) in enumerate(
        [(body.ka1, body.si1), (body.ka2, body.si2), (body.ka3, body.si3)], start=3
    ):
        matrix[row, 2], matrix[row, row] = rate * sensitivity, -rate
    impulse = np.eye(6)[0] * 3000 / 75.0
    for index in (1, 7, 29):
        expected = start[chosen, 0] + expm(matrix * index * 5.0) @ impulse
        np.testing.assert_allclose(rows[0, index, chosen], expected, rtol=1e-5)


def test_no_glucose_is_made_or_lost_on_the_way() -> None:
    """What gut, plasma and tissue gain together is what the liver makes, less uptake, urine and disposal."""
    generator = np.random.default_rng(3)
    state = generator.uniform(0.1, 2.0, (len(STATES), 3))
    change = dict(zip(STATES, derivative(MANY, state, 0.2), strict=True))
    held = dict(zip(STATES, state, strict=True))
    glucose = held["plasma"] / MANY.vg
    made = MANY.egp0 * np.maximum(1 - held["x3"], 0)
    spent = uptake_without_insulin(MANY, glucose) + lost_in_urine(MANY, glucose) + held["x2"] * held["tissue"]
    gained = change["gut 1"] + change["gut 2"] + change["plasma"] + change["tissue"]
    np.testing.assert_allclose(gained, made - spent, atol=1e-14)


def test_all_insulin_that_is_given_is_eliminated() -> None:
    boluses = np.zeros((1, 400))
    boluses[0, 3] = 4.0
    rows, _ = simulate(Physiology(), 6.0, np.zeros((1, 400)), boluses)
    insulin = rows[0, :, STATES.index("insulin")]
    cleared = np.trapezoid(insulin - insulin[0], dx=5.0) * 0.138 * 0.12 * 75.0
    assert cleared == pytest.approx(4000, rel=2e-3)


def test_thresholds_meet_without_a_jump() -> None:
    body, near = Physiology(), np.array([4.5 - 1e-9, 4.5 + 1e-9, 9 - 1e-9, 9 + 1e-9])
    assert np.ptp(uptake_without_insulin(body, near[:2])) < 1e-10
    assert np.ptp(lost_in_urine(body, near[2:])) < 1e-10
    assert lost_in_urine(body, np.array([11.0]))[0] == pytest.approx(0.003 * 2 * 0.16)
    assert pytest.approx(1 / 0.18016) == GRAM


def test_subjects_together_are_as_each_alone_and_a_finer_step_changes_nothing() -> None:
    carbohydrates, boluses = fasting_day(MANY, 3, 40)
    carbohydrates[:, 4], boluses[:, 4] = [30, 50, 70], [1, 2, 3]
    together, _ = simulate(MANY, 6.5, carbohydrates, boluses, swing=0.2, phase=100.0)
    alone = Physiology(weight=56.0, si1=3e-3, tmax_g=29.0)
    single, _ = simulate(alone, 6.5, carbohydrates[:1], boluses[:1], swing=0.2, phase=100.0)
    np.testing.assert_allclose(together[0], single[0], rtol=1e-4, atol=1e-7)
    fine_meals, fine_doses = np.zeros((3, 80)), np.zeros((3, 80))
    fine_meals[:, ::2], fine_doses[:, ::2] = carbohydrates, boluses
    fine, _ = simulate(MANY, 6.5, fine_meals, fine_doses, step=2.5, swing=0.2, phase=100.0)
    np.testing.assert_allclose(fine[:, ::2], together, rtol=1e-4, atol=1e-7)


def test_insulin_lowers_and_meals_raise() -> None:
    carbohydrates, boluses = np.zeros((3, 60)), np.zeros((3, 60))
    carbohydrates[1, 5], boluses[2, 5] = 40.0, 2.0
    rows, _ = simulate(Physiology(), 6.0, carbohydrates, boluses)
    plasma = rows[:, 30, STATES.index("plasma")] / 0.16
    assert plasma[2] < plasma[0] - 0.5 < plasma[0] + 1 < plasma[1]
    assert plasma[0] == pytest.approx(6.0)


def test_whoever_falls_low_eats_and_waits_twenty_minutes() -> None:
    boluses = np.zeros((2, 60))
    boluses[1, 0] = 8.0
    _, eaten = simulate(Physiology(), 6.0, np.zeros((2, 60)), boluses, rescue=3.5)
    assert eaten[0].sum() == 0
    times = np.flatnonzero(eaten[1])
    assert len(times) > 1
    assert set(eaten[1][times]) == {15.0}
    assert np.diff(times).min() == 4


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="si1 must be positive"):
        Physiology(si1=np.array([1e-3, -1e-3]))
    with pytest.raises(ValueError, match=r"egp0=0\.009 is not above f01"):
        Physiology(egp0=0.009)
    with pytest.raises(ValueError, match=r"at glucose=60\.0 mmol/L more is used"):
        steady_state(Physiology(), 60.0)
    with pytest.raises(ValueError, match="glucose must be positive"):
        steady_state(Physiology(), 0.0)
    meals = np.zeros((2, 5))
    with pytest.raises(ValueError, match=r"carbohydrates \(2, 5\) and boluses \(2, 4\)"):
        simulate(Physiology(), 6.0, meals, meals[:, :4])
    with pytest.raises(ValueError, match="the parameters describe 3 subjects, carbohydrates and boluses 2"):
        simulate(MANY, 6.0, meals, meals)
    with pytest.raises(ValueError, match="must not be negative"):
        simulate(Physiology(), 6.0, meals - 1, meals)
    with pytest.raises(ValueError, match=r"swing=1\.0"):
        simulate(Physiology(), 6.0, meals, meals, swing=1.0)


def test_the_parameters_are_those_of_the_paper() -> None:
    """The means of Hovorka et al. (2004), written out a second time, so that a slip in one of them shows."""
    body = Physiology()
    assert (body.k12, body.ka1, body.ka2, body.ka3) == (0.066, 0.006, 0.06, 0.03)
    assert (body.si1, body.si2, body.si3) == (51.2e-4, 8.2e-4, 520e-4)
    assert (body.egp0, body.f01, body.ke) == (0.0161, 0.0097, 0.138)
    assert (body.vg, body.vi, body.ag, body.tmax_g, body.tmax_i) == (0.16, 0.12, 0.8, 40.0, 55.0)
    assert uptake_without_insulin(body, np.array([2.25, 4.5, 9.0])).tolist() == [0.0097 / 2, 0.0097, 0.0097]
