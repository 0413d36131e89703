"""A model of signals: vectors of numbers go in sample by sample, and a forecast comes out at each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medarch.lm.signal_mixers import MIXERS, build_mixer


@dataclass(frozen=True)
class SignalConfig:
    """A stack of mixers between two linear maps.

    Attributes:
        features: Numbers that a sample brings.
        mixer: One of ``MIXERS``.
        hidden_size: Width of the residual stream.
        num_layers: Mixers after one another.
        outputs: Numbers of a forecast.
        state_size: Of Mamba's channels, each.
        recurrent_size: Of the gated recurrent unit.
        kernel: Samples that a convolution sees; its spacing doubles from layer to layer.
        heads, window, intermediate_size: Of attention.

    Raises:
        ValueError: If the mixer is unknown or a size is not a positive whole number.
    """

    features: int
    mixer: str
    hidden_size: int = 24
    num_layers: int = 2
    outputs: int = 1
    state_size: int = 8
    recurrent_size: int = 28
    kernel: int = 3
    heads: int = 4
    window: int = 64
    intermediate_size: int = 40

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer={self.mixer!r} is not one of {MIXERS}")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name != "mixer" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


class SignalState:
    """What a model remembers of one or several streams: the memories of its layers.

    Args:
        layers: One memory a layer.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        """Samples read so far."""
        return self.layers[0].length

    @property
    def used_bytes(self) -> int:
        """Memory that is needed to go on, over all layers."""
        return sum(layer.used_bytes for layer in self.layers)


class SignalModel(nn.Module):
    """Reads a signal, whole or in pieces of any size, and makes a forecast at every sample.

    Args:
        config: Sizes.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: SignalConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.in_proj = nn.Linear(config.features, hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-5) for _ in range(config.num_layers))
        self.mixers = nn.ModuleList(build_mixer(config, layer, generator) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.out_proj = nn.Linear(hidden, config.outputs)
        with torch.no_grad():
            for weight in self.in_proj.parameters():
                weight.normal_(std=config.features**-0.5, generator=generator)
            for weight in self.out_proj.parameters():
                weight.zero_()  # the first forecast is "no change", whatever the mixer

    def forward(
        self,
        samples: Float[Tensor, "batch time features"],
        elapsed: Float[Tensor, "batch time"] | None = None,
        state: SignalState | None = None,
    ) -> Float[Tensor, "batch time outputs"]:
        """A forecast at every sample, from it and all before it.

        Args:
            samples: The signal, or its next piece.
            elapsed: Time since the sample before, in units of the usual interval; 1 everywhere where it is absent.
            state: Memory of what was read before, which the call brings up to date.

        Raises:
            ValueError: If shapes clash, there is no sample, or the state is of another batch.
        """
        if samples.dim() != 3 or samples.shape[2] != self.config.features or not samples.shape[1]:
            raise ValueError(
                f"samples must be (batch, time, features={self.config.features}) with at least one sample, "
                f"got {tuple(samples.shape)}"
            )
        elapsed = torch.ones_like(samples[:, :, 0]) if elapsed is None else elapsed
        if elapsed.shape != samples.shape[:2]:
            raise ValueError(f"elapsed has the shape {tuple(elapsed.shape)}, samples {tuple(samples.shape)}")
        hidden_states = self.in_proj(samples)
        for index, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            memory = None if state is None else state.layers[index]
            hidden_states = hidden_states + mixer(norm(hidden_states), elapsed, memory)
        return self.out_proj(self.norm(hidden_states))

    def new_state(self, batch_size: int = 1) -> SignalState:
        """Memory before the first sample."""
        mixers: Iterable[Any] = self.mixers
        return SignalState([mixer.new_cache(batch_size) for mixer in mixers])

    @property
    def parameter_count(self) -> int:
        """Numbers that training adjusts."""
        return sum(parameter.numel() for parameter in self.parameters())
