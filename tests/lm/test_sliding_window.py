"""Window attention: against full attention, in pieces, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from medarch.lm.attention import CausalSelfAttention
from medarch.lm.config import DecoderConfig
from medarch.lm.sliding_window import WindowAttention, band

CONFIG = DecoderConfig(
    vocab_size=1, hidden_size=24, intermediate_size=1, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2
)


def layer(window: int) -> WindowAttention:
    return WindowAttention(CONFIG, window, torch.Generator().manual_seed(1)).double()


def sequence(time: int) -> torch.Tensor:
    return torch.randn(3, time, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_a_window_as_long_as_the_sequence_is_full_attention() -> None:
    full = CausalSelfAttention(CONFIG, torch.Generator().manual_seed(1)).double()
    inputs = sequence(17)
    torch.testing.assert_close(layer(17)(inputs), full(inputs), rtol=1e-6, atol=1e-9)


def test_each_position_sees_its_window_and_no_further() -> None:
    """The last output is that of full attention over the last five positions alone."""
    full = CausalSelfAttention(CONFIG, torch.Generator().manual_seed(1)).double()
    inputs = sequence(17)
    torch.testing.assert_close(layer(5)(inputs)[:, -1], full(inputs[:, -5:])[:, -1], rtol=1e-6, atol=1e-9)
    assert band(2, 5, 3).tolist() == [[False, True, True, True, False], [False, False, True, True, True]]


@pytest.mark.parametrize("pieces", [(17,), (1,) * 17, (3, 1, 7, 6), (11, 6)])
def test_in_pieces_as_whole_and_no_more_is_kept_than_the_window(pieces: tuple[int, ...]) -> None:
    attention, inputs = layer(5), sequence(17)
    cache = attention.new_cache(3)
    parts = [attention(part, cache) for part in inputs.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), attention(inputs), rtol=1e-6, atol=1e-9)
    assert cache.length == 17
    assert cache.keys.shape == (3, 2, 4, 4)
    assert cache.used_bytes == 2 * 3 * 2 * 4 * 4 * 8
    assert cache.keys.untyped_storage().nbytes() == cache.used_bytes // 2


def test_far_along_a_stream_the_angles_are_still_exact() -> None:
    attention, inputs = layer(5), sequence(9)
    cache = attention.new_cache(3)
    attention(torch.cat([torch.zeros(3, 4096, 24, dtype=torch.float64), inputs[:, :5]], dim=1), cache)
    cache.length += 10**9
    torch.testing.assert_close(attention(inputs[:, 5:], cache), attention(inputs)[:, 5:], rtol=1e-6, atol=1e-9)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        layer(0)
    attention = layer(5)
    with pytest.raises(ValueError, match="a batch of 2, the input is a batch of 3"):
        attention(sequence(4), attention.new_cache(2))
