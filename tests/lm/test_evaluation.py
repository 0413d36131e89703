"""Evaluation against sums worked out by hand and against one document, one window, one token at a time."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medarch.data.corpus import Document
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder, DecoderOutput
from medarch.lm.evaluation import Evaluation, evaluate, windows
from medarch.moe import MoEConfig

TEXTS = ["Fever", "A sudden, excessive discharge.", "é", "Pain in the chest that comes with effort", "ab", "Gait"]


class Bytes:
    """A tokenizer whose tokens are bytes, with the end of text as number 0."""

    end_of_text = 0

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode("utf8")]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 1 for i in ids).decode("utf8")


class Bigram(nn.Module):
    """Predicts from the last token alone, so that how a text is cut cannot matter to its true likelihood."""

    def __init__(self, table: Tensor, context: int) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(max_position_embeddings=context, vocab_size=len(table))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> DecoderOutput:
        assert input_ids.shape[1] <= self.config.max_position_embeddings
        self.shapes.append(tuple(input_ids.shape))
        return DecoderOutput(self.table[input_ids], ())


def make_decoder(generator: torch.Generator, moe: bool = False, context: int = 64, std: float = 0.3) -> Decoder:
    config = DecoderConfig(
        vocab_size=257,
        hidden_size=12,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=context,
        feed_forwards=("dense", "moe") if moe else ("dense",),
        moe=MoEConfig(12, 7, 5, 2, initializer_range=0.5) if moe else None,
        initializer_range=std,
    )
    return Decoder(config, generator)


def alone(model: Decoder, text: str) -> float:
    """The specification: the nats of one short document, read in one piece."""
    ids = torch.tensor([0, *Bytes().encode(text), 0])
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0]
    return float(F.cross_entropy(logits.double(), ids[1:], reduction="sum"))


def test_a_uniform_model_spends_the_logarithm_of_the_vocabulary_on_each_token(generator: torch.Generator) -> None:
    model = make_decoder(generator)
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    result = evaluate(model, Bytes(), ["abc", "é"])
    # Three letters and an end, then two bytes and an end: seven predictions, five bytes.
    assert (result.tokens, result.bytes) == (7, 5)
    assert result.document_tokens == (4, 3)
    assert result.document_bytes == (3, 2)
    assert result.nats == pytest.approx(7 * math.log(257), rel=1e-6)
    assert result.loss == pytest.approx(math.log(257), rel=1e-6)
    assert result.perplexity == pytest.approx(257, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(7 * math.log2(257) / 5, rel=1e-6)


def test_likelihood_worked_out_by_hand() -> None:
    """Three tokens: the end, then "\\x00" and "\\x01" as bytes, numbered 1 and 2."""
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [1.0, 0.0, 0.0]])
    model = Bigram(probs.log().clamp_min(-50), context=8)
    result = evaluate(model, Bytes(), ["\x00\x00\x01"])  # type: ignore[arg-type]
    # end -> 1 (1/4), 1 -> 1 (3/4), 1 -> 2 (1/8), 2 -> end (1)
    assert result.nats == pytest.approx(-math.log(1 / 4 * 3 / 4 * 1 / 8), rel=1e-6)
    assert result.bits_per_byte == pytest.approx((2 + math.log2(4 / 3) + 3) / 3, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(context=st.integers(1, 23), data=st.data())
def test_however_long_documents_are_cut_each_token_counts_once(context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    batch_size = data.draw(st.integers(1, 7))
    table = torch.randn(257, 257, generator=torch.Generator().manual_seed(5))
    model = Bigram(table, context)
    result = evaluate(model, Bytes(), TEXTS, batch_size, stride=stride)  # type: ignore[arg-type]
    for text, nats in zip(TEXTS, result.document_nats, strict=True):
        ids = [0, *Bytes().encode(text), 0]
        by_hand = -sum(float(table[a].double().log_softmax(-1)[b]) for a, b in pairwise(ids))
        assert nats == pytest.approx(by_hand, rel=1e-5)
    assert all(rows <= batch_size for rows, _ in model.shapes)


@given(total=st.integers(1, 60), context=st.integers(1, 20), data=st.data())
def test_windows_cover_a_document_with_context_before_each_prediction(
    total: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    scored = []
    for document, ids, count in windows(3, list(range(total + 1)), context, stride):
        assert document == 3
        assert ids == list(range(ids[0], ids[-1] + 1))
        assert 2 <= len(ids) <= context + 1
        assert count >= 1
        for target in ids[-count:]:
            # As much to look back on as there is, or as the overlap guarantees.
            assert target - ids[0] >= min(target, context - stride + 1)
        scored += ids[-count:]
    assert scored == list(range(1, total + 1))


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_neither_batch_nor_neighbours_nor_order_matter(moe: bool, generator: torch.Generator) -> None:
    model = make_decoder(generator, moe)
    expected = [alone(model, text) for text in TEXTS]
    assert max(expected) > 2 * min(expected)
    for batch_size in (1, 2, 5, 32):
        result = evaluate(model, Bytes(), TEXTS, batch_size)
        assert result.document_nats == pytest.approx(expected, rel=1e-5)
    backwards = evaluate(model, Bytes(), TEXTS[::-1], 3)
    assert backwards.document_nats[::-1] == pytest.approx(expected, rel=1e-5)


def test_stride_one_gives_every_token_all_the_context_there_is(generator: torch.Generator) -> None:
    model = make_decoder(generator, context=7)
    ids = torch.tensor([0, *Bytes().encode(TEXTS[1]), 0])
    expected = 0.0
    for target in range(1, len(ids)):
        with torch.no_grad():
            logits = model(ids[None, max(0, target - 7) : target]).logits[0, -1]
        expected -= float(logits.double().log_softmax(-1)[ids[target]])
    result = evaluate(model, Bytes(), [TEXTS[1]], stride=1)
    assert result.nats == pytest.approx(expected, rel=1e-5)
    # The default reads faster and sees less: the same tokens, another sum.
    faster = evaluate(model, Bytes(), [TEXTS[1]])
    assert faster.tokens == result.tokens
    assert faster.nats != pytest.approx(expected, rel=1e-5)


def test_documents_of_the_corpus_count_by_their_text(generator: torch.Generator) -> None:
    model = make_decoder(generator)
    document = Document("HP:1", "Fever", "Fever: é", None)
    result = evaluate(model, Bytes(), [document])
    assert result == evaluate(model, Bytes(), ["Fever: é"])
    assert result.bytes == 9


def test_standard_error_worked_out_by_hand() -> None:
    bit = math.log(2)
    # Two documents of 1 and 3 bytes at 3 and 5 bits: 2 bits a byte, residuals +1 and -1.
    result = Evaluation((3 * bit, 5 * bit), (1, 1), (1, 3))
    assert result.bits_per_byte == pytest.approx(2)
    assert result.standard_error == pytest.approx(math.sqrt((1 + 1) * 2 / 1) / 4)
    assert math.isnan(Evaluation((1.0,), (1,), (1,)).standard_error)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool, generator: torch.Generator) -> None:
    model = make_decoder(generator).train(training)
    evaluate(model, Bytes(), TEXTS)
    assert model.training is training
    assert all(weight.grad is None for weight in model.parameters())
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite, first of number 0, 'Fever'"):
        evaluate(model, Bytes(), TEXTS)
    assert model.training is training


@pytest.mark.parametrize(
    ("documents", "arguments", "message"),
    [
        ([], {}, "the list is empty"),
        (["a", ""], {}, "document 1 is empty"),
        (["a"], {"batch_size": 0}, "batch_size=0"),
        (["a"], {"context": 65}, "context=65 .* max_position_embeddings=64"),
        (["a"], {"context": 0}, "context=0"),
        (["a"], {"context": 8, "stride": 9}, "stride=9 .* context=8"),
        (["a"], {"stride": 0}, "stride=0"),
    ],
)
def test_bad_input_is_refused_by_name(
    documents: list[str], arguments: dict[str, int], message: str, generator: torch.Generator
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(make_decoder(generator), Bytes(), documents, **arguments)


def test_a_tokenizer_of_another_model_is_refused(generator: torch.Generator) -> None:
    model = Bigram(torch.zeros(99, 99), 16)
    with pytest.raises(ValueError, match="id 117, but the model has vocab_size=99"):
        evaluate(model, Bytes(), ["st"])  # type: ignore[arg-type]
