"""The project's folders, its table of contents and its chapters, read once and checked at the door.

A *page* is any markdown file in ``_toc.yml``; a *chapter* is a page with the jupytext header, that is, a notebook. Every
fault found in one is a :class:`Fault`, with file, line and remedy, so that an author is never left to search.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat
import yaml

MAX_SECONDS, MAX_LAB_SECONDS, MAX_BOOK_SECONDS = 25, 45, 600


@dataclass(frozen=True, order=True)
class Fault:
    """One thing that is wrong: where, what, and what to do about it."""

    file: str
    line: int
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}\n    -> {self.remedy}"


class BookError(Exception):
    """One or more faults of the book; ``str()`` lists them all."""

    def __init__(self, faults: Fault | Iterable[Fault]):
        self.faults = [faults] if isinstance(faults, Fault) else sorted(set(faults))
        super().__init__("\n".join(str(fault) for fault in self.faults))


@dataclass(frozen=True)
class Chapter:
    """A page that is a notebook: its name (``moe/architecture``), file, metadata and cells."""

    name: str
    path: Path
    root: Path
    meta: dict[str, Any]
    notebook: nbformat.NotebookNode = field(repr=False, compare=False)

    @property
    def file(self) -> str:
        """The chapter's path from the root of the project, as messages name it."""
        return self.path.relative_to(self.root).as_posix()

    @property
    def seconds(self) -> float:
        """The processor time that the chapter says it needs at most, kernel start included."""
        return float(self.meta["seconds"])

    @property
    def code_cells(self) -> list[tuple[int, nbformat.NotebookNode]]:
        """Each code cell with the line of the file on which its first line of code or option stands."""
        lines = self.notebook.metadata["source_map"]
        return [
            (line + 1, cell)
            for line, cell in zip(lines, self.notebook.cells, strict=True)
            if cell.cell_type == "code"
        ]

    @property
    def source(self) -> str:
        """All code of the chapter, with IPython's magics as comments so that it parses as Python."""
        return "\n".join(
            re.sub(r"(?m)^(\s*)([%!])", r"\1# \2", cell.source) for _, cell in self.code_cells
        )


class Project:
    """The folders of the book, found from any place inside it, and the chapters of its table of contents."""

    def __init__(self, root: Path | str):
        self.root = Path(root).resolve()
        self.book = self.root / "book"
        self.build = self.root / "_build"
        self.device = os.environ.get("MEDARCH_DEVICE", "cpu")

    @classmethod
    def find(cls) -> Project:
        """The project around ``MEDARCH_ROOT`` or the working directory.

        Raises:
            BookError: where no folder above holds a ``_toc.yml``.
        """
        start = Path(os.environ.get("MEDARCH_ROOT") or Path.cwd()).resolve()
        for folder in (start, *start.parents):
            if (folder / "_toc.yml").is_file():
                return cls(folder)
        raise BookError(
            Fault(str(start), 1, "there is no book here: no _toc.yml in this folder or above it",
                  "change into the clone of the book, or set MEDARCH_ROOT to it")
        )  # fmt: skip

    @property
    def cache(self) -> Path:
        """jupyter-cache's folder; one for each class of device, since outputs differ between them."""
        return self.build / "cache" / self.device

    @property
    def evidence(self) -> Path:
        """What the current run of each chapter measured, one JSON file a chapter."""
        return self.build / "evidence"

    @property
    def html(self) -> Path:
        """The finished site."""
        return self.build / "html"

    @cached_property
    def toc(self) -> list[str]:
        """The names of all pages in the order of ``_toc.yml``, without ``book/`` in front.

        Raises:
            BookError: for a page that is listed twice or has no file.
        """
        path = self.root / "_toc.yml"
        text = path.read_text("utf8")
        names: list[str] = []
        faults = []

        def walk(node: Any) -> None:
            if isinstance(node, dict):
                for key in ("root", "file"):
                    if isinstance(node.get(key), str):
                        names.append(node[key].removeprefix("book/").removesuffix(".md"))
                for value in node.values():
                    walk(value)
            elif isinstance(node, list):
                for value in node:
                    walk(value)

        walk(yaml.safe_load(text))
        for name in names:
            line = line_of(text, f"book/{name}")
            if names.count(name) > 1:
                faults.append(Fault("_toc.yml", line, f"{name} is listed twice", "keep one of the two entries"))
            if not self.page(name).is_file():
                near = _nearest(name, self._written())
                faults.append(Fault("_toc.yml", line, f"book/{name}.md does not exist", f"write it or correct the name{near}"))
        if faults:
            raise BookError(faults)
        return names

    def page(self, name: str) -> Path:
        """The file of a page."""
        return self.book / f"{name}.md"

    def _written(self) -> list[str]:
        return [p.relative_to(self.book).with_suffix("").as_posix() for p in self.book.rglob("*.md")]

    @cached_property
    def chapters(self) -> dict[str, Chapter]:
        """The chapters of the table of contents by name.

        Raises:
            BookError: with every fault of every chapter's front matter.
        """
        found, faults = {}, []
        for name in self.toc:
            try:
                chapter = read_chapter(self.root, name, self.page(name))
            except BookError as error:
                faults.extend(error.faults)
                continue
            if chapter is not None:
                found[name] = chapter
        total = sum(chapter.seconds for chapter in found.values())
        if total > MAX_BOOK_SECONDS:
            faults.append(Fault("_toc.yml", 1, f"the chapters declare {total:g} s together, and {MAX_BOOK_SECONDS} s is the limit",
                                "move the slowest cells into records (see CONTRIBUTING.md, Records)"))  # fmt: skip
        if faults:
            raise BookError(faults)
        return found

    def pick(self, names: Iterable[str]) -> list[Chapter]:
        """The named chapters, or all.

        Raises:
            BookError: for an unknown name, with the nearest known ones.
        """
        picked = []
        for name in names:
            short = name.removeprefix("book/").removesuffix(".md")
            if short not in self.chapters:
                raise BookError(
                    Fault("_toc.yml", 1, f"there is no chapter {name!r}",
                          f"name one of the table of contents{_nearest(short, self.chapters)}")
                )  # fmt: skip
            picked.append(self.chapters[short])
        return picked or list(self.chapters.values())


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; nearest: {', '.join(near)}" if near else ""


def line_of(text: str, needle: str) -> int:
    """The first line of ``text`` that holds ``needle``, counted from one; 1 where none does."""
    for number, line in enumerate(text.splitlines(), start=1):
        if needle in line:
            return number
    return 1


def read_chapter(root: Path, name: str, path: Path) -> Chapter | None:
    """Read a page as a chapter; ``None`` where it is a plain page.

    Raises:
        BookError: for code cells without a jupytext header, unreadable front matter, or missing or impossible
            ``medarch:`` metadata.
    """
    # myst-nb takes half a second to import: commands that read no chapter should not wait for it.
    from myst_nb.core.config import NbParserConfig  # noqa: F401  (fails early where the installation is broken)
    from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook

    text, file = path.read_text("utf8"), path.relative_to(root).as_posix()
    if not is_myst_markdown_notebook(text):
        if "{code-cell}" in text and re.search(r"(?m)^```+\{code-cell\}", text):
            raise BookError(
                Fault(file, 1, "the page has code cells but no jupytext header, so they would never run",
                      "begin with the front matter that `medarch new-chapter` writes (jupytext, kernelspec, medarch)")
            )  # fmt: skip
        return None
    try:
        notebook = read_myst_markdown_notebook(text, add_source_map=True, path=path)
    except Exception as error:
        match = re.search(r"line (\d+)", str(error))
        raise BookError(
            Fault(file, int(match[1]) if match else 1, f"the page cannot be read as a notebook: {error}",
                  "mend the front matter or the cell that the message names")
        ) from error  # fmt: skip
    meta = notebook.metadata.get("medarch") or {}
    line = line_of(text, "medarch:")
    faults = []
    lab = name.startswith("labs/")
    limit = MAX_LAB_SECONDS if lab else MAX_SECONDS
    seconds = meta.get("seconds")
    if not isinstance(seconds, int | float) or not 0 < seconds <= limit:
        faults.append(Fault(file, line, f"medarch.seconds is {seconds!r}; a {'lab' if lab else 'chapter'} declares more than 0 and at most {limit}",
                            "measure with `medarch build` and declare, or move slow work into a record"))  # fmt: skip
    if not isinstance(meta.get("covers"), list):
        faults.append(Fault(file, line, f"medarch.covers is {meta.get('covers')!r}; it lists the sections of the sources that the chapter covers",
                            "write a list of ids from book/sources.yml, or [] where it covers none"))  # fmt: skip
    if unknown := set(meta) - {"seconds", "covers", "requires", "description", "bloom"}:
        faults.append(Fault(file, line, f"unknown medarch metadata: {', '.join(sorted(unknown))}",
                            "use seconds, covers, requires, description or bloom"))  # fmt: skip
    if faults:
        raise BookError(faults)
    return Chapter(name, path, root, dict(meta), notebook)
