"""The selective scan: a linear recurrence whose coefficients change with every step of the sequence.

Shapes, throughout: ``batch`` sequences of ``time`` steps in ``channels`` channels, each of which keeps ``states``
numbers. With u the input and h the state,

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,      y_t = C_t . h_t + D u_t

for each channel by itself (Gu & Dao 2023, arXiv:2312.00752, eq. 2 and algorithm 2). A and D are constants of a
channel; the step size delta is given for each channel and step, B and C for each step. A is discretised by
zero-order hold and B by Euler's rule, as in the paper's own code.

Three forms compute it. ``selective_scan_loop`` is the specification, ``selective_scan_associative`` shows why a
recurrence need not be computed in order, and the chunked form is the one to use. On a GPU a kernel takes its place,
see ``medarch.ssm.triton_scan``.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Method = Literal["auto", "loop", "associative", "chunked", "triton"]
CHUNK = 32
"""Steps whose states are held at a time; at usual sizes they stay in the processor's cache."""


def selective_scan(
    u: Float[Tensor, "batch channels time"],
    delta: Float[Tensor, "batch channels time"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "batch states time"],
    C: Float[Tensor, "batch states time"],
    D: Float[Tensor, "channels"] | None = None,
    z: Float[Tensor, "batch channels time"] | None = None,
    delta_bias: Float[Tensor, "channels"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Float[Tensor, "batch channels states"] | None = None,
    method: Method = "auto",
) -> Any:
    """Runs the recurrence over a sequence; the arguments are those of ``selective_scan_fn`` of mamba_ssm.

    Half-precision inputs are computed with in float32. All inputs have gradients, ``initial_state`` and the last
    state too.

    Args:
        u: Input.
        delta: Step sizes, in the unit of time in which A is a rate. Positive, unless ``delta_softplus`` makes them so.
        A: Rates of decay, one for each number of the state; all negative.
        B: What the input adds to the state.
        C: What is read from the state.
        D: What passes by the state; nothing does where it is absent.
        z: Gate: the output is multiplied by silu(z).
        delta_bias: Added to ``delta`` first.
        delta_softplus: Whether log(1 + exp(.)) is taken of the step sizes then.
        return_last_state: Whether the state after the last step is returned too.
        initial_state: State before the first step; zeros where it is absent.
        method: ``"loop"``, ``"associative"``, ``"chunked"`` or ``"triton"``; ``"auto"`` takes the kernel on a GPU where
            Triton is installed, the loop for a single step, and the chunked form otherwise.

    Returns:
        The output, of the shape and type of ``u``; with ``return_last_state`` the output and the state.

    Raises:
        ValueError: If a shape, type or device clashes, the sequence is empty, or A is not negative (which is looked
            at on a CPU alone: on a GPU the look would wait for all work before it); the message names both sides.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state)
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not one of {get_args(Method)}")
    if method == "auto":
        method = _best_method(u)
    if method == "triton":
        if not _has_triton():
            raise ValueError("method='triton' needs the package triton, which is not installed: use method='chunked'")
        from medarch.ssm.triton_scan import selective_scan_triton

        y, last = selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
        return (y, last) if return_last_state else y
    wide = torch.promote_types(u.dtype, torch.float32)
    step = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)[:, None]
    step = F.softplus(step) if delta_softplus else step
    state = u.new_zeros(*u.shape[:2], A.shape[1], dtype=wide) if initial_state is None else initial_state.to(wide)
    form = {"loop": selective_scan_loop, "associative": selective_scan_associative, "chunked": selective_scan_chunked}
    y, last = form[method](u.to(wide), step, A.to(wide), B.to(wide), C.to(wide), state)
    if D is not None:
        y = y + D.to(wide)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y


def _best_method(u: Tensor) -> Method:
    if u.is_cuda and u.dtype != torch.float64 and _has_triton():
        return "triton"
    # A single step, as when a model writes, leaves nothing to gain from chunks.
    return "loop" if u.shape[-1] == 1 else "chunked"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


Scanned = tuple[Float[Tensor, "batch channels time"], Float[Tensor, "batch channels states"]]


def selective_scan_loop(
    u: Float[Tensor, "batch channels time"],
    delta: Float[Tensor, "batch channels time"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "batch states time"],
    C: Float[Tensor, "batch states time"],
    state: Float[Tensor, "batch channels states"],
) -> Scanned:
    """The recurrence as it is written, one step after the other: the specification of the other forms.

    Returns:
        C_t . h_t for every step, and the last state.
    """
    outputs = []
    # Taken apart once: indexing one step at a time would make the backward pass quadratic in the length.
    for u_t, delta_t, B_t, C_t in zip(u.unbind(-1), delta.unbind(-1), B.unbind(-1), C.unbind(-1), strict=True):
        decay = torch.exp(delta_t[:, :, None] * A)
        state = decay * state + (delta_t * u_t)[:, :, None] * B_t[:, None, :]
        outputs.append((state * C_t[:, None, :]).sum(-1))
    return torch.stack(outputs, dim=-1), state


def selective_scan_associative(
    u: Float[Tensor, "batch channels time"],
    delta: Float[Tensor, "batch channels time"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "batch states time"],
    C: Float[Tensor, "batch states time"],
    state: Float[Tensor, "batch channels states"],
) -> Scanned:
    """The recurrence in log2(time) rounds, each of which treats all steps at once (Blelloch 1990, section 1.4).

    A step is the map h -> a h + x. Two maps after each other are again such a map, (a2 a1, a2 x1 + x2), and it does
    not matter which neighbours are joined first. Each round joins every step with the one that lies ``span`` before
    it, and doubles the span; in the end each step holds the map from the very beginning. All states of all steps are
    in memory at the same time.
    """
    decay = torch.exp(delta[:, :, None, :] * A[:, :, None])
    added = (delta * u)[:, :, None, :] * B[:, None]
    added = torch.cat([added[..., :1] + decay[..., :1] * state[..., None], added[..., 1:]], dim=-1)
    span = 1
    while span < u.shape[-1]:
        added = torch.cat([added[..., :span], added[..., span:] + decay[..., span:] * added[..., :-span]], dim=-1)
        decay = torch.cat([decay[..., :span], decay[..., span:] * decay[..., :-span]], dim=-1)
        span *= 2
    return torch.einsum("bdnt,bnt->bdt", added, C), added[..., -1]


def selective_scan_chunked(
    u: Float[Tensor, "batch channels time"],
    delta: Float[Tensor, "batch channels time"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "batch states time"],
    C: Float[Tensor, "batch states time"],
    state: Float[Tensor, "batch channels states"],
    chunk: int = CHUNK,
) -> Scanned:
    """The recurrence in chunks of the sequence, keeping no more than the states between the chunks.

    Within a chunk, all decays are computed in one operation, and each step is then a single multiplication with
    addition over all channels and states, in place. The backward pass computes the states of a chunk once more from
    the state at its beginning, as the paper does on a GPU (section 3.3.2), so that memory grows by one state a chunk
    and not by one a step.
    """
    y, last = _ChunkedScan.apply(
        u.permute(2, 0, 1).contiguous(),
        delta.permute(2, 0, 1).contiguous(),
        A.T.contiguous(),
        B.permute(2, 0, 1).contiguous(),
        C.permute(2, 0, 1).contiguous(),
        state.transpose(1, 2).contiguous(),
        chunk,
    )
    return y.permute(1, 2, 0), last.transpose(1, 2)


class _Chunk:
    """Room for the decays and states of one chunk, used again for every chunk."""

    def __init__(self, steps: int, like: Tensor) -> None:
        self.decay = like.new_empty(steps, *like.shape)
        self.states = torch.empty_like(self.decay)
        self.decays, self.rows = self.decay.unbind(), self.states.unbind()

    def fill(self, delta: Tensor, added: Tensor, A: Tensor, B: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states of the steps given; ``delta``, ``added``: (steps, batch, channels)."""
        steps = len(delta)
        decay, states = self.decay[:steps], self.states[:steps]
        torch.mul(delta[:, :, None], A, out=decay).exp_()
        torch.mul(added[:, :, None], B[..., None], out=states)
        for decay_t, state in zip(self.decays[:steps], self.rows[:steps], strict=True):
            state.addcmul_(decay_t, before)
            before = state
        return decay, states


class _ChunkedScan(torch.autograd.Function):
    """Time first and channels last, so that each step is one contiguous piece of memory."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        time = len(u)
        room = _Chunk(min(chunk, time), state)
        y, added = torch.empty_like(u), delta * u
        boundaries = state.new_empty(-(-time // chunk), *state.shape)
        for number, start in enumerate(range(0, time, chunk)):
            part = slice(start, start + chunk)
            boundaries[number] = state
            _, states = room.fill(delta[part], added[part], A, B[part], state)
            torch.matmul(C[part][:, :, None], states, out=y[part][:, :, None])
            state = states[-1].clone()
        ctx.save_for_backward(u, delta, A, B, C, boundaries)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, boundaries = ctx.saved_tensors
        time, chunk = len(u), ctx.chunk
        dy, carry = dy.contiguous(), dlast
        room, added = _Chunk(min(chunk, time), boundaries[0]), delta * u
        gradient = torch.empty_like(room.states)
        gradients = gradient.unbind()
        dadded, ddelta, dA = torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(A)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        for number in reversed(range(len(boundaries))):
            part = slice(number * chunk, min((number + 1) * chunk, time))
            steps = part.stop - part.start
            decay, states = room.fill(delta[part], added[part], A, B[part], boundaries[number])
            dstates = gradient[:steps]
            torch.mul(dy[part][:, :, None], C[part][..., None], out=dstates)
            gradients[steps - 1].add_(carry)
            for t in range(steps - 2, -1, -1):
                gradients[t].addcmul_(room.decays[t + 1], gradients[t + 1])
            carry = decay[0] * dstates[0]
            torch.matmul(states, dy[part][..., None], out=dC[part][..., None])
            torch.matmul(dstates, added[part][..., None], out=dB[part][..., None])
            torch.matmul(B[part][:, :, None], dstates, out=dadded[part][:, :, None])
            # What reaches delta A: gradient times decay times the state before; the buffers are free now.
            decay.mul_(dstates)
            decay[1:].mul_(states[:-1])
            decay[0].mul_(boundaries[number])
            torch.sum(torch.mul(decay, A, out=states), dim=2, out=ddelta[part])
            dA += decay.mul_(delta[part][:, :, None]).sum((0, 1))
        return dadded * delta, ddelta.addcmul_(dadded, u), dA, dB, dC, carry, None


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> None:
    """Refuses what the scan cannot run on.

    Raises:
        ValueError: If a shape, type or device clashes, the sequence is empty, or A, on a CPU, is not negative.
    """
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"u must be (batch, channels, time) and A (channels, states), got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    (batch, channels, time), states = u.shape, A.shape[1]
    if not u.numel() or not states:
        raise ValueError(f"u of shape {tuple(u.shape)} with {states} states: nothing to scan; give at least one step")
    wanted = {
        "delta": (delta, (batch, channels, time)),
        "A": (A, (channels, states)),
        "B": (B, (batch, states, time)),
        "C": (C, (batch, states, time)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, time)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
    }
    if not u.is_floating_point():
        raise ValueError(f"u must be of floating point, got {u.dtype}")
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but u {tuple(u.shape)} and A {tuple(A.shape)} call for "
                f"{shape}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of floating point, got {tensor.dtype}")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device} and u on {u.device}: move them to one device")
        if (tensor.dtype == torch.float64) != (u.dtype == torch.float64):
            raise ValueError(f"{name} is {tensor.dtype} and u {u.dtype}: give both in float64, or neither")
    if A.device.type == "cpu" and not bool((A < 0).all()):
        raise ValueError(
            f"A must be negative, so that the state fades; its largest entry is {float(A.max()):.4g}. "
            "Parametrise it as A = -exp(A_log)"
        )
