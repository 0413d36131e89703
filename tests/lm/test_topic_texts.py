"""The texts are of the kinds that they are said to be, and their padding never counts."""

from __future__ import annotations

import ast
import textwrap

import pytest

from medarch.data.corpus import load_corpus
from medarch.lm.topic_texts import encode_texts, topic_texts


class Letters:
    """A tokenizer with a number for each letter, from 10 on."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 3

    def __call__(self, text: str, add_special_tokens: bool) -> Letters:
        assert not add_special_tokens
        self.input_ids = [10 + ord(letter) - ord("a") for letter in text]
        return self


def test_five_kinds_none_of_which_the_models_were_trained_on() -> None:
    texts = topic_texts(8)
    assert {kind: len(each) for kind, each in texts.items()} == dict.fromkeys(
        ("findings", "diagnoses", "Python", "mathematics", "verse"), 8
    )
    trained = {document.text for document in load_corpus().train}
    assert not trained & {text for each in texts.values() for text in each}
    for source in texts["Python"]:
        tree = ast.parse(textwrap.dedent(source))
        assert ast.get_docstring(tree.body[0]) is None
    assert [len(each) for each in topic_texts(3).values()] == [3] * 5
    with pytest.raises(ValueError, match="each=9"):
        topic_texts(9)


def test_batches() -> None:
    batch = encode_texts(Letters(), ["abc", "a", "abcdef"], longest=4)
    assert batch.input_ids.tolist() == [[3, 10, 11, 12, 3], [3, 10, 3, 3, 3], [3, 10, 11, 12, 13]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.counted.sum(1).tolist() == [3, 1, 4]
    assert not batch.counted[:, 0].any()


def test_bad_questions_are_answered() -> None:
    for texts in ([], ["a", ""]):
        with pytest.raises(ValueError, match="nothing to encode"):
            encode_texts(Letters(), texts)
    nameless = Letters()
    nameless.eos_token_id = None
    with pytest.raises(ValueError, match="neither a beginning nor an end"):
        encode_texts(nameless, ["a"])
