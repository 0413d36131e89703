"""Does every adapter learn? A question to ask before the training, for the loss falls as long as one of them does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medarch.adaptation.lora import adapters


class GradientNorms(NamedTuple):
    """Size of the gradients of one correction."""

    A: float
    B: float


def check_gradients(model: nn.Module, loss: Callable[[], Float[Tensor, ""]]) -> dict[str, GradientNorms]:
    """Asks for the gradient of each correction, and lets none pass that would not learn.

    While ``B`` is zero ``A`` has no gradient, however well all is connected. For the question, each ``B`` is
    therefore filled with small noise, and afterwards put back. No gradient of the model is touched.

    Args:
        model: With LoRA.
        loss: Runs the model on some data of the task and returns its loss.

    Returns:
        The norms by the name of the matrix.

    Raises:
        ValueError: If a correction has no gradient, one that is zero throughout, or one that is not finite; it is
            named. Also if the model has no LoRA.
    """
    found = adapters(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA whose gradients could be looked at")
    kept = {adapter: adapter.B.detach().clone() for adapter in found.values()}
    noise = torch.Generator().manual_seed(0)
    devices = sorted({adapter.B.device.index or 0 for adapter in kept if adapter.B.device.type == "cuda"})
    try:
        with torch.no_grad():
            for adapter in kept:
                adapter.B.copy_(0.02 * torch.randn(adapter.B.shape, generator=noise, dtype=adapter.B.dtype))
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            value = loss()
        parts = [part for adapter in kept for part in (adapter.A, adapter.B)]
        # A loss that asks for no gradient has met nothing that is trained.
        gradients = torch.autograd.grad(value, parts, allow_unused=True) if value.requires_grad else ()
    finally:
        with torch.no_grad():
            for adapter, before in kept.items():
                adapter.B.copy_(before)
    norms = [0.0 if gradient is None else float(gradient.norm()) for gradient in gradients or [None] * len(parts)]
    result = {name: GradientNorms(*norms[2 * i : 2 * i + 2]) for i, name in enumerate(found)}
    idle = [name for name, norm in result.items() if not (0 < norm.A < float("inf") and 0 < norm.B < float("inf"))]
    if idle:
        raise ValueError(
            f"no usable gradient reaches LoRA on {', '.join(idle)}: the loss does not depend on these matrices, or not "
            "in numbers; take them out of the targets, or look for where the model leaves them out"
        )
    return result
