"""From a dense decoder to one with mixtures of experts that computes the same."""

from __future__ import annotations

import dataclasses

import torch

from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.moe.config import MoEConfig
from medarch.moe.curriculum import upcycle
from medarch.moe.dense import DenseMLP


def upcycle_decoder(
    model: Decoder,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    router_aux_loss_coef: float = 0.01,
    generator: torch.Generator | None = None,
) -> Decoder:
    """A copy of a dense decoder in which every feed-forward has become a mixture of copies of itself.

    Its logits are those of the dense decoder up to rounding, until it is trained (Komatsuzaki et al. 2023,
    arXiv:2212.05055). The original shares no weight with it.

    Args:
        model: A decoder without mixtures.
        num_experts: Copies in each layer.
        num_experts_per_tok: Of which a token meets so many.
        router_aux_loss_coef: Weight of the balancing loss.
        generator: Source of randomness for the routers.

    Raises:
        ValueError: If the decoder has a mixture already, or the numbers contradict each other.
    """
    old = model.config
    if "moe" in old.feed_forwards:
        raise ValueError(f"feed_forwards={old.feed_forwards}: this decoder has mixtures already")
    moe = MoEConfig(
        old.hidden_size,
        old.intermediate_size,
        num_experts,
        num_experts_per_tok,
        initializer_range=old.initializer_range,
    )
    config: DecoderConfig = dataclasses.replace(
        old, feed_forwards=("moe",), moe=moe, router_aux_loss_coef=router_aux_loss_coef
    )
    new = Decoder(config, generator)
    kept = {name: weight for name, weight in model.state_dict().items() if ".feed_forward." not in name}
    new.load_state_dict(kept, strict=False)
    for layer, dense in zip(new.layers, model.layers, strict=True):
        assert isinstance(dense.feed_forward, DenseMLP)
        layer.feed_forward = upcycle(dense.feed_forward, moe, generator)
    return new.to(model.embed_tokens.weight)
