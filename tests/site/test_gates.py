"""Each gate of the book, tested by damaging a two-page book: what must fail fails, with file, line and remedy."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medarch.site import build, execute
from medarch.site.chapters import BookError, Project, line_of
from medarch.site.digest import chapter_digest
from medarch.site.evidence import check, collect, read_claims, read_evidence

FIRST, SECOND = "demo/first", "demo/second"


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that must be there exactly once, so that a test cannot damage nothing."""
    text = path.read_text("utf8")
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new), "utf8")


def run(root: Path, *names: str, **options: object) -> list[str]:
    """Execute chapters and return the names of those that really ran."""
    project, told = Project(root), []
    execute.execute(project, project.pick(names), read_claims(project), report=told.append, **options)
    return sorted(line.split("] ")[1].split(":")[0] for line in told if line.startswith("["))


def medarch(root: Path, *arguments: str, code: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MEDARCH_ROOT": str(root)} | ({"PYTHONPATH": str(code)} if code else {})
    command = [sys.executable, "-m", "medarch.cli", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)


def faults(root: Path) -> str:
    """What the claims' gate says after a run."""
    project = Project(root)
    claims = read_claims(project)
    notebooks = execute.execute(project, project.chapters.values(), claims, report=lambda _: None)
    return "\n".join(map(str, check(project, claims, collect(project, notebooks))))


def test_a_failing_cell_is_named_and_the_other_chapter_is_kept(fixture_book: Path) -> None:
    edit(fixture_book / "book/demo/first.md", 'print("faces:", len(faces))', 'print("faces:", len(faces))\n1 / 0')
    with pytest.raises(BookError) as caught:
        run(fixture_book)
    (fault,) = caught.value.faults
    assert fault.file == "book/demo/first.md"
    assert (fixture_book / fault.file).read_text("utf8").splitlines()[fault.line - 1] == "1 / 0"
    assert "cell 1 raised ZeroDivisionError" in fault.message
    assert run(fixture_book, SECOND) == []


@pytest.mark.parametrize(
    "code",
    ["import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    traceback.print_exc()", "#| raises\n1 / 0"],
)
def test_a_printed_traceback_is_a_fault_even_where_the_error_was_allowed(fixture_book: Path, code: str) -> None:
    path = fixture_book / "book/demo/second.md"
    edit(path, ":tags: [nbval-ignore-output]", ":tags: [nbval-ignore-output, raises-exception]")
    edit(path, 'print("process", os.getpid())', code)
    with pytest.raises(BookError, match=r"book/demo/second\.md:\d+: cell 2 prints a traceback"):
        run(fixture_book, SECOND)


def test_only_what_changed_runs_again(fixture_book: Path) -> None:
    assert run(fixture_book) == [FIRST, SECOND]
    assert run(fixture_book) == []
    edit(fixture_book / "book/demo/first.md", "the mean of its faces is", "the mean of all its faces is")
    assert run(fixture_book) == []  # prose
    edit(fixture_book / "book/demo/second.md", "(0.5, 0.5)", "[0.5, 0.5]")
    assert run(fixture_book) == [SECOND]  # a cell
    edit(fixture_book / "book/claims.yml", "tolerance: 0.01", "tolerance: 0.02")
    assert run(fixture_book) == [FIRST]  # a claim that it proves
    (fixture_book / "requirements.lock").write_text("torch==0\n")
    assert run(fixture_book) == [FIRST, SECOND]  # the lock file


def test_a_changed_package_runs_its_dependants_alone(fixture_book: Path, tmp_path: Path) -> None:
    source = Path(build.__file__).parents[1]
    code = tmp_path / "code"
    shutil.copytree(source, code / "medarch", ignore=shutil.ignore_patterns("__pycache__"))

    def ran() -> list[str]:
        done = medarch(fixture_book, "execute", code=code)
        assert done.returncode == 0, done.stderr
        return sorted(line.split("] ")[1].split(":")[0] for line in done.stdout.splitlines() if line.startswith("["))

    assert ran() == [FIRST, SECOND]
    exercises = code / "medarch/book/exercises.py"
    exercises.write_text(exercises.read_text("utf8") + "\nCHANGED = True\n")
    assert ran() == [FIRST]  # the second chapter has no exercise
    exercises.write_text(exercises.read_text("utf8") + "# a comment is no change\n")
    build_side = code / "medarch/site/execute.py"
    build_side.write_text(build_side.read_text("utf8") + "\nCHANGED = True\n")
    assert ran() == []


def test_a_page_that_loads_checkpoints_stands_on_them(fixture_book: Path) -> None:
    edit(fixture_book / "book/demo/second.md", "import os", "import os\nfrom medarch.lm.loading import load")

    def digests() -> list[str]:
        project = Project(fixture_book)
        return [chapter_digest(project, project.chapters[name], {}) for name in (FIRST, SECOND)]

    before = digests()
    weights = fixture_book / "book/checkpoints/tiny/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"one")
    one = digests()
    weights.write_bytes(b"two")
    two = digests()
    assert before[0] == one[0] == two[0]
    assert len({before[1], one[1], two[1]}) == 3


def test_an_unproved_claim_is_named_with_its_remedy(fixture_book: Path) -> None:
    assert faults(fixture_book) == ""
    edit(fixture_book / "book/demo/second.md", 'prove("coin-is-fair", entropy)', 'print("proved nothing")')
    told = faults(fixture_book)
    line = line_of((fixture_book / "book/claims.yml").read_text("utf8"), "id: coin-is-fair")
    assert f"book/claims.yml:{line}: demo/second: claim 'coin-is-fair' promises a cell" in told
    assert 'prove("coin-is-fair", value)' in told


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  verdict: holds\n", "", "has no verdict"),
        ("evidence: cell\n  quantity: entropy", "evidence: record\n  record: demo/coin\n  quantity: entropy", "is not in book/records"),
        ("evidence: cell\n  quantity: entropy", "evidence: source\n  quantity: entropy", "cites none"),
        ("evidence: cell\n  quantity: entropy", "evidence: none found\n  quantity: entropy", "without any evidence"),
        ("section: coin-slide", "section: coin-side", "book/sources.yml does not have"),
        ("verdict: corrected", "verdict: corrected\n  also: [coin-side]", "book/sources.yml does not have"),
        ("pearson1900criterion", "pearson1901criterion", "not in book/references.bib"),
        ("  correction: The mean of the numbers one to six is three and a half, which no throw can show.\n", "", "says not what is true"),
        ("chapter: demo/second", "chapter: demo/third", "covers 'coin-slide' but not its claim"),
    ],
)  # fmt: skip
def test_the_ledger_holds_each_claim_to_its_promise(recorded_book: Path, old: str, new: str, told: str) -> None:
    project = Project(recorded_book)
    before = {"demo/first": {"claims": {"dice-mean-is-four": 3.5}}, "demo/second": {"claims": {"coin-is-fair": 1.0}}}
    assert check(project, read_claims(project), before) == []
    edit(recorded_book / "book/claims.yml", old, new)
    after = [str(fault) for fault in check(project, read_claims(project), before)]
    assert any(told in fault for fault in after), after


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("id: coin-is-fair", "id: dice-mean-is-four", "claim 'dice-mean-is-four' stands twice (first at line 1)"),
        ("kind: quality\n  verdict: holds", "verdict: holds", "missing ['kind']"),
        ("verdict: holds", "verdict: true-ish", "verdict 'true-ish'"),
        ("verdict: holds", "veredict: holds", "unknown ['veredict']"),
        ("{min: 0.999, max: 1.001}", "0.999 to 1.001", "write {value: , tolerance: } or {min: , max: }"),
        ("verdict: holds", "verdict: [", "not valid YAML"),
    ],
)  # fmt: skip
def test_malformed_claims_are_named_by_line(fixture_book: Path, old: str, new: str, told: str) -> None:
    edit(fixture_book / "book/claims.yml", old, new)
    with pytest.raises(BookError) as caught:
        read_claims(Project(fixture_book))
    assert told in str(caught.value)


def test_a_value_outside_its_tolerance_fails_the_cell(fixture_book: Path) -> None:
    edit(fixture_book / "book/demo/second.md", "(0.5, 0.5)", "(0.4, 0.6)")
    with pytest.raises(BookError, match=r"cell 1 raised Disproved: claim 'coin-is-fair': measured 0\.97"):
        run(fixture_book)


def test_a_changed_value_changes_the_pages_of_a_warm_build(fixture_book: Path, tmp_path: Path) -> None:
    """No page's text changes between the two builds, only the package from which a cell takes its value."""
    code = tmp_path / "code"
    shutil.copytree(Path(build.__file__).parents[1], code / "medarch", ignore=shutil.ignore_patterns("__pycache__"))
    tables = code / "medarch/book/tables.py"
    tables.write_text(tables.read_text("utf8") + "\nOFFSET = 0.0\n")
    edit(fixture_book / "book/claims.yml", "tolerance: 0.01", "tolerance: 1.0")
    edit(
        fixture_book / "book/demo/first.md",
        "sum(faces) / len(faces))\n```\n\nThe mean",
        "sum(faces) / len(faces) + tables.OFFSET)\n```\n\nThe mean",
    )
    edit(fixture_book / "book/demo/first.md", "import prove\n", "import prove\nfrom medarch.book import tables\n")
    edit(fixture_book / "book/demo/first.md", "tags: [hide-input]\nmystnb", "tags: [hide-input, slide]\nmystnb")
    # The second chapter shows nothing of the ledger: its page has only the cell's own output to change.
    second = fixture_book / "book/demo/second.md"
    edit(second, "```{claims-table}\n```\n", "")
    edit(second, 'print("process", os.getpid())', 'from medarch.book import tables\n\nprint("offset", tables.OFFSET)')
    elsewhere = fixture_book / "book/index.md"
    elsewhere.write_text(elsewhere.read_text("utf8") + "\nA die shows {proved}`dice-mean-is-four:.1f`.\n", "utf8")

    def built(value: str) -> None:
        done = medarch(fixture_book, "build", code=code)
        assert done.returncode == 0, done.stdout + done.stderr
        page = (fixture_book / "_build/html/book/demo/first.html").read_text("utf8")
        assert f'is <span class="proved">{value}</span>' in page
        assert f"mean of the six faces of a die: {value}." in page
        assert (
            f'shows <span class="proved">{value}</span>' in (fixture_book / "_build/html/book/index.html").read_text()
        )
        other = (fixture_book / "_build/html/book/demo/second.html").read_text("utf8")
        assert f"offset {float(value) - 3.5:.1f}" in other
        notebook = (fixture_book / "_build/html/notebooks/demo/first.ipynb").read_text("utf8")
        assert f"is {value}," in notebook
        assert read_evidence(Project(fixture_book), FIRST)["claims"]["dice-mean-is-four"] == pytest.approx(float(value))

    built("3.5")
    assert (fixture_book / "_build/html/book/demo/first-slides.html").is_file()
    edit(tables, "OFFSET = 0.0", "OFFSET = 0.7")
    built("4.2")
    edit(fixture_book / "book/index.md", "A die shows", "Any die shows")  # the chapters' pages are not written again
    third = medarch(fixture_book, "build", code=code)
    assert third.returncode == 0
    assert "Executing" not in third.stdout
    deck = fixture_book / "_build/html/book/demo/first-slides.html"
    pictures = re.findall(r'<img[^>]*src="([^"]+)"', deck.read_text("utf8"))
    assert pictures
    assert not [picture for picture in pictures if not (deck.parent / picture).is_file()]


def test_a_broken_link_fails_every_build_and_spares_the_site(fixture_book: Path) -> None:
    good = medarch(fixture_book, "build")
    assert good.returncode == 0, good.stdout + good.stderr
    before = (fixture_book / "_build/html/book/demo/second.html").read_bytes()
    edit(fixture_book / "book/demo/second.md", "{ref}`first`", "{ref}`nowhere`")
    for _ in range(2):  # a warm build after a failed one must not pass either
        broken = medarch(fixture_book, "build")
        assert broken.returncode == 1
        assert "second.md" in broken.stderr
        assert "nowhere" in broken.stderr
    assert (fixture_book / "_build/html/book/demo/second.html").read_bytes() == before


def test_what_sphinx_knows_to_be_wrong_fails_the_build(fixture_book: Path) -> None:
    planted = {
        "{emph}`throw`": 'Unknown interpreted text role "emph"',
        "{cite:t}`pearson1901`": 'could not find bibtex key "pearson1901"',
        "{ref}`frist`": "undefined label: 'frist'",
        "[page](third.md)": "'third.md'",
        "{claim}`dice-mean`": "book/claims.yml has no claim 'dice-mean'",
        "{proved}`dice`": "no cell has proved the claim 'dice' in this build",
        "```{notice}\n```": "Unknown directive type: 'notice'",
        "![A die](../_static/dice.svg)": "image file not readable: book/_static/dice.svg",
        "(first)=\nDuplicate": "duplicate label first",
        "#### Deep": "Non-consecutive header level increase",
        "- ```{code-cell} ipython3\n  2\n  ```": "code-cell",
    }
    page = fixture_book / "book/demo/second.md"
    edit(page, "A cell's time is", "\n\n".join(planted) + "\n\nA cell's time is")
    broken = medarch(fixture_book, "build")
    assert broken.returncode == 1
    told = re.sub(r"\x1b\[[0-9;]*m", "", broken.stderr)
    assert [text for text in planted.values() if not re.search(rf"second\.md:\d+: .*{re.escape(text)}", told)] == []


def test_a_dead_kernel_and_a_hanging_one_are_told_apart(fixture_book: Path) -> None:
    edit(fixture_book / "book/demo/first.md", 'print("faces:", len(faces))', "import os\nos._exit(9)")
    edit(fixture_book / "book/demo/second.md", 'prove("coin-is-fair", entropy)', "while True: pass")
    project = Project(fixture_book)
    with pytest.raises(BookError) as caught:
        execute.execute(project, project.chapters.values(), {}, report=lambda _: None, timeout=8)
    died, hung = caught.value.faults
    assert (died.file, hung.file) == ("book/demo/first.md", "book/demo/second.md")
    assert "the kernel died in cell 1" in died.message
    assert "cell 1 gave no answer within 8 s" in hung.message


def test_a_damaged_cache_is_noticed_and_made_anew(fixture_book: Path) -> None:
    project, told = Project(fixture_book), []
    assert run(fixture_book) == [FIRST, SECOND]
    (stored,) = [path for path in project.cache.rglob("base.ipynb") if "coin" in path.read_text("utf8")]
    stored.write_text(stored.read_text("utf8").replace("Claim coin-is-fair", "Claim coin-is-fake"), "utf8")
    execute.execute(project, project.chapters.values(), read_claims(project), report=told.append)
    assert any("book/demo/second.md: its cached outputs are damaged" in line for line in told)
    (project.cache / "global.db").write_bytes(b"nonsense")
    told.clear()
    execute.execute(project, project.chapters.values(), read_claims(project), report=told.append)
    assert "is damaged" in told[0]
    assert run(fixture_book) == []


def test_a_second_build_is_refused_while_one_runs(fixture_book: Path) -> None:
    project = Project(fixture_book)
    with build.alone(project):
        other = medarch(fixture_book, "build")
    assert other.returncode == 1
    assert f"another build of this book is running (process {os.getpid()})" in other.stderr
    with build.alone(project):  # the lock was let go
        pass


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_ended_build_keeps_the_finished_chapters(fixture_book: Path, ending: signal.Signals) -> None:
    edit(fixture_book / "book/demo/first.md", 'print("faces:", len(faces))', "import time\ntime.sleep(60)")
    command = [sys.executable, "-m", "medarch.cli", "build"]
    process = subprocess.Popen(command, cwd=fixture_book, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if SECOND in line:
            break
    process.send_signal(ending)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if ending == signal.SIGKILL else 130), errors
    assert run(fixture_book, SECOND) == []
    assert not (fixture_book / "_build/html").exists()


def test_a_full_disk_leaves_the_last_site_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, built = tmp_path / "html", tmp_path / "work"
    for folder, text in ((site, "old"), (built, "new")):
        folder.mkdir()
        (folder / "index.html").write_text(text)

    def full(*_: object, **__: object) -> None:
        (tmp_path / "html.next").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(OSError, match="No space left"):
            build.publish(built, site)
    assert (site / "index.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["html", "work"]
    site.rename(tmp_path / "html.previous")  # a kill between the two renames
    build.publish(built, site)
    assert (site / "index.html").read_text() == "new"
    project = Project(tmp_path)
    with pytest.raises(BookError, match="the disk is full"), build._disk(project):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_far_over_the_declared_time_is_a_fault_in_ci_alone(fixture_book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(fixture_book / "book/demo/second.md", "seconds: 10", "seconds: 0.01")
    monkeypatch.delenv("CI", raising=False)
    assert SECOND in run(fixture_book)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(BookError, match=r"and declares 0\.01 s"):
        run(fixture_book, SECOND, force=True)
    monkeypatch.setattr(execute, "SLOWER", 1e6)
    assert run(fixture_book, SECOND, force=True) == [SECOND]  # over its time, and within what a slow machine may take
    assert run(fixture_book, SECOND) == []  # its outputs are kept


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seconds: 10", "seconds: 26", "a chapter declares more than 0 and at most 25"),
        ("seconds: 10", "second: 10", "unknown medarch metadata: second"),
        ("covers: [coin-slide]", "covers: coin-slide", "lists the sections"),
        ("jupytext:\n  text_representation:\n    extension: .md\n    format_name: myst\n", "", "no jupytext header"),
        ("    format_name: myst\n", "    format_name: myst\n   bad: [\n", "no jupytext header"),
    ],
)
def test_front_matter_is_checked_at_the_door(fixture_book: Path, old: str, new: str, told: str) -> None:
    edit(fixture_book / "book/demo/second.md", old, new)
    with pytest.raises(BookError, match=r"book/demo/second\.md:\d+: ") as caught:
        Project(fixture_book).chapters  # noqa: B018
    assert told in str(caught.value)


def test_an_unknown_chapter_is_answered_with_the_nearest(fixture_book: Path) -> None:
    answer = medarch(fixture_book, "execute", "demo/frist")
    assert answer.returncode == 1
    assert "there is no chapter 'demo/frist'" in answer.stderr
    assert "nearest: demo/first" in answer.stderr
    edit(fixture_book / "_toc.yml", "book/demo/second", "book/demo/secnod")
    assert "nearest: demo/second" in medarch(fixture_book, "execute").stderr


def test_a_taken_port_and_a_missing_site_get_one_line(fixture_book: Path) -> None:
    import socket

    assert "run `make book` first" in medarch(fixture_book, "serve").stderr
    (fixture_book / "_build/html").mkdir(parents=True)
    (fixture_book / "_build/html/index.html").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = medarch(fixture_book, "serve", "--port", str(port))
    assert answer.returncode == 1
    assert f"Port {port} is taken" in answer.stderr
    assert f"PORT={port + 1}" in answer.stderr


def test_chapters_run_side_by_side(fixture_book: Path) -> None:
    """Two chapters that wait for each other can only end if both run at once."""
    for name, own, other in ((FIRST, "one", "two"), (SECOND, "two", "one")):
        path = fixture_book / f"book/{name}.md"
        marker = 'print("faces:", len(faces))' if name == FIRST else 'prove("coin-is-fair", entropy)'
        wait = f"import pathlib, time\nhere = pathlib.Path({str(fixture_book)!r})\n(here / {own!r}).touch()\nwhile not (here / {other!r}).exists():\n    time.sleep(0.1)"
        edit(path, marker, wait)
    start = time.monotonic()
    assert run(fixture_book, workers=2, timeout=30) == [FIRST, SECOND]
    assert time.monotonic() - start < 30
