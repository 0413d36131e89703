"""Attention that looks back over a fixed number of positions, and so remembers a fixed amount of a stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from medarch.lm.attention import CausalSelfAttention, rotary_angles, rotate
from medarch.lm.config import DecoderConfig


class WindowCache:
    """The keys and values of the last positions of one layer; older ones are forgotten.

    Keys are kept as they were before their rotation. A window's positions can then be counted from its own first
    one, and the angles stay as exact at the millionth sample as at the first.

    Args:
        keys, values: (batch, groups, positions, head), at first of no position.
        window: Positions that a query sees, itself among them.
    """

    def __init__(
        self,
        keys: Float[Tensor, "batch groups kept head"],
        values: Float[Tensor, "batch groups kept head"],
        window: int,
    ) -> None:
        self.keys, self.values, self.window = keys, values, window
        self.length = 0

    def append(
        self, keys: Float[Tensor, "batch groups new head"], values: Float[Tensor, "batch groups new head"]
    ) -> tuple[Float[Tensor, "batch groups seen head"], Float[Tensor, "batch groups seen head"]]:
        """Returns what the new positions may look at, kept and new, and keeps what later ones may look at.

        Raises:
            ValueError: If the new positions are of another batch.
        """
        if len(keys) != len(self.keys):
            raise ValueError(f"the cache holds a batch of {len(self.keys)}, the input is a batch of {len(keys)}")
        seen = torch.cat([self.keys, keys.detach()], dim=2), torch.cat([self.values, values.detach()], dim=2)
        self.length += keys.shape[2]
        first = max(seen[0].shape[2] - (self.window - 1), 0)
        # Copied, because a view would keep all that it is a view of.
        self.keys, self.values = (each[:, :, first:].clone() for each in seen)
        return seen

    @property
    def used_bytes(self) -> int:
        """Memory of what is kept: at most that of ``window - 1`` positions."""
        return (self.keys.numel() + self.values.numel()) * self.keys.element_size()


class WindowAttention(CausalSelfAttention):
    """Causal self-attention over the last ``window`` positions (Beltagy et al. 2020, arXiv:2004.05150, section 3.1).

    Args:
        config: Sizes and rotary base.
        window: Positions that each one sees, itself among them.
        generator: Source of randomness for the initial weights.

    Raises:
        ValueError: If the window is not a positive whole number.
    """

    def __init__(self, config: DecoderConfig, window: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window

    def forward(  # type: ignore[override]  # another kind of cache
        self, hidden_states: Float[Tensor, "batch time hidden"], cache: WindowCache | None = None
    ) -> Float[Tensor, "batch time hidden"]:
        """Mixes the positions; with a cache, goes on from what it keeps."""
        head, new = self.config.head_dim, hidden_states.shape[1]
        queries, keys, values = (
            F.linear(hidden_states, weight).unflatten(-1, (-1, head)).transpose(1, 2)
            for weight in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            keys, values = cache.append(keys, values)
        positions = torch.arange(keys.shape[2], device=keys.device)
        cos, sin = rotary_angles(positions, head, self.config.rope_theta)
        queries, keys = rotate(queries, cos[-new:], sin[-new:]), rotate(keys, cos, sin)
        shared = queries.shape[1] // keys.shape[1]
        if shared > 1:
            keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)
        mask = band(new, keys.shape[2], self.window, keys.device)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return F.linear(mixed.transpose(1, 2).flatten(2), self.o_proj)

    def new_cache(self, batch_size: int, capacity: int | None = None) -> WindowCache:  # type: ignore[override]
        """An empty cache; ``capacity`` is ignored, since the window is the capacity."""
        groups = self.config.num_key_value_heads
        assert groups is not None
        empty = self.k_proj.new_empty(batch_size, groups, 0, self.config.head_dim)
        return WindowCache(empty, empty.clone(), self.window)


def band(new: int, seen: int, window: int, device: torch.device | str = "cpu") -> Bool[Tensor, "new seen"]:
    """Which of ``seen`` positions each of the last ``new`` looks at: itself and the ``window - 1`` before it."""
    own = torch.arange(seen - new, seen, device=device)[:, None]
    other = torch.arange(seen, device=device)
    return (other <= own) & (other > own - window)
