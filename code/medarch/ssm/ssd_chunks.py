"""The chunked form of state space duality, forward and backward, in matrix products.

Within a chunk of Q steps the output is a product with a matrix of (Q, Q); between chunks the recurrence is run on
whole states, one step a chunk (Dao & Gu 2024, arXiv:2405.21060, section 6). The backward pass is written by hand: it
keeps the state at each chunk's beginning and computes the matrices anew, since they are larger than what they are
made from.

Heads are split here into ``groups`` that share B and C and ``members`` of each group, so that the scores C B^T are
computed once a group.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def segment_sum(log_decay: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch time time"]:
    """Entry (t, s) is the sum of the values after s up to t; above the diagonal stands minus infinity.

    It is a difference of two running sums. They are taken in float64: where a strong decay has made both large, a
    weak one after it would be lost in their rounding. What lies above the diagonal would be positive; it is struck out
    before anybody takes its exponential.
    """
    sums = log_decay.double().cumsum(-1)
    result = torch.sub(sums[..., :, None], sums[..., None, :]).to(log_decay.dtype)
    # Adding is faster than filling by a mask.
    return result + torch.full(result.shape[-2:], -math.inf, dtype=result.dtype, device=result.device).triu(1)


class Chunks(NamedTuple):
    """A sequence cut into chunks, with what the products need.

    Attributes:
        inputs: dt x.
        B: As given, shared by a group's members.
        C: Likewise.
        scores: C B^T, likewise.
        decay: How much of step s is left at step t of the same chunk; zero above the diagonal.
        since_start: How much of the state before the chunk is left at each step.
        until_end: How much of each step is left at the chunk's end.
    """

    inputs: Float[Tensor, "batch chunks groups members step head"]
    B: Float[Tensor, "batch chunks groups 1 step states"]
    C: Float[Tensor, "batch chunks groups 1 step states"]
    scores: Float[Tensor, "batch chunks groups 1 step step"]
    decay: Float[Tensor, "batch chunks groups members step step"]
    since_start: Float[Tensor, "batch chunks groups members step 1"]
    until_end: Float[Tensor, "batch chunks groups members step 1"]


def cut(
    x: Float[Tensor, "batch time heads head"],
    dt: Float[Tensor, "batch time heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "batch time groups states"],
    C: Float[Tensor, "batch time groups states"],
    size: int,
) -> Chunks:
    """Cuts a sequence whose length is a multiple of ``size`` into chunks."""
    groups = B.shape[2]
    inputs = product(by_chunk(x, size, groups), by_chunk(dt[..., None], size, groups))
    log_decay = by_chunk((dt * A)[..., None], size, groups).squeeze(-1)
    sums = log_decay.double().cumsum(-1)
    B, C = (each.unflatten(1, (-1, size)).transpose(2, 3).unsqueeze(3).contiguous() for each in (B, C))
    return Chunks(
        inputs,
        B,
        C,
        matmul(C, B.mT),
        segment_sum(log_decay).exp_(),
        sums.to(x.dtype).exp()[..., None],
        (sums[..., -1:] - sums).to(x.dtype).exp_()[..., None],
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
        y = add_matmul(y, chunks.decay.mul_(chunks.scores), chunks.inputs)
        ctx.save_for_backward(x, dt, A, B, C, before)
        ctx.size = size
        return by_time(y), states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstates: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs; a leading d stands for the gradient of what follows it."""
        x, dt, A, B, C, before = ctx.saved_tensors
        groups = B.shape[2]
        chunks = cut(x, dt, A, B, C, ctx.size)
        dy = by_chunk(dy, ctx.size, groups).contiguous()
        whole = chunks.since_start[..., -1:, :]
        # The recurrence between chunks, run backwards.
        read = matmul(dy.mT, chunks.C * chunks.since_start)
        dadded, dfirst = pass_states(read.flip(1), whole.flip(1), dstates)
        dadded = dadded.flip(1)

        # Through the states: reading them, and adding to them.
        dC = matmul(dy, before).mul_(chunks.since_start)
        dB = matmul(chunks.inputs, dadded).mul_(chunks.until_end)
        dinputs = matmul(chunks.B * chunks.until_end, dadded.mT)
        # Decay r of a chunk stands between all that is read at r or later and all that was there before: the state
        # that came in, and the steps before r.
        dlog_decay = (dC * chunks.C).sum(-1).flip(-1).cumsum(-1).flip(-1)
        dlog_decay += (dadded * before).sum((-2, -1), keepdim=True).squeeze(-1) * whole.squeeze(-1)
        dlog_decay[..., 1:] += (dB * chunks.B).sum(-1).cumsum(-1)[..., :-1]

        # Through the matrix within the chunk.
        dscores = matmul(dy, chunks.inputs.mT).mul_(chunks.decay)
        dinputs = add_matmul(dinputs, chunks.decay.mul_(chunks.scores).mT, dy)
        dB, dC = dB.sum(3, keepdim=True), dC.sum(3, keepdim=True)
        of_group = dscores.sum(3, keepdim=True)
        dB, dC = add_matmul(dB, of_group.mT, chunks.C), add_matmul(dC, of_group, chunks.B)
        # What goes from step s to step t passes the decays after s up to t. Summed by a product with ones: as a
        # difference of running sums it would lose its digits under a strong decay.
        through = dscores.mul_(chunks.scores)
        after = torch.ones_like(through[0, 0, 0, 0]).triu(1)
        dlog_decay += (through @ after).tril_().sum(-2)

        dlog_decay = by_time(dlog_decay[..., None]).squeeze(-1)
        dinputs = by_time(dinputs)
        ddt = (dinputs * x).sum(-1).addcmul_(dlog_decay, A)
        dA = (dlog_decay * dt).sum((0, 1))
        dB, dC = (each.squeeze(3).transpose(2, 3).flatten(1, 2) for each in (dB, dC))
        return dinputs.mul_(dt[..., None]), ddt, dA, dB, dC, dfirst, None


def pass_states(
    added: Float[Tensor, "batch chunks groups members head states"],
    decay: Float[Tensor, "batch chunks groups members 1 1"],
    states: Float[Tensor, "batch heads head states"],
) -> tuple[Float[Tensor, "batch chunks groups members head states"], Float[Tensor, "batch heads head states"]]:
    """Runs the recurrence from chunk to chunk.

    Returns:
        The state before each chunk, and the state after the last.
    """
    before = torch.empty_like(added)
    current = states.reshape(added[:, 0].shape)
    for slot, new, left in zip(before.unbind(1), added.unbind(1), decay.unbind(1), strict=True):
        slot.copy_(current)
        current = torch.addcmul(new, current, left)
    return before, current.view(states.shape)


def by_chunk(
    tensor: Float[Tensor, "batch time heads width"], size: int, groups: int
) -> Float[Tensor, "batch chunks groups members step width"]:
    """A view of the sequence by chunk and head."""
    return tensor.unflatten(2, (groups, -1)).unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2, 5)


def by_time(
    tensor: Float[Tensor, "batch chunks groups members step width"],
) -> Float[Tensor, "batch time heads width"]:
    """The inverse of ``by_chunk``, as a new tensor."""
    return tensor.permute(0, 1, 4, 2, 3, 5).contiguous().flatten(3, 4).flatten(1, 2)


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
