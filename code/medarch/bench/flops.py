"""FLOPs of a computation, counted by torch, with no costly operator left out in silence.

Counted are the multiplications and additions of contractions (matrix products, convolutions, attention),
two for each pair, as torch's counter does. Element-wise work, softmax and sums are not counted. Torch's
counter knows no formula for some costly operators and gives these zero; here they have one, or are an
error.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

Shape = tuple[int, ...]

# Beginnings of the names of operators whose work grows faster than their input and output. Without a formula
# for such an operator, the count would be wrong.
COSTLY = (
    "_grouped_mm",
    "_scaled_grouped_mm",
    "_scaled_dot_product",
    "_fft_",
    "_trilinear",
    "_cdist",
    "_int_mm",
    "_weight_int",
    "_efficient_attention",
    "_flash_attention",
    "mkldnn_rnn",
    "mkldnn_linear",
    "linalg_",
    "_linalg_det",
    "_linalg_e",
    "_linalg_s",
    "addbmm",
    "addmv",
    "addr",
    "cholesky",
    "dot",
    "ger",
    "lstm",
    "mm",
    "mv",
    "gru",
    "vdot",
)

# These begin so too, but do a few operations for each number that they read.
CHEAP = ("linalg_vector_norm", "linalg_cross", "linalg_diagonal")


def register_formula(operator: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Gives an operator of ``torch.ops.aten`` a formula.

    Args:
        operator: its name, such as ``"_fft_r2c"``.

    Returns:
        A decorator for a function of the operator's arguments, in which each tensor is replaced by its
        shape; the keyword ``out_shape`` is the shape of the result. It returns the FLOPs of one call.

    Raises:
        ValueError: torch has no such operator, or it has a formula already.
    """
    import torch

    if not hasattr(torch.ops.aten, operator):
        raise ValueError(f"torch.ops.aten has no operator {operator!r}")
    if operator in _formulas:
        raise ValueError(f"operator {operator!r} has a formula already; remove it from the registry first")

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        _formulas[operator] = formula
        return formula

    return register


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of ``function(*args, **kwargs)``, a backward pass inside it included.

    Raises:
        ValueError: a costly operator has no formula, or the call ran no operator that is counted.
    """
    return sum(flops_by_operator(function, *args, **kwargs).values())


def flops_by_operator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """FLOPs of ``function(*args, **kwargs)`` by operator; see ``count_flops``."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    known = {getattr(torch.ops.aten, name): formula for name, formula in _formulas.items()}
    unknown: set[str] = set()

    class Watch(TorchDispatchMode):
        """Sees each operator that really runs, after those made of others were taken apart."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            packet = func.overloadpacket
            name = packet.__name__
            if packet in known or packet in flop_registry or name in CHEAP:
                return func(*args, **(kwargs or {}))
            if name.startswith(COSTLY):
                unknown.add(name)
            return func(*args, **(kwargs or {}))

    counter = FlopCounterMode(display=False, custom_mapping=known)
    with Watch(), counter:
        function(*args, **kwargs)
    if unknown:
        raise ValueError(
            f"no formula for {', '.join(sorted(unknown))}: torch's counter would count zero. "
            "Register one with medarch.bench.flops.register_formula, or count a version of matrix products"
        )
    counts = {packet.__name__: int(count) for packet, count in counter.get_flop_counts().get("Global", {}).items()}
    if not counts:
        raise ValueError(f"{getattr(function, '__name__', function)} ran no operator that is counted")
    return counts


def _mv(matrix: Shape, vector: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _dot(left: Shape, right: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(left)


def _grouped_mm(left: Shape, right: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Rows of ``left`` meet one matrix each, or (in the backward pass) columns are split into groups."""
    if len(left) == 2:
        return 2 * prod(left) * right[-1]
    return 2 * left[-2] * prod(right)


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The whole square of scores, masked or not, as torch counts attention on other devices."""
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(grad, query, key, value)


_formulas: dict[str, Callable[..., int]] = {
    "mv": _mv,
    "dot": _dot,
    "_grouped_mm": _grouped_mm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
