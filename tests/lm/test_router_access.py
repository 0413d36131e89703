"""Routers are found in every family, by structure, and what is found is the model's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medarch.bench import records
from medarch.lm import study_routers
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.router_access import find_moe_blocks, router_weights
from medarch.moe.config import MoEConfig

NAMED = {
    "mixtral": ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"],
    "deepseek_v2": ["model.layers.1.mlp", "model.layers.2.mlp"],  # the first layer is dense
    "deepseek_v3": ["model.layers.1.mlp", "model.layers.2.mlp"],
    "jamba": ["model.layers.1.feed_forward"],
    "switch_transformers": ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"],
    "granitemoe": [f"model.layers.{i}.block_sparse_moe" for i in range(3)],
}


def ours(feed_forwards: tuple[str, ...] = ("moe", "dense")) -> Decoder:
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
        feed_forwards=feed_forwards,
        moe=MoEConfig(hidden_size=16, intermediate_size=12, num_experts=5, num_experts_per_tok=3)
        if "moe" in feed_forwards
        else None,
    )
    return Decoder(config, torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("family", NAMED)
def test_blocks_are_named_as_in_the_model_and_dense_layers_left_out(family: str) -> None:
    model = study_routers.build_tiny(family)
    blocks = find_moe_blocks(model)
    assert list(blocks) == NAMED[family]
    for name, block in blocks.items():
        assert block.experts is model.get_submodule(name).experts
        assert block.num_experts == 8
        assert block.num_experts_per_tok == (1 if family == "switch_transformers" else 3)


def test_our_own_decoder() -> None:
    model = ours()
    weights = router_weights(model)
    assert list(weights) == ["layers.0.feed_forward", "layers.2.feed_forward"]
    found = weights["layers.2.feed_forward"]
    assert (found.num_experts, found.num_experts_per_tok, found.bias) == (5, 3, None)
    assert torch.equal(found.weight, model.layers[2].feed_forward.router.weight)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("mixtral", "model.layers.1.mlp.gate.weight"),
        ("jamba", "model.layers.1.feed_forward.router.weight"),
        ("switch_transformers", "encoder.block.1.layer.1.mlp.router.classifier.weight"),
        ("dbrx", "transformer.blocks.1.ffn.router.layer.weight"),
        ("hunyuan_v1_moe", "model.layers.1.mlp.gate.wg.weight"),
        ("gemma4", "model.layers.1.router.proj.weight"),
        ("jetmoe", "model.layers.1.mlp.router.layer.weight"),
    ],
)
def test_weights_are_the_models_own_and_a_copy(family: str, path: str) -> None:
    model = study_routers.build_tiny(family)
    weights = router_weights(model)
    layer = next(name for name in weights if path.startswith(name + "."))
    live = dict(model.named_parameters())[path]
    copy = weights[layer].weight
    assert torch.equal(copy, live)
    assert not copy.requires_grad
    with torch.no_grad():
        copy.zero_()
    assert live.abs().sum() > 0


def test_a_bias_is_returned_with_the_matrix() -> None:
    model = study_routers.build_tiny("gpt_oss")
    found = router_weights(model)["model.layers.0.mlp"]
    assert found.bias is not None
    assert torch.equal(found.bias, model.model.layers[0].mlp.router.bias)


def test_a_model_without_router_is_an_error_that_names_its_class() -> None:
    for model in (ours(("dense",)), nn.Linear(2, 2)):
        for access in (find_moe_blocks, router_weights):
            with pytest.raises(ValueError, match=rf"^{type(model).__name__} has no router"):
                access(model)


def test_a_router_of_several_matrices_says_so() -> None:
    model = study_routers.build_tiny("zaya")
    with pytest.raises(ValueError, match=r"ZayaForCausalLM.*ZayaRouter.*no single matrix of 8 rows"):
        router_weights(model)


def test_sizes_that_are_nowhere_to_be_found_are_an_error() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Identity(), nn.Identity()

    with pytest.raises(ValueError, match=r"Sequential: the number of experts of 0 \(Identity\)"):
        find_moe_blocks(nn.Sequential(Block()))


def test_every_family_of_the_installed_transformers_is_known_or_named_as_missing() -> None:
    """A new family in transformers makes this fail, so that somebody decides what becomes of it."""
    listed = set(study_routers.families_in_transformers())
    assert set(study_routers.FAMILIES) <= listed
    assert listed - set(study_routers.FAMILIES) == set(study_routers.OUTSIDE)


def test_a_router_of_product_keys_is_refused_by_name() -> None:
    from transformers import DogeConfig, DogeForCausalLM

    config = DogeConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=3,
        is_moe=True,
    )
    with pytest.raises(ValueError, match="DogeForCausalLM has no router that this book knows how to find"):
        find_moe_blocks(DogeForCausalLM(config))


def test_the_record_says_what_the_page_says_of_it() -> None:
    results = records.load_named(study_routers.NAME, "cpu").results
    families = results["families"]
    assert set(families) == set(study_routers.FAMILIES)
    assert set(results["refused"]) == set(study_routers.OUTSIDE)
    assert all(found["logits_equal"] is True for found in families.values())
    otherwise = {name for name, found in families.items() if found["counts_equal_work"] is not True}
    assert otherwise == {"llama4", "nllb_moe"}
    assert families["nllb_moe"]["counts_equal_work"] is False
    assert families["llama4"]["counts_equal_work"] is None
    assert [name for name, found in families.items() if found["router"] is None] == ["zaya"]
    by_bias = [name for name, found in families.items() if found["top_k_of_logits"] < 1]
    assert {"deepseek_v2", "deepseek_v3", "glm4_moe", "switch_transformers"} <= set(by_bias)
    assert 30 <= len(by_bias) <= 40
