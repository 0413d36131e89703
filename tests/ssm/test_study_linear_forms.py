"""The record of the linear forms: nothing is timed that is wrong, and the derived numbers are right."""

from __future__ import annotations

import json

import pytest
import torch

from medarch.ssm import study_linear_forms as study
from medarch.ssm.linear import recurrence


def test_a_quick_run_gives_every_comparison() -> None:
    results = study.linear_forms(quick=True)
    json.dumps(results)
    for mode in ("forward", "forward_backward"):
        variants = results["notebook"][mode]["variants"]
        assert set(variants) == {"loop, indexed", "loop", "scan", "convolution"}
        ratio = variants["loop, indexed"]["ratio"]["median"]
        assert results["notebook"][f"{mode}_loop_over_convolution"] == ratio
    scaling = results["scaling"]
    assert set(scaling["comparisons"]) == {"16", "32", "64"}
    assert set(scaling["exponent"]) == {"S4D", "attention", "loop"}


def test_the_indexed_loop_is_the_recurrence() -> None:
    generator = torch.Generator().manual_seed(0)
    system = study.notebook_system(generator, radius=0.9)
    u = torch.randn(2, 11, study.CHANNELS, generator=generator)
    torch.testing.assert_close(study.indexed_loop(system, u), recurrence(system, u)[0])


def test_a_form_that_disagrees_is_not_timed() -> None:
    right = torch.ones(3)
    study.check_agreement({"loop": lambda: right, "scan": lambda: right + 1e-6})
    with pytest.raises(ValueError, match="scan disagrees with the loop"):
        study.check_agreement({"loop": lambda: right, "scan": lambda: right + 0.01})


def test_attention_looks_back_alone() -> None:
    attention = study.Attention(8, 2)
    u = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(0))
    changed = u.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(attention(u)[:, :4], attention(changed)[:, :4])
    assert not torch.allclose(attention(u)[:, 4:], attention(changed)[:, 4:])


def test_the_exponent_of_a_power_law() -> None:
    times = {length: 3e-6 * length**1.5 for length in (100, 1000, 5000)}
    assert study.exponent(times) == pytest.approx(1.5)


def test_the_crossing_is_where_no_slower_length_follows() -> None:
    theirs = {10: 1.0, 20: 2.0, 40: 4.0, 80: 8.0}
    assert study.crossing({10: 0.5, 20: 3.0, 40: 3.0, 80: 3.0}, theirs) == 40
    assert study.crossing({10: 0.5, 20: 1.0, 40: 3.0, 80: 3.0}, theirs) == 10
    assert study.crossing({10: 0.5, 20: 1.0, 40: 3.0, 80: 9.0}, theirs) is None
