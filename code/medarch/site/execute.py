"""Execute the chapters whose digest has changed: in parallel, longest first, one thread each.

Each chapter runs in a kernel of its own through nbclient and goes into jupyter-cache the moment it is done, so that a
crash, Ctrl-C or ``kill -9`` loses none of the finished ones. Faults are collected and told together, by file, line
and cell.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from medarch.book.ledger import Claim
from medarch.site.chapters import BookError, Chapter, Fault, Project
from medarch.site.digest import chapter_digest

SLOWER = 2.0  # a machine may be this much slower than the declared seconds suppose; beyond it, the chapter is at fault
LIBRARIES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
USAGE = "import resource as r; u = r.getrusage(r.RUSAGE_SELF); print(u.ru_utime + u.ru_stime, u.ru_maxrss)"
Report = Callable[[str], None]


class Store:
    """jupyter-cache with the digest of each chapter beside its executed notebook."""

    def __init__(self, project: Project, report: Report = print):
        try:
            self.cache = get_cache(project.cache)
            self.cache.list_cache_records()
        except Exception as error:
            told = f"The cache in {project.cache} is damaged ({type(error).__name__})"
            report(f"{told}; it is set up anew and every chapter runs again.")
            shutil.rmtree(project.cache, ignore_errors=True)
            self.cache = get_cache(project.cache)
            self.cache.list_cache_records()

    def current(self, chapter: Chapter, digest: str, report: Report = print) -> nbformat.NotebookNode | None:
        """The chapter's executed notebook if it was made from exactly this digest, otherwise ``None``."""
        try:
            record = self.cache.match_cache_notebook(chapter.notebook)
        except KeyError:
            return None
        run = record.data.get("medarch", {})
        if run.get("digest") != digest:
            return None
        try:
            notebook = self.cache.get_cache_bundle(record.pk).nb
            if _checksum(notebook) != run["checksum"]:
                raise ValueError("its outputs are not those that were stored")
        except Exception as error:
            report(f"{chapter.file}: its cached outputs are damaged ({error}); it runs again.")
            return None
        notebook.metadata["medarch_run"] = run
        return notebook

    def put(self, chapter: Chapter, notebook: nbformat.NotebookNode, run: dict[str, Any]) -> None:
        """Store a chapter that ran without a fault, and drop its superseded runs."""
        notebook.metadata["medarch_run"] = run = {**run, "checksum": _checksum(notebook)}
        bundle = CacheBundleIn(notebook, str(chapter.path), data={"medarch": run, "execution_seconds": run["seconds"]})
        kept = self.cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
        for record in self.cache.list_cache_records():
            if record.uri == str(chapter.path) and record.pk != kept.pk:
                with contextlib.suppress(KeyError):
                    self.cache.remove_cache(record.pk)


def _checksum(notebook: nbformat.NotebookNode) -> str:
    outputs = [[cell.source, cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def kernel_environment(root: Path) -> dict[str, str]:
    """The environment of a chapter's kernel: one thread, equal hashes, inline figures."""
    environment = {**os.environ, **{f"{name}_NUM_THREADS": "1" for name in LIBRARIES}}
    environment.pop("MPLBACKEND", None)  # it would turn inline figures off
    return environment | {"PYTHONHASHSEED": "0", "MEDARCH_ROOT": str(root)}


def run_chapter(
    chapter: Chapter, running: set[NotebookClient] | None = None, timeout: float | None = None
) -> tuple[nbformat.NotebookNode, dict[str, Any]]:
    """Execute one chapter in a fresh kernel.

    Args:
        running: the clients that are at work, to which this one belongs while it is.
        timeout: how long one cell may be silent, in seconds.

    Returns:
        the executed notebook and what the run cost: seconds by the clock and of the processor, peak memory in MiB,
        time, device and versions.

    Raises:
        BookError: for a cell that raises, a kernel that dies, or one that is silent for too long.
    """
    notebook = nbformat.from_dict(chapter.notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(USAGE))  # asks the kernel what it used; dropped below
    limit, running, begun = timeout or max(60.0, 6 * chapter.seconds), running if running is not None else set(), []
    client = NotebookClient(
        notebook,
        timeout=limit,
        kernel_name="python3",
        resources={"metadata": {"path": str(chapter.path.parent)}},
        extra_arguments=["--log-level=ERROR"],
        store_widget_state=False,
        record_timing=False,
        on_cell_start=lambda cell, cell_index: begun.append(cell) if cell.cell_type == "code" else None,
    )

    def place() -> tuple[str, int]:
        number = max(1, min(len(begun), len(chapter.code_cells)))
        return f"cell {number}", chapter.code_cells[number - 1][0] if chapter.code_cells else 1

    start = time.perf_counter()
    running.add(client)
    try:
        client.execute(env=kernel_environment(chapter.root))
        # A busy kernel may send one line in several messages.
        processor, peak = map(float, "".join(output.text for output in notebook.cells.pop().outputs).split())
    except CellExecutionError as error:
        inner = re.findall(r"(?:Cell In\[\d+\], |ipython-input[^\n]*?)line (\d+)", _plain(error.traceback))
        (cell, line), told = place(), f"raised {error.ename}: {_plain(error.evalue)}"
        remedy = "run the chapter from a fresh kernel (`make lab`) and mend the cell"
        raise BookError.at(chapter.file, line + int((inner or [1])[-1]) - 1, f"{cell} {told}", remedy) from error
    except (CellTimeoutError, TimeoutError) as error:
        (cell, line), told = place(), f"gave no answer within {limit:.0f} s; its kernel was ended"
        remedy = "look for an endless loop, or move slow work into a record"
        raise BookError.at(chapter.file, line, f"{cell} {told}", remedy) from error
    except (DeadKernelError, RuntimeError) as error:
        cell, line = place()
        remedy = "look for memory exhaustion or a crash in compiled code; the other chapters are kept"
        raise BookError.at(chapter.file, line, f"the kernel died in {cell} ({error})", remedy) from error
    finally:
        running.discard(client)
    codes = (cell for cell in notebook.cells if cell.cell_type == "code")
    for number, ((line, _), cell) in enumerate(zip(chapter.code_cells, codes, strict=True), start=1):
        if any("Traceback (most recent call last)" in _plain(str(output)) for output in cell.outputs):
            remedy = "mend what fails; to teach an error, catch it and print its message"
            raise BookError.at(chapter.file, line, f"cell {number} prints a traceback", remedy)
    return notebook, {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(processor, 2),
        "peak_mib": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "device": os.environ.get("MEDARCH_DEVICE", "cpu"),
    }


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def execute(
    project: Project,
    chapters: Iterable[Chapter],
    claims: dict[str, Claim],
    *,
    workers: int | None = None,
    force: bool = False,
    report: Report = print,
    timeout: float | None = None,
) -> dict[str, nbformat.NotebookNode]:
    """Bring the chapters up to date, running only those whose digest has changed (or all with ``force``).

    Returns:
        each chapter's current executed notebook, its run in ``metadata.medarch_run``.

    Raises:
        BookError: with the faults of all failing chapters, after the others have finished and are stored.
    """
    store, running, begun = Store(project, report), set[NotebookClient](), time.perf_counter()
    done: dict[str, nbformat.NotebookNode] = {}
    faults: list[Fault] = []
    waiting: list[tuple[Chapter, str]] = []
    for chapter in chapters:
        try:
            digest = chapter_digest(project, chapter, claims)
        except BookError as error:
            faults.extend(error.faults)
            continue
        if force or (notebook := store.current(chapter, digest, report)) is None:
            waiting.append((chapter, digest))
        else:
            done[chapter.name] = notebook
    if waiting:
        report(f"Executing {len(waiting)} chapter{'s' if len(waiting) > 1 else ''}; {len(done)} unchanged.")
    waiting.sort(key=lambda item: -item[0].seconds)
    with ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1) as pool:
        futures = {pool.submit(run_chapter, item[0], running, timeout): item for item in waiting}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                chapter, digest = futures[future]
                at = f"[{number}/{len(waiting)}, {time.perf_counter() - begun:.0f} s]"
                try:
                    notebook, run = future.result()
                except BookError as error:
                    faults.extend(error.faults)
                    report(f"{at} {chapter.name}: FAILED")
                    continue
                store.put(chapter, notebook, {**run, "digest": digest})
                done[chapter.name] = notebook
                report(f"{at} {chapter.name}: {run['seconds']:.1f} s, {run['peak_mib']} MiB")
                if run["cpu_seconds"] > chapter.seconds:
                    told = (
                        f"the chapter took {run['cpu_seconds']} s of the processor and declares {chapter.seconds:g} s"
                    )
                    fault = Fault(
                        chapter.file, 1, told, "its outputs are kept; shorten the slow cell, or make it a record"
                    )
                    # A reader's machine may be slower still, and should not refuse to build.
                    if os.environ.get("CI") and run["cpu_seconds"] > SLOWER * chapter.seconds:
                        faults.append(fault)
                    report(f"Remark: {fault}")
        except BaseException:  # an interrupt, above all: no kernel may outlive the build
            pool.shutdown(wait=False, cancel_futures=True)
            for client in list(running):
                if process := getattr(getattr(client.km, "provisioner", None), "process", None):
                    process.kill()
            raise
    if faults:
        raise BookError(faults)
    return done


def write_if_changed(path: Path, text: str) -> bool:
    """Write a file through a temporary one, only if its text differs; later builds see by its time what is new."""
    if path.is_file() and path.read_text("utf8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, "utf8")
    temporary.replace(path)
    return True
