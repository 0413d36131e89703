"""The pulse recordings: what is read, and how it is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medarch.data.pulse import CARD, FILES, load_recordings, windows


def test_both_recordings_are_read_whole() -> None:
    recordings = load_recordings()
    assert [len(each.signal) for each in recordings] == [15000, 68476]
    assert [each.rate for each in recordings] == [116.99, 100.42]
    assert recordings[0].signal[:2].tolist() == [515.0, 514.0]
    assert CARD.sha256 == FILES["data2.csv"][0]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_recordings(tmp_path)
    (tmp_path / "data2.csv").write_text("timer,hr\n0,1\n")
    with pytest.raises(ValueError, match=r"data2\.csv is not the file of heartpy"):
        load_recordings(tmp_path)


def test_windows_by_hand() -> None:
    found = windows(np.array([1.0, 9, 3, 9, 5, 9, 7, 9, 9, 9, 5.0]), length=2, step=2, thin=2)
    # Thinned: 1 3 5 7 9 5. Two numbers of mean 0 and deviation 1 are -1 and 1.
    assert found.tolist() == [[-1, 1], [-1, 1], [1, -1]]
    assert windows(np.full(5, 3.0), length=5).tolist() == [[0.0] * 5]
    with pytest.raises(ValueError, match="thin=0"):
        windows(np.ones(9), length=3, thin=0)
    with pytest.raises(ValueError, match="2 samples are fewer than one window of length=3"):
        windows(np.ones(4), length=3, thin=2)
