"""The decoder against answers worked out by hand, against itself read in pieces, and against bad input."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medarch.lm.attention import CausalSelfAttention, attend, rotary_angles, rotate
from medarch.lm.cache import KeyValueCache
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder, RMSNorm
from medarch.moe import DenseMLP, MoEConfig, MoELayer

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 41,
    "initializer_range": 0.5,
}
MOE = MoEConfig(12, 7, 5, 2, initializer_range=0.5)
CONFIGS = {
    "dense": DecoderConfig(**SIZES),
    "moe": DecoderConfig(**SIZES, feed_forwards=("moe",), moe=MOE),
    "one of each": DecoderConfig(**SIZES, feed_forwards=("dense", "moe"), moe=MOE),
    "untied, a head of its own for each": DecoderConfig(
        **{**SIZES, "num_key_value_heads": None, "tie_word_embeddings": False}
    ),
    "two groups of two heads": DecoderConfig(
        **{**SIZES, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def tokens(batch: int, time: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, time), generator=generator)


# --- the parts ---


def test_rms_norm_worked_out_by_hand() -> None:
    norm = RMSNorm(2, eps=3.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0]))
    # (9 + 16) / 2 + 3.5 = 16, whose root is 4.
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.75, -2.0]]))


@given(scale=st.floats(0.1, 1e4))
def test_rms_norm_forgets_the_length_and_nothing_else(scale: float) -> None:
    vector = torch.tensor([0.3, -2.0, 1.1, 0.0, 4.0])
    norm = RMSNorm(5, eps=1e-12).requires_grad_(False)
    normed = norm(vector)
    torch.testing.assert_close(norm(scale * vector), normed)
    assert float(normed.square().mean()) == pytest.approx(1)
    assert float(F.cosine_similarity(normed, vector, dim=0)) == pytest.approx(1)


def test_rms_norm_in_short_formats_squares_in_a_long_one() -> None:
    # 300 squared is beyond float16's largest number, 65,504.
    out = RMSNorm(2).half()(torch.full((1, 2), 300.0, dtype=torch.float16))
    assert out.dtype == torch.float16
    assert out.tolist() == [[1.0, 1.0]]


def test_rotation_worked_out_by_hand() -> None:
    """Base 100 and four numbers: the first pair turns by the position, the second by a tenth of it."""
    cos, sin = rotary_angles(torch.tensor([0, 2]), 4, theta=100.0)
    heads = torch.tensor([1.0, 0.0, 0.0, 3.0]).expand(1, 1, 2, 4)
    turned = rotate(heads, cos, sin)[0, 0]
    # Pairs are (0, 2) and (1, 3): (1, 0) turned by 2, and (0, 3) turned by 0.2.
    expected = torch.tensor([[1.0, 0.0, 0.0, 3.0], [math.cos(2), -3 * math.sin(0.2), math.sin(2), 3 * math.cos(0.2)]])
    torch.testing.assert_close(turned, expected)


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 500), second=st.integers(0, 500), shift=st.integers(0, 1500), seed=st.integers(0, 99))
def test_rotated_vectors_know_their_distance_alone(first: int, second: int, shift: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 1, 1, 10, generator=generator)

    def product(at: int, to: int) -> Tensor:
        ends = [rotate(vector, *rotary_angles(torch.tensor([p]), 10)) for vector, p in ((query, at), (key, to))]
        for vector, end in zip((query, key), ends, strict=True):
            torch.testing.assert_close(end.norm(), vector.norm())
        return (ends[0] * ends[1]).sum()

    torch.testing.assert_close(product(first, second), product(first + shift, second + shift), rtol=0, atol=5e-3)


def test_rotation_at_a_distance_is_not_none() -> None:
    vector = torch.ones(1, 1, 1, 10)
    ends = [rotate(vector, *rotary_angles(torch.tensor([p]), 10)) for p in (0, 1, 5)]
    products = [float((ends[0] * end).sum()) for end in ends]
    assert products[0] == pytest.approx(10)
    assert products[1] < 9.6
    assert products[2] < products[1]


@pytest.mark.parametrize(("new", "time"), [(7, 7), (1, 7), (3, 7), (1, 1), (6, 7)])
def test_attention_equals_a_loop_over_heads_and_positions(new: int, time: int, generator: torch.Generator) -> None:
    queries = torch.randn(2, 4, new, 5, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 2, time, 5, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(queries)
    for row in range(2):
        for head in range(4):
            for i in range(new):
                end = time - new + i + 1  # as far as this query may look
                seen, held = keys[row, head // 2, :end], values[row, head // 2, :end]
                weights = torch.exp(seen @ queries[row, head, i] / math.sqrt(5))
                expected[row, head, i] = weights @ held / weights.sum()
    torch.testing.assert_close(attend(queries, keys, values), expected)


def test_the_weights_of_attention_are_those_that_forward_applies(generator: torch.Generator) -> None:
    config = CONFIGS["two groups of two heads"]
    mixer = CausalSelfAttention(config, generator).double()
    inputs = torch.randn(3, 11, 24, generator=generator, dtype=torch.float64)
    weights = mixer.attention_weights(inputs)
    assert weights.shape == (3, 4, 11, 11)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 11, dtype=torch.float64))
    assert not weights.triu(1).any()
    values = mixer.project(inputs)[2].repeat_interleave(2, dim=1)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(F.linear(mixed, mixer.o_proj), mixer(inputs))


def test_shared_keys_and_values_are_those_of_every_head_given_a_copy(generator: torch.Generator) -> None:
    shared = CausalSelfAttention(CONFIGS["two groups of two heads"], generator)
    each = CausalSelfAttention(dataclasses.replace(shared.config, num_key_value_heads=4), generator)
    with torch.no_grad():
        each.q_proj.copy_(shared.q_proj)
        each.o_proj.copy_(shared.o_proj)
        for name in ("k_proj", "v_proj"):
            groups = getattr(shared, name).unflatten(0, (2, 6))
            getattr(each, name).copy_(groups[[0, 0, 1, 1]].flatten(0, 1))
    inputs = torch.randn(3, 13, 24, generator=generator)
    torch.testing.assert_close(each(inputs), shared(inputs))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_gradients_of_a_layer_are_those_of_finite_differences(kind: str, generator: torch.Generator) -> None:
    layer = Decoder(CONFIGS[kind], generator).layers[0].double()
    inputs = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(hidden_states: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (hidden_states,))[0]

    weights = [weight.detach().clone().requires_grad_() for weight in layer.parameters()]
    assert torch.autograd.gradcheck(function, [inputs, *weights], fast_mode=True)


def test_a_layer_that_answers_nothing_leaves_the_stream_as_it_is(generator: torch.Generator) -> None:
    stream = torch.randn(2, 7, 12, generator=generator)
    for kind in ("dense", "moe"):
        layer = Decoder(CONFIGS[kind], generator).layers[0]
        experts = layer.feed_forward.experts if kind == "moe" else layer.feed_forward
        with torch.no_grad():
            experts.down_proj.zero_()
            torch.testing.assert_close(layer(stream)[0], stream + layer.mixer(layer.mixer_norm(stream)))
            layer.mixer.o_proj.zero_()
            torch.testing.assert_close(layer(stream)[0], stream)


# --- the whole ---


@every_config
def test_no_position_sees_what_comes_after_it(config: DecoderConfig, generator: torch.Generator) -> None:
    model = Decoder(config, generator)
    ids = tokens(2, 17, generator)
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 5) % config.vocab_size
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :9], before[:, :9])
    moved = (after - before).abs().amax(dim=(0, 2))
    assert (moved[9:] > 1e-3).all()


@every_config
@pytest.mark.parametrize("cuts", [[17], [1] * 17, [5, 1, 1, 10], [3, 7, 2, 5], [16, 1]], ids=str)
def test_reading_in_pieces_is_reading_at_once(
    config: DecoderConfig, cuts: list[int], generator: torch.Generator
) -> None:
    model = Decoder(config, generator).eval()
    ids = tokens(3, 17, generator)
    cache = model.new_cache(3, 19)
    with torch.no_grad():
        whole = model(ids).logits
        pieces = [model(piece, cache=cache).logits for piece in ids.split(cuts, dim=1)]
    assert cache.length == 17
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


@every_config
def test_padding_behind_a_text_changes_nothing_before_it(config: DecoderConfig, generator: torch.Generator) -> None:
    model = Decoder(config, generator)
    ids, lengths = tokens(3, 13, generator), [13, 4, 7]
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        together = model(ids, mask).logits
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length])
            torch.testing.assert_close(together[row, :length], alone.logits[0], rtol=1e-4, atol=1e-4)


def test_padding_enters_no_statistic(generator: torch.Generator) -> None:
    model = Decoder(CONFIGS["one of each"], generator)
    ids = tokens(2, 13, generator)
    mask = torch.arange(13) < torch.tensor([[13], [4]])
    dense, routed = model(ids, mask).routings
    assert dense is None
    assert int((routed.indices[..., 0] >= 0).sum()) == 17
    assert torch.equal(routed.indices[..., 0] >= 0, mask)


@every_config
def test_only_the_last_positions_are_scored_where_that_is_wanted(
    config: DecoderConfig, generator: torch.Generator
) -> None:
    model = Decoder(config, generator)
    ids = tokens(2, 7, generator)
    with torch.no_grad():
        whole = model(ids).logits
        for kept in (1, 3, 7):
            torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, whole[:, -kept:])


def test_a_pattern_fills_the_layers(generator: torch.Generator) -> None:
    config = DecoderConfig(**{**SIZES, "num_hidden_layers": 6}, feed_forwards=("dense", "dense", "moe"), moe=MOE)
    model = Decoder(config, generator)
    kinds = [MoELayer if kind == "moe" else DenseMLP for _, kind in config.layer_kinds]
    assert kinds == [DenseMLP, DenseMLP, MoELayer] * 2
    assert [type(layer.feed_forward) for layer in model.layers] == kinds
    routings = model(tokens(1, 3, generator)).routings
    assert [routing is not None for routing in routings] == [kind is MoELayer for kind in kinds]


def test_every_parameter_has_a_gradient_and_the_sizes_are_as_counted(generator: torch.Generator) -> None:
    for name, config in CONFIGS.items():
        model = Decoder(config, generator)
        output = model(tokens(5, 11, generator))
        model.loss(output, tokens(5, 11, generator))[0].backward()
        assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters()), name
    d, v, m, groups, heads = 24, 31, 14, 2, 4
    layer = d * d * 2 + 2 * d * d * groups // heads + 3 * d * m + 2 * d
    counted = sum(weight.numel() for weight in Decoder(CONFIGS["two groups of two heads"]).parameters())
    assert counted == v * d + 2 * layer + d


def test_a_tied_head_is_the_embedding(generator: torch.Generator) -> None:
    tied, untied = Decoder(CONFIGS["dense"], generator), Decoder(CONFIGS["untied, a head of its own for each"])
    assert tied.lm_head_weight is tied.embed_tokens.weight
    assert untied.lm_head_weight is not untied.embed_tokens.weight
    assert not torch.equal(untied.lm_head_weight, untied.embed_tokens.weight)


def test_one_seed_is_one_model() -> None:
    models = [Decoder(CONFIGS["one of each"], torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    weights = [torch.cat([weight.flatten() for weight in model.parameters()]) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(Decoder(CONFIGS["dense"], torch.Generator().manual_seed(5)).embed_tokens.weight.detach().std()) == (
        pytest.approx(0.5, rel=0.15)
    )


def test_scores_are_float32_whatever_the_weights(generator: torch.Generator) -> None:
    model = Decoder(CONFIGS["dense"], generator)
    ids = tokens(2, 9, generator)
    with torch.no_grad():
        exact = model(ids).logits
        short = model.to(torch.bfloat16)(ids).logits
    assert short.dtype == torch.float32
    assert float((short - exact).norm() / exact.norm()) < 0.03


# --- the loss ---


def test_the_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary(
    generator: torch.Generator,
) -> None:
    model = Decoder(CONFIGS["dense"], generator)
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    total, parts = model.loss(model(tokens(2, 5, generator)), tokens(2, 5, generator))
    assert float(total.detach()) == pytest.approx(math.log(31))
    assert parts == {"cross_entropy": pytest.approx(math.log(31))}


def test_the_loss_leaves_out_what_is_to_be_ignored(generator: torch.Generator) -> None:
    model = Decoder(CONFIGS["dense"], generator)
    output, targets = model(tokens(2, 5, generator)), tokens(2, 5, generator)
    targets[0, 1:] = targets[1] = -100
    expected = -output.logits[0, 0].log_softmax(-1)[targets[0, 0]]
    torch.testing.assert_close(model.loss(output, targets)[0], expected)


def test_the_routers_losses_are_added_with_their_weights(generator: torch.Generator) -> None:
    config = dataclasses.replace(CONFIGS["moe"], router_aux_loss_coef=0.25, router_z_loss_coef=0.125)
    model = Decoder(config, generator)
    total, parts = model.loss(model(tokens(2, 5, generator)), tokens(2, 5, generator))
    assert parts["load_balancing"] > 0.9
    assert parts["router_z"] > 0
    expected = parts["cross_entropy"] + 0.25 * parts["load_balancing"] + 0.125 * parts["router_z"]
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


# --- configuration and bad input ---


@every_config
def test_a_configuration_survives_json(config: DecoderConfig) -> None:
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers .* True"),
        ({"hidden_size": 12.0}, "hidden_size .* 12.0"),
        ({"hidden_size": 13}, "hidden_size=13 .* num_attention_heads=3"),
        ({"hidden_size": 9}, "hidden_size=9 .* num_attention_heads=3 .* even"),
        ({"num_key_value_heads": 2}, "num_attention_heads=3 .* num_key_value_heads=2"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"mixers": ("memory",)}, "mixers names 'memory'"),
        ({"mixers": ()}, "pattern of 0"),
        ({"feed_forwards": ("dense",) * 3}, "pattern of 3, which does not fill num_hidden_layers=2"),
        ({"feed_forwards": ("moe",)}, "moe is None"),
        ({"moe": MOE}, "names no 'moe'"),
        ({"router_aux_loss_coef": 0.1}, "no router"),
        ({"router_z_loss_coef": -0.1}, "router_z_loss_coef"),
        ({"feed_forwards": ("moe",), "moe": MoEConfig(10, 7, 5, 2)}, "moe.hidden_size=10 .* hidden_size=12"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**(SIZES | changes))


@pytest.mark.parametrize("fields", [{**SIZES, "heads": 3}, {"vocab_size": 31}])
def test_fields_of_something_else_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="do not describe a decoder"):
        DecoderConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"\(batch, time\)"),
        (torch.zeros(2, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(2, 3), "whole numbers"),
        (torch.tensor([[3, 31]]), "hold 31, but the vocabulary has tokens 0 to 30"),
        (torch.tensor([[3, -1]]), "hold -1"),
        (torch.zeros(1, 42, dtype=torch.long), "42 tokens exceed .* max_position_embeddings=41"),
    ],
)
def test_tokens_that_the_model_cannot_read_are_refused(ids: Tensor, message: str, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(CONFIGS["dense"], generator)(ids)


def test_padding_before_a_text_and_a_full_cache_are_refused(generator: torch.Generator) -> None:
    model = Decoder(CONFIGS["moe"], generator)
    with pytest.raises(ValueError, match="right end"):
        model(tokens(1, 3, generator), torch.tensor([[True, False, True]]))
    cache = model.new_cache(2, 5)
    model(tokens(2, 4, generator), cache=cache)
    with pytest.raises(ValueError, match="room for 5 positions and holds 4: 2 more"):
        model(tokens(2, 2, generator), cache=cache)
    with pytest.raises(ValueError, match="holds a batch of 2, the input is a batch of 3"):
        model(tokens(3, 1, generator), cache=cache)
    assert cache.length == 4
    with pytest.raises(ValueError, match="cache for 42 positions, but the context is max_position_embeddings=41"):
        model.new_cache(1, 42)


def test_a_cache_and_its_context_end_together(generator: torch.Generator) -> None:
    model = Decoder(CONFIGS["dense"], generator)
    cache = model.new_cache(1)
    model(tokens(1, 41, generator), cache=cache)
    with pytest.raises(ValueError, match="42 tokens exceed the context"):
        model(tokens(1, 1, generator), cache=cache)


def test_the_cache_knows_its_size(generator: torch.Generator) -> None:
    model = Decoder(CONFIGS["two groups of two heads"], generator)
    cache = model.new_cache(3, 19)
    model(tokens(3, 5, generator), cache=cache)
    # Keys and values of two layers, two groups of six numbers of four bytes, three rows, five positions.
    assert cache.used_bytes == 2 * 2 * 2 * 6 * 4 * 3 * 5
    assert KeyValueCache(3, 2, 19, 6, torch.bfloat16).bytes_per_position == 2 * 2 * 6 * 2 * 3


@pytest.mark.parametrize("kept", [-1, -3])
def test_a_negative_number_of_scores_is_refused(kept: int, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=f"logits_to_keep={kept}"):
        Decoder(CONFIGS["dense"], generator)(tokens(1, 5, generator), logits_to_keep=kept)
