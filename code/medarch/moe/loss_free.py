"""Balance without a loss: a bias for each expert that takes part in the choice and in nothing else."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medarch.moe.config import MoEConfig
from medarch.moe.router import NO_EXPERT, Routing, TopKRouter

Score = Literal["sigmoid", "softmax"]


class LossFreeRouter(TopKRouter):
    """A top-k router whose choice is corrected by a bias that follows the load (Wang et al. 2024, arXiv:2408.15664).

    The experts with the largest ``score + bias`` are chosen, and weighted with the score alone, so that no
    gradient tells the model to be balanced. The bias is no parameter: after each step of the optimiser,
    ``update_bias`` lowers it by a fixed amount where an expert had more slots than the mean, and raises it
    where it had fewer. With sigmoid scores and divided weights this is the router of DeepSeek-V3
    (arXiv:2412.19437, equations 13 to 16) without its groups of experts and its scaling factor.

    Args:
        config: Sizes; ``norm_topk_prob`` divides the k weights of a token by their sum.
        generator: Source of randomness for the initial weights.
        update_rate: By how much the bias moves at each update; 0.001 in both papers.
        score: ``"sigmoid"`` as in the papers, or ``"softmax"``.

    Raises:
        ValueError: If the rate is not positive, the score unknown, or the softmax is asked for after the
            selection, where the scores of experts that were not chosen do not exist.
    """

    e_score_correction_bias: Tensor
    counts: Tensor

    def __init__(
        self,
        config: MoEConfig,
        generator: torch.Generator | None = None,
        update_rate: float = 0.001,
        score: Score = "sigmoid",
    ) -> None:
        super().__init__(config, generator)
        if not update_rate > 0:
            raise ValueError(f"update_rate must be positive, got {update_rate}")
        if score not in get_args(Score):
            raise ValueError(f"score must be one of {get_args(Score)}, got {score!r}")
        if config.router_order != "softmax-then-topk":
            raise ValueError(
                f"router_order={config.router_order!r} scores the chosen experts alone, but the bias is added "
                "to the scores of all: use 'softmax-then-topk'"
            )
        self.update_rate = update_rate
        self.score = score
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        self.register_buffer("counts", torch.zeros(config.num_experts), persistent=False)

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Routing:
        """Chooses experts by score and bias, weights them by score, and in training mode counts the slots.

        Args:
            hidden_states: Token vectors.
            mask: True for a real token, False for padding; without it every token is real.

        Returns:
            The routing of each token; ``probs`` is the softmax of the logits whatever the score, and the
            experts of a token stand in the order of score and bias.

        Raises:
            ValueError: If a real token, or the router itself, holds NaN or infinity.
        """
        if mask is not None:
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        logits = self.logits(hidden_states)
        probs = logits.softmax(dim=-1)
        scores = logits.sigmoid() if self.score == "sigmoid" else probs
        indices = (scores + self.e_score_correction_bias).topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, indices)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # all sigmoids may round to zero
        if mask is not None:
            padding = ~mask[..., None]
            logits, probs, weights = (tensor.masked_fill(padding, 0) for tensor in (logits, probs, weights))
            indices = indices.masked_fill(padding, NO_EXPERT)
        if self.training:
            slots = indices.flatten() - NO_EXPERT
            self.counts += slots.bincount(minlength=self.config.num_experts + 1)[1:]
        return Routing(logits, probs, indices, weights)

    @torch.no_grad()
    def update_bias(self) -> None:
        """Moves the bias by one step against the load counted since the last update, and counts anew.

        To be called once after each step of the optimiser, so that all batches of an accumulated step count.
        With several processes, sum ``counts`` over them first.
        """
        self.e_score_correction_bias += self.update_rate * (self.counts.mean() - self.counts).sign()
        self.counts.zero_()
