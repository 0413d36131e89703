"""Pictures of load: who does the work as training goes on, and who takes which character of a text."""

from __future__ import annotations

from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from medarch.moe.pictures import expert_colour


def draw_loads(axes: Axes, loads: Float[Tensor, "steps experts"], every: int = 5) -> None:
    """Each expert's share of the work as a band, step by step; the bands fill the height together.

    Args:
        axes: Where to draw.
        loads: Shares that sum to one at each step.
        every: Over how many steps a share is averaged, so that the bands do not flicker.

    Raises:
        ValueError: If there are fewer steps than ``every``.
    """
    whole = len(loads) // every
    if not whole:
        raise ValueError(f"{len(loads)} steps cannot be averaged over every={every}")
    mean = loads[: whole * every].reshape(whole, every, -1).mean(dim=1)
    steps = [every * (index + 0.5) for index in range(whole)]
    colours = [expert_colour(expert) for expert in range(loads.shape[1])]
    axes.stackplot(steps, 100 * mean.T.numpy(), colors=colours, edgecolor="white", linewidth=0.6)
    axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 100))
    axes.grid(visible=False)


def draw_text(axes: Axes, text: str, experts: Int[Tensor, "characters"], columns: int = 34) -> None:
    """A text in rows of equal length, each character on the colour and with the number of its expert.

    Args:
        axes: Where to draw; its frame is removed.
        text: The characters.
        experts: The expert of each.
        columns: Characters in a row.

    Raises:
        ValueError: If text and experts differ in length.
    """
    if len(text) != len(experts):
        raise ValueError(f"{len(text)} characters have {len(experts)} experts: each needs one")
    for place, (character, expert) in enumerate(zip(text, experts.tolist(), strict=True)):
        row, column = divmod(place, columns)
        axes.add_patch(Rectangle((column, -row - 1), 1, 0.92, color=expert_colour(expert), linewidth=0))
        axes.text(column + 0.5, -row - 0.42, character, ha="center", va="center", color="white", fontsize=11)
        axes.text(column + 0.5, -row - 0.83, str(expert), ha="center", va="center", color="white", fontsize=6)
    axes.set(xlim=(0, columns), ylim=(-((len(text) - 1) // columns) - 1, 0.08))
    axes.axis("off")
