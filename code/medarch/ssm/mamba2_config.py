"""The sizes and choices that define one Mamba-2 mixer."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Mamba2Config:
    """One Mamba-2 mixer, in the names of transformers' ``Mamba2Config``.

    Attributes:
        hidden_size: Width of the residual stream.
        state_size: Numbers that each channel keeps, N.
        num_heads: Heads, each with a rate of decay of its own; ``expand * hidden_size / head_dim`` where it is absent.
        head_dim: Channels of a head.
        n_groups: Groups of heads that share B and C; the norm before the way out works on each group by itself.
        expand: Channels of the mixer over ``hidden_size``.
        conv_kernel: Positions that the convolution before the scan sees.
        chunk_size: Positions that the scan takes at a time. It decides about speed and memory alone.
        use_bias: Whether the projections into and out of the mixer have a bias.
        use_conv_bias: Whether the convolution has one.
        time_step_min: Smallest step size at the start of training.
        time_step_max: Largest one; in between they are spread evenly in their logarithm.
        time_step_floor: No step size starts below it.
        time_step_limit: Least and largest step size ever, to which they are clamped.
        A_init_range: Least and largest rate of decay at the start of training, without the sign.
        layer_norm_epsilon: Of the norm.
        initializer_range: Standard deviation of the initial weights of the projections; where it is absent, each is
            uniform within one over the root of its inputs, as in the paper's code.

    Raises:
        ValueError: If a size is not a positive whole number, heads do not fill the channels, groups do not divide the
            heads, or a range is out of order; the message names what clashes.
    """

    hidden_size: int
    state_size: int = 128
    num_heads: int | None = None
    head_dim: int = 64
    n_groups: int = 1
    expand: int = 2
    conv_kernel: int = 4
    chunk_size: int = 32
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    A_init_range: tuple[float, float] = (1.0, 16.0)
    layer_norm_epsilon: float = 1e-5
    initializer_range: float | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "state_size", "head_dim", "n_groups", "expand", "conv_kernel", "chunk_size"):
            _whole(name, getattr(self, name))
        if self.num_heads is None:
            # At least one, so that a head that is too wide is told below, by name.
            object.__setattr__(self, "num_heads", max(1, self.intermediate_size // self.head_dim))
        _whole("num_heads", self.num_heads)
        for name in ("use_bias", "use_conv_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("time_step_min", "time_step_max", "time_step_floor", "layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if name == "initializer_range" and value is None:
                continue
            if not (_number(value) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive and finite number, got {value!r}")
        if self.time_step_min > self.time_step_max:
            raise ValueError(f"time_step_min={self.time_step_min} exceeds time_step_max={self.time_step_max}")
        self._check_heads()
        for name in ("time_step_limit", "A_init_range"):
            value = tuple(getattr(self, name))
            if len(value) != 2 or not all(map(_number, value)) or not 0 <= value[0] <= value[1]:
                raise ValueError(f"{name} must be two numbers in order, the first not negative, got {value!r}")
            object.__setattr__(self, name, value)
        if not 0 < self.A_init_range[0] <= self.A_init_range[1] < math.inf:
            raise ValueError(f"A_init_range must be positive and finite, got {self.A_init_range}")

    def _check_heads(self) -> None:
        if self.heads * self.head_dim != self.intermediate_size:
            raise ValueError(
                f"num_heads={self.num_heads} of head_dim={self.head_dim} make {self.heads * self.head_dim} channels, "
                f"but expand={self.expand} times hidden_size={self.hidden_size} are {self.intermediate_size}"
            )
        if self.heads % self.n_groups:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by n_groups={self.n_groups}")

    @property
    def heads(self) -> int:
        """``num_heads``, once it is known."""
        assert self.num_heads is not None
        return self.num_heads

    @property
    def intermediate_size(self) -> int:
        """Channels of the mixer."""
        return self.expand * self.hidden_size

    @property
    def conv_dim(self) -> int:
        """Channels that pass through the convolution: the mixer's own, and B and C of each group."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
