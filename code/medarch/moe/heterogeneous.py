"""Experts of different kinds behind one router: networks for pictures, tables, text and curves.

Every input arrives as 64 numbers, whatever it was: the 64 pixels of a picture, a table row padded with zeros, the
words of a text counted in 64 bins, 64 samples of a curve. The router sees these numbers and nothing else. It is
told neither the kind of an input nor which expert was built for which kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medarch.moe.balance import load_balancing_loss
from medarch.moe.config import MoEConfig
from medarch.moe.router import Routing, TopKRouter

KINDS = ("picture", "table", "text", "curve")
WIDTH = 64
System = Literal["dense_active", "dense_total", "identical", "learned", "assigned"]


class Inputs(NamedTuple):
    """Inputs of all kinds in one table.

    Attributes:
        values: 64 numbers each, of mean 0 and variance 1 over the training inputs of their kind.
        kinds: what each one is, by its place in ``KINDS``; no model sees it.
        labels: the answer, numbered over all kinds.
    """

    values: Float[Tensor, "inputs 64"]
    kinds: Int[Tensor, "inputs"]
    labels: Int[Tensor, "inputs"]


@dataclass(frozen=True)
class Mixture:
    """The task: inputs of four kinds, as many of each, and the answers' names.

    Attributes:
        train: what is trained on.
        test: what is measured on, once.
        answers: for each label its kind and name.
    """

    train: Inputs
    test: Inputs
    answers: list[tuple[str, str]]


def load_mixture(per_kind: int = 400, test_per_kind: int = 120) -> Mixture:
    """Handwritten digits, breast tumours, definitions of findings, and pulse curves.

    Pictures and table are shuffled once with a fixed seed and then split; definitions keep the corpus's split; of
    each curve the first part is trained on and the last part tested, with what lies between left out.

    Args:
        per_kind: training inputs of each kind.
        test_per_kind: test inputs of each kind.

    Raises:
        ValueError: there are not so many.
    """
    parts: list[tuple[Inputs, Inputs]] = []
    answers: list[tuple[str, str]] = []
    for kind, load in enumerate((_pictures, _table, _text, _curves)):
        (train, train_labels), (test, test_labels), names = load(per_kind, test_per_kind)
        if (len(train), len(test)) != (per_kind, test_per_kind):
            raise ValueError(
                f"{KINDS[kind]}: {len(train)} training and {len(test)} test inputs, but per_kind={per_kind} and "
                f"test_per_kind={test_per_kind}: ask for fewer"
            )
        # One scale for a whole kind, and not one for each number, keeps a picture a picture.
        mean, spread = train.mean(), train.std()
        pair = []
        for values, labels in ((train, train_labels), (test, test_labels)):
            padded = np.zeros((len(values), WIDTH), np.float32)
            padded[:, : values.shape[1]] = (values - mean) / spread
            pair.append(
                Inputs(
                    torch.from_numpy(padded),
                    torch.full((len(values),), kind),
                    torch.from_numpy(np.asarray(labels)).long() + len(answers),
                )
            )
        parts.append((pair[0], pair[1]))
        answers += [(KINDS[kind], name) for name in names]
    train_all, test_all = (
        Inputs(*(torch.cat(each) for each in zip(*side, strict=True))) for side in zip(*parts, strict=True)
    )
    return Mixture(train_all, test_all, answers)


Part = tuple[np.ndarray, np.ndarray]


def _shuffled(values: np.ndarray, labels: np.ndarray, train: int, test: int) -> tuple[Part, Part]:
    order = np.random.default_rng(0).permutation(len(values))
    first, last = order[:train], order[train : train + test]
    return (values[first], labels[first]), (values[last], labels[last])


def _pictures(train: int, test: int) -> tuple[Part, Part, list[str]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (*_shuffled(digits.data, digits.target, train, test), [str(name) for name in digits.target_names])


def _table(train: int, test: int) -> tuple[Part, Part, list[str]]:
    from sklearn.datasets import load_breast_cancer

    tumours = load_breast_cancer()
    fitted, held = _shuffled(tumours.data, tumours.target, train, test)
    # A table's columns have units of their own, so each is brought to one scale, by the training rows.
    mean, spread = fitted[0].mean(0), fitted[0].std(0)
    return (
        ((fitted[0] - mean) / spread, fitted[1]),
        ((held[0] - mean) / spread, held[1]),
        [str(name) for name in tumours.target_names],
    )


def _text(train: int, test: int) -> tuple[Part, Part, list[str]]:
    from sklearn.feature_extraction.text import HashingVectorizer

    from medarch.data.corpus import load_corpus

    corpus = load_corpus()
    known = [item.system for item in corpus.train if item.system is not None]
    systems = sorted(set(known), key=lambda system: (-known.count(system), system))[:4]
    count = HashingVectorizer(n_features=WIDTH, alternate_sign=False, norm=None, stop_words="english")
    parts: list[Part] = []
    for documents, size in ((corpus.train, train), (corpus.test, test)):
        chosen = [
            item
            for system in systems
            for item in [item for item in documents if item.system == system][: -(-size // len(systems))]
        ][:size]
        values = np.log1p(count.transform([item.text for item in chosen]).toarray())
        parts.append((values, np.array([systems.index(str(item.system)) for item in chosen])))
    return parts[0], parts[1], systems


def _curves(train: int, test: int) -> tuple[Part, Part, list[str]]:
    from medarch.data.pulse import load_recordings, windows

    parts: tuple[list[Part], list[Part]] = ([], [])
    names = []
    for number, recording in enumerate(load_recordings()):
        found = windows(recording.signal[:15000], WIDTH, step=16, thin=2)
        names.append(recording.name.removesuffix(".csv"))
        for part, size, stretch in ((parts[0], train // 2, found[:300]), (parts[1], test // 2, found[-150:])):
            chosen = stretch[np.linspace(0, len(stretch) - 1, size).round().astype(int)]
            part.append((chosen, np.full(size, number)))
    first, last = ((np.concatenate(a), np.concatenate(b)) for a, b in (zip(*part, strict=True) for part in parts))
    return first, last, names


def picture_expert(answers: int, hidden: int = 24) -> nn.Module:
    """A convolution over the 8 x 8 grid: a pixel's neighbours belong to it, wherever they stand."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, hidden), nn.ReLU(), nn.Linear(hidden, answers),
    )  # fmt: skip


def table_expert(answers: int, hidden: int = 40) -> nn.Module:
    """Two plain layers: each column has its own meaning, and none is a neighbour of another."""
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, answers))


class TextExpert(nn.Module):
    """A bag of words: the answer depends on the shares of the words, however long the text."""

    def __init__(self, answers: int, hidden: int = 40) -> None:
        super().__init__()
        self.words, self.classify = nn.Linear(WIDTH, hidden), nn.Linear(hidden, answers)

    def forward(self, values: Float[Tensor, "inputs 64"]) -> Float[Tensor, "inputs answers"]:
        """The mean of the words' vectors, classified."""
        return self.classify(torch.tanh(self.words(F.normalize(values, dim=-1) * WIDTH**0.5)))


def curve_expert(answers: int, hidden: int = 24) -> nn.Module:
    """Two convolutions along time and a maximum over it: a beat is a beat whenever it comes."""
    return nn.Sequential(
        nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 12, 9, stride=2), nn.ReLU(), nn.Conv1d(12, hidden, 7, stride=2),
        nn.ReLU(), nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(2 * hidden, answers),
    )  # fmt: skip


BUILDERS: tuple[Callable[[int], nn.Module], ...] = (picture_expert, table_expert, TextExpert, curve_expert)
"""For each kind the expert that was built for it."""


class HeterogeneousMoE(nn.Module):
    """One expert an input, of any build: the answer is the chosen expert's, times its probability.

    The undivided probability carries the router's gradient, as in the Switch Transformer (Fedus et al. 2022).

    Args:
        experts: Networks from 64 numbers to scores of the answers; they need not be alike.
    """

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        # One linear map of the raw numbers could not tell a curve from its mirror image.
        self.embedding = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.LayerNorm(32))
        config = MoEConfig(32, 1, len(experts), 1, norm_topk_prob=len(experts) == 1, initializer_range=0.1)
        self.router = TopKRouter(config)

    def forward(
        self, values: Float[Tensor, "inputs 64"], assigned: Int[Tensor, "inputs"] | None = None
    ) -> tuple[Float[Tensor, "inputs answers"], Routing]:
        """Scores of every answer.

        Args:
            values: The inputs.
            assigned: The expert of each input where somebody else decides; the router's choice where absent.

        Returns:
            The scores, and what the router would choose.
        """
        routing = self.router(self.embedding(values))
        chosen, weights = routing.indices[:, 0], routing.weights
        if assigned is not None:
            chosen, weights = assigned, torch.ones_like(weights)
        scores: Tensor | None = None
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            answers = expert(values[mine]) if len(mine) else None
            if answers is not None:
                scores = values.new_zeros(len(values), answers.shape[-1]) if scores is None else scores
                scores = scores.index_copy(0, mine, answers * weights[mine])
        if scores is None:
            raise ValueError("there is no input to answer, or assigned names no expert")
        return scores, routing


def build_system(system: System, answers: int, seed: int) -> HeterogeneousMoE:
    """One of the five that are compared.

    ``learned`` has the four builds and a router that learns; ``assigned`` the same networks, each input sent to the
    one built for its kind, as to a department; ``identical`` four times the plain network; ``dense_active`` and
    ``dense_total`` a single plain network for everything, about as large as one expert or as all four.

    Args:
        system: Which.
        answers: Number of answers.
        seed: Of the initial weights.

    Raises:
        ValueError: The system is unknown.
    """
    if system not in get_args(System):
        raise ValueError(f"system {system!r} is none of {', '.join(get_args(System))}")
    with torch.random.fork_rng(devices=[]):  # torch's own layers draw from its global generator
        torch.manual_seed(seed)
        if system.startswith("dense"):
            model = HeterogeneousMoE([table_expert(answers, hidden=160 if system == "dense_total" else 40)])
        elif system == "identical":
            model = HeterogeneousMoE([table_expert(answers) for _ in BUILDERS])
        else:
            model = HeterogeneousMoE([build(answers) for build in BUILDERS])
    return model


@dataclass(frozen=True)
class Outcome:
    """A trained system on the test inputs.

    Attributes:
        model: the system.
        right: for each test input whether it was answered right.
        experts: for each test input the expert that answered.
    """

    model: HeterogeneousMoE
    right: Bool[Tensor, "inputs"]
    experts: Int[Tensor, "inputs"]

    def accuracy(self, kinds: Int[Tensor, "inputs"]) -> list[float]:
        """Share answered right, kind by kind."""
        return [float(self.right[kinds == kind].double().mean()) for kind in range(len(KINDS))]


def train_system(
    task: Mixture,
    system: System,
    *,
    seed: int = 0,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 5e-3,
    balance: float = 0.02,
) -> Outcome:
    """Trains one system with AdamW on all kinds at once, and asks it about the test inputs.

    Args:
        task: the inputs.
        system: which system.
        seed: of the initial weights and of the order.
        epochs: passes over the training inputs.
        batch_size: inputs of a step, of all kinds mixed.
        learning_rate: at the beginning; it falls to zero along a cosine.
        balance: weight of the load-balancing loss, where a router learns.
    """
    model = build_system(system, len(task.answers), seed)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    steps = epochs * -(-len(task.train.labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    learns = system in ("learned", "identical")
    for _ in range(epochs):
        for batch in torch.randperm(len(task.train.labels), generator=order).split(batch_size):
            kinds = task.train.kinds[batch] if system == "assigned" else None
            scores, routing = model(task.train.values[batch], kinds)
            loss = F.cross_entropy(scores, task.train.labels[batch])
            if learns:
                loss = loss + balance * load_balancing_loss(routing.probs, routing.indices)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        kinds = task.test.kinds if system == "assigned" else None
        scores, routing = model.eval()(task.test.values, kinds)
    experts = routing.indices[:, 0] if kinds is None else kinds
    return Outcome(model, scores.argmax(-1) == task.test.labels, experts)
