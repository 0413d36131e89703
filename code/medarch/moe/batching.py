"""What a batch of tokens asks of the experts: how many different ones it touches, and the bytes of their weights."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from medarch.moe.accounting import count_parameters
from medarch.moe.config import MoEConfig
from medarch.moe.router import NO_EXPERT


def random_routing(config: MoEConfig, tokens: int, generator: torch.Generator) -> Int[Tensor, "tokens k"]:
    """Experts drawn evenly, k different ones for each token: what a router without any preference would choose."""
    order = torch.rand(tokens, config.num_experts, generator=generator).argsort(dim=-1)
    return order[:, : config.num_experts_per_tok]


def distinct_experts(indices: Int[Tensor, "tokens k"]) -> int:
    """How many different experts these tokens are sent to; slots without an expert do not count."""
    return int(indices[indices != NO_EXPERT].unique().numel())


def mean_distinct_experts(
    indices: Int[Tensor, "tokens k"],
    batch_size: int,
    generator: torch.Generator,
    consecutive: bool = False,
    trials: int = 200,
) -> float:
    """The mean number of different experts that a batch touches, over batches drawn from routed tokens.

    Args:
        indices: Chosen experts of many tokens, in the order of the text.
        batch_size: Tokens in a batch.
        generator: Draws the batches.
        consecutive: Whether a batch is a stretch of the text, as when a prompt is read, instead of tokens from
            anywhere in it, as when a server writes the next token of many unrelated answers at once.
        trials: Batches.

    Raises:
        ValueError: If there are fewer tokens than a batch holds, or no batch is asked for.
    """
    if not 1 <= batch_size <= len(indices) or trials < 1:
        raise ValueError(
            f"batch_size={batch_size} and trials={trials} with {len(indices)} routed tokens: a batch needs at least "
            "one token and no more than there are"
        )
    total = 0
    for _ in range(trials):
        if consecutive:
            first = int(torch.randint(len(indices) - batch_size + 1, (), generator=generator))
            batch = indices[first : first + batch_size]
        else:
            batch = indices[torch.randint(len(indices), (batch_size,), generator=generator)]
        total += distinct_experts(batch)
    return total / trials


def expected_distinct_by_load(chances: Float[Tensor, "experts"], batch_size: int) -> float:
    """How many different experts a batch of unrelated tokens is expected to touch, each having its own popularity.

    ``sum over e of 1 - (1 - p_e) ** batch_size``. With all chances at k/E this is
    ``medarch.moe.accounting.expected_distinct_experts``; uneven chances give less.

    Args:
        chances: For each expert the share of tokens that it serves, p; they sum to k.
        batch_size: Tokens in the batch.
    """
    return float((1 - (1 - chances.double()) ** batch_size).sum())


def bytes_touched(config: MoEConfig, experts: float, dtype: torch.dtype = torch.float32) -> float:
    """Bytes of weights that one step has to read from memory: the router's, and those of the experts touched.

    Args:
        config: The layer's sizes.
        experts: Different experts that the step's tokens are sent to.
        dtype: Type of the weights.
    """
    count = count_parameters(config)
    return (count.router + experts * count.expert) * dtype.itemsize
