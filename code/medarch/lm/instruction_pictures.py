"""Pictures of instruction tuning: which tokens count, and what a step holds in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from medarch.lm.pictures import INK, place, shown

COUNTED, READ = "#fdba74", "#f3f4f6"


def draw_counted(axes: Axes, pieces: Sequence[str], counted: Sequence[bool], columns: int = 46) -> None:
    """A text cut into its tokens, those whose prediction is counted in another colour and with a line below.

    Args:
        axes: Where to draw; its frame is removed.
        pieces: The text of each token.
        counted: Whether the loss counts how this token was predicted.
        columns: Characters in a row.

    Raises:
        ValueError: If there are not as many answers as tokens.
    """
    if len(pieces) != len(counted):
        raise ValueError(f"{len(counted)} answers for {len(pieces)} tokens")
    places = place(pieces, columns)
    for piece, (row, column, width), is_counted in zip(pieces, places, counted, strict=True):
        axes.add_patch(
            FancyBboxPatch(
                (column + 0.15, -row - 0.36),
                width - 0.3,
                0.72,
                boxstyle="round,pad=0,rounding_size=0.15",
                facecolor=COUNTED if is_counted else READ,
                edgecolor=INK if is_counted else "#d1d5db",
                lw=1.6 if is_counted else 0.8,
            )
        )
        axes.text(column + width / 2, -row, shown(piece), ha="center", va="center", family="monospace", color=INK)
    axes.set(xlim=(-0.2, columns + 0.2), ylim=(-places[-1][0] - 0.7, 0.7))
    axes.axis("off")


def draw_step_memory(axes: Axes, bars: Mapping[str, Mapping[str, float]], colours: Sequence[str]) -> None:
    """What a training step holds, one bar for each model, in MiB, piece after piece.

    Args:
        axes: Where to draw.
        bars: For each model the bytes of its pieces, the same pieces in each.
        colours: One for each piece.

    Raises:
        ValueError: If the bars differ in their pieces, or there are fewer colours.
    """
    pieces = list(next(iter(bars.values())))
    if any(list(bar) != pieces for bar in bars.values()) or len(colours) < len(pieces):
        raise ValueError(f"each bar needs the pieces {pieces}, and each piece one of {len(colours)} colours")
    for row, bar in enumerate(bars.values()):
        left = 0.0
        for piece, colour in zip(pieces, colours, strict=False):
            width = bar[piece] / 2**20
            axes.barh(row, width, left=left, color=colour, height=0.62, label=piece if row == 0 else None)
            left += width
        axes.text(left, row, f" {left:.0f}", va="center", color=INK)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set(xlabel="MiB at the worst moment of a step")
    axes.margins(x=0.1)
