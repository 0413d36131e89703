"""Pictures of a mixture-of-experts layer, drawn from what a router really decided."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from medarch.moe.router import NO_EXPERT, Routing

LIT = ("#0072B2", "#C04F00", "#007F5C", "#A8497F", "#8F6400", "#3A6EA5", "#4D4D4D", "#7B3F00")
PALE, EDGE, INK = "#f3f4f6", "#9ca3af", "#1f2937"


def expert_colour(expert: int) -> str:
    """The colour of an expert, the same in every picture; they repeat after eight."""
    return LIT[expert % len(LIT)]


def draw_layer(axes: Axes, routing: Routing, word: str) -> None:
    """One token on its way through the layer: the router, all experts in memory, and the k that run.

    Args:
        axes: where to draw; its frame is removed.
        routing: the routing of a single token, tensors of shape ``[experts]`` and ``[k]``.
        word: how the token is called.
    """
    chosen = dict(zip(routing.indices.tolist(), routing.weights.tolist(), strict=True))
    experts = routing.probs.shape[-1]
    middle = (experts - 1) / 2
    for expert in range(experts):
        height = experts - 1 - expert
        weight = chosen.get(expert)
        colour = expert_colour(expert) if weight is not None else EDGE
        label = f"expert {expert}" + ("" if weight is None else f"  × {weight:.2f}")
        _box(axes, 4.6, height, 2.8, 0.72, label, weight is not None, colour)
        if weight is None:
            axes.plot([3.6, 4.6], [middle, height], color=EDGE, lw=0.8, ls=":", marker="", zorder=0)
            continue
        for xs, ys in (([3.6, 4.6], [middle, height]), ([7.4, 8.6], [height, middle])):
            axes.plot(xs, ys, color=colour, lw=1.5 + 4 * weight, marker="", zorder=0)
    _box(axes, -0.4, middle, 1.7, 0.9, word, True, INK)
    _box(axes, 2.2, middle, 1.4, 0.9, "router", True, INK)
    _box(axes, 8.6, middle, 1.0, 0.9, "sum", True, INK)
    arrow = {"arrowstyle": "->", "color": INK, "lw": 1.5}
    for left, right in ((1.3, 2.2), (9.6, 10.4)):
        axes.annotate("", (right, middle), (left, middle), arrowprops=arrow)
    axes.set(xlim=(-0.6, 10.6), ylim=(-0.7, experts - 0.3))
    axes.axis("off")


def draw_flow(axes: Axes, words: Sequence[str], routing: Routing) -> None:
    """Each token of a text with the experts that it is sent to; a thicker line is a larger weight.

    Args:
        axes: where to draw; its frame is removed.
        words: the text's tokens, in order.
        routing: their routing, tensors of shape ``[len(words), …]``.
    """
    experts = routing.probs.shape[-1]
    rows = len(words)
    place = [rows - 1 - expert * (rows - 1) / max(experts - 1, 1) for expert in range(experts)]
    share = routing.statistics.load.tolist()
    for row, word in enumerate(words):
        height = rows - 1 - row
        axes.text(-0.15, height, word, ha="right", va="center")
        for expert, weight in zip(routing.indices[row].tolist(), routing.weights[row].tolist(), strict=True):
            if expert != NO_EXPERT:
                axes.plot([0, 4], [height, place[expert]], color=expert_colour(expert), lw=0.5 + 4.5 * weight,
                          alpha=0.75, marker="", solid_capstyle="round")  # fmt: skip
    for expert in range(experts):
        _box(
            axes,
            4.0,
            place[expert],
            1.5,
            rows / experts * 0.62,
            f"expert {expert}",
            True,
            expert_colour(expert),
        )
        axes.text(5.7, place[expert], f"{share[expert]:.0%}", va="center", ha="left")
    axes.text(5.7, rows + 0.1, "share of\nthe work", va="bottom", ha="left")
    axes.set(xlim=(-2.6, 6.9), ylim=(-0.5 - rows / experts * 0.31, rows + 1.2))
    axes.axis("off")


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, lit: bool, colour: str) -> None:
    face, ink = (colour, "white") if lit else (PALE, "#4b5563")
    box = FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.12")
    box.set(facecolor=face, edgecolor=colour, linewidth=1.2, zorder=2)
    axes.add_patch(box)
    axes.text(x + width / 2, y, text, ha="center", va="center", color=ink, zorder=3)
