"""What a state is made of: how much each of the inputs that it has seen has left in it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from medarch.ssm.mamba import Selection


def contributions(selection: Selection, step: int = -1) -> Float[Tensor, "batch seen channels states"]:
    """What each input has left in the state after ``step``; the state is their sum.

    Unrolled, the recurrence of the selective scan reads

        h_t[n] = sum over s <= t of exp(A[n] (delta_{s+1} + ... + delta_t)) delta_s B_s[n] u_s.

    Args:
        selection: What the scan of a mixer works on, from an empty state on.
        step: The position t; counted from the end where it is negative.

    Returns:
        The terms of the sum, one for each position up to ``step``.

    Raises:
        IndexError: If there is no such position.
    """
    time = selection.u.shape[1]
    if not -time <= step < time:
        raise IndexError(f"step={step} lies outside of the {time} positions that were read")
    seen = step % time + 1
    u, delta, B = (each[:, :seen] for each in (selection.u, selection.delta, selection.B))
    since = delta.sum(1, keepdim=True) - delta.cumsum(1)
    left = torch.exp(since[..., None] * selection.A)
    return left * (delta * u)[..., None] * B[:, :, None, :]


def state_shares(selection: Selection) -> Float[Tensor, "batch time time"]:
    """How much of each state (row) comes from each input (column): sizes of the contributions over their sum.

    The size of a contribution is its Euclidean norm over channels and states. Contributions may point against one
    another, so that a state can be smaller than its parts; the shares of a row sum to one all the same.

    Args:
        selection: As in ``contributions``.
    """
    time = selection.u.shape[1]
    shares = selection.u.new_zeros(selection.u.shape[0], time, time)
    for step in range(time):
        sizes = contributions(selection, step).flatten(2).norm(dim=-1)
        shares[:, step, : step + 1] = sizes / sizes.sum(-1, keepdim=True)
    return shares
