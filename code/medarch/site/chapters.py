"""The project's folders, its table of contents and its chapters, read once and checked at the door.

A *page* is any markdown file in ``_toc.yml``; a *chapter* is a page with the jupytext header, that is, a notebook.
Every fault found in one is a :class:`Fault`, with file, line and remedy, so that an author is never left to search.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat
import yaml

from medarch.book.ledger import find_book

MAX_SECONDS, MAX_LAB_SECONDS, MAX_BOOK_SECONDS = 25, 45, 600
FIELDS = ("seconds", "covers", "requires", "description", "bloom")


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

    def __init__(self, faults: Iterable[Fault]):
        self.faults = sorted(set(faults))
        super().__init__("\n".join(str(fault) for fault in self.faults))

    @classmethod
    def at(cls, file: str, line: int, message: str, remedy: str) -> BookError:
        """The error of a single fault."""
        return cls([Fault(file, line, message, remedy)])


@dataclass(frozen=True)
class Chapter:
    """A page that is a notebook: its name (``moe/architecture``), path from the root, metadata, cells and text."""

    name: str
    file: str
    root: Path
    meta: dict[str, Any]
    notebook: nbformat.NotebookNode = field(repr=False, compare=False)
    text: str = field(repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The chapter's file."""
        return self.root / self.file

    @property
    def seconds(self) -> float:
        """The processor time that the chapter says it needs at most, kernel start included."""
        return float(self.meta["seconds"])

    @cached_property
    def code_cells(self) -> list[tuple[int, nbformat.NotebookNode]]:
        """Each code cell with the line of the file on which its code begins, after its options."""
        lines, found = self.text.splitlines(), []
        for start, cell in zip(self.notebook.metadata["source_map"], self.notebook.cells, strict=True):
            if cell.cell_type == "code":
                first = (cell.source.splitlines() or [""])[0].strip()
                line = next((n for n in range(start, len(lines)) if lines[n].strip() == first), start)
                found.append((line + 1, cell))
        return found


class Project:
    """The folders of the book, found from any place inside it, and the chapters of its table of contents."""

    def __init__(self, root: Path | str):
        self.root = Path(root).resolve()
        self.book = self.root / "book"
        self.build = self.root / "_build"
        self.device = os.environ.get("MEDARCH_DEVICE", "cpu")
        self.cache = self.build / "cache" / self.device  # jupyter-cache's; outputs differ between classes of device
        self.evidence = self.build / "evidence"  # what the current run of each chapter measured
        self.html = self.build / "html"  # the finished site

    @classmethod
    def find(cls) -> Project:
        """The project around ``MEDARCH_ROOT`` or the working directory.

        Raises:
            BookError: where no folder above holds a ``_toc.yml``.
        """
        try:
            return cls(find_book().parent)
        except FileNotFoundError as error:
            remedy = "change into the clone of the book, or set MEDARCH_ROOT to it"
            raise BookError.at("_toc.yml", 1, f"there is no book here: {error}", remedy) from error

    @cached_property
    def toc(self) -> list[str]:
        """The names of all pages in the order of ``_toc.yml``, without ``book/`` in front.

        Raises:
            BookError: for a page that is listed twice or has no file.
        """
        text, faults = (self.root / "_toc.yml").read_text("utf8"), []
        names = [name.removeprefix("book/").removesuffix(".md") for name in _files(yaml.safe_load(text))]
        written = [path.relative_to(self.book).with_suffix("").as_posix() for path in self.book.rglob("*.md")]
        for name in names:
            line = line_of(text, f"book/{name}")
            if names.count(name) > 1:
                faults.append(Fault("_toc.yml", line, f"{name} is listed twice", "keep one of the two entries"))
            if not self.page(name).is_file():
                remedy = f"write it or correct the name{nearest(name, written)}"
                faults.append(Fault("_toc.yml", line, f"book/{name}.md does not exist", remedy))
        if faults:
            raise BookError(faults)
        return names

    def page(self, name: str) -> Path:
        """The file of a page."""
        return self.book / f"{name}.md"

    @cached_property
    def chapters(self) -> dict[str, Chapter]:
        """The chapters of the table of contents by name.

        Raises:
            BookError: with every fault of every chapter's front matter.
        """
        found, faults = {}, []
        for name in self.toc:
            try:
                chapter = read_chapter(self.root, name)
            except BookError as error:
                faults.extend(error.faults)
                continue
            if chapter is not None:
                found[name] = chapter
        total = sum(chapter.seconds for chapter in found.values())
        if total > MAX_BOOK_SECONDS:
            told = f"the chapters declare {total:g} s together, and {MAX_BOOK_SECONDS} s is the limit"
            faults.append(
                Fault("_toc.yml", 1, told, "move the slowest cells into records (see CONTRIBUTING.md, Records)")
            )
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
                remedy = f"name one of the table of contents{nearest(short, self.chapters)}"
                raise BookError.at("_toc.yml", 1, f"there is no chapter {name!r}", remedy)
            picked.append(self.chapters[short])
        return picked or list(self.chapters.values())


def _files(node: Any) -> Iterator[str]:
    """Every file that a piece of the table of contents names."""
    if isinstance(node, dict):
        yield from (node[key] for key in ("root", "file") if key in node)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _files(child)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a remedy: the known names that resemble a wrong one."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; nearest: {', '.join(near)}" if near else ""


def line_of(text: str, needle: str) -> int:
    """The first line of ``text`` that holds ``needle``, counted from one; 1 where none does."""
    return next((number for number, line in enumerate(text.splitlines(), start=1) if needle in line), 1)


def read_chapter(root: Path, name: str) -> Chapter | None:
    """Read a page as a chapter; ``None`` where it is a plain page.

    Raises:
        BookError: for code cells without a jupytext header, unreadable front matter, or missing or impossible
            ``medarch:`` metadata.
    """
    # myst-nb takes half a second to import: commands that read no chapter should not wait for it.
    from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook

    file = f"book/{name}.md"
    text = (root / file).read_text("utf8")
    if not is_myst_markdown_notebook(text):
        if re.search(r"(?m)^```+\{code-cell\}", text):
            told = "the page has code cells but no jupytext header, so they would never run"
            remedy = "begin with the front matter that `medarch new-chapter` writes (jupytext, kernelspec, medarch)"
            raise BookError.at(file, 1, told, remedy)
        return None
    try:
        notebook = read_myst_markdown_notebook(text, add_source_map=True, path=root / file)
    except Exception as error:
        match, told = re.search(r"line (\d+)", str(error)), f"the page cannot be read as a notebook: {error}"
        remedy = "mend the front matter or the cell that the message names"
        raise BookError.at(file, int(match[1]) if match else 1, told, remedy) from error
    meta, faults = notebook.metadata.get("medarch") or {}, []
    kind, limit = ("lab", MAX_LAB_SECONDS) if name.startswith("labs/") else ("chapter", MAX_SECONDS)
    seconds, covers = meta.get("seconds"), meta.get("covers")
    if not isinstance(seconds, int | float) or not 0 < seconds <= limit:
        told = f"medarch.seconds is {seconds!r}; a {kind} declares more than 0 and at most {limit}"
        faults.append((told, "measure with `medarch build` and declare, or move slow work into a record"))
    if not isinstance(covers, list):
        told = f"medarch.covers is {covers!r}; it lists the sections of the sources that the chapter covers"
        faults.append((told, "write a list of ids from book/sources.yml, or [] where it covers none"))
    if unknown := set(meta) - set(FIELDS):
        faults.append((f"unknown medarch metadata: {', '.join(sorted(unknown))}", f"use {', '.join(FIELDS)}"))
    if faults:
        raise BookError(Fault(file, line_of(text, "medarch:"), *fault) for fault in faults)
    return Chapter(name, file, root, dict(meta), notebook, text)
