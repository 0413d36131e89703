"""Which of a model's parameters are matrices that it multiplies by, whether or not a Linear holds them."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

MULTIPLIED = ("proj", "head", "router")
"""How the name of a parameter ends that a model multiplies by. Shape cannot tell: a table of decay rates, such as
Mamba's ``A_log``, and a convolution's kernel have two dimensions as well."""


class Place(NamedTuple):
    """Where a matrix lies: the module that holds it and its attribute there."""

    module: nn.Module
    attribute: str

    @property
    def weight(self) -> Tensor:
        """The parameter itself; where it has a correction, the frozen matrix without it."""
        if parametrize.is_parametrized(self.module, self.attribute):
            parts = cast(Any, self.module.parametrizations)[self.attribute]
            if hasattr(parts, "original"):  # a parametrisation of another kind may keep several tensors
                return parts.original
        return getattr(self.module, self.attribute)


def matrices(model: nn.Module) -> dict[str, Place]:
    """Every parameter by a name that does not depend on what holds it.

    The weight of a Linear and a bare parameter are both called ``"layers.0.mixer.in_proj"``, and a parameter keeps
    its name when it gets a correction. Biases and norms are among them.
    """
    found = {}
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        own = [name for name, parameter in module.named_parameters(recurse=False) if parameter is not None]
        held = list(module.parametrizations) if parametrize.is_parametrized(module) else []
        for attribute in [*own, *held]:
            parts = [part for part in (path, "" if attribute == "weight" else attribute) if part]
            found[".".join(parts).removesuffix("_weight") or attribute] = Place(module, attribute)
    return found


def _obstacle(name: str, place: Place) -> str | None:
    """Why a parameter cannot take a correction of any rank; None if it can."""
    module, weight = place.module, place.weight
    if parametrize.is_parametrized(module, place.attribute):
        return "is parametrised already"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "is an embedding, whose rows are looked up and not multiplied"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "is a convolution's kernel"
    if weight.dim() != 2:
        return f"has shape {tuple(weight.shape)}, which is not that of one matrix"
    if not weight.is_floating_point():
        return f"holds {weight.dtype}, which has no gradient"
    if not isinstance(module, nn.Linear) and not name.endswith(MULTIPLIED):
        return f"is not known to be a matrix that is multiplied by (its name ends in none of {MULTIPLIED})"
    return None


def choose(model: nn.Module, targets: tuple[str, ...], rank: int) -> dict[str, Place]:
    """The matrices of these names, in the order of the model.

    Args:
        model: Any module.
        targets: ``"in_proj"`` for all of that name, ``"layers.0.mixer.in_proj"`` for one of them.
        rank: Which the smaller side of each has to reach.

    Raises:
        ValueError: If a name matches nothing, or something that cannot take a correction of this rank; the message
            says which, why, and what can.
    """
    places = matrices(model)
    able = [name for name, place in places.items() if _obstacle(name, place) is None]
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in able)) or "none"
    chosen = {}
    for target in targets:
        wanted = "." + target.removesuffix(".weight").removesuffix("_weight")
        matches = {name: place for name, place in places.items() if f".{name}".endswith(wanted)}
        if not matches:
            raise ValueError(f"targets name {target!r}, which the model does not have; it can take LoRA on: {kinds}")
        for name, place in matches.items():
            obstacle = _obstacle(name, place)
            if obstacle is None and rank > min(place.weight.shape):
                obstacle = f"has shape {tuple(place.weight.shape)}, so a correction cannot have rank {rank}"
            if obstacle is None and (twin := _twin(model, place)):
                obstacle = f"is tied to {twin}, which would keep the old matrix"
            if obstacle is not None:
                raise ValueError(f"{name} cannot take LoRA: it {obstacle}; the model can take it on: {kinds}")
            chosen[name] = place
    return {name: place for name, place in places.items() if name in chosen}


def _twin(model: nn.Module, place: Place) -> str | None:
    """Another place of the same parameter."""
    own = place.weight
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter is own and (module, attribute) != place:
                return f"{path}.{attribute}".removeprefix(".")
    return None


def few(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
