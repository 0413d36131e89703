"""Several processes that train one model, each on its share of every batch, started by ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Workers:
    """This process among those that train together.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are; 1 without ``torchrun``.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that evaluates, reports and writes."""
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """Where this process computes: the processor, or the GPU of its local rank."""
        if torch.device(kind).type != "cuda":
            return torch.device(kind)
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is, or in ``DistributedDataParallel``, which averages the gradients of all processes."""
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def gather_later(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Within it, gradients accumulate here and are averaged over the processes only with the last micro-batch."""
        if last or not isinstance(model, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes; all of them have to call this."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
            values /= self.size
        return values


@contextmanager
def workers(device: torch.device | str = "cpu") -> Iterator[Workers]:
    """Joins the group that ``torchrun`` describes in the environment, and leaves it at the end.

    Args:
        device: Where the model lies; GPUs talk through NCCL, processors through gloo.

    Yields:
        This process; one of one where ``torchrun`` has not started it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Workers()
        return
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend)
    try:
        yield Workers(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
