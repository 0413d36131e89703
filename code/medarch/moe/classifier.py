"""A small classifier of medical definitions, whose feed-forward layer is dense or a mixture of experts.

Given a definition from the Human Phenotype Ontology, name the organ system that it belongs to. Everything
but the feed-forward layer is the same in the classifiers that are compared. Words are embedded; each word
takes in the mean of its definition, without which the router would see the word alone; the feed-forward layer
works on each word; and the mean of the words is mapped to the systems.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medarch.data.hpo import Definition, Split, load_definitions, single_system, split, system_names
from medarch.data.vocabulary import Vocabulary
from medarch.moe.config import MoEConfig
from medarch.moe.dense import DenseMLP
from medarch.moe.layer import MoELayer
from medarch.moe.router import Routing

Kind = Literal["none", "dense_active", "dense_total", "moe"]


class Examples(NamedTuple):
    """Definitions as numbers: words with their padding mask, and the number of each definition's system."""

    tokens: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    labels: Int[Tensor, "batch"]


@dataclass(frozen=True)
class Task:
    """The classification task: what is to be told apart, and the examples.

    Attributes:
        systems: names of the organ systems, by label.
        vocabulary: words of the training definitions.
        definitions: the definitions themselves, split.
        train: training examples.
        validation: examples for every choice that is made.
        test: examples that are looked at once, at the end.
    """

    systems: list[str]
    vocabulary: Vocabulary
    definitions: Split
    train: Examples
    validation: Examples
    test: Examples

    def map(self, change: Callable[[Tensor], Tensor]) -> Task:
        """The same task with every tensor of its examples changed: moved to a device, or cut short."""

        def mapped(examples: Examples) -> Examples:
            return Examples(*(change(part) for part in examples))

        return replace(self, train=mapped(self.train), validation=mapped(self.validation), test=mapped(self.test))

    def encode(self, definitions: list[Definition]) -> Examples:
        """Definitions as examples of this task."""
        tokens, mask = self.vocabulary.encode([definition.text for definition in definitions])
        labels = [self.systems.index(definition.systems[0]) for definition in definitions]
        return Examples(tokens, mask, torch.tensor(labels, dtype=torch.long))


def load_task(seed: int = 0, minimum: int = 50) -> Task:
    """Definitions under exactly one organ system, of the systems with at least ``minimum`` of them.

    Four of the 23 systems have fewer than 50 such definitions, too few to learn from or to be measured on
    with four or five in the test set; 19 remain.

    Args:
        seed: of the split into 80 % training, 10 % validation and 10 % test definitions.
        minimum: definitions that a system must have.
    """
    definitions = single_system(load_definitions(), minimum)
    parts = split(definitions, seed)
    vocabulary = Vocabulary.build(definition.text for definition in parts.train)
    empty = Examples(*(torch.empty(0) for _ in range(3)))
    task = Task(system_names(definitions), vocabulary, parts, empty, empty, empty)
    return replace(
        task,
        train=task.encode(parts.train),
        validation=task.encode(parts.validation),
        test=task.encode(parts.test),
    )


class TextClassifier(nn.Module):
    """Names the organ system of a definition.

    Args:
        vocabulary_size: words, the two special ones included.
        num_classes: systems.
        config: the mixture's sizes; the dense kinds take theirs from it.
        kind: the feed-forward layer: ``"moe"``, a dense layer of the mixture's active or total size, or none.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_classes: int,
        config: MoEConfig,
        kind: Kind,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind {kind!r} is none of {', '.join(get_args(Kind))}")
        self.kind = kind
        hidden = config.hidden_size
        # Weights outside the feed-forward layer are drawn first, so that all kinds start from the same ones.
        self.embedding = _normal(vocabulary_size, hidden, 0.02, generator)
        self.context = _normal(hidden, hidden, hidden**-0.5, generator)
        self.classify = _normal(num_classes, hidden, hidden**-0.5, generator)
        self.norm = nn.RMSNorm(hidden)
        self.feed_forward: MoELayer | DenseMLP | None = None
        if kind == "moe":
            self.feed_forward = MoELayer(config, generator)
        elif kind == "dense_active":
            self.feed_forward = DenseMLP.of_active_size(config, generator)
        elif kind == "dense_total":
            self.feed_forward = DenseMLP.of_total_size(config, generator)

    def forward(
        self, tokens: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch classes"], Routing | None]:
        """Scores of each system, and the routing of the words where there is a router.

        Padding is dropped at the start, so that no kind spends time on it. The routing lists the words that
        the mask keeps, text after text, as ``tokens[mask]`` does.
        """
        text = mask.nonzero()[:, 0]  # for each word the text that it stands in
        words = F.embedding(tokens[mask], self.embedding)
        words = words + F.linear(_mean(words, text, len(tokens)), self.context)[text]
        routing = None
        if isinstance(self.feed_forward, MoELayer):
            change, routing = self.feed_forward(self.norm(words))
            words = words + change
        elif self.feed_forward is not None:
            words = words + self.feed_forward(self.norm(words))
        return F.linear(_mean(words, text, len(tokens)), self.classify), routing


def _normal(rows: int, columns: int, std: float, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns).normal_(std=std, generator=generator))


def _mean(
    words: Float[Tensor, "words hidden"], text: Int[Tensor, "words"], texts: int
) -> Float[Tensor, "texts hidden"]:
    """Mean over the words of each text; zero for a text without words."""
    total = words.new_zeros(texts, words.shape[-1]).index_add(0, text, words)
    return total / text.bincount(minlength=texts).clamp(min=1)[:, None]


def balancing_loss(routing: Routing) -> Float[Tensor, ""]:
    """E times the sum over experts of load and mean probability (Fedus et al. 2021, arXiv:2101.03961).

    It is 1 where the load is even, and grows where experts with a high probability also get many words. The
    load is a count and has no gradient; the probabilities carry it.
    """
    num_experts = routing.probs.shape[-1]
    load = routing.indices.flatten().bincount(minlength=num_experts) / routing.indices.numel()
    return num_experts * (load * routing.probs.flatten(0, -2).mean(0)).sum()


def default_config() -> MoEConfig:
    """A mixture 128 wide with 8 experts of 64, of which 2 work on each word."""
    return MoEConfig(hidden_size=128, intermediate_size=64, num_experts=8, num_experts_per_tok=2)


@dataclass(frozen=True)
class Training:
    """A trained classifier and how it came about.

    Attributes:
        model: the classifier.
        losses: mean cross-entropy of each epoch, in nats.
        seconds: time of the training alone; the process's own time on a CPU.
    """

    model: TextClassifier
    losses: list[float]
    seconds: float


def train_classifier(
    task: Task,
    kind: Kind = "moe",
    *,
    seed: int = 0,
    epochs: int = 4,
    config: MoEConfig | None = None,
    batch_size: int = 128,
    learning_rate: float = 6e-3,
    word_dropout: float = 0.3,
    balance: float = 0.01,
) -> Training:
    """Trains a classifier with AdamW.

    The same seed gives each kind the same batches and the same dropped words.

    Args:
        task: the task.
        kind: which feed-forward layer.
        seed: of the initial weights, of the order and of the dropped words.
        epochs: passes over the training definitions.
        config: sizes of the mixture, ``default_config()`` where it is absent.
        batch_size: definitions per step.
        learning_rate: at its peak, after a tenth of the steps; it falls to zero in a straight line from
            there.
        word_dropout: fraction of the words left out of each definition, anew at each step.
        balance: weight of ``balancing_loss``; without a router it does nothing.

    Returns:
        The classifier with its losses and its time.
    """
    config = config or default_config()
    device = task.train.tokens.device
    model = TextClassifier(
        len(task.vocabulary), len(task.systems), config, kind, torch.Generator().manual_seed(seed)
    ).to(device)
    shuffle = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(task.train.labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    losses = []
    start = _clock(device)
    for _ in range(epochs):
        total = 0.0
        for batch in _batches(task.train, batch_size, shuffle):
            kept = torch.rand(batch.mask.shape, generator=shuffle).to(device) >= word_dropout
            scores, routing = model(batch.tokens, batch.mask & kept)
            loss = F.cross_entropy(scores, batch.labels)
            total += loss.item() * len(batch.labels)
            if routing is not None and balance:
                loss = loss + balance * balancing_loss(routing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses.append(total / len(task.train.labels))
    return Training(model, losses, _clock(device) - start)


def _batches(examples: Examples, size: int, generator: torch.Generator) -> Iterator[Examples]:
    order = torch.randperm(len(examples.labels), generator=generator).to(examples.labels.device)
    for index in order.split(size):
        yield Examples(*(part[index] for part in examples))


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


class Evaluation(NamedTuple):
    """How a classifier does on some examples.

    Attributes:
        accuracy: fraction of the definitions named right.
        macro_f1: mean over the systems that occur of the harmonic mean of precision and recall.
        predictions: the system named for each definition.
        routing: of the words ``tokens[mask]``, None without a router.
    """

    accuracy: float
    macro_f1: float
    predictions: Int[Tensor, "batch"]
    routing: Routing | None


@torch.no_grad()
def evaluate(model: TextClassifier, examples: Examples) -> Evaluation:
    """Accuracy and macro-F1 of a classifier; every word is kept."""
    scores, routing = model(examples.tokens, examples.mask)
    predictions = scores.argmax(dim=-1)
    return Evaluation(*accuracy_and_f1(predictions, examples.labels), predictions, routing)


def accuracy_and_f1(predictions: Int[Tensor, "batch"], labels: Int[Tensor, "batch"]) -> tuple[float, float]:
    """Accuracy and macro-averaged F1, over the classes that occur among labels or predictions.

    Raises:
        ValueError: there is nothing to compare, or the lengths differ.
    """
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions and {len(labels)} labels cannot be compared")
    size = int(torch.maximum(predictions.max(), labels.max())) + 1
    right = labels[predictions == labels].bincount(minlength=size)
    named, present = predictions.bincount(minlength=size), labels.bincount(minlength=size)
    occurs = (named + present) > 0
    f1 = (2 * right[occurs].double() / (named + present)[occurs]).mean()
    return int(right.sum()) / len(labels), float(f1)
