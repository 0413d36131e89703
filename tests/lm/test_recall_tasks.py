"""The tasks: what is asked follows from what is shown, nothing else gives it away, and the draws are fair."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from medarch.lm.recall_tasks import (
    BLANK,
    FIRST,
    IGNORE,
    MARK,
    Copying,
    Induction,
    MultiQueryRecall,
    PlantedFact,
    RecallBatch,
    SelectiveCopying,
    Task,
    accuracy,
    counted,
    recall_loss,
)

TASKS = [
    Copying(29, items=5, symbols=7),
    SelectiveCopying(29, items=5, symbols=7),
    Induction(23, symbols=5),
    MultiQueryRecall(31, pairs=5, keys=11, values=13),
    MultiQueryRecall(15, pairs=5, keys=5, values=5, power=1.0),
    MultiQueryRecall(43, pairs=5, keys=11, values=13, questions=29),
    PlantedFact(37, facts=3, keys=7, values=11, fillers=5),
    PlantedFact(47, facts=3, keys=7, values=11, fillers=5, questions=7),
    PlantedFact(16, facts=7, keys=7, values=11, fillers=5, depth=0.5),
]


def name(task: Task) -> str:
    return f"{type(task).__name__}-{task.length}"


def due(task: Task) -> int:
    """Answers that a sequence asks for."""
    asked = getattr(task, "questions", None) or getattr(task, "pairs", None) or getattr(task, "items", None)
    return 1 if asked is None else asked


def solve(task: Task, row: list[int]) -> list[int]:
    """The answers by the task's own words, from the input alone."""
    answers = [IGNORE] * len(row)
    if isinstance(task, Copying):
        items = [token for token in row if token >= FIRST]
        start = row.index(MARK)
        answers[start : start + len(items)] = items
    elif isinstance(task, Induction):
        answers[-1] = row[row.index(MARK) + 1]
    elif isinstance(task, MultiQueryRecall):
        pairs = dict(zip(row[: 2 * task.pairs : 2], row[1 : 2 * task.pairs : 2], strict=True))
        for place in range(2 * task.pairs, len(row)):
            if row[place] in pairs:
                answers[place] = pairs[row[place]]
    else:
        for place in range(row.index(MARK) + 1, len(row), 2):
            answers[place] = row[row.index(row[place]) + 1]
    return answers


@pytest.mark.parametrize("task", TASKS, ids=name)
def test_the_input_alone_determines_every_answer(task: Task, generator: torch.Generator) -> None:
    batch = task.sample(53, generator)
    assert batch.input_ids.shape == batch.targets.shape == (53, task.length)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert int(batch.input_ids.min()) >= 0
    assert int(batch.input_ids.max()) < task.vocab_size
    for row, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        assert solve(task, row) == targets
        assert sum(target != IGNORE for target in targets) == due(task)


@pytest.mark.parametrize("task", TASKS, ids=name)
def test_seeds_repeat_and_differ(task: Task) -> None:
    first, again, other = (task.sample(9, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.input_ids, other.input_ids)


@pytest.mark.parametrize("task", TASKS, ids=name)
def test_every_answer_is_equally_likely(task: Task, generator: torch.Generator) -> None:
    """The marginal of the answers is even: knowing the task alone is worth nothing beyond chance."""
    batch = task.sample(6000, generator)
    answers = batch.targets[counted(batch.targets)]
    kinds = torch.bincount(answers).double()
    kinds = kinds[kinds > 0]
    values = getattr(task, "values", getattr(task, "symbols", 0))
    assert len(kinds) == values
    assert float(kinds.max() / kinds.min()) < 1.35
    assert task.chance >= 1 / values


@pytest.mark.parametrize("task", [task for task in TASKS if isinstance(task, Copying)], ids=name)
def test_copying_shows_no_item_after_the_mark(task: Copying, generator: torch.Generator) -> None:
    batch = task.sample(50, generator)
    asked = counted(batch.targets)
    assert asked.sum(-1).eq(task.items).all()
    assert (batch.input_ids[:, -task.items + 1 :] == BLANK).all()
    assert (batch.input_ids[:, -task.items] == MARK).all()
    assert (batch.input_ids >= FIRST).sum(-1).eq(task.items).all()


def test_only_selective_copying_moves_its_items() -> None:
    """The delay from an item to its answer is one number in the one task, and many in the other."""
    delays: dict[type, set[int]] = {}
    for task in TASKS[:2]:
        batch = task.sample(40, torch.Generator().manual_seed(1))
        found = set()
        for row in batch.input_ids:
            places = (row >= FIRST).nonzero()[:, 0]
            found |= set((task.length - len(places) + torch.arange(len(places)) - places).tolist())
        delays[type(task)] = found
    assert delays[Copying] == {24}
    assert delays[SelectiveCopying] == set(range(5, 25))


def test_the_mark_stands_anywhere_and_its_follower_is_not_the_mark(generator: torch.Generator) -> None:
    task = Induction(7, symbols=3)
    batch = task.sample(4000, generator)
    places = (batch.input_ids[:, :-1] == MARK).nonzero()
    assert len(places) == 4000
    assert sorted(Counter(places[:, 1].tolist())) == [0, 1, 2, 3, 4]
    assert (batch.targets[:, -1] >= FIRST).all()
    shortest = Induction(3, symbols=2).sample(5, generator)
    assert (shortest.input_ids[:, 0] == MARK).all()
    assert torch.equal(shortest.targets[:, -1], shortest.input_ids[:, 1])


def test_gaps_follow_the_power_law(generator: torch.Generator) -> None:
    """With a single pair the gap is drawn once; its law is the normalised power."""
    for power in (0.01, 1.0):
        task = MultiQueryRecall(10, pairs=1, keys=3, values=3, power=power)
        batch = task.sample(20000, generator)
        found = torch.bincount(counted(batch.targets).nonzero()[:, 1] - 2, minlength=8).double() / 20000
        law = torch.arange(1, 9, dtype=torch.float64) ** (power - 1)
        assert torch.allclose(found, law / law.sum(), atol=0.012)


def test_pairs_are_distinct_and_each_is_asked_once(generator: torch.Generator) -> None:
    batch = MultiQueryRecall(64, pairs=8, keys=9, values=9).sample(40, generator)
    for row, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        assert len(set(row[:16:2])) == len(set(row[1:16:2])) == 8
        assert sorted(target for target in targets if target != IGNORE) == sorted(row[1:16:2])
        assert sorted(token for token in row[16:] if token != BLANK) == sorted(row[:16:2])


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 14), (1.0, 28)])
def test_a_single_fact_lies_at_its_depth(depth: float, place: int, generator: torch.Generator) -> None:
    task = PlantedFact(32, facts=1, depth=depth, keys=5, values=5, fillers=5)
    batch = task.sample(20, generator)
    keys = (batch.input_ids >= FIRST) & (batch.input_ids < FIRST + 5)
    assert (keys[:, :-1].nonzero()[:, 1] == place).all()


def test_the_asked_fact_lies_near_its_depth_among_others(generator: torch.Generator) -> None:
    task = PlantedFact(101, facts=9, depth=0.25, keys=11, values=5, fillers=5)
    batch = task.sample(300, generator)
    places = torch.tensor([row.index(row[-1]) for row in batch.input_ids.tolist()])
    assert abs(float(places.double().mean()) - 0.25 * 97) < 2
    assert int(places.max() - places.min()) <= 9  # what the other facts before it can shift
    anywhere = dataclasses.replace(task, depth=None).sample(300, generator)
    spread = torch.tensor([row.index(row[-1]) for row in anywhere.input_ids.tolist()]).double()
    assert float(spread.std()) > 20
    assert abs(float(spread.mean()) - 48.5) < 6


def test_facts_never_overlap(generator: torch.Generator) -> None:
    task = PlantedFact(22, facts=10, depth=0.9, keys=10, values=3, fillers=2)
    row = task.sample(60, generator).input_ids
    keys = (row >= FIRST) & (row < FIRST + 10)
    values = (row >= FIRST + 10) & (row < FIRST + 13)
    assert keys[:, :-1].sum(-1).eq(10).all()
    assert torch.equal(values[:, 1:-1], keys[:, :-2])


def test_another_length_keeps_the_task() -> None:
    task = MultiQueryRecall(64, pairs=8).at_length(1024)
    assert (task.length, task.pairs) == (1024, 8)
    assert task.sample(2, torch.Generator()).input_ids.shape == (2, 1024)


def test_accuracy_and_loss_count_what_is_asked(generator: torch.Generator) -> None:
    batch = Copying(12, items=4, symbols=6).sample(3, generator)
    perfect = torch.nn.functional.one_hot(batch.targets.clamp(min=0), 8).float() * 50
    assert accuracy(perfect, batch.targets) == 1.0
    assert float(recall_loss(perfect, batch.targets)) < 1e-6
    half = perfect.clone()
    half[:, -2:] = 0
    half[:, -2:, BLANK] = 1
    assert accuracy(half, batch.targets) == 0.5
    half[:, :-4] = 1e3 * torch.rand(3, 8, 8, generator=generator)  # what is not asked does not count
    assert accuracy(half, batch.targets) == 0.5
    nothing = torch.full((1, 3), IGNORE)
    for function in (accuracy, recall_loss):
        with pytest.raises(ValueError, match="no position counts"):
            function(torch.zeros(1, 3, 5), nothing)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Copying(9, items=5), "length=9 is too short for items=5"),
        (lambda: SelectiveCopying(64, items=0), "items=0 must be at least 1"),
        (lambda: Copying(64, symbols=0), "symbols=0"),
        (lambda: Induction(2), "length=2"),
        (lambda: MultiQueryRecall(64, pairs=8, questions=49), "length=64 is too short for pairs=8"),
        (lambda: MultiQueryRecall(64, pairs=22), "length=64 is too short for pairs=22"),
        (lambda: MultiQueryRecall(128, pairs=33, values=32, keys=40), "pairs=33 exceeds"),
        (lambda: MultiQueryRecall(64, power=0.0), "power=0.0"),
        (lambda: PlantedFact(64, facts=33, keys=32), "length=64 is too short for facts=33"),
        (lambda: PlantedFact(128, facts=33, keys=32), "facts=33 exceeds keys=32"),
        (lambda: PlantedFact(64, questions=0), "questions=0"),
        (lambda: PlantedFact(64, depth=1.5), "depth=1.5"),
        (lambda: Copying(64, items=8).at_length(15), "length=15"),
        (lambda: Copying(64).sample(0, torch.Generator()), "batch_size=0"),
    ],
)
def test_what_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


def test_a_batch_names_its_parts() -> None:
    assert RecallBatch._fields == ("input_ids", "targets")


def test_chance_by_hand() -> None:
    assert Copying(length=32, items=4, symbols=8).chance == 1 / 8
    assert SelectiveCopying(length=32, items=4, symbols=8).chance == 1 / 8
    assert Induction(length=32, symbols=8).chance == 1 / 8
    assert MultiQueryRecall(length=32, pairs=4, keys=16, values=16, questions=24).chance == 1 / 4
    assert PlantedFact(length=48, facts=2, keys=8, values=8, fillers=16, questions=4).chance == 1 / 2
