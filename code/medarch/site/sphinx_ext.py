"""The book's own roles, directives and pages.

Roles: ``{claim}`id``` (a quiet link to the claim that a sentence proves) and ``{proved}`id:.2f``` (the value that a
cell of this build measured). Directives: ``claims-table``, ``claims-ledger``, ``lecture-map``, ``build-status`` and
``slide``. Pages: one reveal.js deck for each chapter with slides. All read the evidence files and the ledger, and
depend on them.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pybtex.plugin
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from jinja2 import Environment, FileSystemLoader
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from medarch.book.ledger import VERDICTS, Claim
from medarch.site import charts
from medarch.site.chapters import Project
from medarch.site.evidence import evidence_file, read_claims, read_evidence, read_sources, record_values
from medarch.site.export import DeckOnly, write_notebook

LOGGER = logging.getLogger(__name__)
DECK, MARKDOWN = Path(__file__).parent / "deck", Path(__file__).parent / "templates"
TEMPLATES = Environment(loader=FileSystemLoader(MARKDOWN), trim_blocks=True, lstrip_blocks=True)
TEMPLATES.filters["flat"] = lambda text: " ".join(text.split())
IN_PREPARATION = "in preparation"
TITLES = {
    "lecture": "Lecture 18: Next-Generation Medical AI",
    "notebook": "Practice notebook",
    "deep-dive": "Deep dive: advanced model architectures",
    "quick-reference": "Module 2.4, quick reference",
    "module": "Module 2.4: Efficient architectures",
}


class Reading:
    """What roles and directives read: a page depends on the files behind it, and on those alone."""

    env: Any
    titles, verdicts = TITLES, VERDICTS

    @property
    def project(self) -> Project:
        """The book that is being built."""
        return self.env.app.medarch_project

    @property
    def here(self) -> str:
        """The name of the page that is being read."""
        return self.env.docname.removeprefix("book/")

    @property
    def claims(self) -> dict[str, Claim]:
        """The ledger."""
        self.env.note_dependency(str(self.project.book / "claims.yml"))
        return self.env.app.medarch_claims

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """The sections of the sources."""
        self.env.note_dependency(str(self.project.book / "sources.yml"))
        return read_sources(self.project)

    def evidence(self, name: str) -> dict[str, Any]:
        """What the last run of a chapter proved and cost."""
        self.env.note_dependency(str(evidence_file(self.project, name)))
        return read_evidence(self.project, name)

    def measured(self, claim: Claim) -> str:
        """What a cell has proved."""
        value = self.evidence(claim.chapter)["claims"].get(claim.id)
        return "not measured in this build" if value is None else f"{value:.4g}"

    def recorded(self, claim: Claim) -> str:
        """What the records of a claim's benchmark hold, by class of device."""
        for path in (self.project.book / "records").glob("*.json"):
            self.env.note_dependency(str(path))
        values = record_values(self.project, claim).items()
        return ", ".join(f"{value:.4g} ({device})" for device, value in values) or "no record"

    def place(self, section: str, entry: dict[str, Any]) -> str:
        """A link to where the book covers a section of the sources."""
        for name, chapter in self.project.chapters.items():
            if section in chapter.meta["covers"]:
                return (
                    f"{{ref}}`{name} <{section}>`"
                    if f"({section})=" in chapter.text
                    else f"{{doc}}`{name} </book/{name}>`"
                )
        return f'<span class="verdict verdict-preparation">{IN_PREPARATION}</span> ({entry["chapter"]})'


class ClaimRole(Reading, SphinxRole):
    """A link to the claim in the table at the end of the page."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        claim = self.claims.get(self.text)
        if claim is None:
            LOGGER.warning("book/claims.yml has no claim %r", self.text, location=self.get_location())
            return [], []
        verdict = claim.verdict or IN_PREPARATION
        link = nodes.reference("", f"claim: {verdict}", refid=f"claim-{claim.id}", internal=True)
        link["classes"] += ["claim-link", f"verdict-{verdict.replace(' ', '-')}"]
        return [link], []


class ProvedRole(Reading, SphinxRole):
    """The value that a cell proved in this build, with an optional format after a colon."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        claim_id, _, form = self.text.partition(":")
        claim = self.claims.get(claim_id)
        value = self.evidence(claim.chapter if claim else self.here)["claims"].get(claim_id)
        if value is None:
            LOGGER.warning("no cell has proved the claim %r in this build", claim_id, location=self.get_location())
            return [nodes.inline("", "(not measured)")], []
        return [nodes.inline("", format(value, form or ".4g"), classes=["proved"])], []


class Templated(Reading, SphinxDirective):
    """A directive that says in Markdown what its template makes of the book, and lets MyST parse it."""

    def run(self) -> list[nodes.Node]:
        lines = TEMPLATES.get_template(f"{self.name}.md").render(book=self).splitlines()
        parent = nodes.Element()
        self.state.nested_parse(StringList(lines, source=f"<{self.name}>"), 0, parent)
        return parent.children


class Slide(SphinxDirective):
    """A part of the chapter that also goes on the lecture deck; with ``deck-only`` it stands there alone."""

    required_arguments, final_argument_whitespace, has_content = 1, True, True
    option_spec = {"deck-only": directives.flag}

    def run(self) -> list[nodes.Node]:
        kind = DeckOnly if "deck-only" in self.options else nodes.container
        box = kind(classes=["slide"], title=self.arguments[0])
        self.state.nested_parse(self.content, self.content_offset, box)
        self.env.metadata[self.env.docname]["slides"] = "yes"
        return [box]


def skip(writer: Any, node: nodes.Node) -> None:
    """Leave what is for the lecture hall alone off the page."""
    raise nodes.SkipNode


def read_book(app: Any) -> None:
    """Read the project and the ledger once for a build."""
    app.medarch_project = Project(app.srcdir)
    app.medarch_claims = read_claims(app.medarch_project)


def note_evidence(app: Any, docname: str, source: list[str]) -> None:
    """A page is read anew when its chapter has been executed anew, although its text is the same."""
    name = docname.removeprefix("book/")
    if name in app.medarch_project.chapters:
        app.env.note_dependency(str(evidence_file(app.medarch_project, name)))


def export_page(app: Any, doctree: nodes.document, docname: str) -> None:
    """Write a chapter's notebook with its page."""
    write_notebook(app, app.medarch_project, doctree, docname)


def decks(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """One deck for each chapter with slides: their content, and the outputs of cells tagged ``slide`` after it."""
    for docname, metadata in list(app.env.metadata.items()):
        if not metadata.get("slides") or app.builder.name != "html" or app.config.medarch_preview:
            continue
        doctree = app.env.get_doctree(docname)
        app.env.apply_post_transforms(doctree, docname)
        app.builder.post_process_images(doctree)  # of a page that is not written again, the builder has not seen any
        app.builder.current_docname = docname
        app.builder.imgpath = "../" * docname.count("/") + "_images"
        slides: list[tuple[str, list[str]]] = []
        for node in doctree.findall(nodes.container):
            shown = []
            if "slide" in node["classes"]:
                slides.append((node["title"], []))
                shown = node.children
            elif "tag_slide" in node["classes"] and slides:
                shown = [box for box in node.findall(nodes.container) if "cell_output" in box["classes"]]
            for part in shown:
                slides[-1][1].append(app.builder.render_partial(part)["fragment"])
        context = {"title": app.env.titles[docname].astext(), "slides": slides, "chapter": Path(docname).name + ".html"}
        if any('class="math' in part for _, parts in slides for part in parts):
            context["mathematics"] = app.config.mathjax3_config or {}
            context["mathjax"] = f"_static/{app.config.mathjax_path}"
        context["charts"] = any(charts.SIGN in part for _, parts in slides for part in parts)
        yield f"{docname}-slides", context, "deck.html"


def chapter_buttons(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Offer the reader's notebook and the deck beside the page's source."""
    name = pagename.removeprefix("book/")
    if doctree is None or name not in app.medarch_project.chapters:
        return
    notebook = f"{'../' * pagename.count('/')}notebooks/{name}.ipynb"
    tip = "Download this chapter as a notebook"
    offers = [("download-notebook-button", notebook, "Notebook (.ipynb)", tip, "fas fa-download")]
    if app.env.metadata[pagename].get("slides"):
        slides = f"{Path(pagename).name}-slides.html"
        offers.append(("slides-button", slides, "Slides", "This chapter's lecture slides", "fas fa-expand"))
    keys = ("label", "url", "text", "tooltip", "icon")
    buttons = [{"type": "link", **dict(zip(keys, offer, strict=True))} for offer in offers]
    for group in context.get("header_buttons", []):
        if group.get("label") == "download-buttons":
            group["buttons"][:0] = buttons


def reveal_files(app: Any, exception: Exception | None) -> None:
    """Serve reveal.js from the site; its files come with the package sphinx-revealjs."""
    if exception or app.builder.name != "html":
        return
    target = Path(app.outdir) / "_static" / "reveal"
    target.mkdir(parents=True, exist_ok=True)
    dist = Path(str(distribution("sphinx-revealjs").locate_file("sphinx_revealjs/_static/revealjs/dist")))
    for path in (dist / "reveal.js", dist / "reveal.css", dist / "reset.css", DECK / "deck.css", DECK / "deck.js"):
        shutil.copy(path, target)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    # pybtex looks through every installed package for each citation; once is enough.
    pybtex.plugin._load_entry_point = functools.cache(pybtex.plugin._load_entry_point)
    app.setup_extension(charts.__name__)
    app.add_config_value("medarch_preview", False, "")
    app.add_role("claim", ClaimRole())
    app.add_role("proved", ProvedRole())
    app.add_directive("slide", Slide)
    for name in ("claims-table", "claims-ledger", "lecture-map", "build-status"):
        app.add_directive(name, Templated)
    app.add_node(DeckOnly, html=(skip, None))
    app.connect("config-inited", lambda _, config: config.templates_path.append(str(DECK)))
    app.connect("builder-inited", read_book)
    app.connect("source-read", note_evidence)
    app.connect("doctree-resolved", export_page, priority=900)
    app.connect("html-collect-pages", decks)
    app.connect("html-page-context", chapter_buttons, priority=502)
    app.connect("build-finished", reveal_files)
    return {"version": "2", "env_version": 2, "parallel_read_safe": True, "parallel_write_safe": True}
