"""How fast the layer is: against the loop that specifies it, transformers' block, and the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from medarch.bench import benchmark, compare
from medarch.moe import balance_study as balance_study  # declares moe/balancing-study
from medarch.moe import heterogeneous_study as heterogeneous_study  # declares moe/heterogeneous-study
from medarch.moe import routing_study as routing_study  # declares moe/routing-study
from medarch.moe import serving_study as serving_study  # declares moe/batch-latency and moe/expert-parallel
from medarch.moe import study as study  # declares moe/classifier-study
from medarch.moe.config import MoEConfig
from medarch.moe.dense import DenseMLP
from medarch.moe.layer import MoELayer
from medarch.moe.mixtral import save_mixtral_
from medarch.moe.reference import moe_forward_reference

Forward = Callable[[Tensor], Tensor]

BASELINE = "dense_active"
LOOP = "loop"


@benchmark("moe/speed", modules=["medarch.moe", "medarch.bench.timing"])
def speed(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Time of the layer over a dense layer of its active size, forward and with backward, one thread.

    The dense layer does the arithmetic of k experts without any routing: it is the limit. The dense layer
    of the total size is what the mixture replaces. The loop over tokens takes part up to 512 tokens, where
    it is slow enough.

    Args:
        device: Where to run, ``"cpu"`` or ``"cuda"``.
        quick: Whether to run small sizes, to see that everything works.

    Returns:
        For each number of tokens and each mode one comparison, with the sizes.

    Raises:
        ValueError: If two versions of the layer disagree: what is wrong is not timed.
    """
    # grouped_mm wants rows of a multiple of 16 bytes.
    config = MoEConfig(28, 52) if quick else MoEConfig(256, 1024)
    token_counts = (1, 17) if quick else (1, 512, 4096)
    rounds = 3 if quick else 15
    generator = torch.Generator().manual_seed(0)
    modules = build_variants(config, generator, device)
    results: dict[str, Any] = {"sizes": asdict(config), "repeats": rounds}
    for tokens in token_counts:
        forwards = {name: forward for name, (_, forward) in modules.items() if name != LOOP or tokens <= 512}
        hidden_states = torch.randn(tokens, config.hidden_size, generator=generator).to(device)
        cotangent = torch.randn(tokens, config.hidden_size, generator=generator).to(device)
        check_agreement(modules, hidden_states[:61], cotangent[:61])
        inference = {name: without_gradient(forward, hidden_states) for name, forward in forwards.items()}
        training = {
            name: with_backward(modules[name][0], forward, hidden_states, cotangent)
            for name, forward in forwards.items()
        }
        results[f"tokens_{tokens}"] = {
            mode: compare(calls, baseline=BASELINE, rounds=rounds, threads=1, device=device).to_dict()
            for mode, calls in (("forward", inference), ("forward_backward", training))
        }
    return results


def build_variants(config: MoEConfig, generator: torch.Generator, device: str) -> dict[str, tuple[nn.Module, Forward]]:
    """Each competitor as its weights and its forward pass; all mixtures hold the same weights."""
    layer = MoELayer(config, generator)
    # A router of the usual small initial weights would be all but indifferent; this one has preferences.
    nn.init.normal_(layer.router.weight, std=config.hidden_size**-0.5, generator=generator)
    layer.to(device)
    active = DenseMLP.of_active_size(config, generator).to(device)
    total = DenseMLP.of_total_size(config, generator).to(device)
    variants: dict[str, tuple[nn.Module, Forward]] = {
        BASELINE: (active, active),
        "dense_total": (total, total),
        "moe": (layer, lambda x: layer(x)[0]),
        LOOP: (layer, lambda x: moe_forward_reference(layer, x)),
    }
    for implementation in ("eager", "grouped_mm"):
        block = mixtral_block(config, implementation).to(device)
        save_mixtral_(layer, block)
        variants[f"transformers_{implementation}"] = (block, as_one_sequence(block))
    return variants


def as_one_sequence(block: nn.Module) -> Forward:
    """The block's forward for tokens without a batch dimension, which it insists on."""
    return lambda tokens: block(tokens[None])[0]


def mixtral_block(config: MoEConfig, implementation: str) -> nn.Module:
    """The Mixtral block of transformers with one of its ways to run the experts.

    Raises:
        ValueError: If transformers is not installed.
    """
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as missing:
        raise ValueError(
            "moe/speed compares with transformers, which is not installed: run `make test` once"
        ) from missing
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "experts_implementation": implementation,
    }
    return MixtralSparseMoeBlock(MixtralConfig(**sizes))


def without_gradient(forward: Forward, hidden_states: Tensor) -> Callable[[], Tensor]:
    """One inference."""

    def call() -> Tensor:
        with torch.no_grad():
            return forward(hidden_states)

    return call


def with_backward(
    module: nn.Module, forward: Forward, hidden_states: Tensor, cotangent: Tensor
) -> Callable[[], dict[str, Tensor]]:
    """One forward and backward pass, which returns the gradients of the input and of each weight."""
    inputs = hidden_states.clone().requires_grad_()

    def call() -> dict[str, Tensor]:
        inputs.grad = None
        module.zero_grad(set_to_none=True)
        forward(inputs).backward(cotangent)
        gradients = {"input": inputs, **dict(module.named_parameters())}
        return {name: tensor.grad for name, tensor in gradients.items() if tensor.grad is not None}

    return call


def check_agreement(modules: dict[str, tuple[nn.Module, Forward]], hidden_states: Tensor, cotangent: Tensor) -> None:
    """Holds every mixture to the loop: its output and all its gradients.

    Raises:
        ValueError: Naming the version and the quantity that differ.
    """
    expected = _outcome(*modules[LOOP], hidden_states, cotangent)
    for name, (module, forward) in modules.items():
        if name == LOOP or isinstance(module, DenseMLP):
            continue
        outcome = _outcome(module, forward, hidden_states, cotangent)
        # The names of the weights differ between the libraries, their order does not.
        for (quantity, value), other in zip(expected.items(), outcome.values(), strict=True):
            try:
                torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))
            except AssertionError as difference:
                raise ValueError(f"{name} disagrees with the loop in {quantity}: {difference}") from difference


def _outcome(module: nn.Module, forward: Forward, hidden_states: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    gradients = with_backward(module, forward, hidden_states, cotangent)()
    return {"output": without_gradient(forward, hidden_states)(), **gradients}
