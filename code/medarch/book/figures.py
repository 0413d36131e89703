"""The house style of the book's figures: one rendering on a light plate, legible on a phone, safe for the colour-blind.

Importing this module sets the style. A figure is drawn as SVG, so that it is sharp at any size; its text is drawn as
paths, so that it looks the same everywhere.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import matplotlib
from cycler import cycler

# Okabe and Ito's palette without its yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
QUIET, INK, PLATE = "#6b7280", "#1f2937", "#ffffff"
SEQUENTIAL = "cividis"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

STYLE: dict[str, Any] = {
    "figure.figsize": (7.0, 4.0),
    "figure.facecolor": PLATE,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": PLATE,
    "font.size": 12.5,
    "axes.titlesize": 13.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS),
    "grid.color": "#e5e7eb",
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "image.cmap": SEQUENTIAL,
    "svg.fonttype": "path",
    "svg.hashsalt": "medarch",  # the same figure has the same bytes in every build
}


def use_style() -> None:
    """Apply the house style, and draw inline figures as SVG where the code runs in a notebook."""
    matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
    with contextlib.suppress(ImportError, AttributeError):  # outside a notebook there is no inline backend
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


use_style()
# Libraries that only might show a progress bar ask for the widgets of notebooks, which the book does without.
warnings.filterwarnings("ignore", message="IProgress not found")
