"""Losses that keep the experts evenly loaded and the router's logits small, and measures of evenness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medarch.moe.router import NO_EXPERT, Routing


def load_balancing_loss(probs: Float[Tensor, "*batch experts"], indices: Int[Tensor, "*batch k"]) -> Float[Tensor, ""]:
    """The auxiliary loss of one layer: E times the sum over experts of f_e and P_e.

    f_e is the number of slots that expert e received over the number of tokens, a count without a gradient;
    P_e is the probability that the router gave it, averaged over the tokens, and carries the gradient. The
    f_e sum to k, so that the loss is k where either of the two is even. It is E at most, where the chosen
    experts have all the probability and every token chooses the same ones. These are equations 4 to 6 of
    Fedus et al. 2021 (arXiv:2101.03961) without their factor alpha, and for k > 1 the reading of
    transformers' ``load_balancing_loss_func``.

    The decisions should be the router's own, before a capacity drops any of them: a dropped slot no longer
    shows that its expert is overfull.

    Args:
        probs: Softmax over all experts, of any leading shape.
        indices: Chosen experts. Slots that hold ``NO_EXPERT`` are left out, and a token whose slots all do
            is padding and does not count.

    Returns:
        A scalar in the type of ``probs``; a zero that is attached to the graph where nothing was routed.

    Raises:
        ValueError: If the shapes do not fit or an index names an expert that does not exist.
    """
    fraction, probability = _fraction_and_probability(probs, indices)
    return probs.shape[-1] * (fraction * probability).sum()


def pooled_load_balancing_loss(routings: Sequence[Routing]) -> Float[Tensor, ""]:
    """The auxiliary loss with the tokens of all layers pooled, as transformers computes it.

    Fractions and probabilities are averaged over the layers before they are multiplied. An expert that is
    overfull in one layer and idle in another then looks evenly loaded, although experts of different layers
    share a number and nothing else. The mean of ``load_balancing_loss`` over the layers does not have this
    blind spot.

    Args:
        routings: One for each layer, with the same number of experts.

    Returns:
        A scalar; with a single layer it equals ``load_balancing_loss``.

    Raises:
        ValueError: If there is no layer, or the layers differ in their number of experts.
    """
    if not routings:
        raise ValueError("routings is empty: there is no layer whose load could be balanced")
    sizes = sorted({routing.probs.shape[-1] for routing in routings})
    if len(sizes) > 1:
        raise ValueError(f"layers with {sizes} experts cannot be pooled: take the mean of load_balancing_loss")
    return load_balancing_loss(
        torch.cat([routing.probs.flatten(0, -2) for routing in routings]),
        torch.cat([routing.indices.flatten(0, -2) for routing in routings]),
    )


def router_z_loss(
    logits: Float[Tensor, "*batch experts"], mask: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, ""]:
    """Mean over the tokens of the squared log-sum-exp of their logits (Zoph et al. 2022, arXiv:2202.08906, eq. 5).

    It keeps the logits small, where float32 still tells them apart after the exponential; their differences,
    and with them the balance, it touches only in passing.

    Args:
        logits: The router's scores, of any leading shape.
        mask: True for a real token; without it every token is real, padding included.

    Returns:
        A scalar in the type of ``logits``; a zero that is attached to the graph where no token is real.

    Raises:
        ValueError: If the mask does not have one value a token.
    """
    if mask is not None:
        if mask.shape != logits.shape[:-1]:
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit logits of shape {tuple(logits.shape)}")
        logits = logits[mask]
    return logits.logsumexp(dim=-1).square().sum() / max(logits[..., 0].numel(), 1)


def _fraction_and_probability(probs: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of each expert over tokens, and its mean probability; padding enters neither."""
    experts = probs.shape[-1]
    if indices.shape[:-1] != probs.shape[:-1]:
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} do not fit probs of shape {tuple(probs.shape)}: "
            "all dimensions but the last must agree"
        )
    if indices.numel() and not NO_EXPERT <= int(indices.min()) <= int(indices.max()) < experts:
        raise ValueError(f"indices must lie between {NO_EXPERT} (no expert) and {experts - 1}")
    probs, indices = probs.reshape(-1, experts), indices.reshape(-1, indices.shape[-1])
    routed = (indices != NO_EXPERT).any(dim=-1)
    tokens = routed.sum().clamp(min=1)
    # Shifted by one, so that NO_EXPERT falls into a bin of its own, which is dropped.
    counts = torch.bincount(indices.flatten() - NO_EXPERT, minlength=experts + 1)[1:]
    return counts.to(probs.dtype) / tokens, (probs * routed[:, None]).sum(dim=0) / tokens


@dataclass(frozen=True)
class Evenness:
    """How evenly some slots are spread over E experts.

    Attributes:
        entropy: Entropy of the shares over its maximum log E: 1 is even, 0 is one expert doing everything.
        max_over_mean: The busiest expert's count over the mean: 1 is even, E is one expert doing everything.
        variation: Coefficient of variation, the population standard deviation over the mean: 0 is even,
            the square root of E - 1 is one expert doing everything.
        effective: The exponential of the entropy: as many experts, evenly loaded, would have the same one; it
            lies between 1 and E.
        idle: Experts without any slot.
    """

    entropy: float
    max_over_mean: float
    variation: float
    effective: float
    idle: int


def evenness(counts: Int[Tensor, "experts"] | Sequence[int]) -> Evenness:
    """Measures of evenness from the number of slots that each expert received.

    The deviation divides by E and not by E - 1, since the experts are all there are and no sample of more.

    Args:
        counts: Slots of each expert.

    Raises:
        ValueError: If fewer than two experts are given, a count is negative, or nothing was routed.
    """
    values = torch.as_tensor(counts, dtype=torch.float64)
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"counts must list at least two experts, got shape {tuple(values.shape)}")
    if (values < 0).any() or not values.sum() > 0:
        raise ValueError("counts must not be negative, and at least one must be positive")
    entropy = float(torch.special.entr(values / values.sum()).sum())
    return Evenness(
        entropy=entropy / math.log(len(values)),
        max_over_mean=float(values.max() / values.mean()),
        variation=float(values.std(correction=0) / values.mean()),
        effective=math.exp(entropy),
        idle=int((values == 0).sum()),
    )
