"""Shared and fine-grained experts: more and smaller experts to choose from, and some that every token visits."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medarch.moe.config import MoEConfig
from medarch.moe.dense import DenseMLP
from medarch.moe.layer import MoELayer
from medarch.moe.router import Routing


def fine_grained(config: MoEConfig, pieces: int) -> MoEConfig:
    """The same weights and the same work in experts cut into ``pieces`` (Dai et al. 2024, arXiv:2401.06066, eq. 6).

    Each expert becomes ``pieces`` experts of a fraction of its width, and a token is sent to ``pieces`` times as
    many. What grows is the router, by the same factor, and the number of teams that a token can be given.

    Args:
        config: The layer with its large experts.
        pieces: Into how many parts each is cut.

    Raises:
        ValueError: If the width cannot be divided so.
    """
    if pieces < 1 or config.intermediate_size % pieces:
        raise ValueError(
            f"experts of intermediate_size={config.intermediate_size} cannot be cut into pieces={pieces} of equal width"
        )
    return replace(
        config,
        intermediate_size=config.intermediate_size // pieces,
        num_experts=config.num_experts * pieces,
        num_experts_per_tok=config.num_experts_per_tok * pieces,
    )


def possible_teams(config: MoEConfig) -> int:
    """How many different sets of experts a token can be sent to: k out of E, in no order."""
    return math.comb(config.num_experts, config.num_experts_per_tok)


class SharedExpertMoE(nn.Module):
    """A mixture of experts beside a shared expert, which every token visits and no router chooses.

    With x a token, the layer returns

        s * sum over the k chosen experts of weight_e(x) * expert_e(x)  +  g(x) * shared(x),

    where s is ``routed_scaling_factor``. In DeepSeekMoE g is 1 (Dai et al. 2024, arXiv:2401.06066, eq. 9, where the
    residual is added outside); in Qwen-MoE it is ``sigmoid(w . x)``, one number a token. Several shared experts are
    one that is as wide as all of them together.

    Args:
        config: The routed experts.
        shared_intermediate_size: Width of the shared expert.
        shared_gate: Whether g is learned, as in Qwen-MoE.
        routed_scaling_factor: The number s.
        generator: Source of randomness for the initial weights.
        router: Another router for the routed experts, such as ``LossFreeRouter`` for DeepSeek-V3.

    Raises:
        ValueError: If the width is not a positive whole number or the factor not positive.
    """

    def __init__(
        self,
        config: MoEConfig,
        shared_intermediate_size: int,
        shared_gate: bool = False,
        routed_scaling_factor: float = 1.0,
        generator: torch.Generator | None = None,
        router: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(routed_scaling_factor) and routed_scaling_factor > 0):
            raise ValueError(f"routed_scaling_factor must be positive and finite, got {routed_scaling_factor!r}")
        self.config = config
        self.routed_scaling_factor = routed_scaling_factor
        self.routed = MoELayer(config, generator, router)
        self.shared_expert = DenseMLP(
            config.hidden_size, shared_intermediate_size, config.hidden_act, config.initializer_range, generator
        )
        self.shared_expert_gate: nn.Parameter | None = None
        if shared_gate:
            self.shared_expert_gate = nn.Parameter(torch.empty(config.hidden_size))
            nn.init.normal_(self.shared_expert_gate, std=config.initializer_range, generator=generator)

    def gate(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch"]:
        """How far each token opens the shared expert: between 0 and 1 where there is a gate, else 1."""
        if self.shared_expert_gate is None:
            return hidden_states.new_ones(hidden_states.shape[:-1])
        return torch.sigmoid(hidden_states @ self.shared_expert_gate)

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch hidden"], Routing]:
        """The sum of the chosen experts and of the shared one.

        Args:
            hidden_states: Token vectors of any leading shape.
            mask: True for a real token, False for padding, which gets zeros.

        Returns:
            The output, and the routing of the routed experts.

        Raises:
            ValueError: If a shape or a type does not fit, or a real token holds NaN or infinity.
        """
        answer, routing = self.routed(hidden_states, mask)
        if mask is not None:
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        shared = self.shared_expert(hidden_states)
        if self.shared_expert_gate is not None:
            shared = self.gate(hidden_states)[..., None] * shared
        return self.routed_scaling_factor * answer + shared, routing


@torch.no_grad()
def load_shared_(layer: SharedExpertMoE, block: nn.Module) -> None:
    """Copies the weights of a block of transformers 5 into the layer, in place.

    Args:
        layer: Where they go; its sizes and choices must be the block's.
        block: ``Qwen2MoeSparseMoeBlock``, ``DeepseekV2Moe`` or ``DeepseekV3MoE``.

    Raises:
        ValueError: If the block has another structure or a tensor another shape; the message names it.
    """
    source = {
        **dict(block.named_parameters()),
        **{name: buffer for name, buffer in block.named_buffers() if name.endswith("e_score_correction_bias")},
    }
    gate = "shared_expert_gate.weight"
    shared = "shared_expert" if gate in source else "shared_experts"
    try:
        weights = {
            "routed.router.weight": source.pop("gate.weight"),
            "routed.experts.gate_up_proj": source.pop("experts.gate_up_proj"),
            "routed.experts.down_proj": source.pop("experts.down_proj"),
            "shared_expert.up_proj": torch.cat(
                [source.pop(f"{shared}.gate_proj.weight"), source.pop(f"{shared}.up_proj.weight")]
            ),
            "shared_expert.down_proj": source.pop(f"{shared}.down_proj.weight"),
        }
    except KeyError as missing:
        raise ValueError(
            f"{type(block).__name__} has no {missing}: it is no block with routed and shared experts of transformers 5"
        ) from missing
    if gate in source:
        weights["shared_expert_gate"] = source.pop(gate)[0]
    if "gate.e_score_correction_bias" in source:
        weights["routed.router.e_score_correction_bias"] = source.pop("gate.e_score_correction_bias")
    if source:
        raise ValueError(f"{type(block).__name__} also has {sorted(source)[0]}, for which the layer has no place")
    own = layer.state_dict()
    if clash := sorted(set(own) ^ set(weights)):
        where = "layer" if clash[0] in own else "block"
        raise ValueError(f"only the {where} has {clash[0]}: give the layer the block's gate and router")
    for name, weight in weights.items():
        if own[name].shape != weight.shape:
            raise ValueError(
                f"{name}: the layer's shape {tuple(own[name].shape)} differs from the block's {tuple(weight.shape)}"
            )
        own[name].copy_(weight)


def shared_forward_reference(
    layer: SharedExpertMoE, hidden_states: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """The layer written out token by token, for the softmax router: what ``forward`` must return."""
    config, experts = layer.config, layer.routed.experts.weights()
    outputs = []
    for token in hidden_states:
        probs = (layer.routed.router.weight @ token).softmax(0)
        weights, chosen = probs.topk(config.num_experts_per_tok)
        if config.norm_topk_prob:
            weights = weights / weights.sum()
        routed = torch.zeros_like(token)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            gate, up = (experts[expert][0] @ token).chunk(2)
            routed = routed + weight * (experts[expert][1] @ (F.silu(gate) * up))
        gate, up = (layer.shared_expert.up_proj @ token).chunk(2)
        shared = layer.shared_expert.down_proj @ (F.silu(gate) * up)
        opening = 1.0 if layer.shared_expert_gate is None else torch.sigmoid(layer.shared_expert_gate @ token)
        outputs.append(layer.routed_scaling_factor * routed + opening * shared)
    return torch.stack(outputs)
