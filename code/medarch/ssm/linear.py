"""The linear state space model, and three ways to compute what it answers.

A state h of N numbers follows a linear differential equation, driven by the input u and read by the output y:

    h'(t) = A h(t) + B u(t),      y(t) = C h(t) + D u(t)                   (Gu et al. 2022, arXiv:2111.00396, eq. 1)

On samples that are ``step`` apart it becomes a recurrence (see ``medarch.ssm.discretise``),

    h_k = A h_{k-1} + B u_k,      y_k = C h_k + D u_k                                          (ibid., eq. 3)

where h_k has seen u_k already. Control theory numbers its states so that they have not; its h_{k+1} is our h_k.

``recurrence`` is the specification. ``convolution`` and ``scan`` give the same outputs without going step by step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LinearStateSpace:
    """The four matrices of a linear state space model.

    Attributes:
        A: How the state moves by itself.
        B: How the input moves the state.
        C: How the output is read from the state.
        D: What passes from the input to the output beside the state.
        step: Time between two samples, in the unit of time in which A is a rate; None for the differential equation.

    Raises:
        ValueError: If the shapes, types or devices do not fit together, a matrix is empty, or the step is not positive.
    """

    A: Float[Tensor, "states states"]
    B: Float[Tensor, "states inputs"]
    C: Float[Tensor, "outputs states"]
    D: Float[Tensor, "outputs inputs"]
    step: float | None = None

    def __post_init__(self) -> None:
        shapes = ", ".join(f"{name}: {tuple(getattr(self, name).shape)}" for name in "ABCD")
        matrices = [getattr(self, name) for name in "ABCD"]
        if any(matrix.ndim != 2 or 0 in matrix.shape for matrix in matrices):
            raise ValueError(f"A, B, C and D must be matrices with at least one row and column, got {shapes}")
        states, inputs, outputs = len(self.A), self.B.shape[1], len(self.C)
        expected = ((states, states), (states, inputs), (outputs, states), (outputs, inputs))
        if tuple(tuple(matrix.shape) for matrix in matrices) != expected:
            raise ValueError(
                f"{shapes} do not fit: A is states x states, B states x inputs, C outputs x states, D outputs x inputs"
            )
        kinds = {(matrix.dtype, matrix.device) for matrix in matrices}
        if len(kinds) > 1:
            raise ValueError(f"A, B, C and D must have one type and device, got {sorted(map(str, kinds))}")
        if self.step is not None and not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"step must be positive and finite, or None for continuous time, got {self.step!r}")

    @property
    def stable(self) -> bool:
        """Whether the state dies away once the input is silent: decided by the eigenvalues of A alone."""
        return spectral_abscissa(self.A) < 0 if self.step is None else spectral_radius(self.A) < 1


def spectral_radius(A: Float[Tensor, "states states"]) -> float:
    """The largest absolute value of an eigenvalue: by what factor a recurrence grows or shrinks, step after step."""
    return float(torch.linalg.eigvals(A.detach()).abs().max())


def spectral_abscissa(A: Float[Tensor, "states states"]) -> float:
    """The largest real part of an eigenvalue: at what rate the differential equation grows, negative if it decays."""
    return float(torch.linalg.eigvals(A.detach()).real.max())


def recurrence(
    system: LinearStateSpace,
    u: Float[Tensor, "batch time inputs"],
    initial_state: Float[Tensor, "batch states"] | None = None,
) -> tuple[Float[Tensor, "batch time outputs"], Float[Tensor, "batch time states"]]:
    """One step after the other, as the equations are written: the specification of the other forms.

    Args:
        system: In discrete time.
        u: Input.
        initial_state: State before the first step; zeros where it is absent.

    Returns:
        The outputs and the states; the last of these is what a continued sequence begins with.

    Raises:
        ValueError: If the system is in continuous time, the sequence is empty, or shapes or types clash.
    """
    driven = _driven(system, u, initial_state)
    state = u.new_zeros(len(u), len(system.A)) if initial_state is None else initial_state
    states = []
    for pushed in driven.unbind(1):  # taken apart once, or the backward pass would be quadratic in the length
        state = state @ system.A.T + pushed
        states.append(state)
    history = torch.stack(states, dim=1)
    return history @ system.C.T + u @ system.D.T, history


def scan(
    system: LinearStateSpace,
    u: Float[Tensor, "batch time inputs"],
    initial_state: Float[Tensor, "batch states"] | None = None,
) -> tuple[Float[Tensor, "batch time outputs"], Float[Tensor, "batch time states"]]:
    """The same states in log2(time) rounds, each over the whole sequence at once.

    Before a round every state knows the last ``reach`` inputs. It takes over what the state ``reach`` steps earlier
    knows, aged by A to that power, and so knows twice as many (Blelloch 1990; this order is Hillis and Steele's).

    Args, returns and errors are those of ``recurrence``.
    """
    history = _driven(system, u, initial_state)
    if initial_state is not None:
        first = history[:, :1] + (initial_state @ system.A.T)[:, None]
        history = torch.cat([first, history[:, 1:]], dim=1)
    power, reach = system.A, 1
    while reach < u.shape[1]:
        older = history[:, :-reach] @ power.T
        history = torch.cat([history[:, :reach], history[:, reach:] + older], dim=1)
        power, reach = power @ power, 2 * reach
    return history @ system.C.T + u @ system.D.T, history


def impulse_response(system: LinearStateSpace, length: int) -> Float[Tensor, "outputs inputs time"]:
    """What an input of 1 at the first step leaves at each later one: C A^k B, without the direct path D.

    It is the kernel of the convolution (Gu et al. 2022, eq. 5). The powers are built by doubling: once the first m
    columns B, AB, ..., A^(m-1) B are known, A^m times all of them are the next m.

    Raises:
        ValueError: If the system is in continuous time or ``length`` is not positive.
    """
    _discrete(system)
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    columns, power = system.B[None], system.A
    while len(columns) < length:
        columns, power = torch.cat([columns, power @ columns]), power @ power
    return (system.C @ columns[:length]).permute(1, 2, 0)


def convolution(system: LinearStateSpace, u: Float[Tensor, "batch time inputs"]) -> Float[Tensor, "batch time outputs"]:
    """The outputs as a convolution of the input with the impulse response, from a state of zeros.

    Raises:
        ValueError: If the system is in continuous time, the sequence is empty, or shapes or types clash.
    """
    _driven(system, u, None)
    return causal_convolution(u, impulse_response(system, u.shape[1])) + u @ system.D.T


def causal_convolution(
    u: Float[Tensor, "batch time inputs"], kernel: Float[Tensor, "outputs inputs time"]
) -> Float[Tensor, "batch time outputs"]:
    """Sums every input and every earlier step by the kernel, with the fast Fourier transform.

    The sequence is padded to twice its length, because the transform alone convolves around a circle and would let
    the end of the sequence leak into its beginning.
    """
    time = u.shape[1]
    padded = 2 * time
    spectrum = torch.einsum(
        "bfi,oif->bfo", torch.fft.rfft(u, padded, dim=1), torch.fft.rfft(kernel[..., :time], padded, dim=-1)
    )
    return torch.fft.irfft(spectrum, padded, dim=1)[:, :time]


def _driven(system: LinearStateSpace, u: Tensor, initial_state: Tensor | None) -> Float[Tensor, "batch time states"]:
    """B u for each step, after everything has been checked."""
    _discrete(system)
    if u.ndim != 3 or u.shape[2] != system.B.shape[1] or not u.shape[1]:
        raise ValueError(
            f"u has the shape {tuple(u.shape)}; it must be (batch, time, inputs) with at least one step and "
            f"{system.B.shape[1]} inputs, as B of shape {tuple(system.B.shape)} says"
        )
    if u.dtype != system.A.dtype or u.device != system.A.device:
        raise ValueError(f"u is {u.dtype} on {u.device}, but the system is {system.A.dtype} on {system.A.device}")
    if initial_state is not None and initial_state.shape != (len(u), len(system.A)):
        raise ValueError(
            f"initial_state has the shape {tuple(initial_state.shape)}, but u of shape {tuple(u.shape)} and A of shape "
            f"{tuple(system.A.shape)} need {(len(u), len(system.A))}"
        )
    return u @ system.B.T


def _discrete(system: LinearStateSpace) -> None:
    if system.step is None:
        raise ValueError("the system is a differential equation (step=None): discretise it first")
