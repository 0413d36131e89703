"""Finished parts of a long benchmark, kept so that a kill loses only the part that was running."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from medarch.bench.provenance import repository_root
from medarch.bench.records import record_digest
from medarch.bench.registry import Benchmark


class Partials:
    """Parts of one benchmark's results, in ``_build/partials``, valid for the present code and device alone.

    Args:
        benchmark: the benchmark; its digest is part of the folder's name, so that changed code starts afresh.
        device: class of the device.
        quick: whether this is a run of small size, kept apart.
    """

    def __init__(self, benchmark: Benchmark, device: str, quick: bool = False) -> None:
        digest = record_digest(list(benchmark.modules), benchmark.own, list(benchmark.data))
        name = f"{benchmark.name.replace('/', '-')}.{device}{'.quick' if quick else ''}.{digest[:16]}"
        self.folder = repository_root() / "_build" / "partials" / name

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The part of that name: read where it is finished, else computed and kept.

        Args:
            key: name of the part, fit for a file name.
            compute: makes the part; what it returns must be what JSON gives back.
        """
        path = self.folder / f"{key}.json"
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            pass  # not finished, or damaged: made anew
        part = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(part, allow_nan=False))
        os.replace(temporary, path)
        return json.loads(path.read_text())
