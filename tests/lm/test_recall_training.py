"""Training on tasks: it learns, repeats itself, stops when it is done, and its parts may be made side by side."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from medarch.bench.partial import Partials
from medarch.lm.parallel_parts import VARIABLE, compute_parts, workers
from medarch.lm.recall_models import ModelSpec
from medarch.lm.recall_tasks import Copying, Induction, SelectiveCopying
from medarch.lm.recall_training import STRETCH, Trial, score_on_tasks, train_on_tasks

EASY = (Copying(5, items=1, symbols=2),)


def test_an_easy_task_is_solved_early_and_the_same_way_twice() -> None:
    trial = Trial(ModelSpec("gru", 16), EASY, learning_rate=2e-2, steps=600, batch_size=16)
    (model, first), (_, again) = train_on_tasks(trial), train_on_tasks(trial)
    assert first["solved"]
    assert STRETCH <= first["steps"] < 600
    assert first["curve"] == again["curve"]
    assert len(first["curve"]) == -(-first["steps"] // STRETCH)
    assert first["curve"][0] < 0.9
    assert not model.training
    assert score_on_tasks(model, EASY)[0] > 0.97
    other = train_on_tasks(Trial(ModelSpec("gru", 16), EASY, 2e-2, steps=STRETCH, batch_size=16, seed=2))[1]
    assert not other["solved"]
    assert other["steps"] == STRETCH
    assert len(other["curve"]) == 1


def test_several_tasks_are_trained_in_turns() -> None:
    tasks = (Induction(5, symbols=2), Induction(9, symbols=4))
    trial = Trial(ModelSpec("attention", 32), tasks, learning_rate=1e-3, steps=3, batch_size=2)
    assert trial.vocab_size == 6
    model, found = train_on_tasks(trial)
    assert found["steps"] == 3
    assert len(score_on_tasks(model, tasks, sequences=7)) == 2
    with pytest.raises(ValueError, match="tasks is empty"):
        Trial(ModelSpec("gru"), (), 1e-3, 1)


def test_the_score_does_not_depend_on_how_much_is_read_at_once() -> None:
    task = SelectiveCopying(17, items=3, symbols=2)
    model, _ = train_on_tasks(Trial(ModelSpec("gru", 16), (task,), learning_rate=1e-2, steps=20, batch_size=4))
    whole, parts, single = (score_on_tasks(model, [task], 31, tokens) for tokens in (10**6, 17 * 4, 1))
    assert whole == pytest.approx(parts)
    assert whole == pytest.approx(single)
    assert 0 < whole[0] < 1


def test_the_count_of_processes_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert workers() == 1
    monkeypatch.setenv(VARIABLE, "16")
    assert workers() == 16
    assert workers(3) == 3
    for wrong in ("0", "many", "-2"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"{VARIABLE}='{wrong}'"):
            workers()


def _partials(folder: Path) -> Partials:
    parts = Partials.__new__(Partials)
    parts.folder = folder
    return parts


def _part(seed: int) -> dict[str, object]:
    trial = Trial(ModelSpec("mamba", 16), EASY, learning_rate=1e-2, steps=4, batch_size=4, seed=seed)
    model, found = train_on_tasks(trial)
    return {"curve": found["curve"], "score": score_on_tasks(model, EASY, 8), "process": os.getpid()}


def test_parts_made_side_by_side_equal_those_made_in_turn(tmp_path: Path) -> None:
    jobs = {f"seed-{seed}": partial(_part, seed) for seed in range(3)}
    threads = torch.get_num_threads()
    alone = compute_parts(_partials(tmp_path / "alone"), jobs, processes=1)
    told: list[str] = []
    together = compute_parts(_partials(tmp_path / "together"), jobs, lambda name, _: told.append(name), processes=2)
    assert list(together) == list(jobs)
    assert sorted(told) == sorted(jobs)
    assert torch.get_num_threads() == threads
    for name, part in alone.items():
        assert part["process"] == os.getpid() != together[name]["process"]
        assert {**part, "process": 0} == {**together[name], "process": 0}
    again = compute_parts(_partials(tmp_path / "together"), jobs, processes=1)
    assert again == together  # read, not made anew


def _fail() -> None:
    raise RuntimeError("a part that cannot be made")


def test_a_part_that_fails_ends_the_study_and_leaves_the_finished_ones(tmp_path: Path) -> None:
    jobs = {"good": partial(int, 7), "bad": _fail}
    with pytest.raises(RuntimeError, match="cannot be made"):
        compute_parts(_partials(tmp_path), jobs, processes=1)
    assert (tmp_path / "good.json").read_text() == "7"
