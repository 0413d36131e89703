"""What may exchange information between the samples of a signal, under one interface.

A mixer is called with the samples' vectors, the time that has passed before each, and a state or none, and returns as
many vectors; with a state it goes on from it, whatever the pieces are in which a signal arrives. Mamba and the layer
with elapsed time come from ``medarch.ssm``, attention over a window from ``medarch.lm.sliding_window``; a gated
recurrent unit and a causal convolution are here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medarch.lm.config import DecoderConfig
from medarch.lm.sliding_window import WindowAttention, WindowCache
from medarch.moe.dense import DenseMLP
from medarch.ssm.config import MambaConfig
from medarch.ssm.elapsed import ElapsedConfig, ElapsedMixer
from medarch.ssm.mamba import MambaMixer
from medarch.ssm.state import RecurrentState

Hidden = Float[Tensor, "batch time hidden"]
Elapsed = Float[Tensor, "batch time"]


class Selective(nn.Module):
    """Mamba: it learns its step from the content; elapsed time reaches it as a feature, like everything else."""

    def __init__(self, hidden_size: int, state_size: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.mixer = MambaMixer(MambaConfig(hidden_size, state_size=state_size), generator)

    def forward(self, hidden_states: Hidden, elapsed: Elapsed, state: RecurrentState | None = None) -> Hidden:
        """See the module."""
        return self.mixer(hidden_states, state)

    def new_cache(self, batch_size: int, capacity: int | None = None) -> RecurrentState:
        """An empty state."""
        return self.mixer.new_cache(batch_size, capacity)


class ByTheClock(ElapsedMixer):
    """Running means whose memory is counted in the time that has passed."""

    def __init__(self, hidden_size: int, generator: torch.Generator | None) -> None:
        super().__init__(ElapsedConfig(hidden_size), generator)


class ByTheCount(ByTheClock):
    """The same with every step taken as one, so that its memory is counted in samples."""

    def forward(self, hidden_states: Hidden, elapsed: Elapsed, state: RecurrentState | None = None) -> Hidden:
        """See the module."""
        return super().forward(hidden_states, torch.ones_like(elapsed), state)


class Recurrent(nn.Module):
    """A gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), projected back to the stream's width."""

    def __init__(self, hidden_size: int, recurrent_size: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.unit = nn.GRU(hidden_size, recurrent_size, batch_first=True)
        self.out_proj = nn.Parameter(torch.empty(hidden_size, recurrent_size))
        with torch.no_grad():
            for weight in self.parameters():
                weight.uniform_(-(recurrent_size**-0.5), recurrent_size**-0.5, generator=generator)

    def forward(self, hidden_states: Hidden, elapsed: Elapsed, state: RecurrentState | None = None) -> Hidden:
        """See the module."""
        mixed, last = self.unit(hidden_states, None if state is None else state.ssm[None])
        if state is not None:
            state.update(last[0], state.conv, hidden_states.shape[1])
        return F.linear(mixed, self.out_proj)

    def new_cache(self, batch_size: int, capacity: int | None = None) -> RecurrentState:
        """An empty state."""
        size = self.out_proj.shape[1]
        return RecurrentState(self.out_proj.new_zeros(batch_size, size), self.out_proj.new_zeros(batch_size, 0, size))


class Convolution(nn.Module):
    """A causal convolution that sees every ``dilation``-th sample, with a gate (van den Oord et al. 2016,
    arXiv:1609.03499, section 2.3, with silu in place of its two activations)."""

    def __init__(self, hidden_size: int, kernel: int, dilation: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(2 * hidden_size, hidden_size, kernel))
        self.bias = nn.Parameter(torch.zeros(2 * hidden_size))
        self.out_proj = nn.Parameter(torch.empty(hidden_size, hidden_size))
        with torch.no_grad():
            for weight in (self.weight, self.out_proj):
                bound = weight[0].numel() ** -0.5
                weight.uniform_(-bound, bound, generator=generator)

    def forward(self, hidden_states: Hidden, elapsed: Elapsed, state: RecurrentState | None = None) -> Hidden:
        """See the module."""
        tail = self.new_cache(len(hidden_states)).conv if state is None else state.conv
        joined = torch.cat([tail, hidden_states], dim=1)
        if state is not None:
            state.update(state.ssm, joined[:, hidden_states.shape[1] :], hidden_states.shape[1])
        filtered = F.conv1d(joined.transpose(1, 2), self.weight, self.bias, dilation=self.dilation).transpose(1, 2)
        u, z = filtered.chunk(2, dim=-1)
        return F.linear(u * F.silu(z), self.out_proj)

    def new_cache(self, batch_size: int, capacity: int | None = None) -> RecurrentState:
        """The samples that the filter still sees, all zero at first."""
        width, before = self.weight.shape[1], (self.weight.shape[2] - 1) * self.dilation
        return RecurrentState(self.weight.new_zeros(batch_size, 0), self.weight.new_zeros(batch_size, before, width))


class Attentive(nn.Module):
    """Attention over the last samples, and the feed-forward layer that belongs to it."""

    def __init__(
        self, hidden_size: int, heads: int, window: int, intermediate_size: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        sizes = DecoderConfig(1, hidden_size, intermediate_size, 1, heads, initializer_range=hidden_size**-0.5)
        self.attention = WindowAttention(sizes, window, generator)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.feed_forward = DenseMLP(
            hidden_size, intermediate_size, initializer_range=hidden_size**-0.5, generator=generator
        )

    def forward(self, hidden_states: Hidden, elapsed: Elapsed, state: WindowCache | None = None) -> Hidden:
        """See the module."""
        mixed = self.attention(hidden_states, state)
        return mixed + self.feed_forward(self.norm(hidden_states + mixed))

    def new_cache(self, batch_size: int, capacity: int | None = None) -> WindowCache:
        """An empty cache."""
        return self.attention.new_cache(batch_size)


MIXERS = ("selective", "clock", "count", "recurrent", "convolution", "attention")


def build_mixer(config: Any, layer: int, generator: torch.Generator | None) -> nn.Module:
    """The mixer of one layer of a ``SignalConfig``."""
    hidden = config.hidden_size
    if config.mixer == "selective":
        return Selective(hidden, config.state_size, generator)
    if config.mixer == "clock":
        return ByTheClock(hidden, generator)
    if config.mixer == "count":
        return ByTheCount(hidden, generator)
    if config.mixer == "recurrent":
        return Recurrent(hidden, config.recurrent_size, generator)
    if config.mixer == "convolution":
        return Convolution(hidden, config.kernel, 2**layer, generator)
    return Attentive(hidden, config.heads, config.window, config.intermediate_size, generator)
