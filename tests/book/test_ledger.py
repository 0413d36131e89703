"""The ledger as a cell sees it: what proves a claim, what cannot, and what leaves the kernel."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from medarch.book import ledger
from medarch.book.ledger import GLUE_PREFIX, Disproved, Expectation, parse_claims, prove

CLAIMS = """
- id: half
  section: a
  chapter: b/c
  claim: A half is a half.
  kind: quality
  verdict: holds
  evidence: cell
  quantity: one divided by two
  expect: {value: 0.5, tolerance: 0.1}
- id: told
  section: a
  chapter: b/c
  claim: Somebody said so.
  kind: history
  verdict: holds
  evidence: source
"""


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict]]:
    """A book with two claims, and what cells display in it."""
    (tmp_path / "book").mkdir()
    (tmp_path / "_toc.yml").write_text("root: book/index\n")
    (tmp_path / "book/claims.yml").write_text(CLAIMS)
    monkeypatch.setenv("MEDARCH_ROOT", str(tmp_path))
    shown: list[tuple[dict, dict]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: shown.append((data, metadata)))
    return shown


def test_a_proved_claim_prints_its_verdict_and_leaves_its_value(outputs: list, capsys: pytest.CaptureFixture) -> None:
    prove("half", 0.55)
    assert capsys.readouterr().out == "Claim half: holds (expected 0.5 ± 0.1, and so measured)\n"
    ((data, metadata),) = outputs
    assert data == {GLUE_PREFIX + "text/plain": "0.55"}
    assert metadata == {"scrapbook": {"name": "half", "mime_prefix": GLUE_PREFIX}}


@pytest.mark.parametrize("value", [0.39, 0.61, math.nan, math.inf])
def test_a_value_outside_proves_nothing(outputs: list, value: float) -> None:
    with pytest.raises(Disproved, match=r"book/claims\.yml:2 expects 0\.5 ± 0\.1 \(one divided by two\)"):
        prove("half", value)
    assert outputs == []


def test_an_unknown_claim_is_answered_with_the_nearest(outputs: list) -> None:
    with pytest.raises(KeyError, match="no claim 'hallf' \\(nearest: half\\)"):
        prove("hallf", 0.5)


def test_a_claim_that_no_cell_proves_is_refused(outputs: list) -> None:
    with pytest.raises(ValueError, match="not proved by a cell"):
        prove("told", 1.0)


@pytest.mark.parametrize(
    ("expectation", "inside", "outside", "text"),
    [
        (Expectation(value=2, tolerance=0.5), [1.5, 2.5], [1.49, 2.51], "2 ± 0.5"),
        (Expectation(value=8), [8], [7.999], "8 ± 0"),
        (Expectation(min=1), [1, 1e9], [0.99], "at least 1"),
        (Expectation(max=1), [1, -1e9], [1.01], "at most 1"),
        (Expectation(min=0, max=1), [0, 1], [-0.1, 1.1], "between 0 and 1"),
    ],
)
def test_bounds_are_closed_and_told(expectation: Expectation, inside: list, outside: list, text: str) -> None:
    assert all(map(expectation.holds, inside))
    assert not any(map(expectation.holds, outside))
    assert not expectation.holds(math.nan)
    assert str(expectation) == text


def test_the_ledger_of_this_book_reads_and_every_final_claim_is_complete() -> None:
    book = Path(__file__).parents[2] / "book"
    claims = parse_claims((book / "claims.yml").read_text("utf8"))
    assert len(claims) >= 228
    assert ledger.load_claims(book) == claims
    for claim in claims.values():
        assert claim.verdict not in ("corrected", "unsupported") or claim.correction, claim.id


def test_outside_a_book_the_ledger_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDARCH_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no _toc\.yml"):
        prove("half", 0.5)
