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
