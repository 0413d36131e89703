"""A picture of the matrix that a scan hides, for a hand to turn its rate and cut it into chunks."""

from __future__ import annotations

from typing import Any

import altair as alt
import torch
from jaxtyping import Float
from torch import Tensor

INK = "#1f2937"


def matrix_chart(
    scores: Float[Tensor, "time time"], log_decay: Float[Tensor, "time"], chunk_size: int = 12, height: int = 430
) -> Any:
    """The lower triangle of M with two sliders: a factor on the rate of decay, and the size of the chunks.

    Args:
        scores: M without its decay, rows read, columns written.
        log_decay: Logarithm of what each step leaves of the state.
        chunk_size: Steps of a chunk at first.
        height: Of the chart, in pixels.
    """
    time = len(log_decay)
    passed = log_decay.double().cumsum(0)
    shown = (scores / torch.quantile(scores.abs(), 0.97)).tolist()
    cells = [
        {"s": s, "t": t, "score": round(shown[t][s], 3), "log": round(float(passed[t] - passed[s]), 3)}
        for t in range(time)
        for s in range(t + 1)
    ]
    rate = alt.param("rate", value=1, bind=alt.binding_range(min=0, max=20, step=0.25, name="rate of decay, times "))
    size = alt.param(
        "size", value=chunk_size, bind=alt.binding_range(min=2, max=time, step=1, name="steps in a chunk ")
    )
    axis = alt.Axis(grid=False, values=[0, time // 4, time // 2, 3 * time // 4, time])
    weights = (
        alt.Chart(alt.Data(values=cells))
        .transform_calculate(M=alt.datum.score * alt.expr.exp(rate * alt.datum.log), s2="datum.s + 1", t2="datum.t + 1")
        .mark_rect()
        .encode(
            alt.X("s:Q", scale=alt.Scale(domain=[0, time], nice=False), axis=axis).title("written at step s"),
            alt.X2("s2:Q"),
            alt.Y("t:Q", scale=alt.Scale(domain=[time, 0], nice=False), axis=axis).title("read at step t"),
            alt.Y2("t2:Q"),
            alt.Color("M:Q", legend=None).scale(domain=[-1, 0, 1], range=["#b2182b", "#f7f7f7", "#2166ac"], clamp=True),
        )
        .add_params(rate, size)
    )
    squares = (
        alt.Chart(alt.sequence(0, time, as_="k"))
        .transform_filter(alt.datum.k % size == 0)
        .transform_calculate(end=f"min(datum.k + size, {time})", start="datum.k")
        .mark_rect(fillOpacity=0, stroke=INK, strokeWidth=1.5)
        .encode(alt.X("k:Q"), alt.X2("end:Q"), alt.Y("start:Q"), alt.Y2("end:Q"))
    )
    rest = f"({time} % size)"
    within = f"(floor({time} / size) * size * (size + 1) + {rest} * ({rest} + 1)) / 2"
    lines = {
        0.04: f"'of {time * (time + 1) // 2:,} entries'",
        0.12: f"({within}) + ' within chunks'",
        0.20: f"(ceil({time} / size) - 1) + ' states between'",
    }
    words = [
        alt.Chart(alt.Data(values=[{"x": time - 0.5, "y": place * time}]))
        .transform_calculate(words=text)
        .mark_text(align="right")
        .encode(alt.X("x:Q"), alt.Y("y:Q"), alt.Text("words:N"))
        for place, text in lines.items()
    ]
    return alt.layer(weights, squares, *words).properties(height=height)
