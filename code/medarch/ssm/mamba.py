"""The Mamba mixer: a gate, a short convolution, and a scan whose coefficients are made from its input."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medarch.ssm.causal_conv import causal_conv
from medarch.ssm.config import MambaConfig
from medarch.ssm.scan import selective_scan
from medarch.ssm.state import RecurrentState


class Selection(NamedTuple):
    """What the scan of a mixer works on; all of it is computed from the mixer's input, except A.

    Attributes:
        u: Input of each channel.
        delta: Step sizes, positive.
        A: Rates of decay, negative.
        B: What the input adds to the state.
        C: What is read from the state.
        z: The gate, before its silu.
    """

    u: Float[Tensor, "batch time channels"]
    delta: Float[Tensor, "batch time channels"]
    A: Float[Tensor, "channels states"]
    B: Float[Tensor, "batch time states"]
    C: Float[Tensor, "batch time states"]
    z: Float[Tensor, "batch time channels"]


class MambaMixer(nn.Module):
    """Selective state spaces as a layer (Gu & Dao 2023, arXiv:2312.00752, section 3.4 and figure 3).

    Each position is widened to ``intermediate_size`` channels. A convolution over the last few positions, a selective
    scan along the sequence and a gate follow, and the result is projected back.

    Args:
        config: Sizes and choices.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: MambaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        hidden, channels, states, rank = config.hidden_size, config.intermediate_size, config.state_size, config.rank
        self.in_proj = nn.Parameter(torch.empty(2 * channels, hidden))
        self.conv1d_weight = nn.Parameter(torch.empty(channels, config.conv_kernel))
        self.conv1d_bias = nn.Parameter(torch.zeros(channels)) if config.use_conv_bias else None
        self.x_proj = nn.Parameter(torch.empty(rank + 2 * states, channels))
        self.dt_proj = nn.Parameter(torch.empty(channels, rank))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Parameter(torch.empty(hidden, channels))
        self.in_bias = nn.Parameter(torch.zeros(2 * channels)) if config.use_bias else None
        self.out_bias = nn.Parameter(torch.zeros(hidden)) if config.use_bias else None
        self.dt_norm: nn.Parameter | None = None
        self.B_norm: nn.Parameter | None = None
        self.C_norm: nn.Parameter | None = None
        if config.inner_norms:
            self.dt_norm = nn.Parameter(torch.ones(rank))
            self.B_norm, self.C_norm = nn.Parameter(torch.ones(states)), nn.Parameter(torch.ones(states))
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        """A = -1, -2, ..., -N in each channel (S4D-Real), and step sizes from milliseconds to tenths."""
        config = self.config
        for weight in (self.in_proj, self.x_proj, self.out_proj):
            if config.initializer_range is None:
                weight.uniform_(-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5, generator=generator)
            else:
                weight.normal_(std=config.initializer_range, generator=generator)
        self.conv1d_weight.uniform_(-(config.conv_kernel**-0.5), config.conv_kernel**-0.5, generator=generator)
        self.dt_proj.uniform_(-(config.rank**-0.5), config.rank**-0.5, generator=generator)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        step = self.dt_bias.uniform_(low, high, generator=generator).exp().clamp(min=config.time_step_floor)
        # The inverse of softplus, so that softplus(dt_bias) is the step size.
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(
        self, hidden_states: Float[Tensor, "batch time hidden"], state: RecurrentState | None = None
    ) -> Float[Tensor, "batch time hidden"]:
        """Mixes the positions; with a state, goes on from it and leaves in it what the next call needs.

        Raises:
            ValueError: If the width is not that of the configuration, there is no position, or the state is that of
                another batch.
        """
        selection, tail = self.select(hidden_states, state)
        result = selective_scan(
            selection.u.transpose(1, 2),
            selection.delta.transpose(1, 2),
            selection.A,
            selection.B.transpose(1, 2),
            selection.C.transpose(1, 2),
            self.D,
            selection.z.transpose(1, 2),
            return_last_state=state is not None,
            initial_state=None if state is None else state.ssm,
        )
        if state is not None:
            result, last = result
            state.update(last, tail, hidden_states.shape[1])
        return F.linear(result.transpose(1, 2), self.out_proj, self.out_bias)

    def select(
        self, hidden_states: Float[Tensor, "batch time hidden"], state: RecurrentState | None = None
    ) -> tuple[Selection, Float[Tensor, "batch before channels"]]:
        """What the scan will work on, and the convolution's tail: the choices that make the scan selective."""
        config = self.config
        if hidden_states.dim() != 3 or hidden_states.shape[2] != config.hidden_size or not hidden_states.shape[1]:
            raise ValueError(
                f"hidden_states must be (batch, time, hidden_size={config.hidden_size}) with at least one position, "
                f"got {tuple(hidden_states.shape)}"
            )
        if state is not None:
            state.check_batch(hidden_states.shape[0])
        u, z = F.linear(hidden_states, self.in_proj, self.in_bias).chunk(2, dim=-1)
        u, tail = causal_conv(u, self.conv1d_weight, self.conv1d_bias, None if state is None else state.conv)
        u = F.silu(u)
        low_rank, B, C = F.linear(u, self.x_proj).split([config.rank, config.state_size, config.state_size], dim=-1)
        if self.dt_norm is not None and self.B_norm is not None and self.C_norm is not None:
            low_rank, B, C = (
                F.rms_norm(each, each.shape[-1:], weight, config.rms_norm_eps)
                for each, weight in ((low_rank, self.dt_norm), (B, self.B_norm), (C, self.C_norm))
            )
        delta = F.softplus(F.linear(low_rank, self.dt_proj).float() + self.dt_bias.float())
        # In float64 the line above would lose digits; half precision is what it is for.
        if u.dtype == torch.float64:
            delta = F.softplus(F.linear(low_rank, self.dt_proj, self.dt_bias))
        return Selection(u, delta, self.A, B, C, z), tail

    @property
    def A(self) -> Float[Tensor, "channels states"]:  # noqa: N802  (the paper's symbol)
        """Rates of decay: negative whatever is learned."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def new_cache(self, batch_size: int, capacity: int | None = None) -> RecurrentState:
        """An empty state; ``capacity`` is ignored, since the state does not grow."""
        config, weight = self.config, self.in_proj
        return RecurrentState.zeros(
            (batch_size, config.intermediate_size, config.state_size),
            (batch_size, config.conv_kernel - 1, config.intermediate_size),
            weight.dtype,
            weight.device,
        )
