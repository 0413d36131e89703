"""Decoders of attention and state spaces: patterns, memory, generation, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from medarch.lm.attention import CausalSelfAttention
from medarch.lm.catalogue import config_from_dict, count_parameters, find_recipe, make_decoder, recipe_names
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.generation import generate
from medarch.lm.hybrid import HybridAttention, HybridDecoder
from medarch.lm.hybrid_config import HybridConfig
from medarch.moe.config import MoEConfig
from medarch.moe.shared import SharedExpertMoE
from medarch.ssm.config import MambaConfig
from medarch.ssm.mamba2_config import Mamba2Config

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MAMBA = MambaConfig(24, state_size=5)
CONFIGS = {
    "mamba": HybridConfig(**SIZES, mixers=("mamba",), feed_forwards=("none",), mamba=MAMBA),
    "jamba": HybridConfig(
        **SIZES,
        mixers=("mamba", "mamba", "attention", "mamba"),
        feed_forwards=("dense", "moe"),
        mamba=dataclasses.replace(MAMBA, inner_norms=True),
        moe=MoEConfig(24, 16, num_experts=5, norm_topk_prob=False, initializer_range=0.2),
        positions="none",
        tie_word_embeddings=False,
    ),
    "granite": HybridConfig(
        **SIZES,
        mixers=("mamba2", "attention"),
        feed_forwards=("moe",),
        mamba2=Mamba2Config(24, state_size=5, head_dim=6, n_groups=2, chunk_size=4),
        moe=MoEConfig(24, 16, num_experts=5, router_order="topk-then-softmax", initializer_range=0.2),
        shared_intermediate_size=20,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
}


def build(name: str) -> HybridDecoder:
    return HybridDecoder(CONFIGS[name], torch.Generator().manual_seed(0))


def tokens(time: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(61, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cuts", [[1] * 11, [4, 1, 6], [11]])
def test_in_pieces_the_scores_are_those_of_the_whole(name: str, cuts: list[int]) -> None:
    model, ids = build(name).double(), tokens(11)
    with torch.no_grad():
        cache = model.new_cache(2, 11)
        pieces = [model(piece, cache=cache).logits for piece in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits)
    assert cache.length == 11


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_and_without_memory(name: str) -> None:
    model = build(name).double()
    assert torch.equal(generate(model, tokens(5), 12), generate(model, tokens(5), 12, use_cache=False))


def test_the_state_stays_and_keys_and_values_grow() -> None:
    model = build("jamba")
    cache = model.new_cache(2, 30)
    used = []
    with torch.no_grad():
        for _ in range(3):
            model(tokens(10), cache=cache)
            used.append((cache.state_bytes, cache.key_value_bytes, cache.used_bytes))
    states, grown, both = zip(*used, strict=True)
    # Three Mamba layers, 2 sequences, 48 channels of 5 numbers and 3 inputs of the convolution, 4 bytes each.
    assert states == (3 * 2 * 48 * (5 + 3) * 4,) * 3
    # One attention layer: keys and values of one head of 8 numbers.
    assert grown == tuple(2 * 2 * 8 * 4 * length for length in (10, 20, 30))
    assert both == tuple(map(sum, zip(states, grown, strict=True)))


def test_attention_alone_is_the_plain_decoder() -> None:
    plain = Decoder(DecoderConfig(**SIZES), torch.Generator().manual_seed(0))
    hybrid = HybridDecoder(HybridConfig(**SIZES), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), hybrid.parameters(), strict=True))
    torch.testing.assert_close(plain(tokens(9)).logits, hybrid(tokens(9)).logits)


def test_without_positions_attention_does_not_know_the_order() -> None:
    config = dataclasses.replace(CONFIGS["jamba"], mixers=("attention",), mamba=None)
    layer = HybridAttention(config, torch.Generator().manual_seed(0))
    states = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(2))
    order = torch.tensor([3, 0, 4, 1, 2, 5])
    torch.testing.assert_close(layer(states)[:, -1], layer(states[:, order])[:, -1])
    turned = HybridAttention(dataclasses.replace(config, positions="rotary"), torch.Generator().manual_seed(0))
    assert not torch.allclose(turned(states)[:, -1], turned(states[:, order])[:, -1])


def test_the_multiplier_is_the_scale_of_the_scores() -> None:
    config = HybridConfig(**SIZES)
    scaled = dataclasses.replace(config, attention_multiplier=2 * config.head_dim**-0.5)
    states = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(2))
    layers = [HybridAttention(each, torch.Generator().manual_seed(0)) for each in (config, scaled)]
    with torch.no_grad():
        layers[0].q_proj *= 2
    torch.testing.assert_close(layers[0](states), layers[1](states))
    plain = CausalSelfAttention(config, torch.Generator().manual_seed(0))
    assert not torch.allclose(plain(states), layers[1](states))


def test_multipliers_and_scaling_by_hand() -> None:
    model = build("granite")
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer_norm.weight.zero_()
            layer.feed_forward_norm.weight.zero_()
        ids = tokens(3)
        hidden = 3.0 * model.embed_tokens(ids)
        # Nothing is added to the stream; the norm takes the multiplier of the embedding out again.
        wanted = model.norm(hidden) @ model.embed_tokens.weight.T / 2.0
        torch.testing.assert_close(model(ids).logits, wanted)
    assert isinstance(model.layers[0].feed_forward, SharedExpertMoE)


def test_the_residual_multiplier_scales_what_is_added() -> None:
    full = HybridDecoder(dataclasses.replace(CONFIGS["granite"], residual_multiplier=1.0))
    half = build("granite")
    full.load_state_dict(half.state_dict())
    states = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(full.layers, half.layers, strict=True):
        ours.feed_forward = theirs.feed_forward = None
        torch.testing.assert_close(0.5 * (ours(states)[0] - states), theirs(states)[0] - states)


def test_a_stream_in_float32_keeps_what_bfloat16_loses() -> None:
    config = CONFIGS["mamba"]
    exact = build("mamba")
    wide = HybridDecoder(dataclasses.replace(config, residual_in_fp32=True))
    narrow = HybridDecoder(config)
    errors = []
    with torch.no_grad():
        for model in (wide, narrow):
            model.load_state_dict(exact.state_dict())
            model.bfloat16()
            errors.append((model(tokens(30)).logits - exact(tokens(30)).logits).square().mean())
    assert errors[0] < errors[1]


def test_a_loss_reaches_every_weight() -> None:
    for name in CONFIGS:
        model = build(name)
        ids = tokens(20, batch=4)
        model.loss(model(ids[:, :-1]), ids[:, 1:])[0].backward()
        idle = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
        assert not idle, (name, idle)


@pytest.mark.parametrize("config", [*CONFIGS.values(), DecoderConfig(**SIZES)])
def test_a_configuration_survives_json(config: DecoderConfig) -> None:
    import json

    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert type(make_decoder(again)) is (HybridDecoder if isinstance(config, HybridConfig) else Decoder)


def test_the_recipes_are_of_one_active_size() -> None:
    active = {name: count_parameters(find_recipe(name).model)[1] for name in recipe_names()}
    assert max(active.values()) / min(active.values()) < 1.03
    assert len({find_recipe(name).training for name in recipe_names()}) == 1
    model = find_recipe("hybrid").build()
    assert sum(weight.numel() for weight in model.parameters()) == active["hybrid"]
    with pytest.raises(ValueError, match="no recipe 'rnn'; there are: dense, moe, mamba, hybrid"):
        find_recipe("rnn")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mixers": ("rnn",)}, "mixers names 'rnn'"),
        ({"mixers": ("mamba",)}, "mixers names 'mamba' but mamba is None"),
        ({"mamba": MAMBA}, "mamba is given but mixers=.*names no 'mamba'"),
        ({"mixers": ("mamba",), "mamba": MambaConfig(23)}, "mamba.hidden_size=23 differs from hidden_size=24"),
        ({"positions": "learned"}, "positions must be one of"),
        ({"logits_scaling": 0}, "logits_scaling must be a positive and finite number"),
        ({"attention_multiplier": "x"}, "attention_multiplier must be a positive"),
        ({"shared_intermediate_size": 8}, "shared_intermediate_size=8 stands beside a mixture"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be True or False"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 1, "positions": "none"},
            "num_attention_heads=5 must divide",
        ),
        ({"hidden_size": 27, "num_attention_heads": 9}, "even head size"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        HybridConfig(**{**SIZES, **fields})


def test_heads_may_be_odd_where_nothing_turns_them() -> None:
    HybridConfig(**{**SIZES, "hidden_size": 27, "num_attention_heads": 9, "positions": "none"})
    HybridConfig(**{**SIZES, "hidden_size": 23}, mixers=("mamba",), feed_forwards=("none",), mamba=MambaConfig(23))
