"""Routing that learns nothing: by chance and by a frozen hash. What a learned router has to beat."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medarch.moe.config import MoEConfig
from medarch.moe.router import NO_EXPERT, Routing, TopKRouter


class HashRouter(TopKRouter):
    """A router that is never trained: frozen random directions decide, and all weights are equal.

    Equal vectors go to equal experts and similar ones to similar experts, as with hashing by random
    hyperplanes. (Roller et al. 2021, arXiv:2106.04426, hash the token's number instead, which a layer that
    sees vectors alone does not know.) The logits are not attached to the graph.

    Args:
        config: The layer's sizes.
        generator: Source of the directions.
    """

    def __init__(self, config: MoEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(replace(config, initializer_range=config.hidden_size**-0.5), generator)
        self.requires_grad_(False)

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Routing:
        """The k best-aligned directions of each token, with equal weights."""
        return _with_equal_weights(super().forward(hidden_states.detach(), mask))


class RandomRouter(TopKRouter):
    """A router that does not look: k experts drawn anew for each token, all weights equal.

    Args:
        config: The layer's sizes.
        generator: Source of the draws; torch's default generator where it is absent.
    """

    def __init__(self, config: MoEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator)
        self.requires_grad_(False)
        self.generator = generator

    def logits(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch experts"]:
        """Uniform noise in the place of scores."""
        shape = (*hidden_states.shape[:-1], self.config.num_experts)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        device = hidden_states.device if self.generator is None else self.generator.device
        drawn = torch.rand(shape, generator=self.generator, dtype=dtype, device=device)
        return drawn.to(hidden_states.device)

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Routing:
        """k different experts for each token, by chance."""
        return _with_equal_weights(super().forward(hidden_states.detach(), mask))


def _with_equal_weights(routing: Routing) -> Routing:
    k = routing.indices.shape[-1]
    equal = torch.full_like(routing.weights, 1 / k)
    return routing._replace(weights=equal.masked_fill(routing.indices == NO_EXPERT, 0))
