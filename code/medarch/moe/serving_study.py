"""What it costs to serve a mixture: time over the size of the batch, and where the time of expert parallelism goes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from medarch.bench.registry import benchmark
from medarch.bench.timing import compare
from medarch.moe.accounting import dense_flops_per_token, expected_distinct_experts, flops_per_token
from medarch.moe.batching import bytes_touched, distinct_experts
from medarch.moe.config import MoEConfig
from medarch.moe.dense import DenseMLP
from medarch.moe.layer import MoELayer

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DRAWS = 4  # batches behind each time, so that one lucky routing does not decide


@benchmark("moe/batch-latency", modules=["medarch.moe.layer", "medarch.moe.batching", "medarch.bench.timing"])
def batch_latency(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Time of one step of the layer over the number of tokens in it, beside dense layers of active and total size.

    The weights exceed the processor's caches, so that a step has to read those that it touches from memory, as the
    steps of a large model do. Tokens are unrelated to one another. All times are of the forward pass.

    Args:
        device: Where to run, ``"cpu"`` or ``"cuda"``.
        quick: Whether to run small sizes, to see that everything works.

    Returns:
        For each size of batch the comparison, the different experts touched and the bytes of their weights; and how
        time, operations and bytes grow from one token on.
    """
    config = MoEConfig(29, 53) if quick else MoEConfig(1024, 1792)
    batches, rounds = ((1, 8), 3) if quick else (BATCHES, 9)
    generator = torch.Generator().manual_seed(0)
    layer = MoELayer(config, generator)
    nn.init.normal_(layer.router.weight, std=config.hidden_size**-0.5, generator=generator)
    dense = {
        "dense_active": DenseMLP.of_active_size(config, generator),
        "dense_total": DenseMLP.of_total_size(config, generator),
    }
    for module in (layer, *dense.values()):
        module.to(device)
    steps = {}
    for batch_size in batches:
        inputs = [torch.randn(batch_size, config.hidden_size, generator=generator).to(device) for _ in range(DRAWS)]
        with torch.no_grad():
            touched = statistics.mean(distinct_experts(layer.router(batch).indices) for batch in inputs)
        calls = {name: _over(inputs, module) for name, module in dense.items()}
        calls["moe"] = _over(inputs, lambda batch: layer(batch)[0])
        steps[str(batch_size)] = {
            **compare(calls, baseline="dense_active", rounds=rounds, threads=1, device=device).to_dict(),
            "distinct_experts": touched,
            "expected_distinct_experts": expected_distinct_experts(config, batch_size),
            "bytes": {
                "moe": bytes_touched(config, touched),
                "dense_active": bytes_touched(config, config.num_experts_per_tok),
                "dense_total": bytes_touched(config, config.num_experts),
            },
            "flops": {
                "moe": batch_size * flops_per_token(config).total,
                "dense_active": batch_size * dense_flops_per_token(config, config.num_experts_per_tok),
                "dense_total": batch_size * dense_flops_per_token(config, config.num_experts),
            },
        }
    return {"repeats": rounds, "sizes": asdict(config), "draws": DRAWS, "steps": steps, "growth": _growth(steps)}


def _over(inputs: Sequence[Tensor], module: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
    """One forward pass for each batch."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [module(batch) for batch in inputs]

    return call


def _growth(steps: dict[str, Any]) -> dict[str, Any]:
    """Time of a step over that of a step with one token, by layer; eight tokens against the dense total layer."""
    first, eight = steps["1"], steps["8"]

    def median(step: dict[str, Any], name: str) -> float:
        return float(step["variants"][name]["seconds"]["median"])

    return {
        name: {size: median(step, name) / median(first, name) for size, step in steps.items()}
        for name in first["variants"]
    } | {
        "at_eight": {
            "total_over_moe": median(eight, "dense_total") / median(eight, "moe"),
            "total_over_moe_flops": eight["flops"]["dense_total"] / eight["flops"]["moe"],
        }
    }


@benchmark("moe/expert-parallel", modules=["medarch.moe.expert_parallel"])
def expert_parallel(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Two processes under torchrun: equal to one, and the share of each stage of the forward pass in its time.

    A stage's time is that of the slower process, and the shares are those of the medians over rounds. The clock is
    the wall's, since travelling is waiting; on a machine that others use too, the shares vary.

    Args:
        device: Only ``"cpu"``, where the processes talk through gloo.
        quick: Whether to run small sizes, to see that everything works.

    Returns:
        The largest difference from one process, the seconds of each stage, and its share.

    Raises:
        ValueError: If the device is another, or the processes failed; the message holds what they said.
    """
    if device != "cpu":
        raise ValueError(f"moe/expert-parallel runs two processes on a CPU, not on {device!r}")
    sizes = {"hidden-size": 256, "intermediate-size": 1024, "experts": 8, "tokens": 512, "rounds": 30}
    if quick:
        sizes = {"hidden-size": 16, "intermediate-size": 24, "experts": 4, "tokens": 13, "rounds": 3}
    ranks = launch(2, *(f"--{name}={value}" for name, value in sizes.items()))
    differences = [rank["differences"] for rank in ranks]
    slower = [
        {stage: max(times[stage] for times in round_) for stage in round_[0]}
        for round_ in zip(*(rank["seconds"] for rank in ranks), strict=True)
    ]
    seconds = {stage: statistics.median(times[stage] for times in slower) for stage in slower[0]}
    whole = sum(seconds.values())
    return {
        "repeats": sizes["rounds"],
        "sizes": sizes,
        "differences": {name: max(each[name] for each in differences) for name in differences[0]},
        "seconds": seconds,
        "share": {stage: value / whole for stage, value in seconds.items()},
    }


def launch(processes: int, *arguments: str, timeout: float = 300) -> list[dict[str, Any]]:
    """Runs ``medarch.moe.expert_parallel`` under torchrun on this machine.

    Args:
        processes: How many.
        arguments: Of the module.
        timeout: Seconds after which they are stopped.

    Returns:
        What each process found.

    Raises:
        ValueError: If one of them failed; the message holds what they said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    finished = subprocess.run(
        [*command, "-m", "medarch.moe.expert_parallel", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if finished.returncode:
        lines = finished.stderr.splitlines()
        told = [line for line in lines if "Error: " in line and "ChildFailed" not in line] or lines[-20:]
        raise ValueError(f"{processes} processes of medarch.moe.expert_parallel failed:\n" + "\n".join(told))
    answer: dict[str, list[dict[str, Any]]] = json.loads(finished.stdout.strip().splitlines()[-1])
    return answer["ranks"]
