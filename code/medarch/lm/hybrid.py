"""A decoder whose layers may mix positions by attention, by Mamba or by Mamba-2, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medarch.lm.attention import CausalSelfAttention, rotary_angles, rotate
from medarch.lm.cache import DecoderCache, KeyValueCache
from medarch.lm.decoder import Decoder, DecoderOutput, RMSNorm
from medarch.lm.hybrid_config import HybridConfig
from medarch.moe.dense import DenseMLP
from medarch.moe.layer import MoELayer
from medarch.moe.router import Routing
from medarch.moe.shared import SharedExpertMoE
from medarch.ssm.mamba import MambaMixer
from medarch.ssm.mamba2 import Mamba2Mixer
from medarch.ssm.state import RecurrentState


class HybridAttention(CausalSelfAttention):
    """Causal attention that may do without positions, and may scale its scores otherwise.

    Args:
        config: Sizes and choices.
        generator: Source of randomness for the initial weights.
    """

    config: HybridConfig

    def project(
        self, hidden_states: Float[Tensor, "batch time hidden"], start: int = 0
    ) -> tuple[
        Float[Tensor, "batch heads time head"],
        Float[Tensor, "batch groups time head"],
        Float[Tensor, "batch groups time head"],
    ]:
        """Queries, keys and values; queries and keys are turned only where positions are rotary."""
        head = self.config.head_dim

        def heads(weight: Tensor) -> Tensor:
            return F.linear(hidden_states, weight).unflatten(-1, (-1, head)).transpose(1, 2)

        queries, keys = heads(self.q_proj), heads(self.k_proj)
        if self.config.positions == "rotary":
            positions = torch.arange(start, start + hidden_states.shape[1], device=hidden_states.device)
            cos, sin = rotary_angles(positions, head, self.config.rope_theta)
            queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        if self.config.attention_multiplier is not None:
            # The scores are divided by the root of the head's width later on.
            queries = queries * (self.config.attention_multiplier * head**0.5)
        return queries, keys, heads(self.v_proj)


class HybridCache(DecoderCache):
    """The memories of all layers: keys and values that grow, and states that do not.

    Args:
        layers: One memory a layer.
    """

    def __init__(self, layers: list[KeyValueCache | RecurrentState]) -> None:
        self.layers = layers  # type: ignore[assignment]  # either kind has a length and bytes_per_position

    @property
    def state_bytes(self) -> int:
        """Memory of the states, the same at every length."""
        return sum(layer.used_bytes for layer in self.layers if isinstance(layer, RecurrentState))

    @property
    def key_value_bytes(self) -> int:
        """Memory of the keys and values of the positions read so far."""
        return sum(layer.bytes_per_position * layer.length for layer in self.layers if isinstance(layer, KeyValueCache))

    @property
    def used_bytes(self) -> int:
        """Memory of both."""
        return self.state_bytes + self.key_value_bytes


class HybridLayer(nn.Module):
    """A mixer, then a feed-forward or none; both read a normalised copy of the residual stream and add to it.

    Args:
        config: The model's sizes.
        mixer: Kind of the mixer.
        feed_forward: Kind of the feed-forward.
        generator: Source of randomness for the initial weights.
    """

    def __init__(
        self, config: HybridConfig, mixer: str, feed_forward: str, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = make_mixer(config, mixer, generator)
        self.feed_forward_norm: RMSNorm | None = None
        self.feed_forward: MoELayer | SharedExpertMoE | DenseMLP | None = None
        if feed_forward != "none":
            self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.feed_forward = make_feed_forward(config, feed_forward, generator)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch time hidden"],
        mask: Bool[Tensor, "batch time"] | None = None,
        cache: Any = None,
    ) -> tuple[Float[Tensor, "batch time hidden"], Routing | None]:
        """The residual stream after this layer, and its router's decisions where it has one."""
        answer = self.mixer(_normed(self.mixer_norm, hidden_states), cache)
        hidden_states = torch.add(hidden_states, answer, alpha=self.residual_multiplier)
        if self.feed_forward is None or self.feed_forward_norm is None:
            return hidden_states, None
        normed = _normed(self.feed_forward_norm, hidden_states)
        routing = None
        if isinstance(self.feed_forward, DenseMLP):
            answer = self.feed_forward(normed)
        else:
            answer, routing = self.feed_forward(normed, mask)
        return torch.add(hidden_states, answer, alpha=self.residual_multiplier), routing


class HybridDecoder(Decoder):
    """A decoder-only language model: Mamba, Jamba or Granite 4, according to its pattern.

    It is used, trained, evaluated and generated with as a ``Decoder`` is.

    Args:
        config: Sizes and layer pattern.
        generator: Source of randomness for the initial weights; torch's default generator where it is absent.
    """

    config: HybridConfig

    def __init__(self, config: HybridConfig, generator: torch.Generator | None = None) -> None:
        nn.Module.__init__(self)
        self.config = config
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        nn.init.normal_(embedding, std=config.initializer_range, generator=generator)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(
            HybridLayer(config, mixer, feed_forward, generator) for mixer, feed_forward in config.layer_kinds
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            nn.init.normal_(self.lm_head, std=config.initializer_range, generator=generator)

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        cache: DecoderCache | None = None,
        logits_to_keep: int = 0,
    ) -> DecoderOutput:
        """Scores the next token at each position; see ``Decoder.forward``."""
        self._check(input_ids, mask, 0 if cache is None else cache.length)
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must be 0, for all positions, or more")
        hidden_states = self.embed_tokens(input_ids)
        if self.config.embedding_multiplier != 1:
            hidden_states = hidden_states * self.config.embedding_multiplier
        if self.config.residual_in_fp32:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        routings = []
        for index, layer in enumerate(self.layers):
            hidden_states, routing = layer(hidden_states, mask, None if cache is None else cache.layers[index])
            routings.append(routing)
        last = _normed(self.norm, hidden_states[:, -logits_to_keep:])
        logits = F.linear(last, self.lm_head_weight).float()
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
        return DecoderOutput(logits, tuple(routings))

    def new_cache(self, batch_size: int, capacity: int | None = None) -> HybridCache:
        """An empty memory for ``capacity`` positions, by default the longest context.

        Raises:
            ValueError: If the capacity exceeds the context.
        """
        longest = self.config.max_position_embeddings
        capacity = longest if capacity is None else capacity
        if not 1 <= capacity <= longest:
            raise ValueError(f"a cache for {capacity} positions, but the context is max_position_embeddings={longest}")
        layers = cast(Iterable[HybridLayer], self.layers)
        return HybridCache([layer.mixer.new_cache(batch_size, capacity) for layer in layers])


def make_mixer(
    config: HybridConfig, kind: str, generator: torch.Generator | None = None
) -> HybridAttention | MambaMixer | Mamba2Mixer:
    """The mixer of that kind, with the sizes that the configuration gives it."""
    if kind == "attention":
        return HybridAttention(config, generator)
    if kind == "mamba":
        assert config.mamba is not None
        return MambaMixer(config.mamba, generator)
    assert config.mamba2 is not None
    return Mamba2Mixer(config.mamba2, generator)


def make_feed_forward(
    config: HybridConfig, kind: str, generator: torch.Generator | None = None
) -> MoELayer | SharedExpertMoE | DenseMLP:
    """The feed-forward of that kind, with the sizes that the configuration gives it."""
    if kind == "dense":
        return DenseMLP(
            config.hidden_size,
            config.intermediate_size,
            initializer_range=config.initializer_range,
            generator=generator,
        )
    assert config.moe is not None
    if config.shared_intermediate_size is not None:
        return SharedExpertMoE(config.moe, config.shared_intermediate_size, generator=generator)
    return MoELayer(config.moe, generator)


def _normed(norm: RMSNorm, hidden_states: Tensor) -> Tensor:
    """The norm in the type of its weights, whatever that of the residual stream is."""
    return norm(hidden_states.to(norm.weight.dtype))
