"""A chapter as a notebook for readers: plain Markdown that JupyterLab shows well, source included, solutions folded.

Sphinx is not run. Each directive and role that a chapter may use has its rendering here; one that has none is a fault of
the chapter, which is how the linter knows them too.
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
from typing import Any

import nbformat
from myst_nb.core.read import is_myst_markdown_notebook
from nbformat import NotebookNode

from medarch.book.ledger import Claim
from medarch.site.chapters import BookError, Chapter, Fault, Project
from medarch.site.chapters import _nearest as nearest
from medarch.site.evidence import read_claims, read_evidence
from medarch.site.execute import write_if_changed
from medarch.site.markup import Block, blocks, markdown_cells, walk

ADMONITIONS = "note tip warning important caution danger hint attention error seealso admonition".split()
ASIDES = "margin sidebar dropdown card topic epigraph pull-quote grid-item-card".split()
PLAIN = "slide grid grid-item tab-set tab-item div container table".split()
DROPPED = "bibliography contents tableofcontents".split()
HTML_ROLES = {"sub": "<sub>{}</sub>", "sup": "<sup>{}</sup>", "kbd": "<kbd>{}</kbd>", "math": "${}$", "abbr": "{}"}
CODE_ROLES = "code file command class func meth mod attr data py:class py:func py:meth py:mod".split()
LINKS = ("ref", "numref", "eq", "doc", "term")
CITES = ("cite", "cite:p", "cite:t")
INLINE = re.compile(
    r"(?P<role>\{[\w:+-]+\})?(?P<ticks>`+)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)"
    r"|(?P<bang>!?)\[(?P<text>(?:[^\[\]`]|`[^`]*`)*)\]\((?P<url>[^()\s]+)\)(?:\{[^{}\n]*\})?",
    re.DOTALL,
)
HIDDEN = {"hide-input": (1, 0), "hide-output": (0, 1), "hide-cell": (1, 1), "remove-cell": (1, 1),
          "remove-input": (1, 0), "remove-output": (0, 1)}  # fmt: skip


class Page:
    """What other pages may refer to in this one: its title, and its labels as (kind, shown text, number, line)."""

    def __init__(self, text: str):
        self.is_chapter = is_myst_markdown_notebook(text)
        found = re.search(r"(?m)^# +(.+)$", text)
        self.title = found[1].strip() if found else ""
        self.labels: list[tuple[str, str, str, int, int]] = []
        fenced: set[int] = set()
        count = {"math": 0, "figure": 0}
        for block in walk(text):
            if not block.name:
                fenced.update(range(block.line, block.line + len(block.body.splitlines()) + 1))
            kind, options, shown = block.name, block.options, block.argument
            if kind == "code-cell":
                kind, options = "figure", (options.get("mystnb") or {}).get("figure") or {}
                shown = options.get("caption") or ""
            elif kind == "figure":
                shown = block.body.strip().split("\n\n")[0].replace("\n", " ")
            label = options.get("label") or options.get("name")
            if kind in count and (label or shown and kind == "figure"):  # Sphinx numbers these and no others
                count[kind] += 1
            if label:
                self.labels.append((label, kind, shown or label, count.get(kind, 0), block.line))
        for number, line in enumerate(lines := text.splitlines(), start=1):
            if number not in fenced and (match := re.match(r"\(([^()`]+)\)=\s*$", line)):
                after = next((follow for follow in lines[number:] if follow.strip()), "")
                shown = after.lstrip("# ") if after.startswith("#") else match[1]
                self.labels.append((match[1], "section", shown, 0, number))


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


def _surnames(entry: Any) -> str:
    from pybtex.richtext import Text

    people = entry.persons.get("author") or entry.persons.get("editor") or []
    names = [str(Text.from_latex(" ".join(p.prelast_names + p.last_names))) for p in people]
    if len(names) > 2:
        return f"{names[0]} et al."
    return " and ".join(names) or str(Text.from_latex(entry.fields.get("title", "")))


class _Reader:
    """Turns the Markdown of one chapter into what a reader without Sphinx can read, and collects its faults."""

    def __init__(self, chapter: Chapter, claims: Mapping[str, Claim], evidence: Mapping[str, float] | None):
        self.chapter, self.claims, self.evidence = chapter, claims, evidence
        self.project = Project(chapter.root)
        self.pages = {name: read_page(self.project.page(name)) for name in {*self.project.toc, chapter.name}}
        self.faults: list[Fault] = []
        self.cited: list[str] = []
        known = self.pages.items()
        self.targets = {label[0]: (name, *label[1:4]) for name, page in known for label in page.labels}
        self.directives: dict[str, Callable[[Block], str]] = {
            **dict.fromkeys(ADMONITIONS, self._quote), **dict.fromkeys(ASIDES, self._quote),
            **dict.fromkeys(PLAIN, self._plain), **dict.fromkeys(DROPPED, lambda block: ""),
            **dict.fromkeys(("code-block", "code"), lambda b: f"```{b.argument}\n{b.body}\n```"),
            "math": self._math, "figure": self._figure, "image": self._figure,
            "literalinclude": self._source, "exercise": self._exercise, "solution": self._solution,
            "claims-table": self._claims_table,
        }  # fmt: skip

    def fault(self, line: int, message: str, remedy: str) -> str:
        self.faults.append(Fault(self.chapter.file, line, message, remedy))
        return ""

    def text(self, text: str, line: int) -> str:
        """Markdown with its directives, roles and links resolved; ``line`` is that of the text's first line."""
        lines, done, at = text.splitlines(), [], 0
        for block in blocks(text, line):
            done.append(self.inline("\n".join(lines[at : block.start]), line + at))
            at = block.end
            if not block.name:
                done.append("\n".join(lines[block.start : block.end]))
                continue
            render = self.directives.get(block.name)
            if render is None:
                self.fault(block.line, f"unknown directive {{{block.name}}}",
                           f"use one of {', '.join(sorted(self.directives))}{nearest(block.name, self.directives)}")  # fmt: skip
                continue
            rest = re.sub(r"[^\s>]", " ", block.prefix)
            plain = block.prefix + textwrap.indent(render(block), rest).removeprefix(rest)
            if plain.strip():
                done.append(plain)
            else:
                done[-1] = done[-1].rstrip("\n")
        done.append(self.inline("\n".join(lines[at:]), line + at))
        return "\n".join(done).strip("\n")

    def inline(self, text: str, line: int) -> str:
        """Prose between directives: roles, links, and MyST's own syntax of comments, targets, attributes and notes."""
        text = re.sub(r"[ \n]\{claim\}`", "{claim}`", text)
        text = INLINE.sub(lambda m: self._inline(m, line + text.count("\n", 0, m.start())), text)
        for pattern, plain in (
            (r"(?m)^(?:\([^()\n]+\)=|%.*|\{[#.][^{}\n]*\})[ \t]*$", ""),  # a target, a comment, attributes
            (r"(?m)^\[\^([\w-]+)\]: ", r"<sup>\1</sup> "),
            (r"\[\^([\w-]+)\]", r"<sup>\1</sup>"),
            (r"(?m)^(\S[^\n]*)\n: +", r"**\1**: "),
            (r"\n{3,}", "\n\n"),
        ):
            text = re.sub(pattern, plain, text)
        return text

    def _inline(self, match: re.Match[str], line: int) -> str:
        if match["url"] is not None:
            return self._link(match, line)
        if match["role"] is None:
            return match[0]
        role, content = match["role"][1:-1], " ".join(match["code"].split())
        if role in HTML_ROLES:
            return HTML_ROLES[role].format(re.sub(r" \([^()]*\)$", "", content) if role == "abbr" else content)
        if role in CODE_ROLES:
            return f"`{content.rsplit('.', 1)[-1].lstrip('~') if content[0] == '~' else content}`"
        if role in ("claim", "proved"):
            return self._proved(role, content, line)
        if role in CITES:
            return self._cite(role, content, line)
        if role not in LINKS:
            known = [*HTML_ROLES, *CODE_ROLES, *LINKS, *CITES, "claim", "proved"]
            return self.fault(line, f"unknown role {{{role}}}", f"use one of {', '.join(known)}{nearest(role, known)}")
        split = re.fullmatch(r"(.*?)\s*<([^<>]+)>", content)
        shown, target = (split[1], split[2]) if split else ("", content)
        if role == "term":
            return shown or target
        return self._refer(shown, target, line, page=role == "doc", numbered=role == "numref")

    def _refer(self, shown: str, target: str, line: int, page: bool = False, numbered: bool = False) -> str:
        if page:
            here = "/book" if target.startswith("/") else f"/book/{Path(self.chapter.name).parent}"
            path = os.path.normpath(target if target.startswith("/book/") else f"{here}/{target.lstrip('/')}")
            name, kind, title, number = path.removeprefix("/book/").removesuffix(".md"), "page", "", 0
        elif target in self.targets:
            name, kind, title, number = self.targets[target]
        else:
            near = nearest(target, self.targets)
            return self.fault(line, f"there is no label {target!r} in the book", f"correct the reference{near}")
        if name not in self.pages:
            near = nearest(name, self.pages)
            return self.fault(line, f"the page {name!r} is not in the book", f"correct the link{near}")
        if kind == "math":
            return shown or f"({number})"
        label = f"Figure {number}" if kind == "figure" and (numbered or not title) else title or self.pages[name].title
        shown = re.sub(r"%s|\{number\}", str(number), shown).replace("{name}", title) or label
        if name == self.chapter.name or not self.pages[name].is_chapter:
            return shown
        return f"[{shown}]({os.path.relpath(name, Path(self.chapter.name).parent)}.ipynb)"

    def _link(self, match: re.Match[str], line: int) -> str:
        shown, url = match["text"], match["url"]
        if match["bang"]:
            return self._image(url, shown, line)
        if re.match(r"[a-z]+:", url):
            return f"[{self.inline(shown, line)}]({url})"
        path, _, label = url.partition("#")
        if path.endswith(".md"):
            return self._refer(self.inline(shown, line), path, line, page=True)
        if label in self.targets:
            return self._refer(self.inline(shown, line), label, line)
        return self.inline(shown, line) or self.fault(line, f"the link to {url!r} says nothing", "give it a text")

    def _file(self, path: str) -> Path:
        return self.chapter.root / path[1:] if path.startswith("/") else self.chapter.path.parent / path

    def _image(self, path: str, alt: str, line: int) -> str:
        """An image inside the notebook as a data address: SVG attachments are not shown by JupyterLab."""
        if re.match(r"[a-z]+:", path):
            return f"![{alt}]({path})"
        file = self._file(path)
        if not file.is_file():
            return self.fault(line, f"the image {path!r} does not exist", "correct the path (from the chapter's folder)")
        data = base64.b64encode(file.read_bytes()).decode()
        return f"![{' '.join(alt.split())}](data:{mimetypes.guess_type(file.name)[0]};base64,{data})"

    def _cite(self, role: str, content: str, line: int) -> str:
        path = self.project.book / "references.bib"
        entries = _bibliography(path, path.stat().st_mtime_ns).entries if path.is_file() else {}
        shown = []
        for key in (part.strip() for part in content.split(",")):
            if key not in entries:
                self.fault(line, f"book/references.bib has no entry {key!r}", f"add it or correct the key{nearest(key, entries)}")
                continue
            self.cited.append(key)
            year = entries[key].fields.get("year", "no date")
            shown.append(f"{_surnames(entries[key])} ({year})" if role == "cite:t" else f"{_surnames(entries[key])}, {year}")
        return " and ".join(shown) if role == "cite:t" else f"({'; '.join(shown)})"

    def references(self) -> str:
        """The list of what the chapter cites, formatted by pybtex."""
        from pybtex.plugin import find_plugin

        path, keys = self.project.book / "references.bib", list(dict.fromkeys(self.cited))
        data = _bibliography(path, path.stat().st_mtime_ns)
        style, backend = find_plugin("pybtex.style.formatting", "unsrt")(), find_plugin("pybtex.backends", "markdown")()
        items = ["- " + " ".join(entry.text.render(backend).split()) for entry in style.format_bibliography(data, keys)]
        return "\n".join(["## References", "", *items])

    def _proved(self, role: str, content: str, line: int) -> str:
        claim_id, _, form = content.partition(":")
        if claim_id not in self.claims:
            near = nearest(claim_id, self.claims)
            return self.fault(line, f"book/claims.yml has no claim {claim_id!r}", f"add it or correct the id{near}")
        if role == "claim":
            return ""
        found = self.evidence
        if found is None:
            found = (read_evidence(self.project, self.claims[claim_id].chapter) or {"claims": {}})["claims"]
        return format(found[claim_id], form or ".4g") if claim_id in found else "(run the cell)"

    def _quote(self, block: Block) -> str:
        default = block.name.capitalize() if block.name in ADMONITIONS else ""
        title = self.inline(block.argument, block.line) or default
        body = self.text(block.body, block.body_line)
        return textwrap.indent(f"**{title}**\n\n{body}" if title else body, "> ", lambda line: True)

    def _plain(self, block: Block) -> str:
        title = block.argument if block.name in ("tab-item", "table") else ""
        body = "" if "deck-only" in block.options else self.text(block.body, block.body_line)
        return f"**{self.inline(title, block.line)}**\n\n{body}" if title else body

    def _math(self, block: Block) -> str:
        number = self.targets[block.options["label"]][3] if block.options.get("label") else 0
        tag = f" \\tag{{{number}}}" if number else ""
        return f"$$\n{block.body.strip()}{tag}\n$$"

    def _figure(self, block: Block) -> str:
        caption = self.text(block.body, block.body_line) if block.name == "figure" else ""
        number = self.targets.get(block.options.get("name") or "", ("", "", "", 0))[3]
        image = self._image(block.argument, block.options.get("alt", ""), block.line)
        return "\n\n".join(part for part in (image, f"**Figure {number}.** {caption}" if number else caption) if part)

    def _source(self, block: Block) -> str:
        path, known = block.argument, {"pyobject", "language", "caption", "name", "linenos", "dedent"}
        file = self._file(path)
        if not file.is_file():
            return self.fault(block.line, f"the included file {path!r} does not exist", "correct the path")
        if other := set(block.options) - known:
            return self.fault(block.line, f"literalinclude: {', '.join(sorted(other))}", f"use {', '.join(sorted(known))}")
        text = file.read_text("utf8")
        if name := block.options.get("pyobject"):
            node: Any = ast.parse(text)
            for part in name.split("."):
                node = next((n for n in getattr(node, "body", []) if getattr(n, "name", "") == part), None)
            if node is None:
                return self.fault(block.line, f"{path} has no {name}", "correct :pyobject:")
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            text = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
        return f"```{block.options.get('language', 'python')}\n{textwrap.dedent(text).rstrip()}\n```"

    def _exercise(self, block: Block) -> str:
        return f"### Exercise: {self.inline(block.argument, block.line)}\n\n{self.text(block.body, block.body_line)}"

    def _solution(self, block: Block) -> str:
        return f"<details>\n<summary>Solution</summary>\n\n{self.text(block.body, block.body_line)}\n\n</details>"

    def _claims_table(self, block: Block) -> str:
        rows = ["| Claim of the lecture | Verdict | What is true |", "| --- | --- | --- |"]
        for claim in self.claims.values():
            if claim.chapter == self.chapter.name:
                cells = (claim.claim, claim.verdict or "in preparation", claim.correction or "")
                rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(rows)


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
        BookError: with every directive, role, reference, image, source or claim that the chapter names in vain.
    """
    reader = _Reader(chapter, read_claims(Project(chapter.root)) if claims is None else claims, evidence)
    starts = {id(cell): line for line, cell in (*markdown_cells(chapter), *chapter.code_cells)}
    executed: Iterator[Any] = iter([c for c in outputs.cells if c.cell_type == "code"] if outputs else ())
    setup = ("*A chapter of an executable book. To run it, clone the book's repository, run `make lab` in it, and open "
             f"this notebook or `{chapter.file}` there; the first run sets up all that the cells need.*")  # fmt: skip
    cells = [nbformat.v4.new_markdown_cell(setup)]
    for cell in chapter.notebook.cells:
        if cell.cell_type == "markdown":
            if text := reader.text(cell.source, starts[id(cell)]):
                cells.append(nbformat.v4.new_markdown_cell(text))
            continue
        new = nbformat.v4.new_code_cell(cell.source)
        tags = list(cell.metadata.get("tags", []))
        hidden = [HIDDEN[tag] for tag in tags if tag in HIDDEN]
        jupyter = {key: True for n, key in enumerate(("source_hidden", "outputs_hidden")) if any(h[n] for h in hidden)}
        new.metadata.update({key: value for key, value in (("tags", tags), ("jupyter", jupyter)) if value})
        if run := next(executed, None):
            new.outputs = [out for out in run.outputs if "scrapbook" not in out.get("metadata", {})]
            new.execution_count = run.execution_count
        cells.append(new)
        figure = (cell.metadata.get("mystnb") or {}).get("figure") or {}
        if figure.get("caption"):
            number = reader.targets.get(figure.get("name", ""), ("", "", "", 0))[3]
            caption = reader.inline(figure["caption"], starts[id(cell)])
            cells.append(nbformat.v4.new_markdown_cell(f"**Figure {number}.** {caption}" if number else caption))
    if reader.cited and not reader.faults:
        cells.append(nbformat.v4.new_markdown_cell(reader.references()))
    if reader.faults:
        raise BookError(reader.faults)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "title": reader.pages[chapter.name].title}
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
