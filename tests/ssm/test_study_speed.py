"""The study of the scan's speed: nothing is timed before all variants agree, and the record meets the goals."""

from __future__ import annotations

import json

import pytest

from medarch.bench.records import load, record_path
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


@pytest.mark.parametrize("length", ["2048", "4096", "8192"])
def test_the_committed_record_meets_the_goals(length: str) -> None:
    results = load(record_path("ssm/scan-speed")).results
    assert results["sizes"] == {"batch": 2, "channels": 256, "states": 16}
    modes = results["lengths"][length]
    for mode, most in (("forward", 0.45), ("forward_backward", 0.40)):
        assert modes[mode]["variants"]["chunked"]["ratio"]["median"] <= most
    assert modes["forward_backward"]["peak_bytes"]["chunked"] <= 250 * 2**20


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_the_time_grows_in_proportion_to_the_length(mode: str) -> None:
    lengths = load(record_path("ssm/scan-speed")).results["lengths"]
    seconds = {length: lengths[length][mode]["variants"]["chunked"]["seconds"]["median"] for length in ("2048", "8192")}
    assert seconds["8192"] / seconds["2048"] <= 4.6
