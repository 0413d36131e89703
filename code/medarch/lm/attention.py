"""Causal self-attention with rotary positions and shared key-value heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from medarch.lm.cache import KeyValueCache
from medarch.lm.config import DecoderConfig


def rotary_angles(
    positions: Int[Tensor, "time"], head_dim: int, theta: float = 10000.0
) -> tuple[Float[Tensor, "time head"], Float[Tensor, "time head"]]:
    """Cosine and sine of each position's rotation (Su et al. 2021, arXiv:2104.09864, eq. 15).

    Pair i of a head's numbers turns by ``position * theta^(-2i / head_dim)``. The pairs are (i, i + half),
    as in transformers' Llama, and not neighbours as in the paper: the two differ by a fixed permutation of
    the projections' rows.

    Args:
        positions: Whole numbers from 0.
        head_dim: Width of a head, even.
        theta: Base of the frequencies.

    Returns:
        Cosines and sines in float32, each frequency standing twice.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(
    heads: Float[Tensor, "batch heads time head"], cos: Float[Tensor, "time head"], sin: Float[Tensor, "time head"]
) -> Float[Tensor, "batch heads time head"]:
    """Turns each pair of numbers of each head by its position's angle; lengths are unchanged."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return heads * cos.to(heads.dtype) + turned * sin.to(heads.dtype)


class CausalSelfAttention(nn.Module):
    """Each position looks back at itself and at all before it (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Args:
        config: Sizes and rotary base.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: DecoderConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        hidden, head = config.hidden_size, config.head_dim
        groups = config.num_key_value_heads
        assert groups is not None
        self.q_proj = nn.Parameter(torch.empty(config.num_attention_heads * head, hidden))
        self.k_proj = nn.Parameter(torch.empty(groups * head, hidden))
        self.v_proj = nn.Parameter(torch.empty(groups * head, hidden))
        self.o_proj = nn.Parameter(torch.empty(hidden, config.num_attention_heads * head))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range, generator=generator)

    def forward(
        self, hidden_states: Float[Tensor, "batch time hidden"], cache: KeyValueCache | None = None
    ) -> Float[Tensor, "batch time hidden"]:
        """Mixes the positions; with a cache, the new ones also look back at those read before."""
        queries, keys, values = self.project(hidden_states, 0 if cache is None else cache.length)
        if cache is not None:
            keys, values = cache.append(keys, values)
        mixed = attend(queries, keys, values)
        return F.linear(mixed.transpose(1, 2).flatten(2), self.o_proj)

    def project(
        self, hidden_states: Float[Tensor, "batch time hidden"], start: int = 0
    ) -> tuple[
        Float[Tensor, "batch heads time head"],
        Float[Tensor, "batch groups time head"],
        Float[Tensor, "batch groups time head"],
    ]:
        """Queries and keys, turned by their positions from ``start`` on, and values."""
        head = self.config.head_dim
        positions = torch.arange(start, start + hidden_states.shape[1], device=hidden_states.device)
        cos, sin = rotary_angles(positions, head, self.config.rope_theta)

        def heads(weight: Tensor) -> Tensor:
            return F.linear(hidden_states, weight).unflatten(-1, (-1, head)).transpose(1, 2)

        return rotate(heads(self.q_proj), cos, sin), rotate(heads(self.k_proj), cos, sin), heads(self.v_proj)

    def attention_weights(
        self, hidden_states: Float[Tensor, "batch time hidden"]
    ) -> Float[Tensor, "batch heads time time"]:
        """How much each position (row) looks at each other (column): what ``forward`` never writes down."""
        queries, keys, _ = self.project(hidden_states)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = queries @ keys.transpose(-1, -2) / self.config.head_dim**0.5
        time = scores.shape[-1]
        later = torch.ones(time, time, dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(later, float("-inf")).softmax(-1)

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        """An empty memory for this layer."""
        weight, groups = self.k_proj, self.config.num_key_value_heads
        assert groups is not None
        return KeyValueCache(batch_size, groups, capacity, self.config.head_dim, weight.dtype, weight.device)


def attend(
    queries: Float[Tensor, "batch heads new head"],
    keys: Float[Tensor, "batch groups time head"],
    values: Float[Tensor, "batch groups time head"],
) -> Float[Tensor, "batch heads new head"]:
    """Softmax attention in which the queries are the last ``new`` of ``time`` positions."""
    new, time = queries.shape[2], keys.shape[2]
    shared = queries.shape[1] // keys.shape[1]
    if shared > 1:
        keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)
    if new == time:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    if new == 1:
        return F.scaled_dot_product_attention(queries, keys, values)
    seen = torch.ones(new, time, dtype=torch.bool, device=queries.device).tril(time - new)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
