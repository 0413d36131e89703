"""Glucose and insulin of a person with type 1 diabetes, simulated: the model of Hovorka and colleagues.

Hovorka R, Canonico V, Chassin LJ, et al. Nonlinear model predictive control of glucose concentration in subjects with
type 1 diabetes. Physiological Measurement 25, 905-920, 2004, doi:10.1088/0967-3334/25/4/010. Everything that this
module makes is synthetic. It says how such a curve can look, and nothing about any person.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.integrate import solve_ivp

GRAM = 1000 / 180.16  # mmol of glucose in a gram of carbohydrate
UNIT = 1000.0  # mU in a unit of insulin
STATES = ("gut 1", "gut 2", "depot 1", "depot 2", "insulin", "x1", "x2", "x3", "plasma", "tissue", "sensor")

Values = float | Float[np.ndarray, "subjects"]


@dataclass(frozen=True)
class Physiology:
    """The parameters of one subject, or of several as arrays of one length; the defaults are the paper's means.

    Amounts are per kilogram of body weight, as in the paper. The sensor's lag is not in that model; the simulators
    built on it have a compartment of this kind between blood and sensor (Wilinska et al. 2010,
    doi:10.1177/193229681000400117), and the time that it has here is a round choice of ours.

    Attributes:
        weight: body weight, kg (a choice of ours).
        k12: transfer of glucose from the tissues back to the plasma, 1/min.
        ka1, ka2, ka3: decay of insulin's action on transport, disposal and production, 1/min.
        ke: elimination of insulin from plasma, 1/min.
        si1: sensitivity of transport to insulin, 1/min per mU/L.
        si2: sensitivity of disposal to insulin, 1/min per mU/L.
        si3: sensitivity of the liver's production to insulin, per mU/L.
        egp0: the liver's production of glucose without insulin, mmol/kg/min.
        f01: use of glucose that needs no insulin, mmol/kg/min.
        vg: volume in which glucose is distributed, L/kg.
        vi: volume in which insulin is distributed, L/kg.
        ag: share of the carbohydrates that reaches the blood.
        tmax_g: time at which the gut delivers most, min.
        tmax_i: time at which the depot under the skin delivers most, min.
        lag: time constant from plasma to the sensor's fluid, min.

    Raises:
        ValueError: a parameter is not positive and finite, or the liver makes less glucose without insulin than is
            used without it, so that no dose of insulin could keep the glucose level.
    """

    weight: Values = 75.0
    k12: Values = 0.066
    ka1: Values = 0.006
    ka2: Values = 0.06
    ka3: Values = 0.03
    ke: Values = 0.138
    si1: Values = 51.2e-4
    si2: Values = 8.2e-4
    si3: Values = 520e-4
    egp0: Values = 0.0161
    f01: Values = 0.0097
    vg: Values = 0.16
    vi: Values = 0.12
    ag: Values = 0.8
    tmax_g: Values = 40.0
    tmax_i: Values = 55.0
    lag: Values = 10.0

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = np.asarray(getattr(self, item.name), dtype=float)
            if not (np.isfinite(value).all() and (value > 0).all()):
                raise ValueError(f"{item.name} must be positive and finite, got {getattr(self, item.name)!r}")
        if np.any(np.asarray(self.egp0) <= np.asarray(self.f01)):
            raise ValueError(
                f"egp0={self.egp0!r} is not above f01={self.f01!r}: the level would fall even without insulin"
            )

    @property
    def subjects(self) -> int:
        """How many subjects these parameters describe."""
        return max(np.size(getattr(self, item.name)) for item in dataclasses.fields(self))


def uptake_without_insulin(body: Physiology, glucose: np.ndarray) -> np.ndarray:
    """Glucose used without insulin, mmol/kg/min: constant, and less where there is too little (paper's F01c)."""
    return body.f01 * np.minimum(glucose / 4.5, 1.0)


def lost_in_urine(body: Physiology, glucose: np.ndarray) -> np.ndarray:
    """Glucose that the kidneys let pass above 9 mmol/L, mmol/kg/min (paper's FR)."""
    return 0.003 * np.maximum(glucose - 9.0, 0.0) * body.vg


def derivative(
    body: Physiology, state: Float[np.ndarray, "states subjects"], basal: Values, sensitivity: Values = 1.0
) -> Float[np.ndarray, "states subjects"]:
    """Change of every state per minute.

    Args:
        body: the subjects.
        state: in the order of ``STATES``: glucose in the gut's two compartments, mmol/kg; insulin in the depot's two,
            mU/kg; insulin in plasma, mU/L; its three actions, 1/min, 1/min and a share; glucose in plasma and in
            the tissues, mmol/kg; glucose at the sensor, mmol/L.
        basal: insulin that the pump gives all the time, mU/kg/min.
        sensitivity: factor on all three sensitivities to insulin, for the hour of the day.
    """
    gut1, gut2, depot1, depot2, insulin, x1, x2, x3, plasma, tissue, sensor = state
    glucose = plasma / body.vg
    made = body.egp0 * np.maximum(1.0 - x3, 0.0)  # a large dose stops the liver, and does not turn it around
    used = uptake_without_insulin(body, glucose) + lost_in_urine(body, glucose)
    return np.stack(
        [
            -gut1 / body.tmax_g,
            (gut1 - gut2) / body.tmax_g,
            basal - depot1 / body.tmax_i,
            (depot1 - depot2) / body.tmax_i,
            depot2 / body.tmax_i / body.vi - body.ke * insulin,
            body.ka1 * (body.si1 * sensitivity * insulin - x1),
            body.ka2 * (body.si2 * sensitivity * insulin - x2),
            body.ka3 * (body.si3 * sensitivity * insulin - x3),
            made + gut2 / body.tmax_g - used - x1 * plasma + body.k12 * tissue,
            x1 * plasma - (body.k12 + x2) * tissue,
            (glucose - sensor) / body.lag,
        ]
    )


def steady_state(body: Physiology, glucose: Values) -> tuple[Float[np.ndarray, "states subjects"], np.ndarray]:
    """The state in which nothing changes at this glucose level, and the basal insulin that holds it.

    In balance each action is its sensitivity times the insulin I, and what the liver makes equals what is used:
    ``egp0 (1 - si3 I) = used + si2 I tissue`` with ``tissue = si1 I plasma / (k12 + si2 I)``: a quadratic in I.

    Args:
        body: the subjects.
        glucose: level to be held, mmol/L.

    Returns:
        The states, and insulin in mU/kg/min.

    Raises:
        ValueError: the level is not positive, or the kidneys lose so much at it that no insulin is needed.
    """
    count = max(body.subjects, np.size(glucose))
    level = np.broadcast_to(np.asarray(glucose, dtype=float), count)
    if not (np.isfinite(level).all() and (level > 0).all()):
        raise ValueError(f"glucose must be positive, in mmol/L, got {glucose!r}")
    plasma = level * body.vg
    spare = body.egp0 - uptake_without_insulin(body, level) - lost_in_urine(body, level)
    if np.any(spare <= 0):
        raise ValueError(
            f"at glucose={glucose!r} mmol/L more is used and lost than the liver makes: choose a lower level"
        )
    a = body.si2 * (body.egp0 * body.si3 + body.si1 * plasma)
    b = body.k12 * body.egp0 * body.si3 - body.si2 * spare
    c = -body.k12 * spare
    insulin = (-b + np.sqrt(b**2 - 4 * a * c)) / (2 * a)
    basal = insulin * body.vi * body.ke
    depot = basal * body.tmax_i
    tissue = body.si1 * insulin * plasma / (body.k12 + body.si2 * insulin)
    rows = (
        0,
        0,
        depot,
        depot,
        insulin,
        body.si1 * insulin,
        body.si2 * insulin,
        body.si3 * insulin,
        plasma,
        tissue,
        level,
    )
    return np.stack([np.broadcast_to(np.asarray(row, dtype=float), count) for row in rows]), basal


def simulate(
    body: Physiology,
    fasting: Values,
    carbohydrates: Float[np.ndarray, "subjects steps"],
    boluses: Float[np.ndarray, "subjects steps"],
    *,
    step: float = 5.0,
    swing: Values = 0.0,
    phase: Values = 0.0,
    rescue: float | None = None,
) -> tuple[Float[np.ndarray, "subjects steps states"], Float[np.ndarray, "subjects steps"]]:
    """Glucose and insulin from a balance on, with meals and doses of insulin at the beginning of steps.

    Args:
        body: the subjects.
        fasting: level that the basal insulin holds when nothing is eaten, mmol/L; the simulation begins there.
        carbohydrates: eaten at each step, g.
        boluses: insulin given at each step beyond the basal, U.
        step: minutes between two rows of the result.
        swing: share by which the sensitivity to insulin rises and falls over the day, below 1.
        phase: time of day at which it rises through its mean, min.
        rescue: where given, whoever falls below this level, mmol/L, eats 15 g at once, at most every 20 minutes.

    Returns:
        The state just before each step's meal and dose, and what was eaten, the rescues included, g.

    Raises:
        ValueError: shapes that clash, a negative amount, a step that is not positive, or a swing outside [0, 1).
        RuntimeError: the solver gave up.
    """
    if carbohydrates.shape != boluses.shape or carbohydrates.ndim != 2:
        raise ValueError(
            f"carbohydrates {carbohydrates.shape} and boluses {boluses.shape} must both be (subjects, steps)"
        )
    count, steps = carbohydrates.shape
    for name, size in (("the parameters", body.subjects), ("fasting", np.size(fasting))):
        if size not in (1, count):
            raise ValueError(f"{name} describe {size} subjects, carbohydrates and boluses {count}")
    if min(carbohydrates.min(initial=0), boluses.min(initial=0)) < 0:
        raise ValueError("carbohydrates and boluses must not be negative")
    if not step > 0 or np.any((np.asarray(swing) < 0) | (np.asarray(swing) >= 1)):
        raise ValueError(f"step={step} must be positive and swing={swing!r} in [0, 1)")

    state, basal = steady_state(body, np.broadcast_to(np.asarray(fasting, dtype=float), count))
    eaten = carbohydrates.astype(float)
    rows = np.empty((count, steps, len(STATES)))
    rescued = np.full(count, -np.inf)

    def change(time: float, flat: np.ndarray) -> np.ndarray:
        sensitivity = 1.0 + swing * np.sin(2 * np.pi * (time - phase) / 1440)
        return derivative(body, flat.reshape(len(STATES), count), basal, sensitivity).ravel()

    for index in range(steps):
        rows[:, index] = state.T
        time = index * step
        if rescue is not None:
            low = (state[8] / body.vg < rescue) & (time - rescued >= 20)
            eaten[low, index] += 15.0
            rescued[low] = time
        state = state.copy()
        state[0] += body.ag * eaten[:, index] * GRAM / body.weight
        state[2] += boluses[:, index] * UNIT / body.weight
        solution = solve_ivp(change, (time, time + step), state.ravel(), rtol=1e-6, atol=1e-8)
        if not solution.success:
            raise RuntimeError(f"no solution from minute {time:g} on: {solution.message}")
        state = solution.y[:, -1].reshape(state.shape)
    return rows, eaten
