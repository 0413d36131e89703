"""The Mamba-2 mixer: one projection makes everything that the scan needs, and the heads share their B and C."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medarch.ssm.causal_conv import causal_conv
from medarch.ssm.mamba2_config import Mamba2Config
from medarch.ssm.ssd import ssd, step_sizes
from medarch.ssm.state import RecurrentState


class HeadInputs(NamedTuple):
    """What the scan of a mixer works on; all of it is computed from the mixer's input, except A.

    Attributes:
        x: Input of each head.
        dt: Step sizes, positive.
        A: Rate of decay of each head, negative.
        B: What the input adds to the state, in the place of a key.
        C: What is read from the state, in the place of a query.
        z: The gate, before its silu.
    """

    x: Float[Tensor, "batch time heads head"]
    dt: Float[Tensor, "batch time heads"]
    A: Float[Tensor, "heads"]
    B: Float[Tensor, "batch time groups states"]
    C: Float[Tensor, "batch time groups states"]
    z: Float[Tensor, "batch time channels"]


class Mamba2Mixer(nn.Module):
    """State space duality as a layer (Dao & Gu 2024, arXiv:2405.21060, section 7.1 and figure 6).

    The numbers are those of transformers' ``Mamba2Mixer``, and of the same layer in Bamba and Granite 4.

    Args:
        config: Sizes and choices.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: Mamba2Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        hidden, channels, heads = config.hidden_size, config.intermediate_size, config.heads
        projected = channels + config.conv_dim + heads
        self.in_proj = nn.Parameter(torch.empty(projected, hidden))
        self.conv1d_weight = nn.Parameter(torch.empty(config.conv_dim, config.conv_kernel))
        self.conv1d_bias = nn.Parameter(torch.zeros(config.conv_dim)) if config.use_conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Parameter(torch.empty(hidden, channels))
        self.in_bias = nn.Parameter(torch.zeros(projected)) if config.use_bias else None
        self.out_bias = nn.Parameter(torch.zeros(hidden)) if config.use_bias else None
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        """Rates of decay spread evenly, step sizes evenly in their logarithm."""
        config = self.config
        for weight in (self.in_proj, self.out_proj):
            if config.initializer_range is None:
                weight.uniform_(-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5, generator=generator)
            else:
                weight.normal_(std=config.initializer_range, generator=generator)
        self.conv1d_weight.uniform_(-(config.conv_kernel**-0.5), config.conv_kernel**-0.5, generator=generator)
        self.A_log.uniform_(*config.A_init_range, generator=generator).log_()
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
        (x, dt, A, B, C, z), tail = self.select(hidden_states, state)
        y, last = ssd(
            x,
            dt,
            A,
            B,
            C,
            self.config.chunk_size,
            self.D,
            initial_states=None if state is None else state.ssm,
            return_final_states=True,
        )
        if state is not None:
            state.update(last, tail, hidden_states.shape[1])
        return F.linear(self.gated_norm(y.flatten(2), z), self.out_proj, self.out_bias)

    def select(
        self, hidden_states: Float[Tensor, "batch time hidden"], state: RecurrentState | None = None
    ) -> tuple[HeadInputs, Float[Tensor, "batch before channels"]]:
        """What the scan will work on, and the convolution's tail."""
        config = self.config
        if hidden_states.dim() != 3 or hidden_states.shape[2] != config.hidden_size or not hidden_states.shape[1]:
            raise ValueError(
                f"hidden_states must be (batch, time, hidden_size={config.hidden_size}) with at least one position, "
                f"got {tuple(hidden_states.shape)}"
            )
        if state is not None:
            state.check_batch(hidden_states.shape[0])
        projected = F.linear(hidden_states, self.in_proj, self.in_bias)
        z, mixed, dt = projected.split([config.intermediate_size, config.conv_dim, config.heads], dim=-1)
        mixed, tail = causal_conv(mixed, self.conv1d_weight, self.conv1d_bias, None if state is None else state.conv)
        shared = config.n_groups * config.state_size
        x, B, C = F.silu(mixed).split([config.intermediate_size, shared, shared], dim=-1)
        # In float32 at least: rounding a step size in half precision would change the decay.
        dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
        dt = step_sizes(dt, self.dt_bias, dt_softplus=True, dt_limit=config.time_step_limit)
        B, C = (each.unflatten(-1, (config.n_groups, config.state_size)) for each in (B, C))
        return HeadInputs(x.unflatten(-1, (config.heads, config.head_dim)), dt, self.A, B, C, z), tail

    def gated_norm(
        self, y: Float[Tensor, "batch time channels"], z: Float[Tensor, "batch time channels"]
    ) -> Float[Tensor, "batch time channels"]:
        """Opens and closes the gate, then divides each group of channels by the root of its mean square."""
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.config.n_groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.config.layer_norm_epsilon)
        return normed.flatten(-2).to(y.dtype) * self.norm_weight

    @property
    def A(self) -> Float[Tensor, "heads"]:  # noqa: N802  (the paper's symbol)
        """Rates of decay: negative whatever is learned."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def new_cache(self, batch_size: int, capacity: int | None = None) -> RecurrentState:
        """An empty state; ``capacity`` is ignored, since the state does not grow."""
        config, weight = self.config, self.in_proj
        return RecurrentState.zeros(
            (batch_size, config.heads, config.head_dim, config.state_size),
            (batch_size, config.conv_kernel - 1, config.conv_dim),
            weight.dtype,
            weight.device,
        )
