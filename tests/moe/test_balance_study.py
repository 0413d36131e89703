"""The study of remedies runs through, and its record says what the chapter says."""

import json

import pytest
import torch

from medarch.bench.records import load, record_path
from medarch.moe import balance_study
from medarch.moe.balance_study import MEASURES, TREATMENTS, balancing_study
from medarch.moe.characters import Characters


def test_a_quick_run_holds_every_treatment_and_measure(tmp_path, monkeypatch):
    monkeypatch.setattr("medarch.bench.partial.repository_root", lambda: tmp_path)
    text = torch.randint(48, (3, 997), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(balance_study, "load_characters", lambda: Characters("x" * 48, *text))
    treatments = {name: TREATMENTS[name] for name in ("nothing", "one_expert", "capacity_1")}
    monkeypatch.setattr(balance_study, "TREATMENTS", treatments)
    results = balancing_study(quick=True)
    json.dumps(results, allow_nan=False)
    assert set(results["treatments"]) == set(treatments)
    for row in results["treatments"].values():
        assert all(len(row[measure]["values"]) == results["repeats"] == 2 for measure in MEASURES)
    assert results["treatments"]["one_expert"]["effective"]["values"] == [1, 1]
    assert results["treatments"]["capacity_1"]["dropped"]["mean"] > 0
    assert results["treatments"]["nothing"]["dropped"]["mean"] == 0


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="CPU alone"):
        balancing_study(device="cuda")


@pytest.fixture(scope="module")
def rows():
    record = load(record_path(balance_study.NAME))
    assert record.repeats == 4
    assert set(record.results["treatments"]) == set(TREATMENTS)
    return record.results["treatments"]


def mean(rows, name, measure):
    return rows[name][measure]["mean"]


def test_the_record_shows_collapse_and_two_cures(rows):
    assert mean(rows, "nothing", "effective") < 4.5
    assert max(rows["nothing"]["entropy"]["values"]) < 0.8
    for cure in ("auxiliary_0_01", "auxiliary_0_1", "bias_0_01"):
        assert min(rows[cure]["entropy"]["values"]) > 0.9
        assert mean(rows, cure, "bits") < mean(rows, "four_experts", "bits") < mean(rows, "nothing", "bits")
    # Eight collapsed experts predict only a little better than two balanced ones, and are further from four.
    two, four = [mean(rows, f"{count}_experts", "bits") for count in ("two", "four")]
    assert 0 < two - mean(rows, "nothing", "bits") < mean(rows, "nothing", "bits") - four
    assert mean(rows, "nothing", "bits") < mean(rows, "one_expert", "bits") - 0.05


def test_the_record_shows_the_price_of_too_little_and_too_much(rows):
    assert mean(rows, "auxiliary_0_001", "entropy") < 0.9
    assert mean(rows, "auxiliary_1", "entropy") > 0.99
    assert mean(rows, "auxiliary_1", "bits") > mean(rows, "auxiliary_0_1", "bits") + 0.02
    assert mean(rows, "bias_0_001", "entropy") > 0.95
    assert mean(rows, "bias_0_001", "bits") > mean(rows, "nothing", "bits") - 0.02


def test_the_record_shows_what_does_not_balance(rows):
    for strength in ("z_0_001", "z_0_01", "z_0_1"):
        assert mean(rows, strength, "effective") < mean(rows, "nothing", "effective")
    assert mean(rows, "noise", "entropy") < mean(rows, "nothing", "entropy") + 0.1
    assert mean(rows, "nothing", "entropy") < mean(rows, "capacity_1_25", "entropy") < 0.9
    assert mean(rows, "capacity_1_25", "bits") > mean(rows, "nothing", "bits") - 0.02
    assert mean(rows, "capacity_1_25", "dropped") > 0.25
    assert mean(rows, "capacity_1_25_auxiliary_0_01", "dropped") < 0.1
