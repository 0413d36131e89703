"""What the tests share: copies of the two-page fixture book to do harm to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parent / "site" / "fixture"
collect_ignore = ["site/fixture", "reference"]


def _copy(root: Path) -> Path:
    """Copy the fixture book."""
    return Path(shutil.copytree(FIXTURE, root))


@pytest.fixture
def fixture_book(tmp_path: Path) -> Path:
    """A fresh copy of the fixture book, without recorded outputs; its root folder."""
    return _copy(tmp_path / "fixture")


@pytest.fixture(scope="session")
def _recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medarch.site.chapters import Project
    from medarch.site.execute import run_chapter
    from medarch.site.recorded import record

    root = _copy(tmp_path_factory.mktemp("recorded") / "fixture")
    project = Project(root)
    executed = {name: run_chapter(chapter)[0] for name, chapter in project.chapters.items()}
    assert len(record(project, project.chapters.values(), executed)) == len(executed) == 2
    return root


@pytest.fixture
def recorded_book(_recorded: Path, tmp_path: Path) -> Path:
    """A fresh copy of the fixture book with its present outputs recorded; its root folder."""
    return Path(shutil.copytree(_recorded, tmp_path / "recorded"))
