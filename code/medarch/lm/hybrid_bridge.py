"""Between our hybrid decoder and transformers: the weights of Mamba, Mamba-2, Jamba and GraniteMoeHybrid, as published.

``medarch.lm.bridge`` calls what stands here where it meets such a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor

from medarch.lm.attention import CausalSelfAttention
from medarch.lm.hybrid import HybridDecoder, HybridLayer
from medarch.lm.hybrid_families import family_of
from medarch.moe.dense import DenseMLP
from medarch.moe.layer import MoELayer
from medarch.moe.router import TopKRouter
from medarch.moe.shared import SharedExpertMoE
from medarch.ssm.mamba import MambaMixer
from medarch.ssm.mamba2 import Mamba2Mixer


def weight_views(model: HybridDecoder, fused: bool = False) -> dict[str, Tensor]:
    """Our weights under the names that they bear in a checkpoint, as views: read them to save, fill them to load.

    Args:
        model: A decoder of one of the four families.
        fused: Whether experts are stored under the names and in the stacks of transformers 5, and not as published.

    Raises:
        ValueError: If transformers has no such model, or a router is not the plain one.
    """
    config = model.config
    family = family_of(config)
    root = "backbone" if family in ("mamba", "mamba2") else "model"
    final = {"jamba": "final_layernorm", "granitemoehybrid": "norm"}.get(family, "norm_f")
    views: dict[str, Tensor] = {
        embedding_name(family): model.embed_tokens.weight,
        f"{root}.{final}.weight": model.norm.weight,
    }
    if not config.tie_word_embeddings:
        views["lm_head.weight"] = model.lm_head
    for index, layer in enumerate(cast(Iterable[HybridLayer], model.layers)):
        stored = f"{root}.layers.{index}"
        views |= _mixer_views(layer.mixer, f"{stored}.{_mixer_name(family, layer.mixer)}")
        if family in ("mamba", "mamba2"):
            views[f"{stored}.norm.weight"] = layer.mixer_norm.weight
            continue
        views[f"{stored}.input_layernorm.weight"] = layer.mixer_norm.weight
        second = "pre_ff_layernorm" if family == "jamba" else "post_attention_layernorm"
        assert layer.feed_forward_norm is not None
        views[f"{stored}.{second}.weight"] = layer.feed_forward_norm.weight
        views |= (_jamba_views if family == "jamba" else _granite_views)(layer, stored, fused)
    return {name: tensor.detach() for name, tensor in views.items()}


def embedding_name(family: str) -> str:
    """Where a checkpoint of the family keeps its embedding."""
    return "backbone.embeddings.weight" if family in ("mamba", "mamba2") else "model.embed_tokens.weight"


def _mixer_name(family: str, mixer: Any) -> str:
    if family in ("mamba", "mamba2"):
        return "mixer"
    return "self_attn" if isinstance(mixer, CausalSelfAttention) else "mamba"


def _mixer_views(mixer: Any, stored: str) -> dict[str, Tensor]:
    if isinstance(mixer, CausalSelfAttention):
        return {f"{stored}.{name}.weight": getattr(mixer, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    own = {
        "in_proj.weight": mixer.in_proj,
        "in_proj.bias": mixer.in_bias,
        "conv1d.bias": mixer.conv1d_bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "out_proj.weight": mixer.out_proj,
        "out_proj.bias": mixer.out_bias,
        # A filter for each channel by itself has one input channel, which the checkpoints write out.
        "conv1d.weight": mixer.conv1d_weight.detach().unsqueeze(1),
    }
    if isinstance(mixer, MambaMixer):
        own |= {"x_proj.weight": mixer.x_proj, "dt_proj.weight": mixer.dt_proj, "dt_proj.bias": mixer.dt_bias}
        own |= {"dt_layernorm.weight": mixer.dt_norm}
        own |= {"b_layernorm.weight": mixer.B_norm, "c_layernorm.weight": mixer.C_norm}
    else:
        assert isinstance(mixer, Mamba2Mixer)
        own |= {"dt_bias": mixer.dt_bias, "norm.weight": mixer.norm_weight}
    return {f"{stored}.{name}": weight for name, weight in own.items() if weight is not None}


def _jamba_views(layer: HybridLayer, stored: str, fused: bool) -> dict[str, Tensor]:
    block = layer.feed_forward
    if isinstance(block, DenseMLP):
        gate, up = block.up_proj.detach().chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": block.down_proj}
        return {f"{stored}.feed_forward.{name}.weight": part for name, part in parts.items()}
    routed = _routed(block, stored)
    views: dict[str, Tensor] = {f"{stored}.feed_forward.router.weight": routed.router.weight}
    gate_up, down = routed.experts.gate_up_proj, routed.experts.down_proj
    if fused:
        experts = f"{stored}.feed_forward.experts"
        return views | {f"{experts}.gate_up_proj": gate_up, f"{experts}.down_proj": down}
    for number, (both, back) in enumerate(zip(gate_up.detach(), down, strict=True)):
        expert = f"{stored}.feed_forward.experts.{number}"
        views[f"{expert}.gate_proj.weight"], views[f"{expert}.up_proj.weight"] = both.chunk(2)
        views[f"{expert}.down_proj.weight"] = back
    return views


def _granite_views(layer: HybridLayer, stored: str, fused: bool) -> dict[str, Tensor]:
    shared: Any = layer.feed_forward
    views: dict[str, Tensor] = {}
    if isinstance(shared, SharedExpertMoE):
        routed = _routed(shared.routed, stored)
        names = ("router.layer.weight", "input_linear.weight", "output_linear.weight")
        if fused:
            names = ("router.weight", "experts.gate_up_proj", "experts.down_proj")
        weights = (routed.router.weight, routed.experts.gate_up_proj, routed.experts.down_proj)
        views = {f"{stored}.block_sparse_moe.{name}": weight for name, weight in zip(names, weights, strict=True)}
        shared = shared.shared_expert
    assert isinstance(shared, DenseMLP)
    views[f"{stored}.shared_mlp.input_linear.weight"] = shared.up_proj
    views[f"{stored}.shared_mlp.output_linear.weight"] = shared.down_proj
    return views


def _routed(block: Any, stored: str) -> MoELayer:
    # A router of another kind, even a subclass, would decide otherwise than transformers'.
    if not isinstance(block, MoELayer) or type(block.router) is not TopKRouter:
        kind = type(getattr(block, "router", block)).__name__
        raise ValueError(f"the router of {stored} is a {kind}, and transformers' is a TopKRouter")
    return block
