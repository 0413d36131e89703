"""HiPPO: matrices for which the state is a record of the past.

If the state is to hold the past as the coefficients of a polynomial, the matrices follow: that is the idea of HiPPO
(Gu et al. 2020, arXiv:2008.07669). Here is its best known case, LegS, with Legendre polynomials that stretch over the
whole past, in the two ways in which it is used: with a clock that slows down, so that all of the past counts equally,
and with a steady clock, so that it fades. After that come the approximations that made it practical.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from medarch.ssm.discretise import zero_order_hold
from medarch.ssm.linear import LinearStateSpace, recurrence

Spectrum = Literal["legs", "lin", "inv", "real"]


def legs(states: int) -> tuple[Float[Tensor, "states states"], Float[Tensor, "states 1"]]:
    """The matrices A and B of HiPPO-LegS, in float64 (Gu et al. 2020, eq. 3, with the sign of Gu et al. 2022, eq. 2).

    A_nk is -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it and 0 above; B_n is sqrt(2n+1).

    Raises:
        ValueError: If ``states`` is not positive.
    """
    root = (2 * _numbers(states) + 1).sqrt()
    below = torch.tril(torch.outer(root, root), diagonal=-1)
    return -(below + torch.diag(_numbers(states) + 1)), root[:, None]


def legendre(points: Float[Tensor, "points"], states: int) -> Float[Tensor, "points states"]:
    """The basis in which the state is written: Legendre polynomials of unit size on the interval from 0 to 1.

    Args:
        points: Where to evaluate; 0 is one end of the remembered past and 1 the other.
        states: How many polynomials, of degree 0, 1, ...

    Raises:
        ValueError: If ``states`` is not positive.
    """
    degrees, x = _numbers(states), 2 * points - 1
    values = [torch.ones_like(x), x]
    for n in range(1, states - 1):  # Bonnet's recursion
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[:states], dim=-1) * (2 * degrees + 1).sqrt().to(points)


def remember(signal: Float[Tensor, "time"], states: int) -> Float[Tensor, "time states"]:
    """The state after each sample, where the whole past counts equally (Gu et al. 2020, theorem 2).

    The equation is h'(t) = (A h(t) + B u(t)) / t. By the clock log t it has constant matrices, so zero-order hold
    solves it exactly, with steps of log((k+1)/k) that grow shorter and shorter.

    Args:
        signal: Samples; each stands for an interval of time 1, during which it stays.
        states: Coefficients to keep.

    Returns:
        In row k the coefficients of the best polynomial, in the mean square, for the first k+1 samples stretched over
        the interval from 0 (the oldest) to 1 (the newest).

    Raises:
        ValueError: If the signal is empty or ``states`` is not positive.
    """
    _not_empty(signal)
    A, B = legs(states)
    state = torch.zeros(states, dtype=torch.float64)
    state[0] = signal[0]  # a single sample is a constant
    history = [state]
    for k, sample in enumerate(signal[1:].double(), start=1):
        decay, drive = zero_order_hold(A, B, math.log1p(1 / k))
        history.append(decay @ history[-1] + drive[:, 0] * sample)
    return torch.stack(history).to(signal)


def remember_fading(signal: Float[Tensor, "time"], states: int, step: float) -> Float[Tensor, "time states"]:
    """The state after each sample, where the past fades exponentially: LegS with a steady clock, as S4 uses it.

    The coefficients belong to Legendre polynomials in exp(-age), age being measured in ``1/step`` samples (Gu et al.
    2022b, arXiv:2206.12037, section 3).

    Args:
        signal: Samples, held from one to the next.
        states: Coefficients to keep.
        step: Time that a sample takes; after 1/step samples a weight of exp(-1) is left.

    Raises:
        ValueError: If the signal is empty, ``states`` is not positive, or ``step`` is not.
    """
    _not_empty(signal)
    A, B = zero_order_hold(*legs(states), step)
    silent = torch.zeros(1, states, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    _, history = recurrence(LinearStateSpace(A, B, *silent, step=step), signal.double()[None, :, None])
    return history[0].to(signal)


def reconstruct(
    coefficients: Float[Tensor, "*batch states"], points: Float[Tensor, "points"]
) -> Float[Tensor, "*batch points"]:
    """The past, as the state remembers it, at points from 0 (the oldest) to 1 (the present).

    With the fading memory, the point of something that is ``age`` samples old is exp(-step * age).
    """
    return coefficients @ legendre(points, coefficients.shape[-1]).T


class NormalPlusLowRank(NamedTuple):
    """LegS as a matrix that a change of basis makes diagonal, less an outer product (Gu et al. 2022, theorem 1).

    A = V diag(spectrum) V* - P P^T with V unitary: ``normal`` is A + P P^T.
    """

    normal: Float[Tensor, "states states"]
    P: Float[Tensor, "states"]
    spectrum: Complex[Tensor, "states"]
    V: Complex[Tensor, "states states"]


def normal_plus_low_rank(states: int) -> NormalPlusLowRank:
    """Splits LegS; A alone has eigenvectors too, but writing it in them loses all digits already at few states.

    What is left after adding P P^T with P_n = sqrt(n + 1/2) is -1/2 on the diagonal and skew-symmetric beside it, so
    its spectrum is -1/2 plus imaginary numbers, and its eigenvectors are those of a Hermitian matrix.

    Raises:
        ValueError: If ``states`` is not positive.
    """
    A, _ = legs(states)
    P = (_numbers(states) + 0.5).sqrt()
    normal = A + torch.outer(P, P)
    skew = normal + 0.5 * torch.eye(states, dtype=torch.float64)
    frequencies, V = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    return NormalPlusLowRank(normal, P, -0.5 + 1j * frequencies, V)


def diagonal_spectrum(states: int, spectrum: Spectrum = "lin") -> Complex[Tensor, "half"]:
    """The diagonal matrices of S4D, one of each conjugate pair (Gu et al. 2022c, arXiv:2206.11893, section 4).

    ``"legs"`` is LegS without its low-rank part. ``"inv"`` and ``"lin"`` are formulas that come near it: -1/2 + i
    N/pi (N/(2n+1) - 1), and -1/2 + i pi n, whose basis is that of a Fourier series. ``"real"`` is the diagonal of LegS
    itself, -(n+1), without any oscillation.

    Args:
        states: Real numbers that the state has, N; an even number, of which each complex entry takes two.
        spectrum: Which of them.

    Raises:
        ValueError: If ``states`` is not a positive even number, or the name is unknown.
    """
    if states % 2:
        raise ValueError(f"states={states} must be even: a complex number and its conjugate take two")
    n = _numbers(states)[: states // 2]
    if spectrum == "legs":
        return normal_plus_low_rank(states).spectrum[states // 2 :]
    imaginary = {
        "inv": states / math.pi * (states / (2 * n + 1) - 1),
        "lin": math.pi * n,
        "real": torch.zeros_like(n),
    }
    if spectrum not in imaginary:
        raise ValueError(f"spectrum={spectrum!r} is not one of {get_args(Spectrum)}")
    real = -(n + 1) if spectrum == "real" else torch.full_like(n, -0.5)
    return torch.complex(real, imaginary[spectrum])


def _numbers(states: int) -> Float[Tensor, "states"]:
    if states < 1:
        raise ValueError(f"states must be at least 1, got {states}")
    return torch.arange(states, dtype=torch.float64)


def _not_empty(signal: Tensor) -> None:
    if not len(signal):
        raise ValueError("the signal is empty: there is no past to remember")
