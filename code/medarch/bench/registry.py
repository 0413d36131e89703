"""The benchmarks that the topics declare, each in ``medarch/<topic>/benchmarks.py``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medarch.bench.provenance import PACKAGE, package_folder
from medarch.bench.records import NAME


@dataclass(frozen=True)
class Benchmark:
    """A declared benchmark; called with ``device`` and ``quick``, it returns its results.

    Attributes:
        name: ``<topic>/<slug>``.
        function: the function that measures.
        modules: modules that the results stand on, with all that they import.
        data: data files that the results stand on, relative to the repository's root.
        summary: first line of the function's docstring.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    modules: tuple[str, ...]
    data: tuple[str, ...] = ()

    @property
    def own(self) -> str:
        """The module that declares the benchmark."""
        return self.function.__module__

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().partition("\n")[0]


_declared: dict[str, Benchmark] = {}

Function = Callable[..., dict[str, Any]]


def benchmark(name: str, *, modules: Iterable[str], data: Iterable[str] = ()) -> Callable[[Function], Function]:
    """Declares a function as a benchmark.

    The function takes ``device`` (``"cpu"`` or ``"cuda"``) and ``quick`` (True for a run of small size, for
    tests) and returns a dictionary that JSON can hold. Its optional key ``"repeats"`` (rounds or seeds)
    goes to the record's field of that name.

    Args:
        name: ``<topic>/<slug>``.
        modules: dotted names of the modules whose change makes the results stale; what they import counts
            too.
        data: data files whose change makes the results stale, relative to the repository's root.

    Raises:
        ValueError: the name is malformed or taken, or ``modules`` is empty.
    """
    listed = tuple(modules)
    if not NAME.fullmatch(name):
        raise ValueError(f"benchmark name {name!r} is not <topic>/<slug>, such as moe/speed")
    if not listed:
        raise ValueError(f"benchmark {name!r} lists no modules: its record could never become stale")

    def declare(function: Function) -> Function:
        entry = Benchmark(name, function, listed, tuple(data))
        known = _declared.get(name)
        if known and (known.own, known.function.__qualname__) != (entry.own, function.__qualname__):
            raise ValueError(f"benchmark {name!r} is declared in {known.own} and again in {entry.own}")
        _declared[name] = entry
        return function

    return declare


def discover() -> dict[str, Benchmark]:
    """Imports every topic's ``benchmarks`` module and returns all declared benchmarks by name."""
    for path in sorted(package_folder().glob("*/benchmarks.py")):
        importlib.import_module(f"{PACKAGE}.{path.parent.name}.benchmarks")
    return dict(sorted(_declared.items()))


def find(name: str) -> Benchmark:
    """The benchmark of that name; of the topics, only the one that the name begins with is imported.

    Raises:
        ValueError: there is none; the message offers the nearest names.
    """
    topic = name.partition("/")[0]
    if topic.isidentifier() and Path(package_folder(), topic, "benchmarks.py").is_file():
        importlib.import_module(f"{PACKAGE}.{topic}.benchmarks")
    if name in _declared:
        return _declared[name]
    known = discover()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    offer = f"did you mean {', '.join(near)}?" if near else f"declared are: {', '.join(known) or 'none'}"
    raise ValueError(f"no benchmark {name!r}; {offer}")
