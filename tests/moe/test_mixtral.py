"""The layer against the Mixtral block of transformers, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medarch.moe import MoEConfig, MoELayer, from_mixtral_block, load_mixtral_, save_mixtral_


@pytest.fixture(scope="module")
def mixtral() -> Any:
    """A maker of blocks with weights of a size at which routing and outputs matter."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    def make(implementation: str = "eager", **changes: Any) -> nn.Module:
        sizes = {"hidden_size": 28, "intermediate_size": 44, "num_local_experts": 5, "num_experts_per_tok": 3}
        config = MixtralConfig(**{**sizes, **changes}, experts_implementation=implementation)
        block = MixtralSparseMoeBlock(config)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.normal_(std=0.4, generator=torch.Generator().manual_seed(parameter.dim()))
        return block

    return make


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("router_order", ["softmax-then-topk", "topk-then-softmax"])
def test_same_routing_output_and_gradients(
    implementation: str, router_order: str, mixtral: Any, generator: torch.Generator
) -> None:
    block = mixtral(implementation)
    layer = MoELayer(MoEConfig(28, 44, 5, 3, router_order=router_order))
    load_mixtral_(layer, block)
    inputs = [torch.randn(2, 13, 28, generator=generator).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    cotangent = torch.randn(2, 13, 28, generator=generator)
    output, routing = layer(inputs[0])
    expected = block(inputs[1])
    logits, weights, indices = block.gate(inputs[1])
    assert torch.equal(routing.indices.flatten(0, 1), indices)
    torch.testing.assert_close(routing.logits.flatten(0, 1), logits)
    torch.testing.assert_close(routing.weights.flatten(0, 1), weights)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    output.backward(cotangent)
    expected.backward(cotangent)
    ours = [inputs[0], *layer.parameters()]
    theirs = [inputs[1], *block.parameters()]
    for own, other in zip(ours, theirs, strict=True):
        assert other.grad.abs().max() > 0.1
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4 * float(other.grad.abs().max()))


def test_layer_from_block_has_its_sizes_and_its_own_copy(mixtral: Any) -> None:
    block = mixtral().bfloat16()
    layer = from_mixtral_block(block)
    assert layer.config == MoEConfig(28, 44, 5, 3)
    for own, other in zip(layer.parameters(), block.parameters(), strict=True):
        assert own.dtype == torch.bfloat16
        assert torch.equal(own, other)
        assert own.data_ptr() != other.data_ptr()


def test_there_and_back(mixtral: Any, generator: torch.Generator) -> None:
    layer = MoELayer(MoEConfig(28, 44, 5, 3), generator)
    block = mixtral()
    save_mixtral_(layer, block)
    for own, other in zip(from_mixtral_block(block).parameters(), layer.parameters(), strict=True):
        assert torch.equal(own, other)
    tokens = torch.randn(1, 3, 28, generator=generator)
    torch.testing.assert_close(block(tokens), layer(tokens)[0])


CLASHES = {
    "hidden size": (MoEConfig(21, 44, 5, 3), r"router: the layer's shape \(5, 21\) differs .* \(5, 28\)"),
    "experts": (MoEConfig(28, 44, 7, 3), r"\(7, 28\) differs from the block's \(5, 28\)"),
    "intermediate size": (MoEConfig(28, 33, 5, 3), r"gate_up_proj: .* \(5, 66, 28\) .* \(5, 88, 28\)"),
    "experts per token": (MoEConfig(28, 44, 5, 2), "num_experts_per_tok=2 differs from the block's top_k=3"),
    "activation": (MoEConfig(28, 44, 5, 3, hidden_act="gelu"), "hidden_act='gelu'"),
    "weights": (MoEConfig(28, 44, 5, 3, norm_topk_prob=False), "norm_topk_prob=False"),
    "bias": (MoEConfig(28, 44, 5, 3, router_bias=True), "router_bias=True"),
}


@pytest.mark.parametrize("copy", [load_mixtral_, save_mixtral_])
@pytest.mark.parametrize(("config", "message"), CLASHES.values(), ids=CLASHES.keys())
def test_what_does_not_fit_is_refused(copy: Any, config: MoEConfig, message: str, mixtral: Any) -> None:
    with pytest.raises(ValueError, match=message):
        copy(MoELayer(config), mixtral())


def test_a_block_of_another_kind_is_refused(mixtral: Any) -> None:
    with pytest.raises(ValueError, match="Linear is no MixtralSparseMoeBlock"):
        from_mixtral_block(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="is not silu"):
        from_mixtral_block(mixtral(hidden_act="gelu"))
