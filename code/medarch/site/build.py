"""``make book``: execute what changed, hold the claims to their evidence, build the site, then put it in place.

Everything happens beside the published site, which is exchanged in one step at the end. A build that fails, is killed
or runs out of disk leaves the last good site whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from medarch.site.chapters import BookError, Project
from medarch.site.digest import chapter_digest
from medarch.site.evidence import check, collect, read_claims
from medarch.site.execute import Report, Store, execute


@contextlib.contextmanager
def alone(project: Project) -> Iterator[None]:
    """Hold the build lock; the system lets go of it even when the process is killed.

    Raises:
        BookError: while another build holds it.
    """
    import fcntl

    project.build.mkdir(exist_ok=True)
    with (project.build / "lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            told = f"another build of this book is running (process {handle.read().strip() or 'unknown'})"
            raise BookError.at("_build/lock", 1, told, "wait for it, or end it; nothing of it is lost") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


@contextlib.contextmanager
def _disk(project: Project) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "free some space and build again; finished chapters and the last good site are kept"
        raise BookError.at("_build", 1, f"the disk is full ({error.filename or project.build})", remedy) from error


def build_book(project: Project, *, force: bool = False, workers: int | None = None, report: Report = print) -> Path:
    """Bring the whole book up to date.

    Returns:
        the folder of the finished site.

    Raises:
        BookError: with all faults of execution, of the claims, or of the pages; the last good site stays in place.
    """
    with alone(project), _disk(project):
        start = time.perf_counter()
        claims = read_claims(project)
        notebooks = execute(project, project.chapters.values(), claims, workers=workers, force=force, report=report)
        if faults := check(project, claims, collect(project, notebooks)):
            raise BookError(faults)
        executed = time.perf_counter()
        run_sphinx(project, project.build / "work")
        publish(project.build / "work" / "html", project.html)
        report(
            f"Chapters up to date in {executed - start:.1f} s, site built in {time.perf_counter() - executed:.1f} s."
        )
    return project.html


def run_sphinx(
    project: Project, work: Path, *, strict: bool = True, preview: bool = False, without: Iterable[str] = ()
) -> None:
    """Build the pages with Jupyter Book from the executed notebooks in the cache.

    Args:
        strict: every warning is an error.
        preview: leave out the decks and the notebooks.
        without: chapters to show without outputs, because no current run of them is stored.

    Raises:
        BookError: where Sphinx fails; its own messages have been printed.
    """
    from jupyter_book.sphinx import build_sphinx

    overrides = {
        "latex_individualpages": False,  # jupyter-book's own command line always sets it
        "nb_execution_mode": "cache",
        "nb_execution_cache_path": str(project.cache),
        "nb_execution_raise_on_error": True,
        "nb_execution_excludepatterns": [f"book/{name}.md" for name in without],
        "medarch_preview": preview,  # pages alone, without decks and without cutting fonts anew
    }
    # A failed build leaves pages marked as read that never were: the next one must start afresh.
    mark = work / "failed"
    if mark.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.touch()
    status = build_sphinx(
        project.root,
        work / "html",
        path_config=project.root / "_config.yml",
        doctreedir=work / "doctrees",
        confoverrides=overrides,
        warningiserror=strict,
        keep_going=True,
        quiet=True,
        noconfig=True,
    )
    if isinstance(status, KeyboardInterrupt) or getattr(status, "errno", None) == errno.ENOSPC:
        raise status
    if status:
        told = "the pages have faults: Sphinx's messages above name file and line"
        raise BookError.at("book", 1, told, "mend each and build again")
    mark.unlink()


def publish(built: Path, site: Path) -> None:
    """Put a finished build in place of the published site, whole or not at all."""
    following, previous = site.with_name("html.next"), site.with_name("html.previous")
    if previous.exists() and not site.exists():  # a kill between the two renames below
        previous.rename(site)
    shutil.rmtree(following, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
    try:
        shutil.copytree(built, following, ignore=shutil.ignore_patterns(".buildinfo", ".doctrees"))
    except BaseException as error:
        shutil.rmtree(following, ignore_errors=True)
        if isinstance(error, shutil.Error) and "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(following)) from error
        raise
    if site.exists():
        site.rename(previous)
    following.rename(site)
    shutil.rmtree(previous, ignore_errors=True)


def preview(project: Project, name: str, port: int, report: Report = print) -> None:
    """Serve one chapter executed, and rebuild its page whenever a file of the book is saved.

    Cells run only when they or what they stand on have changed; other chapters keep the outputs of the last build, or
    are shown without. The pages are those of the whole book, so cross-references work.
    """
    import multiprocessing

    import uvicorn
    from sphinx_autobuild.__main__ import _create_app
    from sphinx_autobuild.filter import IgnoreFilter

    # Each turn is a clean process. Not by fork: a child of a process with threads can wait for ever for a lock that one
    # of them held.
    multiprocessing.set_start_method("forkserver", force=True)
    heavy = (
        "jupyter_book.sphinx myst_nb.sphinx_ext sphinx.builders.html sphinx_book_theme sphinx_design sphinx_exercise "
    )
    heavy += "sphinxext.opengraph sphinxcontrib.bibtex.domain sqlalchemy.dialects.sqlite fontTools.subset grimp IPython"
    multiprocessing.set_forkserver_preload(["medarch.site.build", *heavy.split()])
    rebuild = partial(show, project.root, name)
    first = multiprocessing.Process(target=rebuild)
    first.start()
    first.join()
    address, html = f"127.0.0.1:{port}", project.build / "preview" / "html"
    built = [project.build, project.root / ".venv", project.root / ".git"]
    ignore = IgnoreFilter(built, [r"\.part$", r"__pycache__", r"/\.", r"~$"])
    watched = [project.book, Path(__file__).parents[1], project.root / "_toc.yml"]
    app = _create_app(watched, ignore, rebuild, html, address)
    report(f"http://{address}/book/{name}.html  (Ctrl-C ends the preview)")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def show(root: Path, name: str, *, changed_paths: Iterable[Path] = ()) -> None:
    """One turn of the preview: execute the chapter if it is stale, build the pages; print faults, raise none."""
    start, project = time.perf_counter(), Project(root)
    try:
        with alone(project):
            claims, store = read_claims(project), Store(project)
            notebooks = execute(project, project.pick([name]), claims)
            for chapter in project.chapters.values():
                if chapter.name != name:
                    kept = store.current(chapter, chapter_digest(project, chapter, claims))
                    notebooks |= {chapter.name: kept} if kept else {}
            for fault in check(project, claims, collect(project, notebooks)):
                print(fault, file=sys.stderr)
            without = set(project.chapters) - set(notebooks)
            run_sphinx(project, project.build / "preview", strict=False, preview=True, without=sorted(without))
        print(f"Rebuilt in {time.perf_counter() - start:.1f} s.")
    except (BookError, OSError) as error:
        print(error, file=sys.stderr)
