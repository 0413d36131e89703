"""A selective scan seen as attention: how much of each earlier input is in each output."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from medarch.ssm.mamba import Selection


def hidden_attention(selection: Selection) -> Float[Tensor, "batch channels time time"]:
    """The matrix M by which each channel's scan maps its inputs to its outputs, y = M u, without D and the gate.

    Unrolled, the recurrence reads

        M[t, s] = sum over n of C_t[n] exp(A[n] (delta_{s+1} + ... + delta_t)) delta_s B_s[n]    for s <= t,

    and zero for s > t (Ali et al. 2024, arXiv:2403.01590). Unlike attention weights, its entries may be
    negative, and its rows do not sum to one.

    Args:
        selection: What the scan of a mixer works on.

    Returns:
        One matrix for each sequence and channel; rows are outputs, columns inputs.
    """
    delta = selection.delta.transpose(1, 2)
    elapsed = elapsed_time(selection)
    matrix = torch.zeros_like(elapsed)
    for n in range(selection.A.shape[1]):
        kept = torch.exp(selection.A[:, n, None, None] * elapsed)
        written = delta * selection.B[:, None, :, n]
        matrix += selection.C[:, None, :, None, n] * kept * written[:, :, None, :]
    return matrix.tril()


def retention(selection: Selection) -> Float[Tensor, "batch channels time time"]:
    """The share of what was written at step s (column) that is left at step t (row), mean over the states.

    Zero for s > t, and one on the diagonal.

    Args:
        selection: What the scan of a mixer works on.
    """
    elapsed = elapsed_time(selection)
    kept = torch.zeros_like(elapsed)
    for n in range(selection.A.shape[1]):
        kept += torch.exp(selection.A[:, n, None, None] * elapsed)
    return (kept / selection.A.shape[1]).tril()


def elapsed_time(selection: Selection) -> Float[Tensor, "batch channels time time"]:
    """The sum of the step sizes after step s (column) up to step t (row); zero for s >= t."""
    total = selection.delta.transpose(1, 2).cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).tril()


def mean_distance(weights: Float[Tensor, "*batch time time"]) -> Float[Tensor, "*batch"]:
    """How many positions back these weights look on average, their signs left aside.

    Each row is divided by its sum, so that all positions count alike.

    Args:
        weights: Rows are positions that look, columns those that are looked at.
    """
    size = weights.abs()
    share = size / size.sum(-1, keepdim=True)
    position = torch.arange(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    back = position[:, None] - position
    return (share * back).sum(-1).mean(-1)
