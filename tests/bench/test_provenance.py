"""The import closure, the digest and the description of the machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medarch.bench import provenance
from medarch.bench.provenance import (
    commit,
    device,
    import_closure,
    normalised_source,
    source_digest,
    versions,
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of its own, importable in this process but never imported."""
    name = f"grove_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    files = {
        "__init__.py": "",
        "oak/__init__.py": f"from {name}.oak.leaf import green\n",
        "oak/leaf.py": '"""A leaf."""\n\n\ndef green():\n    # nothing to see\n    return 1\n',
        "oak/late.py": f"def use():\n    from {name}.elm import value\n    return value\n",
        "oak/typed.py": f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {name} import ash\n",
        "elm.py": 'value = "table.csv"\n',
        "ash.py": "value = 3\n",
        "table.csv": "1,2\n",
        "other.csv": "3,4\n",
    }
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    assert not any(loaded.startswith(name) for loaded in sys.modules), "the package was imported"


def digest(package: Path, *modules: str, **options) -> str:
    names = [f"{package.name}.{module}" for module in modules]
    return source_digest(names, package=package.name, **options)


def closure(package: Path, *modules: str) -> list[str]:
    found = import_closure([f"{package.name}.{module}" for module in modules], package=package.name)
    return [name.removeprefix(package.name).lstrip(".") for name in found]


def test_closure_follows_lazy_imports_and_parent_packages(package):
    assert closure(package, "oak.late") == ["", "elm", "oak", "oak.late", "oak.leaf"]


def test_closure_leaves_out_type_checking_imports_and_other_packages(package):
    assert closure(package, "oak.typed") == ["", "oak", "oak.leaf", "oak.typed"]
    assert import_closure(["numpy", "json"], package=package.name) == []


def test_unknown_module_offers_the_nearest_name(package):
    with pytest.raises(ValueError, match=r"oak\.leav.*did you mean .*oak\.leaf"):
        closure(package, "oak.leav")
    with pytest.raises(ValueError, match=r"did you mean .*oak\.leaf"):
        provenance.module_file(f"{package.name}.oak.leav")


def test_syntax_error_names_file_and_line(package):
    (package / "elm.py").write_text("value = 1\ndef broken(:\n")
    with pytest.raises(ValueError, match=r"elm\.py:2"):
        closure(package, "elm")
    with pytest.raises(ValueError, match=r"elm\.py:2"):
        normalised_source(package / "elm.py")


@pytest.mark.parametrize(
    "same",
    [
        '"""Another\n\n  text."""\ndef green():\n    return 1  # a comment\n',
        "def green():\n\n    '''A docstring, ä é, of its own.'''\n    return 1\n\n\n",
        "# only a comment\r\ndef green():   \r\n    return 1\r\n",
    ],
)
def test_digest_ignores_comments_docstrings_and_blank_lines(package, same):
    before = digest(package, "oak.leaf")
    (package / "oak/leaf.py").write_bytes(same.encode())
    assert digest(package, "oak.leaf") == before


@pytest.mark.parametrize("changed", ["def green():\n    return 2\n", "def green(): return 1\n"])
def test_digest_sees_code_in_whatever_stands_on_it(package, changed):
    before = digest(package, "oak.late"), digest(package, "ash")
    (package / "oak/leaf.py").write_text(changed)
    assert digest(package, "oak.late") != before[0]
    assert digest(package, "ash") == before[1]


def test_strings_are_kept_to_the_letter(tmp_path):
    path = tmp_path / "text.py"
    text = 'x = """a  \n\n# b\n"""  # gone\n\ny = f"""{x}   \n\n#c\n"""\nz = "# no comment"\n'
    path.write_text(text)
    assert normalised_source(path) == text.replace("  # gone\n\n", "\n")
    path.write_text("é = 'é'  # é\nclass A:\n    'é'; é = 2\n")
    assert normalised_source(path) == "é = 'é'\nclass A:\n    ; é = 2\n"


def test_data_files_beside_a_module_and_named_ones_count(package):
    before = (
        digest(package, "elm"),
        digest(package, "ash"),
        digest(package, "ash", data=[package / "other.csv"]),
    )
    assert before[1] != before[2]
    (package / "table.csv").write_text("1,3\n")
    (package / "other.csv").write_text("3,5\n")
    after = (
        digest(package, "elm"),
        digest(package, "ash"),
        digest(package, "ash", data=[package / "other.csv"]),
    )
    assert [a != b for a, b in zip(before, after, strict=True)] == [True, False, True]
    with pytest.raises(FileNotFoundError, match=r"gone\.csv"):
        digest(package, "ash", data=[package / "gone.csv"])


def test_digest_of_a_closure_is_the_digest_of_its_roots(package):
    assert source_digest(
        import_closure([f"{package.name}.oak.late"], package=package.name), package=package.name
    ) == digest(package, "oak.late")


def test_alone_and_without_narrow_the_digest(package):
    name = package.name
    before = (
        digest(package, "ash", alone=[f"{name}.oak.late"]),
        digest(package, "oak.late", without=[f"{name}.elm"]),
    )
    (package / "elm.py").write_text("value = 5\n")
    after = (
        digest(package, "ash", alone=[f"{name}.oak.late"]),
        digest(package, "oak.late", without=[f"{name}.elm"]),
    )
    assert before == after
    (package / "oak/late.py").write_text("value = 5\n")
    assert digest(package, "ash", alone=[f"{name}.oak.late"]) != before[0]


OTHER_PYTHONS = [f"python3.{minor}" for minor in (11, 12, 13, 14) if minor != sys.version_info.minor]


def _works(interpreter: str) -> bool:
    # A version manager's placeholder is found on the path but cannot run.
    return subprocess.run([interpreter, "-c", ""], capture_output=True, check=False).returncode == 0


def test_other_versions_of_python_agree(tmp_path):
    """Other interpreters of this machine, where there are any, give the same normalised source."""
    others = [path for path in map(shutil.which, OTHER_PYTHONS) if path and _works(path)]
    if not others:
        pytest.skip("no other supported version of Python on this machine")
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('p', sys.argv[1])\n"
        "p = importlib.util.module_from_spec(spec); spec.loader.exec_module(p)\n"
        "sys.stdout.buffer.write(p.normalised_source(__import__('pathlib').Path(sys.argv[2])).encode())\n"
    )
    for subject in (Path(provenance.__file__), Path(__file__)):
        for other in others:
            command = [other, "-c", program, provenance.__file__, str(subject)]
            answer = subprocess.run(command, capture_output=True, check=True)
            assert answer.stdout.decode() == normalised_source(subject)


def test_repository_root(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDARCH_ROOT", raising=False)
    with pytest.raises(FileNotFoundError, match="MEDARCH_ROOT"):
        provenance.repository_root(tmp_path)
    (tmp_path / "_toc.yml").touch()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "deep/er").mkdir(parents=True)
    assert provenance.repository_root(tmp_path / "deep/er") == tmp_path.resolve()
    monkeypatch.setenv("MEDARCH_ROOT", str(tmp_path / "deep"))
    assert provenance.repository_root() == (tmp_path / "deep").resolve()
    monkeypatch.setenv("MEDARCH_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="not a folder"):
        provenance.repository_root()


def test_device_versions_and_commit():
    described = device("cpu")
    assert described["class"] == "cpu"
    assert described["cpu"]
    assert described["cores"] >= 1
    assert described["memory_gib"] > 0.1
    with pytest.raises(ValueError, match="tpu"):
        device("tpu")
    assert versions()["python"] == sys.version.split()[0]
    assert versions()["torch"].startswith("2.")
    known = commit()
    assert known is None or len(known.rstrip("+")) == 12
