"""The Switch Transformer's router: one expert a token, its probability as the weight, and a capacity."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medarch.moe.capacity import apply_capacity
from medarch.moe.config import MoEConfig
from medarch.moe.layer import MoELayer
from medarch.moe.router import Routing, TopKRouter


class SwitchRouter(TopKRouter):
    """Each token goes to its one best expert, unless that is full (Fedus et al. 2021, arXiv:2101.03961).

    The weight is the probability itself and not the probability over its own sum, which would be 1: this is
    how the router gets a gradient although it picks one expert only. A balancing loss should be given the
    decisions before the capacity, which are ``probs.argmax``.

    Args:
        config: The layer's sizes; ``num_experts_per_tok`` and ``norm_topk_prob`` are replaced by 1 and False.
        generator: Source of randomness for the initial weights.
        capacity_factor: Room of an expert over the even share; without it, and without ``capacity``, no
            token is dropped.
        capacity: The room itself, in tokens of a sequence, as transformers' ``expert_capacity`` has it.
        jitter: During training the router sees its input times a number between 1 - jitter and 1 + jitter.

    Raises:
        ValueError: If both limits are given, or the jitter is not in [0, 1).
    """

    def __init__(
        self,
        config: MoEConfig,
        generator: torch.Generator | None = None,
        *,
        capacity_factor: float | None = None,
        capacity: int | None = None,
        jitter: float = 0.0,
    ) -> None:
        if capacity_factor is not None and capacity is not None:
            raise ValueError(f"give one of capacity_factor={capacity_factor} and capacity={capacity}, and not both")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be at least 0 and below 1, got {jitter!r}")
        top1 = replace(config, num_experts_per_tok=1, norm_topk_prob=False, router_order="softmax-then-topk")
        super().__init__(top1, generator)
        self.capacity_factor, self.capacity, self.jitter = capacity_factor, capacity, jitter

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Routing:
        """The best expert of each token, and ``NO_EXPERT`` for those that find it full.

        Tokens are served in their order, so that no token's fate depends on a later one, save through the
        length of the sequence where the capacity is given as a factor.

        Args:
            hidden_states: Token vectors; the last batch dimension competes for the experts.
            mask: True for a real token; padding takes no one's place.

        Returns:
            The routing, with one slot a token.

        Raises:
            ValueError: If a real token, or the router itself, holds NaN or infinity.
        """
        if self.training and self.jitter:
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter, 1 + self.jitter)
            hidden_states = hidden_states * noise
        routing = super().forward(hidden_states, mask)
        if self.capacity_factor is None and self.capacity is None:
            return routing
        return apply_capacity(routing, self.capacity_factor, capacity=self.capacity)


@torch.no_grad()
def save_switch_(layer: MoELayer, block: nn.Module) -> None:
    """Copies a layer's weights into a ``SwitchTransformersSparseMLP`` of transformers, in place.

    Args:
        layer: A layer with ``hidden_act="gelu"``, whose experts are two plain matrices as Switch's are.
        block: The block of transformers; its activation must be GELU too, for the two to agree.

    Raises:
        ValueError: If the experts differ in kind, number or shape, or the layer has a router bias.
    """
    if layer.config.gated or layer.config.router_bias:
        raise ValueError(
            "Switch has ungated experts and, by default, no router bias, but the layer has "
            f"hidden_act={layer.config.hidden_act!r}, router_bias={layer.config.router_bias}"
        )
    pairs: list[tuple[Tensor, Tensor]] = [(block.get_parameter("router.classifier.weight"), layer.router.weight)]
    for expert, (up_proj, down_proj) in enumerate(layer.experts.weights()):
        for name, ours in (("wi", up_proj), ("wo", down_proj)):
            try:
                pairs.append((block.get_parameter(f"experts.expert_{expert}.{name}.weight"), ours))
            except AttributeError:
                raise ValueError(
                    f"the block has no expert {expert}, but the layer has {layer.config.num_experts}"
                ) from None
    for theirs, ours in pairs:
        if theirs.shape != ours.shape:
            raise ValueError(f"the block's shape {tuple(theirs.shape)} differs from the layer's {tuple(ours.shape)}")
        theirs.copy_(ours)
