"""Days of simulated people with type 1 diabetes as a sensor would report them: meals, doses, noise and gaps.

Bodies follow the published model of ``medarch.data.glucose``. What the people do, how much they differ, how the sensor
errs and when it is silent are plain choices of this book, made to be plausible and written down in ``CohortConfig``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from medarch.data.cards import DataCard
from medarch.data.glucose import STATES, Physiology, simulate

STEP = 5.0  # minutes between two readings
DAY = 1440


@dataclass(frozen=True)
class CohortConfig:
    """How many people, for how long, and what happens to them. Spreads are standard deviations of logarithms.

    Attributes:
        subjects: people.
        days: days of each.
        sensitivity_spread: of the sensitivity to insulin, one factor for all three.
        absorption_spread: of the times at which gut and depot deliver most.
        swing: largest share by which the sensitivity rises and falls over the day.
        meal_grams: carbohydrates of breakfast, lunch, snack and dinner, g.
        meal_spread: of each meal's size.
        told: share of the meals that are entered, and for which insulin is given.
        counting_spread: of the carbohydrates entered over those eaten.
        grams_per_unit: carbohydrates that one unit of insulin is given for, g, at the mean sensitivity and 75 kg.
        rescue: glucose below which 15 g are eaten at once, and entered, mmol/L.
        noise: standard deviation of the sensor's error, mmol/L.
        noise_minutes: time in which the error's memory falls to 1/e, min.
        gaps_per_day: mean number of gaps.
        gap_minutes: mean length of a gap, min; the lengths are exponentially distributed.
        lost: share of the single readings that are lost besides.

    Raises:
        ValueError: a number outside its range.
    """

    subjects: int = 40
    days: int = 3
    sensitivity_spread: float = 0.3
    absorption_spread: float = 0.2
    swing: float = 0.3
    meal_grams: tuple[float, float, float, float] = (45.0, 65.0, 20.0, 75.0)
    meal_spread: float = 0.3
    told: float = 0.9
    counting_spread: float = 0.25
    grams_per_unit: float = 25.0
    rescue: float = 3.5
    noise: float = 0.5
    noise_minutes: float = 40.0
    gaps_per_day: float = 4.0
    gap_minutes: float = 60.0
    lost: float = 0.05

    def __post_init__(self) -> None:
        for name in ("subjects", "days"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("told", "lost", "swing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must lie in [0, 1], got {getattr(self, name)}")
        for name in ("grams_per_unit", "noise_minutes", "gap_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        rest = ("sensitivity_spread", "absorption_spread", "meal_spread", "counting_spread", "noise", "gaps_per_day")
        for name in rest:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.swing == 1:
            raise ValueError("swing=1 would leave no sensitivity to insulin at all at one hour: choose less")


@dataclass(frozen=True)
class Cohort:
    """What was simulated, and what would be known of it; rows every five minutes from midnight of the first day.

    Attributes:
        glucose: in blood, which nobody sees, mmol/L.
        readings: of the sensor, mmol/L; not a number where there is none.
        carbohydrates: eaten, g.
        entered: carbohydrates as they were entered, g.
        insulin: doses beyond the basal, U.
    """

    glucose: Float[np.ndarray, "subjects steps"]
    readings: Float[np.ndarray, "subjects steps"]
    carbohydrates: Float[np.ndarray, "subjects steps"]
    entered: Float[np.ndarray, "subjects steps"]
    insulin: Float[np.ndarray, "subjects steps"]

    @property
    def minutes(self) -> Float[np.ndarray, "steps"]:
        """Time of each row since the first midnight, min."""
        return np.arange(self.glucose.shape[1]) * STEP


def draw_cohort(config: CohortConfig, seed: int) -> Cohort:
    """Simulates a cohort; the same configuration and seed give the same one.

    Args:
        config: what happens.
        seed: of everything that is drawn.
    """
    generator = np.random.default_rng(seed)
    count, steps = config.subjects, int(config.days * DAY / STEP)

    def factor(spread: float, size: int | tuple[int, ...] = count) -> np.ndarray:
        return np.exp(spread * generator.standard_normal(size))

    mean, sensitivity = Physiology(), factor(config.sensitivity_spread)
    body = Physiology(
        weight=generator.uniform(55, 95, count),
        si1=mean.si1 * sensitivity,
        si2=mean.si2 * sensitivity,
        si3=mean.si3 * sensitivity,
        tmax_g=mean.tmax_g * factor(config.absorption_spread),
        tmax_i=mean.tmax_i * factor(config.absorption_spread),
    )
    ratio = config.grams_per_unit * sensitivity * body.weight / 75
    carbohydrates, entered = np.zeros((count, steps)), np.zeros((count, steps))
    for day in range(config.days):
        for hour, grams in zip((7.5, 12.5, 16.0, 19.0), config.meal_grams, strict=True):
            time = day * DAY + hour * 60 + generator.normal(0, 30, count)
            rows = (np.arange(count), np.clip(time / STEP, 0, steps - 1).astype(int))
            sizes = grams * factor(config.meal_spread)
            carbohydrates[rows] += sizes
            told = generator.random(count) < config.told
            entered[rows] += told * sizes * factor(config.counting_spread)
    insulin = entered / ratio[:, None]
    states, eaten = simulate(
        body,
        generator.uniform(5.0, 8.0, count),
        carbohydrates,
        insulin,
        step=STEP,
        swing=config.swing * generator.random(count),
        phase=generator.uniform(0, DAY, count),
        rescue=config.rescue,
    )
    error = noise((count, steps), config.noise, config.noise_minutes, generator)
    readings = np.clip(states[:, :, STATES.index("sensor")] + error, 2.2, 22.2)
    gone = gaps((count, steps), config, generator)
    return Cohort(
        glucose=states[:, :, STATES.index("plasma")] / body.vg,
        readings=np.where(gone, np.nan, readings),
        carbohydrates=eaten,
        entered=entered + (eaten - carbohydrates),
        insulin=insulin,
    )


def noise(
    shape: tuple[int, int], deviation: float, minutes: float, generator: np.random.Generator
) -> Float[np.ndarray, "subjects steps"]:
    """An error that remembers itself, first-order autoregressive from its stationary state on.

    That sensors err in this way is an observation of Breton and Kovatchev (2008, doi:10.1901/jaba.2008.2-853); they
    use a distribution with heavier tails, and this one is normal.

    Args:
        shape: subjects and steps.
        deviation: standard deviation at every step, mmol/L.
        minutes: time in which the memory falls to 1/e.
        generator: source of randomness.
    """
    keep = np.exp(-STEP / minutes)
    drawn = generator.standard_normal(shape)
    error = np.empty(shape)
    error[:, :1] = drawn[:, :1]
    for index in range(1, shape[1]):
        error[:, index] = keep * error[:, index - 1] + np.sqrt(1 - keep**2) * drawn[:, index]
    return deviation * error


def gaps(
    shape: tuple[int, int], config: CohortConfig, generator: np.random.Generator
) -> Bool[np.ndarray, "subjects steps"]:
    """Where the sensor is silent: gaps that begin at any time and last for an exponential time, and single losses.

    Args:
        shape: subjects and steps.
        config: how many gaps, how long, and the share of single losses.
        generator: source of randomness.
    """
    gone = generator.random(shape) < config.lost
    begins = generator.random(shape) < config.gaps_per_day * STEP / DAY
    lengths = np.ceil(generator.exponential(config.gap_minutes, shape) / STEP).astype(int)
    for subject, first in zip(*np.nonzero(begins), strict=True):
        gone[subject, first : first + lengths[subject, first]] = True
    return gone


CARD = DataCard(
    name="Simulated glucose of people with type 1 diabetes",
    source="Synthetic. Made on this machine by medarch.data.glucose_cohort from the differential equations and mean "
    "parameters of Hovorka et al. (2004); people, meals, doses, sensor errors and gaps are drawn at random",
    version="Default configuration; the checksum is that of the model's parameters and of this configuration",
    licence="The code's own licence, MIT. The equations and numbers are those of the publication",
    size="40 simulated people for 3 days, a reading every 5 minutes with gaps, the entered carbohydrates and the doses "
    "of insulin; any other size can be drawn",
    citation="Hovorka R, Canonico V, Chassin LJ, et al. Nonlinear model predictive control of glucose concentration in "
    "subjects with type 1 diabetes. Physiological Measurement 25, 905-920, 2004, doi:10.1088/0967-3334/25/4/010",
    sha256=hashlib.sha256(
        json.dumps([dataclasses.asdict(Physiology()), dataclasses.asdict(CohortConfig())]).encode()
    ).hexdigest(),
    may_not_be_used_for="Any statement about people, about a sensor or about a therapy, and any dose. No exercise, "
    "stress, illness or hormone besides insulin occurs in it, and how much the people differ is a choice of the book",
    url="https://doi.org/10.1088/0967-3334/25/4/010",
)
