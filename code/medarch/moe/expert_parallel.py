"""Two processes do what one does, and where the time goes: ``torchrun … -m medarch.moe.expert_parallel``.

Each process compares its part of the layer with the whole layer, and times the stages; the first prints the result
as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medarch.moe.config import MoEConfig
from medarch.moe.distributed import ExpertParallelMoE
from medarch.moe.layer import MoELayer

STAGES = ("route", "plan", "dispatch", "travel", "experts", "return", "combine")


def compare_with_one_process(config: MoEConfig, tokens: int, seed: int = 0) -> dict[str, float]:
    """The largest differences between this process's share and one process that holds all experts and all tokens.

    Args:
        config: The layer's sizes.
        tokens: Tokens over all processes; this one takes its share, of which one is padding.
        seed: Of the weights and tokens, the same everywhere.

    Returns:
        For the output and for the gradients of input, router and experts the largest difference over the largest value.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = MoELayer(config, generator)
    nn.init.normal_(layer.router.weight, std=config.hidden_size**-0.5, generator=generator)
    hidden_states = torch.randn(tokens, config.hidden_size, generator=generator)
    cotangent = torch.randn(tokens, config.hidden_size, generator=generator)
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[tokens // 3] = False
    parallel = ExpertParallelMoE.of_layer(layer)
    mine = torch.arange(tokens).tensor_split(parallel.world_size)[parallel.rank]

    whole_input = hidden_states.clone().requires_grad_()
    expected, routing = layer(whole_input, mask)
    expected.backward(cotangent)
    own_input = hidden_states[mine].clone().requires_grad_()
    found, own_routing = parallel(own_input, mask[mine])
    found.backward(cotangent[mine])
    parallel.sum_gradients()

    kept = slice(parallel.rank * parallel.local_experts, (parallel.rank + 1) * parallel.local_experts)
    up_proj = layer.experts.gate_up_proj if config.gated else layer.experts.up_proj
    pairs = {
        "output": (found, expected[mine]),
        "input_gradient": (own_input.grad, _grad(whole_input)[mine]),
        "router_gradient": (parallel.router.weight.grad, layer.router.weight.grad),
        "up_gradient": (parallel.up_proj.grad, _grad(up_proj)[kept]),
        "down_gradient": (parallel.down_proj.grad, _grad(layer.experts.down_proj)[kept]),
    }
    differences = {name: _difference(ours, theirs) for name, (ours, theirs) in pairs.items()}
    differences["experts_chosen"] = float((own_routing.indices != routing.indices[mine]).any())
    return differences


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ")
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@torch.no_grad()
def time_stages(config: MoEConfig, tokens: int, rounds: int, seed: int = 0) -> list[dict[str, float]]:
    """Wall-clock seconds of each stage of a forward pass, round by round; before each stage all processes meet.

    A process that finishes early waits at the next meeting, and the waiting is not counted. The journey is
    counted as it is: the operating system's copy between processes here, a network between machines.

    Args:
        config: The layer's sizes.
        tokens: Tokens of each process.
        rounds: How often.
        seed: Of the weights and tokens.
    """
    parallel = ExpertParallelMoE(config, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1 + parallel.rank)
    nn.init.normal_(parallel.router.weight, std=config.hidden_size**-0.5, generator=torch.Generator().manual_seed(seed))
    hidden_states = torch.randn(tokens, config.hidden_size, generator=generator)
    times = []
    for _ in range(rounds + 1):
        seconds: dict[str, float] = {}

        def stage(name: str, run: Callable[..., Any], *inputs: Any, into: dict[str, float] = seconds) -> Any:
            dist.barrier()
            begun = time.perf_counter()
            result = run(*inputs)
            into[name] = time.perf_counter() - begun
            return result

        routing = stage("route", parallel.router, hidden_states)
        route = stage("plan", parallel.plan, routing.indices)
        rows = stage("dispatch", parallel.dispatch, hidden_states, route)
        arrived = stage("travel", parallel.travel, rows, route.sent, route.received)
        answers = stage("experts", parallel.compute, arrived, route)
        returned = stage("return", parallel.travel, answers, route.received, route.sent)
        stage("combine", parallel.combine, returned, routing.weights, route)
        times.append(seconds)
    return times[1:]


def main(arguments: list[str] | None = None) -> None:
    """Started by torchrun in each process."""
    parser = argparse.ArgumentParser(prog="medarch.moe.expert_parallel", description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=32)
    parser.add_argument("--intermediate-size", type=int, default=48)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, default=61, help="over all processes for the comparison, of each for the times"
    )
    parser.add_argument("--rounds", type=int, default=0, help="rounds of timing; none by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        config = MoEConfig(options.hidden_size, options.intermediate_size, options.experts, 2, initializer_range=0.1)
        result = {
            "processes": dist.get_world_size(),
            "differences": compare_with_one_process(config, options.tokens),
            "seconds": time_stages(config, options.tokens, options.rounds) if options.rounds else [],
        }
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, result)
        if dist.get_rank() == 0:
            print(json.dumps({"ranks": results}), flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
