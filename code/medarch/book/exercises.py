"""Exercises whose answers the page checks: a starter says "not yet", a solution "correct", none raises.

An exercise is four things of one label: the text (``{exercise}``), a checker in a hidden cell, a starter cell tagged
``exercise`` that calls :func:`check`, and a folded ``{solution}`` whose Python block can replace it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

Checker = Callable[[Any], str | None]
_CHECKERS: dict[str, Checker] = {}


def exercise(label: str) -> Callable[[Checker], Checker]:
    """Make the decorated function the checker of an exercise.

    The function takes the reader's answer and returns a hint, or ``None`` where the answer is right. Annotate
    its argument: the type is what a reader is told to supply when the checker cannot even look at the answer.
    """

    def register(checker: Checker) -> Checker:
        _CHECKERS[label] = checker
        return checker

    return register


def check(label: str, answer: Any) -> None:
    """Print ``correct: <label>`` or ``not yet: <hint>``; never raises, so that a notebook runs to its end."""
    hint = _hint(label, answer)
    print(f"correct: {label}" if hint is None else f"not yet: {hint}")


def _hint(label: str, answer: Any) -> str | None:
    checker = _CHECKERS.get(label)
    if checker is None:
        near = ", ".join(difflib.get_close_matches(str(label), _CHECKERS, n=3, cutoff=0.3)) or "none is near"
        return f"no exercise of that name (nearest: {near})"
    try:
        hint = checker(answer)
    except Exception as error:
        wanted = next(iter(inspect.signature(checker).parameters.values())).annotation
        kind = (
            f"expected {_name(wanted)}" if wanted is not inspect.Parameter.empty else "expected another kind of answer"
        )
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"{kind}, and this is {_name(type(answer))} ({told})"
    if hint is None or isinstance(hint, str):
        return hint
    return f"the checker of {label} returned {_name(type(hint))}; it must return a hint, or None if all is right"


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
