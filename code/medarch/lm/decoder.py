"""The decoder: embedding, layers of a mixer and a feed-forward each, and a projection back to the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medarch.lm.attention import CausalSelfAttention
from medarch.lm.cache import DecoderCache, KeyValueCache
from medarch.lm.config import DecoderConfig
from medarch.moe.balance import load_balancing_loss, router_z_loss
from medarch.moe.dense import DenseMLP
from medarch.moe.layer import MoELayer
from medarch.moe.router import NO_EXPERT, Routing

MIXERS = {"attention": CausalSelfAttention}
"""A mixer by its name in ``DecoderConfig.mixers``."""


class DecoderOutput(NamedTuple):
    """What a decoder answers.

    Attributes:
        logits: Scores of every token of the vocabulary for the next position, float32.
        routings: What each layer's router decided; None for a layer without one.
    """

    logits: Float[Tensor, "batch time vocab"]
    routings: tuple[Routing | None, ...]


class RMSNorm(nn.Module):
    """Divides a vector by its root mean square and scales each number (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        size: Width of the vector.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """The vector at unit root mean square, times the learned scale; the division is done in float32."""
        wide = hidden_states.float() if hidden_states.dtype in (torch.float16, torch.bfloat16) else hidden_states
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden_states.dtype)


class DecoderLayer(nn.Module):
    """A mixer, which exchanges between positions, then a feed-forward, which works on each alone.

    Both read a normalised copy of the residual stream and add their answer to it.

    Args:
        config: The model's sizes.
        mixer: Kind of the mixer.
        feed_forward: Kind of the feed-forward.
        generator: Source of randomness for the initial weights.
    """

    def __init__(
        self, config: DecoderConfig, mixer: str, feed_forward: str, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MIXERS[mixer](config, generator)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: MoELayer | DenseMLP
        if feed_forward == "moe":
            assert config.moe is not None
            self.feed_forward = MoELayer(config.moe, generator)
        else:
            self.feed_forward = DenseMLP(
                config.hidden_size,
                config.intermediate_size,
                initializer_range=config.initializer_range,
                generator=generator,
            )

    def forward(
        self,
        hidden_states: Float[Tensor, "batch time hidden"],
        mask: Bool[Tensor, "batch time"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Float[Tensor, "batch time hidden"], Routing | None]:
        """The residual stream after this layer, and its router's decisions where it has one."""
        hidden_states = hidden_states + self.mixer(self.mixer_norm(hidden_states), cache)
        normed = self.feed_forward_norm(hidden_states)
        if isinstance(self.feed_forward, DenseMLP):
            return hidden_states + self.feed_forward(normed), None
        answer, routing = self.feed_forward(normed, mask)
        return hidden_states + answer, routing


class Decoder(nn.Module):
    """A decoder-only language model: Llama where every feed-forward is dense, Mixtral where every one is a mixture.

    Args:
        config: Sizes and layer pattern.
        generator: Source of randomness for the initial weights; torch's default generator where it is absent.
    """

    def __init__(self, config: DecoderConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        nn.init.normal_(embedding, std=config.initializer_range, generator=generator)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, mixer, feed_forward, generator) for mixer, feed_forward in config.layer_kinds
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
        """Scores the next token at each position.

        Args:
            input_ids: Tokens, numbered from 0.
            mask: True for a real token, False for padding, which must stand at the right end, where no real
                token can see it. It costs no expert any work and enters no router's statistics.
            cache: Memory of the tokens before these, which the call extends.
            logits_to_keep: How many of the last positions to score; 0 for all.

        Returns:
            The scores, and the routers' decisions.

        Raises:
            ValueError: If the tokens are not of two dimensions, are none, lie outside the vocabulary, exceed
                the context together with the cache, or padding stands before a real token.
        """
        self._check(input_ids, mask, 0 if cache is None else cache.length)
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must be 0, for all positions, or more")
        hidden_states = self.embed_tokens(input_ids)
        routings = []
        for index, layer in enumerate(self.layers):
            hidden_states, routing = layer(hidden_states, mask, None if cache is None else cache.layers[index])
            routings.append(routing)
        # A slice from -0 is a slice from 0, so that keeping none of the last means keeping all.
        last = self.norm(hidden_states[:, -logits_to_keep:])
        return DecoderOutput(F.linear(last, self.lm_head_weight).float(), tuple(routings))

    @property
    def lm_head_weight(self) -> Float[Tensor, "vocab hidden"]:
        """The output projection: the embedding itself where they are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head

    def new_cache(self, batch_size: int, capacity: int | None = None) -> DecoderCache:
        """An empty memory for ``capacity`` positions, by default the longest context.

        Raises:
            ValueError: If the capacity exceeds the context.
        """
        longest = self.config.max_position_embeddings
        capacity = longest if capacity is None else capacity
        if not 1 <= capacity <= longest:
            raise ValueError(f"a cache for {capacity} positions, but the context is max_position_embeddings={longest}")
        layers = cast(Iterable[DecoderLayer], self.layers)
        return DecoderCache([layer.mixer.new_cache(batch_size, capacity) for layer in layers])

    def loss(
        self, output: DecoderOutput, targets: Int[Tensor, "batch time"], ignore_index: int = -100
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """What training minimises: cross entropy, and the routers' losses times their coefficients.

        Args:
            output: What the model answered.
            targets: The token that comes next at each position, ``ignore_index`` where none counts.
            ignore_index: Marks positions to be left out.

        Returns:
            The sum, and its parts by name: ``cross_entropy`` in nats a token, and, where there are routers,
            ``load_balancing`` and ``router_z``, each the mean over layers before its coefficient.
        """
        total = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
        parts = {"cross_entropy": float(total.detach())}
        routed = [routing for routing in output.routings if routing is not None]
        if routed:
            balancing = torch.stack([load_balancing_loss(each.probs, each.indices) for each in routed]).mean()
            z = torch.stack([router_z_loss(each.logits, each.indices[..., 0] != NO_EXPERT) for each in routed]).mean()
            total = total + self.config.router_aux_loss_coef * balancing + self.config.router_z_loss_coef * z
            parts |= {"load_balancing": float(balancing.detach()), "router_z": float(z.detach())}
        return total, parts

    def _check(self, input_ids: Tensor, mask: Tensor | None, seen: int) -> None:
        config = self.config
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be (batch, time) with at least one token, got {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"input_ids must be whole numbers (int64), got {input_ids.dtype}")
        lowest, highest = (int(bound) for bound in input_ids.aminmax())
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(
                f"input_ids hold {lowest if lowest < 0 else highest}, but the vocabulary has tokens 0 to "
                f"{config.vocab_size - 1}: was the text encoded by another tokenizer?"
            )
        length = seen + input_ids.shape[1]
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens exceed the context of max_position_embeddings={config.max_position_embeddings}: "
                "shorten the text or split it"
            )
        if mask is not None and mask.dtype == torch.bool and (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("padding must stand at the right end: a row of the mask has a real token after padding")
