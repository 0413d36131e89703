"""The chart of the matrix shows what the scan computes with."""

from __future__ import annotations

import math

import torch

from medarch.ssm.ssd import segment_sum
from medarch.ssm.ssd_pictures import matrix_chart


def test_the_chart_holds_the_lower_triangle_and_counts_what_chunks_leave() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, log_decay = torch.randn(8, 8, generator=generator), -torch.rand(8, generator=generator)
    chart = matrix_chart(scores, log_decay, chunk_size=3).to_dict()
    cells = next(each["data"]["values"] for each in chart["layer"] if len(each["data"].get("values", [])) > 1)
    assert len(cells) == 36
    wanted = segment_sum(log_decay).exp() * scores / scores.abs().quantile(0.97)
    for cell in cells:
        value = cell["score"] * math.exp(cell["log"])
        assert abs(value - float(wanted[cell["t"], cell["s"]])) < 5e-3
    assert {each["name"]: each["value"] for each in chart["params"]} == {"rate": 1, "size": 3}
