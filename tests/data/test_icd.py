"""ICD-10-CM: counts, a known entry, and what happens when the file is not the right one."""

import hashlib
import subprocess
import sys
from importlib import metadata

import pytest

from medarch.data import icd


@pytest.fixture(scope="module")
def entries():
    return icd.load_entries()


def test_counts_are_those_on_the_card(entries):
    assert len(entries) == 7_183
    assert len({entry.chapter for entry in entries}) == 22
    assert "7,183" in icd.CARD.size
    assert "22 chapters" in icd.CARD.size
    assert f"{icd.tabular_file().read_bytes().count(b'<diag>') + _with_attributes():,}" in icd.CARD.size


def _with_attributes():
    return icd.tabular_file().read_bytes().count(b"<diag ")


def test_known_entries(entries):
    by_code = {entry.code: entry for entry in entries}
    assert len(by_code) == len(entries)
    assert by_code["A00.0"].title == "Cholera due to Vibrio cholerae 01, biovar cholerae"
    assert by_code["A00.0"].notes == ("Classical cholera",)
    assert by_code["B57"].notes == ("American trypanosomiasis", "infection due to Trypanosoma cruzi")
    assert "A00-B99" in by_code["B57"].chapter
    assert all(entry.title and all(note.strip() == note != "" for note in entry.notes) for entry in entries)


def test_an_altered_file_is_refused_by_name_and_checksum(tmp_path):
    path = tmp_path / "list.xml"
    path.write_bytes(b"<ICD10CM.tabular/>")
    with pytest.raises(ValueError, match="reinstall") as error:
        icd.load_entries(path)
    found = hashlib.sha256(b"<ICD10CM.tabular/>").hexdigest()
    assert all(word in str(error.value) for word in (str(path), found, icd.SHA256))


def test_a_missing_file_or_package_is_said(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        icd.load_entries(tmp_path / "nowhere.xml")

    class Elsewhere:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(metadata, "distribution", lambda name: Elsewhere())
    with pytest.raises(FileNotFoundError, match="reinstall simple-icd-10-cm"):
        icd.tabular_file()

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(FileNotFoundError, match="not installed"):
        icd.tabular_file()


def test_the_file_is_found_without_importing_the_package():
    program = "import sys; from medarch.data import icd; icd.tabular_file(); print('simple_icd_10_cm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_the_card_meets_the_terms_of_use():
    card = str(icd.CARD)
    for required in ("World Health Organization", "Source: CDC", "No endorsement", "no charge", icd.SHA256):
        assert required in card
