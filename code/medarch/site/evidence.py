"""The build-side half of the ledger: what the current run of each chapter proved, and the gate that holds the book to it.

The values leave the executed notebooks as glue outputs and go to ``_build/evidence/<chapter>.json``. Roles, tables and the
claims page read those files alone and depend on them, so that a changed value changes the page in the next warm build.
"""

from __future__ import annotations

import ast
import json
import math
import re
from typing import Any

import nbformat
import yaml

from medarch.book.ledger import GLUE_PREFIX, Claim, LedgerError, load_claims
from medarch.site.chapters import BookError, Chapter, Fault, Project, line_of
from medarch.site.execute import write_if_changed


def read_claims(project: Project) -> dict[str, Claim]:
    """The ledger; its faults as faults of the book."""
    try:
        return load_claims(project.book)
    except FileNotFoundError:
        return {}
    except LedgerError as error:
        raise BookError(Fault("book/claims.yml", line, what, do) for line, what, do in error.faults) from error


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
        entry = {"chapter": name, "claims": proved(notebook), "run": dict(notebook.metadata["medarch_run"])}
        write_if_changed(evidence_file(project, name), json.dumps(entry, indent=1, sort_keys=True) + "\n")
        evidence[name] = entry
    kept = {evidence_file(project, name) for name in project.chapters}
    for path in project.evidence.rglob("*.json"):
        if path not in kept:  # a chapter that has left the book proves nothing
            path.unlink()
    return evidence


def evidence_file(project: Project, name: str) -> Any:
    """The evidence file of a chapter."""
    return project.evidence / f"{name}.json"


def read_evidence(project: Project, name: str) -> dict[str, Any] | None:
    """A chapter's evidence as of its last build, or ``None``."""
    path = evidence_file(project, name)
    return json.loads(path.read_text("utf8")) if path.is_file() else None


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
    text = (project.book / "claims.yml").read_text("utf8") if claims else ""
    bibliography = project.book / "references.bib"
    keys = set(re.findall(r"(?m)^@\w+\{\s*([^,\s]+)", bibliography.read_text("utf8"))) if bibliography.is_file() else set()
    sources = read_sources(project)
    faults = []

    def fault(claim: Claim, message: str, remedy: str) -> None:
        where = line_of(text, f"id: {claim.id}") if text else claim.line
        faults.append(Fault("book/claims.yml", where, f"{claim.chapter}: claim {claim.id!r} {message}", remedy))

    for name in evidence:
        for claim_id in evidence[name]["claims"]:
            if claim_id in claims and claims[claim_id].chapter != name:
                fault(claims[claim_id], f"is proved by {name}, but belongs to {claims[claim_id].chapter}", "move the cell or the claim")
        faults.extend(_coverage(project.chapters[name], claims, sources, project))
    for claim in claims.values():
        for key in (claim.section, *claim.also):
            if sources and key not in sources:
                fault(claim, f"names the section {key!r}, which book/sources.yml does not have", "correct the section")
        if unknown := set(claim.sources) - keys:
            fault(claim, f"cites {', '.join(sorted(unknown))}, not in book/references.bib", "add the entry or correct the key")
        if claim.chapter not in evidence:
            continue
        if claim.verdict is None:
            fault(claim, "has no verdict", "measure it or look it up, then write holds, corrected, unsupported or forecast")
        elif claim.verdict in ("corrected", "unsupported") and not claim.correction:
            fault(claim, f"is {claim.verdict} but says not what is true", "write its correction")
        if claim.evidence == "cell":
            value = evidence[claim.chapter]["claims"].get(claim.id)
            if value is None:
                fault(claim, "promises a cell, and no cell of the chapter proves it", f'call prove("{claim.id}", value) in book/{claim.chapter}.md')
            elif claim.expect is None or not claim.expect.holds(value):
                fault(claim, f"measured {value:g}, expected {claim.expect}", "correct the cell, or the claim with its verdict")
        elif claim.evidence == "record":
            values = record_values(project, claim)
            if not values:
                fault(claim, f"promises the record {claim.record!r}, which is not in book/records", f"run `medarch bench {claim.record}`")
            for device, value in values.items():
                if claim.expect is None or not claim.expect.holds(value):
                    fault(claim, f"has {value:g} in the record of {device}, expected {claim.expect}", "correct the claim with its verdict")
        elif claim.evidence == "source" and not claim.sources:
            fault(claim, "promises a source and cites none", "add the key of an entry in book/references.bib")
        elif claim.evidence == "none found" and claim.verdict not in ("unsupported", "forecast", None):
            fault(claim, f"has the verdict {claim.verdict} without any evidence", "find some, or call it unsupported")
    return faults


def _coverage(chapter: Chapter, claims: dict[str, Claim], sources: dict[str, Any], project: Project) -> list[Fault]:
    """A chapter that covers a section answers for its claims, unless another chapter of the book does."""
    faults = []
    line = line_of(chapter.path.read_text("utf8"), "covers:")
    for section in chapter.meta["covers"]:
        if section not in sources:
            faults.append(Fault(chapter.file, line, f"covers {section!r}, which book/sources.yml does not have", "correct the id"))
        for claim in claims.values():
            if claim.section == section and claim.chapter not in project.chapters:
                faults.append(Fault(chapter.file, line, f"covers {section!r} but not its claim {claim.id!r}, planned for {claim.chapter}",
                                    "take the claim into this chapter, or do not cover the section"))  # fmt: skip
    return faults
