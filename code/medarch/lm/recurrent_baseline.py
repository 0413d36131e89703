"""The network that state-space models have to beat: a language model of gated recurrent units."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medarch.lm.decoder import DecoderOutput, RMSNorm


@dataclass(frozen=True)
class GRUConfig:
    """A language model whose mixer is a gated recurrent unit.

    Attributes:
        vocab_size: Tokens that the model knows.
        hidden_size: Width of the residual stream, D.
        recurrent_size: Numbers that a layer carries from token to token, R.
        num_hidden_layers: Layers.
        max_position_embeddings: Longest context that the model accepts; nothing in it depends on the position.
        rms_norm_eps: Added to the mean square before its root is taken.
        initializer_range: Standard deviation of the initial embedding and output projections; the units themselves
            begin as in ``torch.nn.GRU``.

    Raises:
        ValueError: If a size is not a positive whole number, or another field is not positive and finite.
    """

    vocab_size: int
    hidden_size: int
    recurrent_size: int
    num_hidden_layers: int
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "recurrent_size", "num_hidden_layers", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return dataclasses.asdict(self)


class RecurrentCache:
    """What a recurrent model remembers of the tokens that it has read: as much after the first as after the last.

    Args:
        layers: One hidden state a layer.
        capacity: Tokens that may be read in all.
    """

    def __init__(self, layers: list[Float[Tensor, "batch recurrent"]], capacity: int) -> None:
        self.layers = layers
        self.capacity = capacity
        self.length = 0

    @property
    def used_bytes(self) -> int:
        """Memory of the hidden states, for the whole batch."""
        return sum(state.numel() * state.element_size() for state in self.layers)


class GRULayer(nn.Module):
    """A gated recurrent unit that reads a normalised copy of the residual stream and adds its answer to it.

    Cho et al. 2014, arXiv:1406.1078, in the variant of ``torch.nn.GRU``.

    Args:
        config: The model's sizes.
        generator: Source of randomness for the initial weights.
    """

    def __init__(self, config: GRUConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.unit = nn.GRU(config.hidden_size, config.recurrent_size, batch_first=True)
        self.o_proj = nn.Parameter(torch.empty(config.hidden_size, config.recurrent_size))
        with torch.no_grad():
            bound = config.recurrent_size**-0.5
            for weight in self.unit.parameters():
                weight.uniform_(-bound, bound, generator=generator)
            self.o_proj.normal_(std=config.initializer_range, generator=generator)

    def forward(
        self, hidden_states: Float[Tensor, "batch time hidden"], state: Float[Tensor, "batch recurrent"] | None = None
    ) -> tuple[Float[Tensor, "batch time hidden"], Float[Tensor, "batch recurrent"]]:
        """The residual stream after this layer, and the state after the last token."""
        mixed, last = self.unit(self.norm(hidden_states), None if state is None else state[None])
        return hidden_states + F.linear(mixed, self.o_proj), last[0]


class GRULanguageModel(nn.Module):
    """A language model of gated recurrent units, with the interface of ``medarch.lm.decoder.Decoder``.

    Args:
        config: Sizes.
        generator: Source of randomness for the initial weights; torch's default generator where it is absent.
    """

    def __init__(self, config: GRUConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        nn.init.normal_(embedding, std=config.initializer_range, generator=generator)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(GRULayer(config, generator) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def lm_head_weight(self) -> Float[Tensor, "vocab hidden"]:
        """The output projection, which is the embedding."""
        return self.embed_tokens.weight

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        cache: RecurrentCache | None = None,
        logits_to_keep: int = 0,
    ) -> DecoderOutput:
        """Scores the next token at each position.

        Args:
            input_ids: Tokens, numbered from 0.
            mask: Accepted for the sake of the interface, and without effect: padding stands at the right end, and no
                earlier position sees it.
            cache: Memory of the tokens before these, which the call brings up to date.
            logits_to_keep: How many of the last positions to score; 0 for all.

        Raises:
            ValueError: If the tokens are not of two dimensions, are none, lie outside the vocabulary or, together
                with the cache, exceed the context, or the cache is of another batch.
        """
        seen = 0 if cache is None else cache.length
        self._check(input_ids, cache, seen)
        hidden_states = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            hidden_states, state = layer(hidden_states, None if cache is None else cache.layers[index])
            if cache is not None:
                cache.layers[index] = state.detach()
        if cache is not None:
            cache.length = seen + input_ids.shape[1]
        last = self.norm(hidden_states[:, -logits_to_keep:])
        return DecoderOutput(F.linear(last, self.lm_head_weight).float(), (None,) * len(self.layers))

    def new_cache(self, batch_size: int, capacity: int | None = None) -> RecurrentCache:
        """Hidden states before the first token, all zero.

        Raises:
            ValueError: If the capacity exceeds the context.
        """
        longest = self.config.max_position_embeddings
        capacity = longest if capacity is None else capacity
        if not 1 <= capacity <= longest:
            raise ValueError(f"a cache for {capacity} positions, but the context is max_position_embeddings={longest}")
        weight = self.embed_tokens.weight
        shape = (batch_size, self.config.recurrent_size)
        return RecurrentCache([weight.new_zeros(shape) for _ in self.layers], capacity)

    def loss(
        self, output: DecoderOutput, targets: Int[Tensor, "batch time"], ignore_index: int = -100
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Cross entropy in nats a token over the positions that count, as ``Decoder.loss`` gives it."""
        total = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
        return total, {"cross_entropy": float(total.detach())}

    def _check(self, input_ids: Tensor, cache: RecurrentCache | None, seen: int) -> None:
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be (batch, time) with at least one token, got {tuple(input_ids.shape)}")
        lowest, highest = (int(bound) for bound in input_ids.aminmax())
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"input_ids hold {lowest if lowest < 0 else highest}, but the vocabulary has tokens 0 to "
                f"{self.config.vocab_size - 1}: was the text encoded by another tokenizer?"
            )
        room = self.config.max_position_embeddings if cache is None else cache.capacity
        if seen + input_ids.shape[1] > room:
            raise ValueError(
                f"{seen + input_ids.shape[1]} tokens exceed the room for {room}: shorten the text or split it"
            )
        if cache is not None and len(cache.layers[0]) != len(input_ids):
            raise ValueError(
                f"the cache holds a batch of {len(cache.layers[0])}, the input is a batch of {len(input_ids)}"
            )
