"""Ways through the training of a mixture: growing it from a dense layer, closing its gate, freezing its experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medarch.moe.config import MoEConfig
from medarch.moe.dense import DenseMLP
from medarch.moe.layer import MoELayer


def upcycle(dense: DenseMLP, config: MoEConfig, generator: torch.Generator | None = None) -> MoELayer:
    """A mixture whose experts all begin as copies of one trained dense layer.

    Since the k weights of a token sum to 1 and all experts answer alike, the mixture's output is the dense
    layer's, whatever the router says; it is new and random. Training then makes the experts different
    (Komatsuzaki et al. 2023, arXiv:2212.05055, section 3).

    Args:
        dense: The trained layer, which is not changed.
        config: The mixture. Its experts are as wide as the dense layer, so that one token costs k times as
            much as before.
        generator: Source of randomness for the router.

    Returns:
        The mixture, in the dense layer's type and on its device.

    Raises:
        ValueError: If a size or the activation differs, or the weights of a token need not sum to 1.
    """
    for name in ("hidden_size", "intermediate_size", "hidden_act"):
        ours, theirs = getattr(config, name), getattr(dense.config, name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours!r} in the mixture but {theirs!r} in the dense layer, which experts copy")
    if config.router_order == "softmax-then-topk" and not config.norm_topk_prob:
        raise ValueError(
            "norm_topk_prob=False: the weights of a token sum to less than 1, and the mixture would begin by "
            "shrinking what the dense layer says; set norm_topk_prob=True"
        )
    layer = MoELayer(config, generator).to(dense.down_proj)
    stacked = layer.experts.gate_up_proj if config.gated else layer.experts.up_proj
    with torch.no_grad():
        stacked.copy_(dense.up_proj.expand_as(stacked))
        layer.experts.down_proj.copy_(dense.down_proj.expand_as(layer.experts.down_proj))
    return layer


def expert_similarity(layer: MoELayer) -> float:
    """Mean cosine between the weights of two experts: 1 where all are copies, about 0 where none knows another."""
    weights = torch.cat([torch.stack(each).flatten(1) for each in zip(*layer.experts.weights(), strict=True)], dim=1)
    directions = nn.functional.normalize(weights.detach().double(), dim=1)
    cosines = directions @ directions.T
    count = len(cosines)
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def active_experts(step: int, steps: int, schedule: Sequence[int], share: float = 0.5) -> int:
    """How many experts serve a token at some step of a curriculum.

    The numbers of the schedule share the first part of the training evenly; the last one holds from then on.
    With ``(8, 4, 2)`` a gate of eight experts begins dense and ends sparse, a stepwise relative of the
    dense-to-sparse gate of Nie et al. 2021 (arXiv:2112.14397, section 3), which closes itself by a falling
    temperature and a threshold.

    Args:
        step: Number of the update, from 0.
        steps: Updates in all.
        schedule: Active experts, in order.
        share: Part of the training that is over when the last number begins, from 0 to 1.

    Raises:
        ValueError: If the schedule is empty, the step lies outside the training, or the share is out of range.
    """
    if not schedule or not 0 <= step < steps or not 0 <= share <= 1:
        raise ValueError(f"step={step} of {steps}, schedule={tuple(schedule)}, share={share} make no curriculum")
    changing = share * steps
    stage = len(schedule) - 1 if step >= changing else int(step / changing * (len(schedule) - 1))
    return schedule[stage]


def set_active_experts(layer: MoELayer, count: int) -> None:
    """Sends each token to ``count`` experts from now on.

    A single expert keeps its undivided probability as its weight, since divided by itself it would give the
    router nothing to learn from; several have weights that sum to 1.

    Raises:
        ValueError: If there are not that many experts.
    """
    several = count > 1
    config = dataclasses.replace(
        layer.config, num_experts_per_tok=count, norm_topk_prob=several, router_order="softmax-then-topk"
    )
    layer.config = layer.router.config = config


def freeze_experts(layer: MoELayer, experts: Iterable[int] | None = None) -> None:
    """Stops training from changing experts.

    All of them are frozen by ``requires_grad``. The weights of the experts lie stacked in one parameter, though,
    and a parameter is frozen as a whole or not at all. Zeroing the gradient of some rows would not do: AdamW
    would still pull them towards zero, and its memory of earlier gradients would move them on. So the frozen rows
    are kept in a copy that is put in their place whenever the weights are read.

    Args:
        layer: The mixture; before its weights are saved, unfreeze it.
        experts: Numbers of the experts; all of them where it is absent.

    Raises:
        ValueError: If an expert does not exist, or some are frozen already.
    """
    if parametrize.is_parametrized(layer.experts):
        raise ValueError("some experts are frozen already: call unfreeze_experts first")
    if experts is None:
        layer.experts.requires_grad_(False)
        return
    chosen = sorted(set(experts))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < layer.config.num_experts:
        raise ValueError(f"experts {chosen} are not all among the {layer.config.num_experts}, numbered from 0")
    for name, weight in list(layer.experts.named_parameters()):
        frozen = torch.zeros(len(weight), 1, 1, dtype=torch.bool, device=weight.device)
        frozen[chosen] = True
        parametrize.register_parametrization(layer.experts, name, _Kept(frozen, weight))


def unfreeze_experts(layer: MoELayer) -> None:
    """Lets training change all experts again, from the weights that they have now."""
    if parametrize.is_parametrized(layer.experts):
        for name in list(layer.experts.parametrizations):  # type: ignore[arg-type]  # a ModuleDict
            parametrize.remove_parametrizations(layer.experts, name)
    layer.experts.requires_grad_(True)


class _Kept(nn.Module):
    """Rows of a stack that stay as they were."""

    frozen: Tensor
    kept: Tensor

    def __init__(self, frozen: Bool[Tensor, "experts 1 1"], weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", frozen)
        self.register_buffer("kept", weight.detach().clone())

    def forward(self, weight: Float[Tensor, "experts rows columns"]) -> Float[Tensor, "experts rows columns"]:
        return torch.where(self.frozen, self.kept, weight)


def train_only(model: nn.Module, part: str) -> int:
    """Lets training change one part of a model that contains mixtures.

    Args:
        model: Any module; every ``MoELayer`` in it counts.
        part: ``"all"``, ``"experts"``, ``"all but experts"`` or ``"routers"``.

    Returns:
        How many weights are left to train.

    Raises:
        ValueError: If the part is unknown or the model has no mixture.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    if part not in PARTS or not layers:
        raise ValueError(f"part {part!r} of a model with {len(layers)} mixtures: the parts are {', '.join(PARTS)}")
    whole = part in ("all", "all but experts")
    for parameter in model.parameters():
        parameter.requires_grad_(whole)
    for layer in layers:
        layer.experts.requires_grad_(part in ("all", "experts"))
        layer.router.requires_grad_(part != "experts")
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


PARTS = ("all", "experts", "all but experts", "routers")


def scale_learning_rate(module: nn.Module, name: str, factor: float) -> None:
    """Makes one parameter learn at ``factor`` times the learning rate, under Adam and its relatives.

    Adam divides a gradient by its own size, so that scaling the loss or the gradient changes nothing. The
    parameter is therefore stored divided by ``factor`` and multiplied on reading: a step of the usual length
    in the stored number is a step of ``factor`` times that length in the weight. Weight decay, a share of the
    weight, is as strong as it was.

    Args:
        module: Owner of the parameter, such as a router.
        name: Such as ``"weight"``.
        factor: Greater than 0.

    Raises:
        ValueError: If the factor is not positive.
    """
    if not factor > 0:
        raise ValueError(f"factor={factor} must be positive; to freeze a parameter, use requires_grad_(False)")
    parametrize.register_parametrization(module, name, _Scaled(factor))


class _Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, stored: Tensor) -> Tensor:
        return self.factor * stored

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.factor
