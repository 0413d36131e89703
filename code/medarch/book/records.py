"""Records on a page: what a benchmark measured elsewhere or for long, with the device on which it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medarch.bench.records import Record, is_current, load
from medarch.book.ledger import find_book


@dataclass(frozen=True)
class Shown:
    """A record as a chapter uses it: its results, and the label that goes with every number taken from it."""

    record: Record
    current: bool

    @property
    def results(self) -> dict[str, Any]:
        """What the benchmark returned."""
        return self.record.results

    @property
    def label(self) -> str:
        """Device, date and command, and a warning where the code behind the record has changed since."""
        device = self.record.device
        machine = device.get("gpu") or f"{device.get('cpu')}, {device.get('cores')} cores"
        stale = "" if self.current else "; measured with an earlier version of the code"
        return f"Record of {self.record.date[:10]} on {machine}, made by `{self.record.command}`{stale}."


def show_record(name: str) -> dict[str, Shown]:
    """The committed records of a benchmark by class of device, after printing each one's label.

    Raises:
        FileNotFoundError: where there is none; the message says how to make one.
    """
    paths = sorted((find_book() / "records").glob(f"{name.replace('/', '-')}.*.json"))
    if not paths:
        raise FileNotFoundError(f"there is no record of {name!r} in book/records: make one with `medarch bench {name}`")
    shown = {}
    for path in paths:
        record = load(path)
        shown[path.name.split(".")[-2]] = entry = Shown(record, is_current(record))
        print(entry.label)
    for device in {"cpu", "cuda"} - set(shown):
        print(f"No record for the device class {device} yet: `make bench NAME={name} DEVICE={device}` makes one.")
    return shown
