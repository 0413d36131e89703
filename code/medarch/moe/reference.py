"""The specification: the layer as its equation reads, token by token. Slow, and meant to be."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medarch.moe.dense import feed_forward
from medarch.moe.layer import MoELayer


def moe_forward_reference(
    layer: MoELayer,
    hidden_states: Float[Tensor, "*batch hidden"],
    mask: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch hidden"]:
    """What ``MoELayer.forward`` must return, with the gradients it must give.

    Args:
        layer: The layer whose weights are used.
        hidden_states: Token vectors.
        mask: True for a real token, False for padding.

    Returns:
        The layer's output.
    """
    config = layer.config
    experts = layer.experts.weights()
    tokens = hidden_states.reshape(-1, 1, config.hidden_size).unbind()
    real = [True] * len(tokens) if mask is None else mask.flatten().tolist()
    outputs = [hidden_states.new_zeros(0, config.hidden_size)]
    for token, is_real in zip(tokens, real, strict=True):
        if not is_real:
            outputs.append(torch.zeros_like(token))
            continue
        wide = token.to(torch.promote_types(token.dtype, torch.float32))
        logits = wide @ layer.router.weight.to(wide.dtype).T
        if layer.router.bias is not None:
            logits = logits + layer.router.bias
        if config.router_order == "softmax-then-topk":
            weights, chosen = logits.softmax(dim=-1).topk(config.num_experts_per_tok)
            if config.norm_topk_prob:
                weights = weights / weights.sum()
        else:
            best, chosen = logits.topk(config.num_experts_per_tok)
            weights = best.softmax(dim=-1)
        output = torch.zeros_like(wide)
        for weight, expert in zip(weights[0], chosen[0].tolist(), strict=True):
            up_proj, down_proj = experts[expert]
            answer = feed_forward(token, up_proj, down_proj, config.hidden_act)
            output = output + weight * answer
        outputs.append(output.to(token.dtype))
    return torch.cat(outputs).reshape(hidden_states.shape)
