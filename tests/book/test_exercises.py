"""The check never raises, and says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from medarch.book.exercises import check, exercise


@exercise("moe-count")
def _count(answer: int) -> str | None:
    return None if answer + 0 == 15 else "multiply tokens by experts"


@exercise("moe-bare")
def _bare(answer):  # type: ignore[no-untyped-def]
    return answer.shape


@exercise("moe-true")
def _true(answer: Any) -> Any:
    return True


def said(capsys: pytest.CaptureFixture[str], label: Any, answer: Any) -> str:
    assert check(label, answer) is None
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("label", "answer", "told"),
    [
        ("moe-count", 15, "correct: moe-count\n"),
        ("moe-count", 14, "not yet: multiply tokens by experts\n"),
        ("moe-count", None, "not yet: expected int, and this is NoneType (TypeError: "),
        ("moe-bare", 3, "not yet: expected another kind of answer, and this is int (AttributeError: "),
        ("moe-true", 3, "not yet: the checker of moe-true returned bool; it must return a hint"),
        ("moe-cuont", 3, "not yet: no exercise of that name (nearest: moe-count"),
        ("zzz", 3, "not yet: no exercise of that name (nearest: none is near)\n"),
        (None, 3, "not yet: no exercise of that name"),
    ],
)
def test_check_answers_in_one_line(capsys: pytest.CaptureFixture[str], label: Any, answer: Any, told: str) -> None:
    text = said(capsys, label, answer)
    assert text.startswith(told)
    assert text.count("\n") == 1


def test_a_checker_that_raises_anything_is_survived(capsys: pytest.CaptureFixture[str]) -> None:
    class Hostile:
        def __add__(self, other: int) -> int:
            raise RecursionError("deep")

    assert said(capsys, "moe-count", Hostile()).startswith(
        "not yet: expected int, and this is Hostile (RecursionError: deep)"
    )


def test_the_latest_checker_of_a_label_counts(capsys: pytest.CaptureFixture[str]) -> None:
    exercise("twice")(lambda answer: "first")
    exercise("twice")(lambda answer: None)
    assert said(capsys, "twice", 0) == "correct: twice\n"
