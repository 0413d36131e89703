"""The build-side half of the ledger: what each chapter's current run proved, and the gate that holds the book to it.

The values leave the executed notebooks as glue outputs and go to ``_build/evidence/<chapter>.json``. Roles, tables
and the claims page read those files alone and depend on them, so that a changed value changes the page in the next
warm build.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import yaml

from medarch.book.ledger import GLUE_PREFIX, Claim, LedgerError, load_claims
from medarch.site.chapters import BookError, Fault, Project, line_of
from medarch.site.execute import write_if_changed


def read_claims(project: Project) -> dict[str, Claim]:
    """The ledger; its faults as faults of the book."""
    try:
        return load_claims(project.book)
    except FileNotFoundError:
        return {}
    except LedgerError as error:
        raise BookError(Fault("book/claims.yml", *fault) for fault in error.faults) from error


def read_sources(project: Project) -> dict[str, dict[str, Any]]:
    """The sections of the sources by id, in the order of ``sources.yml``."""
    path = project.book / "sources.yml"
    entries = yaml.safe_load(path.read_text("utf8")) if path.is_file() else []
    return {entry["id"]: entry for entry in entries or []}


def proved(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """The values that the cells of an executed notebook told the ledger, by claim."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            glue = output.get("metadata", {}).get("scrapbook")
            if glue and glue.get("mime_prefix") == GLUE_PREFIX:
                found[glue["name"]] = float(ast.literal_eval(output["data"][GLUE_PREFIX + "text/plain"]))
    return found


def collect(project: Project, notebooks: dict[str, nbformat.NotebookNode]) -> dict[str, dict[str, Any]]:
    """Write each chapter's evidence file and return the contents of all, those of unbuilt chapters left out."""
    evidence = {}
    for name, notebook in notebooks.items():
        evidence[name] = {"chapter": name, "claims": proved(notebook), "run": dict(notebook.metadata["medarch_run"])}
        write_if_changed(evidence_file(project, name), json.dumps(evidence[name], indent=1, sort_keys=True) + "\n")
    for path in set(project.evidence.rglob("*.json")) - {evidence_file(project, name) for name in project.chapters}:
        path.unlink()  # a chapter that has left the book proves nothing
    return evidence


def evidence_file(project: Project, name: str) -> Path:
    """The evidence file of a chapter."""
    return project.evidence / f"{name}.json"


def read_evidence(project: Project, name: str) -> dict[str, Any]:
    """A chapter's evidence as of its last build; no claims and no run where there is none."""
    path = evidence_file(project, name)
    return json.loads(path.read_text("utf8")) if path.is_file() else {"claims": {}, "run": {}}


def record_values(project: Project, claim: Claim) -> dict[str, float]:
    """The value of a claim in each committed record of its benchmark, by device class; empty where there is none."""
    values = {}
    for path in sorted((project.book / "records").glob(f"{(claim.record or '').replace('/', '-')}.*.json")):
        node: Any = json.loads(path.read_text("utf8"))["results"]
        for key in (claim.path or "").split("."):
            node = node.get(key) if isinstance(node, dict) else None
        values[path.name.split(".")[-2]] = float(node) if isinstance(node, int | float) else math.nan
    return values


def check(project: Project, claims: dict[str, Claim], evidence: dict[str, dict[str, Any]]) -> list[Fault]:
    """Every claim of the chapters at hand that lacks a verdict or what its evidence field promises."""
    ledger, bibliography = project.book / "claims.yml", project.book / "references.bib"
    text = ledger.read_text("utf8") if ledger.is_file() else ""
    entries = bibliography.read_text("utf8") if bibliography.is_file() else ""
    keys, sources = set(re.findall(r"(?m)^@\w+\{\s*([^,\s]+)", entries)), read_sources(project)
    faults = []
    for claim in claims.values():
        found = list(_names(claim, set(sources), keys))
        if claim.chapter in evidence:
            found += _promises(project, claim, evidence[claim.chapter]["claims"])
        for name, entry in evidence.items():
            if claim.id in entry["claims"] and claim.chapter != name:
                found.append((f"is proved by {name}, but belongs to {claim.chapter}", "move the cell or the claim"))
        line = line_of(text, f"id: {claim.id}")
        faults += [
            Fault("book/claims.yml", line, f"{claim.chapter}: claim {claim.id!r} {told}", do) for told, do in found
        ]
    for name in evidence:  # a chapter that covers a section answers for its claims, unless another of the book does
        chapter = project.chapters[name]
        file, line = chapter.file, line_of(chapter.text, "covers:")
        for section in chapter.meta["covers"]:
            if section not in sources:
                faults.append(
                    Fault(file, line, f"covers {section!r}, which book/sources.yml does not have", "correct the id")
                )
            for claim in claims.values():
                if claim.section == section and claim.chapter not in project.chapters:
                    told = f"covers {section!r} but not its claim {claim.id!r}, planned for {claim.chapter}"
                    remedy = "take the claim into this chapter, or do not cover the section"
                    faults.append(Fault(file, line, told, remedy))
    return faults


def _names(claim: Claim, sections: set[str], keys: set[str]) -> Iterator[tuple[str, str]]:
    """What a claim names in vain."""
    for section in {claim.section, *claim.also} - sections if sections else ():
        yield f"names the section {section!r}, which book/sources.yml does not have", "correct the section"
    if unknown := set(claim.sources) - keys:
        yield f"cites {', '.join(sorted(unknown))}, not in book/references.bib", "add the entry or correct the key"


def _promises(project: Project, claim: Claim, measured: dict[str, float]) -> Iterator[tuple[str, str]]:
    """What a claim of a written chapter lacks."""
    if claim.verdict is None:
        yield "has no verdict", "measure it or look it up, then write holds, corrected, unsupported or forecast"
    if claim.verdict in ("corrected", "unsupported") and not claim.correction:
        yield f"is {claim.verdict} but says not what is true", "write its correction"
    values, remedy = {}, "correct the cell, or the claim with its verdict"
    if claim.evidence == "cell" and claim.id in measured:
        values = {"the cell": measured[claim.id]}
    elif claim.evidence == "cell":
        call = f'call prove("{claim.id}", value) in book/{claim.chapter}.md'
        yield "promises a cell, and no cell of the chapter proves it", call
    elif claim.evidence == "record":
        values = {f"the record of {device}": value for device, value in record_values(project, claim).items()}
        if not values:
            yield (
                f"promises the record {claim.record!r}, which is not in book/records",
                f"run `medarch bench {claim.record}`",
            )
    elif claim.evidence == "source" and not claim.sources:
        yield "promises a source and cites none", "add the key of an entry in book/references.bib"
    elif claim.evidence == "none found" and claim.verdict in ("holds", "corrected"):
        yield f"has the verdict {claim.verdict} without any evidence", "find some, or call it unsupported"
    for where, value in values.items():
        if claim.expect is None or not claim.expect.holds(value):
            yield f"has {value:g} in {where}, expected {claim.expect}", remedy
