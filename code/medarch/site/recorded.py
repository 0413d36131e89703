"""``pytest --nbval book``: each chapter run anew and compared with its recorded outputs.

A pytest plugin over nbval. One execution serves two checks: the checked cells print what is recorded, and each
exercise's starter says "not yet" and its solution "correct". What compares nothing (a missing, stale or empty record,
a run without a comparison) is an error; nbval alone lets it pass.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbval.plugin import IPyNbCell, IPyNbFile, coalesce_streams, find_metadata_tags

from medarch.site.chapters import BookError, Chapter, Project, read_chapter
from medarch.site.execute import kernel_environment, write_if_changed
from medarch.site.markup import exercises

SAYS = {"starter": "not yet: ", "solution": "correct: "}


def reference(project: Project, name: str) -> Path:
    """The recorded notebook of a chapter."""
    return project.root / "tests" / "reference" / f"{name}.ipynb"


def comparable(outputs: Iterable[Any]) -> list[NotebookNode]:
    """What of a cell's outputs is compared: streams, text of displays and errors, presence of images."""
    kept = []
    for output in coalesce_streams([nbformat.from_dict(dict(output)) for output in outputs]):
        if output.output_type == "stream":
            kept.append(new_output("stream", name=output.name, text=output.text))
        elif output.output_type == "error":
            kept.append(new_output("error", ename=output.ename, evalue=output.evalue))
        elif "scrapbook" not in output.metadata:
            image = next((mime for mime in output.data if mime.startswith("image/")), None)
            text = f"({image})" if image else output.data.get("text/plain", "")
            kept.append(new_output("display_data", {"text/plain": text}))
    return kept


def says(outputs: Iterable[Any]) -> bool:
    """Whether comparable outputs hold any text to compare, an image's stand-in being none."""
    return any(not output.get("data", {}).get("text/plain", "").startswith("(image/") for output in outputs)


def recorded(chapter: Chapter, executed: NotebookNode) -> NotebookNode:
    """The small notebook that stands for a run: all code, and the comparable outputs of checked cells."""
    runs, cells = [cell for cell in executed.cells if cell.cell_type == "code"], []
    for number, ((_, cell), run) in enumerate(zip(chapter.code_cells, runs, strict=True)):
        tags, options = list(cell.metadata.get("tags", [])), dict(find_metadata_tags(cell.metadata))
        kept = new_code_cell(cell.source, id=f"cell-{number}", metadata={"tags": tags} if tags else {})
        if options.get("check", True) and not options.get("skip"):
            kept.update(outputs=comparable(run.outputs), execution_count=1)
        cells.append(kept)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def record(project: Project, chapters: Iterable[Chapter], executed: Mapping[str, NotebookNode]) -> list[Path]:
    """Write the recorded notebooks of executed chapters, and return those that changed, for review."""
    texts = {
        reference(project, chapter.name): nbformat.writes(recorded(chapter, executed[chapter.name])) + "\n"
        for chapter in chapters
    }
    return [path for path, text in texts.items() if write_if_changed(path, text)]


def load_recorded(project: Project, chapter: Chapter) -> NotebookNode:
    """A chapter's recorded notebook, if it is there and belongs to the chapter as it stands."""
    path = reference(project, chapter.name)
    file, remedy = path.relative_to(project.root).as_posix(), f"run `medarch record {chapter.name}` and review the diff"
    if not path.is_file():
        raise BookError.at(file, 1, f"{chapter.file} has no recorded outputs", remedy)
    try:
        stored = nbformat.read(path, as_version=4)
    except Exception as error:
        raise BookError.at(file, 1, f"the recorded outputs cannot be read: {error}", remedy) from error
    for (line, cell), kept in zip(chapter.code_cells, stored.cells, strict=False):
        if (cell.source, cell.metadata.get("tags", [])) != (kept.source, kept.metadata.get("tags", [])):
            raise BookError.at(chapter.file, line, f"the cell differs from the one recorded in {file}", remedy)
    ours, theirs = len(chapter.code_cells), len(stored.cells)
    if ours != theirs:
        raise BookError.at(chapter.file, 1, f"{ours} code cells, but {file} records {theirs}", remedy)
    return stored


class ChapterCell(IPyNbCell):
    """A cell of the chapter, compared with its record."""

    line = 1

    def compare_outputs(self, test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
        if says(ref):
            self.user_properties.append(("compared", self.name))
        return bool(super().compare_outputs(comparable(test), ref, skip_compare))

    def repr_failure(self, excinfo: Any) -> str:
        if isinstance(excinfo.value, BookError):
            return str(excinfo.value)
        remedy = f"mend the cell; if the change is meant, `medarch record {self.parent.chapter}`"
        return f"{self.path}:{self.line}: {super().repr_failure(excinfo)}\n    -> {remedy}"

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.line - 1, self.name


class ExerciseCell(ChapterCell):
    """A starter or a solution, in a copy of the chapter's namespace; its verdicts must be as they should."""

    def compare_outputs(self, test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
        wanted = SAYS[self.name.split(" ")[0]]
        printed = "".join(output.get("text", "") for output in test).strip()
        verdicts = [line for line in printed.splitlines() if line.startswith(tuple(SAYS.values()))]
        if not verdicts or not all(line.startswith(wanted) for line in verdicts):
            told = f"{self.name} printed {printed!r} and should say {wanted[:-2]!r}"
            raise BookError.at(str(self.path), self.line, told, "mend its checker, starter or solution")
        return True


class ChapterFile(IPyNbFile):
    """A chapter as nbval's notebook file."""

    def collect(self) -> Iterator[IPyNbCell]:
        project = Project(self.config.rootpath)
        self.chapter = self.path.relative_to(project.book).with_suffix("").as_posix()
        try:
            chapter = read_chapter(project.root, self.chapter) if self.chapter in project.toc else None
            if chapter is not None:
                self.nb = load_recorded(project, chapter)
                yield from self._cells(chapter)
        except BookError as error:
            raise self.CollectError(str(error)) from error

    def _cells(self, chapter: Chapter) -> Iterator[IPyNbCell]:
        compared = False
        for number, ((line, _), cell) in enumerate(zip(chapter.code_cells, self.nb.cells, strict=True)):
            options = {"check": self.compare_outputs, **dict(find_metadata_tags(cell.metadata))}
            compared = compared or (options["check"] and says(cell.outputs))
            yield self._cell(ChapterCell, f"cell {number + 1} (line {line})", number, cell, options, line)
        if not compared:
            lax = "" if self.compare_outputs else " (--nbval-lax compares those tagged nbval-check-output)"
            remedy = "let a checked cell print what must not drift, then `medarch record`"
            raise BookError.at(chapter.file, 1, f"no cell of the chapter is compared with its record{lax}", remedy)
        for label, parts in exercises(chapter).items():
            for kind in SAYS:
                for line, source in parts[kind]:
                    code = f"exec(compile({source!r}, {f'<{kind} of {label}>'!r}, 'exec'), dict(globals()))"
                    cell = new_code_cell(code, execution_count=1)
                    yield self._cell(
                        ExerciseCell, f"{kind} of {label}", len(self.nb.cells), cell, {"check": True}, line
                    )

    def _cell(self, kind: Any, name: str, number: int, cell: NotebookNode, options: dict[str, bool], line: int) -> Any:
        item = kind.from_parent(self, name=name, cell_num=number, cell=cell, options=defaultdict(bool, options))
        item.line = line
        return item

    def setup(self) -> None:
        with patch.dict(os.environ, kernel_environment(self.config.rootpath), clear=True):
            super().setup()


def pytest_collect_file(file_path: Path, parent: Any) -> ChapterFile | None:
    """Chapters are the markdown files below ``book/`` of pytest's root folder."""
    asked = parent.config.option.nbval or parent.config.option.nbval_lax
    inside = file_path.suffix == ".md" and file_path.is_relative_to(parent.config.rootpath / "book")
    return ChapterFile.from_parent(parent, path=file_path) if inside and asked else None


class _Tally:
    """Counts comparisons over all workers; a run that asked for them and made none has failed."""

    compared = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.compared += report.when == "call" and any(key == "compared" for key, _ in report.user_properties)

    def pytest_sessionfinish(self, session: Any) -> None:
        option = session.config.option
        if not self.compared and (option.nbval or option.nbval_lax) and not option.collectonly:
            print("\nERROR: --nbval compared no recorded output: name a chapter, or `pytest --nbval book`")
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: Any) -> None:
    """Count on the process that gathers the reports."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Tally())
