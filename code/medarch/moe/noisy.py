"""Noisy top-k gating: noise of a learned size decides, so that an expert just below the cut is tried as well."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medarch.moe.config import MoEConfig
from medarch.moe.router import NO_EXPERT, Routing, TopKRouter


class NoisyScores(NamedTuple):
    """What the noisy router decides with, before and after the noise.

    Attributes:
        clean: The linear scores.
        scale: Standard deviation of each score's noise.
        noisy: The scores that compete.
    """

    clean: Float[Tensor, "*batch experts"]
    scale: Float[Tensor, "*batch experts"]
    noisy: Float[Tensor, "*batch experts"]


class NoisyTopKRouter(TopKRouter):
    """Top-k over ``x W_g + N(0, 1) * softplus(x W_noise)`` (Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5).

    The weights are a softmax over the k largest noisy scores. Both matrices begin at zero in the paper
    (appendix A), which makes all experts alike at first and leaves the choice to the noise; here that is
    what ``zero_init`` does. In evaluation mode there is no noise.

    Args:
        config: The layer's sizes; with ``router_order="topk-then-softmax"`` as in the paper, or with
            renormalised probabilities, which is the same.
        generator: Source of randomness for the initial weights.
        noise_generator: Source of the noise; torch's default generator where it is absent.
        zero_init: Whether both matrices begin at zero.
    """

    def __init__(
        self,
        config: MoEConfig,
        generator: torch.Generator | None = None,
        *,
        noise_generator: torch.Generator | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__(config, generator)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))
        self.noise_generator = noise_generator
        if zero_init:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.noise_weight, std=config.initializer_range, generator=generator)

    def scores(self, hidden_states: Float[Tensor, "*batch hidden"]) -> NoisyScores:
        """Clean scores, the size of their noise, and their sum with a fresh draw of it (none in evaluation)."""
        clean = super().logits(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            spread = F.linear(hidden_states.to(clean.dtype), self.noise_weight.to(clean.dtype))
        scale = F.softplus(spread)
        if not self.training:
            return NoisyScores(clean, scale, clean)
        noise = torch.empty_like(clean).normal_(generator=self.noise_generator)
        return NoisyScores(clean, scale, clean + noise * scale)

    def logits(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch experts"]:
        """The scores that compete: with noise in training, without in evaluation."""
        return self.scores(hidden_states).noisy


def smooth_load(scores: NoisyScores, k: int, mask: Bool[Tensor, "*batch"] | None = None) -> Float[Tensor, "experts"]:
    """How many tokens each expert would get if its noise were drawn again, with a gradient.

    For each token and expert this is the probability that the expert's score, with fresh noise of its own and
    all others' noise as drawn, is among the k largest (Shazeer et al. 2017, appendix A, eq. 8 to 10): a
    number of slots cannot be differentiated, this estimate can.

    Args:
        scores: Scores of a router in training mode.
        k: Slots of a token.
        mask: True for a real token.

    Returns:
        Expected slots by expert; they sum to about, not exactly, k times the tokens.

    Raises:
        ValueError: If k is not below the number of experts (every expert is then chosen, whatever the noise).
    """
    num_experts = scores.noisy.shape[-1]
    if not 1 <= k < num_experts:
        raise ValueError(f"k={k} must be at least 1 and below the number of experts, {num_experts}")
    best = scores.noisy.topk(k + 1, dim=-1).values
    last_in, first_out = best[..., k - 1 : k], best[..., k : k + 1]
    # The bar that an expert has to clear is the k-th largest of the others' scores.
    bar = torch.where(scores.noisy >= last_in, first_out, last_in)
    chance = torch.special.ndtr((scores.clean - bar) / scores.scale)
    if mask is not None:
        chance = chance.masked_fill(~mask[..., None], 0)
    return chance.flatten(0, -2).sum(dim=0)


def importance(routing: Routing) -> Float[Tensor, "experts"]:
    """Sum of each expert's weights over the tokens (Shazeer et al. 2017, eq. 6)."""
    expert = routing.indices.flatten()
    weight = routing.weights.flatten()
    num_experts = routing.probs.shape[-1]
    total = weight.new_zeros(num_experts + 1).index_add(0, expert - NO_EXPERT, weight)
    return total[1:]


def squared_variation(values: Float[Tensor, "experts"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation, which the balancing losses of Shazeer et al. 2017 are made of (eq. 7).

    It is the variance (over the number of experts) divided by the squared mean: 0 where all are equal, E - 1
    where one has everything.
    """
    mean = values.mean()
    return (values - mean).square().mean() / mean.square().clamp(min=torch.finfo(values.dtype).tiny)
