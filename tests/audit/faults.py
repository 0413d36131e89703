"""Prove that the audit bites: ``python tests/audit/faults.py _build/html``.

Each fault is planted in its own copy of one chapter of a copied site; one run of the checks must then name
each page with its rule, and nothing else. The exit code is 0 if every gate is red for its fault alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent


def into_article(markup: str) -> Callable[[str], str]:
    """Return an edit that puts markup at the start of the article."""
    return lambda page: page.replace('<article class="bd-article">', f'<article class="bd-article">{markup}', 1)


# name of the fault -> (the finding's rule, how the page is spoilt)
FAULTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "contrast-light": ("axe color-contrast", into_article('<p style="color: #bbb">pale</p>')),
    "contrast-dark": (
        "axe color-contrast",
        into_article('<style>[data-theme="dark"] #x { color: #444 }</style><p id="x">dim</p>'),
    ),
    "button-name": ("axe label-content-name-mismatch", into_article('<button aria-label="Go">Stay</button>')),
    "region": ("axe region", lambda page: page.replace("</body>", "<p>outside all landmarks</p></body>", 1)),
    "third-party": (
        "third-party request",
        into_article('<img alt="a dot" src="http://127.0.0.1:9/elsewhere.png">'),
    ),
    "missing-file": ("HTTP 404", into_article('<script src="/_static/nowhere.js"></script>')),
    "script-error": ("script error", into_article("<script>nothing.here()</script>")),
    "console-error": ("console error", into_article('<script>console.error("planted")</script>')),
    "broken-link": ("broken link", into_article('<p><a href="/nowhere.html">to nowhere</a></p>')),
    "broken-anchor": ("broken anchor", into_article('<p><a href="#nowhere">to no element</a></p>')),
    "overflow": ("overflow at 390 px", into_article('<p style="width: 700px">wide</p>')),
    "alt-text": ("alt text", into_article('<img src="/_static/logo.svg" alt="">')),
    "image": ("image", into_article('<img src="data:image/png;base64,AAAA" alt="broken">')),
    "icon": ("icon", into_article('<i class="fa-solid fa-no-such-icon"></i>')),
    "weight": ("weight", into_article('<link rel="stylesheet" href="/_static/heavy.css">')),
    "chart": (
        "mathematics, fonts or charts",
        into_article(
            '<figure><img src="/_static/logo.svg" alt="a logo"><script type="application/json" class="chart-data">'
            '{"width":"wide"}</script></figure>'
        ),
    ),
    "equation": ("equation", into_article(r'<span class="math notranslate nohighlight">\(\frac{1\)</span>')),
}
# Spoiling these also shows as a console error or as an image that does not show, and rightly so.
ACCOMPANIED = {
    "third-party": {"console error", "image"},
    "missing-file": {"console error"},
}


def run(*command: str | Path) -> str:
    """Run a command and return all it wrote."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def plant(site: Path) -> str:
    """Plant every fault in a copy of a page with equations; return that page's folder and start."""
    needed = ("window.MathJax", '<article class="bd-article">')
    every = {path: path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}
    pages = [path for path, text in every.items() if all(part in text for part in needed)]
    if not pages:
        sys.exit(f"faults: no page with equations under {site}: build the book first")
    (site / "_static" / "heavy.css").write_text("".join(f".a{n**3:x}{{--b:{n**5}}}" for n in range(60_000)))
    sound = pages[0].read_text(encoding="utf-8")
    for name, (_, spoil) in FAULTS.items():
        pages[0].with_name(f"fault-{name}.html").write_text(spoil(sound), encoding="utf-8")
    return str(pages[0].parent.relative_to(site) / "fault-")


def main() -> int:
    """Plant the faults, run the checks, compare what they say with what they must say."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        shutil.copytree(sys.argv[1], site)
        start = plant(site)
        said = run("node", HERE / "pages.mjs", site, "--no-lighthouse", "--only", start)
        for name, (rule, _) in FAULTS.items():
            rules = set(re.findall(rf"^{re.escape(start)}{name}\.html(?: \(\w+\))?: (.*?): ", said, re.MULTILINE))
            others = rules - {rule} - ACCOMPANIED.get(name, set())
            good = rule in rules and not others
            wrong += not good
            print(f"{'red, as it must be' if good else 'WRONG'}: {name}: {rule}; found: {sorted(rules)}")
        jar = HERE / "node_modules" / "vnu-jar" / "build" / "dist" / "vnu.jar"
        page = site / "fault.html"
        page.write_text("<!DOCTYPE html><html lang=en><title>x</title><p id=a><p id=a><div></p></div>")
        valid = "Duplicate ID" in run("java", "-jar", jar, "--errors-only", page)
        slow = (site / "index.html").read_text(encoding="utf-8")
        landing = re.search(r'url=([^"]+)"', slow)
        assert landing, "the site's index.html leads to no landing page"
        first = site / landing[1]
        busy = "<head><script>const end = Date.now() + 4000; while (Date.now() < end);</script>"
        first.write_text(first.read_text(encoding="utf-8").replace("<head>", busy, 1), encoding="utf-8")
        said = run("node", HERE / "pages.mjs", site, "--only", landing[1])
        for name, good in {"HTML validity": valid, "Lighthouse": "lighthouse performance: " in said}.items():
            wrong += not good
            print(f"{'red, as it must be' if good else 'WRONG'}: {name}")
    print(f"faults: {wrong} gates do not bite" if wrong else "faults: every gate bites")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
