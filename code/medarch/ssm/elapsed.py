"""A state space layer for samples that do not come at even intervals: its step is the time that has really passed.

Each channel keeps one number h, which forgets with a time constant tau of its own and moves towards its input u:

    tau h'(t) = -h(t) + u(t)

With zero-order hold over the time since the sample before, delta, this is exactly

    h_k = exp(-delta / tau) h_{k-1} + (1 - exp(-delta / tau)) u_k

and so a running mean whose memory is counted in minutes, not in samples: after a long gap the old mean has faded, and
the new sample takes its place. It is the diagonal layer of Smith et al. (2023, arXiv:2208.04933) at its smallest, with
real rates and one state a channel. A selective layer chooses its step from the content instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medarch.ssm.scan import selective_scan
from medarch.ssm.state import RecurrentState


@dataclass(frozen=True)
class ElapsedConfig:
    """One layer.

    Attributes:
        hidden_size: Width of the residual stream.
        expand: Channels over ``hidden_size``.
        time_constant_min: Shortest time constant at the start of training, in the unit of the elapsed time.
        time_constant_max: Longest one; in between they are spread evenly in their logarithm.

    Raises:
        ValueError: If a size is not a positive whole number, or the time constants are not positive and in order.
    """

    hidden_size: int
    expand: int = 2
    time_constant_min: float = 0.5
    time_constant_max: float = 100.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "expand"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        low, high = self.time_constant_min, self.time_constant_max
        if not (0 < low <= high and math.isfinite(high)):
            raise ValueError(f"time_constant_min={low} and time_constant_max={high} must be positive and in order")

    @property
    def channels(self) -> int:
        """Running means that the layer keeps."""
        return self.expand * self.hidden_size


def running_means_loop(
    u: Float[Tensor, "batch time channels"],
    elapsed: Float[Tensor, "batch time"],
    time_constant: Float[Tensor, "channels"],
    state: Float[Tensor, "batch channels"],
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels"]]:
    """The recurrence as it is written, one sample after the other: the specification of ``running_means``.

    Args:
        u: Inputs.
        elapsed: Time from the sample before to each sample, positive.
        time_constant: Of each channel, in the same unit, positive.
        state: Means before the first sample.

    Returns:
        The means after each sample, and after the last one.
    """
    means = []
    for u_k, passed in zip(u.unbind(1), elapsed.unbind(1), strict=True):
        kept = torch.exp(-passed[:, None] / time_constant)
        state = kept * state + (1 - kept) * u_k
        means.append(state)
    return torch.stack(means, dim=1), state


def running_means(
    u: Float[Tensor, "batch time channels"],
    elapsed: Float[Tensor, "batch time"],
    time_constant: Float[Tensor, "channels"],
    state: Float[Tensor, "batch channels"],
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels"]]:
    """The same by the selective scan: A = -1, B = C = 1, and steps of elapsed time over time constant.

    The scan adds ``delta u`` where zero-order hold asks for ``1 - exp(-delta)`` of it; the input makes up for that.
    Arguments and returns are those of ``running_means_loop``.
    """
    delta = elapsed[:, None, :] / time_constant[:, None]
    held = u.transpose(1, 2) * (-torch.expm1(-delta) / delta)
    ones = u.new_ones(len(u), 1, u.shape[1])
    means, last = selective_scan(
        held,
        delta,
        -u.new_ones(u.shape[2], 1),
        ones,
        ones,
        return_last_state=True,
        initial_state=state[:, :, None],
    )
    return means.transpose(1, 2), last[:, :, 0]


class ElapsedMixer(nn.Module):
    """Running means of projected inputs, gated and projected back; a mixer beside attention and Mamba.

    Args:
        config: Sizes and time constants.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: ElapsedConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        hidden, channels = config.hidden_size, config.channels
        self.in_proj = nn.Parameter(torch.empty(2 * channels, hidden))
        self.out_proj = nn.Parameter(torch.empty(hidden, channels))
        self.log_time_constant = nn.Parameter(torch.empty(channels))
        self.D = nn.Parameter(torch.ones(channels))
        with torch.no_grad():
            for weight in (self.in_proj, self.out_proj):
                weight.uniform_(-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5, generator=generator)
            low, high = math.log(config.time_constant_min), math.log(config.time_constant_max)
            self.log_time_constant.uniform_(low, high, generator=generator)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch time hidden"],
        elapsed: Float[Tensor, "batch time"],
        state: RecurrentState | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        """Mixes the samples; with a state, goes on from it and leaves in it what the next call needs.

        Args:
            hidden_states: One vector a sample.
            elapsed: Time since the sample before.
            state: From ``new_cache``, or absent.

        Raises:
            ValueError: If shapes clash, no time has passed between two samples, or the state is of another batch.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"hidden_states must be (batch, time, hidden_size={self.config.hidden_size}), "
                f"got {tuple(hidden_states.shape)}"
            )
        if elapsed.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"elapsed has the shape {tuple(elapsed.shape)}, hidden_states {tuple(hidden_states.shape)}: give one "
                "time for each sample"
            )
        if not bool((elapsed > 0).all()):
            raise ValueError(f"elapsed must be positive, its smallest is {float(elapsed.min()):g}: merge such samples")
        if state is not None:
            state.check_batch(len(hidden_states))
        u, z = F.linear(hidden_states, self.in_proj).chunk(2, dim=-1)
        before = u.new_zeros(len(u), u.shape[2]) if state is None else state.ssm
        means, last = running_means(u, elapsed, self.log_time_constant.exp(), before)
        if state is not None:
            state.update(last, state.conv, hidden_states.shape[1])
        return F.linear((means + self.D * u) * F.silu(z), self.out_proj)

    def new_cache(self, batch_size: int, capacity: int | None = None) -> RecurrentState:
        """An empty state; ``capacity`` is ignored, since the state does not grow."""
        weight = self.in_proj
        return RecurrentState.zeros(
            (batch_size, self.config.channels), (batch_size, 0, self.config.channels), weight.dtype, weight.device
        )
