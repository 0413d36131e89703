"""The study of a training step: both libraries do the same work, and the page says what its record says."""

from __future__ import annotations

import pytest
import torch

from medarch.bench.records import load_named
from medarch.lm import study_step
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.recipes import RECIPES
from medarch.moe.config import MoEConfig

TOKENS = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(7))


def decoder(kind: str) -> Decoder:
    moe = MoEConfig(24, 20, num_experts=8, num_experts_per_tok=2) if kind == "moe" else None
    config = DecoderConfig(61, 24, 40, 2, 3, 1, feed_forwards=(kind,), moe=moe, router_aux_loss_coef=0.01 * bool(moe))
    return Decoder(config, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_twin_does_the_same_work_and_another_is_not_timed(kind: str) -> None:
    ours = decoder(kind)
    theirs = study_step.transformers_twin(ours)
    study_step.check_agreement(ours, theirs, TOKENS)
    with torch.no_grad():
        theirs.model.norm.weight.mul_(1.05)
    with pytest.raises(ValueError, match="disagrees with ours in the scores"):
        study_step.check_agreement(ours, theirs, TOKENS)


def test_a_step_moves_the_weights() -> None:
    model = decoder("moe")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    study_step.step(model, study_step.own_loss(model, TOKENS))()
    assert not [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]


def test_the_record_says_what_the_page_says_of_it() -> None:
    results = load_named("lm/training-step").results
    for kind, sizes in results["sizes"].items():
        recipe = RECIPES[kind].model.to_dict()
        assert {**sizes, "initializer_range": 0, "moe": None} == {**recipe, "initializer_range": 0, "moe": None}
    widths = {key: results["sizes"]["moe"]["moe"][key] for key in ("intermediate_size", "num_experts")}
    assert widths == {"intermediate_size": 160, "num_experts": 8}
    comparison = results["comparison"]
    assert (comparison["baseline"], comparison["threads"]) == ("dense", 1)
    assert comparison["coverage"] >= 0.95
    ratio = {name: variant["ratio"] for name, variant in comparison["variants"].items()}
    assert 1 < ratio["moe"]["low"] < ratio["moe"]["high"] < 4 / 3
    assert ratio["transformers_llama"]["low"] < 1 < ratio["transformers_llama"]["high"]
    assert ratio["moe"]["low"] < ratio["transformers_mixtral"]["high"]
    assert ratio["transformers_mixtral"]["low"] < ratio["moe"]["high"]
