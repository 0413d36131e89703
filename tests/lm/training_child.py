"""A small run in a process of its own, for tests that kill it or start two of it.

``FOLDER`` trains once. ``FOLDER kill 5 12 19`` trains in forks of this process, which has its imports behind it:
each is killed when it reports the given step, the last one is left alone. On the output then stands, for each fork,
the step that it began with, the one that it was killed at, and the one that was kept.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from medarch.lm.checkpoint import load_state
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.distributed import workers
from medarch.lm.training import TrainingConfig, train
from medarch.moe.config import MoEConfig

STEPS = 26


def run(folder: Path, steps: int = STEPS, pause: float = 0.0) -> None:
    """Trains, reports on the output, and leaves the losses in ``result.json``."""
    config = DecoderConfig(23, 12, 14, 2, 2, feed_forwards=("dense", "moe"), moe=MoEConfig(12, 7, 3, 2))
    tokens = torch.randint(23, (211,), generator=torch.Generator().manual_seed(3)).cumsum(0) % 23
    model = Decoder(config, torch.Generator().manual_seed(5))
    training = TrainingConfig(
        steps=steps, batch_size=6, length=11, learning_rate=0.01, warmup_steps=2, checkpoint_every=2
    )

    def report(line: str) -> None:
        print(line, flush=True)
        time.sleep(pause)

    with workers() as group:
        log = train(
            model,
            tokens,
            training,
            folder,
            evaluate=lambda given: {"sum": float(sum(parameter.sum() for parameter in given.parameters()))},
            report=report,
            workers=group,
        )
        if group.first:
            (folder / "result.json").write_text(json.dumps([log.steps, log.evaluations]))


def fork(folder: Path, pause: float) -> tuple[int, int]:
    """Starts ``run`` in a fork; its process and the end of the pipe that its output comes out of."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(write, 1)
        status = 1
        try:
            run(folder, pause=pause)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    return process, read


def ordeal(folder: Path, kills: list[int]) -> list[list[int]]:
    """Kills one run again and again, then lets it end."""
    history = []
    for kill in [*kills, STEPS + 1]:
        process, read = fork(folder, 0.02 if kill <= STEPS else 0.0)
        begun = reached = 0
        with os.fdopen(read) as output:
            for line in output:
                reached = int(line.split()[1].split("/")[0])
                begun = begun or reached
                if reached >= kill:
                    os.kill(process, signal.SIGKILL)
                    break
        _, status = os.waitpid(process, 0)
        expected = signal.SIGKILL if kill <= STEPS else 0
        assert (os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)) == expected
        state = load_state(folder)
        assert state is not None
        history.append([begun, reached, state.step])
    return history


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, *rest = sys.argv[1:]
    if rest[:1] == ["kill"]:
        run(Path(where).with_name("whole"))  # first, since the forks then have what torch imports late
        print(json.dumps(ordeal(Path(where), [int(step) for step in rest[1:]])))
    else:
        run(Path(where), steps=5)
