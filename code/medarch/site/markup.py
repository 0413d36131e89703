"""MyST markdown cut into prose, code and directives, by the site's own parser; and a chapter's exercises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from docutils.parsers.rst.directives.misc import TestDirective
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.directives import parse_directive_text
from myst_parser.parsers.mdit import create_md_parser

from medarch.site.chapters import Chapter

VERBATIM = {"", "code-cell", "code-block", "code", "math", "literalinclude", "list-table"}


class _AnyDirective(TestDirective):  # the one class whose options MyST takes as they come
    final_argument_whitespace = True


@dataclass(frozen=True)
class Block:
    """A fence or directive: its name ("" for plain code), what it holds, which lines of the text it is."""

    name: str
    argument: str
    options: dict[str, Any]
    body: str
    line: int  # of the opening fence in the file, from one
    body_line: int
    start: int  # of the text, from zero
    end: int
    prefix: str  # indentation, list marker or quotation mark before the fence


@cache
def _parser() -> MarkdownIt:
    extensions = {"amsmath", "colon_fence", "deflist", "dollarmath"}
    return create_md_parser(
        MdParserConfig(enable_extensions=extensions, disable_syntax=["inline"]), RendererHTML
    )


def blocks(text: str, line: int = 1) -> Iterator[Block]:
    """The outermost fences and directives of ``text``, whose first line is ``line`` of the file."""
    lines = text.splitlines()
    for token in _parser().parse(text + "\n"):
        if token.map is None or token.type not in (
            "fence",
            "colon_fence",
            "code_block",
            "math_block",
            "math_block_label",
            "amsmath",
        ):
            continue
        start, end = token.map
        while token.type == "code_block" and end > start + 1 and not lines[end - 1].strip():
            end -= 1
        prefix = re.findall(r"^[\s>]*(?:[-*+]\s+|\d+[.)]\s+)?", lines[start])[0]
        name, argument, options, body = "", token.info.strip(), {}, token.content
        if token.type.startswith("math_block"):
            name, argument, options = "math", "", {"label": argument} if argument else {}
        elif match := re.match(r"\{([^}]+)\}\s*(.*)", token.info.strip()):
            name, argument = match[1], match[2]
            cell = name == "code-cell"  # whose options are YAML
            parsed = parse_directive_text(_AnyDirective, argument, token.content, validate_options=not cell)
            options, body = parsed.options, "\n".join(parsed.body)
        body_line = line + start + 1 + len(token.content.splitlines()) - len(body.splitlines())
        yield Block(name, argument, options, body, line + start, body_line, start, end, prefix)


def walk(text: str, line: int = 1) -> Iterator[Block]:
    """All directives and fences of ``text``, the nested ones after those that hold them."""
    for block in blocks(text, line):
        yield block
        if block.name not in VERBATIM:
            yield from walk(block.body, block.body_line)


def prose(text: str, line: int = 1, nested: bool = True) -> Iterator[tuple[int, str]]:
    """The lines outside code and mathematics, by number; ``nested`` enters what a page shows unfolded."""
    lines, at = text.splitlines(), 0
    for block in blocks(text, line):
        yield from ((line + number, lines[number]) for number in range(at, block.start))
        at = block.end
        if nested and block.name not in VERBATIM | {"solution"} and "deck-only" not in block.options:
            yield from prose(block.body, block.body_line)
    yield from ((line + number, lines[number]) for number in range(at, len(lines)))


def code_cells(chapter: Chapter) -> Iterator[tuple[int, Any]]:
    """Each code cell with the line of the file on which its code begins, after its options."""
    lines = chapter.path.read_text("utf8").splitlines()
    for start, cell in chapter.code_cells:
        first = (cell.source.splitlines() or [""])[0].strip()
        yield next((n for n in range(start, len(lines)) if lines[n - 1].strip() == first), start), cell


def markdown_cells(chapter: Chapter) -> Iterator[tuple[int, Any]]:
    """Each cell of prose with the line of the file on which its text begins."""
    lines = chapter.path.read_text("utf8").splitlines()
    for start, cell in zip(chapter.notebook.metadata["source_map"], chapter.notebook.cells, strict=True):
        if cell.cell_type == "markdown":
            while not lines[start].strip():
                start += 1
            yield start + 1, cell


@dataclass
class Exercise:
    """What a chapter holds of one exercise; each list has one entry where all is well."""

    texts: list[tuple[int, Block]] = field(default_factory=list)
    checkers: list[int] = field(default_factory=list)
    starters: list[tuple[int, str]] = field(default_factory=list)
    solutions: list[tuple[int, list[str]]] = field(default_factory=list)


def exercises(chapter: Chapter) -> dict[str, Exercise]:
    """The exercises of a chapter by label, in the order of the page."""
    found: dict[str, Exercise] = {}
    for line, cell in markdown_cells(chapter):
        for block in walk(cell.source, line):
            if block.name == "exercise":
                found.setdefault(block.options.get("label", ""), Exercise()).texts.append((block.line, block))
            elif block.name == "solution":
                code = [
                    b.body
                    for b in walk(block.body)
                    if b.name == "" and b.argument.split(" ")[0] in ("python", "py")
                ]
                found.setdefault(block.argument, Exercise()).solutions.append((block.line, code))
    for line, cell in code_cells(chapter):
        for name, label in _calls(cell.source):
            if name == "exercise":
                found.setdefault(label, Exercise()).checkers.append(line)
            elif "exercise" in cell.metadata.get("tags", []):
                found.setdefault(label, Exercise()).starters.append((line, cell.source))
    return found


def _calls(source: str) -> Iterator[tuple[str, str]]:
    """Calls of ``exercise`` and ``check`` with the label that they are given."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with a magic, or a mistake that its run will tell
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("exercise", "check"):
                yield name, str(node.args[0].value)
