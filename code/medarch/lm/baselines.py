"""What a language model should beat: a table of byte sequences, and a compressor that has seen the same text."""

from __future__ import annotations

import functools
import lzma
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt64

from medarch.data.corpus import Document
from medarch.lm.evaluation import Evaluation

LONGEST = 7  # bytes of history that fit, with the byte to be predicted, into one 64-bit number


class ByteNgram:
    """Predicts the next byte from the last few, by how often each followed them in the training text.

    A history of ``order`` bytes is mixed with the next shorter one, and so on down to all bytes being alike.
    With ``n`` occurrences of a history, ``t`` different bytes seen after it and ``c`` occurrences of byte ``x``
    among them, ``P(x) = (c + t * P_shorter(x)) / (n + t)``: Witten-Bell smoothing (Witten & Bell 1991,
    doi:10.1109/18.87000, method C). A history that was never seen leaves the word to the shorter one.

    Documents begin with an empty history and end with a byte 0 that is predicted as well, as a language model
    predicts its end of text.

    Args:
        documents: training documents.
        order: bytes of history, 0 to 7.

    Raises:
        ValueError: If the order is out of range, there is no document, or one contains a byte 0.
    """

    def __init__(self, documents: Sequence[Document | str], order: int = 5) -> None:
        if not 0 <= order <= LONGEST:
            raise ValueError(f"order={order} must lie between 0 and {LONGEST}")
        self.order = order
        codes, _ = _codes(documents, order)
        self._tables = []
        for length in range(order + 1):
            grams, counts = np.unique(_shorten(codes, length), return_counts=True)
            histories, first = np.unique(grams >> np.uint64(8), return_index=True)
            kinds = np.diff(np.append(first, len(grams)))
            self._tables.append((grams, counts, histories, np.add.reduceat(counts, first), kinds))

    def evaluate(self, documents: Sequence[Document | str]) -> Evaluation:
        """What the table needs to write down these documents; tokens are bytes, ends included.

        Raises:
            ValueError: If there is no document, or one is empty or contains a byte 0.
        """
        codes, lengths = _codes(documents, self.order)
        nats = -np.log(self._probabilities(codes))
        sums = np.add.reduceat(nats, np.cumsum(lengths) - lengths)
        sizes = tuple((lengths - 1).tolist())
        return Evaluation(tuple(sums.tolist()), tuple(lengths.tolist()), sizes)

    def _probabilities(self, codes: UInt64[np.ndarray, "predictions"]) -> Float[np.ndarray, "predictions"]:
        probs = np.full(len(codes), 1 / 256)
        for length, (grams, counts, histories, totals, kinds) in enumerate(self._tables):
            wanted = _shorten(codes, length)
            seen = _look_up(histories, totals, wanted >> np.uint64(8))
            types = _look_up(histories, kinds, wanted >> np.uint64(8))
            mixed = (_look_up(grams, counts, wanted) + types * probs) / np.maximum(seen + types, 1)
            probs = np.where(seen > 0, mixed, probs)
        return probs


def compressor_bits_per_byte(documents: Sequence[Document | str], given: Sequence[Document | str] = ()) -> float:
    """Bits that LZMA adds for each byte of these documents, after it has packed the given ones.

    It may look back on everything before, on the documents already packed too, which a language model that
    reads each document by itself may not.

    Args:
        documents: what is to be written down, one to a line.
        given: what both sides know already, such as the training text.

    Raises:
        ValueError: If there is no document to pack.
    """
    if not documents:
        raise ValueError("there is no document to compress: the list is empty")
    before, after = ("".join(f"{text}\n" for text in _texts(part)).encode() for part in (given, documents))
    packed = _packed_size(before + after) - _packed_size(before)
    return 8 * packed / sum(len(text.encode()) for text in _texts(documents))


@functools.lru_cache(maxsize=4)
def _packed_size(text: bytes) -> int:
    """Bytes that LZMA makes of a text; kept, since what is given is often given again."""
    return len(lzma.compress(text, preset=9))


def _texts(documents: Sequence[Document | str]) -> list[str]:
    return [document if isinstance(document, str) else document.text for document in documents]


def _codes(
    documents: Sequence[Document | str], order: int
) -> tuple[UInt64[np.ndarray, "predictions"], Int[np.ndarray, "documents"]]:
    """Each byte with the ``order`` bytes before it as one number, the byte itself lowest; predictions a document."""
    texts = [text.encode() for text in _texts(documents)]
    if not texts:
        raise ValueError("there is no document: the list is empty")
    if b"" in texts:
        raise ValueError(f"document {texts.index(b'')} is empty")
    if any(b"\0" in text for text in texts):
        raise ValueError("a document contains a byte 0, which stands for the end of a document here")
    # Ends before each document keep its first bytes from seeing the document before it.
    start = b"\0" * order
    row = np.frombuffer(start + start.join(text + b"\0" for text in texts), np.uint8)
    codes = np.zeros(len(row) - order, np.uint64)
    for back in range(order + 1):
        codes |= row[order - back : len(row) - back].astype(np.uint64) << np.uint64(8 * back)
    lengths = np.array([len(text) + 1 for text in texts])
    # A prediction is every byte but those of the starts, of which the first lies before the codes.
    where = np.repeat(order * np.arange(len(texts)), lengths) + np.arange(lengths.sum())
    return codes[where], lengths


def _shorten(codes: UInt64[np.ndarray, "some"], length: int) -> UInt64[np.ndarray, "some"]:
    """The same bytes with a shorter history."""
    return codes & np.uint64(256 ** (length + 1) - 1)


def _look_up(
    keys: UInt64[np.ndarray, "keys"], values: Int[np.ndarray, "keys"], wanted: UInt64[np.ndarray, "some"]
) -> Int[np.ndarray, "some"]:
    """The value of each wanted key, and 0 where it is not among the sorted keys."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
