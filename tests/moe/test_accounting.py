"""What the closed forms say against what is counted in tensors, by torch's counter and by drawing lots."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medarch.moe import MoEConfig, MoELayer, moe_forward_reference
from medarch.moe.accounting import (
    count_layer_parameters,
    count_parameters,
    dense_flops_per_token,
    expected_distinct_experts,
    flops_per_token,
    measure_flops,
)
from medarch.moe.dense import DenseMLP

CONFIGS = [
    MoEConfig(7, 11, 5, 2),
    MoEConfig(7, 11, 5, 3, hidden_act="gelu", router_bias=True),
    MoEConfig(7, 11, 5, 1, norm_topk_prob=False),
    MoEConfig(7, 11, 1, 1),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_agree_with_the_layers_tensors(config: MoEConfig) -> None:
    layer = MoELayer(config)
    assert count_layer_parameters(layer) == count_parameters(config)
    assert count_parameters(config).total == sum(parameter.numel() for parameter in layer.parameters())


def test_parameters_worked_out_by_hand() -> None:
    count = count_parameters(MoEConfig(7, 11, 5, 2))
    assert (count.router, count.expert) == (35, 3 * 7 * 11)
    assert (count.total, count.active) == (35 + 5 * 231, 35 + 2 * 231)
    assert count_parameters(MoEConfig(7, 11, 5, 2, hidden_act="gelu")).expert == 2 * 7 * 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_resident_bytes_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    config = MoEConfig(7, 11, 5, 2)
    tensors = [torch.zeros(parameter.shape, dtype=dtype) for parameter in MoELayer(config).parameters()]
    assert count_parameters(config).resident_bytes(dtype) == sum(tensor.nbytes for tensor in tensors)


def test_a_full_size_layer_is_counted_without_memory() -> None:
    """The sizes of Mixtral 8x7B: 1.4 thousand million weights a layer, none of them allocated here."""
    config = MoEConfig(4096, 14336, 8, 2)
    with torch.device("meta"):
        layer = MoELayer(config)
    assert count_layer_parameters(layer) == count_parameters(config)
    assert count_parameters(config).total == 8 * 4096 + 8 * 3 * 4096 * 14336


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 13])
def test_flops_agree_with_torchs_counter(config: MoEConfig, tokens: int) -> None:
    assert measure_flops(MoELayer(config), tokens) == tokens * flops_per_token(config).total


def test_the_fast_layer_does_no_more_arithmetic_than_the_loop(generator: torch.Generator) -> None:
    layer = MoELayer(CONFIGS[0], generator)
    hidden_states = torch.randn(13, 7, generator=generator)
    counts = []
    for forward in (layer, lambda x: moe_forward_reference(layer, x)):
        with FlopCounterMode(display=False) as counter:
            forward(hidden_states)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_dense_flops_agree_with_torchs_counter(config: MoEConfig) -> None:
    for dense, experts in (
        (DenseMLP.of_active_size(config), config.num_experts_per_tok),
        (DenseMLP.of_total_size(config), config.num_experts),
    ):
        with FlopCounterMode(display=False) as counter:
            dense(torch.zeros(1, config.hidden_size))
        assert counter.get_total_flops() == dense_flops_per_token(config, experts) > 0


def test_an_operator_that_torch_cannot_count_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a layer built on it would seem to cost nothing."""
    from medarch.moe import accounting

    monkeypatch.setattr(accounting, "moe_forward_reference", lambda layer, x: torch.fft.rfft(x))
    with pytest.raises(ValueError, match="no formula for _fft_r2c"):
        measure_flops(MoELayer(CONFIGS[0]))


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0.0), (1, 2.0), (2, 2 + 3 * 2 / 5), (1000, 5.0)])
def test_expected_distinct_experts_worked_out_by_hand(tokens: int, expected: float) -> None:
    assert expected_distinct_experts(MoEConfig(7, 11, 5, 2), tokens) == pytest.approx(expected)


def test_expected_distinct_experts_agree_with_drawing_lots(generator: torch.Generator) -> None:
    draws = torch.rand(20_000, 3, 8, generator=generator).topk(2, dim=-1).indices
    distinct = torch.zeros(20_000, 8).scatter_(1, draws.flatten(1), 1.0).sum(dim=1)
    standard_error = float(distinct.std()) / 20_000**0.5
    expected = expected_distinct_experts(MoEConfig(7, 11, 8, 2), 3)
    assert float(distinct.mean()) == pytest.approx(expected, abs=4 * standard_error)


def test_a_negative_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens must not be negative, got -3"):
        expected_distinct_experts(CONFIGS[0], -3)
