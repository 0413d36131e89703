"""The layer with real elapsed time: closed forms, both versions, gaps, pieces, and what is refused."""

from __future__ import annotations

import pytest
import torch

from medarch.ssm.elapsed import ElapsedConfig, ElapsedMixer, running_means, running_means_loop

BATCH, TIME, CHANNELS = 2, 37, 5


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    u = torch.randn(BATCH, TIME, CHANNELS, generator=generator, dtype=dtype)
    elapsed = torch.empty(BATCH, TIME, dtype=dtype).exponential_(0.5, generator=generator) + 0.01
    time_constant = torch.tensor([0.3, 1.0, 3.0, 17.0, 200.0], dtype=dtype)
    return [u, elapsed, time_constant, torch.randn(BATCH, CHANNELS, generator=generator, dtype=dtype)]


def test_both_versions_agree_with_all_gradients() -> None:
    slow, fast = ([each.requires_grad_() for each in inputs()] for _ in range(2))
    for expected, found in zip(running_means_loop(*slow), running_means(*fast), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    weight = torch.randn(BATCH, TIME, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    for arguments, version in ((slow, running_means_loop), (fast, running_means)):
        means, last = version(*arguments)
        ((means * weight).sum() + (last**2).sum()).backward()
    for left, right in zip(slow, fast, strict=True):
        torch.testing.assert_close(right.grad, left.grad, rtol=1e-8, atol=1e-10)


def test_a_constant_input_is_approached_as_the_exponential_says() -> None:
    """From 0, with u = 1, the mean is 1 - exp(-t / tau) at any samples: the differential equation's own solution."""
    _, elapsed, time_constant, _ = inputs()
    ones = torch.ones(BATCH, TIME, CHANNELS, dtype=torch.float64)
    means, _ = running_means(ones, elapsed, time_constant, torch.zeros(BATCH, CHANNELS, dtype=torch.float64))
    expected = 1 - torch.exp(-elapsed.cumsum(1)[:, :, None] / time_constant)
    torch.testing.assert_close(means, expected, rtol=1e-10, atol=1e-12)


def test_a_missing_sample_changes_nothing_where_the_value_is_held() -> None:
    """Leaving out a sample whose successor has the same value, and adding up the time, gives the same state."""
    u, elapsed, time_constant, state = inputs()
    u[:, 12] = u[:, 13]
    whole, last = running_means(u, elapsed, time_constant, state)
    longer = elapsed.clone()
    longer[:, 13] += longer[:, 12]
    keep = [index for index in range(TIME) if index != 12]
    gap, last_gap = running_means(u[:, keep], longer[:, keep], time_constant, state)
    torch.testing.assert_close(gap, whole[:, keep], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(last_gap, last, rtol=1e-9, atol=1e-12)


def test_after_a_very_long_gap_nothing_is_left() -> None:
    u, elapsed, time_constant, state = inputs()
    elapsed[:, 20] = 1e5
    means, _ = running_means(u, elapsed, time_constant, state)
    torch.testing.assert_close(means[:, 20], u[:, 20], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pieces", [(37,), (1,) * 37, (5, 1, 31)])
def test_in_pieces_as_whole(pieces: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    mixer = ElapsedMixer(ElapsedConfig(hidden_size=3), generator).double()
    hidden, elapsed = torch.randn(2, TIME, 3, generator=generator, dtype=torch.float64), inputs()[1]
    state = mixer.new_cache(2)
    parts = [
        mixer(part, passed, state)
        for part, passed in zip(hidden.split(pieces, 1), elapsed.split(pieces, 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(hidden, elapsed), rtol=1e-9, atol=1e-12)
    assert state.length == TIME
    assert state.used_bytes == 2 * 6 * 8  # the state alone: there is no convolution
    constants = mixer.log_time_constant.exp()
    assert bool(((constants >= 0.5) & (constants <= 100)).all())


def test_bad_input_is_refused() -> None:
    mixer = ElapsedMixer(ElapsedConfig(hidden_size=3), torch.Generator().manual_seed(0))
    hidden = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"elapsed has the shape \(2, 5\)"):
        mixer(hidden, torch.ones(2, 5))
    with pytest.raises(ValueError, match="elapsed must be positive, its smallest is 0"):
        mixer(hidden, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"hidden_size=3\), got \(2, 4, 2\)"):
        mixer(torch.zeros(2, 4, 2), torch.ones(2, 4))
    with pytest.raises(ValueError, match="a batch of 3, the input is a batch of 2"):
        mixer(hidden, torch.ones(2, 4), mixer.new_cache(3))
    with pytest.raises(ValueError, match="hidden_size must be a whole number"):
        ElapsedConfig(hidden_size=0)
    with pytest.raises(ValueError, match="time_constant_min=2 and time_constant_max=1"):
        ElapsedConfig(hidden_size=3, time_constant_min=2, time_constant_max=1)
    assert ElapsedConfig(hidden_size=3).channels == 6
