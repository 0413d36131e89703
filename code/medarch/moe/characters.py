"""The smallest language model in which experts can be watched: it guesses a character from the six before it.

It trains in seconds and the mixture does most of its work, so that what happens to the experts shows in the loss.
Load and loss are followed step by step, under one remedy against collapse or another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from medarch.data.corpus import Document, load_corpus
from medarch.moe.balance import load_balancing_loss, router_z_loss
from medarch.moe.capacity import apply_capacity, drop_fraction
from medarch.moe.config import MoEConfig
from medarch.moe.layer import MoELayer
from medarch.moe.loss_free import LossFreeRouter
from medarch.moe.noisy import NoisyTopKRouter
from medarch.moe.router import Routing

CONTEXT = 6
OTHER = 0  # the number of every character outside the alphabet


@dataclass(frozen=True)
class Characters:
    """The corpus as numbers of characters, documents one after another with a line break between them.

    Attributes:
        alphabet: The characters by number; number 0 stands for any other.
        train: Training text.
        validation: Text for choices.
        test: Text for final numbers.
    """

    alphabet: str
    train: Int[Tensor, "characters"]
    validation: Int[Tensor, "characters"]
    test: Int[Tensor, "characters"]

    def encode(self, text: str) -> Int[Tensor, "characters"]:
        """A text in lower case as numbers."""
        number = {character: index for index, character in enumerate(self.alphabet)}
        return torch.tensor([number.get(character, OTHER) for character in text.lower()], dtype=torch.long)


def load_characters(size: int = 48) -> Characters:
    """The book's corpus by character, with the ``size`` most frequent characters of the training text.

    Raises:
        ValueError: If ``size`` leaves no room for a character beside the one that stands for all others.
    """
    if size < 2:
        raise ValueError(f"size={size}: the alphabet needs the other-character and at least one more")
    corpus = load_corpus()
    train = _joined(corpus.train)
    frequent = [character for character, _ in Counter(train).most_common(size - 1)]
    empty = torch.empty(0, dtype=torch.long)
    characters = Characters("\0" + "".join(frequent), empty, empty, empty)
    parts = (characters.encode(text) for text in (train, _joined(corpus.validation), _joined(corpus.test)))
    return Characters(characters.alphabet, *parts)


def _joined(documents: Sequence[Document]) -> str:
    return "\n".join(document.text for document in documents).lower()


class CharacterModel(nn.Module):
    """Embeds six characters, mixes them with one matrix, and leaves the rest to a mixture of experts.

    Args:
        alphabet: Number of characters.
        config: The mixture's sizes.
        generator: Source of the initial weights.
    """

    def __init__(self, alphabet: int, config: MoEConfig, generator: torch.Generator) -> None:
        super().__init__()
        hidden, embedded = config.hidden_size, 16
        self.embedding = _normal(alphabet, embedded, 1.0, generator)
        self.mix = _normal(hidden, CONTEXT * embedded, (CONTEXT * embedded) ** -0.5, generator)
        self.head = _normal(alphabet, hidden, hidden**-0.5, generator)
        self.norm, self.head_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.mixture = MoELayer(config, generator)

    def forward(self, context: Int[Tensor, "batch context"]) -> tuple[Float[Tensor, "batch alphabet"], Routing]:
        """Scores of the next character, and where the router sent each position."""
        hidden = F.linear(F.embedding(context, self.embedding).flatten(-2), self.mix)
        change, routing = self.mixture(self.norm(hidden))
        return F.linear(self.head_norm(hidden + change), self.head), routing


def _normal(rows: int, columns: int, std: float, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns).normal_(std=std, generator=generator))


@dataclass(frozen=True)
class Remedy:
    """What is done against collapse; the default is nothing.

    Attributes:
        auxiliary: Weight of ``load_balancing_loss``.
        z: Weight of ``router_z_loss``.
        bias_rate: Update rate of ``LossFreeRouter``; 0 leaves the plain router.
        noisy: Whether the router is a ``NoisyTopKRouter``.
        capacity_factor: Room of an expert during training over the even share; None is no limit.

    Raises:
        ValueError: If both the bias and the noise are asked for, which are two different routers.
    """

    auxiliary: float = 0.0
    z: float = 0.0
    bias_rate: float = 0.0
    noisy: bool = False
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if self.bias_rate and self.noisy:
            raise ValueError(f"bias_rate={self.bias_rate} and noisy=True ask for two different routers: choose one")


class LimitedRouter(nn.Module):
    """Another router with a capacity during training; what was asked for before the limit is kept in ``asked``."""

    def __init__(self, router: nn.Module, capacity_factor: float) -> None:
        super().__init__()
        self.router, self.capacity_factor = router, capacity_factor
        self.asked: Routing | None = None

    def forward(self, hidden_states: Float[Tensor, "tokens hidden"], mask: None = None) -> Routing:
        """The other router's decisions without the slots that found their expert full."""
        self.asked = self.router(hidden_states, mask)
        return apply_capacity(self.asked, self.capacity_factor) if self.training else self.asked


def install(layer: MoELayer, remedy: Remedy, seed: int) -> None:
    """Gives a layer the router that a remedy asks for, with the weights of the one that it replaces."""
    router = layer.router
    if remedy.bias_rate:
        router = LossFreeRouter(layer.config, update_rate=remedy.bias_rate, score="softmax")
    elif remedy.noisy:
        noise = torch.Generator().manual_seed(seed)
        router = NoisyTopKRouter(layer.config, noise_generator=noise)
    if router is not layer.router:
        router.weight = layer.router.weight
        layer.router = router
    if remedy.capacity_factor is not None:
        layer.router = LimitedRouter(router, remedy.capacity_factor)  # type: ignore[assignment]


class Run(NamedTuple):
    """A trained model and what its router did on the way.

    Attributes:
        model: The model.
        loads: Each expert's share of the slots asked for at every step.
        losses: Cross entropy of every step, in bits per character, the remedy's losses not included.
        dropped: Share of the slots that found their expert full, at every step.
    """

    model: CharacterModel
    loads: Float[Tensor, "steps experts"]
    losses: Float[Tensor, "steps"]
    dropped: Float[Tensor, "steps"]


def default_config() -> MoEConfig:
    """Eight experts, one for each character, weighted with its probability as in the Switch Transformer."""
    return MoEConfig(64, 64, num_experts=8, num_experts_per_tok=1, norm_topk_prob=False)


def train_characters(
    characters: Characters,
    remedy: Remedy | None = None,
    *,
    seed: int = 0,
    steps: int = 300,
    config: MoEConfig | None = None,
    batch_size: int = 1024,
    learning_rate: float = 1e-2,
) -> Run:
    """Trains a character model with AdamW; the same seed gives every remedy the same start and batches.

    Args:
        characters: The text.
        remedy: What is done against collapse; nothing where it is absent.
        seed: Of the initial weights, the batches and the noise.
        steps: Steps of the optimiser.
        config: Sizes of the mixture, ``default_config()`` where it is absent.
        batch_size: Characters to be guessed in a step.
        learning_rate: At its peak, after a twentieth of the steps; it falls to zero in a straight line.

    Returns:
        The model, in evaluation mode, with the history of its experts.
    """
    remedy = remedy or Remedy()
    model = CharacterModel(len(characters.alphabet), config or default_config(), torch.Generator().manual_seed(seed))
    install(model.mixture, remedy, seed)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
    )
    loads, losses, dropped = [], [], []
    for _ in range(steps):
        context, target = sample(characters.train, batch_size, draw)
        scores, routing = model(context)
        # The losses judge what the router asked for, not what a capacity left of it.
        asked = getattr(model.mixture.router, "asked", None) or routing
        loss = F.cross_entropy(scores, target)
        losses.append(loss.item() / math.log(2))
        loads.append(asked.statistics.load)
        dropped.append(drop_fraction(asked, routing))
        loss = loss + remedy.auxiliary * load_balancing_loss(asked.probs, asked.indices)
        loss = loss + remedy.z * router_z_loss(asked.logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if remedy.bias_rate:
            next(part for part in model.modules() if isinstance(part, LossFreeRouter)).update_bias()
    return Run(model.eval(), torch.stack(loads), torch.tensor(losses), torch.tensor(dropped))


def sample(
    text: Int[Tensor, "characters"], count: int, generator: torch.Generator
) -> tuple[Int[Tensor, "count context"], Int[Tensor, "count"]]:
    """Random places of a text: the six characters before each, and the character itself."""
    place = torch.randint(CONTEXT, len(text), (count,), generator=generator)
    return text[place[:, None] + torch.arange(-CONTEXT, 0)], text[place]


def contexts(text: Int[Tensor, "characters"]) -> Int[Tensor, "places context"]:
    """The six characters before every character of a text from its seventh on."""
    return text.unfold(0, CONTEXT, 1)[:-1]


class Evaluation(NamedTuple):
    """A model on text that it has not seen.

    Attributes:
        bits: Cross entropy in bits per character.
        counts: Characters that each expert received, of those where nothing limits it.
        largest_logit: The router's largest logit by absolute value.
    """

    bits: float
    counts: Int[Tensor, "experts"]
    largest_logit: float


@torch.no_grad()
def evaluate(model: CharacterModel, text: Int[Tensor, "characters"], most: int = 20_000) -> Evaluation:
    """Loss and load over the first ``most`` characters of a text."""
    text = text[: most + CONTEXT]
    scores, routing = model(contexts(text))
    bits = F.cross_entropy(scores, text[CONTEXT:]).item() / math.log(2)
    return Evaluation(bits, routing.statistics.counts, float(routing.logits.abs().max()))
