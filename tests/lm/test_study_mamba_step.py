"""The benchmark of a Mamba's training step at a small size: every model is there, held to transformers' first."""

from __future__ import annotations

import pytest
import torch

from medarch.bench.records import load_named
from medarch.lm import study_mamba_step
from medarch.lm.hybrid import HybridDecoder


def test_every_model_takes_part() -> None:
    results = study_mamba_step.mamba_step(quick=True)
    names = {"dense", "mamba", "hybrid", "transformers_llama", "transformers_mamba"}
    assert set(results["comparison"]["variants"]) == names
    assert results["comparison"]["baseline"] == "dense"
    assert set(results["sizes"]) == {"dense", "mamba", "hybrid"}


def test_what_disagrees_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = HybridDecoder.forward

    def wrong(self: HybridDecoder, *args: torch.Tensor, **more: object) -> object:
        output = forward(self, *args, **more)
        return output._replace(logits=output.logits * 1.01)

    monkeypatch.setattr(HybridDecoder, "forward", wrong)
    with pytest.raises(ValueError, match="MambaForCausalLM disagrees with ours in the scores"):
        study_mamba_step.mamba_step(quick=True)


def test_the_record_says_what_the_page_says_of_it() -> None:
    results = load_named("lm/mamba-step").results
    assert results["tokens"] == 2048
    ratios = {name: each["ratio"] for name, each in results["comparison"]["variants"].items()}
    assert ratios["mamba"]["low"] > 2
    assert ratios["mamba"]["high"] < 3
    assert ratios["mamba"]["median"] / ratios["transformers_llama"]["median"] < 3
    assert ratios["hybrid"]["low"] > 1
    assert ratios["hybrid"]["high"] < ratios["mamba"]["low"]
    assert ratios["transformers_mamba"]["low"] > ratios["mamba"]["high"]
