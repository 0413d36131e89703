"""Models of signals: whole and in pieces, causal, with and without the clock, and what they keep."""

from __future__ import annotations

import pytest
import torch

from medarch.lm.signal_mixers import MIXERS
from medarch.lm.signal_model import SignalConfig, SignalModel

TIME = 29


def model(mixer: str) -> SignalModel:
    generator = torch.Generator().manual_seed(4)
    built = SignalModel(
        SignalConfig(features=3, mixer=mixer, hidden_size=12, heads=2, window=7, num_layers=2), generator
    )
    with torch.no_grad():
        built.out_proj.weight.normal_(generator=generator)
    return built.double()


def stream() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(2, TIME, 3, generator=generator, dtype=torch.float64)
    return samples, 0.5 + 4 * torch.rand(2, TIME, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("pieces", [(1,) * TIME, (2, 1, 19, 7)])
def test_in_pieces_as_whole(mixer: str, pieces: tuple[int, ...]) -> None:
    built, (samples, elapsed) = model(mixer), stream()
    whole, state = built(samples, elapsed), built.new_state(2)
    kept = []
    parts = []
    for part, passed in zip(samples.split(pieces, 1), elapsed.split(pieces, 1), strict=True):
        parts.append(built(part, passed, state))
        kept.append(state.used_bytes)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)  # rotary angles are in float32
    assert state.length == TIME
    assert not any(
        memory.requires_grad for layer in state.layers for memory in vars(layer).values() if torch.is_tensor(memory)
    )
    assert kept[-1] == max(kept) > 0
    assert len(set(kept[-2:])) == 1  # the memory no longer grows once a window is full


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_forecast_sees_what_comes_later(mixer: str) -> None:
    built, (samples, elapsed) = model(mixer), stream()
    before = built(samples, elapsed)
    samples[:, 17] += 5
    after = built(samples, elapsed)
    torch.testing.assert_close(after[:, :17], before[:, :17], rtol=1e-9, atol=1e-12)
    assert float((after[:, 17] - before[:, 17]).detach().abs().min()) > 1e-6
    assert float((after[:, 18] - before[:, 18]).detach().abs().max()) > 1e-9


@pytest.mark.parametrize("mixer", MIXERS)
def test_only_the_clock_sees_the_time_between_samples(mixer: str) -> None:
    built, (samples, elapsed) = model(mixer), stream()
    same = torch.allclose(built(samples, elapsed), built(samples, elapsed * 3))
    assert same == (mixer != "clock")


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_weight_gets_a_gradient(mixer: str) -> None:
    built, (samples, elapsed) = model(mixer), stream()
    built(samples, elapsed).square().sum().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_sizes_are_matched() -> None:
    """The models of the study are compared at sizes within 15 per cent of one another."""
    from medarch.lm.vital_signs import configs

    counts = {
        name: SignalModel(config, torch.Generator().manual_seed(0)).parameter_count
        for name, config in configs().items()
    }
    assert set(counts) == set(MIXERS)
    assert max(counts.values()) < 1.15 * min(counts.values()), counts


def test_the_first_forecast_is_no_change_and_bad_input_is_refused() -> None:
    fresh = SignalModel(SignalConfig(3, "selective"), torch.Generator().manual_seed(0))
    samples = torch.ones(2, 5, 3)
    assert float(fresh(samples).detach().abs().max()) == 0
    with pytest.raises(ValueError, match=r"features=3\) with at least one sample, got \(2, 0, 3\)"):
        fresh(samples[:, :0])
    with pytest.raises(ValueError, match=r"elapsed has the shape \(2, 4\)"):
        fresh(samples, torch.ones(2, 4))
    with pytest.raises(ValueError, match="a batch of 1, the input is a batch of 2"):
        fresh(samples, state=fresh.new_state(1))
    with pytest.raises(ValueError, match="mixer='lstm' is not one of"):
        SignalConfig(3, "lstm")
    with pytest.raises(ValueError, match="window must be a whole number"):
        SignalConfig(3, "attention", window=0)
