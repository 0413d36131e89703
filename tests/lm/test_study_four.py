"""The comparison of the four checkpoints: what is asked is what the table says, and the clock sees one token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medarch.data.corpus import Document
from medarch.lm import study_four as study
from medarch.lm.decoder import DecoderOutput
from medarch.lm.hybrid import HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.lm.tokenizer import Tokenizer
from medarch.ssm.config import MambaConfig

TEXTS = ["Seizure: an intermittent abnormality", "Fever: a raised temperature of the body", "Cough: air expelled", "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 290)


class Copier(nn.Module):
    """Predicts what stood ``distance`` positions ahead of the predicted token, and is certain of it."""

    def __init__(self, distance: int, vocab_size: int = 400) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.distance, self.vocab_size = distance, vocab_size

    def forward(self, input_ids: torch.Tensor) -> DecoderOutput:
        wanted = input_ids.roll(self.distance - 1, dims=1)
        wanted[:, : self.distance - 1] = 0
        return DecoderOutput(20.0 * nn.functional.one_hot(wanted, self.vocab_size).float(), ())


@pytest.mark.parametrize("distance", [0, 5, 23])
def test_a_definition_is_read_again_after_that_many_others(tokenizer: Tokenizer, distance: int) -> None:
    readings = study.repeated(tokenizer, TEXTS, distance, tokens=6, count=9)
    end = tokenizer.end_of_text
    assert len(readings.input_ids) == 3  # the last text is too short
    for row, first, second, size, text in zip(*readings, TEXTS, strict=False):
        ids = tokenizer.encode(text)[:6]
        assert row[first].tolist() == row[second].tolist() == ids
        assert row[first[0] - 1] == row[second[0] - 1] == end
        between = row[first[-1] + 1 : second[0] - 1].tolist()
        assert len(between) == distance
        assert distance == 0 or between[0] == end
        assert ids not in [between[start : start + 6] for start in range(distance)]
        assert size == len(tokenizer.decode(ids[1:]).encode())


def test_who_copies_from_that_distance_is_right_the_second_time_alone(tokenizer: Tokenizer) -> None:
    readings = study.repeated(tokenizer, TEXTS, 11, tokens=6)
    found = study.read_twice(Copier(6 + 11 + 1), readings)
    assert found["second"]["right"] == 1
    assert found["first"]["right"] < 0.2
    assert found["second"]["bits_per_byte"] < 1e-4 < found["first"]["bits_per_byte"]
    other = study.read_twice(Copier(6 + 11), readings)
    assert other["second"]["right"] < 0.5
    twice = study.random_twice(400, 13, 7, torch.Generator().manual_seed(0))
    assert study.read_twice(Copier(13), twice)["second"]["right"] == 1


def test_too_little_to_read_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="tokens=400"):
        study.repeated(tokenizer, TEXTS, 0, tokens=400)
    with pytest.raises(ValueError, match="distance=-1"):
        study.repeated(tokenizer, TEXTS, -1)
    with pytest.raises(ValueError, match=r"1 document\(s\)"):
        study.name_gain(Copier(2), tokenizer, [Document("HP:1", "Cough", TEXTS[2], None)])


def tiny() -> HybridDecoder:
    config = HybridConfig(
        290, 12, 10, 3, 2, mixers=("mamba", "attention", "mamba"), mamba=MambaConfig(12, state_size=3),
        positions="none", max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return HybridDecoder(config, torch.Generator().manual_seed(1)).eval()


def test_gain_of_a_name_is_a_difference_of_the_same_tokens(tokenizer: Tokenizer) -> None:
    documents = [Document(f"HP:{number}", text.split(":")[0], text, None) for number, text in enumerate(TEXTS[:3])]
    model = tiny()
    found = study.name_gain(model, tokenizer, documents, batch_size=2)
    nats, size = {"own": 0.0, "other": 0.0}, 0
    for number, document in enumerate(documents):
        tail = tokenizer.encode(document.text.removeprefix(document.name + ":"))
        size += len(tokenizer.decode(tail).encode())
        for kind, name in (("own", document.name), ("other", documents[(number + 1) % 3].name)):
            ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(name + ":"), *tail]])
            with torch.no_grad():
                scores = model(ids).logits.log_softmax(-1)
            for place in range(ids.shape[1] - len(tail), ids.shape[1]):
                nats[kind] -= float(scores[0, place - 1, ids[0, place]])
    for kind, value in nats.items():
        assert found[kind] == pytest.approx(value / (math.log(2) * size), rel=1e-5)
    assert found["gain"] == pytest.approx(found["other"] - found["own"])


def test_a_silenced_layer_adds_nothing_and_speaks_again_afterwards(tokenizer: Tokenizer) -> None:
    model, ids = tiny(), torch.arange(9)[None]
    documents = [Document(f"HP:{number}", text.split(":")[0], text, None) for number, text in enumerate(TEXTS[:3])]
    with torch.no_grad():
        before = model(ids).logits
        with study.silenced(model.layers[1]):
            silent = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        model.layers[1].mixer.o_proj.zero_()  # attention without a way out says nothing either
        torch.testing.assert_close(model(ids).logits, silent)
    model = tiny()
    found = study.silence_each(model, tokenizer, documents)
    assert [each["mixer"] for each in found] == ["mamba", "attention", "mamba", None]
    assert found[-1] == {"mixer": None} | study.name_gain(model, tokenizer, documents)
    assert len({each["own"] for each in found}) == 4


def test_the_call_reads_the_same_token_after_the_same_text_every_time() -> None:
    model = study.lengthened(tiny(), 200)
    call, kept = study.next_token_call(model, 70, piece=31)
    layers = [layer.mixer for layer in model.layers]
    cache = model.new_cache(1, 71)
    assert kept == cache.state_bytes + 70 * cache.layers[1].bytes_per_position
    assert layers[1].config.max_position_embeddings == 64  # the model alone is told; no weight knows of it
    ids = torch.randint(290, (1, 71), generator=torch.Generator().manual_seed(70))
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
    torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
    for _ in range(3):
        assert call().shape == (1, 1, 290)
