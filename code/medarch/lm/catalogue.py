"""All of the book's own language models, whatever their layers are."""

from __future__ import annotations

import torch

from medarch.lm import recipes
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.hybrid import HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.hybrid_recipes import HYBRID_RECIPES
from medarch.lm.recipes import Recipe


def recipe_names() -> list[str]:
    """The names of all recipes, those of attention first."""
    return [*recipes.RECIPES, *HYBRID_RECIPES]


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    found = HYBRID_RECIPES.get(name) or recipes.RECIPES.get(name)
    if found is None:
        raise ValueError(f"no recipe {name!r}; there are: {', '.join(recipe_names())}")
    return found


def make_decoder(config: DecoderConfig, generator: torch.Generator | None = None) -> Decoder:
    """The decoder that a configuration describes, with new weights."""
    return HybridDecoder(config, generator) if isinstance(config, HybridConfig) else Decoder(config, generator)


def config_from_dict(fields: dict[str, object]) -> DecoderConfig:
    """The configuration that ``to_dict`` of either kind wrote."""
    return HybridConfig.from_dict(fields) if "positions" in fields else DecoderConfig.from_dict(fields)


def count_parameters(config: DecoderConfig) -> tuple[int, int]:
    """Weights held, and weights that one token meets; see ``medarch.lm.recipes.count_parameters``."""
    if not isinstance(config, HybridConfig):
        return recipes.count_parameters(config)
    with torch.device("meta"):
        model = HybridDecoder(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    if config.moe is None:
        return total, total
    idle = 1 - config.moe.num_experts_per_tok / config.moe.num_experts
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total, total - round(idle * experts)
