"""What a chapter's outputs stand on, in one number.

jupyter-cache tells notebooks apart by their cells alone, so a plain Jupyter Book shows old outputs after the package behind
them has changed. A chapter's digest covers its cells and everything they reach: project modules that they import, directly or
through others, with the data files beside those; claims, records and data named by a string in a cell; the lock file; Python;
and the class of device. Prose is no part of it, and neither is the code that builds the site.
"""

from __future__ import annotations

import ast
import hashlib
import platform
from dataclasses import asdict

from medarch.bench.provenance import import_closure, module_file, source_digest
from medarch.book.ledger import Claim
from medarch.site.chapters import BookError, Chapter, Fault, Project


def imported_modules(tree: ast.AST) -> set[str]:
    """The modules of this project that a piece of code imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
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
    try:
        tree = ast.parse(chapter.source)
    except SyntaxError as error:
        for line, cell in chapter.code_cells:
            try:
                ast.parse(cell.source)
            except SyntaxError as inner:
                at = line + (inner.lineno or 1) - 1
                raise BookError(Fault(chapter.file, at, f"the cell is not Python: {inner.msg}", "mend the cell")) from error
        raise BookError(Fault(chapter.file, 1, f"the cells are not Python: {error.msg}", "mend them")) from error
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode()
            digest.update(len(data).to_bytes(8, "big") + data)

    for _, cell in chapter.code_cells:
        add(cell.source, sorted(cell.metadata.items()))
    add(source_digest(import_closure(sorted(imported_modules(tree)))))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for text in sorted(texts):
        if text in claims:
            entry = asdict(claims[text])
            entry.pop("line")
            add(text, sorted(entry.items(), key=lambda item: item[0]))
        for record in sorted((project.book / "records").glob(f"{text.replace('/', '-')}.*.json")) if "/" in text else []:
            add(record.name, record.read_bytes())
    lock = project.root / "requirements.lock"
    add(lock.read_bytes() if lock.is_file() else b"", platform.python_version(), project.device)
    return digest.hexdigest()
