"""Short texts of very different kinds, to see whether a router tells them apart."""

from __future__ import annotations

import inspect
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from medarch.data.corpus import load_corpus

# The openings of poems that are long out of copyright: by Shakespeare, Blake, Wordsworth, Dickinson, Poe, Carroll,
# Coleridge and Burns. They are quoted for their kind of language; nothing depends on an edition.
VERSE = (
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: Rough winds do shake the darling "
    "buds of May, And summer's lease hath all too short a date.",
    "Tyger Tyger, burning bright, In the forests of the night; What immortal hand or eye, Could frame thy fearful "
    "symmetry?",
    "I wandered lonely as a cloud That floats on high o'er vales and hills, When all at once I saw a crowd, A host, of "
    "golden daffodils;",
    "Because I could not stop for Death, He kindly stopped for me; The carriage held but just ourselves And "
    "Immortality.",
    "Once upon a midnight dreary, while I pondered, weak and weary, Over many a quaint and curious volume of forgotten "
    "lore,",
    "'Twas brillig, and the slithy toves Did gyre and gimble in the wabe: All mimsy were the borogoves, And the mome "
    "raths outgrabe.",
    "In Xanadu did Kubla Khan A stately pleasure-dome decree: Where Alph, the sacred river, ran Through caverns "
    "measureless to man Down to a sunless sea.",
    "O my Luve is like a red, red rose That's newly sprung in June; O my Luve is like the melody That's sweetly played "
    "in tune.",
)

MATHEMATICS = (
    "Let f be continuous on [a, b] and differentiable on (a, b). Then there is a point c in (a, b) with "
    "f'(c) = (f(b) - f(a)) / (b - a).",
    "If p is a prime number and a is an integer not divisible by p, then a^(p-1) = 1 (mod p).",
    "The sum of the first n odd numbers is n^2: 1 + 3 + 5 + ... + (2n - 1) = n^2. Proof by induction on n.",
    "A matrix A is invertible if and only if det(A) != 0; the inverse of a product is (AB)^(-1) = B^(-1) A^(-1).",
    "Solve x^2 - 5x + 6 = 0. The discriminant is 25 - 24 = 1, so x = (5 + 1) / 2 = 3 or x = (5 - 1) / 2 = 2.",
    "For independent random variables X and Y, Var(X + Y) = Var(X) + Var(Y) and E[XY] = E[X] E[Y].",
    "The series 1 + 1/2 + 1/4 + 1/8 + ... converges to 2, whereas 1 + 1/2 + 1/3 + 1/4 + ... diverges.",
    "In a right-angled triangle with legs a and b and hypotenuse c, a^2 + b^2 = c^2; for example 3^2 + 4^2 = 5^2.",
)

_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    statistics.harmonic_mean,
    statistics.median_low,
    statistics.median_high,
    statistics.multimode,
    statistics.pstdev,
    statistics.covariance,
    textwrap.dedent,
    textwrap.indent,
)


def topic_texts(each: int = 8) -> dict[str, list[str]]:
    """Texts by their kind: two kinds of medical text, Python, mathematics and verse.

    The findings are test definitions, which the book's models have not been trained on, and the diagnoses are
    entries of ICD-10-CM. The Python is taken from the standard library; its docstrings, which are English, are
    left out. The mathematics was written for this purpose.

    Args:
        each: Texts of each kind, at most eight.

    Raises:
        ValueError: If more texts are asked for than there are.
    """
    if not 1 <= each <= len(VERSE):
        raise ValueError(f"each={each}: there are between 1 and {len(VERSE)} texts of each kind")
    corpus = load_corpus()
    return {
        "findings": [document.text for document in corpus.test[:each]],
        "diagnoses": [document.text for document in corpus.out_of_domain[:each]],
        "Python": [_without_docstring(function) for function in _FUNCTIONS[:each]],
        "mathematics": list(MATHEMATICS[:each]),
        "verse": list(VERSE[:each]),
    }


def _without_docstring(function: Callable[..., Any]) -> str:
    source = inspect.getsource(function)
    before, quotes, rest = source.partition('"""')
    return before.rstrip() + rest.partition('"""')[2] if quotes else source


class TextBatch(NamedTuple):
    """Texts as numbers, filled up to the longest.

    Attributes:
        input_ids: A token that begins a text, then the text, then padding.
        attention_mask: 1 for what is to be read, 0 for padding, as transformers wants it.
        counted: True for the tokens of the text itself: neither padding nor the beginning, which all texts share.
    """

    input_ids: Int[Tensor, "batch time"]
    attention_mask: Int[Tensor, "batch time"]
    counted: Bool[Tensor, "batch time"]


def encode_texts(tokenizer: Any, texts: Sequence[str], longest: int = 96, device: Any = "cpu") -> TextBatch:
    """Encodes texts with a tokenizer of transformers, each behind the token that begins a text.

    Args:
        tokenizer: Of any checkpoint; where it knows no beginning of a text, the end of the text before serves.
        texts: At least one.
        longest: Tokens that a text is cut to, its beginning not counted.
        device: Where the tensors go.

    Raises:
        ValueError: If there is no text, one is empty, or the tokenizer knows neither a beginning nor an end.
    """
    beginning = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if beginning is None:
        raise ValueError("the tokenizer knows neither a beginning nor an end of text")
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:longest] for text in texts]
    if not rows or not all(rows):
        raise ValueError(f"{len(rows)} texts, of which {sum(not row for row in rows)} are empty: nothing to encode")
    width = 1 + max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), beginning)
    counted = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        input_ids[number, 1 : 1 + len(row)] = torch.tensor(row)
        counted[number, 1 : 1 + len(row)] = True
    attention_mask = counted.clone()
    attention_mask[:, 0] = True
    return TextBatch(input_ids.to(device), attention_mask.long().to(device), counted.to(device))
