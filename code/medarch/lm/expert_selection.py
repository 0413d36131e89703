"""Which experts a model really used: recorded at the experts' door while the model runs.

A router's logits are not its decision. DeepSeek-V3 adds a bias to its scores and discards whole groups of experts
before it chooses; Switch drops tokens for which an expert has no room; a layer may route by a table and not by
scores at all. So nothing is derived here from logits: what is recorded is the list of experts that the block hands
to its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medarch.lm.router_access import MoEBlock, find_moe_blocks, find_router_logits
from medarch.moe.router import NO_EXPERT

_BATCH_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids")


class Decision(NamedTuple):
    """What one layer did with the tokens of one call of the model.

    Attributes:
        indices: The experts of each token, in no particular order; ``NO_EXPERT`` where a slot went to none, as
            for a token that an expert had no room for.
        logits: The router's scores, where it has any.
    """

    indices: Int[Tensor, "tokens k"]
    logits: Float[Tensor, "tokens experts"] | None


class SelectionRecorder:
    """What the routers of a model decided while ``record_selections`` was open.

    Attributes:
        blocks: The model's mixture-of-experts layers by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks: dict[str, MoEBlock] = find_moe_blocks(model)
        self._model = model
        self._calls: dict[str, list[Decision]] = {name: [] for name in self.blocks}
        self._logits: dict[str, Tensor | None] = {}
        self._batch_size: int | None = None

    @property
    def called(self) -> dict[str, MoEBlock]:
        """The layers that have decided something; one may rest, as those for images do where there is text alone."""
        return {name: block for name, block in self.blocks.items() if self._calls[name]}

    def clear(self) -> None:
        """Forgets what has been recorded, so that another batch can follow."""
        for calls in self._calls.values():
            calls.clear()
        self._batch_size = None

    def indices(self, layer: str) -> Int[Tensor, "batch time k"]:
        """The experts of each token in one layer, later calls (as in generation) after earlier ones.

        Args:
            layer: A name among ``blocks``.

        Raises:
            ValueError: If the layer is unknown or was not called.
        """
        return self._joined(layer, [call.indices for call in self._recorded(layer)])

    def logits(self, layer: str) -> Float[Tensor, "batch time experts"]:
        """The router's scores for each token in one layer.

        Raises:
            ValueError: If the layer is unknown, was not called, or has a router without scores.
        """
        parts = [call.logits for call in self._recorded(layer)]
        if any(part is None for part in parts):
            raise ValueError(f"the router of {layer} ({type(self.blocks[layer].router).__name__}) gives no logits")
        return self._joined(layer, [part for part in parts if part is not None])

    def counts(
        self, mask: Bool[Tensor, "batch time"] | None = None, *, within: str = ""
    ) -> dict[str, Int[Tensor, "batch experts"]]:
        """How many slots of each text went to each expert, for each layer apart.

        Layers are never added up: expert 3 of one layer and expert 3 of another have only their number in common.

        Args:
            mask: True for a token that counts. Leave out padding, and also the token that begins every text,
                which is the same for all. Without it every token counts.
            within: Only layers whose name begins so, such as ``"encoder."``, whose tokens are not the decoder's.

        Raises:
            ValueError: If the mask is not that of the tokens, or no layer has decided anything.
        """
        chosen = [name for name in self.called if name.startswith(within)]
        if not chosen:
            raise ValueError(
                f"no layer whose name begins with {within!r} has decided anything: call the model inside the with "
                f"block; its layers are {', '.join(self.blocks)}"
            )
        counts = {}
        for name in chosen:
            indices = self.indices(name)
            if mask is not None and (mask.dtype != torch.bool or mask.shape != indices.shape[:2]):
                raise ValueError(
                    f"mask of {mask.dtype} and shape {tuple(mask.shape)} does not fit the tokens of {name}: "
                    f"it must be boolean of shape {tuple(indices.shape[:2])}"
                )
            counts[name] = count_experts(indices, self.blocks[name].num_experts, mask)
        return counts

    def _recorded(self, layer: str) -> list[Decision]:
        if layer not in self.blocks:
            raise ValueError(f"there is no mixture-of-experts layer {layer!r}; there are {', '.join(self.blocks)}")
        if not self._calls[layer]:
            raise ValueError(f"nothing recorded for {layer}: call the model inside the with block")
        return self._calls[layer]

    def _joined(self, layer: str, parts: list[Tensor]) -> Tensor:
        batch = self._batch_size or 1
        rows = [part.view(batch, -1, part.shape[-1]) for part in parts]
        return torch.cat(rows, dim=1)

    # The hooks.

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [
            value for value in (*args[:1], *(kwargs.get(name) for name in _BATCH_INPUTS)) if torch.is_tensor(value)
        ]
        if not given:
            return
        batch = given[0].shape[0]
        if self._batch_size not in (None, batch):
            raise ValueError(
                f"a batch of {batch} after a batch of {self._batch_size}: call clear() between batches, so that the "
                "tokens of one text are not taken for another's"
            )
        self._batch_size = batch

    def _on_router(self, block: MoEBlock, output: Any) -> None:
        logits = find_router_logits(self._model, block.router, output, block.num_experts)
        if logits is not None:
            logits = logits.detach().reshape(-1, logits.shape[-1]).cpu()
        self._logits[block.name] = logits
        decide = _FROM_ROUTER.get(type(block.router).__name__)
        if decide is not None:
            self._note(block, decide(output, block.num_experts))

    def _on_experts(self, block: MoEBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first argument is the tokens themselves.
        given = [value for value in (*args[1:], *kwargs.values()) if torch.is_tensor(value)]
        indices = next((value for value in given if not value.is_floating_point()), None)
        if indices is None:
            raise ValueError(
                f"{type(self._model).__name__}: the experts of {block.name} ({type(block.experts).__name__}) are "
                "not told which expert takes which token, so their choice cannot be recorded here"
            )
        if indices.dim() == 3 and type(block.router).__name__ == "SwitchTransformersTop1Router":
            indices = _from_mask(indices.flatten(0, 1).bool(), 1)
        indices = indices.detach().reshape(-1, indices.shape[-1])
        if hasattr(block.router, "num_router_classes"):  # ZAYA: skipping all experts is a choice, told by weight 0
            weights = next(value for value in given if value.is_floating_point())
            indices = indices.masked_fill(weights.reshape(indices.shape) == 0, NO_EXPERT)
        self._note(block, indices)

    def _note(self, block: MoEBlock, indices: Tensor) -> None:
        k = block.num_experts_per_tok
        if indices.shape[-1] != k and not (indices == NO_EXPERT).any():
            raise ValueError(
                f"{type(self._model).__name__}: {block.name} sends a token to {indices.shape[-1]} experts, but says "
                f"that there are {k} a token"
            )
        self._calls[block.name].append(
            Decision(indices.to("cpu", torch.int64, copy=True), self._logits.pop(block.name, None))
        )


@contextmanager
def record_selections(model: nn.Module) -> Iterator[SelectionRecorder]:
    """Records the routers' decisions of every call of the model inside the block, and nothing after it.

    Nothing that the model computes is changed, and every hook is gone when the block is left, by an exception too.

    Args:
        model: ``medarch.lm.Decoder`` or a model of transformers.

    Yields:
        The recorder, which is filled while the model runs and can be read after the block.

    Raises:
        ValueError: If the model has no router.
    """
    recorder = SelectionRecorder(model)
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(recorder._on_model, with_kwargs=True).remove)
        for block in recorder.blocks.values():
            hooks.callback(block.router.register_forward_hook(_router_hook(recorder, block)).remove)
            if block.experts is not None and type(block.router).__name__ not in _FROM_ROUTER:
                handle = block.experts.register_forward_pre_hook(_experts_hook(recorder, block), with_kwargs=True)
                hooks.callback(handle.remove)
        yield recorder


def count_experts(
    indices: Int[Tensor, "batch time k"], num_experts: int, mask: Bool[Tensor, "batch time"] | None = None
) -> Int[Tensor, "batch experts"]:
    """How many slots of each text went to each expert.

    Args:
        indices: Experts of each token, ``NO_EXPERT`` where there is none.
        num_experts: How many there are.
        mask: True for a token that counts.
    """
    batch = indices.shape[0]
    if mask is not None:
        indices = indices.masked_fill(~mask[..., None], NO_EXPERT)
    # Shifted by one, so that NO_EXPERT falls into a bin of its own, which is dropped.
    width = num_experts + 1
    flat = indices - NO_EXPERT + width * torch.arange(batch)[:, None, None]
    return flat.flatten().bincount(minlength=batch * width).view(batch, width)[:, 1:]


def _router_hook(recorder: SelectionRecorder, block: MoEBlock) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recorder._on_router(block, output)

    return hook


def _experts_hook(recorder: SelectionRecorder, block: MoEBlock) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder._on_experts(block, args, kwargs)

    return hook


def _from_mask(chosen: Bool[Tensor, "tokens experts"], k: int) -> Int[Tensor, "tokens k"]:
    """The experts that are True for each token, in k slots, ``NO_EXPERT`` where there are fewer."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)[:, :k]
    return order.masked_fill(~chosen.gather(-1, order), NO_EXPERT)


def _llama4(output: Any, num_experts: int) -> Tensor:
    # Every expert sees every token, times the sigmoid of its score, which is zero where it was not chosen.
    scores = output[0]
    chosen = scores != 0
    return _from_mask(chosen, int(chosen.sum(-1).max()))


def _nllb(output: Any, num_experts: int) -> Tensor:
    # The second output holds the weights with which the experts' answers are to be summed.
    return _from_mask(output[1] != 0, 2)


def _jetmoe(output: Any, num_experts: int) -> Tensor:
    # Slots sorted by expert: how many each has, and which token each slot belongs to.
    _, token, _, sizes, logits = output
    expert = torch.repeat_interleave(torch.arange(num_experts), torch.as_tensor(sizes))
    chosen = torch.zeros(logits.shape, dtype=torch.bool)
    chosen[token.cpu(), expert] = True
    return _from_mask(chosen, int(chosen.sum(-1).max()))


# Routers whose decision has to be read from what they return, because their experts are not told it as a list.
_FROM_ROUTER: dict[str, Callable[[Any, int], Tensor]] = {
    "JetMoeTopKGating": _jetmoe,
    "Llama4Router": _llama4,
    "NllbMoeTop2Router": _nllb,
}
