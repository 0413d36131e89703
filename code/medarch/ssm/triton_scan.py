"""The selective scan as one kernel for a GPU, written in Triton: states live in registers and never meet memory.

One program computes one channel of one sequence. It walks along time in blocks; within a block all steps are treated
at once by an associative scan (Blelloch 1990, section 1.4), and the last state of a block is where the next begins.
What is read and written are the inputs and the output, once each, in order of time, which is how they lie in memory.
The backward pass walks the blocks from the last to the first and computes their states once more, each from the state
at its beginning, the only ones that the forward pass has kept (Gu & Dao 2023, arXiv:2312.00752, section 3.3.2).

This module needs Triton and is imported only where it is used. With ``TRITON_INTERPRET=1`` in the environment before
Triton is first imported, its interpreter runs the kernels on a CPU, step by step and very slowly, which is enough to
check them.
"""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers of the compiler's, for which there are no types here.

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

INTERPRETED = bool(triton.knobs.runtime.interpret)
KEPT = tl.constexpr(16 if INTERPRETED else 64)
"""The backward pass begins at states that lie so many steps apart; the interpreter's inputs are short."""


def selective_scan_triton(
    u: Float[Tensor, "batch channels time"],
    delta: Float[Tensor, "batch channels time"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "batch states time"],
    C: Float[Tensor, "batch states time"],
    D: Float[Tensor, "channels"] | None = None,
    z: Float[Tensor, "batch channels time"] | None = None,
    delta_bias: Float[Tensor, "channels"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "batch channels states"] | None = None,
) -> tuple[Float[Tensor, "batch channels time"], Float[Tensor, "batch channels states"]]:
    """The function of ``medarch.ssm.scan.selective_scan``, which also says what the arguments are and checks them.

    All arithmetic is in float32, whatever the type of the inputs. Gradients of B and C are added up over channels in
    the order in which the programs finish, so that their last digits differ from run to run.

    Returns:
        The output, of the shape and type of ``u``, and the state after the last step in float32.

    Raises:
        ValueError: If the tensors are not on a CUDA device and Triton's interpreter is off, or they are float64.
    """
    if not (u.is_cuda or INTERPRETED):
        raise ValueError(
            f"the Triton scan needs tensors on a CUDA device, these are on {u.device}: use method='chunked', or set "
            "TRITON_INTERPRET=1 before Triton is imported to run it slowly on a CPU"
        )
    if torch.float64 in (u.dtype, A.dtype):
        raise ValueError("the Triton scan computes in float32, but got float64: use method='chunked'")
    # Within the function gradients are always off, so whether they are wanted is asked here.
    wanted = torch.is_grad_enabled()
    return _TritonScan.apply(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, wanted)


@triton.jit
def _join(decay_before, added_before, decay, added):
    """Two steps h -> decay h + added, one after the other, are again such a step."""
    return decay_before * decay, decay * added_before + added


@triton.jit
def _step_size(raw, bias, SOFTPLUS: tl.constexpr):
    """The step sizes from what was given for them."""
    step = raw.to(tl.float32) + bias
    if SOFTPLUS:
        # log(1 + e) would lose small step sizes to rounding; the correction is that of Higham 2002, section 1.14.1.
        e = tl.exp(tl.minimum(step, 20.0))
        one_and_e = 1.0 + e
        lost = one_and_e == 1.0
        log1p = tl.where(lost, e, tl.log(one_and_e) * e / tl.where(lost, 1.0, one_and_e - 1.0))
        step = tl.where(step > 20.0, step, log1p)
    return step


@triton.jit
def _states_of_block(step, u, rates, B, before):
    """What is added and the states of a block, each (states, time), from the state before it."""
    decay = tl.exp(rates[:, None] * step[None, :])
    added = B * (step * u)[None, :]
    decayed, states = tl.associative_scan((decay, added), 1, _join)
    return added, states + decayed * before[:, None]


def _tuned(shapes: list[tuple[int, int]], zeroed: list[str]) -> Any:
    """Tries these numbers of steps a block and of warps at the first call of a size, and keeps the fastest.

    The interpreter takes the smallest block and does not time.
    """
    if INTERPRETED:
        shapes = [(KEPT.value, 1)]
    configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in shapes]
    return triton.autotune(configs, key=["channels", "about", "STATES"], reset_to_zero=zeroed)


@_tuned([(64, 2), (128, 4), (256, 4), (256, 8)], zeroed=[])
@triton.jit(do_not_specialize=["about"])
def _forward_kernel(
    u_at, delta_at, A_at, B_at, C_at, D_at, z_at, bias_at, start_at, y_at, kept_at, last_at,
    channels, time, states, about,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel, sequence = tl.program_id(0), tl.program_id(1)
    row = sequence.to(tl.int64) * channels + channel
    n, steps = tl.arange(0, STATES), tl.arange(0, BLOCK)
    real = n < states
    rates = tl.load(A_at + channel * states + n, mask=real, other=0.0).to(tl.float32)
    skip = tl.load(D_at + channel).to(tl.float32) if D_at is not None else 0.0
    bias = tl.load(bias_at + channel).to(tl.float32) if bias_at is not None else 0.0
    state = tl.load(start_at + row * states + n, mask=real, other=0.0)
    kept_row = row * tl.cdiv(time, KEPT)
    if kept_at is not None:
        tl.store(kept_at + kept_row * states + n, state, mask=real)
    shared = sequence.to(tl.int64) * states * time
    for block in range(tl.cdiv(time, BLOCK)):
        t = block * BLOCK + steps
        inside = t < time
        both = real[:, None] & inside[None, :]
        at = row * time + t
        shared_at = shared + n[:, None] * time + t[None, :]
        u = tl.load(u_at + at, mask=inside, other=0.0).to(tl.float32)
        B = tl.load(B_at + shared_at, mask=both, other=0.0).to(tl.float32)
        C = tl.load(C_at + shared_at, mask=both, other=0.0).to(tl.float32)
        step = _step_size(tl.load(delta_at + at, mask=inside, other=0.0), bias, SOFTPLUS)
        step = tl.where(inside, step, 0.0)  # beyond the end the state stays as it is
        _, h = _states_of_block(step, u, rates, B, state)
        y = tl.sum(C * h, axis=0) + skip * u
        if z_at is not None:
            z = tl.load(z_at + at, mask=inside, other=0.0).to(tl.float32)
            y *= z * tl.sigmoid(z)
        tl.store(y_at + at, y, mask=inside)
        if kept_at is not None:
            begins = ((t + 1) % KEPT == 0) & (t + 1 < time)
            kept = kept_at + (kept_row + (t + 1) // KEPT)[None, :] * states + n[:, None]
            tl.store(kept, h, mask=real[:, None] & begins[None, :])
        state = tl.sum(tl.where((steps == BLOCK - 1)[None, :], h, 0.0), axis=1)
    tl.store(last_at + row * states + n, state, mask=real)


@_tuned([(64, 2), (128, 4), (128, 8)], zeroed=["dB_at", "dC_at"])
@triton.jit(do_not_specialize=["about"])
def _backward_kernel(
    u_at, delta_at, A_at, B_at, C_at, D_at, z_at, bias_at, kept_at, dy_at, dlast_at,
    du_at, ddelta_at, dA_at, dB_at, dC_at, dD_at, dz_at, dbias_at, dstart_at,
    channels, time, states, about,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel, sequence = tl.program_id(0), tl.program_id(1)
    row = sequence.to(tl.int64) * channels + channel
    n, steps = tl.arange(0, STATES), tl.arange(0, BLOCK)
    real = n < states
    rates = tl.load(A_at + channel * states + n, mask=real, other=0.0).to(tl.float32)
    skip = tl.load(D_at + channel).to(tl.float32) if D_at is not None else 0.0
    bias = tl.load(bias_at + channel).to(tl.float32) if bias_at is not None else 0.0
    kept_row = row * tl.cdiv(time, KEPT)
    shared = sequence.to(tl.int64) * states * time
    # What a little more of the state would add to the loss, as the step after it sees: it runs backward in time.
    dstate = tl.load(dlast_at + row * states + n, mask=real, other=0.0)
    drates = tl.zeros([STATES], dtype=tl.float32)
    dskip = tl.zeros([BLOCK], dtype=tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)
    blocks = tl.cdiv(time, BLOCK)
    for turn in range(blocks):
        block = blocks - 1 - turn
        t = block * BLOCK + steps
        inside = t < time
        both = real[:, None] & inside[None, :]
        at = row * time + t
        shared_at = shared + n[:, None] * time + t[None, :]
        u = tl.load(u_at + at, mask=inside, other=0.0).to(tl.float32)
        B = tl.load(B_at + shared_at, mask=both, other=0.0).to(tl.float32)
        C = tl.load(C_at + shared_at, mask=both, other=0.0).to(tl.float32)
        raw = tl.load(delta_at + at, mask=inside, other=0.0)
        step = tl.where(inside, _step_size(raw, bias, SOFTPLUS), 0.0)
        before = tl.load(kept_at + (kept_row + block * (BLOCK // KEPT)) * states + n, mask=real, other=0.0)
        added, h = _states_of_block(step, u, rates, B, before)

        dy = tl.load(dy_at + at, mask=inside, other=0.0).to(tl.float32)
        if z_at is not None:
            z = tl.load(z_at + at, mask=inside, other=0.0).to(tl.float32)
            opened = tl.sigmoid(z)
            y = tl.sum(C * h, axis=0) + skip * u
            tl.store(dz_at + at, dy * y * opened * (1 + z * (1 - opened)), mask=inside)
            dy *= z * opened
        tl.atomic_add(dC_at + shared_at, dy[None, :] * h, mask=both, sem="relaxed")

        # g_t = C_t dy_t + decay_(t+1) g_(t+1): a recurrence of the same kind, from the end to the beginning.
        later = t + 1 < time
        step_later = _step_size(tl.load(delta_at + at + 1, mask=later, other=0.0), bias, SOFTPLUS)
        decay_later = tl.exp(rates[:, None] * tl.where(later, step_later, 0.0)[None, :])
        decayed, g = tl.associative_scan((decay_later, C * dy[None, :]), 1, _join, reverse=True)
        g += decayed * dstate[:, None]
        dstate = tl.sum(tl.where((steps == 0)[None, :], g, 0.0), axis=1)

        tl.atomic_add(dB_at + shared_at, g * (step * u)[None, :], mask=both, sem="relaxed")
        dexponent = g * (h - added)  # what a state holds beyond what was just added has decayed by exp(rate * step)
        drates += tl.sum(dexponent * step[None, :], axis=1)
        gB = tl.sum(g * B, axis=0)
        tl.store(du_at + at, gB * step + skip * dy, mask=inside)
        dstep = tl.sum(dexponent * rates[:, None], axis=0) + gB * u
        if SOFTPLUS:
            dstep *= tl.sigmoid(raw.to(tl.float32) + bias)
        tl.store(ddelta_at + at, dstep, mask=inside)
        dskip += dy * u
        dbias += tl.where(inside, dstep, 0.0)
    first = _step_size(tl.load(delta_at + row * time), bias, SOFTPLUS)
    tl.store(dstart_at + row * states + n, dstate * tl.exp(rates * first), mask=real)
    tl.store(dA_at + row * states + n, drates, mask=real)
    if D_at is not None:
        tl.store(dD_at + row, tl.sum(dskip))
    if bias_at is not None:
        tl.store(dbias_at + row, tl.sum(dbias))


class _TritonScan(torch.autograd.Function):
    """The two kernels as one function with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        start: Tensor | None,
        softplus: bool,
        gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        given = (u, delta, A, B, C, D, z, delta_bias)
        inputs = [None if each is None else each.contiguous() for each in given]
        (batch, channels, time), states = u.shape, A.shape[1]
        state = u.new_zeros(batch, channels, states, dtype=torch.float32)
        if start is not None:
            state = start.to(torch.float32).contiguous()
        y, last = u.new_empty(u.shape), torch.empty_like(state)
        training = gradients and any(ctx.needs_input_grad)
        kept = state.new_empty(batch, channels, triton.cdiv(time, KEPT.value), states) if training else None
        ctx.sizes = (channels, time, states, _about(time))
        ctx.options = {"SOFTPLUS": softplus, "STATES": triton.next_power_of_2(states)}
        with _on(u.device):
            _forward_kernel[channels, batch](*inputs, state, y, kept, last, *ctx.sizes, **ctx.options)
        ctx.save_for_backward(*inputs, kept)
        ctx.start_dtype = None if start is None else start.dtype
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        u, delta, A, B, C, D, z, bias = inputs
        batch, channels, _ = u.shape
        du, ddelta, dstart = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(dlast)
        dA = A.new_empty(batch, *A.shape, dtype=torch.float32)
        dB, dC = torch.zeros_like(B, dtype=torch.float32), torch.zeros_like(C, dtype=torch.float32)
        dD = None if D is None else D.new_empty(batch, channels, dtype=torch.float32)
        dz = None if z is None else torch.empty_like(z)
        dbias = None if bias is None else bias.new_empty(batch, channels, dtype=torch.float32)
        results = (du, ddelta, dA, dB, dC, dD, dz, dbias, dstart)
        with _on(u.device):
            _backward_kernel[channels, batch](
                *inputs, kept, dy.contiguous(), dlast.contiguous(), *results, *ctx.sizes, **ctx.options
            )
        return (
            du,
            ddelta,
            dA.sum(0).to(A.dtype),
            dB.to(B.dtype),
            dC.to(C.dtype),
            None if dD is None else dD.sum(0).to(D.dtype),
            dz,
            None if dbias is None else dbias.sum(0).to(bias.dtype),
            None if ctx.start_dtype is None else dstart.to(ctx.start_dtype),
            None,
            None,
        )


def _about(time: int) -> int:
    """The length in powers of two, up to where longer ones want nothing else: what fits one fits its neighbours."""
    return min(triton.next_power_of_2(time), 4096)


def _on(device: torch.device) -> Any:
    """Makes the tensors' GPU the current one, where Triton starts its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
