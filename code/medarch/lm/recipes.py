"""The book's own language models: what they are made of, what they read, and how they were trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from medarch.data.corpus import Corpus, Document, load_corpus
from medarch.lm.batches import pack
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.evaluation import evaluate
from medarch.lm.tokenizer import Tokenizer
from medarch.lm.training import TrainingConfig
from medarch.moe.config import MoEConfig

VOCAB_SIZE = 2048


@dataclass(frozen=True)
class Recipe:
    """One model of the book.

    Attributes:
        name: Such as ``"moe"``.
        summary: What it is, in one line.
        model: Sizes and layer pattern.
        training: How it is trained; its seed is also that of the initial weights.
    """

    name: str
    summary: str
    model: DecoderConfig
    training: TrainingConfig

    def change(self, **training: Any) -> Recipe:
        """The recipe with some values of its training replaced.

        A run that becomes shorter than its warm-up keeps the warm-up's share of the whole.
        """
        steps = training.get("steps", self.training.steps)
        if steps < self.training.steps:
            share = self.training.warmup_steps / self.training.steps
            training = {"warmup_steps": max(1, round(share * steps)) if share else 0, **training}
        return replace(self, training=replace(self.training, **training))

    def build(self, device: torch.device | str = "cpu") -> Decoder:
        """The model with its initial weights, which depend on the seed alone and not on the device."""
        return Decoder(self.model, torch.Generator().manual_seed(self.training.seed)).to(device)


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    # About one over the root of the hidden size: at 0.02 a model as narrow as this one begins more slowly.
    "initializer_range": 0.07,
}
_TRAINING = TrainingConfig(
    steps=1500,
    batch_size=8,
    length=256,
    learning_rate=6e-3,
    warmup_steps=100,
    min_lr_ratio=0.1,
    weight_decay=0.1,
    eval_every=100,
    checkpoint_every=50,
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("dense", "a dense decoder, every feed-forward 320 wide", DecoderConfig(**_SIZES), _TRAINING),
        Recipe(
            "moe",
            "a mixture-of-experts decoder, in every layer 8 experts of 160, two for each token",
            DecoderConfig(
                **_SIZES,
                feed_forwards=("moe",),
                moe=MoEConfig(192, 160, num_experts=8, num_experts_per_tok=2, initializer_range=0.07),
                router_aux_loss_coef=0.01,
            ),
            _TRAINING,
        ),
    )
}
"""The committed models by name; both compute as much for a token, and read the same text in the same order."""


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; there are: {', '.join(RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class Text:
    """What the book's models read.

    Attributes:
        corpus: The documents by part.
        tokenizer: Trained on the training documents alone.
        tokens: The training documents as one stream.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    tokens: Int[Tensor, "tokens"]


@functools.lru_cache(maxsize=1)
def load_text() -> Text:
    """The corpus, its tokenizer and the training stream; about six seconds on the first call of a process."""
    corpus = load_corpus()
    tokenizer = Tokenizer.train([document.text for document in corpus.train], VOCAB_SIZE)
    return Text(corpus, tokenizer, pack(tokenizer, corpus.train))


def validation(
    tokenizer: Tokenizer, documents: Sequence[Document], context: int
) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation for ``train``: bits per byte and nats a token on these documents.

    Args:
        tokenizer: Of the model.
        documents: Not among those that it is trained on.
        context: Longest input; positions beyond the training length have never been seen.
    """

    def measure(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Decoder)
        result = evaluate(model, tokenizer, documents, context=context)
        return {"bits_per_byte": result.bits_per_byte, "nats_per_token": result.loss}

    return measure


def count_parameters(config: DecoderConfig) -> tuple[int, int]:
    """Weights held, and weights that one token meets: all but those of the experts it is not sent to.

    The embedding counts in full, since as the output projection every token meets all of it.
    """
    with torch.device("meta"):
        model = Decoder(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    if config.moe is None:
        return total, total
    idle = 1 - config.moe.num_experts_per_tok / config.moe.num_experts
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total, total - round(idle * experts)
