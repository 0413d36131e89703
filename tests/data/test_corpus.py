"""The corpus: no term and no near copy in two parts, always the same parts, and text of another kind."""

import itertools
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medarch.data.corpus import SIMILAR, load_corpus, similar_groups
from medarch.data.hpo import load_definitions

PARTS = ("train", "validation", "test")
TEST_IDS = ["HP:0000039", "HP:0000040", "HP:0000045", "HP:0000188"]
OTHER_IDS = ["ICD-10-CM A01.02", "ICD-10-CM A02.25", "ICD-10-CM A03.9"]


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


def test_every_definition_is_in_exactly_one_part(corpus):
    ids = [document.id for part in PARTS for document in getattr(corpus, part)]
    assert len(ids) == 15_817
    assert sorted(ids) == [definition.term_id for definition in load_definitions()]


def test_sizes(corpus):
    total = sum(len(getattr(corpus, part)) for part in PARTS)
    for part, share in zip(PARTS, (0.90, 0.05, 0.05), strict=True):
        assert abs(len(getattr(corpus, part)) / total - share) < 0.005
    assert 100_000 < sum(len(document.text.encode()) for document in corpus.out_of_domain) < 200_000


def test_documents_say_what_the_ontology_says(corpus):
    by_id = {definition.term_id: definition for definition in load_definitions()}
    for part in PARTS:
        for document in getattr(corpus, part):
            definition = by_id[document.id]
            assert document.name == definition.name
            assert document.text == f"{definition.name}: {definition.text}"
            assert (document.system,) == definition.systems or (document.system is None and len(definition.systems) > 1)


def test_no_near_copy_of_a_training_text_is_tested(corpus):
    """Measured here by itself, without the sparse product that the split uses."""

    def runs(document):
        text = document.text.removeprefix(f"{document.name}: ").lower()
        words = re.sub(r"\b(\d+(st|nd|rd|th)?|left|right|first|second|third|fourth|fifth)\b", "#", text)
        words = re.findall(r"#|[^\W_]+", words)
        return frozenset(zip(words, words[1:], words[2:], strict=False))

    held_out = [(document, runs(document)) for document in (*corpus.validation, *corpus.test)]
    where = {}
    for number, (_, found) in enumerate(held_out):
        for run in found:
            where.setdefault(run, []).append(number)
    compared = 0
    for document in corpus.train:
        mine = runs(document)
        common = {}
        for run in mine:
            for number in where.get(run, ()):
                common[number] = common.get(number, 0) + 1
        for number, count in common.items():
            other, found = held_out[number]
            compared += 1
            share = count / (len(mine) + len(found) - count)
            assert share < SIMILAR + 0.1, f"{document.text!r} and {other.text!r} are {share:.2f} alike"
    assert compared > 100_000


def test_the_parts_are_those_that_checkpoints_were_trained_on(corpus):
    """Whatever moves a term from one part to another makes every stored model and record meaningless."""
    assert [len(getattr(corpus, part)) for part in (*PARTS, "out_of_domain")] == [14_274, 758, 785, 1_191]
    assert [document.id for document in corpus.test[:4]] == TEST_IDS
    assert [document.id for document in corpus.out_of_domain[:3]] == OTHER_IDS


def test_another_process_splits_alike(corpus):
    program = (
        "from medarch.data.corpus import load_corpus\n"
        "c = load_corpus(); print(*[d.id for d in c.validation[:50]], len(c.out_of_domain))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}
    ).stdout.split()
    assert shown == [*[document.id for document in corpus.validation[:50]], str(len(corpus.out_of_domain))]


def test_out_of_domain_is_of_another_kind(corpus):
    assert all(document.id.startswith("ICD-10-CM ") and document.system is None for document in corpus.out_of_domain)
    assert len({document.id for document in corpus.out_of_domain}) == len(corpus.out_of_domain)
    known = {document.text for part in PARTS for document in getattr(corpus, part)}
    assert not known & {document.text for document in corpus.out_of_domain}


SENTENCE = "an abnormal shape of the left kidney with cysts of many sizes on its surface"


def test_texts_that_differ_in_a_side_or_a_number_belong_together():
    texts = [SENTENCE, SENTENCE.replace("left", "right"), "pain in the chest on breathing in", SENTENCE + " or not"]
    # 13 runs, two more in the last: 13 / 15 = 0.87 in common.
    groups = similar_groups(texts)
    assert groups[0] == groups[1] == groups[3] != groups[2]
    assert len(set(similar_groups(texts, threshold=0.9)[[0, 3]])) == 2
    assert len(set(similar_groups(["one two", "one three", "pain"]))) == 2


def test_likeness_is_passed_on():
    words = [f"w{letter}" for letter in "abcdefghijklmnopqrstuvwyz"]
    chain = [" ".join(words[start : start + 20]) for start in (0, 2, 4)]
    # 18 runs each, 16 shared by neighbours (16 / 20 = 0.8), 14 by the ends (14 / 22 = 0.64).
    assert len(set(similar_groups(chain))) == 1
    assert len(set(similar_groups([chain[0], chain[2]]))) == 2


@given(st.permutations(range(5)))
def test_groups_do_not_depend_on_the_order(order):
    texts = [SENTENCE, SENTENCE.replace("left", "right"), "pain in the chest", "a cough", SENTENCE + " or not"]
    plain, moved = similar_groups(texts), similar_groups([texts[index] for index in order])
    for a, b in itertools.combinations(range(5), 2):
        assert (plain[order[a]] == plain[order[b]]) == (moved[a] == moved[b])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no texts"):
        similar_groups([])
    with pytest.raises(ValueError, match="threshold=0"):
        similar_groups(["a"], threshold=0)
