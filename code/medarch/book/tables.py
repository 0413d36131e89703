"""A small table as a cell's result: a table on the page, aligned text in a terminal and in the recorded outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Table:
    """Rows under a header, all as text; every column but the first is aligned to the right.

    Raises:
        ValueError: for a row with more or fewer fields than the header, or a column without a name, which would
            leave a reader who hears the table without one.
    """

    def __init__(self, header: Sequence[str], rows: Iterable[Sequence[object]]):
        self.rows = [[str(field) for field in row] for row in (header, *rows)]
        if "" in self.rows[0]:
            raise ValueError(f"column {self.rows[0].index('') + 1} has no name: say in the header what it holds")
        for row in self.rows:
            if len(row) != len(header):
                raise ValueError(f"row {row} has {len(row)} fields, the header {len(header)}")

    def _repr_markdown_(self) -> str:
        lines = ["| " + " | ".join(row) + " |" for row in self.rows]
        rule = "| --- |" + " ---: |" * (len(self.rows[0]) - 1)
        return "\n".join([lines[0], rule, *lines[1:]])

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        return "\n".join(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(field.rjust(width) for field, width in zip(row[1:], widths[1:], strict=True)),
                ]
            )
            for row in self.rows
        )
