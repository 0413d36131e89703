"""The sizes and choices that define one Mamba mixer."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MambaConfig:
    """One Mamba mixer, in the names of transformers' ``MambaConfig``.

    Attributes:
        hidden_size: Width of the residual stream.
        state_size: Numbers that each channel keeps, N.
        conv_kernel: Positions that the convolution before the scan sees.
        expand: Channels of the mixer over ``hidden_size``.
        time_step_rank: Rank of the projection that makes the step sizes; ``hidden_size / 16``, rounded up, where it
            is absent.
        use_bias: Whether the projections into and out of the mixer have a bias.
        use_conv_bias: Whether the convolution has one.
        time_step_min: Smallest step size at the start of training.
        time_step_max: Largest one; in between they are spread evenly in their logarithm.
        time_step_floor: No step size starts below it.
        inner_norms: Whether step sizes, B and C are normalised, as in Jamba (Lieber et al. 2024, arXiv:2403.19887,
            section 6.4).
        rms_norm_eps: Of these norms.
        initializer_range: Standard deviation of the initial weights of the projections; where it is absent, each is
            uniform within one over the root of its inputs, as in the paper's code.

    Raises:
        ValueError: If a size is not a positive whole number, or a step size out of order; the message names it.
    """

    hidden_size: int
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | None = None
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    inner_norms: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "state_size", "conv_kernel", "expand"):
            _whole(name, getattr(self, name))
        if self.time_step_rank is None:
            object.__setattr__(self, "time_step_rank", math.ceil(self.hidden_size / 16))
        _whole("time_step_rank", self.time_step_rank)
        for name in ("use_bias", "use_conv_bias", "inner_norms"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("time_step_min", "time_step_max", "time_step_floor", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if name == "initializer_range" and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive and finite number, got {value!r}")
        if self.time_step_min > self.time_step_max:
            raise ValueError(f"time_step_min={self.time_step_min} exceeds time_step_max={self.time_step_max}")

    @property
    def intermediate_size(self) -> int:
        """Channels of the mixer."""
        return self.expand * self.hidden_size

    @property
    def rank(self) -> int:
        """``time_step_rank``, once it is known."""
        assert self.time_step_rank is not None
        return self.time_step_rank


def _whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
