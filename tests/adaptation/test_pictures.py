"""The picture of a correction is drawn to scale."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import Rectangle

from medarch.adaptation.pictures import draw_low_rank


def test_the_matrices_are_drawn_to_scale() -> None:
    figure, axes = plt.subplots()
    draw_low_rank(axes, 40, 20, 3)
    boxes = [(patch.get_width(), patch.get_height()) for patch in axes.patches if isinstance(patch, Rectangle)]
    assert boxes == [(20, 40), (3, 40), (20, 3)]
    assert next(text.get_text() for text in axes.texts if "×" in text.get_text()) == "W, frozen\n40 × 20"
    with pytest.raises(ValueError, match="rank=0"):
        draw_low_rank(axes, 4, 2, 0)
    plt.close(figure)
