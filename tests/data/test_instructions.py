"""Instructions: the ontology's own words, and no term of the test among what is trained on."""

from __future__ import annotations

import re
from collections import Counter

from medarch.data import hpo
from medarch.data.corpus import load_corpus
from medarch.data.instructions import CARD, TASKS, load_instructions


def test_each_part_asks_about_the_terms_of_its_part_of_the_corpus() -> None:
    corpus, instructions = load_corpus(), load_instructions()
    for name in ("train", "validation", "test"):
        terms = {each.term_id for each in getattr(instructions, name)}
        assert terms == {document.id for document in getattr(corpus, name)}
    parts = [{each.term_id for each in part} for part in instructions]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_question_and_answer_are_the_ontologys_words() -> None:
    definitions = {each.term_id: each for each in hpo.load_definitions()}
    for part in load_instructions():
        for each in part:
            entry = definitions[each.term_id]
            assert each.definition == entry.text
            assert (each.answer,) == ((entry.name,) if each.task == "name" else entry.systems)


def test_every_term_is_asked_for_its_name_and_those_of_one_system_for_it() -> None:
    definitions = hpo.load_definitions()
    asked = Counter((each.term_id, each.task) for part in load_instructions() for each in part)
    assert set(asked.values()) == {1}
    assert {term for term, task in asked if task == "name"} == {each.term_id for each in definitions}
    assert {term for term, task in asked if task == "system"} == {
        each.term_id for each in definitions if len(each.systems) == 1
    }


def test_the_prompt() -> None:
    found = {each.task: each for each in load_instructions().train if each.term_id == "HP:0001250"}
    text = next(each.text for each in hpo.load_definitions() if each.term_id == "HP:0001250")
    assert found["name"].prompt == f"Definition: {text}\nInstruction: Name this finding.\nAnswer:"
    assert found["name"].answer == "Seizure"
    assert found["system"].prompt == f"Definition: {text}\nInstruction: {TASKS['system']}\nAnswer:"
    assert found["system"].answer == "Abnormality of the nervous system"


def test_the_card_says_what_is_derived_and_from_what() -> None:
    parts = load_instructions()
    tasks = Counter(each.task for part in parts for each in part)
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", CARD.size)]
    assert numbers == [sum(tasks.values()), tasks["name"], tasks["system"], *map(len, parts)]
    assert (CARD.licence, CARD.sha256, CARD.version) == (hpo.CARD.licence, hpo.CARD.sha256, hpo.CARD.version)
    assert "Derived by this book's code" in CARD.source
    assert "clinical decision" in CARD.may_not_be_used_for
