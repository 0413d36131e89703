"""Two recordings of the pulse by light, cut into short windows.

The files ship inside the PyPI package heartpy and are read where they lie, without importing it.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from medarch.data.cards import DataCard

FILES = {
    "data2.csv": ("7d85f0d33b04395409e81d614b9bd82541208cc3edfbc5a49b5129ae3cb573b9", 116.99),
    "data3.csv": ("16eedaa7c97c6ca873e7e424d27a84dcd043d4eca0e4f7611d2a37969192b7ea", 100.42),
}
"""Each recording's checksum, and its sampling rate in hertz by its own time stamps."""

CARD = DataCard(
    name="HeartPy example recordings",
    source="Paul van Gent; photoplethysmograms that ship as examples in the PyPI package heartpy",
    version="1.2.7, files data2.csv and data3.csv",
    licence=(
        "MIT by the licence file of the package, while its description names the GNU General Public License, "
        "version 3. The files are read from the installed package and not redistributed"
    ),
    size="Two recordings: 15,000 samples at about 117 Hz (two minutes) and 68,476 at about 100 Hz (eleven minutes)",
    citation=(
        "van Gent P, Farah H, van Nes N, van Arem B. HeartPy: A novel heart rate algorithm for the analysis of noisy "
        "signals. Transportation Research Part F 66, 368-378, 2019, doi:10.1016/j.trf.2019.09.015"
    ),
    sha256=FILES["data2.csv"][0],
    may_not_be_used_for=(
        "Any statement about patients or about people. Two recordings are known, and neither the persons nor the "
        "sensors are described; whoever tells the two apart may be telling the sensors apart"
    ),
    url="https://github.com/paulvangentcom/heartrate_analysis_python",
)


@dataclass(frozen=True)
class Recording:
    """One recording.

    Attributes:
        name: its file.
        rate: samples a second, in hertz.
        signal: light that reached the sensor, in the sensor's own units.
    """

    name: str
    rate: float
    signal: Float[np.ndarray, "time"]


def load_recordings(folder: Path | None = None) -> list[Recording]:
    """Both recordings, whole.

    Args:
        folder: another copy of the files; the installed package's by default.

    Raises:
        FileNotFoundError: the package, or a file of it, is not there.
        ValueError: a file is not the one that this book was written with.
    """
    if folder is None:
        spec = importlib.util.find_spec("heartpy")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("heartpy is not installed; install heartpy==1.2.7, whose recordings are read")
        folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    recordings = []
    for name, (checksum, rate) in FILES.items():
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != checksum:
            raise ValueError(f"{folder / name} is not the file of heartpy 1.2.7: reinstall it")
        rows = list(csv.DictReader(content.decode().splitlines()))
        recordings.append(Recording(name, rate, np.array([float(row["hr"]) for row in rows])))
    return recordings


def windows(
    signal: Float[np.ndarray, "time"], length: int = 64, step: int = 64, thin: int = 1
) -> Float[np.ndarray, "windows length"]:
    """Stretches of a signal, each brought to mean 0 and standard deviation 1.

    Args:
        signal: samples in order.
        length: samples of a window.
        step: samples, after thinning, from the beginning of one to that of the next.
        thin: keep one sample of so many, so that a window lasts longer.

    Returns:
        Windows in order of time; a window in which nothing changes is all 0.

    Raises:
        ValueError: a number is not positive, or the signal is shorter than one window.
    """
    if min(length, step, thin) < 1:
        raise ValueError(f"length={length}, step={step} and thin={thin} must be at least 1")
    thinned = signal[::thin]
    if len(thinned) < length:
        raise ValueError(f"{len(thinned)} samples are fewer than one window of length={length}")
    cut = np.lib.stride_tricks.sliding_window_view(thinned, length)[::step]
    centred = cut - cut.mean(1, keepdims=True)
    spread = centred.std(1, keepdims=True)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
