"""The architectures that the recall tasks compare, as large as one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medarch.lm.fixed_selection import FixedSelectionMixer
from medarch.lm.hybrid import HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.recurrent_baseline import GRUConfig, GRULanguageModel
from medarch.ssm.config import MambaConfig
from medarch.ssm.mamba2_config import Mamba2Config

ATTENTION = ("attention", "attention-no-positions")
FIXED = {
    "fixed-step": ("delta",),
    "fixed-B": ("B",),
    "fixed-C": ("C",),
    "fixed-B-C": ("B", "C"),
    "fixed-all": ("delta", "B", "C"),
}
"""Mamba with parts of its selectivity removed, and which."""
KINDS = ("gru", *ATTENTION, "mamba", "mamba2", "hybrid", *FIXED)


@dataclass(frozen=True)
class ModelSpec:
    """One model of a study; what is not said here follows from the wish that all are of one size.

    Attributes:
        kind: One of ``KINDS``. The hybrid has one layer of attention, without positions, and Mamba before and after it:
            of four layers the third.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Layers.
        state_size: Numbers that each channel of a Mamba layer keeps; of a Mamba-2 layer, which gets them for fewer
            weights, as many more as make it as large.

    Raises:
        ValueError: If the kind is unknown, or a hybrid has fewer than two layers.
    """

    kind: str
    hidden_size: int = 64
    num_hidden_layers: int = 2
    state_size: int = 16

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {KINDS}")
        if self.kind == "hybrid" and self.num_hidden_layers < 2:
            raise ValueError(f"a hybrid needs at least two layers, got num_hidden_layers={self.num_hidden_layers}")

    def build(self, vocab_size: int, seed: int, context: int = 16384) -> nn.Module:
        """The model with its initial weights.

        Args:
            vocab_size: Tokens of the task.
            seed: Of the weights.
            context: Longest sequence that the model will be shown.
        """
        generator = torch.Generator().manual_seed(seed)
        mamba = MambaConfig(self.hidden_size, state_size=self.state_size)
        if self.kind == "gru":
            size = _nearest(self._gru_layer, self._mamba_layer(16))
            return GRULanguageModel(
                GRUConfig(vocab_size, self.hidden_size, size, self.num_hidden_layers, context, initializer_range=0.06),
                generator,
            )
        mixers: tuple[str, ...] = ("mamba",)
        if self.kind in (*ATTENTION, "mamba2"):
            mixers = ("mamba2",) if self.kind == "mamba2" else ("attention",)
        if self.kind == "hybrid":
            middle = self.num_hidden_layers // 2
            mixers = tuple("attention" if layer == middle else "mamba" for layer in range(self.num_hidden_layers))
        config = HybridConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=_nearest(self._attention_layer, self._mamba_layer(16)),
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=max(1, self.hidden_size // 32),
            max_position_embeddings=context,
            initializer_range=0.06,
            mixers=mixers,
            feed_forwards=tuple("dense" if mixer == "attention" else "none" for mixer in mixers),
            mamba=mamba if "mamba" in mixers else None,
            mamba2=self._mamba2() if self.kind == "mamba2" else None,
            positions="rotary" if self.kind == "attention" else "none",
        )
        model = HybridDecoder(config, generator)
        if self.kind in FIXED:
            for layer in model.layers:
                layer.mixer = FixedSelectionMixer(mamba, FIXED[self.kind], generator)
        return model

    def _mamba2(self) -> Mamba2Config:
        """Heads of 16 channels; at a state size of 16 as many numbers as a layer of that size can afford, by 16."""
        affordable = _nearest(self._mamba2_layer, self._mamba_layer(16))
        return Mamba2Config(self.hidden_size, state_size=affordable // 16 * self.state_size, head_dim=16)

    def _mamba2_layer(self, states: int) -> int:
        """Weights of a Mamba-2 layer, its norms included."""
        config = Mamba2Config(self.hidden_size, state_size=states, head_dim=16)
        channels, heads = config.intermediate_size, config.num_heads
        assert heads is not None
        into = self.hidden_size * (2 * channels + 2 * states + heads) + 3 * heads
        convolution = (channels + 2 * states) * (config.conv_kernel + 1)
        return into + convolution + channels + channels * self.hidden_size + self.hidden_size

    def _mamba_layer(self, states: int) -> int:
        """Weights of a Mamba layer, its norm included."""
        config = MambaConfig(self.hidden_size, state_size=states)
        channels, rank = config.intermediate_size, config.rank
        projections = 3 * self.hidden_size + config.conv_kernel + 1 + rank + 2 * states
        return channels * (projections + rank + 1 + states + 1) + self.hidden_size

    def _attention_layer(self, width: int) -> int:
        """Weights of an attention layer with a feed-forward of that width, its norms included."""
        return self.hidden_size * (4 * self.hidden_size + 3 * width + 2)

    def _gru_layer(self, size: int) -> int:
        """Weights of a recurrent layer with that many units, its norm included."""
        return 3 * size * (self.hidden_size + size + 2) + self.hidden_size * (size + 1)


def _nearest(weights: Callable[[int], int], wanted: int) -> int:
    """The width at which a layer's weights come nearest to the number wanted."""
    return min(range(1, 4096), key=lambda width: abs(weights(width) - wanted))


def sizes(model: Any, length: int) -> dict[str, int]:
    """Weights of a model, and the bytes of what it carries along for one sequence.

    Args:
        model: Built by ``ModelSpec.build``.
        length: Tokens read.

    Returns:
        ``parameters`` in all and without the embedding, and ``memory_bytes`` after ``length`` tokens.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    cache = model.new_cache(1, length)
    with torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), cache=cache)
    return {
        "parameters": total,
        "without_embedding": total - model.embed_tokens.weight.numel(),
        "memory_bytes": cache.used_bytes,
    }
