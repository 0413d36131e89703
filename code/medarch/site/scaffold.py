"""A new chapter that builds at once: front matter, a cell, an exercise, its line in the table of contents."""

from __future__ import annotations

import re
from pathlib import Path

from medarch.site.chapters import BookError, Fault, Project
from medarch.site.execute import write_if_changed

PAGE = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  name: python3
  display_name: Python 3
myst:
  html_meta:
    description: "TITLE: one sentence that says what the reader will find here."
medarch:
  seconds: 10
  covers: []
---

# TITLE

Which question does this chapter answer? Say it here, and introduce the one example that it will follow.

```{code-cell} ipython3
from medarch.book.exercises import check, exercise

example = [1, 2, 3]
print("numbers in the example:", len(example))
```

## Exercises

```{exercise} The first of at least three
:label: LABEL-predict
:class: predict

What is the sum of the example?
```

```{code-cell} ipython3
:tags: [hide-input]
@exercise("LABEL-predict")
def _(answer: int) -> str | None:
    return None if answer == sum(example) else "add the numbers of the example"
```

```{code-cell} ipython3
:tags: [exercise]
answer = None
check("LABEL-predict", answer)
```

````{solution} LABEL-predict
:class: dropdown

```python
answer = sum(example)
check("LABEL-predict", answer)
```
````
"""


def new_chapter(project: Project, name: str, title: str) -> Path:
    """Write ``book/<name>.md`` and list it after its folder's other pages in ``_toc.yml``.

    Raises:
        BookError: for a name that is not ``topic/chapter`` in small letters, an existing page, no title.
    """
    path, toc = project.page(name), project.root / "_toc.yml"
    title = " ".join(title.replace('"', "'").split())
    if not re.fullmatch(r"[a-z][a-z0-9-]*/[a-z0-9][a-z0-9.-]*", name) or name.endswith(".md"):
        raise BookError(
            Fault(
                "_toc.yml", 1, f"{name!r} is no name of a chapter", "write topic/chapter, such as moe/routing"
            )
        )
    if path.exists() or name in project.toc:
        raise BookError(
            Fault(f"book/{name}.md", 1, "the page exists already", "edit it, or choose another name")
        )
    if not title:
        raise BookError(Fault(f"book/{name}.md", 1, "the title is empty", "give the chapter a title"))
    folder, lines = name.split("/")[0], toc.read_text("utf8").splitlines()
    entry = f"      - file: book/{name}"
    kin = [number for number, line in enumerate(lines) if re.match(rf"\s*- file: book/{folder}/", line)]
    if kin:
        indent = lines[kin[-1]].partition("-")[0]
        lines.insert(kin[-1] + 1, indent + entry.lstrip())
    else:  # a part of its own, before the reference
        reference = next(
            (n for n, line in enumerate(lines) if line.strip() == "- caption: Reference"), len(lines)
        )
        lines[reference:reference] = [f"  - caption: {folder.capitalize()}", "    chapters:", entry]
    write_if_changed(path, PAGE.replace("TITLE", title).replace("LABEL", re.sub(r"[^a-z0-9]+", "-", name)))
    write_if_changed(toc, "\n".join(lines) + "\n")
    return path
