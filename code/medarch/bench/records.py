"""Records: what a benchmark measured and where, one JSON file for each benchmark and class of device."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medarch.bench.provenance import repository_root, source_digest

NAME = re.compile(r"[a-z0-9_]+/[a-z0-9-]+")

# What keeps and starts measurements, but takes none: a change here makes no record stale.
BOOKKEEPING = tuple(
    f"medarch.bench{module}" for module in ("", ".commands", ".partial", ".provenance", ".records", ".registry", ".run")
)


@dataclass(frozen=True)
class Record:
    """One benchmark's results on one class of device.

    Attributes:
        name: ``<topic>/<slug>``.
        device: the machine, as ``provenance.device`` describes it.
        versions: Python and libraries.
        commit: the working tree's commit, ``+`` after it where tracked files differed; None without a
            repository.
        date: when the run began, ISO 8601 with time zone.
        seconds: how long the run took, wall time.
        digest: digest of ``modules`` with all that they import, of ``own`` alone and of ``data``.
        modules: modules that the results stand on.
        own: the module that declares the benchmark.
        data: data files that the results stand on, relative to the repository's root.
        repeats: how often the measurement was repeated (rounds, or seeds).
        command: the command that makes this record anew.
        results: what the benchmark returned.
    """

    name: str
    device: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    date: str
    seconds: float
    digest: str
    modules: list[str]
    own: str
    repeats: int
    command: str
    results: dict[str, Any]
    data: list[str] = field(default_factory=list)


def record_digest(modules: list[str], own: str, data: list[str]) -> str:
    """The digest that a record carries; see ``Record``."""
    return source_digest(modules, data, alone=[own], without=BOOKKEEPING)


def is_current(record: Record) -> bool:
    """Whether the code and data behind a record are those of the working tree."""
    try:
        return record.digest == record_digest(record.modules, record.own, record.data)
    except (ValueError, FileNotFoundError):
        return False  # a module or data file behind the record is gone


def records_folder() -> Path:
    """The committed records' folder, ``book/records`` below the repository's root."""
    return repository_root() / "book" / "records"


def record_path(name: str, device: str = "cpu", folder: Path | None = None) -> Path:
    """Where the record of a benchmark on a class of device lies.

    Raises:
        ValueError: ``name`` is not of the form ``<topic>/<slug>``.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"benchmark name {name!r} is not <topic>/<slug>, such as moe/speed")
    return (folder or records_folder()) / f"{name.replace('/', '-')}.{device}.json"


def save(record: Record, path: Path) -> Path:
    """Writes a record, whole or not at all.

    Raises:
        ValueError: the results hold what JSON does not (a tensor, NaN, infinity).
    """
    try:
        text = json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{record.name}: results cannot be written as JSON: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there, so that a kill or a full disk leaves the old record whole.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def load(path: Path) -> Record:
    """Reads a record.

    Raises:
        FileNotFoundError: there is none; the message says how to make it.
        ValueError: the file is not a record; the message names file and field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no record {path}; `medarch bench NAME` makes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}; make the record anew or restore it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a record is a JSON object, this is a {type(content).__name__}")
    fields = {item.name: item for item in dataclasses.fields(Record)}
    missing = [name for name in fields if name not in content]
    extra = [name for name in content if name not in fields]
    if missing or extra:
        raise ValueError(f"{path}: fields missing: {missing or 'none'}; fields unknown: {extra or 'none'}")
    for name, kinds in _KINDS.items():
        if not isinstance(content[name], kinds) or isinstance(content[name], bool):
            raise ValueError(f"{path}: field {name!r} holds {content[name]!r}, not {_describe(kinds)}")
    if not path.name.startswith(f"{content['name'].replace('/', '-')}."):
        raise ValueError(f"{path}: holds the record of {content['name']!r}; rename the file or make it anew")
    return Record(**content)


def load_named(name: str, device: str = "cpu", folder: Path | None = None) -> Record:
    """Reads the record of a benchmark on a class of device; see ``load``."""
    path = record_path(name, device, folder)
    if not path.is_file():
        raise FileNotFoundError(f"no record {path}; make it with: medarch bench {name} --device {device}")
    return load(path)


_KINDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "device": dict,
    "versions": dict,
    "commit": (str, type(None)),
    "date": str,
    "seconds": (int, float),
    "digest": str,
    "modules": list,
    "own": str,
    "repeats": int,
    "command": str,
    "results": dict,
    "data": list,
}


def _describe(kinds: type | tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
