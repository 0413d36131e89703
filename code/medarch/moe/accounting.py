"""What a layer costs: weights held, weights used, floating-point operations, experts touched by a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medarch.bench import count_flops
from medarch.moe.config import MoEConfig
from medarch.moe.layer import MoELayer
from medarch.moe.reference import moe_forward_reference


@dataclass(frozen=True)
class ParameterCount:
    """Weights of one layer, in numbers.

    Attributes:
        router: Weights of the router.
        expert: Weights of one expert.
        total: Weights that must be in memory: the router and all E experts.
        active: Weights that one token meets: the router and its k experts.
    """

    router: int
    expert: int
    total: int
    active: int

    def resident_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that the weights occupy in memory; it is the total that counts, not the active part."""
        return self.total * dtype.itemsize


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations of one forward pass for one token, two for each multiplication and addition.

    As in torch's counter the matrix products alone are counted, not the activation, the softmax, the
    selection or the weighted sum.

    Attributes:
        router: Operations of the router.
        experts: Operations of the k experts.
    """

    router: int
    experts: int

    @property
    def total(self) -> int:
        """Operations of the layer."""
        return self.router + self.experts


def count_parameters(config: MoEConfig) -> ParameterCount:
    """The weights of a layer, in closed form from its configuration."""
    router = config.num_experts * (config.hidden_size + config.router_bias)
    matrices = 3 if config.gated else 2
    expert = matrices * config.hidden_size * config.intermediate_size
    return _parameter_count(config, router, expert)


def count_layer_parameters(layer: MoELayer) -> ParameterCount:
    """The weights of a layer, counted from the tensors that it holds."""
    router = sum(parameter.numel() for parameter in layer.router.parameters())
    expert = sum(parameter[0].numel() for parameter in layer.experts.parameters())
    return _parameter_count(layer.config, router, expert)


def _parameter_count(config: MoEConfig, router: int, expert: int) -> ParameterCount:
    return ParameterCount(
        router=router,
        expert=expert,
        total=router + config.num_experts * expert,
        active=router + config.num_experts_per_tok * expert,
    )


def flops_per_token(config: MoEConfig) -> FlopCount:
    """Forward operations of the layer for one token, in closed form.

    In a matrix product each weight is used once a token, for one multiplication and one addition; a bias is
    not counted.
    """
    expert = 2 * count_parameters(config).expert
    return FlopCount(router=2 * config.num_experts * config.hidden_size, experts=config.num_experts_per_tok * expert)


def dense_flops_per_token(config: MoEConfig, num_experts: int) -> int:
    """Forward operations for one token of a dense layer as wide as ``num_experts`` experts together."""
    return num_experts * 2 * count_parameters(config).expert


def measure_flops(layer: MoELayer, tokens: int = 1) -> int:
    """Forward operations for ``tokens`` random tokens, counted by torch while the specification runs.

    The loop over tokens is counted since it consists of plain matrix products, which torch's counter knows.

    Raises:
        ValueError: If the run contains a costly operator that the counter cannot count.
    """
    weight = layer.router.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    hidden_states = torch.randn(
        tokens, layer.config.hidden_size, generator=generator, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        return count_flops(moe_forward_reference, layer, hidden_states)


def expected_distinct_experts(config: MoEConfig, tokens: int) -> float:
    """How many different experts a batch is expected to touch: ``E * (1 - (1 - k/E) ** tokens)``.

    It holds where each token draws its k experts uniformly and independently of the others, which a trained
    router does not quite do. The weights of these experts are what a batch reads from memory.

    Args:
        config: The layer's sizes.
        tokens: Tokens in the batch.

    Returns:
        An expectation between k, for one token, and E.

    Raises:
        ValueError: If ``tokens`` is negative.
    """
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    experts, k = config.num_experts, config.num_experts_per_tok
    return experts * (1 - (1 - k / experts) ** tokens)
