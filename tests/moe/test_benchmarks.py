"""The speed benchmark measures what it says, and nothing before all versions agree."""

from __future__ import annotations

import json

import pytest
import torch

from medarch.bench.records import load, record_path
from medarch.moe import MoEConfig, benchmarks


def test_a_quick_run_gives_every_comparison() -> None:
    results = benchmarks.speed(quick=True)
    json.dumps(results)
    assert results["repeats"] == 3
    variants = {"dense_active", "dense_total", "moe", "loop", "transformers_eager", "transformers_grouped_mm"}
    for tokens in (1, 17):
        for mode in ("forward", "forward_backward"):
            comparison = results[f"tokens_{tokens}"][mode]
            assert comparison["baseline"] == "dense_active"
            assert set(comparison["variants"]) == variants
            assert all(entry["seconds"]["median"] > 0 for entry in comparison["variants"].values())


@pytest.mark.parametrize("wrong", ["moe", "transformers_eager", "transformers_grouped_mm"])
@pytest.mark.parametrize("parameter", [0, 1, 2], ids=["router", "gate_up_proj", "down_proj"])
def test_a_version_that_disagrees_is_not_timed(wrong: str, parameter: int) -> None:
    config = MoEConfig(28, 52, 5, 2)
    generator = torch.Generator().manual_seed(1)
    modules = benchmarks.build_variants(config, generator, "cpu")
    tokens = torch.randn(13, 28, generator=generator)
    benchmarks.check_agreement(modules, tokens, tokens)
    if wrong == "moe":  # Shares its weights with the loop, so it gets weights of its own.
        other = benchmarks.build_variants(config, torch.Generator().manual_seed(1), "cpu")["moe"]
        modules["moe"] = other
        benchmarks.check_agreement(modules, tokens, tokens)
    with torch.no_grad():
        list(modules[wrong][0].parameters())[parameter].flatten()[3] += 0.05
    with pytest.raises(ValueError, match=f"{wrong} disagrees with the loop"):
        benchmarks.check_agreement(modules, tokens, tokens)


def test_backward_reaches_the_input_and_every_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    modules = benchmarks.build_variants(MoEConfig(28, 52, 5, 2), generator, "cpu")
    tokens = torch.randn(13, 28, generator=generator)
    for module, forward in modules.values():
        call = benchmarks.with_backward(module, forward, tokens, tokens)
        first = {name: gradient.clone() for name, gradient in call().items()}
        second = call()
        assert len(first) == 1 + len(list(module.parameters()))
        for name in first:
            assert first[name].abs().max() > 0
            torch.testing.assert_close(first[name], second[name])


# One thread, as ratios to the dense layer of the active size: tokens, mode, most that the layer may take.
GOALS = [
    (512, "forward", 1.3),
    (512, "forward_backward", 1.3),
    (4096, "forward", 1.15),
    (4096, "forward_backward", 1.15),
]


@pytest.mark.parametrize(("tokens", "mode", "most"), GOALS)
def test_the_committed_record_meets_the_goals(tokens: int, mode: str, most: float) -> None:
    record = load(record_path("moe/speed"))
    variants = record.results[f"tokens_{tokens}"][mode]["variants"]
    ratio = {name: entry["ratio"]["median"] for name, entry in variants.items()}
    assert record.results["sizes"]["hidden_size"] == 256, "a quick run is no record"
    assert ratio["moe"] <= most
    assert ratio["moe"] <= 1.05 * min(ratio["transformers_eager"], ratio["transformers_grouped_mm"])
    if "loop" in ratio:
        assert ratio["loop"] >= 8 * ratio["moe"]
