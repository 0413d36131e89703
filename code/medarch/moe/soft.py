"""Soft routing: every expert for every token, or every expert for a few mixtures of all tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medarch.moe.config import MoEConfig
from medarch.moe.dense import feed_forward
from medarch.moe.experts import Experts
from medarch.moe.layer import check_inputs
from medarch.moe.router import TopKRouter


class DenseRouter(TopKRouter):
    """A dense gate: all experts work on each token, weighted by the softmax (Jacobs et al. 1991).

    It is top-k routing with k = E, where nothing is left to choose and the output is a smooth function of the
    scores. Its cost is that of all experts.

    Args:
        config: The layer's sizes; ``num_experts_per_tok`` is replaced by ``num_experts``.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: MoEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(replace(config, num_experts_per_tok=config.num_experts, norm_topk_prob=True), generator)


class SoftRouting(NamedTuple):
    """The scores of a Soft MoE layer and its two sets of weights.

    Attributes:
        logits: One score for each token and slot.
        dispatch: Share of each token in each slot; over the tokens of a group they sum to 1.
        combine: Share of each slot's answer in each token's output; over the slots they sum to 1.
    """

    logits: Float[Tensor, "*batch slots"]
    dispatch: Float[Tensor, "*batch slots"]
    combine: Float[Tensor, "*batch slots"]


class SoftMoE(nn.Module):
    """Soft mixture of experts (Puigcerver et al. 2023, arXiv:2308.00951, section 2).

    Each expert has a few slots. What a slot holds is a weighted mean of all tokens of the group, and what a
    token gets is a weighted mean of all slots' answers. Nothing is chosen and nothing is dropped; the cost is
    set by the number of slots and not by the number of experts. Since each slot mixes all tokens, each output
    depends on all tokens, later ones included.

    Args:
        config: Sizes of the experts; ``num_experts_per_tok`` plays no part.
        slots_per_expert: p in the paper.
        generator: Source of randomness for the initial weights.
        normalise: Whether tokens and slot parameters are scaled to length 1, with one learned scale, before
            they are compared (section 2.3). Without it the softmax hardens as the hidden size grows.

    Raises:
        ValueError: If ``slots_per_expert`` is less than 1.
    """

    def __init__(
        self,
        config: MoEConfig,
        slots_per_expert: int,
        generator: torch.Generator | None = None,
        *,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert must be at least 1, got {slots_per_expert}")
        self.config, self.slots_per_expert, self.normalise = config, slots_per_expert, normalise
        slots = config.num_experts * slots_per_expert
        self.phi = nn.Parameter(torch.empty(config.hidden_size, slots))
        nn.init.normal_(self.phi, std=config.hidden_size**-0.5, generator=generator)
        self.scale = nn.Parameter(torch.ones(()))
        self.experts = Experts(config, generator)

    def forward(
        self, hidden_states: Float[Tensor, "*batch tokens hidden"], mask: Bool[Tensor, "*batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "*batch tokens hidden"], SoftRouting]:
        """Mixes the tokens of each group into slots, works on the slots, and mixes the answers.

        Args:
            hidden_states: Token vectors; the dimension before the last is a group.
            mask: True for a real token; padding enters no slot and gets zeros.

        Returns:
            The output and the two sets of weights.

        Raises:
            ValueError: If a shape or a type does not fit, or a real token holds NaN or infinity.
        """
        check_inputs(hidden_states, mask, self.config.hidden_size, self.experts.down_proj.dtype)
        if hidden_states.dim() < 2:
            raise ValueError(f"hidden_states of shape {tuple(hidden_states.shape)} hold no group to mix")
        if mask is None:
            mask = hidden_states.new_ones(hidden_states.shape[:-1], dtype=torch.bool)
        hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        routing = self.route(hidden_states, mask)
        slots = routing.dispatch.transpose(-1, -2) @ hidden_states
        by_expert = slots.unflatten(-2, (self.config.num_experts, self.slots_per_expert)).unbind(dim=-3)
        answers = [
            feed_forward(inputs, *matrices, self.config.hidden_act)
            for inputs, matrices in zip(by_expert, self.experts.weights(), strict=True)
        ]
        return routing.combine @ torch.cat(answers, dim=-2), routing

    def route(
        self, hidden_states: Float[Tensor, "*batch tokens hidden"], mask: Bool[Tensor, "*batch tokens"]
    ) -> SoftRouting:
        """One score for each token and slot, and its softmax over the tokens and over the slots."""
        tokens: Tensor = hidden_states
        phi: Tensor = self.phi
        if self.normalise:
            tokens = nn.functional.normalize(tokens, dim=-1)
            phi = self.scale * nn.functional.normalize(phi, dim=0)
        scores = tokens @ phi
        if not torch.isfinite(scores).all():
            raise ValueError("hidden_states or phi hold NaN or infinity, or their product overflows")
        padding = ~mask[..., None]
        # The least number in place of minus infinity: a group of padding alone must not become NaN.
        dispatch = scores.masked_fill(padding, torch.finfo(scores.dtype).min).softmax(dim=-2).masked_fill(padding, 0)
        return SoftRouting(scores, dispatch, scores.softmax(dim=-1).masked_fill(padding, 0))
