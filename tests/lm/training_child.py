"""A small run in a process of its own, for tests that kill it or start two: ``FOLDER STEPS [CHECKPOINT_EVERY]``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.distributed import workers
from medarch.lm.training import TrainingConfig, train
from medarch.moe.config import MoEConfig


def main(folder: Path, steps: int, checkpoint_every: int, pause: float) -> None:
    torch.set_num_threads(1)
    config = DecoderConfig(23, 12, 14, 2, 2, feed_forwards=("dense", "moe"), moe=MoEConfig(12, 7, 3, 2))
    tokens = torch.randint(23, (211,), generator=torch.Generator().manual_seed(3)).cumsum(0) % 23
    model = Decoder(config, torch.Generator().manual_seed(5))
    training = TrainingConfig(
        steps=steps, batch_size=6, length=11, learning_rate=0.01, warmup_steps=2, checkpoint_every=checkpoint_every
    )
    with workers() as group:
        log = train(
            model,
            tokens,
            training,
            folder,
            evaluate=lambda given: {"sum": float(sum(parameter.sum() for parameter in given.parameters()))},
            report=lambda line: (print(line, flush=True), time.sleep(pause)),  # type: ignore[arg-type, return-value]
            workers=group,
        )
        if group.first:
            (folder / "result.json").write_text(json.dumps([log.steps, log.evaluations]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
