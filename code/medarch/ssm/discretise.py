"""From the differential equation to a recurrence on samples.

A sampled input says nothing of what happens between two samples, so something has to be supposed. Zero-order hold
supposes that each value stays until the next one comes, and is then exact. The bilinear rule supposes that the rate
of change is the mean of its values at both ends (Tustin; Gu et al. 2022, arXiv:2111.00396, eq. 3). Euler's rule takes
the rate at the beginning for the whole step, and is here because it can fail.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from medarch.ssm.linear import LinearStateSpace

Rule = Literal["zero-order hold", "bilinear", "euler"]


def discretise(system: LinearStateSpace, step: float, rule: Rule = "zero-order hold") -> LinearStateSpace:
    """The recurrence that follows a continuous system from sample to sample.

    C and D stay as they are, because our h_k is the state after the input u_k has acted.

    Args:
        system: In continuous time.
        step: Time between two samples, in the unit of time in which A is a rate.
        rule: What is supposed between the samples.

    Raises:
        ValueError: If the system is discrete already, the step is not positive, or the rule is unknown.
    """
    if system.step is not None:
        raise ValueError(f"the system is discrete already, with step={system.step}: start from the continuous one")
    if rule not in get_args(Rule):
        raise ValueError(f"rule={rule!r} is not one of {get_args(Rule)}")
    rules = {"zero-order hold": zero_order_hold, "bilinear": bilinear, "euler": euler}
    A, B = rules[rule](system.A, system.B, step)
    return LinearStateSpace(A, B, system.C, system.D, step)


Pair = tuple[Float[Tensor, "states states"], Float[Tensor, "states inputs"]]


def zero_order_hold(A: Float[Tensor, "states states"], B: Float[Tensor, "states inputs"], step: float) -> Pair:
    """exp(step A) and the integral of exp(s A) B over one step.

    The integral is A^-1 (exp(step A) - 1) B where A can be inverted. It is read here from one larger exponential,
    which does not ask: with the input as a part of the state that does not change,

        exp(step [[A, B], [0, 0]]) = [[exp(step A), integral], [0, 1]]            (Van Loan 1978)

    Raises:
        ValueError: If the step is not positive and finite.
    """
    _check_step(step)
    states = len(A)
    extended = torch.cat([torch.cat([A, B], dim=1), A.new_zeros(B.shape[1], states + B.shape[1])])
    exponential = torch.linalg.matrix_exp(step * extended)
    return exponential[:states, :states], exponential[:states, states:]


def bilinear(A: Float[Tensor, "states states"], B: Float[Tensor, "states inputs"], step: float) -> Pair:
    """(1 - step/2 A)^-1 (1 + step/2 A) and (1 - step/2 A)^-1 step B.

    Raises:
        ValueError: If the step is not positive and finite.
    """
    _check_step(step)
    one = torch.eye(len(A), dtype=A.dtype, device=A.device)
    solved = torch.linalg.solve(one - step / 2 * A, torch.cat([one + step / 2 * A, step * B], dim=1))
    return solved[:, : len(A)], solved[:, len(A) :]


def euler(A: Float[Tensor, "states states"], B: Float[Tensor, "states inputs"], step: float) -> Pair:
    """1 + step A and step B: cheap, and unstable for a step that is long beside the fastest part of the system.

    Raises:
        ValueError: If the step is not positive and finite.
    """
    _check_step(step)
    return torch.eye(len(A), dtype=A.dtype, device=A.device) + step * A, step * B


DiagonalPair = tuple[Complex[Tensor, "*shape"], Complex[Tensor, "*shape"]]


def zero_order_hold_diagonal(A: Complex[Tensor, "*shape"], step: Float[Tensor, "*#shape"]) -> DiagonalPair:
    """Zero-order hold for a diagonal A, entry by entry, with B = 1.

    Args:
        A: Diagonal entries; zero is allowed.
        step: Step sizes, of a shape that broadcasts against A's.

    Returns:
        exp(step A), and (exp(step A) - 1) / A, which is the step itself where A is zero.
    """
    z = step * A
    return torch.exp(z), step * _mean_exponential(z)


def bilinear_diagonal(A: Complex[Tensor, "*shape"], step: Float[Tensor, "*#shape"]) -> DiagonalPair:
    """The bilinear rule for a diagonal A, entry by entry, with B = 1; see ``zero_order_hold_diagonal``."""
    half = step * A / 2
    return (1 + half) / (1 - half), step / (1 - half)


def _mean_exponential(z: Complex[Tensor, "*shape"]) -> Complex[Tensor, "*shape"]:
    """(exp(z) - 1) / z, by its series near zero, where the difference (and its gradient's even more) would cancel."""
    small = z.abs() < 0.5
    near = z
    far = torch.where(small, torch.ones_like(z), z)  # no 0/0: its gradient would be NaN although it is not used
    series = torch.ones_like(z)
    for term in range(15, 1, -1):  # of 0.5 to the 15th over 16! nothing is left in float64
        series = 1 + near / term * series
    return torch.where(small, series, (torch.exp(far) - 1) / far)


def _check_step(step: float) -> None:
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be positive and finite, got {step!r}")
