"""A forecasting task on simulated glucose with gaps, and what is tried on it.

At every reading of the sensor, its value half an hour later is to be foretold, from the readings so far, the
carbohydrates entered and the insulin given. Nobody who is trained on is tested on. A sequence has one row for each
reading, and one for each entry that was made while the sensor was silent. Where nothing happens no row is made up, and
the next one says how much time has passed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from medarch.data.glucose_cohort import DAY, STEP, Cohort, CohortConfig, draw_cohort
from medarch.lm.signal_model import SignalConfig, SignalModel

FEATURES = (
    "reading",  # the last one, where there is none
    "heard",  # 1 where there is one
    "log of elapsed time",
    "log of silence",
    "carbohydrates",
    "insulin",
    "sine of the hour",
    "cosine of the hour",
)
HORIZON = 6  # steps of five minutes
SCALE = 2.0  # mmol/L in one unit of a model's output
MEAN, SPREAD = 8.0, 4.0  # about those of the readings, mmol/L


@dataclass(frozen=True)
class Readings:
    """The readings and entries of several people as sequences, padded at the end to the longest.

    Attributes:
        samples: ``FEATURES`` of each row.
        elapsed: time since the row before, in steps of five minutes; 1 at the first.
        silence: time since the reading before, at each row with a reading, likewise; 0 at rows without one.
        change: what is to be foretold, the reading half an hour later less this one, mmol/L; not a number at rows
            without a reading, where the sensor was silent half an hour later, and in the padding.
        row: place of each row on the five-minute grid; -1 in the padding.
    """

    samples: Float[Tensor, "people rows features"]
    elapsed: Float[Tensor, "people rows"]
    silence: Float[Tensor, "people rows"]
    change: Float[Tensor, "people rows"]
    row: Int[Tensor, "people rows"]


def as_readings(cohort: Cohort, people: Sequence[int]) -> Readings:
    """The sequences of some people of a cohort.

    Args:
        cohort: simulated days.
        people: which of its subjects.
    """
    sequences = [_one(cohort, person) for person in people]
    longest = max(len(row) for *_, row in sequences)

    def padded(position: int, fill: float) -> Tensor:
        parts = [sequence[position] for sequence in sequences]
        joined = torch.full((len(parts), longest, *parts[0].shape[1:]), fill, dtype=torch.float64)
        for index, part in enumerate(parts):
            joined[index, : len(part)] = torch.as_tensor(part, dtype=torch.float64)
        return joined

    samples, elapsed, silence, change, row = (
        padded(position, fill) for position, fill in enumerate((0, 1, 0, math.nan, -1))
    )
    return Readings(samples.float(), elapsed.float(), silence.float(), change.float(), row.long())


def _one(cohort: Cohort, person: int) -> tuple[np.ndarray, ...]:
    """One person's rows, from the first reading on, in the order of the fields of ``Readings``."""
    reading, entered = cohort.readings[person], cohort.entered[person]
    heard = np.isfinite(reading)
    row = np.flatnonzero(heard | (entered > 0))
    row = row[row >= np.argmax(heard)]
    elapsed = np.diff(row, prepend=row[0] - 1)
    # The row of the last reading before each row, and at or before it.
    last = np.maximum.accumulate(np.where(heard, np.arange(len(reading)), -1))
    before = np.concatenate([[-1], last[:-1]])[row]
    silence = np.where(before >= 0, row - before, 1)
    later = np.concatenate([reading, np.full(HORIZON, np.nan)])[row + HORIZON]
    angle = 2 * np.pi * row * STEP / DAY
    samples = [
        (reading[last[row]] - MEAN) / SPREAD,
        heard[row],
        np.log(elapsed),
        np.log(silence),
        entered[row] / 50,
        cohort.insulin[person, row] / 3,
        np.sin(angle),
        np.cos(angle),
    ]
    return np.stack(samples, axis=1), elapsed, silence * heard[row], later - reading[row], row


@dataclass(frozen=True)
class Task:
    """People to train on, to choose with and to test on.

    Attributes:
        cohort: all of them.
        train, validation, test: their sequences.
        people: which subjects of the cohort each part has.
    """

    cohort: Cohort
    train: Readings
    validation: Readings
    test: Readings
    people: dict[str, range]


def make_task(train: int = 40, validation: int = 10, test: int = 20, days: int = 3, seed: int = 0) -> Task:
    """Draws a cohort and splits it by person.

    Raises:
        ValueError: a part would be empty.
    """
    if min(train, validation, test) < 1:
        raise ValueError(f"train={train}, validation={validation} and test={test} must each have at least one person")
    count = train + validation + test
    cohort = draw_cohort(CohortConfig(subjects=count, days=days), seed)
    people = {
        "train": range(train),
        "validation": range(train, train + validation),
        "test": range(train + validation, count),
    }
    parts = {name: as_readings(cohort, part) for name, part in people.items()}
    return Task(cohort, parts["train"], parts["validation"], parts["test"], people)


def planted_gaps(cohort: Cohort, silent: int, present: int = 24) -> tuple[Cohort, np.ndarray]:
    """The cohort with gaps of one length instead of its own: ``present`` readings, ``silent`` steps without, again.

    Args:
        cohort: with a reading at every step.
        silent: steps of each gap; 0 leaves the readings as they are.
        present: readings between two gaps.

    Returns:
        The cohort, and the rows of the grid at which the first reading after a gap stands (without gaps, those at
        which one would begin).

    Raises:
        ValueError: readings are missing already.
    """
    if not np.isfinite(cohort.readings).all():
        raise ValueError("the cohort has gaps of its own: draw it with gaps_per_day=0 and lost=0")
    steps = cohort.readings.shape[1]
    place = np.arange(steps) % (present + silent)
    readings = np.where(place < present, cohort.readings, np.nan)
    first = np.flatnonzero((place == 0) & (np.arange(steps) > 0))
    fields = {name: getattr(cohort, name) for name in ("glucose", "carbohydrates", "entered", "insulin")}
    return Cohort(readings=readings, **fields), first


def configs() -> dict[str, SignalConfig]:
    """One model of each mixer, at about the same number of weights."""
    features = len(FEATURES)
    return {
        "selective": SignalConfig(features, "selective", hidden_size=24),
        "clock": SignalConfig(features, "clock", hidden_size=29),
        "count": SignalConfig(features, "count", hidden_size=29),
        "recurrent": SignalConfig(features, "recurrent", hidden_size=24, recurrent_size=28),
        "convolution": SignalConfig(features, "convolution", hidden_size=19, num_layers=4),
        "attention": SignalConfig(features, "attention", hidden_size=24, intermediate_size=40),
    }


def train_forecaster(
    model: SignalModel,
    readings: Readings,
    *,
    learning_rate: float,
    steps: int = 300,
    batch_size: int = 8,
    length: int = 192,
    warm_up: int = 24,
    seed: int = 0,
) -> list[float]:
    """Trains a model in place on stretches of the sequences.

    Args:
        model: to be trained.
        readings: of the people to train on.
        learning_rate: of Adam with decoupled decay, after a rise over the first tenth; then half a cosine to zero.
        steps: updates.
        batch_size: stretches behind an update.
        length: readings of a stretch.
        warm_up: first readings of a stretch that do not count, because the model has seen too little there.
        seed: of the choice of stretches.

    Returns:
        The mean squared error of each update, in (mmol/L)².
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    lengths = (readings.row >= 0).sum(1)
    offsets = torch.arange(length)
    losses = []
    for step in range(steps):
        share = min((step + 1) / (steps / 10), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * share
        person = torch.randint(len(lengths), (batch_size, 1), generator=generator)
        room = (lengths[person] - length).clamp(min=1)
        chosen = (torch.rand(batch_size, 1, generator=generator) * room).long() + offsets
        target = readings.change[person, chosen]
        target[:, :warm_up] = math.nan
        counts = target.isfinite()
        forecast = SCALE * model(readings.samples[person, chosen], readings.elapsed[person, chosen])[..., 0]
        loss = (forecast - target)[counts].square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def forecast_change(model: SignalModel, readings: Readings) -> Float[np.ndarray, "people rows"]:
    """What the model foretells of the change over the next half hour, mmol/L, at every reading."""
    return (SCALE * model(readings.samples, readings.elapsed)[..., 0]).numpy()


def table_of_lags(cohort: Cohort, readings: Readings, people: Sequence[int]) -> Float[np.ndarray, "readings columns"]:
    """The same knowledge as a table for methods without a memory, one row a reading, person after person.

    The columns are this reading and the twelve grid points before it (not a number where there was none), the
    carbohydrates and the insulin of the last 30, 60, 120 and 240 minutes, the silence before it and the hour.
    """
    rows = []
    for index, person in enumerate(people):
        at = readings.row[index][readings.silence[index] > 0].numpy()
        reading = np.concatenate([np.full(12, np.nan), cohort.readings[person]])
        lags = np.stack([reading[at + 12 - lag] for lag in range(13)], axis=1)
        columns = [lags]
        for amounts in (cohort.entered[person], cohort.insulin[person]):
            total = np.concatenate([np.zeros(49), np.cumsum(amounts)])
            columns.append(np.stack([total[at + 49] - total[at + 49 - span] for span in (6, 12, 24, 48)], axis=1))
        columns.append(readings.samples[index][readings.silence[index] > 0][:, [3, 6, 7]].numpy())
        rows.append(np.concatenate(columns, axis=1))
    return np.concatenate(rows)


def carried_forward(table: Float[np.ndarray, "readings columns"]) -> Float[np.ndarray, "readings columns"]:
    """The table with missing readings replaced by the one before, or by the earliest that is known, for a linear
    method."""
    lags = table[:, :13].copy()
    for lag in range(11, -1, -1):  # from the oldest on
        lags[:, lag] = np.where(np.isnan(lags[:, lag]), lags[:, lag + 1], lags[:, lag])
    for lag in range(1, 13):
        lags[:, lag] = np.where(np.isnan(lags[:, lag]), lags[:, lag - 1], lags[:, lag])
    return np.concatenate([lags, table[:, 13:]], axis=1)


def squared_errors(forecast: Float[np.ndarray, "people rows"], readings: Readings) -> Float[np.ndarray, "people rows"]:
    """Squared error of each forecast, (mmol/L)²; not a number where there is nothing to compare with."""
    return (forecast - readings.change.numpy()) ** 2


def summarise(errors: Float[np.ndarray, "people rows"], readings: Readings) -> dict[str, Any]:
    """Root mean squared errors, mmol/L: of all forecasts, of each person's, and by the silence before the reading."""
    silence = readings.silence.numpy()
    parts = {
        "no gap": silence < 2,
        "10 to 25 minutes": (silence >= 2) & (silence < 6),
        "30 minutes and more": silence >= 6,
    }
    return {
        "rmse": float(np.sqrt(np.nanmean(errors))),
        "by_person": np.sqrt(np.nanmean(errors, axis=1)).tolist(),
        "by_gap": {name: float(np.sqrt(np.nanmean(errors[chosen]))) for name, chosen in parts.items()},
        "counts": {name: int(np.isfinite(errors[chosen]).sum()) for name, chosen in parts.items()},
    }
