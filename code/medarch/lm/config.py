"""The sizes and the layer pattern that define one decoder language model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from medarch.moe.config import MoEConfig

MIXERS = ("attention",)
FEED_FORWARDS = ("dense", "moe")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model, in the names of transformers' ``LlamaConfig`` where it has them.

    Attributes:
        vocab_size: Tokens that the model knows, V.
        hidden_size: Width of the residual stream, D.
        intermediate_size: Width inside a dense feed-forward layer.
        num_hidden_layers: Layers, each a mixer and a feed-forward.
        num_attention_heads: Query heads, H.
        num_key_value_heads: Key and value heads, each shared by ``H / num_key_value_heads`` query heads
            (Ainslie et al. 2023, arXiv:2305.13245); as many as query heads where it is absent.
        max_position_embeddings: Longest context, prompt and continuation together.
        rope_theta: Base of the rotary frequencies (Su et al. 2021, arXiv:2104.09864).
        rms_norm_eps: Added to the mean square before its root is taken.
        tie_word_embeddings: Whether the embedding is also the output projection.
        initializer_range: Standard deviation of the initial weights.
        mixers: What exchanges information between positions, layer by layer; the pattern is repeated until
            every layer has one.
        feed_forwards: ``"dense"`` or ``"moe"``, layer by layer, repeated likewise.
        moe: Sizes of the mixture-of-experts layers, where there are any.
        router_aux_loss_coef: Weight of the load-balancing loss (Fedus et al. 2021, eq. 4).
        router_z_loss_coef: Weight of the router's z-loss (Zoph et al. 2022, eq. 5).

    Raises:
        ValueError: If a size is not a positive whole number, heads do not divide, a pattern does not fill
            the layers, or two fields contradict each other; the message names both.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    mixers: tuple[str, ...] = ("attention",)
    feed_forwards: tuple[str, ...] = ("dense",)
    moe: MoEConfig | None = None
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for pattern in ("mixers", "feed_forwards"):
            object.__setattr__(self, pattern, tuple(getattr(self, pattern)))
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")
        self._check_heads()
        self._check_pattern("mixers", MIXERS)
        self._check_pattern("feed_forwards", FEED_FORWARDS)
        self._check_experts()

    def _check_heads(self) -> None:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_attention_heads={heads} gives heads of "
                f"{self.head_dim}, but rotary positions turn pairs of numbers: choose an even head size"
            )
        if heads % shared:  # type: ignore[operator]  # set in __post_init__
            raise ValueError(f"num_attention_heads={heads} is not divisible by num_key_value_heads={shared}")

    def _check_pattern(self, name: str, known: tuple[str, ...]) -> None:
        pattern = getattr(self, name)
        unknown = [kind for kind in pattern if kind not in known]
        if unknown:
            raise ValueError(f"{name} names {unknown[0]!r}, known are {known}")
        if not pattern or self.num_hidden_layers % len(pattern):
            raise ValueError(
                f"{name} is a pattern of {len(pattern)}, which does not fill num_hidden_layers="
                f"{self.num_hidden_layers}: the number of layers must be a multiple of the pattern's length"
            )

    def _check_experts(self) -> None:
        wanted = "moe" in self.feed_forwards
        if wanted and self.moe is None:
            raise ValueError("feed_forwards names 'moe' but moe is None: give a MoEConfig, or choose 'dense'")
        if self.moe is None:
            coefficients = (self.router_aux_loss_coef, self.router_z_loss_coef)
            if any(coefficients):
                raise ValueError(
                    f"router_aux_loss_coef and router_z_loss_coef are {coefficients}, but there is no router: "
                    "feed_forwards names no 'moe'"
                )
            return
        if not wanted:
            raise ValueError(f"moe is given but feed_forwards={self.feed_forwards} names no 'moe': remove one")
        if self.moe.hidden_size != self.hidden_size:
            raise ValueError(f"moe.hidden_size={self.moe.hidden_size} differs from hidden_size={self.hidden_size}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_kinds(self) -> list[tuple[str, str]]:
        """Mixer and feed-forward of each layer, the patterns written out."""
        return [
            (self.mixers[i % len(self.mixers)], self.feed_forwards[i % len(self.feed_forwards)])
            for i in range(self.num_hidden_layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        fields = dataclasses.asdict(self)
        return fields | {"mixers": list(self.mixers), "feed_forwards": list(self.feed_forwards)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DecoderConfig:
        """The configuration that ``to_dict`` wrote.

        Raises:
            ValueError: If a field is unknown or missing, or the values contradict one another.
        """
        try:
            moe = fields.get("moe")
            return cls(**{**fields, "moe": None if moe is None else MoEConfig(**moe)})
        except TypeError as error:
            raise ValueError(f"these fields do not describe a decoder: {error}") from error
