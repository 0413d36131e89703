"""The ECG strip: what is read, and what its card admits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medarch.data.ecg import CARD, FILE, load_strip


def test_the_strip_is_the_packages_own() -> None:
    import pywt.data

    strip = load_strip()
    assert strip.shape == (1024,)
    assert strip.dtype == np.float64
    assert strip.tolist() == pywt.data.ecg().tolist()


def test_three_beats_as_the_card_says() -> None:
    strip = load_strip()
    above = strip > 120
    assert int((above[1:] & ~above[:-1]).sum()) == 3
    assert "three heartbeats" in CARD.size


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_strip(tmp_path)
    np.savez(tmp_path / FILE, data=np.arange(1024))
    with pytest.raises(ValueError, match=r"ecg\.npz is not the file of PyWavelets 1\.9\.0"):
        load_strip(tmp_path)
