"""Records and tables as a chapter shows them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from medarch.bench import records
from medarch.bench.records import Record, record_digest, save
from medarch.book.records import show_record
from medarch.book.tables import Table


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "book/records").mkdir(parents=True)
    (tmp_path / "_toc.yml").write_text("root: book/index\n")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setenv("MEDARCH_ROOT", str(tmp_path))
    return tmp_path


def a_record() -> Record:
    modules, own = ["medarch.book.tables"], "medarch.book.tables"
    return Record(
        name="demo/sums", device={"class": "cpu", "cpu": "a processor", "cores": 2}, versions={}, commit=None,
        date="2026-01-02T03:04:05+00:00", seconds=1.0, digest=record_digest(modules, own, []), modules=modules,
        own=own, repeats=3, command="medarch bench demo/sums", results={"ratio": 1.5},
    )  # fmt: skip


def test_a_record_is_shown_with_its_device_and_its_command(book: Path, capsys: pytest.CaptureFixture) -> None:
    save(a_record(), records.record_path("demo/sums"))
    shown = show_record("demo/sums")
    assert shown["cpu"].results == {"ratio": 1.5}
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "Record of 2026-01-02 on a processor, 2 cores, made by `medarch bench demo/sums`."
    assert told[1].startswith("No record for the device class cuda yet")


def test_a_record_of_earlier_code_says_so(book: Path, capsys: pytest.CaptureFixture) -> None:
    save(dataclasses.replace(a_record(), digest="0" * 64), records.record_path("demo/sums"))
    assert not show_record("demo/sums")["cpu"].current
    assert "; measured with an earlier version of the code." in capsys.readouterr().out


def test_a_missing_record_names_the_command(book: Path) -> None:
    with pytest.raises(FileNotFoundError, match="medarch bench demo/sums"):
        show_record("demo/sums")


def test_a_table_is_markdown_on_the_page_and_aligned_text_elsewhere() -> None:
    table = Table(["what", "n"], [["one", 1], ["eleven", 11]])
    assert table._repr_markdown_() == "| what | n |\n| --- | ---: |\n| one | 1 |\n| eleven | 11 |"
    assert repr(table) == "what     n\none      1\neleven  11"
    with pytest.raises(ValueError, match="has 1 fields, the header 2"):
        Table(["what", "n"], [["one"]])
    with pytest.raises(ValueError, match="column 1 has no name"):
        Table(["", "n"], [["one", 1]])
