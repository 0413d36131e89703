"""Words, their numbers, and the padding mask."""

import pytest
import torch

from medarch.data.vocabulary import PADDING, UNKNOWN, Vocabulary, words


def test_words():
    assert words("Bony-fusions of the 2nd (or 3rd) toe_x; É.") == [
        "bony",
        "fusions",
        "of",
        "the",
        "2nd",
        "or",
        "3rd",
        "toe",
        "x",
        "é",
    ]


def test_frequent_words_come_first_and_rare_ones_are_left_out():
    vocabulary = Vocabulary.build(["b a c", "a b", "a d d"], min_count=2)
    assert vocabulary.words == ("<pad>", "<unk>", "a", "b", "d")
    assert len(vocabulary) == 5
    assert "a" in vocabulary
    assert "c" not in vocabulary
    with pytest.raises(ValueError, match="min_count=9"):
        Vocabulary.build(["a b"], min_count=9)


def test_encoding_pads_cuts_and_masks():
    vocabulary = Vocabulary.build(["kidney cyst kidney cyst"])
    numbers, mask = vocabulary.encode(["Kidney, cyst of kidney", "", "cyst cyst cyst cyst"], length=3)
    cyst, kidney = 2, 3
    expected = [[kidney, cyst, UNKNOWN], [PADDING] * 3, [cyst] * 3]
    assert torch.equal(numbers, torch.tensor(expected))
    assert torch.equal(mask, torch.tensor([[True] * 3, [False] * 3, [True] * 3]))
    assert vocabulary.encode([], length=3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="length=0"):
        vocabulary.encode(["a"], length=0)


def test_equal_vocabularies_are_equal():
    assert Vocabulary.build(["a a"]) == Vocabulary.build(["a", "a"])
    assert Vocabulary.build(["a a"]) != Vocabulary.build(["b b"])
