"""The parts of a long study, in this process or in several at once, each kept as soon as it is finished."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from medarch.bench.partial import Partials

VARIABLE = "MEDARCH_WORKERS"


def workers(value: int | None = None) -> int:
    """How many processes to use: the argument, or the environment's ``MEDARCH_WORKERS``, or one.

    Raises:
        ValueError: If it is not a whole number of at least 1.
    """
    given = os.environ.get(VARIABLE, "1") if value is None else value
    try:
        count = int(given)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"{VARIABLE}={given!r} must be a whole number of at least 1")
    return count


def compute_parts(
    parts: Partials,
    jobs: Mapping[str, Callable[[], Any]],
    report: Callable[[str, Any], None] | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Every part by its name; those that an earlier run finished are read.

    Each process computes with one thread, as a single process does here, so the results do not depend on how many
    there are.

    Args:
        parts: Where finished parts are kept.
        jobs: What makes each part. With several processes it must be picklable: a function of a module, with its
            arguments bound by ``functools.partial``.
        report: Called with name and value of each part as it is finished.
        processes: See ``workers``.

    Raises:
        ValueError: As ``workers``.
    """
    count = min(workers(processes), max(1, len(jobs)))
    found: dict[str, Any] = {}

    def finished(name: str, value: Any) -> None:
        found[name] = value
        if report is not None:
            report(name, value)

    if count == 1:
        with _one_thread():
            for name, job in jobs.items():
                finished(name, parts.get(name, job))
    else:
        # Fresh processes: forked ones would inherit the threads that torch may have started.
        with ProcessPoolExecutor(
            count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            running = {pool.submit(parts.get, name, job): name for name, job in jobs.items()}
            try:
                for future in as_completed(running):
                    finished(running[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return {name: found[name] for name in jobs}


class _one_thread:  # noqa: N801  # reads as what it does
    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
