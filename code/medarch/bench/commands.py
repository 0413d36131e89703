"""What the command line calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from medarch.bench.provenance import repository_root
from medarch.bench.records import record_path
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
    finished = subprocess.run(
        command + ["--quick"] * quick, env={**os.environ, **ALLOCATOR, **ONE_THREAD}, check=False
    )
    if finished.returncode != 0:
        kept = f"; {path} is as it was" if path.is_file() else ""
        raise RuntimeError(f"benchmark {name!r} failed with exit code {finished.returncode}{kept}")
    return path
