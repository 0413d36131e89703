"""Training on recall tasks: every batch fresh, until the task is solved or the steps are used up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medarch.lm.recall_models import ModelSpec
from medarch.lm.recall_tasks import Task, accuracy, recall_loss
from medarch.lm.training import TrainingConfig, learning_rate, parameter_groups, step_seed

SOLVED = 0.99
"""Share of right answers from which a task counts as solved."""
STRETCH = 50
"""Updates that one point of a learning curve is the mean of."""
TESTED = 512
"""Sequences that a trained model is tested on, the same for every model."""


@dataclass(frozen=True)
class Trial:
    """One model trained once.

    Attributes:
        model: What is trained.
        tasks: What it is trained on; each batch is drawn from one of them, in turns of random order.
        learning_rate: Its greatest value.
        steps: Updates at most.
        batch_size: Sequences in an update.
        seed: Of the weights and of the data.

    Raises:
        ValueError: If there is no task.
    """

    model: ModelSpec
    tasks: tuple[Task, ...]
    learning_rate: float
    steps: int
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty: there is nothing to train on")

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has to know for all of its tasks."""
        return max(task.vocab_size for task in self.tasks)


def train_on_tasks(trial: Trial) -> tuple[nn.Module, dict[str, Any]]:
    """Trains a model from its seed; AdamW without weight decay, warm-up and cosine, clipped gradients.

    Since no batch comes twice, the accuracy on a batch before its update is an honest estimate. Training ends early
    where each of the last ``STRETCH`` batches had at least ``SOLVED`` of its answers right.

    Returns:
        The model in evaluation mode, and what was measured: ``curve`` (mean accuracy of each ``STRETCH`` updates),
        ``steps`` taken, ``solved`` (whether it ended early) and ``seconds`` of processor time.
    """
    model: Any = trial.model.build(trial.vocab_size, trial.seed)
    warmup = min(STRETCH, trial.steps)
    config = TrainingConfig(
        trial.steps, trial.batch_size, learning_rate=trial.learning_rate, warmup_steps=warmup, min_lr_ratio=0.05
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=trial.learning_rate, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(step_seed(trial.seed, 0))
    right: list[float] = []
    solved, begun = False, time.process_time()
    while len(right) < trial.steps and not solved:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, len(right))
        task = trial.tasks[int(torch.randint(len(trial.tasks), (), generator=generator))]
        batch = task.sample(trial.batch_size, generator)
        logits = model(batch.input_ids).logits
        optimizer.zero_grad(set_to_none=True)
        recall_loss(logits, batch.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        right.append(accuracy(logits.detach(), batch.targets))
        solved = len(right) >= STRETCH and min(right[-STRETCH:]) >= SOLVED
    parts = [right[start : start + STRETCH] for start in range(0, len(right), STRETCH)]
    return model.eval(), {
        "curve": [sum(part) / len(part) for part in parts],
        "steps": len(right),
        "solved": solved,
        "seconds": time.process_time() - begun,
    }


@torch.no_grad()
def score_on_tasks(model: Any, tasks: Sequence[Task], sequences: int = TESTED, tokens: int = 1 << 15) -> list[float]:
    """Accuracy on each task, on sequences that depend on the task alone.

    Args:
        model: Trained on tasks with the same tokens.
        tasks: What to test on.
        sequences: How many of each.
        tokens: Tokens that are read at once, at most, unless one sequence is longer.
    """
    found = []
    for task in tasks:
        batch = task.sample(sequences, torch.Generator().manual_seed(2**31 - 1))
        size = max(1, tokens // task.length)
        parts = zip(batch.input_ids.split(size), batch.targets.split(size), strict=True)
        # Every sequence of a task has the same number of answers, so that parts are weighed by their sequences.
        right = sum(accuracy(model(inputs).logits, targets) * len(inputs) for inputs, targets in parts)
        found.append(right / sequences)
    return found
