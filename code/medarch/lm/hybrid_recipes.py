"""The book's state space models: as large for one token as its dense model, trained on the same text in its order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medarch.lm.hybrid import HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.recipes import RECIPES, VOCAB_SIZE, Recipe
from medarch.ssm.config import MambaConfig


@dataclass(frozen=True)
class HybridRecipe(Recipe):
    """One model of the book whose mixers are not all attention; see ``Recipe``."""

    model: HybridConfig

    def build(self, device: torch.device | str = "cpu") -> HybridDecoder:
        """The model with its initial weights, which depend on the seed alone and not on the device."""
        return HybridDecoder(self.model, torch.Generator().manual_seed(self.training.seed)).to(device)


HYBRID_RECIPES = {
    recipe.name: recipe
    for recipe in (
        HybridRecipe(
            "mamba",
            "a Mamba decoder, six layers of selective state spaces and nothing else",
            HybridConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=168,
                intermediate_size=1,
                num_hidden_layers=6,
                num_attention_heads=1,
                initializer_range=0.07,
                mixers=("mamba",),
                feed_forwards=("none",),
                mamba=MambaConfig(168),
            ),
            # The schedule is that of the dense model. Its weight decay shortens A_log too, which the authors of Mamba
            # leave alone; the rates can grow back where the loss asks for it.
            RECIPES["dense"].training,
        ),
        HybridRecipe(
            "hybrid",
            "a hybrid decoder, three layers of Mamba to one of attention, each with a feed-forward 320 wide",
            HybridConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=160,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=5,
                num_key_value_heads=1,
                # Jamba's own; what the bridge finds in a config.json without the field.
                rms_norm_eps=1e-6,
                initializer_range=0.07,
                mixers=("mamba", "mamba", "attention", "mamba"),
                mamba=MambaConfig(160, inner_norms=True, rms_norm_eps=1e-6),
                positions="none",
            ),
            RECIPES["dense"].training,
        ),
    )
}
"""The committed models with state spaces by name; in the hybrid, attention has no positions, as in Jamba."""
