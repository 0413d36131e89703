"""What reading a text of an exact length costs in memory: weights, cache and activations, each apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medarch.bench.memory import peak_memory
from medarch.lm.cached_reading import CachedReader, random_tokens


@dataclass(frozen=True)
class MemoryAtLength:
    """Bytes that a model needs to read a text and be ready to continue it.

    Attributes:
        length: Tokens of the text.
        weights: Parameters and buffers; the same at every length.
        cache: What is kept of the text, so that it need not be read again.
        activations: What else is held at the worst moment, and given back.
    """

    length: int
    weights: int
    cache: int
    activations: int

    @property
    def peak(self) -> int:
        """All three together."""
        return self.weights + self.cache + self.activations


def memory_by_length(
    model: nn.Module, lengths: Sequence[int], *, batch_size: int = 1, seed: int = 0
) -> list[MemoryAtLength]:
    """Measures the memory of reading random tokens of exactly these lengths.

    Only the last position is scored: scores of all positions would outweigh everything else, and no generation needs
    them. On a CPU every allocation of torch is followed, and the result is the same on every run; on CUDA it is the
    peak of torch's allocator.

    Args:
        model: ``medarch.lm.Decoder``, or any causal language model of transformers, on the CPU or a CUDA device.
        lengths: Numbers of tokens.
        batch_size: Texts that are read side by side.
        seed: Of the tokens.

    Returns:
        One measurement a length.

    Raises:
        ValueError: If a size is less than one, the model keeps no cache, or its device cannot be measured.
    """
    device = next(model.parameters()).device.type
    weights = storage_bytes([*model.parameters(), *model.buffers()])
    was_training = model.training
    model.eval()
    results = []
    try:
        for length in lengths:
            ids = random_tokens(model, batch_size, length, seed)

            def read(ids: Tensor = ids, length: int = length) -> tuple[Tensor, Any]:
                reader = CachedReader(model, batch_size, length)
                return reader.read(ids), reader.cache

            cache = storage_bytes(_tensors(read()[1]))
            peak = peak_memory(read, device=device)
            results.append(MemoryAtLength(length, weights, cache, peak - cache))
    finally:
        model.train(was_training)
    return results


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind these tensors; memory that several of them share counts once."""
    stores = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(stores.values())


def _tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """All tensors within an object, whatever it is built of."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type(None), type, nn.Module)):
        return []
    seen.add(id(value))
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        parts: list[Any] = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return [tensor for part in parts for tensor in _tensors(part, seen)]
