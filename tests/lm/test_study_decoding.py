"""The study of decoding: models of equal size, the step that is timed, and where lines cross."""

from __future__ import annotations

import json

import pytest
import torch

from medarch.lm import study_decoding
from medarch.lm.decoder import Decoder
from medarch.lm.hybrid import HybridDecoder


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_a_quick_run_gives_every_quantity(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":  # the profiler takes a second each time, and has tests of its own
        monkeypatch.setattr(study_decoding, "peak_memory", lambda call, **_: call().numel())
    results = study_decoding.decoding(device, quick=True)
    json.dumps(results)
    assert results["contexts"].keys() == {"8", "16"}
    for context, each in results["contexts"].items():
        assert each["memory"]["transformer"]["cache"] == 2 * int(context) * 16 * (4 if device == "cpu" else 2)
        assert each["memory"]["mamba"]["cache"] == results["sizes"]["mamba"]["bytes_of_state"] > 0
        for batch in ("1", "2"):
            assert each["next_token"][batch]["launched"]["variants"].keys() == {"mamba", "transformer"}
    assert results["sizes"]["grouped"]["bytes_per_token"] * 2 == results["sizes"]["transformer"]["bytes_per_token"]
    assert results["sizes"]["mamba"]["bytes_per_token"] == 0
    assert results["transformers"].keys() == {"context", "mamba", "transformer"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_two_models_hold_equally_many_weights(device: str) -> None:
    chosen = study_decoding.scale(device, quick=False)
    with torch.device("meta"):
        sizes = [
            sum(weight.numel() for weight in model.parameters())
            for model in (HybridDecoder(chosen.mamba), Decoder(chosen.transformer))
        ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01
    if device == "cuda":
        assert sizes[0] == 2_768_345_600  # of state-spaces/mamba-2.8b-hf, by its own configuration


def test_the_step_that_is_timed_attends_to_the_whole_context() -> None:
    chosen = study_decoding.scale("cpu", quick=True)
    models = study_decoding.build_models(chosen, "cpu")
    seen = {}
    for name, model in models.items():
        model.register_forward_hook(
            lambda module, given, options, output, name=name: seen.setdefault(name, []).append(
                [layer.length for layer in options["cache"].layers]
            ),
            with_kwargs=True,
        )
        call = study_decoding.next_token(model, 11, batch=3)
        assert call().shape == (3,)
        assert call().shape == (3,)
    assert seen == {"mamba": [[12, 12]] * 2, "transformer": [[12]] * 2}


def test_lines_cross_on_a_straight_line_between_logarithms() -> None:
    assert study_decoding.crossing([(4, 4.0), (16, 0.25), (64, 0.1)]) == pytest.approx(8)
    assert study_decoding.crossing([(4, 2.0), (16, 0.25)]) == pytest.approx(4 * 4 ** (1 / 3))
    assert study_decoding.crossing([(4, 4.0), (16, 1.5)]) is None
    assert study_decoding.crossing([(4, 0.9), (16, 0.5)]) is None


def test_doubling_is_the_mean_factor_of_two_contexts_of_which_one_is_twice_the_other() -> None:
    def timed(seconds: float) -> dict[str, object]:
        return {"first_token": {"variants": {"mamba": {"seconds": {"median": seconds}}}}}

    assert study_decoding.doubling({"4": timed(1.0), "8": timed(5.0), "16": timed(9.0)}, "mamba") == pytest.approx(3)
    assert study_decoding.doubling({"4": timed(1.0), "64": timed(16.0)}, "mamba") == pytest.approx(2)
