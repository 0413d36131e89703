"""``medarch …``: the commands of the book. ``make help`` shows the ones a reader needs."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from medarch.site.chapters import BookError, Fault, Project

HELP = "Build, check and measure the book on emerging architectures for medical AI."
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
Names = Annotated[list[str] | None, typer.Argument(help="Chapters, such as moe/architecture; all where none is named.")]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a command whose faults end it with a message and a status, never with a traceback."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except BookError as error:
            count = len(error.faults)
            print(f"{error}\n{count} fault{'s' if count > 1 else ''}.", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            print("Interrupted. What was finished is kept.", file=sys.stderr)
            raise typer.Exit(130) from None

    return app.command()(run)


def say(text: str) -> None:
    """Print at once, so that progress is seen in a pipe too."""
    print(text, flush=True)


@command
def build(force: bool = False, workers: int | None = None) -> None:
    """Execute what has changed, check the claims, and build the site."""
    from medarch.site.build import build_book

    site = build_book(Project.find(), force=force, workers=workers, report=say)
    say(f"The book is in {site / 'index.html'}; `make serve` opens it.")


@command
def execute(names: Names = None, force: bool = False, workers: int | None = None) -> None:
    """Execute chapters that have changed, without building pages."""
    from medarch.site.build import alone
    from medarch.site.evidence import collect, read_claims
    from medarch.site.execute import execute as run

    project = Project.find()
    with alone(project):
        done = run(project, project.pick(names or []), read_claims(project), force=force, workers=workers, report=say)
        collect(project, done)
    say(f"{len(done)} chapter{'s' if len(done) != 1 else ''} up to date.")


@command
def record(names: Names = None) -> None:
    """Record the checked outputs of chapters anew, and show what changed."""
    from medarch.site.build import alone
    from medarch.site.evidence import read_claims
    from medarch.site.execute import execute as run
    from medarch.site.recorded import record as write

    project = Project.find()
    chapters = project.pick(names or [])
    with alone(project):
        changed = write(project, chapters, run(project, chapters, read_claims(project), report=say))
    if not changed:
        say("The recorded outputs are unchanged.")
        return
    subprocess.run(["git", "--no-pager", "diff", "--", *map(str, changed)], cwd=project.root, check=False)
    say("Recorded anew; review the difference before you commit it: " + ", ".join(path.name for path in changed))


@command
def lint(names: Names = None) -> None:
    """Check chapters: length, alternative texts, exercises, randomness."""
    from medarch.site.lint import lint as check

    project = Project.find()
    faults = check(project, [chapter.name for chapter in project.pick(names or [])])
    if faults:
        raise BookError(faults)
    say("The chapters are in order.")


@command
def export(folder: Path = Path("_build/notebooks")) -> None:
    """Bring the book up to date and write the readers' notebooks into a folder."""
    from medarch.site.build import build_book

    site = build_book(Project.find(), report=say)
    shutil.copytree(site / "notebooks", folder, dirs_exist_ok=True)
    say(f"The notebooks are in {folder}.")


@command
def preview(chapter: str, port: int = 8001) -> None:
    """Serve one chapter and refresh its page on each save."""
    from medarch.site.build import preview as serve_preview

    project = Project.find()
    project.pick([chapter])
    _free(port, "preview CHAPTER=" + chapter)
    serve_preview(project, chapter.removeprefix("book/").removesuffix(".md"), port, report=say)


@command
def new_chapter(name: str, title: str) -> None:
    """Write a chapter that builds at once, and list it in the table of contents."""
    from medarch.site.scaffold import new_chapter as write

    say(str(write(Project.find(), name, title)))


@command
def serve(port: int = 8000) -> None:
    """Serve the finished site on this machine."""
    import http.server
    from functools import partial

    site = Project.find().html
    if not (site / "index.html").is_file():
        print("There is no site yet: run `make book` first.", file=sys.stderr)
        raise typer.Exit(1)
    _free(port, "serve")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    say(f"The book is served at http://127.0.0.1:{port}/  (Ctrl-C ends it)")
    http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


def _free(port: int, target: str) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            print(
                f"Port {port} is taken: end what uses it, or choose another: make {target} PORT={port + 1}",
                file=sys.stderr,
            )
            raise typer.Exit(1) from error


@command
def bench(name: str, device: str = "cpu", quick: bool = False) -> None:
    """Run a benchmark in a fresh process and write its record."""
    from medarch.bench.commands import run_benchmark

    try:
        say(str(run_benchmark(name, device, quick)))
    except (ValueError, KeyError, RuntimeError) as error:
        print(error.args[0] if error.args else error, file=sys.stderr)
        raise typer.Exit(1) from error


@command
def train(
    recipe: Annotated[str, typer.Argument(help="One of the book's models: dense, moe, mamba or hybrid.")],
    steps: int | None = None,
    seed: int | None = None,
    folder: Path | None = None,
    device: str = "cpu",
    release: bool = False,
) -> None:
    """Train one of the book's language models, or go on with it where it was interrupted; also under torchrun."""
    from medarch.lm.catalogue import find_recipe
    from medarch.lm.release import publish, run_recipe

    changes = {name: value for name, value in {"steps": steps, "seed": seed}.items() if value is not None}
    try:
        if release and changes:
            raise ValueError("--release makes the committed checkpoint again: it takes neither --steps nor --seed")
        chosen = find_recipe(recipe).change(**changes)
        words = [recipe, *(f"--{name} {value}" for name, value in changes.items()), *["--release"] * release]
        card = [f"--device {device}"] * (device != "cpu")
        run = folder or Project.find().build / "training" / "-".join(words).replace("--", "").replace(" ", "-")
        made = run_recipe(chosen, run, device, f"medarch train {' '.join([*words, *card])}", _progress())
        if made is not None:
            say(f"The checkpoint is in {publish(made, recipe) if release else made}.")
    except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
        print(error.args[-1] if error.args else error, file=sys.stderr)
        raise typer.Exit(1) from error


def _progress() -> Callable[[str], None]:
    """One line that is written over on a terminal, and elsewhere a line now and then."""
    import time

    shown = -math.inf

    def show(line: str) -> None:
        nonlocal shown
        if sys.stdout.isatty():
            sys.stdout.write(f"\r\033[K{line}" + "\n" * ("bits_per_byte" in line))
            sys.stdout.flush()
        elif "bits_per_byte" in line or time.monotonic() - shown >= 10:
            say(line)
            shown = time.monotonic()

    return show


@command
def verify(checkpoint: str) -> None:
    """Hold a committed checkpoint to the present code: its first steps again, and its figures."""
    from medarch.lm.verify import verify as run

    try:
        say(f"It fits the present code, as {run(checkpoint)} now says.")
    except ValueError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error


@command
def records() -> None:
    """Refuse a release while a record or a checkpoint stands on an earlier version of its code."""
    from medarch.bench.commands import stale_records
    from medarch.lm.verify import stale_checkpoints

    book = Project.find().book
    stale = {f"records/{name}": remedy for name, remedy in stale_records(book / "records").items()}
    stale |= {f"checkpoints/{name}": remedy for name, remedy in stale_checkpoints().items()}
    faults = [Fault(f"book/{name}", 1, "the code or data behind it has changed since", remedy)
              for name, remedy in stale.items()]  # fmt: skip
    if faults:
        raise BookError(faults)
    say("Every record was measured, and every checkpoint trained or verified, with the code as it stands.")


if __name__ == "__main__":
    app()
