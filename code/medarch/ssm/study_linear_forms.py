"""What the three forms of a linear state space cost, and how that grows with the length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medarch.bench import benchmark, compare
from medarch.ssm.linear import LinearStateSpace, convolution, recurrence, scan
from medarch.ssm.s4d import S4D, S4DConfig

CHANNELS, STATES = 8, 32  # those of the practice notebook
SIZES = {"hidden_size": 64, "state_size": 64, "heads": 4}


@benchmark("ssm/linear-forms", modules=["medarch.ssm.linear", "medarch.ssm.s4d", "medarch.bench.timing"])
def linear_forms(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Time of loop, scan and convolution at 1,000 steps, and of S4D and attention over the length, one thread.

    The first part has the sizes of the practice notebook's model: a dense matrix of 32 states, 8 channels, one sequence
    of 1,000 steps. "loop, indexed" picks each step out of the sequence as the notebook does; "loop" takes the sequence
    apart once. The second part compares layers of 64 channels: S4D as a convolution and as a loop, and causal attention
    with four heads and its projections; exponents are those of a power law through the four longest lengths.

    Args:
        device: Where to run, ``"cpu"`` or ``"cuda"``.
        quick: Whether to run small sizes, to see that everything works.

    Returns:
        Both comparisons, with the exponents and the length from which S4D is faster than attention.

    Raises:
        ValueError: If two forms disagree: what is wrong is not timed.
    """
    rounds = 3 if quick else 9
    return {
        "repeats": rounds,
        "notebook": _notebook(61 if quick else 1000, rounds, device),
        "scaling": _scaling((16, 32, 64) if quick else (256, 512, 1024, 2048, 4096, 8192, 16384), rounds, device),
    }


def _notebook(time: int, rounds: int, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    system = notebook_system(generator, radius=0.99)
    A, B, C, D = (matrix.to(device).requires_grad_() for matrix in matrices(system))
    system = LinearStateSpace(A, B, C, D, step=1.0)
    u = torch.randn(1, time, CHANNELS, generator=generator).to(device)
    forms: dict[str, Callable[[], Tensor]] = {
        "loop, indexed": lambda: indexed_loop(system, u),
        "loop": lambda: recurrence(system, u)[0],
        "scan": lambda: scan(system, u)[0],
        "convolution": lambda: convolution(system, u),
    }
    check_agreement(forms)

    def training(form: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            form().square().sum().backward()
            for matrix in matrices(system):
                matrix.grad = None

        return call

    def inference(form: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                form()

        return call

    found: dict[str, Any] = {"time": time, "states": STATES, "channels": CHANNELS}
    for mode, wrap in (("forward", inference), ("forward_backward", training)):
        calls = {name: wrap(form) for name, form in forms.items()}
        measured = compare(calls, baseline="convolution", rounds=rounds, threads=1, device=device)
        found[mode] = measured.to_dict()
        found[f"{mode}_loop_over_convolution"] = measured.ratio("loop, indexed")[0]
    return found


def notebook_system(generator: torch.Generator, radius: float) -> LinearStateSpace:
    """A dense system of the notebook's sizes with a matrix of the given spectral radius, so that nothing underflows."""
    A = torch.randn(STATES, STATES, generator=generator)
    A = A * (radius / float(torch.linalg.eigvals(A).abs().max()))
    shapes = ((STATES, CHANNELS), (CHANNELS, STATES), (CHANNELS, CHANNELS))
    B, C, D = (torch.randn(shape, generator=generator) / 8 for shape in shapes)
    return LinearStateSpace(A, B, C, D, step=1.0)


def matrices(system: LinearStateSpace) -> list[Tensor]:
    """A, B, C and D."""
    return [system.A, system.B, system.C, system.D]


def indexed_loop(system: LinearStateSpace, u: Tensor) -> Tensor:
    """The recurrence with the sequence indexed at each step and the outputs read one by one."""
    state, outputs = u.new_zeros(len(u), len(system.A)), []
    for t in range(u.shape[1]):
        state = state @ system.A.T + u[:, t] @ system.B.T
        outputs.append(state @ system.C.T + u[:, t] @ system.D.T)
    return torch.stack(outputs, dim=1)


def check_agreement(forms: dict[str, Callable[[], Tensor]]) -> None:
    """Holds all forms to the first.

    Raises:
        ValueError: Naming the form that disagrees.
    """
    expected = next(iter(forms.values()))()
    for name, form in forms.items():
        try:
            torch.testing.assert_close(form(), expected, rtol=1e-3, atol=1e-4 * expected.detach().abs().max().item())
        except AssertionError as difference:
            raise ValueError(f"{name} disagrees with the loop: {difference}") from None


class Attention(nn.Module):
    """Causal attention with its four projections, for comparison."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The mixed sequence, of the same shape."""
        batch, time, hidden = hidden_states.shape
        query, key, value = self.into(hidden_states).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, hidden))


def _scaling(lengths: tuple[int, ...], rounds: int, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    layer = S4D(S4DConfig(SIZES["hidden_size"], SIZES["state_size"]), generator).to(device)
    attention = Attention(SIZES["hidden_size"], SIZES["heads"]).to(device)
    found: dict[str, Any] = {}
    for length in lengths:
        u = torch.randn(1, length, SIZES["hidden_size"], generator=generator).to(device)
        with torch.no_grad():
            check_agreement(
                {"loop": lambda u=u: layer.recurrence(u[:, :61])[0], "S4D": lambda u=u: layer(u)[:, :61]}  # type: ignore[misc]
            )
        calls: dict[str, Callable[[], Any]] = {"S4D": _without(layer, u), "attention": _without(attention, u)}
        if length <= 2048:  # it is slow enough
            calls["loop"] = _without(layer.recurrence, u)
        found[str(length)] = compare(calls, baseline="S4D", rounds=rounds, threads=1, device=device).to_dict()
        print(
            length, {name: row["seconds"]["median"] for name, row in found[str(length)]["variants"].items()}, flush=True
        )
    medians = {
        name: {
            length: found[str(length)]["variants"][name]["seconds"]["median"]
            for length in lengths
            if name in found[str(length)]["variants"]
        }
        for name in ("S4D", "attention", "loop")
    }
    return {
        "sizes": SIZES,
        "lengths": list(lengths),
        "comparisons": found,
        "exponent": {name: exponent(dict(list(times.items())[-4:])) for name, times in medians.items()},
        "faster_from": crossing(medians["S4D"], medians["attention"]),
    }


def _without(forward: Callable[[Tensor], Any], u: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return forward(u)

    return call


def exponent(times: dict[int, float]) -> float:
    """Slope of a line through the logarithms of time and length."""
    points = [(math.log(length), math.log(time)) for length, time in times.items()]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def crossing(ours: dict[int, float], theirs: dict[int, float]) -> int | None:
    """The shortest length from which on ours takes less time at every length that was measured."""
    faster = [length for length in sorted(ours) if ours[length] < theirs[length]]
    slower = [length for length in ours if ours[length] >= theirs[length]]
    return next((length for length in faster if length > max(slower, default=0)), None)
