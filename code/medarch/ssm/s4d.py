"""S4D: a linear state space for each channel, diagonal, trained as a convolution and used as a recurrence.

Each of ``hidden`` channels has a state of its own, of ``state_size`` real numbers or half as many complex ones, whose
matrix A is diagonal (Gu et al. 2022c, arXiv:2206.11893; its authors' small version is models/s4/s4d.py of the
repository state-spaces/s4, whose kernel this one equals). Of each pair of complex conjugates one is kept, and twice
its real part is the contribution of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from medarch.ssm.discretise import bilinear_diagonal, zero_order_hold_diagonal
from medarch.ssm.hippo import Spectrum, diagonal_spectrum
from medarch.ssm.vandermonde import last_state, vandermonde_product

DiagonalRule = Literal["zero-order hold", "bilinear"]


@dataclass(frozen=True)
class S4DConfig:
    """One S4D layer.

    Attributes:
        hidden_size: Channels, each with a state of its own.
        state_size: Real numbers of a channel's state, N; even.
        spectrum: Diagonal matrix to begin with; see ``medarch.ssm.hippo.diagonal_spectrum``.
        rule: How the differential equation becomes a recurrence.
        step_min: Shortest step to begin with; 1 / step is about how many samples a channel remembers.
        step_max: Longest step to begin with. The channels' steps are spread between the two, evenly in their logarithm.

    Raises:
        ValueError: If a size is not a positive whole number, ``state_size`` is odd, a name is unknown, or the steps are
            not positive and in order.
    """

    hidden_size: int
    state_size: int = 64
    spectrum: Spectrum = "lin"
    rule: DiagonalRule = "zero-order hold"
    step_min: float = 0.001
    step_max: float = 0.1

    def __post_init__(self) -> None:
        for name in ("hidden_size", "state_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.state_size % 2:
            raise ValueError(f"state_size={self.state_size} must be even: a complex number takes two")
        if self.spectrum not in get_args(Spectrum):
            raise ValueError(f"spectrum must be one of {get_args(Spectrum)}, got {self.spectrum!r}")
        if self.rule not in get_args(DiagonalRule):
            raise ValueError(f"rule must be one of {get_args(DiagonalRule)}, got {self.rule!r}")
        if not 0 < self.step_min <= self.step_max < math.inf:
            raise ValueError(f"0 < step_min <= step_max is needed, got {self.step_min} and {self.step_max}")


State = Complex[Tensor, "batch hidden half"]
Discrete = tuple[Complex[Tensor, "hidden half"], Complex[Tensor, "hidden half"]]


class S4D(nn.Module):
    """The state space of every channel, without anything that mixes channels.

    A's real part is minus an exponential and the step is an exponential, so whatever training does to the parameters,
    the state decays: stability is built in and not hoped for.

    Args:
        config: Sizes and beginnings.
        generator: Draws C, D and the steps.
    """

    def __init__(self, config: S4DConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        shape = config.hidden_size, config.state_size // 2
        entries = diagonal_spectrum(config.state_size, config.spectrum).expand(shape)
        low, high = math.log(config.step_min), math.log(config.step_max)
        steps = low + (high - low) * torch.rand(config.hidden_size, generator=generator)
        self.log_step = nn.Parameter(steps)
        self.log_decay = nn.Parameter(torch.log(-entries.real).float())
        frequency = entries.imag.float().clone()
        if config.spectrum == "real":  # stays so: there is nothing to turn
            self.register_buffer("frequency", frequency)
        else:
            self.frequency = nn.Parameter(frequency)
        self.C = nn.Parameter(torch.randn(*shape, 2, generator=generator) * 0.5**0.5)  # unit size as complex numbers
        self.D = nn.Parameter(torch.randn(config.hidden_size, generator=generator))

    def forward(self, u: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "batch time hidden"]:
        """The outputs for a whole sequence, from a state of zeros: a convolution by FFT."""
        return self.read(u)[0]

    def read(
        self, u: Float[Tensor, "batch time hidden"], state: State | None = None, want_state: bool = False
    ) -> tuple[Float[Tensor, "batch time hidden"], State | None]:
        """A whole sequence at once, from a given state on, and the state after it if it is wanted.

        Raises:
            ValueError: If the sequence is empty, or its width or the state's shape is not the layer's.
        """
        self._check(u, state)
        time = u.shape[1]
        spectrum = torch.fft.rfft(u.transpose(1, 2), 2 * time) * torch.fft.rfft(self.kernel(time), 2 * time)
        y = torch.fft.irfft(spectrum, 2 * time)[..., :time].transpose(1, 2) + self.D * u
        if state is None and not want_state:
            return y, None
        exponents, drive = self.discrete()
        last = drive * last_state(u, exponents) if want_state else None
        if state is not None:
            seen = torch.view_as_complex(self.C) * exponents.exp() * state
            y = y + 2 * vandermonde_product(seen, exponents, time).transpose(1, 2)
            last = None if last is None else last + torch.exp(time * exponents) * state
        return y, last

    def step(
        self, u: Float[Tensor, "batch hidden"], state: State, discrete: Discrete | None = None
    ) -> tuple[Float[Tensor, "batch hidden"], State]:
        """One step of the recurrence: what using the layer on a stream costs, whatever went before.

        Args:
            u: One sample of each channel.
            state: The state before it.
            discrete: What ``self.discrete()`` gave, if the parameters have not changed since; it spares the call.

        Returns:
            The output and the state after the step.

        Raises:
            ValueError: If the input's width or the state's shape is not the layer's.
        """
        self._check(u[:, None], state)
        exponents, drive = self.discrete() if discrete is None else discrete
        state = exponents.exp() * state + drive * u[..., None]
        return 2 * (torch.view_as_complex(self.C) * state).sum(-1).real + self.D * u, state

    def recurrence(
        self, u: Float[Tensor, "batch time hidden"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time hidden"], State]:
        """Step by step over a sequence: the specification of ``read``."""
        self._check(u, state)
        state = self.new_state(len(u)) if state is None else state
        outputs, discrete = [], self.discrete()
        for sample in u.unbind(1):
            y, state = self.step(sample, state, discrete)
            outputs.append(y)
        return torch.stack(outputs, dim=1), state

    def new_state(self, batch_size: int) -> State:
        """The state before the first step: zeros."""
        half = torch.view_as_complex(self.C)
        return half.new_zeros(batch_size, *half.shape)

    def discrete(self) -> Discrete:
        """Logarithm of the factor by which each number of the state changes in a step, and what an input of 1 adds."""
        A = torch.complex(-torch.exp(self.log_decay), self.frequency)
        step = torch.exp(self.log_step)[:, None]
        if self.config.rule == "bilinear":
            factor, drive = bilinear_diagonal(A, step)
            return factor.log(), drive
        return step * A, zero_order_hold_diagonal(A, step)[1]

    def kernel(self, length: int) -> Float[Tensor, "hidden length"]:
        """The impulse response of every channel, without the direct path D.

        Raises:
            ValueError: If ``length`` is not positive.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        exponents, drive = self.discrete()
        return 2 * vandermonde_product(torch.view_as_complex(self.C) * drive, exponents, length)

    def _check(self, u: Tensor, state: Tensor | None) -> None:
        hidden, half = self.C.shape[:2]
        if u.ndim != 3 or u.shape[-1] != hidden or not u.shape[1]:
            raise ValueError(
                f"the input has the shape {tuple(u.shape)}; (batch, time, {hidden}) is needed, with at least one step"
            )
        if state is not None and state.shape != (len(u), hidden, half):
            raise ValueError(f"the state has the shape {tuple(state.shape)}, but {(len(u), hidden, half)} is needed")


class S4DBlock(nn.Module):
    """S4D as a layer of a network: the channels by themselves, then a gated matrix that mixes them, and a residual.

    Args:
        config: Of the state spaces.
        generator: Draws the weights.
    """

    def __init__(self, config: S4DConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.state_space = S4D(config, generator)
        self.mix = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        nn.init.normal_(self.mix.weight, std=config.hidden_size**-0.5, generator=generator)
        nn.init.zeros_(self.mix.bias)

    def forward(self, hidden_states: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "batch time hidden"]:
        """The whole sequence, from states of zeros."""
        return self._after(hidden_states, self.state_space(self.norm(hidden_states)))

    def step(
        self, hidden_states: Float[Tensor, "batch hidden"], state: State
    ) -> tuple[Float[Tensor, "batch hidden"], State]:
        """One step, with the state before and after it."""
        y, state = self.state_space.step(self.norm(hidden_states), state)
        return self._after(hidden_states, y), state

    def _after(self, hidden_states: Tensor, y: Tensor) -> Tensor:
        return hidden_states + F.glu(self.mix(F.gelu(y)), dim=-1)
