"""A chapter as a notebook for readers: plain Markdown that JupyterLab shows well, solutions folded.

Sphinx has resolved every reference, number and citation by the time a page is written. The notebook is written from
that same tree, so it says what the page says; its code cells are the chapter's own.
"""

from __future__ import annotations

import base64
import mimetypes
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx_exercise.nodes import is_exercise_node, is_solution_node

from medarch.site.chapters import Chapter, Project
from medarch.site.execute import write_if_changed

HIDDEN = {
    "source_hidden": {"hide-input", "hide-cell", "remove-input", "remove-cell"},
    "outputs_hidden": {"hide-output", "hide-cell", "remove-output", "remove-cell"},
}
FORMS = {
    nodes.emphasis: "*{}*",
    nodes.strong: "**{}**",
    nodes.rubric: "**{}**",
    nodes.subscript: "<sub>{}</sub>",
    nodes.superscript: "<sup>{}</sup>",
    nodes.footnote_reference: "<sup>{}</sup>",
}
SETUP = (
    "*A chapter of an executable book. To run it, clone the book's repository, run `make lab` in it, and open this "
    "notebook or `{file}` there; the first run sets up all that the cells need.*"
)
CLAIM = "\0"  # stands where the page has a claim's mark, which a notebook goes without


class DeckOnly(nodes.container):
    """A slide that stands on the deck alone: neither the page nor the notebook shows it."""


class Writer:
    """Writes a page's resolved tree as the cells of a notebook."""

    def __init__(self, app: Sphinx, project: Project, chapter: Chapter, docname: str):
        self.app, self.project, self.chapter, self.docname = app, project, chapter, docname
        self.cells: list[Any] = []
        self.code = [(n, cell) for n, cell in enumerate(chapter.notebook.cells) if cell.cell_type == "code"]

    def notebook(self, doctree: nodes.document) -> nbformat.NotebookNode:
        """The whole chapter, with a word on how to run it before, and what it cites after."""
        self.markdown(SETUP.format(file=self.chapter.file))
        self.page(doctree)
        self.code_until(len(self.chapter.notebook.cells))
        self.markdown(self.references())
        for number, cell in enumerate(self.cells):
            cell["id"] = f"cell-{number}"
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
        return nbformat.v4.new_notebook(cells=self.cells, metadata=metadata)

    def markdown(self, text: str) -> None:
        """Add a cell of prose."""
        if text.strip():
            self.cells.append(nbformat.v4.new_markdown_cell(text.strip()))

    def code_until(self, position: int) -> None:
        """Add the chapter's code cells up to a position, those that the page does not show included."""
        while self.code and self.code[0][0] <= position:
            _, cell = self.code.pop(0)
            tags = list(cell.metadata.get("tags", []))
            hidden = {key: True for key, names in HIDDEN.items() if names & set(tags)}
            metadata = {key: value for key, value in (("tags", tags), ("jupyter", hidden)) if value}
            self.cells.append(nbformat.v4.new_code_cell(cell.source, metadata=metadata))

    def page(self, parent: nodes.Element, depth: int = 0) -> None:
        """Walk the sections, and change between prose and code where the page does."""
        prose: list[nodes.Node] = []
        self.depth = depth
        for node in parent.children:
            cell = isinstance(node, nodes.container) and node.get("nb_element") == "cell_code"
            if not cell and not isinstance(node, nodes.section):
                prose.append(node)
                continue
            self.markdown(self.blocks(prose))
            prose = []
            if cell:
                self.code_until(node["cell_index"])
                self.markdown("\n\n".join(map(self.text, node.findall(nodes.caption))))
            else:
                self.page(node, depth + 1)
        self.markdown(self.blocks(prose))

    def blocks(self, children: list[nodes.Node]) -> str:
        """Blocks of Markdown, one under the other."""
        return "\n\n".join(text for text in map(self.text, children) if text.strip())

    def inline(self, node: nodes.Element) -> str:
        """What stands inside a paragraph, a title or a caption."""
        return re.sub(rf"\s*{CLAIM}", "", "".join(map(self.text, node.children)))

    def text(self, node: Any) -> str:
        """One node as Markdown; what has no form of its own is shown as what it holds."""
        for kind, form in FORMS.items():
            if isinstance(node, kind):
                return form.format(self.inline(node))
        inside = [child for child in node.children if not isinstance(child, nodes.title)]
        title = next((self.inline(child) for child in node.children if isinstance(child, nodes.title)), "")
        match node:
            case nodes.Text():
                return re.sub(r"[\\`*$<]|(?<!\w)_|_(?!\w)", r"\\\g<0>", node.astext())
            case nodes.comment() | nodes.substitution_definition() | nodes.citation() | DeckOnly():
                return ""
            case nodes.title():
                return f"{'#' * self.depth} {self.inline(node)}"
            case nodes.caption():
                return f"{self.number('figure', node.parent)}{self.inline(node)}"
            case nodes.math():
                return f"${node.astext()}$"
            case nodes.math_block():
                tag = f" \\tag{{{node['number']}}}" if node.get("number") else ""
                return node.astext().strip() if node.get("nowrap") else f"$$\n{node.astext().strip()}{tag}\n$$"
            case nodes.literal():
                return f"`` {node.astext()} ``" if "`" in node.astext() else f"`{node.astext()}`"
            case nodes.literal_block():
                code, language = node.astext().rstrip("\n"), node.get("language", "default")
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
                return f"{fence}{'' if language in ('default', 'none') else language}\n{code}\n{fence}"
            case nodes.reference():
                claim = "claim-link" in node["classes"]
                return CLAIM if claim else self.link(self.inline(node), node.get("refuri", ""))
            case nodes.image():
                return self.image(node)
            case nodes.raw():
                return node.astext() if "html" in node["format"] else ""
            case nodes.bullet_list():
                return "\n".join(_item("- ", self.blocks(item.children)) for item in inside)
            case nodes.enumerated_list():
                start = enumerate(inside, node.get("start", 1))
                return "\n".join(_item(f"{number}. ", self.blocks(item.children)) for number, item in start)
            case nodes.definition_list_item():
                return f"**{', '.join(map(self.inline, inside[:-1]))}**: {self.blocks(inside[-1].children)}"
            case nodes.footnote():
                return f"<sup>{inside[0].astext()}</sup> {self.blocks(inside[1:])}"
            case nodes.table():
                rows = [[self.blocks(entry.children) for entry in row.children] for row in node.findall(nodes.row)]
                cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
                cells.insert(1, ["---"] * len(rows[0]))
                return "\n".join([f"**{title}**\n"] * bool(title) + [f"| {' | '.join(row)} |" for row in cells])
            case _ if is_exercise_node(node):
                return f"### {self.number('exercise', node)}{title.strip(' ()')}\n\n{self.blocks(inside)}"
            case _ if is_solution_node(node):
                return f"<details>\n<summary>Solution</summary>\n\n{self.blocks(inside)}\n\n</details>"
            case nodes.Admonition() | nodes.sidebar() | nodes.topic() | nodes.block_quote():
                title = title or (type(node).__name__.capitalize() if isinstance(node, nodes.Admonition) else "")
                text = f"**{title}**\n\n" * bool(title) + self.blocks(inside)
                return textwrap.indent(text, "> ", lambda line: True)
        return self.inline(node) if isinstance(node, nodes.TextElement) else self.blocks(node.children)

    def link(self, shown: str, uri: str) -> str:
        """A link to the world or to another chapter's notebook; to this one, and to plain pages, the text alone."""
        if re.match(r"[a-z]+:", uri):
            return f"[{shown}]({uri})"
        here = Path(self.docname).parent
        name = os.path.normpath(here / uri.partition("#")[0]).removesuffix(".html")
        if name == self.docname or name.removeprefix("book/") not in self.project.chapters:
            return shown
        return f"[{shown}]({os.path.relpath(name, here)}.ipynb)"

    def image(self, node: nodes.image) -> str:
        """An image inside the notebook, as a data address: JupyterLab shows no SVG attachments."""
        path, alt = Path(self.app.srcdir) / node["uri"], " ".join(node.get("alt", "").split())
        if not path.is_file():  # Sphinx has said so
            return f"![{alt}]({node['uri']})"
        data = base64.b64encode(path.read_bytes()).decode()
        return f"![{alt}](data:{mimetypes.guess_type(path.name)[0]};base64,{data})"

    def number(self, kind: str, node: nodes.Element) -> str:
        """How the page numbers a figure or an exercise, in bold, where it does."""
        numbers = self.app.env.toc_fignumbers.get(self.docname, {}).get(kind, {})
        found = next((numbers[key] for key in node["ids"] if key in numbers), None)
        if found is None:
            return ""
        text = self.app.config.numfig_format[kind] % ".".join(map(str, found))
        return f"{text}: " if kind == "exercise" else f"**{text}.** "

    def references(self) -> str:
        """The list of what the chapter cites."""
        domain: Any = self.app.env.get_domain("cite")
        entries = {citation.key: citation.formatted_entry for citation in domain.citations}
        keys = [target.key for ref in domain.citation_refs if ref.docname == self.docname for target in ref.targets]
        texts = [entries[key].text.render(domain.backend) for key in dict.fromkeys(keys) if key in entries]
        return "\n".join(
            ["## References\n", *("- " + "".join(map(self.text, text)) for text in texts)] if texts else ""
        )


def _item(mark: str, text: str) -> str:
    return mark + textwrap.indent(text, " " * len(mark)).lstrip()


def write_notebook(app: Sphinx, project: Project, doctree: nodes.document, docname: str) -> None:
    """Write a chapter's notebook beside the pages, whenever its page is written."""
    chapter = project.chapters.get(docname.removeprefix("book/"))
    if chapter is not None and app.builder.name == "html" and not app.config.medarch_preview:
        notebook = Writer(app, project, chapter, docname).notebook(doctree)
        write_if_changed(Path(app.outdir) / "notebooks" / f"{chapter.name}.ipynb", nbformat.writes(notebook) + "\n")
