"""The ledger of claims: what the sources assert, what became of it, and the cell that proves it.

A cell calls :func:`prove` with the number it has just measured. The verdict is printed, and the value leaves the
kernel as an output in the form that ``myst_nb.glue`` writes, from which the build collects it. A value outside the
claim's tolerance fails the cell, and so the build: the book cannot say one thing and measure another.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

VERDICTS = ("holds", "corrected", "unsupported", "forecast")
EVIDENCE = ("cell", "record", "source", "none found")
GLUE_PREFIX = "application/papermill.record/"


@dataclass(frozen=True)
class Expectation:
    """What a measured value must satisfy: within ``tolerance`` of ``value``, or between ``min`` and ``max``."""

    value: float | None = None
    tolerance: float | None = None
    min: float | None = None
    max: float | None = None

    def bounds(self) -> tuple[float, float]:
        """The closed interval that the value must lie in."""
        if self.value is not None:
            tolerance = self.tolerance or 0.0
            return self.value - tolerance, self.value + tolerance
        return (-math.inf if self.min is None else self.min, math.inf if self.max is None else self.max)

    def holds(self, measured: float) -> bool:
        """Whether ``measured`` is a number inside the bounds; NaN never is."""
        low, high = self.bounds()
        return low <= measured <= high

    def __str__(self) -> str:
        if self.value is not None:
            return f"{self.value:g} ± {self.tolerance or 0:g}"
        low, high = self.bounds()
        if math.isinf(low):
            return f"at most {high:g}"
        return f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"


@dataclass(frozen=True)
class Claim:
    """One checkable claim of the sources, in the book's own words."""

    id: str
    section: str
    chapter: str
    claim: str
    kind: str
    evidence: str
    verdict: str | None = None
    quantity: str | None = None
    expect: Expectation | None = None
    record: str | None = None
    path: str | None = None
    correction: str | None = None
    sources: tuple[str, ...] = ()
    looked_up: bool = False
    also: tuple[str, ...] = ()
    line: int = field(default=1, compare=False)


class LedgerError(ValueError):
    """Faults of ``claims.yml``: a list of (line, message, remedy)."""

    def __init__(self, faults: list[tuple[int, str, str]]):
        self.faults = faults
        super().__init__("\n".join(f"book/claims.yml:{line}: {what}\n    -> {do}" for line, what, do in faults))


def find_book() -> Path:
    """The folder ``book/`` of the project around ``MEDARCH_ROOT`` or the working directory.

    Raises:
        FileNotFoundError: where neither lies inside a clone of the book.
    """
    start = Path(os.environ.get("MEDARCH_ROOT") or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "_toc.yml").is_file():
            return folder / "book"
    raise FileNotFoundError(f"no _toc.yml in {start} or above it (run inside a clone of the book, or set MEDARCH_ROOT)")


def parse_claims(text: str) -> dict[str, Claim]:
    """Read the ledger, in the order of its entries.

    Raises:
        LedgerError: with every malformed or duplicate entry, by line.
    """
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        root, entries = yaml.compose(text, Loader=loader), yaml.load(text, Loader=loader) or []
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise LedgerError([(mark.line + 1 if mark else 1, f"not valid YAML: {error}", "mend it")]) from error
    claims: dict[str, Claim] = {}
    faults = []
    for node, entry in zip(root.value if root else (), entries, strict=True):
        line = node.start_mark.line + 1
        if wrong := _wrong(entry, claims):
            faults.append((line, *wrong))
            continue
        lists = {key: tuple(entry.get(key) or ()) for key in ("sources", "also")}
        expect = Expectation(**entry["expect"]) if entry.get("expect") else None
        claims[entry["id"]] = Claim(**{**entry, **lists, "expect": expect, "line": line})
    if faults:
        raise LedgerError(faults)
    return claims


def _wrong(entry: Any, before: dict[str, Claim]) -> tuple[str, str] | None:
    """What is wrong with an entry of the ledger, and what to do about it."""
    name = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        return "an entry is not a mapping with an id", "give it the fields that CONTRIBUTING.md lists"
    if name in before:
        return f"claim {name!r} stands twice (first at line {before[name].line})", "rename or delete one"
    missing = [key for key in ("section", "chapter", "claim", "kind", "evidence") if not entry.get(key)]
    unknown = sorted(set(entry) - ({each.name for each in fields(Claim)} - {"line"}))
    if missing or unknown:
        return f"claim {name!r}: missing {missing}, unknown {unknown}", "give each field its proper name"
    if entry.get("verdict") not in (None, *VERDICTS) or entry["evidence"] not in EVIDENCE:
        told = f"claim {name!r}: verdict {entry.get('verdict')!r}, evidence {entry['evidence']!r}"
        return told, f"verdict is one of {', '.join(VERDICTS)}; evidence one of {', '.join(EVIDENCE)}"
    expect = entry.get("expect") or {}
    if not isinstance(expect, dict) or set(expect) - {each.name for each in fields(Expectation)}:
        return f"claim {name!r}: expect is {expect!r}", "write {value: , tolerance: } or {min: , max: }"
    return None


def load_claims(book: Path | None = None) -> dict[str, Claim]:
    """The ledger of the book around the working directory; see :func:`parse_claims`."""
    return parse_claims(((book or find_book()) / "claims.yml").read_text("utf8"))


class Disproved(AssertionError):  # noqa: N818  (a verdict, as it is printed)
    """A measured value lies outside what the ledger says of the claim."""


def prove(claim_id: str, measured: float) -> None:
    """Tell the ledger what this cell has just measured, and print the claim's verdict.

    Args:
        claim_id: the claim's id in ``book/claims.yml``.
        measured: the claim's ``quantity``, in the unit that the ledger names.

    Raises:
        KeyError: for an id that the ledger does not know (the nearest are named).
        ValueError: where the claim is not one that a cell proves.
        Disproved: where ``measured`` is outside the claim's bounds, or not a number.
    """
    from IPython.display import display

    claims = load_claims()
    if claim_id not in claims:
        import difflib

        near = ", ".join(difflib.get_close_matches(claim_id, claims, n=3)) or "none is near"
        raise KeyError(f"book/claims.yml has no claim {claim_id!r} (nearest: {near})")
    claim = claims[claim_id]
    if claim.evidence != "cell" or claim.expect is None or claim.verdict is None:
        raise ValueError(
            f"claim {claim_id!r} (book/claims.yml:{claim.line}) is not proved by a cell: "
            "it needs `evidence: cell`, a verdict and `expect:`"
        )
    value = float(measured)
    if not claim.expect.holds(value):
        raise Disproved(
            f"claim {claim_id!r}: measured {value:g}, but book/claims.yml:{claim.line} expects {claim.expect} "
            f"({claim.quantity}); correct the cell, or the claim with its verdict"
        )
    print(f"Claim {claim_id}: {claim.verdict} (expected {claim.expect}, and so measured)")
    payload: dict[str, Any] = {GLUE_PREFIX + "text/plain": repr(value)}
    display(payload, raw=True, metadata={"scrapbook": {"name": claim_id, "mime_prefix": GLUE_PREFIX}})
