"""Tasks that tell architectures apart: what must be kept, what may be forgotten, and for how long.

Each task draws fresh sequences from a generator, so that nothing can be learned by heart. A target stands at the
position whose prediction it is, as everywhere in ``medarch.lm``: a model that has read the tokens up to a position
is to name the target there. Where nothing is asked, the target is ``IGNORE``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100
BLANK = 0
"""The token that means nothing, in every task."""
MARK = 1
"""The token that asks: from here on, or at the next token, an answer is due."""
FIRST = 2
"""The first token that carries meaning."""


class RecallBatch(NamedTuple):
    """Sequences of a task, with what is to be answered.

    Attributes:
        input_ids: Tokens.
        targets: The answer due at each position, ``IGNORE`` where none is.
    """

    input_ids: Int[Tensor, "batch time"]
    targets: Int[Tensor, "batch time"]


@dataclass(frozen=True)
class Task(ABC):
    """What every task has; the subclasses are frozen as well, so that a task can name a run.

    Attributes:
        length: Tokens of a sequence.
    """

    length: int

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens that occur, numbered from 0."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of the best guess that ignores which answer the sequence asks for."""

    @abstractmethod
    def _draw(self, batch_size: int, generator: torch.Generator) -> RecallBatch: ...

    def sample(self, batch_size: int, generator: torch.Generator) -> RecallBatch:
        """Draws sequences.

        Args:
            batch_size: How many.
            generator: Source of randomness, on the CPU.

        Raises:
            ValueError: If ``batch_size`` is less than one.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        return self._draw(batch_size, generator)

    def at_length(self, length: int) -> Task:
        """The same task in sequences of another length, with as many things to be remembered as before.

        Raises:
            ValueError: If they do not fit.
        """
        return dataclasses.replace(self, length=length)

    def _require(self, least: int, **counts: int) -> None:
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.length < least:
            given = ", ".join(f"{name}={value}" for name, value in counts.items())
            raise ValueError(f"length={self.length} is too short for {given}: at least {least} tokens are needed")


@dataclass(frozen=True)
class Copying(Task):
    """Repeat the first tokens after a pause of fixed length.

    The items stand at the beginning, blanks follow, and from the mark on the items are to be named in their order,
    with blanks as input. Since every item lies equally far from its answer, a fixed filter of that delay solves the
    task without looking at what it passes on (Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, posed
    such tasks; the form is that of Arjovsky et al. 2016, arXiv:1511.06464, section 4.1).

    Attributes:
        items: How many tokens are to be repeated.
        symbols: How many kinds of them there are.

    Raises:
        ValueError: If a number is less than one, or the length leaves no room for items and answers.
    """

    length: int = 64
    items: int = 8
    symbols: int = 14

    def __post_init__(self) -> None:
        self._require(2 * self.items, items=self.items, symbols=self.symbols)

    @property
    def vocab_size(self) -> int:
        """Blank, mark and symbols."""
        return FIRST + self.symbols

    @property
    def chance(self) -> float:
        """One of the symbols."""
        return 1 / self.symbols

    def _draw(self, batch_size: int, generator: torch.Generator) -> RecallBatch:
        items = torch.randint(FIRST, self.vocab_size, (batch_size, self.items), generator=generator)
        places = torch.arange(self.items).expand(batch_size, -1)
        return _asked_at_the_end(items, places, self.length)


@dataclass(frozen=True)
class SelectiveCopying(Copying):
    """Repeat the tokens that are not blank, wherever they stood.

    As ``Copying``, but the items are scattered among the blanks, so that no fixed delay leads from an item to its
    answer: a model has to look at each token to know whether to keep it (Gu & Dao 2023, arXiv:2312.00752, section
    3.1 and 4.1.1; theirs has 16 items in 4,096 tokens).
    """

    def _draw(self, batch_size: int, generator: torch.Generator) -> RecallBatch:
        items = torch.randint(FIRST, self.vocab_size, (batch_size, self.items), generator=generator)
        places = _distinct(batch_size, self.length - self.items, self.items, generator).sort(-1).values
        return _asked_at_the_end(items, places, self.length)


@dataclass(frozen=True)
class Induction(Task):
    """Name the token that followed the mark when it stood here before.

    Random tokens, the mark somewhere among them, and the mark once more at the end. It is what an induction head
    does, ``[A][B] … [A]`` to ``[B]`` (Olsson et al. 2022, arXiv:2209.11895), with one ``A`` that is always the same
    (Gu & Dao 2023, arXiv:2312.00752, section 4.1.2; theirs is trained at length 256 with 16 kinds of tokens).

    Attributes:
        symbols: How many kinds of ordinary tokens there are.

    Raises:
        ValueError: If there is no symbol, or the length is less than three.
    """

    length: int = 64
    symbols: int = 14

    def __post_init__(self) -> None:
        self._require(3, symbols=self.symbols)

    @property
    def vocab_size(self) -> int:
        """Blank (which does not occur), mark and symbols."""
        return FIRST + self.symbols

    @property
    def chance(self) -> float:
        """One of the symbols."""
        return 1 / self.symbols

    def _draw(self, batch_size: int, generator: torch.Generator) -> RecallBatch:
        inputs = torch.randint(FIRST, self.vocab_size, (batch_size, self.length), generator=generator)
        place = torch.randint(self.length - 2, (batch_size, 1), generator=generator)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1:] = inputs.gather(1, place + 1)
        inputs.scatter_(1, place, MARK)
        inputs[:, -1] = MARK
        return RecallBatch(inputs, targets)


@dataclass(frozen=True)
class MultiQueryRecall(Task):
    """Multi-query associative recall: which value stood behind this key?

    Pairs of a key and a value at the beginning, every key different from the others and every value as well. Then
    each key is asked once, at a place drawn from a power law, ``P(gap) ~ gap^(power - 1)`` over the gaps from 1, as
    repetitions in text are distributed; blanks in between (Arora et al. 2023, arXiv:2312.04927, section 4 and its
    code, whose law this is). The number of pairs is what has to be held in memory.

    Attributes:
        pairs: Keys, and as many values.
        keys: How many kinds of keys there are.
        values: How many kinds of values there are.
        power: Exponent of the law; 1 spreads the questions evenly.
        questions: Where it is given, so many questions stand at places drawn evenly, each for a key drawn anew; it
            makes more of every sequence that a model is trained on.

    Raises:
        ValueError: If a number is less than one, there are more pairs than kinds, or they do not fit the length.
    """

    length: int = 64
    pairs: int = 8
    keys: int = 32
    values: int = 32
    power: float = 0.01
    questions: int | None = None

    def __post_init__(self) -> None:
        questions = self.pairs if self.questions is None else self.questions
        self._require(
            2 * self.pairs + questions, pairs=self.pairs, keys=self.keys, values=self.values, questions=questions
        )
        if self.pairs > min(self.keys, self.values):
            raise ValueError(
                f"pairs={self.pairs} exceeds keys={self.keys} or values={self.values}: all in a sequence are different"
            )
        if not self.power > 0:
            raise ValueError(f"power={self.power} must be above 0")

    @property
    def vocab_size(self) -> int:
        """Blank, mark (which does not occur), keys and values."""
        return FIRST + self.keys + self.values

    @property
    def chance(self) -> float:
        """One of the values that stand in the sequence."""
        return 1 / self.pairs

    def _draw(self, batch_size: int, generator: torch.Generator) -> RecallBatch:
        keys = FIRST + _distinct(batch_size, self.keys, self.pairs, generator)
        values = FIRST + self.keys + _distinct(batch_size, self.values, self.pairs, generator)
        inputs = torch.full((batch_size, self.length), BLANK)
        targets = torch.full_like(inputs, IGNORE)
        inputs[:, 0 : 2 * self.pairs : 2] = keys
        inputs[:, 1 : 2 * self.pairs : 2] = values
        room = self.length - 2 * self.pairs
        if self.questions is None:
            law = torch.arange(1, room + 1, dtype=torch.float64) ** (self.power - 1)
            places = torch.multinomial(law.expand(batch_size, -1), self.pairs, generator=generator)
        else:
            places = _distinct(batch_size, room, self.questions, generator)
            asked = torch.randint(self.pairs, places.shape, generator=generator)
            keys, values = keys.gather(1, asked), values.gather(1, asked)
        inputs.scatter_(1, 2 * self.pairs + places, keys)
        targets.scatter_(1, 2 * self.pairs + places, values)
        return RecallBatch(inputs, targets)


@dataclass(frozen=True)
class PlantedFact(Task):
    """Find one fact again in a long text: of several that are planted in it, the one that is asked for at the end.

    A fact is a key and, right after it, its value; each stands somewhere in a text of random filler words. The
    sequence ends with the mark and a key, and the value is due at that key. With few facts this is the search for a
    needle in a haystack (Hsieh et al. 2024, arXiv:2404.06654, section 3); with as many as fit it is looking up a
    number in a phone book (Jelassi et al. 2024, arXiv:2402.01032, section 4; Waleffe et al. 2024, arXiv:2406.07887,
    section 3.3).

    Attributes:
        facts: How many facts the text holds.
        depth: Where the fact that is asked for stands, from 0 (the beginning) to 1 (right before the question);
            anywhere where it is None. With several questions, the fact that the last one asks for.
        keys: How many kinds of keys there are.
        values: How many kinds of values there are.
        fillers: How many kinds of filler words there are.
        questions: How many questions, each for a fact drawn anew, follow one another at the end.

    Raises:
        ValueError: If a number is less than one, there are more facts than keys, the length does not hold them, or
            the depth lies outside of 0 to 1.
    """

    length: int = 64
    facts: int = 4
    depth: float | None = None
    keys: int = 32
    values: int = 32
    fillers: int = 32
    questions: int = 1

    def __post_init__(self) -> None:
        counts = {"facts": self.facts, "keys": self.keys, "values": self.values, "fillers": self.fillers}
        self._require(2 * self.facts + 2 * self.questions, **counts, questions=self.questions)
        if self.facts > self.keys:
            raise ValueError(f"facts={self.facts} exceeds keys={self.keys}: the keys in a sequence are different")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} must lie between 0, the beginning of the text, and 1, its end")

    @property
    def vocab_size(self) -> int:
        """Blank (which does not occur), mark, keys, values and fillers."""
        return FIRST + self.keys + self.values + self.fillers

    @property
    def chance(self) -> float:
        """One of the values that stand in the sequence, or of all values where it holds only one fact.

        A model that can tell values from other words sees which of them occur; with a single fact that is the answer,
        and only ignoring the sequence leaves it to chance.
        """
        return 1 / self.facts if self.facts > 1 else 1 / self.values

    def _draw(self, batch_size: int, generator: torch.Generator) -> RecallBatch:
        keys = FIRST + _distinct(batch_size, self.keys, self.facts, generator)
        values = FIRST + self.keys + torch.randint(self.values, keys.shape, generator=generator)
        inputs = torch.randint(
            self.vocab_size - self.fillers, self.vocab_size, (batch_size, self.length), generator=generator
        )
        # A row of slots in which a fact counts once and a filler once: no two facts can overlap.
        slots = self.length - 2 * self.questions - self.facts
        chosen = _distinct(batch_size, slots, self.facts, generator)
        asked = torch.randint(self.facts, (batch_size, self.questions), generator=generator)
        if self.depth is not None:
            # The first fact goes to its depth; one that stood there changes places with it.
            wanted = torch.full((batch_size, 1), round(self.depth * (slots - 1)))
            chosen = torch.where(chosen == wanted, chosen[:, :1], chosen)
            chosen[:, :1] = wanted
            asked[:, -1] = 0
        # Each fact before a slot takes one token more than the slot.
        starts = chosen + (chosen[:, None, :] < chosen[:, :, None]).sum(-1)
        inputs.scatter_(1, starts, keys)
        inputs.scatter_(1, starts + 1, values)
        inputs[:, -2 * self.questions :: 2] = MARK
        inputs[:, 1 - 2 * self.questions :: 2] = keys.gather(1, asked)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, 1 - 2 * self.questions :: 2] = values.gather(1, asked)
        return RecallBatch(inputs, targets)


def _distinct(rows: int, kinds: int, count: int, generator: torch.Generator) -> Int[Tensor, "rows count"]:
    """``count`` different numbers below ``kinds`` in each row, every choice and order equally likely."""
    return torch.rand(rows, kinds, generator=generator, dtype=torch.float64).argsort(-1)[:, :count]


def _asked_at_the_end(
    items: Int[Tensor, "batch items"], places: Int[Tensor, "batch items"], length: int
) -> RecallBatch:
    """Items at their places among blanks, a mark where the last ``items`` positions begin, answers from there on."""
    count = items.shape[1]
    inputs = torch.full((len(items), length), BLANK)
    inputs.scatter_(1, places, items)
    inputs[:, -count] = MARK
    targets = torch.full_like(inputs, IGNORE)
    targets[:, -count:] = items
    return RecallBatch(inputs, targets)


def counted(targets: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """The positions at which an answer is due."""
    return targets != IGNORE


def recall_loss(logits: Float[Tensor, "batch time vocab"], targets: Int[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """Mean cross entropy over the counted positions, in nats.

    Raises:
        ValueError: If no position counts.
    """
    if not counted(targets).any():
        raise ValueError("no position counts: every target is IGNORE, so there is nothing to learn from")
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def accuracy(logits: Float[Tensor, "batch time vocab"], targets: Int[Tensor, "batch time"]) -> float:
    """Share of the counted positions at which the likeliest token is the answer.

    Raises:
        ValueError: If no position counts.
    """
    asked = counted(targets)
    if not asked.any():
        raise ValueError("no position counts: every target is IGNORE, so there is nothing to be right about")
    return float((logits.argmax(-1) == targets)[asked].double().mean())
