"""The study of four architectures at a small size: its parts, differences and place among the records."""

from __future__ import annotations

import pytest

from medarch.bench.registry import find
from medarch.lm.catalogue import recipe_names


def test_every_recipe_and_every_pair(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from medarch.bench import partial as module

    monkeypatch.setattr(module, "repository_root", lambda: tmp_path)
    results = find("lm/architecture-spread").function(quick=True)
    assert list(results["models"]) == recipe_names()
    assert len(results["differences"]) == 6
    for pair, parts in results["differences"].items():
        left, right = pair.split("_minus_")
        values = [results["models"][name]["test"]["bits_per_byte"]["values"] for name in (left, right)]
        assert parts["test"]["values"] == pytest.approx([a - b for a, b in zip(*values, strict=True)])
        assert all(error > 0 for error in parts["test"]["standard_errors_over_documents"])
    assert {len(each["curves"]) for each in results["models"].values()} == {2}
