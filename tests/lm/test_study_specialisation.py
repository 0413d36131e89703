"""Experts and organ systems in a language model: the counting, the nulls, the silencing, and the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medarch.data.corpus import Document
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.evaluation import evaluate
from medarch.lm.study_specialisation import (
    RoutedDocuments,
    beyond_the_words,
    bits_by_system,
    route_documents,
    silenced,
    surprise_by_document,
    with_system,
)
from medarch.lm.tokenizer import Tokenizer
from medarch.moe.config import MoEConfig

RECORD = Path(__file__).parents[2] / "book" / "records" / "lm-specialisation.cpu.json"
TEXTS = ["a cat sat", "a much longer text about the cat", "dog", "the dog and the cat sat"]
NAMES = ["eye", "heart"]


@pytest.fixture
def documents() -> list[Document]:
    return [Document(f"D{number}", "", text, NAMES[number % 2]) for number, text in enumerate(TEXTS)]


@pytest.fixture
def words() -> Tokenizer:
    return Tokenizer.train(TEXTS, 270)


@pytest.fixture
def model() -> Decoder:
    config = DecoderConfig(
        270, 12, 20, 3, 2, max_position_embeddings=17, feed_forwards=("moe",),
        moe=MoEConfig(12, 10, 5, 2, initializer_range=0.4), initializer_range=0.4,
    )  # fmt: skip
    return Decoder(config, torch.Generator().manual_seed(4)).eval()


def test_tokens_keep_their_experts_whatever_the_batch(
    model: Decoder, words: Tokenizer, documents: list[Document]
) -> None:
    found = route_documents(model, words, documents, NAMES, batch_size=3)
    alone = route_documents(model, words, documents, NAMES, batch_size=1)
    lengths = [min(len(words.encode(text)), 16) for text in TEXTS]
    assert found.documents.bincount().tolist() == lengths
    assert found.systems.tolist() == [0, 1, 0, 1]
    assert len(found.experts) == 3
    for one, other in zip(found.experts, alone.experts, strict=True):
        assert one.shape == (sum(lengths), 2)
        assert torch.equal(one, other)
    # The third document by itself, after an end of text.
    ids = words.encode("dog")
    with torch.no_grad():
        routings = model(torch.tensor([[0, *ids]])).routings
    for layer, routing in enumerate(routings):
        assert torch.equal(found.experts[layer][found.documents == 2], routing.indices[0, 1:])
        counts = found.counts(layer)
        assert counts.sum(1).tolist() == [2 * length for length in lengths]
        assert counts[2].tolist() == routing.indices[0, 1:].flatten().bincount(minlength=5).tolist()
        assert torch.equal(found.routed(layer).expert, found.experts[layer][:, 0])


def test_documents_without_a_system_or_a_router_are_refused(
    model: Decoder, words: Tokenizer, documents: list[Document]
) -> None:
    with pytest.raises(ValueError, match="'D1'"):
        route_documents(model, words, documents, ["eye"])
    with pytest.raises(ValueError, match="0 documents"):
        route_documents(model, words, [], NAMES)
    with pytest.raises(ValueError, match="no router"):
        route_documents(Decoder(DecoderConfig(270, 12, 20, 1, 2)), words, documents, NAMES)
    assert [item.id for item in with_system(documents, ["eye"])] == ["D0", "D2"]
    assert len(with_system([*documents, Document("X", "", "x", None)])) == 4


def planted(strength: float, seed: int, documents: int = 60, length: int = 20) -> RoutedDocuments:
    """Tokens that decide their expert, except that with some probability the document's system does."""
    generator = torch.Generator().manual_seed(seed)
    systems = torch.arange(documents) % 3
    number = torch.arange(documents).repeat_interleave(length)
    # Systems use different words, which is what a test that ignores the words falls for.
    tokens = torch.randint(12, (documents * length,), generator=generator) + 6 * systems[number]
    swayed = torch.rand(documents * length, generator=generator) < strength
    experts = torch.where(swayed, systems[number], tokens % 4)[:, None]
    return RoutedDocuments(tokens, number, [experts], 4, systems, ["a", "b", "c"])


def test_words_explain_what_the_words_decide() -> None:
    known, held_out = planted(0.0, 1), planted(0.0, 2)
    assert not surprise_by_document(known, held_out, 0).abs().gt(1e-9).any()
    swayed = beyond_the_words(planted(0.5, 1), planted(0.5, 2), 0, permutations=200)
    # A token that occurs in several systems is swayed apart; its usual expert does not tell.
    assert swayed.p_value < 0.01


def test_null_beyond_the_words_is_level() -> None:
    """Where systems are names without meaning, small p-values are as rare as they should be."""
    generator = torch.Generator().manual_seed(9)
    values = []
    for seed in range(40):
        known, held_out = planted(0.3, 100 + seed, 30, 12), planted(0.3, 500 + seed, 30, 12)
        held_out = RoutedDocuments(
            held_out.tokens, held_out.documents, held_out.experts, 4,
            held_out.systems[torch.randperm(30, generator=generator)], held_out.names,
        )  # fmt: skip
        values.append(beyond_the_words(known, held_out, 0, permutations=50, seed=seed).p_value)
    small = sum(value <= 0.2 for value in values) / len(values)
    assert 0.02 <= small <= 0.42  # 0.2, and three standard errors


def test_surprise_by_hand() -> None:
    known = RoutedDocuments(
        torch.tensor([7, 7, 7, 7, 8]), torch.zeros(5, dtype=torch.long), [torch.tensor([[0], [0], [0], [1], [1]])],
        2, torch.tensor([0]), ["a"],
    )  # fmt: skip
    held_out = RoutedDocuments(
        torch.tensor([7, 8, 9]), torch.tensor([0, 0, 1]), [torch.tensor([[1], [1], [0]])], 2,
        torch.tensor([0, 0]), ["a"],
    )  # fmt: skip
    # 7 goes to expert 0 in three of four cases, 8 to expert 1; 9 is new, and 3 of 5 tokens go to expert 0.
    expected = torch.tensor([[-0.75, 0.75], [0.4, -0.4]], dtype=torch.float64)
    torch.testing.assert_close(surprise_by_document(known, held_out, 0), expected)


def test_silenced_expert_answers_nothing_and_comes_back(
    model: Decoder, words: Tokenizer, documents: list[Document]
) -> None:
    before = bits_by_system(model, words, documents, NAMES)
    weight = model.layers[1].feed_forward.experts.down_proj.detach().clone()
    with silenced(model, 1, 3):
        assert not model.layers[1].feed_forward.experts.down_proj[3].any()
        during = bits_by_system(model, words, documents, NAMES)
    assert torch.equal(model.layers[1].feed_forward.experts.down_proj, weight)
    assert torch.equal(bits_by_system(model, words, documents, NAMES), before)
    assert (during - before).abs().max() > 1e-3
    with pytest.raises(RuntimeError), silenced(model, 0, 0):
        raise RuntimeError
    assert model.layers[0].feed_forward.experts.down_proj[0].any()
    with pytest.raises(ValueError, match="layer 1 has no expert 5"), silenced(model, 1, 5):
        pass


def test_bits_of_a_system_are_those_of_its_documents(
    model: Decoder, words: Tokenizer, documents: list[Document]
) -> None:
    bits = bits_by_system(model, words, documents, NAMES)
    for number, name in enumerate(NAMES):
        mine = evaluate(model, words, with_system(documents, [name]))
        assert float(bits[number]) == pytest.approx(mine.bits_per_byte, rel=1e-5)


def test_record_says_what_the_page_says() -> None:
    results = json.loads(RECORD.read_text())["results"]
    trained, untrained = results["layers"]["trained"], results["layers"]["untrained"]
    assert len(trained) == len(untrained) == 4
    for layer in trained:
        assert layer["null_max"] < layer["nmi"] < 0.2
        assert layer["guessed_from_token"] > layer["guessed_from_system"]
    assert trained[0]["guessed_from_token"] > trained[-1]["guessed_from_token"]
    harm = torch.tensor(results["silenced"]["harm"])
    assert harm.shape == (4, 8, len(results["silenced"]["systems"]))
    assert (harm.mean(-1) > 0).all()
