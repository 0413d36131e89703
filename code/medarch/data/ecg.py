"""The strip of an electrocardiogram that ships with PyWavelets, and what is not known of it.

The file lies inside the PyPI package PyWavelets and is read there, without importing it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
from jaxtyping import Float

from medarch.data.cards import DataCard

FILE = "ecg.npz"

CARD = DataCard(
    name="PyWavelets ECG strip",
    source="PyWavelets; the strip ships as an example in the PyPI package, as pywt.data.ecg. Where it was recorded, "
    "and of whom, the package does not say",
    version="1.9.0, file pywt/data/ecg.npz",
    licence="MIT by the licence file of the package; no licence of the recording itself is named. The file is read "
    "from the installed package and not redistributed",
    size="1,024 whole numbers, in which three heartbeats are to be seen. Neither sampling rate nor unit is given",
    citation="Lee GR, Gommers R, Wasilewski F, Wohlfahrt K, O'Leary A. PyWavelets: A Python package for wavelet "
    "analysis. Journal of Open Source Software 4(36), 1237, 2019, doi:10.21105/joss.01237",
    sha256="ea720476139341eabecf3e44cc602cd75576aff1e4156b1c069f7b33e86a9e6b",
    may_not_be_used_for="Anything that needs a time or a voltage: without a sampling rate there is no heart rate, and "
    "without a unit no amplitude. Nor for a statement about a person, a diagnosis or a device: one strip of unknown "
    "origin is a picture, not evidence",
    url="https://github.com/PyWavelets/pywt/blob/main/LICENSE",
)


def load_strip(folder: Path | None = None) -> Float[np.ndarray, "time"]:
    """The strip, whole.

    Args:
        folder: another place of the file; the installed package's by default.

    Returns:
        1,024 samples in order, in a unit and at intervals that are not known.

    Raises:
        FileNotFoundError: the package, or its file, is not there.
        ValueError: the file is not the one that this book was written with.
    """
    if folder is None:
        spec = importlib.util.find_spec("pywt")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("pywt is not installed; install PyWavelets==1.9.0, whose strip is read")
        folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    content = (folder / FILE).read_bytes()
    if hashlib.sha256(content).hexdigest() != CARD.sha256:
        raise ValueError(f"{folder / FILE} is not the file of PyWavelets 1.9.0: reinstall it")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return archive["data"].astype(np.float64)
