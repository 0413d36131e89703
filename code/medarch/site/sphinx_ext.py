"""The book's own roles, directives and pages.

Roles: ``{claim}`id``` (a quiet link to the claim that a sentence proves) and ``{proved}`id:.2f``` (the value that a cell of
this build measured). Directives: ``claims-table``, ``claims-ledger``, ``lecture-map``, ``build-status`` and ``slide``. Pages:
one reveal.js deck for each chapter with slides. All read the evidence files and the ledger, and depend on them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from medarch.book.ledger import Claim
from medarch.site.chapters import Project
from medarch.site.evidence import evidence_file, read_claims, read_evidence, read_sources, record_values

LOGGER = logging.getLogger(__name__)
DECK = Path(__file__).parent / "deck"
IN_PREPARATION = "in preparation"
SOURCES = {
    "lecture": "Lecture 18: Next-Generation Medical AI",
    "notebook": "Practice notebook",
    "deep-dive": "Deep dive: advanced model architectures",
    "quick-reference": "Module 2.4, quick reference",
    "module": "Module 2.4: Efficient architectures",
}


def _project(env: Any) -> Project:
    project = getattr(env.app, "medarch_project", None)
    if project is None:
        project = env.app.medarch_project = Project(env.srcdir)
    return project


def _claims(env: Any) -> dict[str, Claim]:
    if not hasattr(env.app, "medarch_claims"):
        env.app.medarch_claims = read_claims(_project(env))
    env.note_dependency(str(_project(env).book / "claims.yml"))
    return env.app.medarch_claims


def _evidence(env: Any, name: str) -> dict[str, Any] | None:
    env.note_dependency(str(evidence_file(_project(env), name)))
    return read_evidence(_project(env), name)


def _here(env: Any) -> str:
    return env.docname.removeprefix("book/")


class ClaimRole(SphinxRole):
    """A link to the claim in the table at the end of the page."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        claim = _claims(self.env).get(self.text)
        if claim is None:
            LOGGER.warning("book/claims.yml has no claim %r", self.text, location=self.get_location())
            return [], []
        verdict = claim.verdict or IN_PREPARATION
        link = nodes.reference("", f"claim: {verdict}", refid=f"claim-{claim.id}", internal=True)
        link["classes"] += ["claim-link", f"verdict-{verdict.replace(' ', '-')}"]
        return [link], []


class ProvedRole(SphinxRole):
    """The value that a cell proved in this build, with an optional format after a colon."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        claim_id, _, form = self.text.partition(":")
        claim = _claims(self.env).get(claim_id)
        entry = _evidence(self.env, claim.chapter if claim else _here(self.env))
        value = (entry or {"claims": {}})["claims"].get(claim_id)
        if value is None:
            LOGGER.warning("no cell has proved the claim %r in this build", claim_id, location=self.get_location())
            return [nodes.inline("", "(not measured)")], []
        return [nodes.inline("", format(value, form or ".4g"), classes=["proved"])], []


class MarkdownDirective(SphinxDirective):
    """A directive that writes Markdown and lets MyST parse it."""

    def parse(self, text: str) -> list[nodes.Node]:
        parent = nodes.Element()
        self.state.nested_parse(StringList(text.splitlines(), source=f"<{self.name}>"), 0, parent)
        return parent.children

    def table(self, claims: list[Claim], prefix: str) -> list[nodes.Node]:
        """Claims with their verdicts and what these rest on; each row can be linked to as ``prefix-id``."""
        lines = ["```{list-table}", ":header-rows: 1", ":class: claims-table", ":widths: 42 13 45", ""]
        lines += ["* - The claim", "  - Verdict", "  - What is so, and how we know"]
        for claim in claims:
            written = claim.chapter in _project(self.env).chapters
            verdict = (claim.verdict if written else None) or IN_PREPARATION
            badge = f"[{verdict}]{{.verdict .verdict-{'preparation' if verdict == IN_PREPARATION else verdict}}}"
            found = f"{(claim.correction or '').strip()} *{self.rests_on(claim)}*" if written else f"Planned for {claim.chapter}."
            lines += [f"* - [{claim.claim}]{{#{prefix}-{claim.id}}}", f"  - {badge}", f"  - {' '.join(found.split())}"]
        return self.parse("\n".join([*lines, "```"])) if claims else []

    def rests_on(self, claim: Claim) -> str:
        """What a claim's verdict rests on, in a sentence."""
        cites = " ".join(f"{{cite:p}}`{key}`" for key in claim.sources)
        checked = "" if not claim.sources else f" Source: {cites}" + ("." if claim.looked_up else " (not yet checked).")
        if claim.evidence == "cell":
            value = (_evidence(self.env, claim.chapter) or {"claims": {}})["claims"].get(claim.id)
            measured = "not measured in this build" if value is None else f"{value:.4g}"
            return f"Measured on the page: {claim.quantity}: {measured}.{checked}"
        if claim.evidence == "record":
            for path in (_project(self.env).book / "records").glob("*.json"):
                self.env.note_dependency(str(path))
            values = record_values(_project(self.env), claim)
            shown = ", ".join(f"{value:.4g} ({device})" for device, value in values.items()) or "no record"
            return f"Recorded in {claim.record}: {claim.quantity}: {shown}.{checked}"
        return (checked or " No source was found.").strip()


class ClaimsTable(MarkdownDirective):
    """The claims of this chapter, checked."""

    def run(self) -> list[nodes.Node]:
        claims = [claim for claim in _claims(self.env).values() if claim.chapter == _here(self.env)]
        return self.table(claims, "claim")


class ClaimsLedger(MarkdownDirective):
    """All claims, by source section, those of unwritten chapters in preparation."""

    def run(self) -> list[nodes.Node]:
        claims, found = _claims(self.env), []
        done = [claim for claim in claims.values() if claim.chapter in _project(self.env).chapters]
        tally = {verdict: sum(c.verdict == verdict for c in done) for verdict in ("holds", "corrected", "unsupported", "forecast")}
        counted = ", ".join(f"{count} {verdict}" for verdict, count in tally.items() if count)
        found += self.parse(f"The ledger holds {len(claims)} claims; {len(done)} belong to chapters that are written: {counted or 'none'}.")
        for section, source in read_sources(_project(self.env)).items():
            here = [claim for claim in claims.values() if claim.section == section]
            if here:
                found += [nodes.rubric("", source["title"])]
                found += self.table(here, "ledger")
        return found


class LectureMap(MarkdownDirective):
    """Each section of the sources with the chapter that covers it."""

    def run(self) -> list[nodes.Node]:
        project = _project(self.env)
        self.env.note_dependency(str(project.book / "sources.yml"))
        covered = {section: name for name, chapter in project.chapters.items() for section in chapter.meta["covers"]}
        lines: list[str] = []
        last = None
        for section, source in read_sources(project).items():
            if source["source"] != last:
                last = source["source"]
                lines += ["", f"## {SOURCES.get(last, last)}", "", "| Section | Kind | Chapter |", "| --- | --- | --- |"]
            name, where = covered.get(section), f"<span class=\"verdict verdict-preparation\">{IN_PREPARATION}</span> ({source['chapter']})"
            if name:
                anchored = f"({section})=" in project.page(name).read_text("utf8")
                target = f"{{ref}}`{name} <{section}>`" if anchored else f"{{doc}}`{name} </book/{name}>`"
                where = target
            lines.append(f"| {source['title'].replace('|', '/')} | {source['kind']} | {where} |")
        # Section titles inside a directive cannot nest below the page's own, so each source gets a rubric instead.
        found: list[nodes.Node] = []
        block: list[str] = []
        for line in [*lines, "## "]:
            if line.startswith("## "):
                found += self.parse("\n".join(block))
                found += [nodes.rubric("", line[3:])] if line[3:] else []
                block = []
            else:
                block.append(line)
        return found


class BuildStatus(MarkdownDirective):
    """When and at what cost each chapter was last executed."""

    def run(self) -> list[nodes.Node]:
        lines = ["| Chapter | Executed (UTC) | Seconds (of processor) | Declared | Peak memory | Device | Python |",
                 "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        for name, chapter in _project(self.env).chapters.items():
            run = (_evidence(self.env, name) or {}).get("run")
            if run:
                lines.append(f"| {{doc}}`/book/{name}` | {run['when'][:16].replace('T', ' ')} | {run['seconds']:.1f} ({run['cpu_seconds']:.1f}) "
                             f"| {chapter.seconds:g} s | {run['peak_mib']} MiB | {run['device']} | {run['python']} |")  # fmt: skip
        return self.parse("\n".join(lines))


class Slide(SphinxDirective):
    """A part of the chapter that also goes on the lecture deck; with ``deck-only`` it stands there alone."""

    required_arguments, final_argument_whitespace, has_content = 1, True, True
    option_spec = {"deck-only": directives.flag}

    def run(self) -> list[nodes.Node]:
        box = nodes.container(classes=["slide", *(["deck-only"] if "deck-only" in self.options else [])])
        box["title"] = self.arguments[0]
        self.state.nested_parse(self.content, self.content_offset, box)
        self.env.metadata[self.env.docname]["slides"] = "yes"
        return [box]


def note_evidence(app: Sphinx, docname: str, source: list[str]) -> None:
    """A page is read anew when its chapter has been executed anew, although its text is the same."""
    name = docname.removeprefix("book/")
    if name in _project(app.env).chapters:
        app.env.note_dependency(str(evidence_file(_project(app.env), name)))


def drop_deck_only(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Take what is for the lecture hall alone off the page."""
    if getattr(app, "medarch_deck", None) == docname:  # this resolves the deck, not the page
        return
    for box in list(doctree.findall(lambda node: isinstance(node, nodes.container) and "deck-only" in node.get("classes", []))):
        box.parent.remove(box)


def decks(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """One deck for each chapter with slides: each slide's content and the outputs of the cells tagged ``slide`` after it."""
    for docname, metadata in list(app.env.metadata.items()):
        if not metadata.get("slides") or app.builder.name != "html":
            continue
        doctree, app.medarch_deck = app.env.get_doctree(docname), docname  # type: ignore[attr-defined]
        app.env.apply_post_transforms(doctree, docname)
        app.medarch_deck = None  # type: ignore[attr-defined]
        app.builder.current_docname = docname
        app.builder.imgpath = "../" * docname.count("/") + "_images"
        slides: list[tuple[str, list[str]]] = []
        for node in doctree.findall(nodes.container):
            if "slide" in node["classes"]:
                slides.append((node["title"], [app.builder.render_partial(child)["fragment"] for child in node.children]))
            elif "tag_slide" in node["classes"] and slides:
                for output in node.findall(lambda n: isinstance(n, nodes.container) and "cell_output" in n.get("classes", [])):
                    slides[-1][1].append(app.builder.render_partial(output)["fragment"])
        title = app.env.titles[docname].astext()
        context = {"title": title, "slides": slides, "chapter": Path(docname).name + ".html"}
        if any('class="math' in part for _, parts in slides for part in parts):
            context |= {"mathematics": app.config.mathjax3_config or {}, "mathjax": f"_static/{app.config.mathjax_path}"}
        yield f"{docname}-slides", context, "deck.html"


def chapter_buttons(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Offer the reader's notebook and the deck beside the page's source."""
    name = pagename.removeprefix("book/")
    if doctree is None or name not in _project(app.env).chapters:
        return
    for group in context.get("header_buttons", []):
        if group.get("label") == "download-buttons":
            up = "../" * pagename.count("/")
            extra = [{"type": "link", "url": f"{up}notebooks/{name}.ipynb", "text": "Notebook (.ipynb)",
                      "tooltip": "Download this chapter as a notebook", "icon": "fas fa-download", "label": "download-notebook-button"}]  # fmt: skip
            if app.env.metadata[pagename].get("slides"):
                extra.append({"type": "link", "url": f"{Path(pagename).name}-slides.html", "text": "Slides",
                              "tooltip": "This chapter's lecture slides", "icon": "fas fa-expand", "label": "slides-button"})  # fmt: skip
            group["buttons"][:0] = extra


def reveal_files(app: Sphinx, exception: Exception | None) -> None:
    """Serve reveal.js from the site; its files come with the package sphinx-revealjs."""
    target = Path(app.outdir) / "_static" / "reveal"
    if exception or app.builder.name != "html":
        return
    import importlib.util

    spec = importlib.util.find_spec("sphinx_revealjs")
    if spec is None or spec.origin is None:
        raise RuntimeError("sphinx-revealjs is not installed; run `make book`, which sets up all the book needs")
    source = Path(spec.origin).parent / "_static" / "revealjs" / "dist"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("reveal.js", "reveal.css", "reset.css"):
        shutil.copy(source / name, target / name)
    for name in ("deck.css", "deck.js"):
        shutil.copy(DECK / name, target / name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_role("claim", ClaimRole())
    app.add_role("proved", ProvedRole())
    for name, directive in {"claims-table": ClaimsTable, "claims-ledger": ClaimsLedger, "lecture-map": LectureMap,
                            "build-status": BuildStatus, "slide": Slide}.items():  # fmt: skip
        app.add_directive(name, directive)
    app.connect("config-inited", lambda _, config: config.templates_path.append(str(DECK)))
    app.connect("source-read", note_evidence)
    app.connect("doctree-resolved", drop_deck_only)
    app.connect("html-collect-pages", decks)
    app.connect("html-page-context", chapter_buttons, priority=502)
    app.connect("build-finished", reveal_files)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
