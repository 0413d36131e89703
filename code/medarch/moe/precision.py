"""What becomes of a router's decisions when its arithmetic is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from medarch.moe.router import Routing, TopKRouter


class BFloat16Router(TopKRouter):
    """The router with its arithmetic in bfloat16: what ``TopKRouter`` takes care not to do.

    Inputs and weights are rounded, and so are the logits and the softmax. Fedus et al. 2021 (arXiv:2101.03961,
    section 2.4) found such training unstable in their models and compute the router in float32.
    """

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Routing:
        """The routing, computed in bfloat16 and handed on as float32."""
        routing = super().forward(hidden_states, mask)
        return Routing(routing.logits.float(), routing.probs.float(), routing.indices, routing.weights.float())

    def logits(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch experts"]:
        """One score an expert, in bfloat16."""
        if not torch.isfinite(hidden_states).all():
            raise ValueError(self._why_not_finite(hidden_states))
        bias = None if self.bias is None else self.bias.bfloat16()
        return F.linear(hidden_states.bfloat16(), self.weight.bfloat16(), bias)


@dataclass(frozen=True)
class Rounding:
    """What rounding does to a router's decisions.

    Attributes:
        largest_logit: Largest absolute logit before rounding.
        probability_error: Largest change of a probability.
        changed: Share of the tokens that go to another set of k experts.
    """

    largest_logit: float
    probability_error: float
    changed: float


@torch.no_grad()
def rounding(logits: Float[Tensor, "*batch experts"], k: int, dtype: torch.dtype = torch.bfloat16) -> Rounding:
    """Compares decisions from logits as they are with those from logits that were rounded once.

    Only the logits are rounded; the softmax is taken in float64 in both cases. Of two logits that become
    equal, the one of the lower-numbered expert is chosen.

    Args:
        logits: A router's scores.
        k: Experts a token.
        dtype: The narrower type.

    Raises:
        ValueError: If there is no token, or ``k`` exceeds the experts.
    """
    logits = logits.reshape(-1, logits.shape[-1])
    if not len(logits) or not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k={k} with logits of shape {tuple(logits.shape)}: at least one token and k of the experts")
    rounded = logits.to(dtype)
    before, after = (each.double().softmax(-1) for each in (logits, rounded))
    chosen = [
        each.double().argsort(dim=-1, descending=True, stable=True)[:, :k].sort(-1).values for each in (logits, rounded)
    ]
    return Rounding(
        largest_logit=float(logits.abs().max()),
        probability_error=float((before - after).abs().max()),
        changed=float((chosen[0] != chosen[1]).any(-1).double().mean()),
    )
