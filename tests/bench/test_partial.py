"""Finished parts of a long benchmark survive a kill, and only the code they were made with may use them."""

import pytest

from medarch.bench import partial
from medarch.bench.partial import Partials
from medarch.bench.registry import Benchmark


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDARCH_ROOT", str(tmp_path))

    def function(device="cpu", quick=False):
        return {}

    function.__module__ = "medarch.bench.timing"
    return Benchmark("herbs/mint", function, ("medarch.bench.memory",))


def never():
    raise AssertionError("computed again")


def test_a_finished_part_is_not_computed_again(benchmark):
    assert Partials(benchmark, "cpu").get("a", lambda: {"x": (1, 2)}) == {"x": [1, 2]}
    assert Partials(benchmark, "cpu").get("a", never) == {"x": [1, 2]}


def test_parts_are_kept_apart_by_device_size_and_code(benchmark, monkeypatch):
    Partials(benchmark, "cpu").get("a", lambda: 1)
    assert Partials(benchmark, "cuda").get("a", lambda: 2) == 2
    assert Partials(benchmark, "cpu", quick=True).get("a", lambda: 3) == 3
    monkeypatch.setattr(partial, "record_digest", lambda *arguments: "changed" * 8)
    assert Partials(benchmark, "cpu").get("a", lambda: 4) == 4


def test_an_interrupted_or_damaged_part_is_made_anew(benchmark):
    parts = Partials(benchmark, "cpu")
    with pytest.raises(KeyboardInterrupt):
        parts.get("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(ValueError, match="JSON"):
        parts.get("a", lambda: float("nan"))
    assert parts.get("a", lambda: 5) == 5
    (parts.folder / "a.json").write_text('{"x": ')
    assert parts.get("a", lambda: 6) == 6
    assert parts.get("a", never) == 6
