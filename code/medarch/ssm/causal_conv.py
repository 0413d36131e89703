"""A short convolution along the sequence, each channel by itself, that never looks ahead."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def causal_conv(
    inputs: Float[Tensor, "batch time channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, "channels"] | None = None,
    tail: Float[Tensor, "batch before channels"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch before channels"]]:
    """y_t = bias + sum over k of weight_k x_{t - kernel + 1 + k}: the last weight meets the present input.

    Args:
        inputs: The sequence x, or its next piece.
        weight: One filter a channel.
        bias: Added to the result.
        tail: The ``kernel - 1`` inputs before these; zeros where it is absent.

    Returns:
        The filtered sequence, and the tail for the piece that follows.
    """
    kernel = weight.shape[1]
    if tail is None:
        tail = inputs.new_zeros(inputs.shape[0], kernel - 1, inputs.shape[2])
    joined = torch.cat([tail.to(inputs.dtype), inputs], dim=1)
    time = inputs.shape[1]
    # A handful of multiplications with channels contiguous is faster on a CPU than a grouped conv1d.
    filtered = joined[:, :time] * weight[:, 0]
    for offset in range(1, kernel):
        filtered = torch.addcmul(filtered, joined[:, offset : offset + time], weight[:, offset])
    if bias is not None:
        filtered = filtered + bias
    return filtered, joined[:, time:]
