"""The study of routers on a few definitions, and its record against what the page says of it."""

from __future__ import annotations

import pytest
import torch

from medarch.bench.records import load, record_path
from medarch.moe.accounting import flops_per_token
from medarch.moe.classifier import Task, load_task
from medarch.moe.routing_study import NAME, VARIANTS, RoutedClassifier, flops_of_layer, measure, sized, train_routed


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task().map(lambda part: part[:256])


def test_the_number_of_experts_changes_neither_what_is_held_nor_what_is_used() -> None:
    experts = {k: flops_per_token(sized(k)).experts for k in (1, 2, 4, 8)}
    assert len(set(experts.values())) == 1
    assert {sized(k).num_experts * sized(k).intermediate_size for k in (1, 2, 4, 8)} == {512}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_trains_and_is_measured(name: str, task: Task) -> None:
    variant = VARIANTS[name]
    model = train_routed(task, variant, seed=0, epochs=1)
    fresh = RoutedClassifier(task, variant, torch.Generator().manual_seed(0)).eval()
    found, before = measure(task, model, task.train), measure(task, fresh, task.train)
    assert found["nats"] < before["nats"]
    if name == "soft":
        assert "nmi" not in found
        return
    assert 1 <= found["max_over_mean_load"] <= variant.config.num_experts
    assert found["unserved"] == 0 or name in ("switch", "expert_choice")
    if name == "expert_choice":
        assert found["max_over_mean_load"] == 1


def test_counted_operations() -> None:
    variant = VARIANTS["top2"]
    layer = variant.build(variant.config, torch.Generator().manual_seed(0))
    assert flops_of_layer(layer, 25) == flops_per_token(variant.config).total


def test_words_of_other_definitions_matter_only_where_the_batch_decides(task: Task) -> None:
    """Expert choice sees the whole batch: alone, a definition is routed otherwise. Top-2 and Soft MoE do not."""
    for name, alone in (("top2", True), ("soft", True), ("expert_choice", False)):
        model = RoutedClassifier(task, VARIANTS[name], torch.Generator().manual_seed(0)).double().eval()
        examples = task.test.tokens[:16], task.test.mask[:16]
        with torch.no_grad():
            many = model.classify_words(model.words(*examples), examples[1])[0][:1]
            one = model.classify_words(model.words(examples[0][:1], examples[1][:1]), examples[1][:1])[0]
        assert torch.allclose(many, one, atol=1e-12) is alone


def test_the_record_says_what_the_page_says_of_it() -> None:
    results = load(record_path(NAME)).results
    variants = results["variants"]
    assert set(variants) == set(VARIANTS)
    accuracy = {name: found["accuracy"]["mean"] for name, found in variants.items()}
    by_k = results["experts_per_token"]["accuracy"]
    # One, two, four and eight experts a token lie within two standard errors of the test set.
    assert max(by_k.values()) - min(by_k.values()) < 2 * results["standard_error_at_90_percent"]
    assert results["experts_per_token"]["best_minus_two"] == max(by_k.values()) - accuracy["top2"] >= 0
    ranks = sorted(accuracy, key=accuracy.__getitem__)
    assert set(ranks[:3]) == {"random", "soft", "switch"}
    assert ranks[-1] == "top2_no_loss"
    gap = accuracy["top2_no_loss"] - accuracy["top2"]
    assert 0.8 < gap / results["standard_error_at_90_percent"] < 1.2
    assert variants["expert_choice"]["max_over_mean_load"]["max"] == 1
    assert 0 < variants["expert_choice"]["unserved"]["mean"] < 0.05
    assert variants["switch"]["unserved"]["mean"] > 0.01
    assert variants["dense"]["flops_per_token"] > 3.9 * variants["top2"]["flops_per_token"]
