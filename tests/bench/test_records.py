"""Records, the registry, and the command that runs a benchmark in a fresh process."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medarch.bench import commands, provenance, records, registry
from medarch.bench.records import Record, is_current, load, load_named, record_digest, record_path, save
from medarch.bench.registry import benchmark, discover, find

OWN = "medarch.bench.timing"
MODULES = ["medarch.bench.memory"]


@pytest.fixture
def record():
    return Record(
        name="moe/speed",
        device={"class": "cpu"},
        versions={"python": "3.11"},
        commit=None,
        date="2026-01-02T03:04:05+00:00",
        seconds=1.5,
        digest=record_digest(MODULES, OWN, []),
        modules=MODULES,
        own=OWN,
        repeats=3,
        command="medarch bench moe/speed --device cpu",
        results={"ratio": 1.25},
    )


def test_a_record_comes_back_as_it_was(record, tmp_path):
    path = save(record, record_path(record.name, folder=tmp_path / "new"))
    assert path.name == "moe-speed.cpu.json"
    assert load(path) == record == load_named("moe/speed", folder=tmp_path / "new")
    assert sorted(item.name for item in path.parent.iterdir()) == [path.name]


def test_a_failed_write_leaves_the_old_record(record, tmp_path, monkeypatch):
    path = save(record, tmp_path / "moe-speed.cpu.json")
    newer = dataclasses.replace(record, repeats=4)

    def full_disk(handle):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(newer, path)
    assert load(path) == record
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x"])
def test_results_that_json_cannot_hold_are_refused(record, tmp_path, value):
    with pytest.raises(ValueError, match="moe/speed"):
        save(dataclasses.replace(record, results={"x": value}), tmp_path / "moe-speed.cpu.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: "{", "not valid JSON"),
        (lambda content: "[]", "JSON object"),
        (
            lambda content: json.dumps({k: v for k, v in content.items() if k != "digest"}),
            r"missing: \['digest'\]",
        ),
        (lambda content: json.dumps({**content, "extra": 1}), r"unknown: \['extra'\]"),
        (lambda content: json.dumps({**content, "repeats": "3"}), "'repeats' holds '3', not int"),
        (lambda content: json.dumps({**content, "results": None}), "'results'"),
        (lambda content: json.dumps({**content, "name": "moe/other"}), "moe/other"),
    ],
)
def test_a_malformed_record_is_said_by_file_and_field(record, tmp_path, damage, message):
    path = tmp_path / "moe-speed.cpu.json"
    path.write_text(damage(dataclasses.asdict(record)))
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_missing_record_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="medarch bench moe/speed --device cpu"):
        load_named("moe/speed", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="medarch bench"):
        load(tmp_path / "moe-speed.cpu.json")


def test_a_record_is_current_until_its_code_changes(record, monkeypatch):
    assert is_current(record)
    assert not is_current(dataclasses.replace(record, modules=["medarch"], own="medarch.data"))
    assert not is_current(dataclasses.replace(record, modules=["medarch.bench.gone"]))
    real = provenance._normalise

    def edited(path):
        text, beside = real(path)
        return text + ("x = 1\n" if path.name == changed else ""), beside

    monkeypatch.setattr(provenance, "_normalise", edited)
    changed = "memory.py"
    assert not is_current(record)
    changed = "timing.py"
    assert not is_current(record)
    changed = "registry.py"  # keeps measurements, takes none
    assert is_current(record)


def test_bookkeeping_modules_exist():
    for name in records.BOOKKEEPING:
        assert provenance.module_file(name).is_file()


@pytest.fixture
def topic(tmp_path, monkeypatch):
    """A project of its own with one topic, on the path of this process and of those it starts."""
    root = tmp_path / "root"
    folder = root / "medarch"
    (folder / "herbs").mkdir(parents=True)
    (root / "_toc.yml").touch()
    (root / "pyproject.toml").touch()
    (folder / "__init__.py").touch()
    (folder / "herbs/__init__.py").touch()
    (folder / "bench").symlink_to(Path(provenance.__file__).parent)
    (folder / "herbs/benchmarks.py").write_text(
        "import os\n"
        "from medarch.bench.registry import benchmark\n\n"
        "@benchmark('herbs/mint', modules=['medarch.herbs'])\n"
        "def mint(device='cpu', quick=False):\n"
        "    '''Mint, measured.\n\n    More.'''\n"
        "    if os.environ.get('HERBS_FAIL'):\n"
        "        raise ValueError('no mint')\n"
        "    return {'repeats': 5, 'quick': quick, 'threads': os.environ['OMP_NUM_THREADS'],\n"
        "            'allocator': os.environ['MALLOC_TOP_PAD_']}\n"
    )
    monkeypatch.setenv("MEDARCH_ROOT", str(root))
    monkeypatch.setenv("PYTHONPATH", str(root))
    return root


def run_in(topic, code):
    """Runs code in a process that sees the project of its own."""
    return subprocess.run([sys.executable, "-c", code], cwd=topic, capture_output=True, text=True, check=False)


def test_a_benchmark_runs_in_a_fresh_process_and_leaves_a_record(topic):
    start = "from medarch.bench.commands import run_benchmark as run; "
    answer = run_in(topic, start + "print(run('herbs/mint')); print(run('herbs/mint', quick=True))")
    assert answer.returncode == 0, answer.stderr
    full, quick = (Path(line) for line in answer.stdout.splitlines())
    assert full == topic / "book/records/herbs-mint.cpu.json"
    assert quick == topic / "_build/bench/herbs-mint.cpu.json"
    record = load(full)
    assert record.repeats == 5
    assert record.results == {
        "quick": False,
        "threads": "1",
        "allocator": commands.ALLOCATOR["MALLOC_TOP_PAD_"],
    }
    assert record.own == "medarch.herbs.benchmarks"
    assert record.device["class"] == "cpu"
    assert load(quick).results["quick"] is True
    check = "from medarch.bench.records import *; print(is_current(load_named('herbs/mint')))"
    assert run_in(topic, check).stdout == "True\n"
    with (topic / "medarch/herbs/benchmarks.py").open("a") as file:
        file.write("# a comment\n")
    assert run_in(topic, check).stdout == "True\n"
    with (topic / "medarch/herbs/benchmarks.py").open("a") as file:
        file.write("x = 1\n")
    assert run_in(topic, check).stdout == "False\n"


def test_a_failing_benchmark_leaves_the_old_record(topic, monkeypatch):
    path = topic / "book/records/herbs-mint.cpu.json"
    path.parent.mkdir(parents=True)
    path.write_text("old")
    monkeypatch.setenv("HERBS_FAIL", "1")
    answer = run_in(topic, "from medarch.bench.commands import run_benchmark as run; run('herbs/mint')")
    assert "no mint" in answer.stderr
    assert "failed with exit code 2" in answer.stderr
    assert path.read_text() == "old"


def test_an_unknown_benchmark_offers_the_nearest(topic):
    for wrong in ("herbs/mnit", "hreb/mint"):
        answer = run_in(topic, f"from medarch.bench.registry import find; find({wrong!r})")
        assert "did you mean herbs/mint?" in answer.stderr
    answer = run_in(topic, "from medarch.bench.registry import *; print({n: b.summary for n, b in discover().items()})")
    assert answer.stdout == "{'herbs/mint': 'Mint, measured.'}\n"


def test_declarations_are_checked(monkeypatch):
    monkeypatch.setattr(registry, "_declared", {})
    for name in ("speed", "moe/", "Moe/speed", "moe/a/b", "../moe"):
        with pytest.raises(ValueError, match="topic"):
            benchmark(name, modules=MODULES)
    with pytest.raises(ValueError, match="no modules"):
        benchmark("moe/speed", modules=[])

    @benchmark("moe/speed", modules=MODULES)
    def one(device="cpu", quick=False):
        return {}

    with pytest.raises(ValueError, match="again"):

        @benchmark("moe/speed", modules=MODULES)
        def two(device="cpu", quick=False):
            return {}


def test_every_declared_benchmark_lists_modules_that_exist():
    declared = discover()
    for entry in declared.values():
        assert record_digest(list(entry.modules), entry.own, list(entry.data))
        assert find(entry.name) == entry
