"""The pictures of load show the shares and the experts that they are given."""

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from medarch.moe.balance_pictures import draw_loads, draw_text
from medarch.moe.pictures import expert_colour


def axes():
    return Figure().subplots()


def test_bands_have_the_height_of_the_shares():
    loads = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]]).repeat_interleave(5, dim=0)
    ax = axes()
    draw_loads(ax, loads)
    outlines = [band.get_paths()[0].vertices for band in ax.collections]
    for step, share in ((2.5, [0.5, 0.25, 0.25]), (7.5, [0.1, 0.6, 0.3])):
        below = 0.0
        for outline, height in zip(outlines, share, strict=True):
            heights = outline[outline[:, 0] == step][:, 1]
            assert heights.min() == pytest.approx(100 * below, abs=1e-4)
            assert heights.max() == pytest.approx(100 * (below + height), abs=1e-4)
            below += height
    assert [to_hex(band.get_facecolor()[0]) for band in ax.collections] == [
        expert_colour(expert).lower() for expert in range(3)
    ]


def test_each_character_stands_on_the_colour_of_its_expert():
    ax = axes()
    draw_text(ax, "abcde", torch.tensor([3, 1, 1, 0, 2]), columns=3)
    assert [to_hex(tile.get_facecolor()) for tile in ax.patches] == [
        expert_colour(expert).lower() for expert in (3, 1, 1, 0, 2)
    ]
    assert [(tile.get_x(), tile.get_y()) for tile in ax.patches] == [(0, -1), (1, -1), (2, -1), (0, -2), (1, -2)]
    assert [label.get_text() for label in ax.texts] == ["a", "3", "b", "1", "c", "1", "d", "0", "e", "2"]


def test_faults_are_refused_by_name():
    with pytest.raises(ValueError, match="3 steps cannot be averaged"):
        draw_loads(axes(), torch.full((3, 2), 0.5))
    with pytest.raises(ValueError, match="each needs one"):
        draw_text(axes(), "abc", torch.tensor([0, 1]))
