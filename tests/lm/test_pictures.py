"""The pictures show what they are given: every token, every number, every weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from medarch.lm.config import DecoderConfig
from medarch.lm.pictures import draw_attention, draw_decoder, draw_tokens, draw_turns, place, shown

CONFIG = DecoderConfig(1031, 24, 40, 5, 3, 1)


@pytest.fixture
def axes() -> Iterator[Axes]:
    fig, axes = plt.subplots()
    yield axes
    plt.close(fig)


def written(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_what_cannot_be_seen_gets_a_mark() -> None:
    assert [shown(piece) for piece in (" heart", "a\n", "")] == ["·heart", "a⏎", "∅"]


@given(st.lists(st.text("ab ", max_size=9), min_size=1, max_size=30), st.integers(10, 24))
def test_tokens_stand_in_order_and_beside_one_another(pieces: list[str], columns: int) -> None:
    places = place(pieces, columns)
    assert places[0][:2] == (0, 0)
    for (row, column, width), (next_row, next_column, next_width) in pairwise(places):
        if next_row == row:
            assert next_column == column + width
        else:  # a row ends only where the next token would not fit
            assert (next_row, next_column) == (row + 1, 0)
            assert column + width + next_width > columns
    assert all(column + width <= columns for _, column, width in places)


def test_a_token_wider_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'abcdef' is 7 wide .* columns=6"):
        place(["a", "abcdef"], 6)


def test_every_token_is_written_with_its_value(axes: Axes) -> None:
    draw_tokens(axes, ["The", " heart", "."], [0.04, 12.5, 3.0])
    assert written(axes) == ["The", "0.0", "·heart", "12.5", ".", "3.0"]
    # Shaded by the value: the lightest belongs to the smallest.
    light = [sum(patch.get_facecolor()[:3]) for patch in axes.patches]
    assert light[0] > light[2] > light[1]
    with pytest.raises(ValueError, match="1 values for 2 tokens"):
        draw_tokens(axes, ["a", "b"], [1.0])


def test_a_token_without_values_stands_alone(axes: Axes) -> None:
    draw_tokens(axes, ["a", "b"])
    assert written(axes) == ["a", "b"]
    draw_tokens(axes, ["a", "b"], [0.0, 0.0])  # nothing to divide by


def test_the_model_is_drawn_with_its_own_sizes(axes: Axes) -> None:
    draw_decoder(axes, CONFIG)
    texts = " ".join(written(axes))
    for size in ("5 times", "1,031 × 24", "24 × 1,031", "24 numbers"):
        assert size in texts


def test_arrows_turn_by_their_own_speed(axes: Axes) -> None:
    draw_turns(axes, [1, 0], CONFIG, positions=3)
    ends = [line.get_xydata()[-1] for line in axes.lines if line.get_markersize() == 13]
    assert len(ends) == 6
    slow = CONFIG.rope_theta ** (-2 / CONFIG.head_dim)
    for position in range(3):
        outer, inner = (torch.tensor(ends[position + 3 * ring]) for ring in (0, 1))
        for end, radius, angle in ((outer, 1.0, slow * position), (inner, 0.7, 1.0 * position)):
            expected = radius * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
            torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-5)


def test_attention_is_drawn_as_it_is(axes: Axes) -> None:
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    draw_attention(axes, weights, ["a", " b"])
    assert axes.images[0].get_array().tolist() == weights.tolist()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "·b"]
    with pytest.raises(ValueError, match=r"3 tokens .* \(2, 2\)"):
        draw_attention(axes, weights, ["a", "b", "c"])
