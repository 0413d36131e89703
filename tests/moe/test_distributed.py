"""Expert parallelism: two processes give what one gives, outputs and all gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from medarch.bench.records import load, record_path
from medarch.moe.config import MoEConfig
from medarch.moe.distributed import ExpertParallelMoE
from medarch.moe.expert_parallel import STAGES, compare_with_one_process
from medarch.moe.layer import MoELayer
from medarch.moe.serving_study import batch_latency, expert_parallel, launch


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_two_processes_are_one() -> None:
    # Four experts for 13 tokens, of which one process has seven and the other six, one of them padding.
    results = expert_parallel(quick=True)
    json.dumps(results)
    assert results["differences"].pop("experts_chosen") == 0
    assert set(results["differences"]) == {
        "output",
        "input_gradient",
        "router_gradient",
        "up_gradient",
        "down_gradient",
    }
    assert all(difference < 1e-5 for difference in results["differences"].values())
    assert list(results["share"]) == list(STAGES)
    assert sum(results["share"].values()) == pytest.approx(1)


def test_failing_processes_are_reported() -> None:
    with pytest.raises(ValueError, match="num_experts=3 do not divide among 2 processes"):
        launch(2, "--experts=3")


@pytest.mark.usefixtures("alone")
def test_one_process_is_the_layer() -> None:
    for config in (MoEConfig(7, 11, 5, 2), MoEConfig(7, 11, 5, 1, hidden_act="gelu", norm_topk_prob=False)):
        differences = compare_with_one_process(config, 23)
        assert all(difference < 1e-5 for difference in differences.values())


@pytest.mark.usefixtures("alone")
def test_the_same_seed_gives_the_layers_weights() -> None:
    config = MoEConfig(7, 11, 5, 2)
    parallel = ExpertParallelMoE(config, torch.Generator().manual_seed(4))
    layer = MoELayer(config, torch.Generator().manual_seed(4))
    torch.testing.assert_close(parallel.up_proj, layer.experts.gate_up_proj)
    torch.testing.assert_close(parallel.down_proj, layer.experts.down_proj)
    torch.testing.assert_close(parallel.router.weight, layer.router.weight)


@pytest.mark.usefixtures("alone")
def test_every_parameter_has_a_gradient_without_any_token() -> None:
    parallel = ExpertParallelMoE(MoEConfig(7, 11, 5, 2), torch.Generator().manual_seed(4))
    output, _ = parallel(torch.zeros(2, 0, 7))
    assert output.shape == (2, 0, 7)
    output.sum().backward()
    parallel.sum_gradients()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parallel.parameters())


@pytest.mark.usefixtures("alone")
def test_bad_input_is_refused() -> None:
    parallel = ExpertParallelMoE(MoEConfig(7, 11, 5, 2))
    with pytest.raises(ValueError, match="hidden"):
        parallel(torch.zeros(3, 8))


def test_without_a_group_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="start with torchrun"):
        ExpertParallelMoE(MoEConfig(7, 11, 5, 2))


def test_the_latency_study_gives_what_the_page_reads() -> None:
    results = batch_latency(quick=True)
    json.dumps(results)
    assert set(results["growth"]) == {"dense_active", "dense_total", "moe", "at_eight"}
    for size, step in results["steps"].items():
        assert set(step["variants"]) == {"dense_active", "dense_total", "moe"}
        assert step["flops"]["dense_total"] == 4 * step["flops"]["dense_active"]
        assert 2 <= step["distinct_experts"] <= min(8, 2 * int(size))
        assert step["bytes"]["dense_active"] <= step["bytes"]["moe"] <= step["bytes"]["dense_total"]


def test_the_records_say_what_the_page_says() -> None:
    latency = load(record_path("moe/batch-latency", "cpu")).results
    assert latency["steps"]["1"]["distinct_experts"] == 2
    assert latency["steps"]["8"]["distinct_experts"] > 6
    # Eight times the operations on the same weights take less than half of eight times the time ...
    assert latency["growth"]["dense_active"]["8"] < 4
    # ... while the mixture, which has to read more of its weights, slows down more.
    assert latency["growth"]["moe"]["8"] > latency["growth"]["dense_active"]["8"]
    assert latency["growth"]["at_eight"]["total_over_moe"] < 3
    parallel = load(record_path("moe/expert-parallel", "cpu")).results
    assert all(difference < 1e-5 for difference in parallel["differences"].values())
    assert parallel["share"]["experts"] < 1
