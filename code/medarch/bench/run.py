"""Runs one benchmark in this process and writes its record: ``python -m medarch.bench.run NAME …``.

Started by ``medarch.bench.commands.run_benchmark`` in a fresh process, whose environment is set before
torch loads.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from medarch.bench import provenance, records, registry


def measure(name: str, device: str, quick: bool) -> records.Record:
    """Runs a benchmark and returns its record.

    Raises:
        ValueError: the benchmark is unknown or returns no results, or the device cannot be used.
    """
    entry = registry.find(name)
    machine = provenance.device(device)
    modules, data = list(entry.modules), list(entry.data)
    # Taken before the run: what is measured is the code that was loaded, not what is edited meanwhile.
    digest = records.record_digest(modules, entry.own, data)
    commit = provenance.commit()
    date, start = datetime.now(UTC), time.perf_counter()
    results = dict(entry.function(device=device, quick=quick))
    repeats = results.pop("repeats", 1)
    if not results:
        raise ValueError(f"benchmark {name!r} returned no results")
    return records.Record(
        name=name,
        device=machine,
        versions=provenance.versions(),
        commit=commit,
        date=date.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - start, 2),
        digest=digest,
        modules=modules,
        own=entry.own,
        repeats=repeats,
        command=f"medarch bench {name} --device {device}" + (" --quick" if quick else ""),
        results=results,
        data=data,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="medarch.bench.run")
    parser.add_argument("name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        records.save(measure(options.name, options.device, options.quick), options.output)
    except (ValueError, FileNotFoundError) as error:
        print(f"medarch bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
