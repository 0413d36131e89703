"""Experts of different kinds: the data, the dispatch, the systems that are compared, and the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from medarch.moe.heterogeneous import (
    BUILDERS,
    KINDS,
    HeterogeneousMoE,
    Mixture,
    System,
    build_system,
    load_mixture,
    train_system,
)
from medarch.moe.heterogeneous_study import kinds_by_expert

RECORD = Path(__file__).parents[2] / "book" / "records" / "moe-heterogeneous-study.cpu.json"


@pytest.fixture(scope="module")
def task() -> Mixture:
    return load_mixture(40, 12)


def test_as_many_of_each_kind_with_answers_of_its_own(task: Mixture) -> None:
    for part, size in ((task.train, 40), (task.test, 12)):
        assert part.values.shape == (4 * size, 64)
        assert part.kinds.bincount().tolist() == [size] * 4
        for kind, label in zip(part.kinds.tolist(), part.labels.tolist(), strict=True):
            assert task.answers[label][0] == KINDS[kind]
    assert [sum(kind == each for each, _ in task.answers) for kind in KINDS] == [10, 2, 4, 2]
    for kind in range(4):
        values = task.train.values[task.train.kinds == kind]
        width = 30 if KINDS[kind] == "table" else 64
        assert not values[:, width:].any()
        assert abs(float(values[:, :width].mean())) < 1e-5
        assert float(values[:, :width].std()) == pytest.approx(1, abs=1e-3)


def test_no_test_input_is_a_training_input(task: Mixture) -> None:
    whole = load_mixture()
    seen = {tuple(row) for row in whole.train.values.tolist()}
    held = [tuple(row) for row, kind in zip(whole.test.values.tolist(), whole.test.kinds, strict=True) if kind != 2]
    assert not seen.intersection(held)  # a text may count like another without being it
    with pytest.raises(ValueError, match="test_per_kind=160"):
        load_mixture(400, 160)


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.full((len(values), 3), self.value)


def test_each_input_gets_its_experts_answer_times_its_weight() -> None:
    torch.manual_seed(0)
    model = HeterogeneousMoE([Constant(1.0), Constant(2.0), Constant(3.0)])
    values = torch.randn(29, 64)
    scores, routing = model(values)
    assert routing.statistics.counts.count_nonzero() > 1
    expected = (routing.indices[:, 0] + 1) * routing.weights[:, 0]
    torch.testing.assert_close(scores, expected[:, None].expand(-1, 3))
    assigned = torch.arange(29) % 3
    scores, _ = model(values, assigned)
    assert torch.equal(scores[:, 0], assigned + 1.0)
    scores, _ = HeterogeneousMoE([Constant(2.0)])(values)
    assert torch.equal(scores, torch.full((29, 3), 2.0))
    with pytest.raises(ValueError, match="no input"):
        model(values[:0])


def test_picture_expert_sees_neighbours_and_the_others_do_not() -> None:
    picture, table, _, _ = (build(5) for build in BUILDERS)
    assert any(isinstance(each, nn.Conv2d) for each in picture.modules())
    assert not any(isinstance(each, nn.Conv1d | nn.Conv2d) for each in table.modules())
    for build in BUILDERS:
        assert build(5)(torch.randn(7, 64)).shape == (7, 5)
    text = BUILDERS[2](5)
    values = torch.randn(7, 64)
    torch.testing.assert_close(text(values), text(3 * values))  # however long the text


def test_general_networks_are_as_large_as_one_expert_and_as_all() -> None:
    sizes = {
        system: sum(weight.numel() for weight in build_system(system, 18, 0).experts.parameters())
        for system in get_args(System)
    }
    assert sizes["learned"] == sizes["assigned"]
    assert sizes["identical"] == 4 * sizes["dense_active"]
    assert sizes["dense_total"] == pytest.approx(sizes["learned"], rel=0.01)
    with pytest.raises(ValueError, match="system 'oracle'"):
        build_system("oracle", 18, 0)  # type: ignore[arg-type]


def test_training_learns_repeats_itself_and_leaves_the_global_generator(task: Mixture) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = train_system(task, "assigned", seed=1, epochs=12)
    again = train_system(task, "assigned", seed=1, epochs=12)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.right, again.right)
    assert torch.equal(first.experts, task.test.kinds)
    assert torch.equal(kinds_by_expert(task, first), 12 * torch.eye(4, dtype=torch.long))
    assert float(first.right.double().mean()) > 2 / len(task.answers)
    untouched = build_system("assigned", 18, 1).router.weight
    assert torch.equal(first.model.router.weight, untouched), "where the kind is told, the router has no part"
    other = train_system(task, "learned", seed=1, epochs=1)
    assert sum(other.accuracy(task.test.kinds)) / 4 == pytest.approx(float(other.right.double().mean()))
    assert int(kinds_by_expert(task, other).sum()) == 48
    router = other.model.router.weight
    assert not torch.equal(router, build_system("learned", 18, 1).router.weight), "the router has a gradient"


def test_record_says_what_the_page_says() -> None:
    record = json.loads(RECORD.read_text())
    results = record["results"]
    assert record["repeats"] == 10
    # Networks that are given their kind beat the general ones; a router that has to find out does not.
    for other in ("dense_active", "dense_total", "learned"):
        assert results["differences"][f"assigned_minus_{other}"]["low"] > 0
    assert results["differences"]["assigned_minus_dense_total"]["high"] < 0.15
    assert abs(results["differences"]["learned_minus_dense_total"]["mean"]) < 0.03
    # The kinds can be told, and the router hardly tells them.
    assert results["kind_told_when_asked"]["min"] > 0.9
    learned = results["routing"]["learned"]
    assert learned["nmi"]["min"] > learned["null_max"]["max"]
    assert learned["nmi"]["max"] < 0.7
    assert learned["own_expert"]["mean"] < 0.5
