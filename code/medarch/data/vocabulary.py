"""A vocabulary of whole words, enough for a classifier of short texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PADDING, UNKNOWN = 0, 1


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, in order."""
    return re.findall(r"[^\W_]+", text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """Words and their numbers; number 0 is padding and 1 is any word that is not in the vocabulary.

    Attributes:
        words: the words by number, beginning with the two special ones.
    """

    words: tuple[str, ...]
    _index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {word: number for number, word in enumerate(self.words)})

    @classmethod
    def build(cls, texts: Iterable[str], min_count: int = 2) -> Vocabulary:
        """The vocabulary of some texts, which must be training texts alone; frequent words come first.

        Args:
            texts: training texts.
            min_count: how often a word must occur; rarer ones are left out.

        Raises:
            ValueError: no word occurs that often.
        """
        count = Counter(word for text in texts for word in words(text))
        kept = sorted((word for word in count if count[word] >= min_count), key=lambda word: (-count[word], word))
        if not kept:
            raise ValueError(f"no word occurs at least min_count={min_count} times in these texts")
        return cls(("<pad>", "<unk>", *kept))

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._index

    def encode(
        self, texts: Sequence[str], length: int = 40
    ) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
        """Word numbers and padding mask, texts cut after ``length`` words.

        Args:
            texts: any number of texts.
            length: words per text, at least 1.

        Returns:
            Numbers, and a mask that is True for a word and False for padding.

        Raises:
            ValueError: ``length`` is less than 1.
        """
        if length < 1:
            raise ValueError(f"length={length}: at least one word per text is needed")
        numbers = torch.full((len(texts), length), PADDING)
        for row, text in enumerate(texts):
            found = [self._index.get(word, UNKNOWN) for word in words(text)[:length]]
            numbers[row, : len(found)] = torch.tensor(found, dtype=torch.long)
        return numbers, numbers != PADDING
