"""The fast layer against its specification, against answers worked out by hand, and against bad input."""

from __future__ import annotations

import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medarch.moe import DenseMLP, MoEConfig, MoELayer, moe_forward_reference

CONFIGS = {
    "mixtral": MoEConfig(7, 11, 5, 2),
    "switch": MoEConfig(7, 11, 5, 1, norm_topk_prob=False),
    "not renormalised": MoEConfig(7, 11, 5, 3, norm_topk_prob=False),
    "softmax last": MoEConfig(7, 11, 5, 2, router_order="topk-then-softmax"),
    "gelu with router bias": MoEConfig(7, 11, 5, 2, hidden_act="gelu", router_bias=True),
    "every expert": MoEConfig(7, 11, 5, 5),
    "one expert": MoEConfig(7, 11, 1, 1),
}

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make_layer(config: MoEConfig, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> MoELayer:
    """A layer with weights large enough for its outputs, and all its decisions, to matter."""
    layer = MoELayer(config, generator).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.6, generator=generator)
    return layer


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=dtype)


def gradients(output: Tensor, hidden_states: Tensor, layer: MoELayer, cotangent: Tensor) -> dict[str, Tensor]:
    named = {"hidden_states": hidden_states, **dict(layer.named_parameters())}
    values = torch.autograd.grad(output, list(named.values()), cotangent)
    return dict(zip(named, values, strict=True))


def assert_same_function(layer: MoELayer, hidden_states: Tensor, cotangent: Tensor, mask: Tensor | None) -> None:
    """Output and every gradient of the layer against those of the loop over tokens."""
    hidden_states = hidden_states.clone().requires_grad_()
    output, _ = layer(hidden_states, mask)
    expected = moe_forward_reference(layer, hidden_states, mask)
    torch.testing.assert_close(output, expected)
    fast = gradients(output, hidden_states, layer, cotangent)
    slow = gradients(expected, hidden_states, layer, cotangent)
    assert slow["hidden_states"].abs().max() > 0.1
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_annotations_are_checked_in_these_tests(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    with pytest.raises(jaxtyping.TypeCheckError):
        layer(torch.zeros(3, 7, dtype=torch.float64), torch.ones(2, dtype=torch.bool))


@every_config
def test_equals_the_loop_over_tokens(config: MoEConfig, generator: torch.Generator) -> None:
    layer = make_layer(config, generator)
    hidden_states, cotangent = (randn(2, 13, 7, generator=generator) for _ in range(2))
    assert_same_function(layer, hidden_states, cotangent, None)


@every_config
def test_equals_the_loop_over_tokens_with_padding(config: MoEConfig, generator: torch.Generator) -> None:
    layer = make_layer(config, generator)
    hidden_states, cotangent = (randn(3, 5, 7, generator=generator) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([[5], [0], [3]])
    assert_same_function(layer, hidden_states, cotangent, mask)


@every_config
def test_gradients_are_those_of_finite_differences(config: MoEConfig, generator: torch.Generator) -> None:
    layer = make_layer(config, generator)
    names = [name for name, _ in layer.named_parameters()]
    hidden_states = randn(3, 7, generator=generator)
    probs = layer(hidden_states)[1].probs.sort(descending=True).values
    k = config.num_experts_per_tok
    # A finite difference across a change of experts would be no derivative.
    assert k == config.num_experts or (probs[:, k - 1] - probs[:, k]).min() > 1e-4

    def function(hidden_states: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        output, routing = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (hidden_states,))
        return output, routing.weights

    inputs = [hidden_states, *(parameter.detach().clone() for parameter in layer.parameters())]
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs], fast_mode=True)


def test_answer_worked_out_by_hand() -> None:
    """Three GELU experts that scale by 1, 2 and 3 what GELU leaves of one number; the token is (1, 0)."""
    layer = MoELayer(MoEConfig(2, 1, 3, 2, hidden_act="gelu")).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[0.0, 9.0], [math.log(3.0), 0.0], [math.log(6.0), 0.0]]))
        layer.experts.up_proj.fill_(1.0)
        layer.experts.down_proj.copy_(torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(3, 2, 1))
    output, routing = layer(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    # exp(logits) = 1, 3, 6: experts 2 and 1 win with 6/9 and 3/9.
    torch.testing.assert_close(routing.probs, torch.tensor([[0.1, 0.3, 0.6]], dtype=torch.float64))
    assert routing.indices.tolist() == [[2, 1]]
    torch.testing.assert_close(routing.weights, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))
    gelu_of_one = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    expected = gelu_of_one * (2 / 3 * 3 + 1 / 3 * 2)
    torch.testing.assert_close(output, torch.full((1, 2), expected, dtype=torch.float64))


def test_every_expert_chosen_is_the_dense_mixture(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["every expert"], generator)
    hidden_states = randn(3, 7, generator=generator)
    probs = (hidden_states @ layer.router.weight.T).softmax(dim=-1)
    inner = torch.einsum("th,euh->teu", hidden_states, layer.experts.gate_up_proj)
    inner = F.silu(inner[..., :11]) * inner[..., 11:]
    expected = torch.einsum("teu,ehu,te->th", inner, layer.experts.down_proj, probs)
    torch.testing.assert_close(layer(hidden_states)[0], expected)


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
def test_one_expert_is_the_dense_layer(hidden_act: str, generator: torch.Generator) -> None:
    config = MoEConfig(7, 11, 1, 1, hidden_act=hidden_act)
    layer, dense = make_layer(config, generator), DenseMLP.of_total_size(config).double()
    with torch.no_grad():
        for own, expert in zip(dense.parameters(), layer.experts.parameters(), strict=True):
            own.copy_(expert[0])
    hidden_states = randn(3, 7, generator=generator)
    output, routing = layer(hidden_states)
    torch.testing.assert_close(output, dense(hidden_states))
    assert routing.weights.eq(1).all()


def test_dense_layers_of_active_and_total_size() -> None:
    config = MoEConfig(7, 11, 5, 2)
    sizes = {
        "active": [tuple(weight.shape) for weight in DenseMLP.of_active_size(config).parameters()],
        "total": [tuple(weight.shape) for weight in DenseMLP.of_total_size(config).parameters()],
    }
    assert sizes == {"active": [(44, 7), (7, 22)], "total": [(110, 7), (7, 55)]}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(0, 17), k=st.integers(1, 5), renormalise=st.booleans())
def test_tokens_do_not_see_one_another(seed: int, tokens: int, k: int, renormalise: bool) -> None:
    """Permuting the tokens permutes outputs and routing: a batch is a set."""
    generator = torch.Generator().manual_seed(seed)
    layer = make_layer(MoEConfig(7, 11, 5, k, norm_topk_prob=renormalise and k > 1), generator)
    hidden_states = randn(tokens, 7, generator=generator)
    order = torch.randperm(tokens, generator=generator)
    output, routing = layer(hidden_states)
    permuted, permuted_routing = layer(hidden_states[order])
    torch.testing.assert_close(permuted, output[order])
    assert torch.equal(permuted_routing.indices, routing.indices[order])
    assert permuted_routing.statistics.counts.tolist() == routing.statistics.counts.tolist()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.lists(st.booleans(), max_size=13))
def test_padding_is_as_if_it_were_not_there(seed: int, keep: list[bool]) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = make_layer(CONFIGS["mixtral"], generator)
    mask = torch.tensor(keep, dtype=torch.bool)
    hidden_states = randn(len(keep), 7, generator=generator)
    output, routing = layer(hidden_states, mask)
    alone, alone_routing = layer(hidden_states[mask])
    torch.testing.assert_close(output[mask], alone)
    assert output[~mask].eq(0).all()
    assert routing.indices[~mask].eq(-1).all()
    assert routing.weights[~mask].eq(0).all()
    statistics, expected = routing.statistics, alone_routing.statistics
    assert statistics.tokens == sum(keep)
    assert statistics.counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(statistics.mean_probability, expected.mean_probability)
    assert statistics.entropy == pytest.approx(expected.entropy, nan_ok=True)


def test_padding_may_hold_anything_and_spoils_no_gradient(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    clean = randn(3, 7, generator=generator)
    mask = torch.tensor([True, False, True])
    cotangent = randn(3, 7, generator=generator)
    results = []
    for filler in (0.0, math.nan, math.inf):
        hidden_states = clean.masked_fill(~mask[:, None], filler).requires_grad_()
        output, _ = layer(hidden_states, mask)
        results.append([output, *gradients(output, hidden_states, layer, cotangent).values()])
    for values in zip(*results, strict=True):
        torch.testing.assert_close(values[1], values[0])
        torch.testing.assert_close(values[2], values[0])


def test_neither_padding_nor_an_idle_expert_is_work(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medarch.moe import experts

    layer = make_layer(CONFIGS["mixtral"], generator)
    rows = []
    original = experts.feed_forward

    def counting(batch: Tensor, *rest: object) -> Tensor:
        rows.append(len(batch))
        return original(batch, *rest)

    monkeypatch.setattr(experts, "feed_forward", counting)
    layer(randn(13, 7, generator=generator), torch.arange(13) < 3)
    assert sum(rows) == 3 * 2
    rows.clear()
    layer(randn(1, 7, generator=generator))
    assert rows == [1, 1], "an expert without tokens was called"


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (3, 7)], ids=["no token", "no position", "padding alone"])
def test_nothing_to_do_gives_zeros_and_a_gradient_of_zero(shape: tuple[int, ...], generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    hidden_states = randn(*shape, generator=generator).requires_grad_()
    mask = torch.zeros(shape[:-1], dtype=torch.bool)
    for output, routing in (layer(hidden_states, mask), *([layer(hidden_states)] if 0 in shape else [])):
        assert output.shape == shape
        assert output.eq(0).all()
        for gradient in gradients(output, hidden_states, layer, torch.ones(shape).double()).values():
            assert gradient.eq(0).all()
        statistics = routing.statistics
        assert statistics.tokens == 0
        assert statistics.counts.tolist() == [0] * 5
        assert math.isnan(statistics.entropy)
        assert math.isnan(statistics.max_over_mean_load)
    assert moe_forward_reference(layer, hidden_states, mask).shape == shape


def test_any_leading_shape(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    hidden_states = randn(2, 3, 5, 7, generator=generator)
    output, routing = layer(hidden_states)
    assert output.shape == (2, 3, 5, 7)
    assert routing.logits.shape == routing.probs.shape == (2, 3, 5, 5)
    assert routing.indices.shape == routing.weights.shape == (2, 3, 5, 2)
    torch.testing.assert_close(output[1, 2, 4], layer(hidden_states[1, 2, 4])[0])


def test_strided_input_and_expanded_gradient(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    strided = randn(7, 13, 2, generator=generator).permute(2, 1, 0)
    assert not strided.is_contiguous()
    hidden_states = strided.clone(memory_format=torch.preserve_format).requires_grad_()
    expanded = torch.ones((), dtype=torch.float64).expand(2, 13, 7)
    output, _ = layer(hidden_states)
    fast = gradients(output, hidden_states, layer, expanded)
    slow = gradients(moe_forward_reference(layer, hidden_states), hidden_states, layer, expanded.contiguous())
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name])


def test_used_twice_in_one_graph(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    hidden_states = randn(5, 7, generator=generator).requires_grad_()
    twice = layer(layer(hidden_states)[0])[0]
    expected = moe_forward_reference(layer, moe_forward_reference(layer, hidden_states))
    cotangent = randn(5, 7, generator=generator)
    for fast, slow in zip(
        gradients(twice, hidden_states, layer, cotangent).values(),
        gradients(expected, hidden_states, layer, cotangent).values(),
        strict=True,
    ):
        torch.testing.assert_close(fast, slow)


def test_second_derivatives_exist(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    hidden_states = randn(2, 7, generator=generator).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], [hidden_states])


def test_without_gradient(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    hidden_states = randn(5, 7, generator=generator)
    with torch.inference_mode():
        output, _ = layer(hidden_states)
    assert not output.requires_grad
    torch.testing.assert_close(output, layer(hidden_states)[0].detach())


def test_same_seed_same_weights() -> None:
    config = CONFIGS["mixtral"]
    first, second, other = (MoELayer(config, torch.Generator().manual_seed(seed)) for seed in (3, 3, 5))
    for own, same, different in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, same)
        assert not torch.equal(own, different)


def test_initial_weights_have_the_stated_spread() -> None:
    layer = MoELayer(MoEConfig(101, 211, initializer_range=0.05), torch.Generator().manual_seed(1))
    for name, parameter in layer.named_parameters():
        assert float(parameter.detach().std()) == pytest.approx(0.05, rel=0.05), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator, dtype)
    hidden_states = randn(13, 7, generator=generator).to(dtype).requires_grad_()
    output, routing = layer(hidden_states)
    assert output.dtype == dtype
    assert routing.logits.dtype == routing.probs.dtype == routing.weights.dtype == torch.float32
    tolerance = {"rtol": 0.05, "atol": 0.05 * float(output.detach().abs().max())}
    exact_layer = MoELayer(layer.config).double()
    exact_layer.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    exact, exact_routing = exact_layer(hidden_states.double())
    # The same decisions as in float64: the router does not round where the layer does.
    assert torch.equal(routing.indices, exact_routing.indices)
    torch.testing.assert_close(routing.weights, exact_routing.weights.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.double(), exact, **tolerance)
    output.sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())


def test_autocast_runs_the_experts_in_half_precision_and_the_router_in_full(
    generator: torch.Generator,
) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator, torch.float32)
    hidden_states = randn(13, 7, generator=generator, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, routing = layer(hidden_states)
        from_half, _ = layer(hidden_states.bfloat16())
    exact, exact_routing = layer(hidden_states)
    assert torch.equal(routing.logits, exact_routing.logits)
    assert output.dtype == torch.float32
    assert from_half.dtype == torch.bfloat16
    assert not torch.equal(output, exact)
    torch.testing.assert_close(output, exact, rtol=0.05, atol=0.05 * float(exact.detach().abs().max()))


BAD_INPUTS = {
    "last dimension": (torch.zeros(3, 5), None, r"shape \(3, 5\) must end in hidden_size=7"),
    "no dimension": (torch.zeros(()), None, r"shape \(\) must end in hidden_size=7"),
    "integers": (
        torch.zeros(3, 7, dtype=torch.int64),
        None,
        "int64 but the layer's weights are torch.float32",
    ),
    "other type": (torch.zeros(3, 7).double(), None, "float64 but the layer's weights are torch.float32"),
    "mask type": (torch.zeros(3, 7), torch.ones(3), "mask must be boolean.*float32"),
    "mask shape": (torch.zeros(3, 7), torch.ones(2, dtype=torch.bool), r"\(2,\) does not fit.*\(3, 7\)"),
    "mask of the full shape": (torch.zeros(3, 7), torch.ones(3, 7, dtype=torch.bool), "one value a token"),
}


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(("hidden_states", "mask", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_refused_at_the_door(hidden_states: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(CONFIGS["mixtral"])(hidden_states, mask)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused_with_its_place(value: float, generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    hidden_states = randn(2, 3, 7, generator=generator)
    hidden_states[1, 2, 4] = value
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 6 tokens, the first at index \(1, 2\)"):
        layer(hidden_states)


def test_a_diverged_router_and_an_overflow_are_told_apart(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator, torch.float32)
    hidden_states = randn(3, 7, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        layer.router.weight.fill_(2.0)
    with pytest.raises(ValueError, match="logits overflow"):
        layer(torch.full_like(hidden_states, 3e38))
    with torch.no_grad():
        layer.router.weight[2, 3] = math.nan
    with pytest.raises(ValueError, match="router's weights hold NaN"):
        layer(hidden_states)


def test_an_expert_that_does_not_exist_is_refused(generator: torch.Generator) -> None:
    layer = make_layer(CONFIGS["mixtral"], generator)
    tokens = randn(1, 7, generator=generator)
    with pytest.raises(ValueError, match="indices name expert 5, but num_experts=5"):
        layer.experts(tokens, torch.tensor([[0, 5]]), torch.ones(1, 2))
