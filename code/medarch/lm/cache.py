"""What a model remembers of the tokens that it has read, so that it need not read them again."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class KeyValueCache:
    """Keys and values of one attention layer, in memory reserved once.

    Args:
        batch_size: Sequences, B.
        num_key_value_heads: Key and value heads, G.
        capacity: Positions that there is room for.
        head_dim: Width of a head.
        dtype: Of the keys and values.
        device: Where they lie.
    """

    def __init__(
        self,
        batch_size: int,
        num_key_value_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, num_key_value_heads, capacity, head_dim)
        self.keys: Float[Tensor, "batch groups capacity head"] = torch.empty(shape, dtype=dtype, device=device)
        self.values: Float[Tensor, "batch groups capacity head"] = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(
        self, keys: Float[Tensor, "batch groups new head"], values: Float[Tensor, "batch groups new head"]
    ) -> tuple[Float[Tensor, "batch groups time head"], Float[Tensor, "batch groups time head"]]:
        """Stores new positions and returns all, old and new, as views.

        Raises:
            ValueError: If the new positions do not fit the batch or the capacity.
        """
        batch_size, _, capacity, _ = self.keys.shape
        end = self.length + keys.shape[2]
        if keys.shape[0] != batch_size:
            raise ValueError(f"the cache holds a batch of {batch_size}, the input is a batch of {keys.shape[0]}")
        if end > capacity:
            raise ValueError(
                f"the cache has room for {capacity} positions and holds {self.length}: {keys.shape[2]} more do "
                "not fit; ask for a larger capacity"
            )
        self.keys[:, :, self.length : end] = keys.detach()
        self.values[:, :, self.length : end] = values.detach()
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @property
    def bytes_per_position(self) -> int:
        """Memory that one more token costs in this layer, for the whole batch."""
        return (self.keys[:, :, :1].numel() + self.values[:, :, :1].numel()) * self.keys.element_size()


class DecoderCache:
    """The memories of all layers of a decoder, one for each mixer.

    Args:
        layers: One memory a layer.
    """

    def __init__(self, layers: list[KeyValueCache]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        """Positions that have been read."""
        return self.layers[0].length

    @property
    def used_bytes(self) -> int:
        """Memory that the positions read so far occupy, over all layers."""
        return sum(layer.bytes_per_position * layer.length for layer in self.layers)
