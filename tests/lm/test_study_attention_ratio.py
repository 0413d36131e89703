"""The stacks that are compared differ in their attention alone, and their memory is counted as it is held."""

from __future__ import annotations

import pytest
import torch

from medarch.lm import study_attention_ratio as study


@pytest.mark.parametrize("count", study.PLACES)
def test_a_stack_has_so_many_layers_of_attention(count: int) -> None:
    model = study.MixedSpec(attention_layers=count).build(53, seed=1)
    kinds = [mixer for mixer, _ in model.config.layer_kinds]
    assert kinds.count("attention") == count
    assert kinds.count("mamba") == study.LAYERS - count
    assert {feed_forward for _, feed_forward in model.config.layer_kinds} == {"dense"}
    # Rotary positions only where no recurrence tells the order.
    assert model.config.positions == ("rotary" if count == 4 else "none")
    for length in (1, 19):
        cache = model.new_cache(1, length)
        with torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.long), cache=cache)
        assert sum(study.memory_bytes(model, length).values()) == cache.used_bytes


def test_every_task_fits_and_asks_to_the_end() -> None:
    tasks = study.tasks()
    assert [task.pairs for task in tasks] == list(study.PAIRS)
    assert len({task.vocab_size for task in tasks}) == 1
    for task in tasks:
        batch = task.sample(3, torch.Generator().manual_seed(0))
        assert batch.input_ids.shape == (3, study.LENGTH)
        assert (batch.targets[:, 2 * task.pairs :] >= 0).all()


def test_one_run_answers_for_every_number_of_pairs() -> None:
    found = study.run(1, seed=0, steps=2, batch_size=2, sequences=4)
    assert len(found["accuracy"]) == len(study.PAIRS)
    assert found["steps"] == 2
    with pytest.raises(ValueError, match="device='cpu'"):
        study.attention_ratio("cuda")
