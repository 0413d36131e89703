"""What the command line calls."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import yaml

from medarch.bench.provenance import repository_root
from medarch.bench.records import is_current, load, record_path, records_folder
from medarch.bench.registry import find

# glibc gives large buffers back to the system at once and maps them anew at each call, which charges page
# faults to whoever allocates most; these keep them. They are read when a process starts. Elsewhere they do
# nothing.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run_benchmark(name: str, device: str = "cpu", quick: bool = False) -> Path:
    """Runs a benchmark in a fresh process and writes its record.

    Args:
        name: ``<topic>/<slug>``.
        device: ``"cpu"`` or ``"cuda"``.
        quick: a run of small size; its record goes to ``_build/bench``, not among the committed ones.

    Returns:
        The path of the record.

    Raises:
        ValueError: there is no such benchmark; the message offers the nearest names.
        RuntimeError: the run failed; an earlier record is left as it was.
    """
    find(name)
    folder = repository_root() / "_build" / "bench" if quick else None
    path = record_path(name, device, folder)
    command = [sys.executable, "-m", "medarch.bench.run", name, "--device", device, "--output", str(path)]
    finished = subprocess.run(command + ["--quick"] * quick, env={**os.environ, **ALLOCATOR, **ONE_THREAD}, check=False)
    if finished.returncode != 0:
        kept = f"; {path} is as it was" if path.is_file() else ""
        raise RuntimeError(f"benchmark {name!r} failed with exit code {finished.returncode}{kept}")
    return path


def stale_records(folder: Path | None = None, today: datetime.date | None = None) -> dict[str, str]:
    """The committed records that a release must not carry, each with what to do.

    A record is stale where the code or data behind it has changed since. ``waivers.yml`` beside the records may
    let one pass until a date: a list of ``{record, until, reason}``.

    Args:
        folder: of the records; the book's by default.
        today: the day on which waivers are judged.

    Returns:
        File name of each stale record without a waiver in force, and the remedy.

    Raises:
        ValueError: a record or a waiver is malformed.
    """
    folder, today = folder or records_folder(), today or datetime.date.today()
    waivers = folder / "waivers.yml"
    waived = {}
    for entry in yaml.safe_load(waivers.read_text("utf8")) or [] if waivers.is_file() else []:
        if set(entry) != {"record", "until", "reason"} or not isinstance(entry["until"], datetime.date):
            raise ValueError(f"{waivers}: {entry} is not a record, a date `until` and a reason")
        waived[entry["record"]] = entry["until"]
    stale = {}
    for path in sorted(folder.glob("*.json")):
        record = load(path)
        if not is_current(record) and waived.get(path.name, datetime.date.min) < today:
            lapsed = f"; its waiver ended on {waived[path.name]}" if path.name in waived else ""
            stale[path.name] = f"`{record.command}`, or a dated waiver in {waivers.name}{lapsed}"
    return stale
