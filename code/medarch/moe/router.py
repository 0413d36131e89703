"""The router: which experts a token is sent to, and with what weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medarch.moe.config import MoEConfig

NO_EXPERT = -1
"""Stands in ``Routing.indices`` where a slot is given to no expert, as for every slot of a padding token."""


@dataclass(frozen=True, eq=False)
class RouterStatistics:
    """How evenly a batch was spread over the experts. Padding enters none of it.

    Attributes:
        tokens: Tokens that were routed.
        counts: Slots that each expert received; they sum to k times ``tokens``.
        load: Each expert's share of the slots; it sums to 1, or is all 0 where nothing was routed.
        mean_probability: Each expert's softmax probability averaged over the tokens, chosen or not.
        max_over_mean_load: The busiest expert's load over the mean: 1 is even, E is one expert doing
            everything. NaN where nothing was routed.
        entropy: Entropy of ``load`` over its maximum log E: 1 is even, 0 is one expert doing everything; 1
            for a single expert and NaN where nothing was routed.
    """

    tokens: int
    counts: Int[Tensor, "experts"]
    load: Float[Tensor, "experts"]
    mean_probability: Float[Tensor, "experts"]
    max_over_mean_load: float
    entropy: float


class Routing(NamedTuple):
    """What the router decided, for tokens of any leading shape.

    Padding tokens hold 0 in the three floating tensors and ``NO_EXPERT`` in ``indices``.

    Attributes:
        logits: The router's scores, float32 or wider whatever the layer's type.
        probs: Their softmax over all E experts.
        indices: The k chosen experts of each token, the strongest first.
        weights: The k weights with which the experts' outputs are summed.
    """

    logits: Float[Tensor, "*batch experts"]
    probs: Float[Tensor, "*batch experts"]
    indices: Int[Tensor, "*batch k"]
    weights: Float[Tensor, "*batch k"]

    @property
    def statistics(self) -> RouterStatistics:
        """The batch's load by expert, worked out on demand."""
        return router_statistics(self.probs, self.indices)


class TopKRouter(nn.Module):
    """A linear map from a token to one logit an expert, of which the k largest win.

    The logits and the softmax are computed in float32 even where the layer runs in half precision, since
    rounding there flips decisions and destabilises training (Fedus et al. 2021, arXiv:2101.03961).

    Args:
        config: Sizes and the order of softmax and selection.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: MoEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range, generator=generator)
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Routing:
        """Chooses experts and weights for each token.

        Args:
            hidden_states: Token vectors.
            mask: True for a real token, False for padding; without it every token is real.

        Returns:
            The routing of each token.

        Raises:
            ValueError: If a real token, or the router itself, holds NaN or infinity.
        """
        if mask is not None:
            # Whatever stands in the padding, NaN included, must reach neither the check nor a gradient.
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        logits = self.logits(hidden_states)
        probs = logits.softmax(dim=-1)
        if self.config.router_order == "softmax-then-topk":
            weights, indices = probs.topk(self.config.num_experts_per_tok, dim=-1)
            if self.config.norm_topk_prob:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        else:
            chosen, indices = logits.topk(self.config.num_experts_per_tok, dim=-1)
            weights = chosen.softmax(dim=-1)
        if mask is not None:
            padding = ~mask[..., None]
            logits, probs, weights = (tensor.masked_fill(padding, 0) for tensor in (logits, probs, weights))
            indices = indices.masked_fill(padding, NO_EXPERT)
        return Routing(logits, probs, indices, weights)

    def logits(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch experts"]:
        """One score an expert, in float32 or wider."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.to(dtype), self.weight.to(dtype), bias)
        # A NaN or an infinity in a token spreads to its logits, which are far fewer than the token's own
        # numbers.
        if not torch.isfinite(logits).all():
            raise ValueError(self._why_not_finite(hidden_states))
        return logits

    def _why_not_finite(self, hidden_states: Tensor) -> str:
        wrong_tokens = (~torch.isfinite(hidden_states)).any(dim=-1)
        if wrong_tokens.any():
            first = tuple(wrong_tokens.nonzero()[0].tolist())
            return (
                f"hidden_states hold NaN or infinity in {int(wrong_tokens.sum())} of "
                f"{wrong_tokens.numel()} tokens, the first at index {first}: mend what comes before this "
                "layer, or mask these tokens as padding"
            )
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters()):
            return "the router's weights hold NaN or infinity: the training that made them has diverged"
        return "the router's logits overflow: hidden_states and the router's weights are finite but too large"


@torch.no_grad()
def router_statistics(probs: Float[Tensor, "*batch experts"], indices: Int[Tensor, "*batch k"]) -> RouterStatistics:
    """Counts, loads and their evenness for one batch; a token whose slots are all ``NO_EXPERT`` does not
    count.

    Args:
        probs: Softmax probabilities over all experts.
        indices: Chosen experts, ``NO_EXPERT`` where there is none.

    Returns:
        The statistics, without gradient.
    """
    num_experts = probs.shape[-1]
    routed = (indices != NO_EXPERT).any(dim=-1)
    tokens = int(routed.sum())
    # Shifted by one, so that NO_EXPERT falls into a bin of its own, which is dropped.
    counts = torch.bincount(indices.flatten() - NO_EXPERT, minlength=num_experts + 1)[1:]
    load = counts / counts.sum().clamp(min=1)
    mean_probability = probs[routed].sum(dim=0) / max(tokens, 1)
    entropy = float(torch.special.entr(load.double()).sum()) / math.log(num_experts) if num_experts > 1 else 1.0
    return RouterStatistics(
        tokens=tokens,
        counts=counts,
        load=load,
        mean_probability=mean_probability,
        max_over_mean_load=float(load.max()) * num_experts if tokens else math.nan,
        entropy=entropy if tokens else math.nan,
    )
