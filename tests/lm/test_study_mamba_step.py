"""The benchmark of a Mamba's training step at a small size: every model is there, held to transformers' first."""

from __future__ import annotations

import pytest
import torch

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
