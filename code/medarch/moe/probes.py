"""Two questions put to any routed layer: does its output jump, and which tokens does an output depend on?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Scan(NamedTuple):
    """What a layer answers while one token's vector moves along a straight line.

    Attributes:
        position: Where on the line, from 0 at its start to 1 at its end.
        output: The moving token's output.
        score_gradient: Gradient, for the router's scores of the moving token, of the output's product with a
            fixed vector: what the router would learn from there.
    """

    position: Float[Tensor, "steps"]
    output: Float[Tensor, "steps hidden"]
    score_gradient: Float[Tensor, "steps scores"]


def scan_line(
    layer: nn.Module,
    start: Float[Tensor, "hidden"],
    others: Float[Tensor, "others hidden"],
    end: Float[Tensor, "hidden"],
    steps: int = 201,
) -> Scan:
    """Moves one token from ``start`` to ``end`` among others that stay, and watches the layer.

    All steps are computed as one batch of texts, so the layer must treat each text as a group of its own.

    Args:
        layer: A ``MoELayer`` or a ``SoftMoE``; it is left as it was.
        start: The token's vector at position 0.
        others: The rest of the text, in front of which the moving token stands.
        end: The token's vector at position 1.
        steps: Points on the line, both ends included.

    Returns:
        Output and gradient at each point.

    Raises:
        ValueError: If there are fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    position = torch.linspace(0, 1, steps, dtype=start.dtype)
    moving = start + position[:, None] * (end - start)
    texts = torch.cat([moving[:, None], others.expand(steps, *others.shape)], dim=1)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)
    with torch.enable_grad():
        output, routing = layer(texts)
        (gradient,) = torch.autograd.grad((output[:, 0] @ direction).sum(), routing.logits)
    return Scan(position, output[:, 0].detach(), gradient[:, 0])


def largest_step(values: Float[Tensor, "steps size"]) -> float:
    """The largest distance between two neighbouring points of a scan.

    Halve the spacing, and this is halved too where the curve is smooth; where it jumps, it stays.
    """
    return float((values[1:] - values[:-1]).norm(dim=-1).max())


@torch.no_grad()
def influence(
    layer: nn.Module, tokens: Float[Tensor, "tokens hidden"], replacement: Float[Tensor, "hidden"]
) -> Float[Tensor, "tokens tokens"]:
    """How far each output moves when one token is replaced.

    Args:
        layer: A layer without state, such as a ``MoELayer`` or a ``SoftMoE``.
        tokens: A text.
        replacement: What is put in the place of each of its tokens in turn.

    Returns:
        The entry at (i, j) is the distance that output j moves when token i is replaced. A layer fit for
        predicting the next token has nothing below the diagonal: there, j comes before i.
    """
    length = len(tokens)
    changed = tokens.expand(length, *tokens.shape).clone()
    changed[torch.arange(length), torch.arange(length)] = replacement
    return (layer(changed)[0] - layer(tokens[None])[0]).norm(dim=-1)
