"""A task of memory alone: repeat what was heard a number of steps ago.

The input is noise, each value independent of all others, so that nothing can be guessed. After ``lag`` steps the
model has to say each value in turn, and so to hold ``lag`` of them at any moment. The best constant answer, zero, has
a mean squared error of 1.
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medarch.ssm.s4d import S4D, S4DConfig

Kind = Literal["lin", "inv", "legs", "real", "gru"]
BATCH, TIME = 8, 128


def delay_batch(
    lag: int, generator: torch.Generator, batch: int = BATCH, time: int = TIME
) -> tuple[Float[Tensor, "batch time 1"], Float[Tensor, "batch heard 1"]]:
    """Noise, and what is to be said from step ``lag`` on.

    Raises:
        ValueError: If the lag is negative or leaves nothing to say.
    """
    if not 0 <= lag < time:
        raise ValueError(f"lag={lag} must be at least 0 and less than time={time}")
    noise = torch.randn(batch, time, 1, generator=generator)
    return noise, noise[:, : time - lag]


class Listener(nn.Module):
    """One layer with a state between two small matrices.

    Args:
        kind: ``"gru"`` for PyTorch's gated recurrent unit, else the spectrum that an S4D layer begins with.
        generator: Draws the weights.
        hidden_size: Channels; with ``"gru"`` also the numbers of its state.
        state_size: Numbers of the state of each channel of S4D.

    Raises:
        ValueError: If the kind is unknown or a size is not positive.
    """

    def __init__(self, kind: Kind, generator: torch.Generator, hidden_size: int = 16, state_size: int = 64) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r} is not one of {get_args(Kind)}")
        self.write = nn.Linear(1, hidden_size)
        self.read = nn.Linear(hidden_size, 1)
        if kind == "gru":
            self.core: nn.Module = nn.GRU(hidden_size, hidden_size, batch_first=True)
            self.state_numbers = hidden_size
        else:
            self.core = S4D(S4DConfig(hidden_size, state_size, spectrum=kind), generator)
            self.state_numbers = hidden_size * state_size
        parts = [self.write, self.read, *([self.core] if kind == "gru" else [])]
        for weight in (weight for part in parts for weight in part.parameters()):
            nn.init.uniform_(weight, -(hidden_size**-0.5), hidden_size**-0.5, generator=generator)

    def forward(self, u: Float[Tensor, "batch time 1"]) -> Float[Tensor, "batch time 1"]:
        """What the model says at each step."""
        answer = self.core(self.write(u))
        return self.read(answer[0] if isinstance(answer, tuple) else answer)


class Trained(NamedTuple):
    """A model, its loss at each step, its error on sequences it has not seen, and the processor time it took."""

    model: Listener
    losses: list[float]
    error: float
    seconds: float


def train_listener(
    kind: Kind, lag: int, seed: int, steps: int = 300, learning_rate: float = 0.01, hidden_size: int = 16
) -> Trained:
    """Trains a model to repeat what it heard ``lag`` steps ago.

    The batches of a seed are the same for all kinds.

    Raises:
        ValueError: If the kind is unknown, the lag does not fit, or a number is not positive.
    """
    if steps < 1 or not learning_rate > 0:
        raise ValueError(f"steps={steps} and learning_rate={learning_rate} must be positive")
    model = Listener(kind, torch.Generator().manual_seed(seed), hidden_size)
    noise = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    begun, losses = time.process_time(), []
    for _ in range(steps):
        u, heard = delay_batch(lag, noise)
        loss = (model(u)[:, lag:] - heard).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.process_time() - begun
    u, heard = delay_batch(lag, torch.Generator().manual_seed(2000 + seed), batch=32)
    with torch.no_grad():
        error = (model(u)[:, lag:] - heard).square().mean().item()
    return Trained(model, losses, error, seconds)


def impulse_answer(model: Listener, length: int) -> Float[Tensor, "length"]:
    """What the model says after a single 1, over what it says to silence: of S4D, the whole of what it computes."""
    impulse = torch.zeros(2, length, 1)
    impulse[0, 0] = 1
    with torch.no_grad():
        heard, silence = model(impulse)
    return (heard - silence)[:, 0]
