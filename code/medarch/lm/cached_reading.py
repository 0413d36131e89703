"""Reading token by token with a cache: one interface to our decoder and to the models of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medarch.lm.decoder import Decoder

# What transformers calls the memory of what was read: keys and values, or the state of a recurrence.
_CACHES = ("past_key_values", "cache_params")


class CachedReader:
    """A causal language model with its memory of what it has read.

    Args:
        model: ``medarch.lm.Decoder``, or any causal language model of transformers.
        batch_size: Texts that are read side by side.
        capacity: Tokens that will be read at most, each.

    Attributes:
        cache: The memory: ours from the beginning, that of transformers from the first reading on.

    Raises:
        ValueError: If the model keeps no memory in a way that is known, or reads with an encoder.
    """

    def __init__(self, model: nn.Module, batch_size: int, capacity: int) -> None:
        self.model = model
        self.cache: Any = None
        parameters = inspect.signature(model.forward).parameters
        self._options: dict[str, Any]
        if isinstance(model, Decoder):
            self._name, self._options = "cache", {"logits_to_keep": 1}
            self.cache = model.new_cache(batch_size, capacity)
            return
        name = next((each for each in _CACHES if each in parameters), None)
        if name is None or "decoder_input_ids" in parameters:
            raise ValueError(
                f"{type(model).__name__} is no causal language model with a cache: its forward takes neither "
                f"{' nor '.join(_CACHES)} alone"
            )
        self._name, self._options = name, {"use_cache": True}
        if "logits_to_keep" in parameters:
            self._options["logits_to_keep"] = 1

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch vocab"]:
        """Reads further tokens and scores the one that follows the last of them."""
        output = self.model(input_ids, **{self._name: self.cache}, **self._options)
        if self._name != "cache":
            self.cache = getattr(output, self._name)
        return output.logits[:, -1]


def vocabulary_size(model: nn.Module) -> int:
    """Tokens that a model knows.

    Raises:
        ValueError: If its configuration does not say.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(model).__name__} has no config.vocab_size, so no tokens can be made for it")
    return size


def random_tokens(model: nn.Module, batch_size: int, length: int, seed: int = 0) -> Int[Tensor, "batch length"]:
    """Tokens of an exact number, on the model's device: a text would have to be cut or filled up to it.

    Raises:
        ValueError: If a size is less than one.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(f"batch_size={batch_size} and length={length}: both must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary_size(model), (batch_size, length), generator=generator)
    return ids.to(next(model.parameters()).device)
