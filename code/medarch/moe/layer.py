"""The mixture-of-experts layer: a router and its experts, in the place of a dense feed-forward layer."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medarch.moe.config import MoEConfig
from medarch.moe.experts import Experts
from medarch.moe.router import Routing, TopKRouter


class MoELayer(nn.Module):
    """A sparse mixture of experts (Shazeer et al. 2017, arXiv:1701.06538).

    Each token x gets ``sum over its k experts of weight_e(x) * expert_e(x)``; the other E - k experts are
    not evaluated. The layer is exact: no expert has a capacity, and no token is dropped.

    A batch without tokens, or with padding alone, gives an output of its shape, zero and attached to the
    graph, so that a training step on it runs and adds a gradient of zero.

    Args:
        config: The layer's sizes and choices.
        generator: Source of randomness for the initial weights; torch's default generator where it is absent.
        router: Another router in the place of the top-k router: any module whose
            ``forward(hidden_states, mask)`` returns a ``Routing``.
    """

    def __init__(
        self, config: MoEConfig, generator: torch.Generator | None = None, router: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        # Another router need not be a top-k router, only to route like one.
        self.router = TopKRouter(config, generator) if router is None else cast(TopKRouter, router)
        self.experts = Experts(config, generator)

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch hidden"], Routing]:
        """Routes each token and sums its experts' answers.

        Args:
            hidden_states: Token vectors with any leading shape, in the type of the layer's weights.
            mask: True for a real token, False for padding, which costs no expert any work, enters no
                statistic and gets zeros. Without it every token is real.

        Returns:
            The output, and the routing with its statistics.

        Raises:
            ValueError: If a shape or a type does not fit, or a real token holds NaN or infinity.
        """
        check_inputs(hidden_states, mask, self.config.hidden_size, self.experts.down_proj.dtype)
        routing = self.router(hidden_states, mask)
        return self.experts(hidden_states, routing.indices, routing.weights), routing


def check_inputs(hidden_states: Tensor, mask: Tensor | None, hidden_size: int, dtype: torch.dtype) -> None:
    """Refuses, at the layer's door, what could only fail obscurely within.

    Args:
        hidden_states: What is to be routed.
        mask: Its padding mask, if any.
        hidden_size: The last dimension that the layer expects.
        dtype: The type of the layer's weights.

    Raises:
        ValueError: Naming the two things that clash.
    """
    shape = tuple(hidden_states.shape)
    if hidden_states.dim() < 1 or shape[-1] != hidden_size:
        raise ValueError(f"hidden_states of shape {shape} must end in hidden_size={hidden_size}")
    # Under autocast the matrix products choose their own type.
    if hidden_states.dtype != dtype and not (
        hidden_states.is_floating_point() and torch.is_autocast_enabled(hidden_states.device.type)
    ):
        raise ValueError(
            f"hidden_states are {hidden_states.dtype} but the layer's weights are {dtype}: "
            "convert one of them with .to(...)"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, True for a real token, got {mask.dtype}: convert it with .bool()")
    if tuple(mask.shape) != shape[:-1]:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit hidden_states of shape {shape}: it needs one "
            f"value a token, shape {shape[:-1]}"
        )
