"""Interactive figures in the kernel: what they hand on, what they refuse, and that their inputs matter."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import altair as alt
import pytest
import vl_convert

from medarch.book import interactive
from medarch.book.figures import COLOURS
from medarch.book.interactive import STILL, VEGA, Figure

WORDS = "A curve that falls, and the faster the larger the step size is."


def decay(**options: Any) -> alt.Chart:
    bound = alt.binding_range(min=0.05, max=2, step=0.05, name="step size")
    delta = alt.param("delta", value=0.5, bind=bound)
    chart = alt.Chart(alt.sequence(0, 11, as_="t")).transform_calculate(kept=alt.expr.exp(-alt.datum.t * delta))
    return chart.mark_line().encode(alt.X("t:Q"), alt.Y("kept:Q")).add_params(delta).properties(**options)


def test_it_hands_on_chart_picture_and_words() -> None:
    figure = Figure(decay(), alt=f"  {WORDS[:20]}\n    {WORDS[20:]}")
    bundle = figure._repr_mimebundle_()
    assert set(bundle) == {VEGA, STILL, "text/plain"}
    assert bundle["text/plain"] == repr(figure) == bundle[VEGA]["description"] == WORDS
    assert COLOURS[0] in bundle[STILL]
    assert "DejaVu Sans" in bundle[STILL]
    json.dumps(bundle)


def test_what_is_drawn_follows_the_input() -> None:
    vega = Figure(decay(), alt=WORDS).vega
    moved = copy.deepcopy(vega)
    (signal,) = [each for each in moved["signals"] if each["name"] == "delta"]
    assert signal["bind"] == {"input": "range", "min": 0.05, "max": 2, "step": 0.05, "name": "step size"}
    signal["value"] = 1.5
    assert vl_convert.vega_to_svg(moved) != vl_convert.vega_to_svg(vega)


def test_a_chart_without_a_width_fits_any_and_one_with_it_keeps_it() -> None:
    free, fixed = Figure(decay(), alt=WORDS).vega, Figure(decay(width=211), alt=WORDS).vega
    row = Figure(decay(width=211) | decay(width=211), alt=WORDS).vega
    facets = Figure(decay().encode(row="t:N"), alt=WORDS).vega
    assert (free["autosize"]["type"], free["width"]) == ("fit-x", interactive.WIDTH)
    assert fixed["width"] == 211
    assert all("fit-x" not in json.dumps(vega.get("autosize", "")) for vega in (fixed, row, facets))
    assert "layout" in row  # which the page turns into a column where there is no room


@pytest.mark.parametrize(
    ("chart", "words", "told"),
    [
        (decay(), " \n", "has no words"),
        (alt.Chart(alt.sequence(0, 3, as_="t")).mark_line().encode(x="t:Q"), WORDS, "no parameter is bound"),
        (decay().interactive(), WORDS, "answers to wheel"),
        (decay().add_params(alt.selection_point(on="timer")), WORDS, "answers to timer"),
        (decay().properties(data="https://example.org/a.csv"), WORDS, "loads https://example.org/a.csv"),
    ],
    ids=["words", "input", "wheel", "timer", "elsewhere"],
)
def test_what_the_page_cannot_do_for_everyone_is_refused(chart: alt.Chart, words: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Figure(chart, alt=words)


def test_data_may_be_called_what_they_like() -> None:
    rows = [{"t": 1, "url": "u", "type": "timer", "input": "range"}]
    chart = decay(data=alt.InlineData(values=rows))
    assert Figure(chart, alt=WORDS).vega["data"][0]["values"] == rows


def test_pages_without_such_a_figure_do_not_wait_for_altair() -> None:
    names = "exercises figures ledger records tables".split()
    code = f"import sys, {', '.join(f'medarch.book.{name}' for name in names)}; sys.exit('altair' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
