"""Figures that move under the reader's hand: an Altair chart with sliders that are computed in the page.

A chart is the last expression of a cell. Its parameters are bound to inputs, which a keyboard reaches; whatever
depends on them is an expression of Altair's, evaluated in the page, so that no kernel is needed::

    import altair as alt

    from medarch.book.interactive import Figure

    step = alt.param("step", value=0.5, bind=alt.binding_range(min=0.05, max=2, step=0.05, name="step size Δ"))
    curve = (
        alt.Chart(alt.sequence(0, 10.05, 0.05, as_="time"))
        .transform_calculate(kept=alt.expr.exp(-step * alt.datum.time))
        .mark_line()
        .encode(
            alt.X("time:Q").title("time steps"),
            alt.Y("kept:Q").title("share of the state that is kept").scale(domain=[0, 1]),
        )
        .add_params(step)
    )
    Figure(curve, alt="A curve falls from one towards zero, and the faster the larger the step size is chosen.")

The notebook gets the chart as Vega, which JupyterLab shows as it is; the page shows its picture, drawn here, and
puts the live chart in its place where scripts run. Importing this module sets the house style.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair
import matplotlib
import vl_convert

from medarch.book.figures import COLOURS, INK, PLATE, QUIET, SEQUENTIAL

# JupyterLab has Vega 5. The page has Vega 6, which is the same but for how it is packaged.
VEGA, SCHEMA = "application/vnd.vega.v5+json", "https://vega.github.io/schema/vega/v5.json"
STILL = "image/svg+xml"
WIDTH, HEIGHT = 560, 300
FACETS = ("row", "column", "facet")
# What starts by itself or answers to a wheel alone: a reader could neither stop the one nor reach the other by keys.
UNREACHABLE = {"timer", "wheel"}


@altair.theme.register("medarch", enable=True)
def house_style() -> altair.theme.ThemeConfig:
    """The house style of :mod:`medarch.book.figures` in Vega's terms; the legend stands above, where a phone has room."""
    text: Any = {"labelFontSize": 14, "titleFontSize": 14, "labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"}
    ramp = {"scheme": SEQUENTIAL}
    config: Any = {
        "background": PLATE,
        "font": "DejaVu Sans, Verdana, sans-serif",
        "view": {"continuousWidth": WIDTH, "continuousHeight": HEIGHT, "discreteWidth": WIDTH, "stroke": None},
        "axis": {**text, "domainColor": QUIET, "tickColor": QUIET, "gridColor": "#e5e7eb", "labelFlush": False},
        "axisQuantitative": {"tickCount": 6},
        "legend": {**text, "orient": "top", "symbolSize": 150, "symbolStrokeWidth": 2},
        "header": text,
        "title": {"anchor": "start", "fontSize": 15, "fontWeight": "normal", "color": INK},
        "mark": {"color": COLOURS[0]},
        "line": {"strokeWidth": 2},
        "point": {"size": 50, "filled": True},
        "text": {"fontSize": 14, "color": INK},
        "range": {"category": list(COLOURS), "heatmap": ramp, "ramp": ramp},
    }
    return {"config": config}


class Figure:
    """An Altair chart whose inputs work in the page, on the deck and in a notebook.

    Args:
        chart: a chart with at least one parameter that is bound to an input. A single or layered chart without a
            width takes what the page has; several charts keep theirs, and stand under one another on a phone.
        alt: what is to be seen, and what the inputs change, for readers who see neither.

    Raises:
        ValueError: without words, without an input, or with what the page cannot do for every reader.
    """

    def __init__(self, chart: Any, *, alt: str):
        if not alt.strip():
            raise ValueError("the figure has no words: say in alt= what is to be seen and what the inputs change")
        self.alt = " ".join(alt.split())
        chart = chart.properties(description=self.alt)
        single = isinstance(chart, altair.Chart | altair.LayerChart) and chart.width is altair.Undefined
        if single and not any(hasattr(getattr(chart.encoding, each, None), "shorthand") for each in FACETS):
            chart = chart.properties(width=WIDTH, autosize=altair.AutoSizeParams(type="fit-x", contains="padding"))
        self.vega: dict[str, Any] = {**chart.to_dict(format="vega"), "$schema": SCHEMA}
        if not any(_values(self.vega, "input")):
            raise ValueError("no parameter is bound to an input: bind one (bind=alt.binding_range(…)), or draw a still")
        if alone := UNREACHABLE & set(_values(self.vega, "type")):
            raise ValueError(f"the chart answers to {' and '.join(sorted(alone))}, which no key reaches: bind an input")
        if elsewhere := next(_values(self.vega, "url"), None):
            raise ValueError(f"the chart loads {elsewhere}: hand it the data themselves")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        vl_convert.register_font_directory(str(Path(matplotlib.get_data_path(), "fonts/ttf")))
        return {VEGA: self.vega, STILL: vl_convert.vega_to_svg(self.vega), "text/plain": self.alt}

    def __repr__(self) -> str:
        return self.alt


def _values(node: Any, key: str) -> Iterator[Any]:
    """The plain values of a key at any depth of a chart, its data left out."""
    if isinstance(node, dict):
        yield from (node[name] for name in node if name == key and not isinstance(node[name], dict | list))
        node = [value for name, value in node.items() if name != "values"]
    for each in node if isinstance(node, list) else ():
        yield from _values(each, key)
