"""A picture of a low-rank correction, to scale."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

FROZEN, TRAINED, INK = "#d1d5db", "#0072B2", "#1f2937"


def draw_low_rank(axes: Axes, rows: int, columns: int, rank: int) -> None:
    """A frozen matrix, and beside it the product of the two that are trained, all drawn to the same scale.

    Args:
        axes: Where to draw; its frame is removed.
        rows: Outputs of the matrix.
        columns: Inputs of the matrix.
        rank: Width of the bottleneck.

    Raises:
        ValueError: If a number is less than one.
    """
    if min(rows, columns, rank) < 1:
        raise ValueError(f"rows={rows}, columns={columns} and rank={rank} must be at least 1")
    gap = 0.3 * max(rows, columns)
    size = max(rows, columns)

    def box(left: float, width: float, height: float, colour: str, label: str) -> float:
        axes.add_patch(Rectangle((left, -height / 2), width, height, facecolor=colour, edgecolor=INK, lw=0.8))
        below = -size / 2 - 0.06 * size
        axes.text(left + width / 2, below, label, ha="center", va="top", color=INK)
        return left + width

    end = box(0, columns, rows, FROZEN, f"W, frozen\n{rows} × {columns}")
    axes.text(end + gap / 2, 0, "+", ha="center", va="center", fontsize=22, color=INK)
    end = box(end + gap, rank, rows, TRAINED, f"B, trained\n{rows} × {rank}")
    axes.text(end + gap / 2, 0, "×", ha="center", va="center", fontsize=22, color=INK)
    end = box(end + gap, columns, rank, TRAINED, f"A, trained\n{rank} × {columns}")
    axes.set(xlim=(-0.25 * size, end + 0.25 * size), ylim=(-0.8 * size, 0.55 * size), aspect="equal")
    axes.axis("off")
