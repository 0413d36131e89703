"""Times of several variants, taken in turn in one process, as ratios to a baseline.

Variants run round-robin, so that a slow minute of the machine falls on all of them alike, and the ratio to
the baseline is taken within each round. With one thread on a CPU the clock counts the process's own time:
it stays within a few per cent on a machine that others use too, where the wall clock does not.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import comb
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of each variant, one value a round.

    Attributes:
        seconds: variant name to its seconds per call, one entry for each round.
        baseline: the variant that the ratios are taken to.
        threads: CPU threads that torch was given.
        clock: ``"process"`` (the process's CPU time) or ``"wall"``.
        device: ``"cpu"`` or ``"cuda"``.
    """

    seconds: dict[str, list[float]]
    baseline: str
    threads: int
    clock: str
    device: str

    @property
    def rounds(self) -> int:
        return len(self.seconds[self.baseline])

    def quartiles(self, name: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the seconds per call."""
        values = sorted(self.seconds[name])
        return _quantile(values, 0.25), _quantile(values, 0.5), _quantile(values, 0.75)

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Median of the per-round ratios to the baseline with an interval for it: (median, low, high).

        The interval lies between two order statistics and assumes no distribution; it covers the true
        median in ``coverage`` of all repetitions.
        """
        pairs = zip(self.seconds[name], self.seconds[self.baseline], strict=True)
        ratios = sorted(own / base for own, base in pairs)
        depth, _ = _median_interval(self.rounds)
        return _quantile(ratios, 0.5), ratios[depth], ratios[self.rounds - 1 - depth]

    @property
    def coverage(self) -> float:
        """Probability that ``ratio``'s interval covers the median: at least 0.95 from six rounds on."""
        return _median_interval(self.rounds)[1]

    def table(self) -> str:
        """The comparison as aligned plain text: median, quartiles and ratio of each variant."""
        rows = [["variant", "median", "quartiles", f"ratio to {self.baseline}", "interval"]]
        for name in self.seconds:
            low, middle, high = self.quartiles(name)
            ratio, ratio_low, ratio_high = self.ratio(name)
            spread = f"{_duration(low)} to {_duration(high)}"
            interval = "" if name == self.baseline else f"{ratio_low:.3g} to {ratio_high:.3g}"
            rows.append([name, _duration(middle), spread, f"{ratio:.3g}", interval])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        lines.append(
            f"{self.rounds} rounds, {threads}, {self.clock} time on {self.device}; "
            f"interval of the median ratio, coverage {self.coverage:.0%}"
        )
        return "\n".join(line.rstrip() for line in lines)

    __str__ = table

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain values for a record; times in seconds per call."""
        variants = {}
        for name in self.seconds:
            low, middle, high = self.quartiles(name)
            ratio, ratio_low, ratio_high = self.ratio(name)
            variants[name] = {
                "seconds": {"median": middle, "lower_quartile": low, "upper_quartile": high},
                "ratio": {"median": ratio, "low": ratio_low, "high": ratio_high},
            }
        return {
            "baseline": self.baseline,
            "rounds": self.rounds,
            "threads": self.threads,
            "clock": self.clock,
            "device": self.device,
            "coverage": self.coverage,
            "variants": variants,
        }


def compare(
    variants: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    rounds: int = 15,
    threads: int = 1,
    device: str = "cpu",
    block_seconds: float = 0.02,
) -> Comparison:
    """Times variants of the same computation against one another.

    Each variant is called twice to warm up; the second call sets how many calls make one block of about
    ``block_seconds``. Then every round times one block of each variant, starting with another variant each
    time.

    Args:
        variants: name to a function without arguments.
        baseline: name of the variant that the others are compared to.
        rounds: number of rounds, at least 2.
        threads: CPU threads for torch. With one thread on a CPU, process time is measured, else wall time.
        device: ``"cpu"`` or ``"cuda"``; on ``"cuda"`` the clock waits for the device.
        block_seconds: least duration of one timed block, in seconds.

    Raises:
        ValueError: the baseline is not among the variants, or ``rounds`` or ``threads`` is too small.
    """
    if baseline not in variants:
        raise ValueError(f"baseline {baseline!r} is not among the variants {sorted(variants)}")
    if rounds < 2 or threads < 1:
        raise ValueError(f"rounds={rounds} and threads={threads}: at least 2 rounds and 1 thread are needed")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is neither 'cpu' nor 'cuda'")

    import torch
    from torch.utils.benchmark import timer as synchronising_clock

    process = device == "cpu" and threads == 1
    clock = time.process_time if process else synchronising_clock
    # Not torch's Timer: it calls a slow variant twice more before each timed block, and so takes thrice as
    # long.
    timers = {name: timeit.Timer(function, timer=clock) for name, function in variants.items()}
    names = list(variants)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calls = {}
        for name in names:
            timers[name].timeit(1)
            calls[name] = max(1, round(block_seconds / max(timers[name].timeit(1), 1e-9)))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                seconds[name].append(timers[name].timeit(calls[name]) / calls[name])
    finally:
        torch.set_num_threads(threads_before)
    return Comparison(seconds, baseline, threads, "process" if process else "wall", device)


def _quantile(ordered: list[float], fraction: float) -> float:
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _median_interval(count: int) -> tuple[int, float]:
    """How many values to leave out at each end so that the rest covers the median in 95 %, and the coverage.

    Each value lies below the median with probability one half, so the count of those below is binomial.
    """
    depth, outside = 0, 2 * 0.5**count
    while depth + 1 < count / 2:
        wider = outside + 2 * comb(count, depth + 1) * 0.5**count
        if wider > 0.05:
            break
        depth, outside = depth + 1, wider
    return depth, 1 - outside


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
