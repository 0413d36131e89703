"""Pictures of a small language model: its tokens, its residual stream, the turns of its positions, its attention."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import matplotlib.patches
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from medarch.lm.attention import rotary_angles, rotate
from medarch.lm.config import DecoderConfig

ATTENTION, FEED_FORWARD, QUIET, INK = "#0072B2", "#C04F00", "#6b7280", "#1f2937"
SHADES = ("#dbeafe", "#fde8d0", "#d3f0e4", "#f3dcec")


def shown(piece: str) -> str:
    """A token as a picture can show it: a space at its beginning becomes a mark, a line break another."""
    return piece.replace("\n", "⏎").replace(" ", "·") or "∅"


def place(pieces: Sequence[str], columns: int) -> list[tuple[int, int, int]]:
    """Row, column and width in characters of each token, in rows of at most ``columns``.

    Raises:
        ValueError: If a token is wider than a row.
    """
    places, row, column = [], 0, 0
    for piece in pieces:
        width = len(shown(piece)) + 1
        if width > columns:
            raise ValueError(f"the token {piece!r} is {width} wide and does not fit into columns={columns}")
        if column + width > columns:
            row, column = row + 1, 0
        places.append((row, column, width))
        column += width
    return places


def draw_tokens(
    axes: Axes, pieces: Sequence[str], values: Sequence[float] | None = None, columns: int = 54, form: str = ".1f"
) -> None:
    """A text cut into its tokens, each in a box; with values, the box is shaded by them and bears the number.

    Args:
        axes: where to draw; its frame is removed.
        pieces: the text of each token.
        values: a number for each token, zero or more, darker where it is larger.
        columns: characters in a row.
        form: how a number is written.
    """
    if values is not None and len(values) != len(pieces):
        raise ValueError(f"{len(values)} values for {len(pieces)} tokens")
    places = place(pieces, columns)
    scale = Normalize(0, max(values) if values is not None and max(values) > 0 else 1)
    colours = matplotlib.colormaps["Oranges"]
    step = 2.0 if values is not None else 1.35
    for number, (piece, (row, column, width)) in enumerate(zip(pieces, places, strict=True)):
        face = SHADES[number % len(SHADES)] if values is None else colours(0.75 * float(scale(values[number])))
        y = -row * step
        axes.add_patch(Rectangle((column + 0.06, y - 0.5), width - 0.12, 1.0, facecolor=face, edgecolor="none"))
        axes.text(column + width / 2, y, shown(piece), ha="center", va="center", family="monospace", fontsize=11.5)
        if values is not None:
            axes.text(column + width / 2, y - 0.8, format(values[number], form), ha="center", va="center",
                      color=QUIET, fontsize=9.5)  # fmt: skip
    axes.set(xlim=(0, columns), ylim=(-places[-1][0] * step - (1.2 if values is not None else 0.6), 0.6))
    axes.axis("off")


def draw_decoder(axes: Axes, config: DecoderConfig) -> None:
    """One layer on the residual stream, with what stands before the first and behind the last.

    Args:
        axes: where to draw; its frame is removed.
        config: the model's sizes, which are written beside the parts.
    """
    wide, arrow = config.hidden_size, {"arrowstyle": "-|>", "color": INK, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (10.3, 0), (1.6, 0), arrowprops=arrow | {"lw": 3.5, "color": QUIET})
    axes.text(5.5, -0.4, f"the residual stream,\n{wide} numbers a token", ha="center", va="top", color=QUIET)
    axes.add_patch(
        FancyBboxPatch(
            (2.55, -1.6),
            5.9,
            4.8,
            boxstyle="round,pad=0,rounding_size=0.15",
            facecolor="none",
            edgecolor=QUIET,
            linestyle="--",
        )
    )
    axes.text(5.5, 3.4, f"a layer, {config.num_hidden_layers} times", ha="center", color=QUIET)
    for left, colour, name in (
        (2.9, ATTENTION, "attention\nlooks at the\ntokens before"),
        (5.8, FEED_FORWARD, "feed-forward\ntakes each\nby itself"),
    ):
        _box(axes, left, 1.0, 1.1, 0.62, "norm", QUIET)
        _box(axes, left, 2.25, 2.3, 1.35, name, colour)
        axes.annotate("", (left + 0.55, 0.68), (left + 0.55, 0.0), arrowprops=arrow)
        axes.annotate("", (left + 0.55, 1.56), (left + 0.55, 1.32), arrowprops=arrow)
        axes.annotate("", (left + 1.9, 0.17), (left + 1.9, 1.56), arrowprops=arrow)
        axes.text(left + 1.9, 0, "+", ha="center", va="center", fontsize=15, zorder=5,
                  bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": INK})  # fmt: skip
    _box(axes, -0.5, 0, 2.1, 1.1, f"embedding\n{config.vocab_size:,} × {wide}", INK)
    _box(axes, 8.65, 0, 1.1, 0.62, "norm", QUIET)
    _box(axes, 10.3, 0, 2.1, 1.1, f"head\n{wide} × {config.vocab_size:,}", INK)
    for x, (low, high), text, middle in (
        (0.55, (-1.35, -0.56), "token ids", -1.6),
        (11.35, (0.56, 1.35), "scores for\nthe next token", 1.8),
    ):
        axes.annotate("", (x, high), (x, low), arrowprops=arrow)
        axes.text(x, middle, text, ha="center", va="center")
    axes.set(xlim=(-0.7, 12.6), ylim=(-1.9, 3.7))
    axes.axis("off")


def draw_turns(axes: Axes, pairs: Sequence[int], config: DecoderConfig, positions: int = 6) -> None:
    """Where the arrow (1, 0) points after the rotation of each position, for some pairs of a head's numbers.

    Args:
        axes: where to draw.
        pairs: which pairs, from 0 (the fastest) to ``head_dim / 2 - 1`` (the slowest); each gets a ring, the
            first the outermost.
        config: head size and rotary base.
        positions: how many positions, from 0.
    """
    import torch

    cos, sin = rotary_angles(torch.arange(positions), config.head_dim, config.rope_theta)
    for ring, pair in enumerate(pairs):
        radius = 1.0 - 0.3 * ring
        axes.add_patch(_circle(radius))
        colour = (ATTENTION, FEED_FORWARD, "#007F5C")[ring % 3]
        for position in range(positions):
            heads = torch.zeros(1, 1, 1, config.head_dim)
            heads[..., pair] = radius
            turned = rotate(heads, cos[position : position + 1], sin[position : position + 1])[0, 0, 0]
            end = float(turned[pair]), float(turned[pair + config.head_dim // 2])
            axes.plot([0, end[0]], [0, end[1]], color=colour, lw=1.0, alpha=0.5, marker="")
            axes.plot(*end, color=colour, marker="o", markersize=13, lw=0)
            axes.text(*end, str(position), ha="center", va="center", color="white", fontsize=9.5)
        axes.plot([], [], color=colour, marker="o", lw=0, label=f"pair {pair}")
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
    axes.axis("off")


def draw_attention(axes: Axes, weights: Float[Tensor, "time time"], pieces: Sequence[str]) -> None:
    """How much each token (row) looks at each earlier one (column), darker for more.

    Args:
        axes: where to draw.
        weights: the rows sum to one.
        pieces: the text of each token.
    """
    if len(pieces) != weights.shape[0]:
        raise ValueError(f"{len(pieces)} tokens for attention weights of shape {tuple(weights.shape)}")
    axes.imshow(weights.tolist(), cmap="Blues", vmin=0, vmax=1)
    labels = [shown(piece) for piece in pieces]
    axes.set_yticks(range(len(labels)), labels, family="monospace", fontsize=11)
    axes.set_xticks(range(len(labels)), labels, family="monospace", fontsize=11, rotation=90)
    axes.grid(visible=False)


def _circle(radius: float) -> matplotlib.patches.Circle:
    return matplotlib.patches.Circle((0, 0), radius, facecolor="none", edgecolor="#d1d5db")


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    box = FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.12")
    box.set(facecolor=colour, edgecolor=colour, zorder=3)
    axes.add_patch(box)
    axes.text(x + width / 2, y, text, ha="center", va="center", color="white", zorder=4, fontsize=11)
