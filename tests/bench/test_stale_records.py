"""What a release refuses: records of earlier code, unless a dated waiver lets them pass."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from medarch.bench.commands import stale_records
from medarch.bench.records import Record, record_digest, save

TODAY = datetime.date(2026, 6, 1)


def put(folder: Path, digest: str | None = None) -> None:
    modules, own = ["medarch.bench.memory"], "medarch.bench.memory"
    record = Record(
        name="demo/sums", device={"class": "cpu"}, versions={}, commit=None, date="2026-01-02T03:04:05+00:00",
        seconds=1.0, digest=digest or record_digest(modules, own, []), modules=modules, own=own, repeats=3,
        command="medarch bench demo/sums", results={},
    )  # fmt: skip
    save(record, folder / "demo-sums.cpu.json")


def test_a_current_record_passes_and_a_stale_one_does_not(tmp_path: Path) -> None:
    put(tmp_path)
    assert stale_records(tmp_path, TODAY) == {}
    put(tmp_path, "0" * 64)
    ((name, remedy),) = stale_records(tmp_path, TODAY).items()
    assert name == "demo-sums.cpu.json"
    assert "`medarch bench demo/sums`" in remedy


@pytest.mark.parametrize(("until", "passes"), [("2026-06-01", True), ("2026-05-31", False)])
def test_a_waiver_holds_until_its_date(tmp_path: Path, until: str, passes: bool) -> None:
    put(tmp_path, "0" * 64)
    (tmp_path / "waivers.yml").write_text(f"- {{record: demo-sums.cpu.json, until: {until}, reason: a move}}\n")
    stale = stale_records(tmp_path, TODAY)
    assert (stale == {}) == passes
    assert passes or "its waiver ended on 2026-05-31" in stale["demo-sums.cpu.json"]


def test_a_waiver_without_a_date_or_a_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "waivers.yml").write_text("- {record: demo-sums.cpu.json, until: some day, reason: a move}\n")
    with pytest.raises(ValueError, match=r"waivers\.yml"):
        stale_records(tmp_path, TODAY)
