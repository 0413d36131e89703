"""The speed of state space duality: nothing is timed before all agree, and the record meets its goals."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from medarch.bench.records import load, record_path
from medarch.ssm import study_ssd
from medarch.ssm.study_ssd import MODES, STATE_SIZES, Variant, build_variants, check_agreement, listing, make_inputs


def test_a_quick_run_gives_every_comparison() -> None:
    results = study_ssd.ssd_speed(quick=True)
    json.dumps(results)
    variants = {"ssd", "ssd_64", "listing_32", "listing_64", "transformers_256", "quadratic", "recurrent"}
    for mode in MODES:
        timed = results["variants"][mode]
        assert timed["baseline"] == "ssd"
        assert set(timed["variants"]) == set(timed["peak_bytes"]) == variants | {"selective_scan"}
        assert all(entry["seconds"]["median"] > 0 for entry in timed["variants"].values())
        assert set(results["growth"][mode]["variants"]) == {"24", "48", "96", "192"}
        assert set(results["chunks"][mode]["variants"]) == {"8", "16", "32", "64", "128", "256"}
        assert all(results["states"][str(states)][mode]["baseline"] == "selective_scan" for states in STATE_SIZES)
    assert set(results["lengths"]["48"]["variants"]) == {"recurrent", "quadratic", "ssd"}
    assert set(results["lengths"]["192"]["variants"]) == {"ssd"}


def test_a_variant_that_disagrees_is_not_timed() -> None:
    variants, inputs = build_variants(), make_inputs(45, head_dim=3)
    check_agreement(variants, inputs)
    late = Variant(lambda **given: listing(**given).roll(1, dims=1))
    with pytest.raises(ValueError, match="late disagrees with the recurrence in y"):
        check_agreement({**variants, "late": late}, inputs)

    def untrained(**given: torch.Tensor) -> torch.Tensor:
        return listing(**{**given, "A": given["A"].detach()}) + 0 * given["A"].sum()

    with pytest.raises(ValueError, match="untrained disagrees with the recurrence in A"):
        check_agreement({**variants, "untrained": Variant(untrained)}, inputs)


@pytest.mark.parametrize("mode", MODES)
def test_the_committed_record_meets_the_goals(mode: str) -> None:
    results = load(record_path("ssm/ssd-speed")).results
    assert results["sizes"]["length"] == 2048, "a quick run is no record"
    slower = {name: entry["ratio"]["median"] for name, entry in results["variants"][mode]["variants"].items()}
    assert slower["listing_64"] >= 1 / 0.6
    assert slower["recurrent"] >= 8
    assert slower["selective_scan"] >= 3
    assert slower["transformers_256"] >= 2
    growth = {int(length): entry["ratio"]["median"] for length, entry in results["growth"][mode]["variants"].items()}
    lengths = sorted(growth)
    assert all(growth[after] / growth[before] < 2.6 for before, after in pairwise(lengths))
    faster = [results["states"][str(states)][mode]["variants"]["ssd"]["ratio"]["median"] for states in STATE_SIZES]
    assert faster == sorted(faster, reverse=True), "the advantage should grow with the state"
