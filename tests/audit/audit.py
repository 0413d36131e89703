"""Audit the built site with Java, Node and Chromium: ``python tests/audit/audit.py _build/html``.

Each phase runs to its end, so that one command shows every finding. The exit code is 1 if a phase found
something, and 2 if a tool is missing or there is no site to look at. ``--only PHASE`` runs that phase alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NEEDED = {
    "java": "apt-get install default-jre-headless",
    "node": "apt-get install nodejs (version 20 or later)",
    "npm": "apt-get install npm",
    "zizmor": "pip install -e '.[audit]' in the book's environment",
}


class CannotRunError(Exception):
    """Something without which a phase cannot run is missing; the message says how to get it."""


def tool(name: str) -> str:
    """Return the path of a program, looked for beside this Python first."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise CannotRunError(f"{name} is not installed: {NEEDED[name]}")
    return found


def run(*command: str | Path) -> int:
    """Run a command with its output on ours and return its exit code."""
    sys.stdout.flush()
    return subprocess.run([str(word) for word in command], cwd=ROOT, check=False).returncode


def install_packages() -> None:
    """Install the locked npm packages, unless they are as locked already."""
    version = subprocess.run([tool("node"), "--version"], capture_output=True, text=True, check=False).stdout
    if int(version.lstrip("v").split(".")[0] or 0) < 20:
        raise CannotRunError(f"node is {version.strip() or 'of no known version'}: {NEEDED['node']}")
    stamp, lock = HERE / "node_modules" / ".package-lock.json", HERE / "package-lock.json"
    if stamp.exists() and stamp.stat().st_mtime >= lock.stat().st_mtime:
        return
    if run(tool("npm"), "ci", "--prefix", HERE, "--loglevel=error"):
        raise CannotRunError("npm ci failed (see above); tests/audit/package-lock.json names what it needs")


def pages(site: Path) -> list[Path]:
    """Return the site's own pages, without what its scripts and styles bring along."""
    found = sorted(p for p in site.rglob("*.html") if not p.relative_to(site).parts[0].startswith("_"))
    if not found:
        raise CannotRunError(f"no page under {site}: run make book first")
    return found


def validity(site: Path) -> bool:
    """Check the HTML of every page with the Nu checker."""
    files = pages(site)
    jar = HERE / "node_modules" / "vnu-jar" / "build" / "dist" / "vnu.jar"
    good = run(tool("java"), "-Xss4m", "-jar", jar, "--errors-only", "--format", "gnu", *files) == 0
    remedy = "each line above names the file, line:column and what HTML does not allow there"
    return report(good, f"{len(files)} pages are valid HTML", remedy)


def browser(site: Path) -> bool:
    """Check every page in Chromium: accessibility, links, requests, console, weight, phone, Lighthouse."""
    pages(site)
    code = run(tool("node"), HERE / "pages.mjs", site)
    if code not in (0, 1):
        raise CannotRunError("the browser checks broke off (see above)")
    return code == 0


def workflows(site: Path) -> bool:
    """Check the workflow files with actionlint and zizmor; neither goes to the network."""
    files = [path.relative_to(ROOT) for path in sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))]
    if not files:
        print("no workflow files")
        return True
    newer = shutil.which("actionlint")
    linted = run(newer, *files) if newer else run(tool("node"), HERE / "workflows.mjs", *files)
    insecure = run(tool("zizmor"), "--offline", "--quiet", "--no-progress", *files)
    good = linted == 0 and insecure == 0
    return report(good, f"{len(files)} workflow files are in order", "mend the workflows named above")


def report(good: bool, success: str, remedy: str) -> bool:
    """Print how a phase ended, and pass its result on."""
    print(success if good else f"→ {remedy}", flush=True)
    return good


PHASES: dict[str, Callable[[Path], bool]] = {"validity": validity, "browser": browser, "workflows": workflows}


def main() -> int:
    """Run the phases and return the exit code."""
    parser = argparse.ArgumentParser(description="Audit a built site.")
    parser.add_argument("site", type=Path, help="the folder of the built site, such as _build/html")
    parser.add_argument("--only", choices=PHASES, action="append", help="run this phase alone (repeatable)")
    arguments = parser.parse_args()
    red: list[str] = []
    unable: list[str] = []
    try:
        install_packages()
    except CannotRunError as problem:
        print(f"audit: {problem}", file=sys.stderr)
        return 2
    for name in arguments.only or PHASES:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            if not PHASES[name](arguments.site.resolve()):
                red.append(name)
        except CannotRunError as problem:
            print(f"audit: {problem}", file=sys.stderr, flush=True)
            unable.append(name)
        print(f"   {time.monotonic() - start:.1f} s", flush=True)
    if unable or red:
        print(f"audit: red: {', '.join(red) or 'none'}; could not run: {', '.join(unable) or 'none'}")
        return 2 if unable else 1
    print("audit: green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
