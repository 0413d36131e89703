"""How long a language model takes to begin its answer, and how long to go on with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from medarch.lm.cached_reading import CachedReader


class Spread(NamedTuple):
    """Median and quartiles over the runs."""

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class GenerationTimes:
    """Wall-clock seconds of several runs of the same generation.

    Attributes:
        device: Where the model ran.
        batch_size: Texts that were continued side by side.
        prompt_tokens: Length of each prompt.
        new_tokens: Tokens that each text was continued by, in every run the same.
        first_token: Of each run, seconds from the prompt to the first new token: the prompt is read here.
        per_token: Of each run, seconds for each token after the first, averaged over the run.
    """

    device: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    first_token: tuple[float, ...]
    per_token: tuple[float, ...]

    @property
    def time_to_first_token(self) -> Spread:
        """Seconds until the answer begins."""
        return _spread(self.first_token)

    @property
    def time_per_token(self) -> Spread:
        """Seconds for each token after the first."""
        return _spread(self.per_token)

    @property
    def tokens_per_second(self) -> Spread:
        """Tokens a second after the first, of all texts together."""
        slow, middle, fast = self.time_per_token
        return Spread(self.batch_size / fast, self.batch_size / middle, self.batch_size / slow)


@torch.no_grad()
def benchmark_generation(
    model: nn.Module, input_ids: Int[Tensor, "batch time"], *, new_tokens: int = 32, runs: int = 7
) -> GenerationTimes:
    """Times the greedy continuation of prompts by a fixed number of tokens.

    An end of text stops nothing, so that every run does the same work. One run of the same lengths goes ahead
    unmeasured, because the first call of each shape also pays for what is set up once. The clock is read after the
    device has finished; on a device that works asynchronously it would otherwise measure how fast work is handed over.

    Args:
        model: ``medarch.lm.Decoder``, or any causal language model of transformers, on any device.
        input_ids: Prompts of equal length; they are moved to the model's device.
        new_tokens: Tokens to generate for each prompt, at least 2.
        runs: Measured runs, at least 3.

    Returns:
        The times of each run.

    Raises:
        ValueError: If a number is too small, or the model keeps no cache.
    """
    if new_tokens < 2 or runs < 3:
        raise ValueError(
            f"new_tokens={new_tokens} and runs={runs}: there must be a token after the first, and quartiles need at "
            "least 3 runs"
        )
    device = next(model.parameters()).device
    input_ids = input_ids.to(device)
    batch_size, prompt_tokens = input_ids.shape
    was_training = model.training
    model.eval()
    first_token, per_token = [], []
    try:
        for run in range(runs + 1):
            reader = CachedReader(model, batch_size, prompt_tokens + new_tokens)
            _finish(device)
            start = time.perf_counter()
            token = reader.read(input_ids).argmax(-1, keepdim=True)
            _finish(device)
            begun = time.perf_counter()
            for _ in range(new_tokens - 1):
                token = reader.read(token).argmax(-1, keepdim=True)
            _finish(device)
            end = time.perf_counter()
            if run:  # the first warms up
                first_token.append(begun - start)
                per_token.append((end - begun) / (new_tokens - 1))
    finally:
        model.train(was_training)
    return GenerationTimes(str(device), batch_size, prompt_tokens, new_tokens, tuple(first_token), tuple(per_token))


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _spread(seconds: tuple[float, ...]) -> Spread:
    quartiles = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return Spread(*quartiles.tolist())
