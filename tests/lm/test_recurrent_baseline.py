"""The recurrent baseline: it reads in pieces what it reads whole, and remembers in constant space."""

from __future__ import annotations

import pytest
import torch

from medarch.lm.generation import generate
from medarch.lm.recurrent_baseline import GRUConfig, GRULanguageModel
from medarch.lm.training import TrainingConfig, train

CONFIG = GRUConfig(vocab_size=23, hidden_size=12, recurrent_size=17, num_hidden_layers=3, max_position_embeddings=64)


@pytest.fixture
def model(generator: torch.Generator) -> GRULanguageModel:
    return GRULanguageModel(CONFIG, generator)


def test_the_generator_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = GRULanguageModel(CONFIG, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    again, other = (GRULanguageModel(CONFIG, torch.Generator().manual_seed(seed)) for seed in (5, 6))
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.layers[0].unit.weight_hh_l0, other.layers[0].unit.weight_hh_l0)


def test_a_layer_is_torchs_unit_around_a_residual(model: GRULanguageModel, generator: torch.Generator) -> None:
    layer = model.layers[1]
    hidden = torch.randn(2, 7, 12, generator=generator)
    out, state = layer(hidden)
    cell = torch.nn.GRUCell(12, 17)
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in layer.unit.state_dict().items()})
    h = torch.zeros(2, 17)
    for time in range(7):
        h = cell(layer.norm(hidden[:, time]), h)
        assert torch.allclose(out[:, time], hidden[:, time] + h @ layer.o_proj.T, atol=1e-6)
    assert torch.allclose(state, h, atol=1e-6)


def test_reading_in_pieces_equals_reading_whole(model: GRULanguageModel, generator: torch.Generator) -> None:
    ids = torch.randint(23, (3, 19), generator=generator)
    whole = model(ids).logits
    cache = model.new_cache(3)
    size = cache.used_bytes
    pieces = [model(piece, cache=cache).logits for piece in ids.split([1, 7, 11], dim=1)]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)
    assert cache.length == 19
    assert cache.used_bytes == size == 3 * 3 * 17 * 4
    assert not cache.layers[0].requires_grad
    assert torch.equal(model(ids, logits_to_keep=2).logits, whole[:, -2:])


def test_no_position_sees_what_comes_after(model: GRULanguageModel, generator: torch.Generator) -> None:
    ids = torch.randint(23, (1, 9), generator=generator)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 23
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_it_trains_and_writes(model: GRULanguageModel, generator: torch.Generator) -> None:
    tokens = torch.arange(23).repeat(20)
    log = train(model, tokens, TrainingConfig(60, batch_size=4, length=16, learning_rate=1e-2))
    assert log.steps[-1]["cross_entropy"] < 0.5 * log.steps[0]["cross_entropy"]
    prompt = torch.tensor([[3, 4, 5]])
    assert torch.equal(generate(model, prompt, 6), generate(model, prompt, 6, use_cache=False))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(3, dtype=torch.long), r"got \(3,\)"),
        (torch.zeros(2, 0, dtype=torch.long), "at least one token"),
        (torch.full((1, 2), 23), "hold 23"),
        (torch.full((1, 2), -1), "hold -1"),
        (torch.zeros(1, 65, dtype=torch.long), "65 tokens exceed"),
    ],
)
def test_tokens_that_cannot_be_read_are_refused(model: GRULanguageModel, ids: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model(ids)


def test_a_cache_that_does_not_fit_is_refused(model: GRULanguageModel) -> None:
    with pytest.raises(ValueError, match="batch of 2, the input is a batch of 3"):
        model(torch.zeros(3, 1, dtype=torch.long), cache=model.new_cache(2))
    with pytest.raises(ValueError, match="4 tokens exceed the room for 3"):
        model(torch.zeros(1, 4, dtype=torch.long), cache=model.new_cache(1, 3))
    with pytest.raises(ValueError, match="65 positions"):
        model.new_cache(1, 65)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "recurrent_size", "num_hidden_layers"])
def test_a_size_that_is_none_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        GRUConfig(**CONFIG.to_dict() | {field: 0})
