"""The delay task, its models and its study."""

from __future__ import annotations

import json

import pytest
import torch

from medarch.ssm.delay import Listener, delay_batch, impulse_answer, train_listener
from medarch.ssm.study_delay import delay_study


def test_what_is_to_be_said_is_what_was_heard() -> None:
    noise, heard = delay_batch(5, torch.Generator().manual_seed(0), batch=2, time=13)
    assert heard.shape == (2, 8, 1)
    torch.testing.assert_close(heard[:, 3], noise[:, 3])  # to be said at step 8
    whole, _ = delay_batch(0, torch.Generator().manual_seed(0), batch=2, time=13)
    torch.testing.assert_close(whole, noise)


@pytest.mark.parametrize("lag", [-1, 13, 14])
def test_a_lag_that_leaves_nothing_to_say_is_refused(lag: int) -> None:
    with pytest.raises(ValueError, match=f"lag={lag} must be at least 0 and less than time=13"):
        delay_batch(lag, torch.Generator(), time=13)


def test_s4d_learns_a_short_delay_and_its_impulse_answer_shows_it() -> None:
    trained = train_listener("lin", 7, seed=0, steps=60)
    assert len(trained.losses) == 60
    assert trained.error < 0.5
    answer = impulse_answer(trained.model, 40)
    assert int(answer.abs().argmax()) == 7
    assert float(answer[7]) > 0.5


def test_without_oscillation_it_does_not() -> None:
    assert train_listener("real", 7, seed=0, steps=60).error > 0.7


def test_of_s4d_the_impulse_answer_is_all_that_it_computes() -> None:
    model = Listener("lin", torch.Generator().manual_seed(0), 5, 6)
    u = torch.randn(1, 23, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        silence = model(torch.zeros(1, 23, 1))
        answer = impulse_answer(model, 23)
        expected = torch.stack([(answer[: t + 1].flip(0) * u[0, : t + 1, 0]).sum() for t in range(23)])
        torch.testing.assert_close((model(u) - silence)[0, :, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lin", "gru"])
def test_the_seed_decides_everything(kind: str) -> None:
    runs = [train_listener(kind, 3, seed, steps=2) for seed in (4, 4, 5)]
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].error == runs[1].error


def test_refused() -> None:
    with pytest.raises(ValueError, match="kind='lstm' is not one of"):
        Listener("lstm", torch.Generator())
    with pytest.raises(ValueError, match=r"steps=0 and learning_rate=0\.01 must be positive"):
        train_listener("lin", 3, 0, steps=0)


def test_a_quick_study_has_every_kind_and_number(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("medarch.bench.partial.repository_root", lambda: tmp_path)
    results = delay_study(quick=True)
    json.dumps(results)
    assert set(results["kinds"]) == {"lin", "real", "gru"}
    for kind, found in results["kinds"].items():
        assert len(found["lags"]["5"]["error"]["values"]) == results["repeats"] == 2
        assert found["state_numbers"] == (64 if kind == "gru" else 16 * 64)
    with pytest.raises(ValueError, match="runs on the CPU alone"):
        delay_study(device="cuda")
