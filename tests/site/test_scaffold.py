"""A new chapter builds at once, and asks for no more than an author's words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from medarch.site.build import build_book
from medarch.site.chapters import BookError, Project
from medarch.site.execute import run_chapter
from medarch.site.lint import lint
from medarch.site.markup import exercises
from medarch.site.scaffold import new_chapter


def test_new_chapter_runs_builds_and_lacks_only_words_and_exercises(fixture_book: Path) -> None:
    path = new_chapter(Project(fixture_book), "demo/third-2.4.1", 'The "third" chapter')
    project = Project(fixture_book)
    assert project.toc[-1] == "demo/third-2.4.1"
    assert path == project.page("demo/third-2.4.1")
    chapter = project.chapters["demo/third-2.4.1"]
    executed, _ = run_chapter(chapter)
    printed = "".join(
        out.get("text", "") for cell in executed.cells if cell.cell_type == "code" for out in cell.outputs
    )
    assert "numbers in the example: 3" in printed
    assert "not yet: add the numbers" in printed
    site = build_book(project, report=lambda _: None)
    assert (site / "notebooks/demo/third-2.4.1.ipynb").is_file()
    assert list(exercises(chapter)) == ["demo-third-2-4-1-predict"]
    remaining = [fault.message for fault in lint(project, ["demo/third-2.4.1"])]
    assert [message.split(",")[0] for message in remaining] == ["1 exercises", "the chapter has 22 words"]


def test_table_of_contents_keeps_its_comments_and_order(fixture_book: Path) -> None:
    toc = fixture_book / "_toc.yml"
    text = toc.read_text("utf8").replace("- file: book/demo/first", "- file: book/demo/first  # the beginning")
    toc.write_text(text + "  - caption: Reference\n    chapters:\n", "utf8")
    toc.write_text(toc.read_text("utf8") + "      - file: book/claims\n", "utf8")
    (fixture_book / "book" / "claims.md").write_text("# Claims\n", "utf8")
    new_chapter(Project(fixture_book), "demo/third", "Third")
    new_chapter(Project(fixture_book), "cards/first", "Cards")
    assert Project(fixture_book).toc == [
        "index",
        "demo/first",
        "demo/second",
        "demo/third",
        "cards/first",
        "claims",
    ]
    assert "# the beginning" in toc.read_text("utf8")
    captions = [part["caption"] for part in yaml.safe_load(toc.read_text("utf8"))["parts"]]
    assert captions == ["Demonstration", "Cards", "Reference"]


@pytest.mark.parametrize(
    ("name", "title", "told"),
    [
        ("third", "T", "is no name of a chapter"),
        ("demo/../third", "T", "is no name of a chapter"),
        ("Demo/third", "T", "is no name of a chapter"),
        ("demo/third.md", "T", "is no name of a chapter"),
        ("demo/first", "T", "exists already"),
        ("demo/third", "  ", "the title is empty"),
    ],
)
def test_bad_names_write_nothing(fixture_book: Path, name: str, title: str, told: str) -> None:
    before = {path: path.read_bytes() for path in fixture_book.rglob("*") if path.is_file()}
    with pytest.raises(BookError, match=told):
        new_chapter(Project(fixture_book), name, title)
    assert {path: path.read_bytes() for path in fixture_book.rglob("*") if path.is_file()} == before
