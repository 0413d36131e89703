"""The study of streaming: what is counted, what is extrapolated, and that its models read alike in both ways."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from medarch.data.pulse import load_recordings
from medarch.lm.study_streaming import MODELS, build, describe, held, signal, step_by_step


@torch.no_grad()
def test_models_are_matched_and_hold_what_they_say() -> None:
    samples = signal(300)
    found = {}
    for name in MODELS:
        model = build(name, 300, "cpu")
        state = model.new_state()
        sizes = []
        for part in samples.split((100, 57, 143), 1):
            model(part, state=state)
            sizes.append(held(state))
        found[name] = (model.parameter_count, sizes)
    weights = [count for count, _ in found.values()]
    assert max(weights) < 1.01 * min(weights)
    assert found["mamba"][1] == [2 * 4 * (128 * 16 + 128 * 3)] * 3
    assert found["window"][1] == [2 * 2 * 4 * 64 * kept for kept in (100, 157, 255)]
    assert found["full"][1] == [2 * 2 * 4 * 64 * seen for seen in (100, 157, 300)]


@torch.no_grad()
def test_step_by_step_counts_blocks_and_compares_both_ways() -> None:
    found = step_by_step(24, 8, 7, "cpu")
    assert set(found) == set(MODELS)
    for entry in found.values():
        assert len(entry["seconds"]) == len(entry["bytes"]) == 3
        assert 0 <= entry["difference"] < 1e-4
    assert json.loads(json.dumps(found)) == found
    assert found["full"]["bytes"][2] == 3 * found["full"]["bytes"][0]
    assert found["mamba"]["bytes"][2] == found["mamba"]["bytes"][0]


def test_what_is_not_measured_grows_with_the_square_and_says_so() -> None:
    blocks = {"weights": 5, "seconds": [1.0, 1, 2, 3, 3, 3, 3, 3, 4, 6], "bytes": [0] * 10, "difference": 0.0}
    found = describe(blocks, {"10": 2.0}, (10, 100))
    assert found["in_pieces"] == {
        "10": {"seconds": 2.0, "measured": True},
        "100": {"seconds": 200.0, "measured": False},
    }
    assert found["last_fifth_over_first"] == pytest.approx(5)
    assert found["seconds_per_step"] == 3


def test_the_signal_is_the_recording_over_and_over() -> None:
    recording = load_recordings()[1].signal
    long = signal(len(recording) + 3)[0, :, 0].numpy()
    assert long[:3].tolist() == long[-3:].tolist()
    assert long[: len(recording)].std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(np.corrcoef(long[: len(recording)], recording)[0, 1], 1, atol=1e-5)
