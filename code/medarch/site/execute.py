"""Execute the chapters whose digest has changed: in parallel, longest first, one thread each.

Each chapter runs in a kernel of its own through nbclient and goes into jupyter-cache the moment it is done, so that a crash,
Ctrl-C or ``kill -9`` loses none of the finished ones. Faults are collected and told together, by file, line and cell.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
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

THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")}
USAGE = "import resource as r; u = r.getrusage(r.RUSAGE_SELF); print(u.ru_utime + u.ru_stime, u.ru_maxrss)"
Report = Callable[[str], None]


class Store:
    """jupyter-cache with the digest of each chapter beside its executed notebook."""

    def __init__(self, project: Project, report: Report = print):
        self.project = project
        self._open(report)

    def _open(self, report: Report) -> None:
        folder = self.project.cache
        try:
            self.cache = get_cache(folder)
            self.cache.list_cache_records()
        except Exception as error:
            report(f"The cache in {folder} is damaged ({type(error).__name__}); it is set up anew and every chapter runs again.")
            shutil.rmtree(folder, ignore_errors=True)
            self.cache = get_cache(folder)
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
        data = {"medarch": run, "execution_seconds": run["seconds"]}
        kept = self.cache.cache_notebook_bundle(
            CacheBundleIn(notebook, str(chapter.path), data=data), check_validity=False, overwrite=True
        )
        for record in self.cache.list_cache_records():
            if record.uri == str(chapter.path) and record.pk != kept.pk:
                with contextlib.suppress(KeyError):
                    self.cache.remove_cache(record.pk)


def _checksum(notebook: nbformat.NotebookNode) -> str:
    outputs = [[cell.source, cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(nbformat.v4.nbjson.json.dumps(outputs, sort_keys=True).encode()).hexdigest()


class Running:
    """The kernels that are alive, so that an interrupted build can end them."""

    def __init__(self) -> None:
        self.clients: set[NotebookClient] = set()

    def end(self) -> None:
        for client in list(self.clients):
            process = getattr(getattr(client.km, "provisioner", None), "process", None)
            if process is not None:
                process.kill()


def run_chapter(chapter: Chapter, running: Running, timeout: float | None = None) -> tuple[nbformat.NotebookNode, dict[str, Any]]:
    """Execute one chapter in a fresh kernel.

    Returns:
        the executed notebook and what the run cost: seconds by the clock and of the processor, peak memory in MiB, time,
        device and versions.

    Raises:
        BookError: for a cell that raises, a kernel that dies, or one that is silent for too long.
    """
    notebook = nbformat.from_dict(chapter.notebook)
    limit = timeout or max(60.0, 6 * chapter.seconds)
    notebook.cells.append(nbformat.v4.new_code_cell(USAGE))  # asks the kernel what it used; dropped below
    position = 0

    def started(cell: nbformat.NotebookNode, cell_index: int) -> None:
        nonlocal position
        position = cell_index

    client = NotebookClient(
        notebook, timeout=limit, kernel_name="python3", resources={"metadata": {"path": str(chapter.path.parent)}},
        extra_arguments=["--log-level=ERROR"], store_widget_state=False, record_timing=False, on_cell_start=started,
    )  # fmt: skip
    environment = {**os.environ, **THREADS, "PYTHONHASHSEED": "0", "MEDARCH_ROOT": str(chapter.root)}
    environment.pop("MPLBACKEND", None)  # it would turn inline figures off
    start = time.perf_counter()
    running.clients.add(client)
    try:
        client.execute(env=environment)
        processor, peak = map(float, notebook.cells.pop().outputs[0].text.split())
    except CellExecutionError as error:
        inner = re.findall(r"(?:Cell In\[\d+\], |ipython-input[^\n]*?)line (\d+)", _plain(error.traceback))
        line = _line(chapter, position) + (int(inner[-1]) - 1 if inner else 0)
        raise BookError(Fault(chapter.file, line, f"cell {_number(chapter, position)} raised {error.ename}: {_plain(error.evalue)}",
                              "run the chapter from a fresh kernel (`make lab`) and mend the cell")) from error  # fmt: skip
    except (CellTimeoutError, TimeoutError) as error:
        raise BookError(Fault(chapter.file, _line(chapter, position), f"cell {_number(chapter, position)} gave no answer within {limit:.0f} s; its kernel was ended",
                              "look for an endless loop, or move slow work into a record")) from error  # fmt: skip
    except (DeadKernelError, RuntimeError) as error:
        raise BookError(Fault(chapter.file, _line(chapter, position), f"the kernel died in cell {_number(chapter, position)} ({error})",
                              "look for memory exhaustion or a crash in compiled code; the other chapters are kept")) from error  # fmt: skip
    finally:
        running.clients.discard(client)
    run = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(processor, 2),
        "peak_mib": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "device": os.environ.get("MEDARCH_DEVICE", "cpu"),
    }
    return notebook, run


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _line(chapter: Chapter, position: int) -> int:
    """The line of the file on which the code of the cell at ``position`` begins, after its options."""
    start = int(chapter.notebook.metadata["source_map"][position])
    text = chapter.path.read_text("utf8").splitlines()
    first = (chapter.notebook.cells[position].source.splitlines() or [""])[0]
    for number in range(start, min(start + 20, len(text))):
        if text[number].strip() == first.strip():
            return number + 1
    return start + 1


def _number(chapter: Chapter, position: int) -> int:
    return sum(cell.cell_type == "code" for cell in chapter.notebook.cells[: position + 1])


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
    store, running = Store(project, report), Running()
    done: dict[str, nbformat.NotebookNode] = {}
    faults: list[Fault] = []
    waiting: list[tuple[Chapter, str]] = []
    for chapter in chapters:
        try:
            digest = chapter_digest(project, chapter, claims)
        except BookError as error:
            faults.extend(error.faults)
            continue
        notebook = None if force else store.current(chapter, digest, report)
        if notebook is None:
            waiting.append((chapter, digest))
        else:
            done[chapter.name] = notebook
    waiting.sort(key=lambda item: -item[0].seconds)
    total, begun = len(waiting), time.perf_counter()
    if total:
        report(f"Executing {total} chapter{'s' if total > 1 else ''}; {len(done)} unchanged.")
    with ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1) as pool:
        futures = {pool.submit(run_chapter, chapter, running, timeout): (chapter, digest) for chapter, digest in waiting}
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    chapter, digest = futures[future]
                    at = f"[{total - len(pending)}/{total}, {time.perf_counter() - begun:.0f} s]"
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
                        faults.extend(_too_slow(chapter, run, report))
        except BaseException:
            for future in pending:
                future.cancel()
            running.end()
            raise
    if faults:
        raise BookError(faults)
    return done


def _too_slow(chapter: Chapter, run: dict[str, Any], report: Report) -> list[Fault]:
    """Over the declared time: a fault where the book is checked (CI), a remark on a reader's slower machine."""
    fault = Fault(chapter.file, 1, f"the chapter took {run['cpu_seconds']} s of the processor and declares {chapter.seconds:g} s",
                  "its outputs are kept; make the slow cell smaller, move it into a record, or declare more (at most 25 s, a lab 45 s)")  # fmt: skip
    if os.environ.get("CI"):
        return [fault]
    report(f"Remark: {fault}")
    return []


def write_if_changed(path: Path, text: str) -> bool:
    """Write a file through a temporary one, only if its text differs; later builds see by its time what is new."""
    if path.is_file() and path.read_text("utf8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, "utf8")
    temporary.replace(path)
    return True
