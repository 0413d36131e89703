"""LoRA: low-rank corrections of weight matrices, trained in place of the matrices (Hu et al. 2021, arXiv:2106.09685).

A correction is put on the *weight*, not beside the call of a layer. Whoever reads ``module.weight`` reads the sum of
the frozen matrix and its correction, be it a Linear's own forward, a function that takes the matrix as an argument, or
a fused kernel. So no adapter can be bypassed, and merging changes no number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medarch.adaptation.matrices import Place, choose, few, matrices


@dataclass(frozen=True)
class LoRAConfig:
    """Which matrices get a correction, and of which kind.

    Attributes:
        rank: Width of the bottleneck, r.
        alpha: The correction is scaled by ``alpha / rank`` (section 4.1), so that a change of rank calls for no
            other learning rate.
        targets: Names of matrices. ``"in_proj"`` means all of that name, ``"layers.0.mixer.in_proj"`` one of them.
        dropout: Share of the matrix's inputs that the correction does not see in training. The draw, from torch's
            default generator, is made once for each reading of the weight and is the same for all tokens.

    Raises:
        ValueError: If a value is out of range.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise ValueError(f"targets={self.targets!r} must be a tuple of names: write ({self.targets!r},)")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if not (0 < self.alpha < float("inf")):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha!r}")
        if not self.targets or not all(isinstance(name, str) and name for name in self.targets):
            raise ValueError(f"targets must name at least one matrix, got {self.targets!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self) | {"targets": list(self.targets)}


class LowRank(nn.Module):
    """The correction of one matrix, ``(alpha / rank) B A`` (eq. 3).

    ``A`` begins as Gaussian noise and ``B`` as zero, so that at first nothing changes. The correction is held in
    float32 where the matrix is of half precision, in which the small steps of training would be lost.

    Args:
        weight: The matrix.
        config: Rank and scale.
        generator: Source of randomness for ``A``; torch's default generator where it is absent.
    """

    def __init__(
        self, weight: Float[Tensor, "out in"], config: LoRAConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # Drawn where the generator lives, so that the device does not change what is drawn.
        noise = torch.randn(config.rank, columns, generator=generator, dtype=dtype) / columns**0.5
        self.A: Float[Tensor, "rank in"] = nn.Parameter(noise.to(weight.device))
        self.B: Float[Tensor, "out rank"] = nn.Parameter(torch.zeros(rows, config.rank, dtype=dtype).to(weight.device))
        self.config = config
        self.enabled = True

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.config.alpha / self.config.rank

    def corrected(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The matrix with the whole of its correction."""
        return self._sum(weight, self.A)

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """What is read in place of the matrix: the same, but for dropout in training, and where it is switched off."""
        if not self.enabled:
            return weight
        if self.config.dropout and self.training:
            return self._sum(weight, self.A * F.dropout(torch.ones_like(self.A[:1]), self.config.dropout))
        return self.corrected(weight)

    def _sum(self, weight: Tensor, narrow: Tensor) -> Tensor:
        return weight + (self.scale * (self.B @ narrow)).to(weight.dtype)


def add_lora(model: nn.Module, config: LoRAConfig, generator: torch.Generator | None = None) -> dict[str, LowRank]:
    """Freezes a model and puts a correction on each of the matrices that are named.

    The model computes what it did before, until it is trained. Its own parameters ask for no gradient any more; the
    corrections' do, and an optimiser that takes what asks for a gradient trains them alone.

    Args:
        model: Any module; changed in place.
        config: What to add.
        generator: Source of randomness for the initial ``A``.

    Returns:
        The corrections by the name of their matrix.

    Raises:
        ValueError: If a name matches nothing, or something that cannot take a correction (a convolution, a norm, an
            embedding, a table such as ``A_log``, a stack of experts, a matrix shared by two modules), if the rank
            exceeds a side of the matrix, or the model has corrections already. Nothing is changed then.
    """
    if present := adapters(model):
        raise ValueError(f"the model has LoRA already, on {few(list(present))}: merge it or take it off first")
    chosen = choose(model, config.targets, config.rank)
    added = {}
    model.requires_grad_(False)
    for name, place in chosen.items():
        added[name] = LowRank(place.weight, config, generator)
        _put(place, added[name])
    return added


def adapters(model: nn.Module) -> dict[str, LowRank]:
    """The corrections that a model has, by the name of their matrix; none where there are none."""
    found = {}
    for name, place in matrices(model).items():
        if parametrize.is_parametrized(place.module, place.attribute):
            first = cast(Any, place.module.parametrizations)[place.attribute][0]
            if isinstance(first, LowRank):
                found[name] = first
    return found


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained: ``A`` and ``B`` of each correction, as ``"layers.0.mixer.in_proj.A"``."""
    return {
        f"{name}.{part}": getattr(adapter, part)
        for name, adapter in adapters(model).items()
        for part in ("A", "B")
    }  # fmt: skip


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """Parameters that ask for a gradient, and all parameters; one that is shared counts once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base."""
    before = {adapter: adapter.enabled for adapter in adapters(model).values()}
    for adapter in before:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in before.items():
            adapter.enabled = enabled


@dataclass(frozen=True, eq=False)
class Merged:
    """What ``merge_lora_`` took off a model, and what it takes to undo it; holding it keeps the old matrices in memory.

    Attributes:
        adapters: The corrections by the name of their matrix.
        base: The matrices as they were before.
    """

    adapters: dict[str, LowRank]
    base: dict[str, Tensor]


@torch.no_grad()
def merge_lora_(model: nn.Module) -> Merged:
    """Writes the corrections into the matrices and takes them off, so that the model costs what its base costs.

    The merged matrix is the very tensor that the model has been reading, so the answers are the same to the last bit.

    Args:
        model: A model with corrections; changed in place. Its parameters stay frozen.

    Returns:
        What ``unmerge_lora_`` needs.

    Raises:
        ValueError: If there are no corrections, or a merged matrix would not be finite. Nothing is changed then.
    """
    found = _required(model)
    places = matrices(model)
    sums = {name: adapter.corrected(places[name].weight) for name, adapter in found.items()}
    broken = [name for name, weight in sums.items() if not weight.isfinite().all()]
    if broken:
        raise ValueError(f"the merged weights of {few(broken)} would not be finite: look for NaN among A and B")
    base = take_off_lora_(model).base
    for name, weight in sums.items():
        places[name].weight.set_(cast(Any, weight))
    return Merged(found, base)


@torch.no_grad()
def take_off_lora_(model: nn.Module) -> Merged:
    """Takes the corrections off, which leaves the base.

    Returns:
        The corrections and the matrices.

    Raises:
        ValueError: If there are none.
    """
    found, places = _required(model), matrices(model)
    base = {}
    for name in found:
        module, attribute = places[name]
        _own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        base[name] = getattr(module, attribute).detach()
    return Merged(found, base)


@torch.no_grad()
def unmerge_lora_(model: nn.Module, merged: Merged) -> None:
    """Undoes ``merge_lora_``: the old matrices, to the last bit, and their corrections.

    Raises:
        ValueError: If the model is not the merged one any more. Nothing is changed then.
    """
    if present := adapters(model):
        raise ValueError(f"the model has LoRA on {few(list(present))}: it is not merged")
    places = matrices(model)
    for name, adapter in merged.adapters.items():
        if name not in places or not torch.equal(adapter.corrected(merged.base[name]), places[name].weight):
            raise ValueError(f"{name} is not what merging made of it: it was changed since, or this is another model")
    for name, adapter in merged.adapters.items():
        places[name].weight.set_(cast(Any, merged.base[name]))
        _put(places[name], adapter)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of the base, by the names that ``targets`` go by; corrections are left out."""
    return {name: place.weight.detach() for name, place in matrices(model).items()}


def _put(place: Place, adapter: LowRank) -> None:
    adapter.train(place.module.training)
    _own_class(place.module)
    parametrize.register_parametrization(place.module, place.attribute, adapter)


def _own_class(module: nn.Module) -> None:
    """Gives a parametrised module a class that no other has.

    Torch keeps the attributes in a class made for the module, which a deep copy shares: taking a correction off the
    copy would take the attribute away from the original.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        fields = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, fields)


def _required(model: nn.Module) -> dict[str, LowRank]:
    found = adapters(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA: add it with add_lora, or load it with load_adapters")
    return found
