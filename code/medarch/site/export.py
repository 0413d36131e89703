"""A chapter as a notebook for readers: plain Markdown that JupyterLab shows well, solutions folded.

Sphinx is not run. Each directive and role that a chapter may use has its rendering here; one that has none is
a fault of the chapter, which is how the linter knows them too.
"""

from __future__ import annotations

import ast
import base64
import mimetypes
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from myst_nb.core.read import is_myst_markdown_notebook
from nbformat import NotebookNode

from medarch.book.ledger import Claim
from medarch.site.chapters import BookError, Chapter, Fault, Project
from medarch.site.chapters import _nearest as nearest
from medarch.site.evidence import read_claims, read_evidence
from medarch.site.execute import write_if_changed
from medarch.site.markup import Block, blocks, markdown_cells, walk

# fmt: off
ADMONITIONS = ("note", "tip", "warning", "important", "caution", "danger", "hint", "seealso", "admonition")
ASIDES = ("margin", "sidebar", "dropdown", "epigraph")
PLAIN = ("slide", "tab-set", "tab-item", "table")
CODE_ROLES = ("code", "class", "func", "meth", "mod", "py:class", "py:func", "py:meth", "py:mod")
HIDDEN = {"source_hidden": {"hide-input", "hide-cell", "remove-input", "remove-cell"},
          "outputs_hidden": {"hide-output", "hide-cell", "remove-output", "remove-cell"}}
# fmt: on
INLINE = re.compile(
    r"(?P<role>\{[\w:+-]+\})?(?P<ticks>`+)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)"
    r"|(?P<bang>!?)\[(?P<text>(?:[^\[\]`]|`[^`]*`)*)\]\((?P<url>[^()\s]+)\)(?:\{[^{}\n]*\})?",
    re.DOTALL,
)
PROSE = (
    (r"(?m)^(?:\([^()\n]+\)=|%.*|\{[#.][^{}\n]*\})[ \t]*$", ""),  # a target, a comment, attributes
    (r"(?m)^\[\^([\w-]+)\]: ", r"<sup>\1</sup> "),
    (r"\[\^([\w-]+)\]", r"<sup>\1</sup>"),
    (r"(?m)^(\S[^\n]*)\n: +", r"**\1**: "),  # a definition
    (r"\n{3,}", "\n\n"),
)


class Label(NamedTuple):
    """What a reference may name: its kind (section, or a directive), what is shown, its number, its line."""

    label: str
    kind: str
    shown: str
    number: int
    line: int


class Page:
    """What other pages may refer to in this one: its title and its labels."""

    def __init__(self, text: str):
        self.is_chapter = is_myst_markdown_notebook(text)
        found = re.search(r"(?m)^# +(.+)$", text)
        self.title = found[1].strip() if found else ""
        self.labels: list[Label] = []
        fenced: set[int] = set()
        count = {"math": 0, "figure": 0}
        for block in walk(text):
            if not block.name:
                fenced.update(range(block.line, block.line + block.end - block.start))
            kind, options, shown = block.name, block.options, block.argument
            if kind == "code-cell":
                kind, options = "figure", (options.get("mystnb") or {}).get("figure") or {}
                shown = options.get("caption") or ""
            elif kind == "figure":
                shown = " ".join(block.body.strip().split("\n\n")[0].split())
            label = options.get("label") or options.get("name")
            if kind in count and (
                label or (shown and kind == "figure")
            ):  # Sphinx numbers these, and no others
                count[kind] += 1
            if label:
                self.labels.append(Label(label, kind, shown or label, count.get(kind, 0), block.line))
        for number, line in enumerate(lines := text.splitlines(), start=1):
            if number not in fenced and (match := re.match(r"\(([^()`]+)\)=\s*$", line)):
                after = next((follow for follow in lines[number:] if follow.strip()), "")
                shown = after.lstrip("# ") if after.startswith("#") else match[1]
                self.labels.append(Label(match[1], "section", shown, 0, number))


@lru_cache(maxsize=256)
def _page(path: Path, changed: int) -> Page:
    return Page(path.read_text("utf8"))


def read_page(path: Path) -> Page:
    """The page's title and labels, read once for each state of the file."""
    return _page(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _bibliography(path: Path, changed: int) -> Any:
    from pybtex.database import parse_file

    return parse_file(str(path), "bibtex")


def _author_year(entry: Any) -> tuple[str, str]:
    from pybtex.richtext import Text

    people = entry.persons.get("author") or entry.persons.get("editor") or []
    names = [str(Text.from_latex(" ".join(p.prelast_names + p.last_names))) for p in people]
    who = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
    return who or str(Text.from_latex(entry.fields.get("title", ""))), entry.fields.get("year", "no date")


class _Reader:
    """Turns a chapter's Markdown into what can be read without Sphinx, and collects its faults."""

    def __init__(self, chapter: Chapter, claims: Mapping[str, Claim], evidence: Mapping[str, float] | None):
        self.chapter, self.claims, self.evidence = chapter, claims, evidence
        self.project = Project(chapter.root)
        self.pages = {name: read_page(self.project.page(name)) for name in {*self.project.toc, chapter.name}}
        self.labels = {
            label.label: (name, label) for name, page in self.pages.items() for label in page.labels
        }
        self.faults: list[Fault] = []
        self.cited: dict[str, Any] = {}
        # fmt: off
        self.directives: dict[str, Callable[[Block], str]] = {
            **dict.fromkeys((*ADMONITIONS, *ASIDES), self._quote), **dict.fromkeys(PLAIN, self._plain),
            "code-block": self._code, "literalinclude": self._source, "math": self._math,
            "figure": self._figure, "image": self._figure, "exercise": self._exercise,
            "solution": self._solution, "claims-table": self._claims_table, "bibliography": lambda block: "",
        }
        self.roles: dict[str, Callable[[str, int], str]] = {
            "sub": lambda text, _: f"<sub>{text}</sub>", "sup": lambda text, _: f"<sup>{text}</sup>",
            "math": lambda text, _: f"${text}$", "term": lambda text, _: text.partition(" <")[0],
            **dict.fromkeys(CODE_ROLES, lambda text, _: f"`{re.sub(r'^~.*[.]', '', text)}`"),
            "ref": self._ref, "eq": self._ref, "doc": self._doc,
            "numref": lambda text, line: self._ref(text, line, numbered=True),
            "cite": self._cite, "cite:p": self._cite,
            "cite:t": lambda text, line: self._cite(text, line, in_text=True),
            "claim": lambda text, line: self._find(self.claims, text, line, "claim") and "",
            "proved": self._proved,
        }
        # fmt: on

    def _fault(self, line: int, message: str, remedy: str) -> str:
        self.faults.append(Fault(self.chapter.file, line, message, remedy))
        return ""

    def _find(self, table: Mapping[str, Any], key: str, line: int, what: str) -> Any:
        """An entry of a table; where there is none, a fault with the nearest, and ``""``."""
        if key in table:
            return table[key]
        offer = f"use one of {', '.join(sorted(table))}" if len(table) < 50 else "correct it, or add it"
        return self._fault(line, f"there is no {what} {key!r}", offer + nearest(key, table))

    def text(self, text: str, line: int) -> str:
        """Markdown with its directives, roles and links resolved; its first line is ``line`` of the file."""
        lines, done, at = text.splitlines(), [""], 0
        for block in blocks(text, line):
            done.append(self.inline("\n".join(lines[at : block.start]), line + at))
            at = block.end
            plain = "\n".join(lines[block.start : block.end])
            if block.name:
                render = self._find(self.directives, block.name, block.line, "directive")
                rest = re.sub(r"[^\s>]", " ", block.prefix)
                plain = block.prefix + textwrap.indent(render(block) if render else "", rest).removeprefix(
                    rest
                )
            if plain.strip():
                done.append(plain)
            else:
                done[-1] = done[-1].rstrip("\n")
        done.append(self.inline("\n".join(lines[at:]), line + at))
        return "\n".join(done).strip("\n")

    def inline(self, text: str, line: int) -> str:
        """Prose between directives: roles, links, comments, targets, attributes, notes and definitions."""
        text = re.sub(r"[ \n]\{claim\}`", "{claim}`", text)
        text = INLINE.sub(lambda m: self._inline(m, line + text.count("\n", 0, m.start())), text)
        for pattern, plain in PROSE:
            text = re.sub(pattern, plain, text)
        return text

    def _inline(self, match: re.Match[str], line: int) -> str:
        if match["role"]:
            render = self._find(self.roles, match["role"][1:-1], line, "role")
            return render(" ".join(match["code"].split()), line) if render else ""
        if match["url"] is None:  # plain code
            return match[0]
        shown, url = match["text"], match["url"]
        if match["bang"]:
            return self._image(url, shown, line)
        shown = self.inline(shown, line)
        path, _, label = url.partition("#")
        if re.match(r"[a-z]+:", url):
            return f"[{shown}]({url})"
        if path.endswith(".md"):
            return self._doc(f"{shown} <{path}>", line)
        if label in self.labels or not shown:
            return self._ref(f"{shown} <{label}>", line)
        return shown

    def _ref(self, text: str, line: int, numbered: bool = False) -> str:
        shown, target = _split(text)
        page, label = self._find(self.labels, target, line, "label") or ("", None)
        if label is None:
            return ""
        if label.kind == "math":
            return shown or f"({label.number})"
        default = f"Figure {label.number}" if numbered and label.kind == "figure" else label.shown
        return self._link(re.sub(r"%s|\{number\}", str(label.number), shown) or default, page)

    def _doc(self, text: str, line: int) -> str:
        shown, target = _split(text)
        folder = "" if target.startswith("/") else f"/book/{Path(self.chapter.name).parent}/"
        name = os.path.normpath(folder + target).removeprefix("/book/").removesuffix(".md")
        page = self._find(self.pages, name, line, "page")
        return self._link(shown or page.title, name) if page else ""

    def _link(self, shown: str, name: str) -> str:
        """A link to another chapter's notebook; within a page, and to pages without one, the text alone."""
        if name == self.chapter.name or not self.pages[name].is_chapter:
            return shown
        return f"[{shown}]({os.path.relpath(name, Path(self.chapter.name).parent)}.ipynb)"

    def _file(self, path: str, line: int) -> Path | None:
        file = self.chapter.root / path[1:] if path.startswith("/") else self.chapter.path.parent / path
        if not file.is_file():
            self._fault(
                line, f"the file {path!r} does not exist", "correct the path, from the chapter's folder"
            )
            return None
        return file

    def _image(self, path: str, alt: str, line: int) -> str:
        """An image inside the notebook, as a data address: JupyterLab shows no SVG attachments."""
        if re.match(r"[a-z]+:", path) or not (file := self._file(path, line)):
            return f"![{alt}]({path})"
        data = base64.b64encode(file.read_bytes()).decode()
        return f"![{' '.join(alt.split())}](data:{mimetypes.guess_type(file.name)[0]};base64,{data})"

    def _cite(self, text: str, line: int, in_text: bool = False) -> str:
        path = self.project.book / "references.bib"
        entries = _bibliography(path, path.stat().st_mtime_ns).entries if path.is_file() else {}
        found = {
            key: self._find(entries, key, line, "entry in references.bib")
            for key in re.split(r"\s*,\s*", text)
        }
        self.cited |= found
        named = [_author_year(entry) for entry in found.values() if entry]
        if in_text:
            return " and ".join(f"{who} ({year})" for who, year in named)
        return f"({'; '.join(f'{who}, {year}' for who, year in named)})"

    def references(self) -> str:
        """The list of what the chapter cites, formatted by pybtex."""
        from pybtex.plugin import find_plugin

        path = self.project.book / "references.bib"
        data, backend = (
            _bibliography(path, path.stat().st_mtime_ns),
            find_plugin("pybtex.backends", "markdown")(),
        )
        style = find_plugin("pybtex.style.formatting", "unsrt")()
        entries = style.format_bibliography(data, list(self.cited))
        return "\n".join(
            ["## References\n", *("- " + " ".join(e.text.render(backend).split()) for e in entries)]
        )

    def _proved(self, text: str, line: int) -> str:
        claim_id, _, form = text.partition(":")
        claim = self._find(self.claims, claim_id, line, "claim")
        values = self.evidence
        if values is None and claim:
            values = (read_evidence(self.project, claim.chapter) or {"claims": {}})["claims"]
        return format(values[claim_id], form or ".4g") if values and claim_id in values else "(run the cell)"

    def _body(self, block: Block) -> str:
        return self.text(block.body, block.body_line)

    def _quote(self, block: Block) -> str:
        default = block.name.capitalize() if block.name in ADMONITIONS else ""
        title = self.inline(block.argument, block.line) or default
        return textwrap.indent(f"**{title}**\n\n" * bool(title) + self._body(block), "> ", lambda line: True)

    def _plain(self, block: Block) -> str:
        title = block.argument if block.name in ("tab-item", "table") else ""
        return "" if "deck-only" in block.options else f"**{title}**\n\n" * bool(title) + self._body(block)

    def _code(self, block: Block) -> str:
        return f"```{block.argument}\n{block.body}\n```"

    def _math(self, block: Block) -> str:
        label = self.labels.get(block.options.get("label", ""))
        tag = f" \\tag{{{label[1].number}}}" if label else ""
        return f"$$\n{block.body.strip()}{tag}\n$$"

    def caption(self, text: str, label: str | None) -> str:
        """A figure's caption with its number."""
        return f"**Figure {self.labels[label][1].number}.** {text}" if label in self.labels else text

    def _figure(self, block: Block) -> str:
        image = self._image(block.argument, block.options.get("alt") or "", block.line)
        return f"{image}\n\n{self.caption(self._body(block), block.options.get('name'))}".rstrip()

    def _source(self, block: Block) -> str:
        if other := set(block.options) - {"pyobject", "language", "caption", "name", "linenos", "dedent"}:
            return self._fault(
                block.line, f"literalinclude: {', '.join(other)}", "use pyobject, or the whole file"
            )
        if not (file := self._file(block.argument, block.line)):
            return ""
        text, name = file.read_text("utf8"), block.options.get("pyobject", "")
        node: Any = ast.parse(text) if name else None
        for part in name.split(".") if name else ():
            node = next((n for n in getattr(node, "body", []) if getattr(n, "name", "") == part), None)
            if node is None:
                return self._fault(block.line, f"{block.argument} has no {name}", "correct :pyobject:")
        if name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
        return f"```{block.options.get('language', 'python')}\n{textwrap.dedent(text).rstrip()}\n```"

    def _exercise(self, block: Block) -> str:
        return f"### Exercise: {self.inline(block.argument, block.line)}\n\n{self._body(block)}"

    def _solution(self, block: Block) -> str:
        return f"<details>\n<summary>Solution</summary>\n\n{self._body(block)}\n\n</details>"

    def _claims_table(self, block: Block) -> str:
        rows = [("Claim of the lecture", "Verdict", "What is true"), ("---", "---", "---")]
        here = [claim for claim in self.claims.values() if claim.chapter == self.chapter.name]
        rows += [(c.claim, c.verdict or "in preparation", c.correction or "") for c in here]
        cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _split(text: str) -> tuple[str, str]:
    """``shown <target>`` as the two; ``target`` alone shows what the target says of itself."""
    match = re.fullmatch(r"(.*?)\s*<([^<>]+)>", text)
    return (match[1], match[2]) if match else ("", text)


def export_notebook(
    chapter: Chapter,
    claims: Mapping[str, Claim] | None = None,
    evidence: Mapping[str, float] | None = None,
    outputs: NotebookNode | None = None,
) -> NotebookNode:
    """The chapter for readers.

    Args:
        claims: the ledger; read from the book where absent.
        evidence: measured values by claim; those of the last build where absent.
        outputs: an executed run of the chapter, whose outputs the notebook then carries (glue left out).

    Raises:
        BookError: with every directive, role, reference, image, source or claim that is named in vain.
    """
    reader = _Reader(chapter, read_claims(Project(chapter.root)) if claims is None else claims, evidence)
    starts = {id(cell): line for line, cell in (*markdown_cells(chapter), *chapter.code_cells)}
    executed: Iterator[Any] = iter([c for c in outputs.cells if c.cell_type == "code"] if outputs else ())
    markdown, cells = nbformat.v4.new_markdown_cell, []
    for cell in chapter.notebook.cells:
        line = starts.get(id(cell), 1)
        if cell.cell_type == "markdown":
            cells.append(markdown(reader.text(cell.source, line)))
            continue
        new, tags = nbformat.v4.new_code_cell(cell.source), list(cell.metadata.get("tags", []))
        hidden = {key: True for key, names in HIDDEN.items() if names & set(tags)}
        new.metadata.update({key: value for key, value in (("tags", tags), ("jupyter", hidden)) if value})
        if run := next(executed, None):
            new.outputs = [out for out in run.outputs if "scrapbook" not in out.get("metadata", {})]
            new.execution_count = run.execution_count
        cells.append(new)
        figure = (cell.metadata.get("mystnb") or {}).get("figure") or {}
        if figure.get("caption"):
            cells.append(markdown(reader.caption(reader.inline(figure["caption"], line), figure.get("name"))))
    if reader.faults:
        raise BookError(reader.faults)
    setup = (
        "*A chapter of an executable book. To run it, clone the book's repository, run `make lab` in it, and "
        f"open this notebook or `{chapter.file}` there; the first run sets up all that the cells need.*"
    )
    cells = [markdown(setup), *(cell for cell in cells if cell.source or cell.cell_type == "code")]
    cells += [markdown(reader.references())] if reader.cited else []
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    title = reader.pages[chapter.name].title
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "title": title}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def export_all(project: Project, out_dir: Path) -> list[Path]:
    """Write every chapter's notebook below ``out_dir`` and return the paths; unchanged files keep their time.

    Raises:
        BookError: with the faults of all chapters.
    """
    claims, faults, written = read_claims(project), [], []
    for name, chapter in project.chapters.items():
        try:
            text = nbformat.writes(export_notebook(chapter, claims)) + "\n"
        except BookError as error:
            faults.extend(error.faults)
            continue
        written.append(out_dir / f"{name}.ipynb")
        write_if_changed(written[-1], text)
    if faults:
        raise BookError(faults)
    return written
