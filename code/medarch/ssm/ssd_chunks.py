"""The chunked form of state space duality, forward and backward, in matrix products.

Within a chunk of Q steps the output is a product with a matrix of (Q, Q); between chunks the recurrence is run on
whole states, one step a chunk (Dao & Gu 2024, arXiv:2405.21060, section 6). The backward pass is written by hand: it
keeps the state at each chunk's beginning and computes the matrices anew, since they are larger than what they are
made from.

Heads are split here into ``groups`` that share B and C and ``members`` of each group, so that the scores are computed
once a group. Matrices within a chunk stand with the earlier step, from which something comes, before the later one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class Chunks(NamedTuple):
    """A sequence cut into chunks, with what the products need.

    Attributes:
        inputs: dt x.
        B: As given, shared by a group's members.
        C: Likewise.
        scores: B_s . C_t, zero where t comes before s.
        decay: How much of step s is left at step t. Where t comes before s stand ones, which the scores strike out.
        since_start: How much of the state before the chunk is left at each step.
        until_end: How much of each step is left at the chunk's end.
    """

    inputs: Float[Tensor, "chunks batch groups members step head"]
    B: Float[Tensor, "chunks batch groups 1 step states"]
    C: Float[Tensor, "chunks batch groups 1 step states"]
    scores: Float[Tensor, "chunks batch groups 1 earlier later"]
    decay: Float[Tensor, "chunks batch groups members earlier later"]
    since_start: Float[Tensor, "chunks batch groups members step 1"]
    until_end: Float[Tensor, "chunks batch groups members step 1"]


def cut(
    x: Float[Tensor, "batch time heads head"],
    dt: Float[Tensor, "batch time heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "batch time groups states"],
    C: Float[Tensor, "batch time groups states"],
    size: int,
) -> Chunks:
    """Cuts a sequence whose length is a multiple of ``size`` into chunks.

    The exponent of ``decay`` is the sum of the logarithms after step s up to step t. As a difference of two running
    sums it would lose its digits where a strong decay has made both large, and as a quotient of two exponentials it
    would overflow; as a product with a triangle of ones it does neither.
    """
    groups = B.shape[2]
    log_decay = by_chunk((dt * A)[..., None], size, groups)
    ones = x.new_ones(size, size)
    decay = (product(log_decay.mT, ones.triu(1)) @ ones.triu()).exp_()
    B, C = (by_chunk(each, size, groups).contiguous() for each in (B, C))
    return Chunks(
        product(by_chunk(x, size, groups), by_chunk(dt[..., None], size, groups)),
        B,
        C,
        matmul(B, C.mT).triu_(),
        decay,
        log_decay.cumsum(-2).exp_(),
        decay[..., -1:],
    )


class ChunkedSSD(torch.autograd.Function):
    """y_t = h_t C_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, for a length that is a multiple of the chunk's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """The outputs, and the state after the last step."""
        chunks = cut(x, dt, A, B, C, size)
        # What each chunk by itself would leave behind, were there nothing before it.
        added = matmul(chunks.inputs.mT, chunks.B * chunks.until_end)
        before, states = pass_states(added, chunks.since_start[..., -1:, :], states)
        y = matmul(chunks.C * chunks.since_start, before.mT)
        y = add_matmul(y, chunks.decay.mul_(chunks.scores).mT, chunks.inputs)
        ctx.save_for_backward(x, dt, A, B, C, before)
        ctx.size = size
        return by_time(y), states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstates: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs; a leading d stands for the gradient of what follows it."""
        x, dt, A, B, C, before = ctx.saved_tensors
        chunks = cut(x, dt, A, B, C, ctx.size)
        dy = by_chunk(dy, ctx.size, B.shape[2]).contiguous()
        whole = chunks.since_start[..., -1:, :]
        # The recurrence between chunks, run from the end.
        read = matmul(dy.mT, chunks.C * chunks.since_start)
        dadded, dfirst = pass_states(read, whole, dstates, reverse=True)

        # Through the states: reading them, and adding to them.
        dC = matmul(dy, before).mul_(chunks.since_start)
        dB = matmul(chunks.inputs, dadded).mul_(chunks.until_end)
        dinputs = matmul(chunks.B * chunks.until_end, dadded.mT)
        # Decay r of a chunk stands between all that is read at r or later and all that was there before: the state
        # that came in, and the steps before r.
        dlog_decay = (dC * chunks.C).sum(-1).flip(-1).cumsum(-1).flip(-1)
        dlog_decay += (dadded * before).sum((-2, -1))[..., None] * whole.squeeze(-1)
        dlog_decay[..., 1:] += (dB * chunks.B).sum(-1).cumsum(-1)[..., :-1]

        # Through the matrix within the chunk.
        dscores = matmul(chunks.inputs, dy.mT).mul_(chunks.decay)
        dinputs = add_matmul(dinputs, chunks.decay.mul_(chunks.scores), dy)
        of_group = dscores.sum(3, keepdim=True).triu_()
        dB = add_matmul(dB.sum(3, keepdim=True), of_group, chunks.C)
        dC = add_matmul(dC.sum(3, keepdim=True), of_group.mT, chunks.B)
        # What goes from step s to step t passes the decays after s up to t; these are summed as in the exponent.
        passing = dscores.mul_(chunks.scores) @ torch.ones_like(dscores[0, 0, 0, 0]).tril()
        dlog_decay += passing.triu_(1).sum(-2)

        dlog_decay = by_time(dlog_decay[..., None]).squeeze(-1)
        dinputs = by_time(dinputs)
        ddt = (dinputs * x).sum(-1).addcmul_(dlog_decay, A)
        dA = (dlog_decay * dt).sum((0, 1))
        return dinputs.mul_(dt[..., None]), ddt, dA, by_time(dB), by_time(dC), dfirst, None


def pass_states(
    added: Float[Tensor, "chunks batch groups members head states"],
    decay: Float[Tensor, "chunks batch groups members 1 1"],
    states: Float[Tensor, "batch heads head states"],
    reverse: bool = False,
) -> tuple[Float[Tensor, "chunks batch groups members head states"], Float[Tensor, "batch heads head states"]]:
    """Runs the recurrence from chunk to chunk, or from the last chunk to the first.

    Returns:
        The state that each chunk meets, and the state that is left at the end.
    """
    met = added.new_empty(len(added) + 1, *added.shape[1:])
    slots, steps = list(met), list(zip(added, decay, strict=True))
    if reverse:
        slots.reverse()
        steps.reverse()
    slots[0].copy_(states.reshape(slots[0].shape))
    for index, (new, left) in enumerate(steps):
        torch.addcmul(new, slots[index], left, out=slots[index + 1])
    # A view would keep all the others alive.
    return met[1:] if reverse else met[:-1], slots[-1].clone().view(states.shape)


def by_chunk(
    tensor: Float[Tensor, "batch time heads width"], size: int, groups: int
) -> Float[Tensor, "chunks batch groups members step width"]:
    """A view of the sequence by chunk and head."""
    return tensor.unflatten(2, (groups, -1)).unflatten(1, (-1, size)).permute(1, 0, 3, 4, 2, 5)


def by_time(
    tensor: Float[Tensor, "chunks batch groups members step width"],
) -> Float[Tensor, "batch time heads width"]:
    """The inverse of ``by_chunk``, as a new tensor."""
    return tensor.permute(1, 0, 4, 2, 3, 5).contiguous().flatten(3, 4).flatten(1, 2)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left * right in the order of dimensions that is shown: torch would keep the order in memory."""
    result = left.new_empty(torch.broadcast_shapes(left.shape, right.shape))
    return torch.mul(left, right, out=result)


def matmul(left: Float[Tensor, "*batch m k"], right: Float[Tensor, "*batch k n"]) -> Float[Tensor, "*batch m n"]:
    """One product for each of the leading dimensions, none of which is broadcast."""
    return torch.bmm(left.flatten(0, -3), right.flatten(0, -3)).view(*left.shape[:-1], right.shape[-1])


def add_matmul(
    total: Float[Tensor, "*batch m n"], left: Float[Tensor, "*batch m k"], right: Float[Tensor, "*batch k n"]
) -> Float[Tensor, "*batch m n"]:
    """Adds left @ right to ``total``, in place."""
    total.view(-1, *total.shape[-2:]).baddbmm_(left.flatten(0, -3), right.flatten(0, -3))
    return total
