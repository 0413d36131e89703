"""A new chapter that builds at once, from ``templates/chapter.md``, and its line in the table of contents."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from medarch.site.chapters import BookError, Project
from medarch.site.execute import write_if_changed

TEMPLATE = Path(__file__).parent / "templates" / "chapter.md"


def new_chapter(project: Project, name: str, title: str) -> Path:
    """Write ``book/<name>.md`` and list it after its folder's other pages in ``_toc.yml``.

    Raises:
        BookError: for a name that is not ``topic/chapter`` in small letters, an existing page, no title.
    """
    path, toc, file = project.page(name), project.root / "_toc.yml", f"book/{name}.md"
    title = " ".join(title.replace('"', "'").split())
    if not re.fullmatch(r"[a-z][a-z0-9-]*/[a-z0-9][a-z0-9.-]*", name) or name.endswith(".md"):
        raise BookError.at(
            "_toc.yml", 1, f"{name!r} is no name of a chapter", "write topic/chapter, such as moe/routing"
        )
    if path.exists() or name in project.toc:
        raise BookError.at(file, 1, "the page exists already", "edit it, or choose another name")
    if not title:
        raise BookError.at(file, 1, "the title is empty", "give the chapter a title")
    folder, lines = name.split("/")[0], toc.read_text("utf8").splitlines()
    kin = [number for number, line in enumerate(lines) if re.match(rf"\s*- file: book/{folder}/", line)]
    if kin:
        lines.insert(kin[-1] + 1, f"{lines[kin[-1]].partition('-')[0]}- file: book/{name}")
    else:  # a part of its own, before the reference
        reference = next((n for n, line in enumerate(lines) if line.strip() == "- caption: Reference"), len(lines))
        part = [f"  - caption: {folder.capitalize()}", "    chapters:", f"      - file: book/{name}"]
        lines[reference:reference] = part
    page = Template(TEMPLATE.read_text("utf8")).substitute(title=title, label=re.sub(r"[^a-z0-9]+", "-", name))
    write_if_changed(path, page)
    write_if_changed(toc, "\n".join(lines) + "\n")
    return path
