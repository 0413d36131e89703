"""Weights to and from the Mixtral block of transformers 5, without importing transformers."""

from __future__ import annotations

import torch
from torch import nn

from medarch.moe.config import MoEConfig
from medarch.moe.layer import MoELayer


def from_mixtral_block(block: nn.Module) -> MoELayer:
    """A layer with the sizes, the type, the device and a copy of the weights of a ``MixtralSparseMoeBlock``.

    Args:
        block: A ``MixtralSparseMoeBlock`` of transformers 5.

    Returns:
        A layer that computes the same function.

    Raises:
        ValueError: If the module is no such block, or its experts are no SwiGLU.
    """
    *_, down_proj = _mixtral_parameters(block)
    num_experts, hidden_size, intermediate_size = down_proj.shape
    config = MoEConfig(hidden_size, intermediate_size, num_experts, int(block.top_k))  # type: ignore[arg-type]
    layer = MoELayer(config).to(down_proj.device, down_proj.dtype)
    load_mixtral_(layer, block)
    return layer


@torch.no_grad()
def load_mixtral_(layer: MoELayer, block: nn.Module) -> None:
    """Copies the block's weights into the layer, in place.

    Args:
        layer: Where the weights go.
        block: Where they come from.

    Raises:
        ValueError: If the two do not compute the same kind of function, or differ in a shape.
    """
    for ours, theirs in _pairs(layer, block):
        ours.copy_(theirs)


@torch.no_grad()
def save_mixtral_(layer: MoELayer, block: nn.Module) -> None:
    """Copies the layer's weights into the block, in place: ``load_mixtral_`` the other way round.

    Args:
        layer: Where the weights come from.
        block: Where they go.

    Raises:
        ValueError: If the two do not compute the same kind of function, or differ in a shape.
    """
    for ours, theirs in _pairs(layer, block):
        theirs.copy_(ours)


def _mixtral_parameters(block: nn.Module) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    try:
        parameters = [
            block.get_parameter(name) for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        ]
    except AttributeError as missing:
        raise ValueError(
            f"{type(block).__name__} is no MixtralSparseMoeBlock of transformers 5 ({missing}): before "
            "version 5 its experts were separate modules"
        ) from missing
    # By behaviour and not by class: transformers has several classes for one activation.
    probe = torch.linspace(-3, 3, 7)
    activation = block.get_submodule("experts.act_fn")
    if not torch.allclose(activation(probe), nn.functional.silu(probe)):
        raise ValueError(f"the block's activation {activation} is not silu, so its experts are no SwiGLU")
    router, gate_up_proj, down_proj = parameters
    return router, gate_up_proj, down_proj


def _pairs(layer: MoELayer, block: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    config = layer.config
    if not (config.gated and config.norm_topk_prob) or config.router_bias:
        raise ValueError(
            "Mixtral has SwiGLU experts, renormalised weights and no router bias, but the layer has "
            f"hidden_act={config.hidden_act!r}, norm_topk_prob={config.norm_topk_prob}, "
            f"router_bias={config.router_bias}"
        )
    if config.num_experts_per_tok != block.top_k:
        raise ValueError(
            f"the layer's num_experts_per_tok={config.num_experts_per_tok} differs from the block's top_k={block.top_k}"
        )
    ours = [layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj]
    theirs = _mixtral_parameters(block)
    for name, mine, other in zip(("router", "gate_up_proj", "down_proj"), ours, theirs, strict=True):
        if mine.shape != other.shape:
            raise ValueError(
                f"{name}: the layer's shape {tuple(mine.shape)} differs from the block's {tuple(other.shape)}"
            )
    return list(zip(ours, theirs, strict=True))
