"""What the tests of adaptation share: a small network with weights of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Mixer(nn.Module):
    """Bare parameters, as the mixers of the book have them, beside a Linear and parameters that are no matrices."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5)

        self.in_proj = weight(11, 7)
        self.A_log = weight(11, 5)
        self.D = weight(11)
        self.conv1d_weight = weight(11, 3)
        self.idle_proj = weight(5, 7)
        self.out_proj = nn.Linear(11, 7, dtype=dtype)
        with torch.no_grad():
            self.out_proj.weight.copy_(weight(7, 11))
            self.out_proj.bias.copy_(weight(7))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.in_proj)
        return x + self.out_proj(F.silu(inner) * self.D + inner * self.A_log.mean(1) * self.conv1d_weight.mean(1))


class Network(nn.Module):
    def __init__(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7, dtype=dtype)
        self.conv = nn.Conv1d(7, 7, 3, padding=1, dtype=dtype)
        self.layers = nn.ModuleList(Mixer(generator, dtype) for _ in range(2))
        self.norm = nn.LayerNorm(7, dtype=dtype)
        self.experts_proj = nn.Parameter(torch.randn(3, 7, 7, generator=generator, dtype=dtype))
        self.lm_head = nn.Linear(7, 13, bias=False, dtype=dtype)
        self.lm_head.weight = self.embed.weight
        with torch.no_grad():
            for parameter in (self.embed.weight, self.conv.weight, self.conv.bias):
                assert parameter is not None
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))


@pytest.fixture
def fresh() -> Callable[[], Network]:
    """Makes networks of the same weights."""
    return lambda: Network(torch.Generator().manual_seed(3))


@pytest.fixture
def network(fresh: Callable[[], Network]) -> Network:
    return fresh()
