"""Scaling laws: known coefficients are found again, and what a law cannot say is refused."""

from __future__ import annotations

import math

import pytest

from medarch.lm.scaling import Form, Point, extrapolate, fit_law
from medarch.lm.study_scaling import decoder_config, parameters
from medarch.moe.accounting import count_parameters

SIZES = (1e4, 3e4, 1e5, 3e5, 1e6, 1e7)


def law(form: str, size: float, expansion: float = 1.0) -> float:
    n, x = math.log(size), math.log(expansion)
    return {
        "logarithm": 7.0 - 0.25 * n,
        "power": 9.0 * size**-0.08,
        "offset": 11.0 * size**-0.2 + 1.7,
        "routed": math.exp(-0.09 * n - 0.11 * x + 0.004 * n * x + 2.3),
    }[form]


def points(form: str, expansions: tuple[float, ...] = (1.0,)) -> list[Point]:
    return [Point(size, x, law(form, size, x)) for size in SIZES for x in expansions]


@pytest.mark.parametrize("form", ["logarithm", "power", "offset"])
def test_a_dense_law_is_found_again_and_foretells(form: Form) -> None:
    fit = fit_law(points(form), form)
    assert fit.residual < 1e-6
    assert fit.predict(5e7) == pytest.approx(law(form, 5e7), rel=1e-4)
    told = extrapolate(points(form), form)
    assert [point.size for point in told.held_out] == [1e7]
    assert abs(told.errors[0]) < 1e-4


def test_the_routed_law_is_found_again() -> None:
    fit = fit_law(points("routed", (1.0, 2.0, 8.0)), "routed")
    assert fit.coefficients == pytest.approx({"a": -0.09, "b": -0.11, "c": 0.004, "d": 2.3}, rel=1e-3)
    told = extrapolate(points("routed", (1.0, 2.0, 8.0)), "routed", lambda point: point.expansion == 8)
    assert len(told.held_out) == len(SIZES)
    assert max(map(abs, told.errors)) < 1e-4


def test_the_wrong_law_errs_beyond_the_data() -> None:
    told = extrapolate(points("offset"), "logarithm")
    assert told.errors[0] < -0.02  # a straight line falls through the floor
    assert told.fit.residual > 1e-3
    assert told.to_dict()["held_out"][0]["error"] == told.errors[0]


def test_the_error_has_the_sign_of_the_prediction() -> None:
    shifted = [*points("power")[:-1], Point(1e7, 1.0, law("power", 1e7) / 1.1)]
    assert extrapolate(shifted, "power").errors[0] == pytest.approx(0.1, rel=1e-3)


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="2 points for the 2 coefficients"):
        fit_law(points("power")[:2], "power")
    with pytest.raises(ValueError, match="knows no experts"):
        fit_law(points("routed", (1.0, 2.0)), "power")
    with pytest.raises(ValueError, match="must be positive"):
        fit_law([*points("power"), Point(0.0, 1.0, 2.0)], "power")
    with pytest.raises(ValueError, match="is none of"):
        fit_law(points("power"), "cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no model is left out"):
        extrapolate(points("power"), "power", lambda point: False)


def test_the_studys_mixtures_compute_what_the_dense_model_computes() -> None:
    from medarch.lm.decoder import Decoder

    dense, routed = (Decoder(decoder_config(32, x, vocab_size=61)) for x in (1, 4))
    ours, theirs = parameters(dense), parameters(routed)
    moe = routed.config.moe
    assert moe is not None
    assert (moe.num_experts, moe.num_experts_per_tok) == (8, 2)
    assert theirs["size"] == ours["size"] + 4 * count_parameters(moe).router
    assert theirs["total"] - theirs["active"] == 4 * 6 * count_parameters(moe).expert
    assert ours["total"] == ours["active"] == ours["size"] + 61 * 32
    assert (
        parameters(Decoder(decoder_config(32, 1, widening=4, vocab_size=61)))["total"] + 4 * 8 * 32 == theirs["total"]
    )
