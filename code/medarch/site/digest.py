"""What a chapter's outputs stand on, in one number.

jupyter-cache tells notebooks apart by their cells alone, so a plain Jupyter Book shows old outputs after the package
behind them has changed. A chapter's digest covers its cells and everything they reach: project modules that they
import, directly or through others, with the data files beside those; the committed checkpoints, where the loader is
among these modules; claims, records and data named by a string in a cell; the lock file; Python; and the class of
device. Prose is no part of it, and neither is the code that builds the site.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
from dataclasses import replace

from medarch.bench.provenance import import_closure, module_file, source_digest
from medarch.book.ledger import Claim
from medarch.site.chapters import BookError, Chapter, Project

LOADER = "medarch.lm.loading"


def imported_modules(tree: ast.AST) -> set[str]:
    """The modules of this project that a piece of code imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return {name for name in found if name.split(".")[0] == "medarch" and _is_module(name)}


def _is_module(name: str) -> bool:
    try:
        module_file(name)
    except ValueError:  # an object of the module before it, or a mistake that the cell itself will report
        return False
    return True


def chapter_digest(project: Project, chapter: Chapter, claims: dict[str, Claim]) -> str:
    """The SHA-256 of all that the chapter's outputs depend on, as hexadecimal digits.

    Raises:
        BookError: where the chapter's code does not parse.
    """
    parts: list[object] = [platform.python_version(), project.device]
    modules, texts = set(), set()
    for line, cell in chapter.code_cells:
        parts += [cell.source, sorted(cell.metadata.items())]
        try:
            tree = ast.parse(re.sub(r"(?m)^(\s*)([%!])", r"\1# \2", cell.source))  # a magic is no Python
        except SyntaxError as error:
            at = line + (error.lineno or 1) - 1
            raise BookError.at(chapter.file, at, f"the cell is not Python: {error.msg}", "mend the cell") from error
        modules |= imported_modules(tree)
        texts |= {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    closure = import_closure(sorted(modules))
    parts.append(source_digest(closure))
    if LOADER in closure:  # which checkpoint a page loads may depend on anything; all of them together are small
        for file in sorted(path for path in (project.book / "checkpoints").rglob("*") if path.is_file()):
            parts += [file.relative_to(project.book).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()]
    for text in sorted(texts):
        if text in claims:
            parts.append(replace(claims[text], line=0))
        if "/" in text:
            for record in sorted((project.book / "records").glob(f"{text.replace('/', '-')}.*.json")):
                parts += [record.name, record.read_text("utf8")]
    lock = project.root / "requirements.lock"
    parts.append(lock.read_text("utf8") if lock.is_file() else "")
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()
