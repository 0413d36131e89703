"""The pictures say what they are given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex

from medarch.lm.instruction_pictures import COUNTED, READ, draw_counted, draw_step_memory


def test_counted_tokens_stand_out() -> None:
    figure, axes = plt.subplots()
    draw_counted(axes, ["Def", "inition", " eye"], [False, False, True], columns=12)
    assert [to_hex(patch.get_facecolor()) for patch in axes.patches] == [READ, READ, COUNTED]
    assert [text.get_text() for text in axes.texts] == ["Def", "inition", "·eye"]
    with pytest.raises(ValueError, match="2 answers for 1 tokens"):
        draw_counted(axes, ["a"], [True, False])
    plt.close(figure)


def test_bars_are_as_long_as_their_pieces() -> None:
    figure, axes = plt.subplots()
    bars = {"one": {"weights": 2.0 * 2**20, "rest": 3.0 * 2**20}, "two": {"weights": 1.0 * 2**20, "rest": 0.0}}
    draw_step_memory(axes, bars, ["#000000", "#ffffff"])
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 2), (2, 3), (0, 1), (1, 0)]
    assert [text.get_text() for text in axes.texts] == [" 5", " 1"]
    with pytest.raises(ValueError, match="each bar needs the pieces"):
        draw_step_memory(axes, bars, ["#000000"])
    with pytest.raises(ValueError, match="each bar needs the pieces"):
        draw_step_memory(axes, {"one": {"a": 1.0}, "two": {"b": 1.0}}, ["#000000"])
    plt.close(figure)
