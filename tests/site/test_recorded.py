"""Recorded outputs: what is compared, and that a run which compares nothing is red."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Protocol

import nbformat
import pytest

from medarch.site.chapters import BookError, Project
from medarch.site.recorded import comparable, load_recorded, record, recorded, reference

pytest_plugins = ["pytester"]
FIRST, SECOND = "book/demo/first.md", "book/demo/second.md"


class Run(Protocol):
    """Run the fixture book's notebooks as `pytest --nbval book` does; exit status and what was printed."""

    def __call__(self, root: Path, *arguments: str, flag: str = "--nbval") -> tuple[int, str]: ...


@pytest.fixture
def nbval(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(root: Path, *arguments: str, flag: str = "--nbval") -> tuple[int, str]:
        monkeypatch.chdir(root)
        monkeypatch.setenv("MEDARCH_ROOT", str(root))
        options = ("--rootdir", str(root), "-p", "no:cacheprovider", "--color=no", "-ra", flag)
        result = pytester.runpytest_inprocess(*options, *(arguments or ("book",)))
        return int(result.ret), re.sub(r"\x1b\[[0-9;]*m", "", result.stdout.str() + result.stderr.str())

    return run


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf8")
    assert old in text
    path.write_text(text.replace(old, new), "utf8")


def test_unchanged_book_passes_and_every_kind_of_check_ran(nbval: Run, recorded_book: Path) -> None:
    status, text = nbval(recorded_book, "-v", "-n", "1", "--dist", "loadfile", "book")
    assert status == 0, text
    for item in (
        f"{FIRST}::cell 1",
        f"{FIRST}::starter of dice-two",
        f"{FIRST}::solution of dice-two",
        f"{SECOND}::cell 2",
    ):
        assert re.search(rf"PASSED {re.escape(item)}", text), text


def test_changed_output_starter_that_passes_and_solution_that_fails_are_red(nbval: Run, recorded_book: Path) -> None:
    stored = reference(Project(recorded_book), "demo/first")
    edit(stored, "faces: 6", "faces: 7")
    edit(recorded_book / FIRST, "answer = 2 * sum(faces) / len(faces)", "answer = sum(faces) / len(faces)")
    for path in (recorded_book / FIRST, stored):  # the stale gate would otherwise speak first
        edit(path, "answer - 7) < 1e-9", "(answer or 7) - 7) < 1e-9")
    edit(stored, re.search(r'"not yet: .*?\\n"', stored.read_text("utf8"))[0], '"correct: dice-two\\n"')  # type: ignore[index]
    status, text = nbval(recorded_book, FIRST)
    assert status == 1
    assert "book/demo/first.md:34" in text
    assert "medarch record demo/first" in text
    assert "FAILED book/demo/first.md::cell 1" in text
    assert "FAILED book/demo/first.md::starter of dice-two" in text
    assert "should say 'not yet'" in text
    assert "FAILED book/demo/first.md::solution of dice-two" in text
    assert "should say 'correct'" in text
    assert text.count("FAILED ") == 3, text


def test_missing_and_empty_records_are_collection_errors(nbval: Run, recorded_book: Path) -> None:
    project = Project(recorded_book)
    reference(project, "demo/second").unlink()
    stored = json.loads(reference(project, "demo/first").read_text("utf8"))
    for cell in stored["cells"]:
        image = [{"output_type": "display_data", "metadata": {}, "data": {"text/plain": "(image/png)"}}]
        cell.update(outputs=image, execution_count=1)
    reference(project, "demo/first").write_text(json.dumps(stored), "utf8")
    status, text = nbval(recorded_book)
    assert status == 2
    assert "tests/reference/demo/second.ipynb:1: book/demo/second.md has no recorded outputs" in text
    assert "medarch record demo/second" in text
    assert "book/demo/first.md:1: no cell of the chapter is compared with its record" in text


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('print("faces:", len(faces))', 'print("faces:", 6)', "book/demo/first.md:34: the cell differs from the one recorded"),
        (":tags: [slide]", ":tags: [slide, nbval-ignore-output]", "book/demo/first.md:52: the cell differs"),
        ("## Exercises", "```{code-cell} ipython3\n2 + 2\n```\n\n## Exercises", "the cell differs"),
        ("## The lecture's", "```{code-cell} ipython3\n2 + 2\n```\n\n## The lecture's", "6 code cells, but tests/reference/demo/first.ipynb records 5"),
    ],
)  # fmt: skip
def test_stale_record_is_told_by_cell(recorded_book: Path, old: str, new: str, told: str) -> None:
    edit(recorded_book / FIRST, old, new)
    project = Project(recorded_book)
    with pytest.raises(BookError, match="run `medarch record demo/first`") as caught:
        load_recorded(project, project.chapters["demo/first"])
    assert told in str(caught.value)


def test_damaged_record_is_told(recorded_book: Path) -> None:
    project = Project(recorded_book)
    reference(project, "demo/first").write_text("{", "utf8")
    with pytest.raises(BookError, match=r"first.ipynb:1: the recorded outputs cannot be read"):
        load_recorded(project, project.chapters["demo/first"])


def test_lax_compares_only_tagged_cells_and_demands_one(nbval: Run, recorded_book: Path) -> None:
    stored = reference(Project(recorded_book), "demo/second")
    tagged = "```{code-cell} ipython3\n:tags: [nbval-check-output]\nfrom math"
    edit(recorded_book / SECOND, "```{code-cell} ipython3\nfrom math", tagged)
    notebook = json.loads(stored.read_text("utf8"))
    notebook["cells"][0]["metadata"] = {"tags": ["nbval-check-output"]}
    stored.write_text(json.dumps(notebook), "utf8")
    status, text = nbval(recorded_book, "--continue-on-collection-errors", "book", flag="--nbval-lax")
    assert status == 1
    assert "2 passed" in text
    assert "1 error" in text
    assert "book/demo/first.md:1: no cell of the chapter is compared with its record (--nbval-lax" in text


def test_a_run_that_compares_nothing_fails(nbval: Run, recorded_book: Path) -> None:
    (recorded_book / FIRST).write_text("# A page without cells\n", "utf8")
    (recorded_book / "test_other.py").write_text("def test_other():\n    pass\n", "utf8")
    status, text = nbval(recorded_book, FIRST, "test_other.py")
    assert "1 passed" in text
    assert status == 1
    assert "compared no recorded output" in text


def test_record_keeps_text_of_checked_cells_alone_and_is_deterministic(recorded_book: Path) -> None:
    project = Project(recorded_book)
    chapter = project.chapters["demo/second"]
    executed = nbformat.from_dict(chapter.notebook)
    one, two = (cell for cell in executed.cells if cell.cell_type == "code")
    display = nbformat.v4.new_output
    one.outputs = [
        display("stream", name="stdout", text="a"), display("display_data", {"image/png": "AAAA", "text/plain": "<Figure>"}),
        display("stream", name="stdout", text="b\n"),
        display("display_data", {"application/papermill.record/text/plain": "1.0"}, metadata={"scrapbook": {"name": "x"}}),
        display("execute_result", {"text/plain": "3", "text/html": "<b>3</b>"}, execution_count=7),
    ]  # fmt: skip
    two.outputs = [display("stream", name="stdout", text="process 12\n")]
    small = recorded(chapter, executed)
    nbformat.validate(small)
    assert [dict(out) for out in small.cells[0].outputs] == [
        {"output_type": "stream", "name": "stdout", "text": "ab\n"},
        {"output_type": "display_data", "metadata": {}, "data": {"text/plain": "(image/png)"}},
        {"output_type": "display_data", "metadata": {}, "data": {"text/plain": "3"}},
    ]
    assert small.cells[1].outputs == []
    assert small.cells[1].execution_count is None
    reference(project, "demo/second").unlink()
    assert record(project, [chapter], {"demo/second": executed}) == [reference(project, "demo/second")]
    before = reference(project, "demo/second").read_bytes()
    assert record(project, [chapter], {"demo/second": executed}) == []
    assert reference(project, "demo/second").read_bytes() == before
    assert b"scrapbook" not in before


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_comparable_leaves_its_argument_alone(stream: str) -> None:
    outputs = [nbformat.v4.new_output("stream", name=stream, text=text) for text in ("a", "b")]
    assert comparable(outputs)[0].text == "ab"
    assert [output.text for output in outputs] == ["a", "b"]
