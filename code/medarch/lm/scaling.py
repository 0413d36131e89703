"""Scaling laws: how the loss falls with size and with the number of experts, fitted and tested by extrapolation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Form = Literal["logarithm", "power", "offset", "routed"]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One trained model.

    Attributes:
        size: N, the parameters that one token meets, without embeddings.
        expansion: X, experts held over experts used; 1 for a dense model.
        loss: Held-out loss in nats a token.
    """

    size: float
    expansion: float
    loss: float


def _logarithm(n: Values, x: Values, a: float, b: float) -> Values:
    return a - b * n


def _power(n: Values, x: Values, a: float, b: float) -> Values:
    return np.exp(a - b * n)


def _offset(n: Values, x: Values, a: float, b: float, floor: float) -> Values:
    return np.exp(a - b * n) + np.exp(floor)


def _routed(n: Values, x: Values, a: float, b: float, c: float, d: float) -> Values:
    return np.exp(a * n + b * x + c * n * x + d)


# The function of log N and log X, the names of its coefficients, and where the search for them begins.
_FORMS: dict[str, tuple[Callable[..., Values], tuple[str, ...], tuple[float, ...]]] = {
    "logarithm": (_logarithm, ("a", "b"), (5.0, 0.1)),
    "power": (_power, ("a", "b"), (2.0, 0.1)),
    "offset": (_offset, ("a", "b", "log_floor"), (2.0, 0.2, 0.0)),
    "routed": (_routed, ("a", "b", "c", "d"), (-0.1, -0.1, 0.0, 2.0)),
}


@dataclass(frozen=True)
class Fit:
    """A form with its coefficients.

    Attributes:
        form: Which function; see ``fit_law``.
        coefficients: By name.
        residual: Root mean square of the relative errors at the points that were fitted.
    """

    form: Form
    coefficients: dict[str, float]
    residual: float

    def predict(self, size: float, expansion: float = 1.0) -> float:
        """The loss that the law expects, in nats a token."""
        function = _FORMS[self.form][0]
        n, x = np.array([math.log(size)]), np.array([math.log(expansion)])
        return float(function(n, x, *self.coefficients.values())[0])


def fit_law(points: Sequence[Point], form: Form) -> Fit:
    """Fits the loss by least squares of its relative error.

    The forms, with N the size and X the expansion:

    - ``"logarithm"``: ``a - b log N``;
    - ``"power"``: ``exp(a) / N**b`` (Kaplan et al. 2020, arXiv:2001.08361);
    - ``"offset"``: ``exp(a) / N**b + floor`` (Hoffmann et al. 2022, arXiv:2203.15556, with the data held fixed);
    - ``"routed"``: ``log L = a log N + b log X + c log N log X + d`` (Clark et al. 2022, arXiv:2202.01169, without
      the saturation at very few and very many experts; their E, of which one is used, is our X).

    Args:
        points: Trained models; the first three forms take those with ``expansion`` 1 alone.
        form: Which function to fit.

    Raises:
        ValueError: If the form is unknown, a value is not positive, a mixture is given to a form for dense models,
            or there are no more points than coefficients, so that any data would fit.
    """
    from scipy.optimize import curve_fit

    if form not in _FORMS:
        raise ValueError(f"form {form!r} is none of {tuple(_FORMS)}")
    function, names, start = _FORMS[form]
    for point in points:
        if not (point.size > 0 and point.expansion >= 1 and point.loss > 0):
            raise ValueError(f"{point}: size and loss must be positive and expansion at least 1")
        if form != "routed" and point.expansion != 1:
            raise ValueError(f"{point}: the form {form!r} knows no experts; fit 'routed', or give dense models alone")
    if len(points) <= len(names):
        raise ValueError(
            f"{len(points)} points for the {len(names)} coefficients of {form!r}: a curve through every point says "
            "nothing; train more models"
        )
    rows = [(math.log(point.size), math.log(point.expansion), point.loss) for point in points]
    n, x, loss = np.array(rows).T

    def relative(inputs: Values, *coefficients: float) -> Values:
        return function(inputs[0], inputs[1], *coefficients) / loss

    found, _ = curve_fit(relative, np.stack([n, x]), np.ones_like(loss), p0=start, maxfev=20_000)
    residual = float(np.sqrt(np.mean((relative(np.stack([n, x]), *found) - 1) ** 2)))
    return Fit(form, dict(zip(names, map(float, found), strict=True)), residual)


@dataclass(frozen=True)
class Extrapolation:
    """What a law foretold of models that it was not fitted to.

    Attributes:
        fit: The law from the remaining models.
        held_out: The models that were left out.
        predicted: Their losses by the law.
    """

    fit: Fit
    held_out: tuple[Point, ...]
    predicted: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative errors, positive where the law expected a higher loss than was measured."""
        return tuple(p / point.loss - 1 for p, point in zip(self.predicted, self.held_out, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a record."""
        return {
            "form": self.fit.form,
            "coefficients": self.fit.coefficients,
            "residual": self.fit.residual,
            "held_out": [
                {"size": p.size, "expansion": p.expansion, "loss": p.loss, "predicted": predicted, "error": error}
                for p, predicted, error in zip(self.held_out, self.predicted, self.errors, strict=True)
            ],
        }


def extrapolate(points: Sequence[Point], form: Form, held_out: Callable[[Point], bool] | None = None) -> Extrapolation:
    """Fits a law to some of the models and asks it about the others.

    Args:
        points: All trained models.
        form: Which law.
        held_out: Which models to leave out; by default those of the largest size.

    Raises:
        ValueError: If no model, or too many, are left out, or as in ``fit_law``.
    """
    largest = max((point.size for point in points), default=0.0)
    leave = held_out or (lambda point: point.size == largest)
    out = tuple(point for point in points if leave(point))
    if not out:
        raise ValueError("no model is left out: there is nothing to foretell")
    fit = fit_law([point for point in points if not leave(point)], form)
    return Extrapolation(fit, out, tuple(fit.predict(point.size, point.expansion) for point in out))
