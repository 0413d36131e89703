"""The table of byte sequences against a dictionary of them, and both baselines against answers by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medarch.lm.baselines import ByteNgram, compressor_bits_per_byte

texts = st.lists(st.text("abé", min_size=1, max_size=9), min_size=1, max_size=5)


class Dictionary:
    """The specification of ``ByteNgram``: count, and mix with the shorter history."""

    def __init__(self, documents: list[str], order: int) -> None:
        self.order, self.after = order, {}
        for document in documents:
            row = bytes(order) + document.encode() + b"\0"
            for i in range(order, len(row)):
                for length in range(order + 1):
                    self.after.setdefault((length, row[i - length : i]), Counter())[row[i]] += 1

    def probability(self, history: bytes, byte: int) -> float:
        if not history and (0, b"") not in self.after:
            return 1 / 256
        shorter = self.probability(history[1:], byte) if history else 1 / 256
        counts = self.after.get((len(history), history))
        if counts is None:
            return shorter
        return (counts[byte] + len(counts) * shorter) / (counts.total() + len(counts))

    def nats(self, document: str) -> float:
        row = bytes(self.order) + document.encode() + b"\0"
        places = range(self.order, len(row))
        return -sum(math.log(self.probability(row[i - self.order : i], row[i])) for i in places)


@settings(max_examples=60, deadline=None)
@given(train=texts, test=texts, order=st.integers(0, 7))
def test_the_table_is_the_dictionary(train: list[str], test: list[str], order: int) -> None:
    slow = Dictionary(train, order)
    result = ByteNgram(train, order).evaluate(test)
    assert result.document_nats == pytest.approx([slow.nats(text) for text in test], rel=1e-9)
    assert result.document_bytes == tuple(len(text.encode()) for text in test)
    assert result.tokens == result.bytes + len(test)


@pytest.mark.parametrize("order", [0, 2, 7])
def test_probabilities_of_all_bytes_sum_to_one(order: int) -> None:
    table = ByteNgram(["the heart", "the lung", "heat"], order)
    for history in (b"the hea", b"xxxxxxx", bytes(7)):
        before = int.from_bytes(history[7 - order :], "big") << 8
        codes = np.array([before | byte for byte in range(256)], np.uint64)
        probs = table._probabilities(codes)
        assert probs.sum() == pytest.approx(1)
        assert (probs > 0).all()


def test_answer_worked_out_by_hand() -> None:
    """Two documents "a", no history: byte a twice, the end twice."""
    result = ByteNgram(["a", "a"], order=0).evaluate(["a", "b"])
    known, unknown = (2 + 2 / 256) / 6, (2 / 256) / 6
    assert result.document_nats == pytest.approx([-2 * math.log(known), -math.log(known) - math.log(unknown)])


def test_a_longer_history_helps_where_there_is_something_to_remember() -> None:
    text = ["abcabcabcabcabcabc"]
    bits = [ByteNgram(text, order).evaluate(text).bits_per_byte for order in (0, 1, 2)]
    assert bits[0] > 2 * bits[1]


def test_a_compressor_that_has_seen_the_text_needs_little_more() -> None:
    generator = np.random.default_rng(7)
    words = ["".join(chr(97 + letter) for letter in generator.integers(0, 26, 60)) for _ in range(200)]
    alone = compressor_bits_per_byte(words)
    # Random letters hold log2(26) = 4.7 bits each, and no compressor can do with less.
    assert 4.6 < alone < 6
    assert compressor_bits_per_byte(words, given=words) < 0.05 * alone


@pytest.mark.parametrize(
    ("documents", "message"), [([], "empty"), (["a", ""], "document 1 is empty"), (["a\0"], "byte 0")]
)
def test_bad_documents_are_refused(documents: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByteNgram(documents)
    with pytest.raises(ValueError, match=message):
        ByteNgram(["a"]).evaluate(documents)


def test_bad_orders_are_refused() -> None:
    for order in (-1, 8):
        with pytest.raises(ValueError, match=f"order={order}"):
            ByteNgram(["a"], order)
    with pytest.raises(ValueError, match="the list is empty"):
        compressor_bits_per_byte([])
