"""How much faster chapters are executed side by side than one after the other: python tests/site/parallel.py

Six chapters that compute for a few seconds each, executed with one worker and with one for each core, in turns.
Prints seconds, ratios and their spread; it is a measurement and no test.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

from medarch.site.chapters import Project
from medarch.site.execute import execute

CHAPTERS, ROUNDS, LOOPS = 6, 3, 40_000_000
HEADER = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  name: python3
medarch:
  seconds: 25
  covers: []
---

# Chapter {0}

```{{code-cell}} ipython3
print({0}, sum(number * number % 7 for number in range({1})) > 0)
```
"""


def main() -> None:
    """Write the chapters, execute them both ways in turns, and print what it took."""
    times: dict[int, list[float]] = {1: [], os.cpu_count() or 1: []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = [f"demo/chapter-{number}" for number in range(CHAPTERS)]
        for number, name in enumerate(["index", *names]):
            page = root / "book" / f"{name}.md"
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text("# Index\n" if name == "index" else HEADER.format(number, LOOPS), "utf8")
        entries = "".join(f"  - file: book/{name}\n" for name in names)
        (root / "_toc.yml").write_text(f"format: jb-book\nroot: book/index\nchapters:\n{entries}", "utf8")
        project = Project(root)
        for _ in range(ROUNDS):
            for workers, seconds in times.items():
                start = time.perf_counter()
                execute(project, project.chapters.values(), {}, workers=workers, force=True, report=lambda _: None)
                seconds.append(time.perf_counter() - start)
    serial, parallel = times.values()
    ratios = sorted(one / many for one, many in zip(serial, parallel, strict=True))
    print(f"{CHAPTERS} chapters, {ROUNDS} rounds, {os.cpu_count()} cores")
    print("one worker: ", ", ".join(f"{seconds:.1f} s" for seconds in serial))
    print("all cores:  ", ", ".join(f"{seconds:.1f} s" for seconds in parallel))
    print(f"ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
