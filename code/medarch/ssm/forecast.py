"""A forecast of the pulse: one Mamba-2 mixer reads a recording sample by sample and says what comes a little later.

It is small enough to be trained while a chapter is executed, and exists to have a trained mixer to look into.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medarch.data.pulse import load_recordings
from medarch.ssm.mamba2 import HeadInputs, Mamba2Mixer
from medarch.ssm.mamba2_config import Mamba2Config
from medarch.ssm.state import RecurrentState


@dataclass(frozen=True)
class PulseTask:
    """Stretches of one recording, the later part of it kept for testing.

    Attributes:
        train: Stretches of the earlier part, overlapping.
        test: Stretches of the later part, one after the other.
        ahead: Samples from what is read last to what is to be told.
        rate: Samples a second, in hertz.
    """

    train: Float[Tensor, "stretches samples"]
    test: Float[Tensor, "others samples"]
    ahead: int
    rate: float

    def split(self, stretches: Float[Tensor, "some samples"]) -> tuple[Tensor, Tensor]:
        """What is read, and what is to be told at each sample of it."""
        return stretches[:, : -self.ahead], stretches[:, self.ahead :]


def load_task(length: int = 96, ahead: int = 10, thin: int = 4) -> PulseTask:
    """The longer of the two recordings, thinned, in units of the earlier part's standard deviation.

    Args:
        length: Samples that are read.
        ahead: Samples from what is read last to what is to be told.
        thin: The mean of so many samples becomes one.
    """
    recording = load_recordings()[1]
    signal = torch.from_numpy(recording.signal).float()
    signal = signal[: len(signal) // thin * thin].view(-1, thin).mean(1)
    earlier, later = signal.split([len(signal) * 7 // 10, len(signal) - len(signal) * 7 // 10])
    whole = length + ahead
    train, test = (
        ((part - earlier.mean()) / earlier.std()).unfold(0, whole, step)
        for part, step in ((earlier, length // 4), (later, whole))
    )
    return PulseTask(train, test, ahead, recording.rate / thin)


class PulseForecaster(nn.Module):
    """A number in, a number out, and between them one mixer.

    Args:
        config: Of the mixer.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: Mamba2Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.encode = nn.Parameter(torch.randn(config.hidden_size, 2, generator=generator))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.mixer = Mamba2Mixer(config, generator)
        self.decode = nn.Parameter(torch.randn(config.hidden_size, generator=generator) * 0.02)

    def forward(
        self, signal: Float[Tensor, "batch time"], state: RecurrentState | None = None
    ) -> Float[Tensor, "batch time"]:
        """What the signal will be, told at each sample from it and those before it."""
        hidden, normed = self._embed(signal)
        return (hidden + self.mixer(normed, state)) @ self.decode

    def head_inputs(self, signal: Float[Tensor, "batch time"]) -> HeadInputs:
        """What the mixer's scan works on."""
        return self.mixer.select(self._embed(signal)[1])[0]

    def _embed(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.linear(torch.stack([signal, torch.ones_like(signal)], dim=-1), self.encode)
        return hidden, F.rms_norm(hidden, hidden.shape[-1:], self.norm, eps=1e-5)


def train_forecaster(
    task: PulseTask,
    config: Mamba2Config,
    generator: torch.Generator,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 1e-2,
    warm_up: int = 24,
) -> PulseForecaster:
    """Trains on random stretches for the squared error, with a step that falls to zero.

    Args:
        task: Where the stretches come from.
        config: Of the mixer.
        generator: Source of randomness.
        steps: Of training.
        batch_size: Stretches of a step.
        learning_rate: Of the first step.
        warm_up: Samples at the beginning of a stretch whose forecasts do not count.
    """
    model = PulseForecaster(config, generator)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        chosen = torch.randint(len(task.train), (batch_size,), generator=generator)
        signal, later = task.split(task.train[chosen])
        loss = (model(signal) - later)[:, warm_up:].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def forecast_errors(task: PulseTask, model: PulseForecaster, window: int = 48, skip: int = 48) -> dict[str, float]:
    """Mean squared error on the test stretches, of the model and of what is simpler.

    Args:
        task: The stretches.
        model: A trained model.
        window: Samples that the linear regression sees.
        skip: Samples at the beginning of a stretch that do not count, so that all have seen enough.

    Returns:
        ``"mean"`` (always the mean), ``"last"`` (no change), ``"linear"`` and ``"mixer"``.
    """
    if skip < window - 1:
        raise ValueError(f"skip={skip} leaves samples with fewer than window={window} before them: raise skip")

    def seen(signal: Tensor) -> Tensor:
        past = signal.unfold(1, window, 1)[:, skip - window + 1 :]
        return torch.cat([past, torch.ones_like(past[..., :1])], dim=-1).double()

    signal, later = task.split(task.train)
    design, wanted = seen(signal).flatten(0, 1), later[:, skip:].flatten().double()
    # A little ridge, since neighbouring samples are nearly the same.
    coefficients = torch.linalg.solve(design.T @ design + torch.eye(window + 1).double(), design.T @ wanted)
    signal, later = task.split(task.test)
    with torch.no_grad():
        forecasts = {
            "mean": torch.zeros_like(later)[:, skip:],
            "last": signal[:, skip:],
            "linear": (seen(signal) @ coefficients).float(),
            "mixer": model(signal)[:, skip:],
        }
    return {name: float((each - later[:, skip:]).square().mean()) for name, each in forecasts.items()}
