"""The forecast of the pulse: nothing is told from what comes later, and it learns more than doing nothing."""

from __future__ import annotations

import pytest
import torch

from medarch.data.pulse import load_recordings
from medarch.ssm.forecast import PulseForecaster, PulseTask, forecast_errors, load_task, train_forecaster
from medarch.ssm.mamba2_config import Mamba2Config

CONFIG = Mamba2Config(6, state_size=3, head_dim=4)


def test_the_task_is_cut_from_one_recording_and_the_parts_do_not_touch() -> None:
    task = load_task(length=24, ahead=5, thin=4)
    recording = load_recordings()[1]
    assert task.train.shape[1] == task.test.shape[1] == 29
    assert task.rate == pytest.approx(recording.rate / 4)
    signal = torch.from_numpy(recording.signal).float()[: len(recording.signal) // 4 * 4].view(-1, 4).mean(1)
    split = len(signal) * 7 // 10
    mean, spread = signal[:split].mean(), signal[:split].std()
    torch.testing.assert_close(task.train[1], (signal[6:35] - mean) / spread)
    torch.testing.assert_close(task.test[0], (signal[split : split + 29] - mean) / spread)
    assert (len(task.train) - 1) * 6 + 29 <= split
    read, later = task.split(task.test)
    assert torch.equal(later[:, :-5], read[:, 5:])


def test_a_forecast_knows_nothing_of_what_comes_later_and_may_be_told_as_the_signal_comes() -> None:
    model = PulseForecaster(CONFIG, torch.Generator().manual_seed(0)).double()
    signal = torch.randn(2, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = model(signal)
    torch.testing.assert_close(model(signal[:, :7]), whole[:, :7])
    state = model.mixer.new_cache(2)
    torch.testing.assert_close(torch.cat([model(each, state) for each in signal.split(1, dim=1)], dim=1), whole)
    assert model.head_inputs(signal).x.shape == (2, 13, 3, 4)


def test_it_learns_a_wave_better_than_no_change_would_do() -> None:
    generator = torch.Generator().manual_seed(2)
    phases = torch.rand(60, 1, generator=generator) * 6.3
    waves = torch.sin(phases + torch.arange(46) * 0.5)
    task = PulseTask(waves[:50], waves[50:], ahead=6, rate=1.0)
    model = train_forecaster(task, CONFIG, generator, steps=60, batch_size=8, warm_up=5)
    errors = forecast_errors(task, model, window=4, skip=10)
    assert errors["linear"] < 1e-3, "a wave is a linear recurrence of itself"
    assert errors["mixer"] < 0.5 * min(errors["last"], errors["mean"])
    assert errors["last"] == pytest.approx(2 * (1 - torch.tensor(3.0).cos().item()) / 2, rel=0.2)


def test_the_linear_forecast_must_have_seen_its_window() -> None:
    task = PulseTask(torch.zeros(3, 20), torch.zeros(3, 20), ahead=2, rate=1.0)
    with pytest.raises(ValueError, match="skip=3 leaves samples with fewer than window=9"):
        forecast_errors(task, PulseForecaster(CONFIG), window=9, skip=3)
