"""Where a model keeps its routers, whichever family it belongs to.

Every library and every version calls the layer, the router and its matrix by other names. What they share is a
shape: somewhere a module holds a router beside its experts. It is this that is looked for, so that a model of a
family that came out yesterday is understood, or refused by name, but never silently passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

ROUTER_NAMES = ("router", "gate")
"""What the router is called inside a mixture-of-experts block."""

_PER_TOKEN = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
)
_HOW_MANY = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Where the number of experts a token is a property of the router's kind, which no attribute repeats.
_BY_KIND = {"SwitchTransformersTop1Router": 1, "NllbMoeTop2Router": 2}


@dataclass(frozen=True, eq=False)
class MoEBlock:
    """One mixture-of-experts layer inside a model.

    Attributes:
        name: Path of the module that holds router and experts, such as ``model.layers.3.mlp``.
        num_experts: Experts that the router chooses from; shared experts, which it does not choose, not counted.
        num_experts_per_tok: Experts that one token is sent to, k.
        router: The router.
        experts: The experts, or None where the block keeps their weights itself, as JetMoE does.
    """

    name: str
    num_experts: int
    num_experts_per_tok: int
    router: nn.Module = field(repr=False)
    experts: nn.Module | None = field(repr=False)


@dataclass(frozen=True, eq=False)
class RouterWeights:
    """A copy of one router's matrix, free of the model and of any gradient.

    Attributes:
        weight: One row an expert.
        bias: What is added to the logits, where the router has such a bias.
        num_experts: Rows of the matrix that stand for experts the router chooses from.
        num_experts_per_tok: Experts that one token is sent to, k.
    """

    weight: Float[Tensor, "experts hidden"]
    bias: Float[Tensor, "experts"] | None
    num_experts: int
    num_experts_per_tok: int


def find_moe_blocks(model: nn.Module) -> dict[str, MoEBlock]:
    """The mixture-of-experts layers of a model in their order, dense layers left out.

    Known to work for ``medarch.lm.Decoder`` and for the families that the record ``lm/router-access`` lists.

    Args:
        model: Any model.

    Returns:
        The blocks by name.

    Raises:
        ValueError: If the model has no router, or one whose sizes cannot be read; the model's class is named.
    """
    found = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        router = next((children[each] for each in ROUTER_NAMES if each in children), None)
        experts = children.get("experts")
        # JetMoE has no module of experts: the router sits between two stacks of matrices.
        if router is None or (experts is None and type(router).__name__ != "JetMoeTopKGating"):
            continue
        found[name] = MoEBlock(
            name=name,
            num_experts=_num_experts(model, name, router, experts),
            num_experts_per_tok=_per_token(model, name, router, module),
            router=router,
            experts=experts,
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no router that this book knows how to find: no module of it holds experts "
            f"beside a child named {' or '.join(ROUTER_NAMES)}. Is it a dense model? print(model) shows its modules"
        )
    return found


def router_weights(model: nn.Module) -> dict[str, RouterWeights]:
    """Copies of all the routers' matrices, by the name of their layer.

    Args:
        model: Any model with routers; see ``find_moe_blocks``.

    Returns:
        Weights in the model's own number format, on the CPU. Changing them does not change the model.

    Raises:
        ValueError: If the model has no router, or a router is no single matrix.
    """
    return {name: _weights(model, block) for name, block in find_moe_blocks(model).items()}


def find_router_logits(model: nn.Module, router: nn.Module, output: Any, num_experts: int) -> Tensor | None:
    """The router's scores within what its forward returned, or None where it returns none.

    The models of transformers declare which of a router's outputs are its logits, and that declaration is
    followed; where there is none, the first floating tensor with one column an expert is taken.

    Args:
        model: The model that the router is part of.
        router: The router.
        output: What it returned.
        num_experts: How many columns to expect.
    """
    if not isinstance(output, tuple):
        return output if torch.is_tensor(output) and output.is_floating_point() else None
    if hasattr(output, "logits"):  # ours, which is named
        return output.logits
    declared = _declared_index(model, router)
    if declared is not None:
        return output[declared]
    return next(
        (t for t in output if torch.is_tensor(t) and t.is_floating_point() and t.shape[-1] == num_experts), None
    )


def _declared_index(model: nn.Module, router: nn.Module) -> int | None:
    for module in model.modules():
        declared: Mapping[str, Any] = getattr(module, "_can_record_outputs", None) or {}
        recorders = declared.get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            target = getattr(recorder, "target_class", None)
            if isinstance(target, type) and isinstance(router, target):
                return int(recorder.index)
    return None


def _num_experts(model: nn.Module, name: str, router: nn.Module, experts: nn.Module | None) -> int:
    # Some routers choose from more than the experts that compute: LongCat's zero experts return the token as it is.
    for holder, attribute in (
        (experts, "total_experts"),
        *((each, how) for each in (router, experts) for how in _HOW_MANY),
    ):
        value = getattr(holder, attribute, None)
        if isinstance(value, int):
            return value
    config = getattr(experts, "config", None) or getattr(router, "config", None)
    value = _first(config, _HOW_MANY)
    if value is None:
        stacked = {p.shape[0] for p in experts.parameters() if p.dim() == 3} if experts is not None else set()
        stacked |= {m.weight.shape[0] for m in router.modules() if isinstance(m, nn.Linear)}
        value = stacked.pop() if len(stacked) == 1 else None
    if value is None:
        raise ValueError(
            f"{type(model).__name__}: the number of experts of {name} ({type(router).__name__}) is not to be found"
        )
    return value


def _per_token(model: nn.Module, name: str, router: nn.Module, block: nn.Module) -> int:
    if type(router).__name__ in _BY_KIND:
        return _BY_KIND[type(router).__name__]
    for holder in (router, block, *(getattr(each, "config", None) for each in (router, block, model))):
        value = _first(holder, _PER_TOKEN)
        if value is not None:
            return value
    raise ValueError(
        f"{type(model).__name__}: how many experts a token is sent to is written neither in {name} "
        f"({type(router).__name__}) nor in the model's config"
    )


def _first(holder: object, names: Iterable[str]) -> int | None:
    values = (getattr(holder, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _weights(model: nn.Module, block: MoEBlock) -> RouterWeights:
    matrices = {name: p for name, p in block.router.named_parameters() if p.dim() == 2}
    # A router may hold further matrices, as a noisy one does; the one that is called weight makes the logits.
    chosen = matrices if len(matrices) == 1 else {name: p for name, p in matrices.items() if name == "weight"}
    if len(chosen) != 1 or next(iter(chosen.values())).shape[0] < block.num_experts:
        shapes = {name: tuple(p.shape) for name, p in matrices.items()}
        raise ValueError(
            f"{type(model).__name__}: the router of {block.name} ({type(block.router).__name__}) is no single matrix "
            f"of {block.num_experts} rows but {shapes}, so it has no weights to compare row by row; "
            "its decisions can still be recorded"
        )
    name, weight = next(iter(chosen.items()))
    bias = dict(block.router.named_parameters()).get(name.removesuffix("weight") + "bias")
    return RouterWeights(
        weight=weight.detach().to("cpu", copy=True),
        bias=None if bias is None else bias.detach().to("cpu", copy=True),
        num_experts=block.num_experts,
        num_experts_per_tok=block.num_experts_per_tok,
    )
