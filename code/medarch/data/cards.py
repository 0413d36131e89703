"""Data cards: what a reader must know about a data set before believing anything that is built on it."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class DataCard:
    """What a data set is, where it comes from and what it may not be used for.

    Attributes:
        name: the data set's name.
        source: who made it, and where this copy comes from.
        version: the version of this copy.
        licence: the terms of use in short, with the required acknowledgement.
        size: what it holds.
        citation: the publication to cite.
        sha256: checksum of the file that is read, 64 hexadecimal digits.
        may_not_be_used_for: uses that the terms or the nature of the data rule out.
        url: the page that states the terms of use.
    """

    name: str
    source: str
    version: str
    licence: str
    size: str
    citation: str
    sha256: str
    may_not_be_used_for: str
    url: str

    def __post_init__(self) -> None:
        empty = [item.name for item in fields(self) if not getattr(self, item.name).strip()]
        if empty:
            raise ValueError(f"data card {self.name!r}: empty fields: {', '.join(empty)}")

    def _rows(self) -> list[tuple[str, str]]:
        labels = {"sha256": "SHA-256", "url": "Terms of use", "may_not_be_used_for": "May not be used for"}
        rest = [item.name for item in fields(self) if item.name != "name"]
        return [(labels.get(name, name.capitalize()), getattr(self, name)) for name in rest]

    def __str__(self) -> str:
        return "\n".join([f"Data card: {self.name}", *(f"{label}: {value}" for label, value in self._rows())])

    def _repr_markdown_(self) -> str:
        """The card as a table; what a notebook shows."""
        rows = [f"| {label} | {_cell(label, value)} |" for label, value in self._rows()]
        return "\n".join([f"| Data card | {self.name} |", "| --- | --- |", *rows])


def _cell(label: str, value: str) -> str:
    value = value.replace("|", r"\|").replace("\n", " ")
    if label == "SHA-256":
        return f"`{value}`"
    return f"<{value}>" if label == "Terms of use" else value
