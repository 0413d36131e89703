"""Peak memory of a computation: what torch holds at the worst moment, beyond what it held before."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def peak_memory(function: Callable[[], Any], *, device: str = "cpu", warm_up: bool = True) -> int:
    """Peak of the bytes that torch holds while ``function`` runs, over those it held when ``function`` began.

    On a CPU the profiler reports each allocation and release of torch's allocator, and the peak of their
    running sum is exact and the same on every run, whatever the machine does besides. It does not see
    memory that other libraries take for themselves (NumPy arrays, work space inside a matrix library). On
    CUDA it is torch's own ``max_memory_allocated``.

    Args:
        function: called without arguments; what it returns is dropped after the call.
        device: ``"cpu"`` or ``"cuda"``.
        warm_up: call once before measuring, so that what is built only once does not count.

    Returns:
        Bytes.

    Raises:
        ValueError: ``device`` is unknown, or ``"cuda"`` where there is none.
    """
    if device == "cuda":
        return _peak_cuda(function, warm_up)
    if device != "cpu":
        raise ValueError(f"device {device!r} is neither 'cpu' nor 'cuda'")

    from torch.profiler import ProfilerActivity, profile

    if warm_up:
        function()
    gc.collect()
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():
        profiler.start()
    try:
        result = function()
        del result
    finally:
        with _quiet_stderr():
            profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"] for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda change: change["Ev Idx"]):
        if change["Device Type"] == 0:  # the CPU
            held += change["Bytes"]
            peak = max(peak, held)
    return peak


def _peak_cuda(function: Callable[[], Any], warm_up: bool) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no CUDA device; use 'cpu'")
    if warm_up:
        function()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler writes two lines of its own to the process's error stream at each start and stop."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
