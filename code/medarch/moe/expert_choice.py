"""Expert choice: the experts pick their tokens, and each picks equally many."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medarch.moe.config import MoEConfig
from medarch.moe.router import NO_EXPERT, Routing, TopKRouter


class ExpertChoiceRouter(TopKRouter):
    """Each expert takes the tokens that score highest with it (Zhou et al. 2022, arXiv:2202.09368, section 3.2).

    With n tokens in a group, E experts and a capacity factor c, each expert takes ``c * n / E`` tokens, so that
    a token has c experts on average: any number from none to all E. The load is even by construction. The
    price is that a token's experts depend on the other tokens of its group, later ones included, which a
    decoder that predicts the next token must not allow.

    The routing has a slot for each expert. A token's slots begin with the experts that took it, the strongest
    first, and the rest hold ``NO_EXPERT``.

    Args:
        config: Sizes; its ``num_experts_per_tok`` is the capacity factor where none is given.
        generator: Source of randomness for the initial weights.
        capacity_factor: c, the mean number of experts a token.

    Raises:
        ValueError: If the factor is not positive and finite, or exceeds the number of experts.
    """

    def __init__(
        self, config: MoEConfig, generator: torch.Generator | None = None, *, capacity_factor: float | None = None
    ) -> None:
        super().__init__(config, generator)
        factor = float(config.num_experts_per_tok if capacity_factor is None else capacity_factor)
        if not (math.isfinite(factor) and 0 < factor <= config.num_experts):
            raise ValueError(
                f"capacity_factor={factor} must be above 0 and at most num_experts={config.num_experts}: "
                "an expert cannot take more tokens than there are"
            )
        self.capacity_factor = factor

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Routing:
        """Lets the experts choose among the tokens of each group.

        Args:
            hidden_states: Token vectors. The last batch dimension is a group, out of which the experts choose;
                flatten the leading ones to let them choose out of the whole batch.
            mask: True for a real token; padding is chosen by no expert and does not raise their number.

        Returns:
            The routing with E slots a token. Each expert takes ``round(c * n / E)`` of n real tokens, halves
            rounded up, but at least one where there is any, and never more than n.

        Raises:
            ValueError: If there is no group dimension, or a real token or the router holds NaN or infinity.
        """
        if hidden_states.dim() < 2:
            raise ValueError(f"hidden_states of shape {tuple(hidden_states.shape)} hold no group to choose from")
        if mask is None:
            mask = hidden_states.new_ones(hidden_states.shape[:-1], dtype=torch.bool)
        hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        logits = self.logits(hidden_states).masked_fill(~mask[..., None], 0)
        probs = logits.softmax(dim=-1).masked_fill(~mask[..., None], 0)
        taken = self.choose(probs, mask)
        # Experts that took a token come first in its slots, by their scores; the others are behind them.
        weights, indices = probs.masked_fill(~taken, -1).sort(dim=-1, descending=True, stable=True)
        idle = weights < 0
        return Routing(logits, probs, indices.masked_fill(idle, NO_EXPERT), weights.masked_fill(idle, 0))

    def choose(
        self, probs: Float[Tensor, "*batch experts"], mask: Bool[Tensor, "*batch"]
    ) -> Bool[Tensor, "*batch experts"]:
        """Which expert takes which token: in each column of a group the largest scores."""
        num_experts = probs.shape[-1]
        columns = probs.detach().masked_fill(~mask[..., None], -1).transpose(-1, -2)
        order = columns.argsort(dim=-1, descending=True, stable=True)
        real = mask.sum(dim=-1)
        quota = (self.capacity_factor * real / num_experts + 0.5).floor().long()
        quota = torch.minimum(quota.clamp(min=1), real)[..., None, None]
        place = torch.arange(probs.shape[-2], device=probs.device)
        served = (place < quota).expand_as(columns)
        return torch.zeros_like(served).scatter(-1, order, served).transpose(-1, -2)


def experts_per_token(routing: Routing) -> Int[Tensor, "*batch"]:
    """How many experts each token has: 0 to E under expert choice, k without a limit under token choice."""
    return (routing.indices != NO_EXPERT).sum(dim=-1)
