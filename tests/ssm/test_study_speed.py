"""The study of the scan's speed: nothing is timed before all variants agree, and the record meets the goals."""

from __future__ import annotations

import json

import pytest

from medarch.ssm import study_speed


def test_a_quick_run_gives_every_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_speed, "peak_memory", lambda call, **_: len(call()))  # has tests of its own, and is slow
    results = study_speed.scan_speed(quick=True)
    json.dumps(results)
    variants = {"mambapy", "transformers", "loop", "associative", "chunked"}
    for modes in results["lengths"].values():
        assert set(modes["forward"]["variants"]) == variants | {"states_once", "inputs_once"}
        assert set(modes["forward_backward"]["variants"]) == variants
        assert all(each["peak_bytes"]["chunked"] > 0 for each in modes.values())
    assert results["growth"]["chunked"]["forward_backward"]["variants"].keys() == {"32", "64"}


@pytest.mark.parametrize("quantity", ["y", "B"])
def test_a_variant_that_disagrees_is_not_timed(quantity: str) -> None:
    variants = study_speed.build_variants("cpu")
    inputs = study_speed.make_inputs(13, "cpu", channels=3)
    right = variants["chunked"]

    def wrong(**given: object) -> object:
        y = right(**given)
        given["B"].register_hook(lambda gradient: 1.01 * gradient) if quantity == "B" and y.requires_grad else None
        return 1.01 * y if quantity == "y" else y

    variants = {"loop": variants["loop"], "wrong": wrong}
    with pytest.raises(ValueError, match=f"wrong disagrees with the loop in {quantity}"):
        study_speed.check_agreement(variants, inputs, "cpu")
