"""MyST Markdown cut into prose and directives, by the site's own parser; and a chapter's exercises."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from docutils.parsers.rst.directives.misc import TestDirective
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.directives import parse_directive_text
from myst_parser.parsers.mdit import create_md_parser

from medarch.site.chapters import Chapter

FENCES = {"fence", "colon_fence"}
BLOCKS = FENCES | {"code_block", "math_block", "math_block_label", "amsmath", "front_matter"}
VERBATIM = {"", "code-cell", "code-block", "code", "math", "literalinclude", "list-table"} | BLOCKS
PARTS = ("text", "checker", "starter", "solution")


class _AnyDirective(TestDirective):  # the one class whose options MyST takes as they come
    final_argument_whitespace = True


@dataclass(frozen=True)
class Directive:
    """A fence: its name ("" for plain code), what it holds, and the lines of the file on which it stands."""

    name: str
    argument: str
    options: dict[str, Any]
    body: str
    line: int
    body_line: int
    end: int


@cache
def _parser() -> MarkdownIt:
    extensions = {"amsmath", "colon_fence", "deflist", "dollarmath"}
    return create_md_parser(MdParserConfig(enable_extensions=extensions, disable_syntax=["inline"]), RendererHTML)


def directives(text: str, line: int = 1) -> Iterator[Directive]:
    """All directives and fences of ``text``, which begins at ``line`` of the file; nested ones after their parents."""
    for token in _parser().parse(text + "\n"):
        if token.map is None or token.type not in BLOCKS:
            continue
        start, end = line + token.map[0], line + token.map[1] - 1
        name, argument, options, body = token.type, token.info.strip(), {}, token.content
        if token.type in FENCES:
            named = re.match(r"\{([^}]+)\}\s*(.*)", argument)
            name, argument = (named[1], named[2]) if named else ("", argument)
            if named and name != "code-cell":  # whose options are YAML, and are read with the notebook
                parsed = parse_directive_text(_AnyDirective, argument, body, validate_options=True)
                options, body = parsed.options, "\n".join(parsed.body)
        body_line = start + 1 + len(token.content.splitlines()) - len(body.splitlines())
        yield Directive(name, argument, options, body, start, body_line, end)
        if name not in VERBATIM:
            yield from directives(body, body_line)


def prose(text: str, *without: str) -> list[tuple[int, str]]:
    """The numbered lines outside code and mathematics; ``without`` names directives, or options, to leave out."""
    hidden: set[int] = set()
    for found in directives(text):
        whole = {*without, *VERBATIM} & {found.name, *found.options}
        hidden.update(range(found.line, found.end + 1) if whole else (*range(found.line, found.body_line), found.end))
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if number not in hidden]


def exercises(chapter: Chapter) -> dict[str, dict[str, list[tuple[int, str]]]]:
    """The exercises of a chapter by label; of each part (see ``PARTS``) the lines, with class (text) or code."""
    found: dict[str, Any] = defaultdict(lambda: {part: [] for part in PARTS})
    for each in directives(chapter.text):
        if each.name == "exercise":
            found[each.options.get("label", "")]["text"].append((each.line, each.options.get("class", "")))
        elif each.name == "solution":
            code = [(block.line, block.body) for block in directives(each.body, each.body_line) if _is_python(block)]
            found[each.argument]["solution"] += code
    for line, cell in chapter.code_cells:
        for name, label in dict.fromkeys(re.findall(r"\b(exercise|check)\(\s*[\"']([^\"']+)", cell.source)):
            if name == "exercise" or "exercise" in cell.metadata.get("tags", []):
                found[label]["checker" if name == "exercise" else "starter"].append((line, cell.source))
    return dict(found)


def _is_python(block: Directive) -> bool:
    return block.name == "" and block.argument.split(" ")[0] == "python"
