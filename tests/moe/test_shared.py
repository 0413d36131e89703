"""Shared and fine-grained experts against transformers' blocks, the specification, and counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medarch.moe.accounting import count_parameters, flops_per_token
from medarch.moe.config import MoEConfig
from medarch.moe.loss_free import LossFreeRouter
from medarch.moe.shared import (
    SharedExpertMoE,
    fine_grained,
    load_shared_,
    possible_teams,
    shared_forward_reference,
)


def randomise_(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=1.0 if "gate.weight" in name else 0.4, generator=generator)
    return block.eval()


def qwen(norm_topk_prob: bool) -> tuple[nn.Module, SharedExpertMoE]:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config: Any = Qwen2MoeConfig(
        hidden_size=20, moe_intermediate_size=12, shared_expert_intermediate_size=28, num_experts=7,
        num_experts_per_tok=3, norm_topk_prob=norm_topk_prob, experts_implementation="eager",
    )  # fmt: skip
    ours = SharedExpertMoE(MoEConfig(20, 12, 7, 3, norm_topk_prob=norm_topk_prob), 28, shared_gate=True)
    return Qwen2MoeSparseMoeBlock(config), ours


def deepseek_v2(factor: float) -> tuple[nn.Module, SharedExpertMoE]:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config: Any = DeepseekV2Config(
        hidden_size=20, moe_intermediate_size=12, n_shared_experts=2, num_attention_heads=4, n_routed_experts=7,
        num_experts_per_tok=3, routed_scaling_factor=factor, topk_method="greedy", n_group=1, topk_group=1,
        experts_implementation="eager",
    )  # fmt: skip
    ours = SharedExpertMoE(MoEConfig(20, 12, 7, 3, norm_topk_prob=False), 24, routed_scaling_factor=factor)
    return DeepseekV2Moe(config), ours


def deepseek_v3(factor: float) -> tuple[nn.Module, SharedExpertMoE]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config: Any = DeepseekV3Config(
        hidden_size=20, moe_intermediate_size=12, n_shared_experts=1, n_routed_experts=7, num_experts_per_tok=3,
        routed_scaling_factor=factor, n_group=1, topk_group=1, experts_implementation="eager",
    )  # fmt: skip
    routed = MoEConfig(20, 12, 7, 3)
    return DeepseekV3MoE(config), SharedExpertMoE(
        routed, 12, routed_scaling_factor=factor, router=LossFreeRouter(routed)
    )


FAMILIES = {
    "qwen": lambda: qwen(False),
    "qwen_divided": lambda: qwen(True),
    "deepseek_v2": lambda: deepseek_v2(1.0),
    "deepseek_v2_scaled": lambda: deepseek_v2(16.0),
    "deepseek_v3": lambda: deepseek_v3(2.5),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradient_equal_transformers(family: str) -> None:
    block, ours = FAMILIES[family]()
    load_shared_(ours, randomise_(block))
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randn(2, 19, 20, generator=generator)
    cotangent = torch.randn(2, 19, 20, generator=generator)
    inputs = [tokens.clone().requires_grad_() for _ in range(2)]
    expected = block(inputs[0])
    output, routing = ours(inputs[1])
    assert routing.indices.shape == (2, 19, 3)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    expected.backward(cotangent)
    output.backward(cotangent)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("gate", "factor"), [(False, 1.0), (True, 1.0), (True, 3.0)])
def test_forward_is_the_specification(gate: bool, factor: float) -> None:
    config = MoEConfig(11, 6, 5, 2, initializer_range=0.5)
    layer = SharedExpertMoE(config, 13, gate, factor, torch.Generator().manual_seed(1)).double()
    tokens = torch.randn(17, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(tokens)[0], shared_forward_reference(layer, tokens))
    assert bool((layer.gate(tokens) < 1).all()) == gate


def test_padding_gets_zeros_whatever_stands_in_it() -> None:
    layer = SharedExpertMoE(MoEConfig(6, 4, 3, 2), 5, True, generator=torch.Generator().manual_seed(1))
    tokens = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    full, _ = layer(tokens)
    tokens[~mask] = torch.nan
    output, routing = layer(tokens, mask)
    torch.testing.assert_close(output[mask], full[mask])
    assert not output[~mask].any()
    assert routing.statistics.tokens == 3


def test_cutting_experts_keeps_weights_and_work() -> None:
    coarse = MoEConfig(16, 24, 8, 2)
    fine = fine_grained(coarse, 4)
    assert (fine.num_experts, fine.num_experts_per_tok, fine.intermediate_size) == (32, 8, 6)
    before, after = count_parameters(coarse), count_parameters(fine)
    assert after.total - after.router == before.total - before.router
    assert after.active - after.router == before.active - before.router
    assert flops_per_token(fine).experts == flops_per_token(coarse).experts
    assert possible_teams(coarse) == 28
    assert possible_teams(MoEConfig(16, 24, 16, 2)) == 120
    assert possible_teams(fine_grained(MoEConfig(16, 24, 16, 2), 4)) == 4_426_165_368


def test_bad_input_is_refused() -> None:
    config = MoEConfig(20, 12, 7, 3)
    with pytest.raises(ValueError, match="pieces=5"):
        fine_grained(config, 5)
    with pytest.raises(ValueError, match="routed_scaling_factor"):
        SharedExpertMoE(config, 12, routed_scaling_factor=0.0)
    block, _ = qwen(True)
    with pytest.raises(ValueError, match="only the block has shared_expert_gate"):
        load_shared_(SharedExpertMoE(config, 28), block)
    with pytest.raises(ValueError, match="shared_expert"):
        load_shared_(SharedExpertMoE(config, 27, shared_gate=True), block)
    with pytest.raises(ValueError, match=r"Linear has no 'gate\.weight'"):
        load_shared_(SharedExpertMoE(config, 28), nn.Linear(2, 2))
