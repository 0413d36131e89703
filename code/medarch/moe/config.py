"""The sizes and choices that define one mixture-of-experts layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

HiddenAct = Literal["silu", "gelu"]
RouterOrder = Literal["softmax-then-topk", "topk-then-softmax"]


@dataclass(frozen=True)
class MoEConfig:
    """One sparse mixture-of-experts layer, in the names of transformers' ``MixtralConfig``.

    Attributes:
        hidden_size: Width of a token's vector, in and out.
        intermediate_size: Width inside one expert.
        num_experts: Experts held in memory, E.
        num_experts_per_tok: Experts that one token is sent to, k.
        hidden_act: ``"silu"`` makes each expert a SwiGLU as in Mixtral, with a gate beside the up-projection
            (Shazeer 2020, arXiv:2002.05202); ``"gelu"`` makes it a plain two-layer network.
        router_order: ``"softmax-then-topk"`` takes the k largest of the E probabilities (Mixtral's code,
            Switch); ``"topk-then-softmax"`` takes a softmax over the k largest logits (Shazeer et al. 2017,
            arXiv:1701.06538; Jiang et al. 2024, arXiv:2401.04088).
        norm_topk_prob: Whether the k weights of a token are rescaled to sum to 1. With the softmax last
            they do so anyway.
        router_bias: Whether the router adds a bias to its logits.
        initializer_range: Standard deviation of the normal distribution that fills the weights.

    Raises:
        ValueError: If a size is not a positive whole number, k exceeds E, a choice is unknown, or the
            choices leave the router without a gradient (one expert a token with weights that always equal
            1).
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int = 8
    num_experts_per_tok: int = 2
    hidden_act: HiddenAct = "silu"
    router_order: RouterOrder = "softmax-then-topk"
    norm_topk_prob: bool = True
    router_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts", "num_experts_per_tok"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}: "
                "a token cannot go to more experts than there are"
            )
        if self.hidden_act not in get_args(HiddenAct):
            raise ValueError(f"hidden_act must be one of {get_args(HiddenAct)}, got {self.hidden_act!r}")
        if self.router_order not in get_args(RouterOrder):
            raise ValueError(f"router_order must be one of {get_args(RouterOrder)}, got {self.router_order!r}")
        if not (math.isfinite(self.initializer_range) and self.initializer_range > 0):
            raise ValueError(f"initializer_range must be positive and finite, got {self.initializer_range!r}")
        self._check_router_can_learn()

    def _check_router_can_learn(self) -> None:
        if self.router_order == "topk-then-softmax" and not self.norm_topk_prob:
            raise ValueError(
                "router_order='topk-then-softmax' with norm_topk_prob=False: a softmax over the selected "
                "logits sums to 1 by construction; set norm_topk_prob=True or "
                "router_order='softmax-then-topk'"
            )
        # With a single expert there is no choice to learn, so nothing is lost and nothing is refused.
        if self.num_experts_per_tok == 1 < self.num_experts and self.norm_topk_prob:
            raise ValueError(
                "num_experts_per_tok=1 with norm_topk_prob=True: the one weight is p/p = 1 whatever the "
                "router says, so the router gets no gradient; set norm_topk_prob=False and "
                "router_order='softmax-then-topk', so that the probability is the weight, as in Switch"
            )

    @property
    def gated(self) -> bool:
        """Whether an expert has a gate projection beside its up-projection (SwiGLU)."""
        return self.hidden_act == "silu"
