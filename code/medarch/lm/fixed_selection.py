"""Mamba with its selectivity taken away, in whole or in part: what the scan works on no longer looks at the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medarch.ssm.causal_conv import causal_conv
from medarch.ssm.config import MambaConfig
from medarch.ssm.mamba import MambaMixer
from medarch.ssm.scan import selective_scan
from medarch.ssm.state import RecurrentState

SELECTED = ("delta", "B", "C")
"""What a Mamba mixer makes from its input."""


class FixedSelectionMixer(MambaMixer):
    """A Mamba mixer in which the step size, B or C, as named, are learned constants of each channel.

    With all three constant it is the time-invariant model that came before: algorithm 1 instead of algorithm 2 of Gu
    & Dao 2023 (arXiv:2312.00752), within the same block. A constant B or C has as many weights as the projection that
    it replaces.

    Args:
        config: Sizes and choices; norms within the mixer are not provided for.
        constant: Which of ``SELECTED`` do not depend on the input.
        generator: Source of randomness for the initial weights.

    Raises:
        ValueError: If ``constant`` names anything else, or the configuration asks for inner norms.
    """

    def __init__(
        self, config: MambaConfig, constant: tuple[str, ...], generator: torch.Generator | None = None
    ) -> None:
        unknown = [name for name in constant if name not in SELECTED]
        if unknown:
            raise ValueError(f"constant names {unknown[0]!r}, known are {SELECTED}")
        if config.inner_norms:
            raise ValueError("inner_norms=True normalises what may be constant here: use a configuration without them")
        super().__init__(config, generator)
        self.constant = tuple(name for name in SELECTED if name in constant)
        channels, states = config.intermediate_size, config.state_size
        widths = {"delta": config.rank, "B": states, "C": states}
        rows = dict(zip(SELECTED, self.x_proj.detach().split(list(widths.values())), strict=True))
        self.widths = {name: width for name, width in widths.items() if name not in constant}
        if self.widths:
            self.x_proj = nn.Parameter(torch.cat([rows[name] for name in self.widths]))
        else:
            del self.x_proj
        if "delta" in constant:
            del self.dt_proj  # what remains of the step size is its bias
        if "B" in constant:
            self.B = nn.Parameter(torch.ones(channels, states))
        if "C" in constant:
            self.C = nn.Parameter(torch.empty(channels, states).normal_(generator=generator))

    def forward(
        self, hidden_states: Float[Tensor, "batch time hidden"], state: RecurrentState | None = None
    ) -> Float[Tensor, "batch time hidden"]:
        """Mixes the positions as ``MambaMixer.forward`` does; where nothing is selected, by a convolution."""
        if state is not None:
            state.check_batch(hidden_states.shape[0])
        u, z = F.linear(hidden_states, self.in_proj, self.in_bias).chunk(2, dim=-1)
        u, tail = causal_conv(u, self.conv1d_weight, self.conv1d_bias, None if state is None else state.conv)
        u = F.silu(u)
        if not self.widths and state is None:
            y = self._convolve(u)
        else:
            y, last = self._scan(u, None if state is None else state.ssm)
            if state is not None:
                state.update(last, tail, hidden_states.shape[1])
        return F.linear((y + self.D * u) * F.silu(z), self.out_proj, self.out_bias)

    def _scan(
        self, u: Float[Tensor, "batch time channels"], state: Float[Tensor, "batch channels states"] | None
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels states"]]:
        """What the states answer, and the last state.

        B and C of each channel by itself are more than the scan provides for. Each number of each channel's state is
        therefore scanned as a channel of its own; B is multiplied with what goes in, C with what comes out.
        """
        delta, B, C = self._selection(u)
        shape = (u.shape[2], self.config.state_size)
        one = torch.ones_like(u[:, None, :, 0])
        y, last = selective_scan(
            (u[..., None] * B).flatten(2).transpose(1, 2),
            delta.transpose(1, 2).repeat_interleave(shape[1], dim=1),
            self.A.reshape(-1, 1),
            one,
            one,
            return_last_state=True,
            initial_state=None if state is None else state.reshape(len(u), -1, 1),
        )
        return (y.transpose(1, 2).unflatten(2, shape) * C).sum(-1), last.view(len(u), *shape)

    def _convolve(self, u: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch time channels"]:
        """The same where all three are constant: a filter as long as the sequence, by the fast Fourier transform.

        The answer of a channel to one impulse is sum_n delta B_n C_n exp(delta A_n lag). Twice the length leaves room
        for what would otherwise come round from the end to the beginning.
        """
        time, step = u.shape[1], F.softplus(self.dt_bias)
        lags = torch.arange(time, dtype=u.dtype, device=u.device)
        decays = torch.exp(lags[:, None, None] * step[:, None] * self.A)
        kernel = torch.einsum("tdn,dn->td", decays, self.B * self.C) * step
        spectrum = torch.fft.rfft(u, 2 * time, dim=1) * torch.fft.rfft(kernel, 2 * time, dim=0)
        return torch.fft.irfft(spectrum, 2 * time, dim=1)[:, :time]

    def _selection(
        self, u: Float[Tensor, "batch time channels"]
    ) -> tuple[
        Float[Tensor, "batch time channels"],
        Float[Tensor, "*by_time states"],
        Float[Tensor, "*by_time states"],
    ]:
        """Step sizes, B and C: by time where they are made from the input, else by channel."""
        made: dict[str, Tensor] = {}
        if self.widths:
            parts = F.linear(u, self.x_proj).split(list(self.widths.values()), dim=-1)
            made = dict(zip(self.widths, parts, strict=True))
        if "delta" in made:
            delta = F.softplus(F.linear(made["delta"], self.dt_proj, self.dt_bias))
        else:
            delta = F.softplus(self.dt_bias).expand_as(u)
        B, C = (made[name][:, :, None] if name in made else getattr(self, name) for name in ("B", "C"))
        return delta, B, C
