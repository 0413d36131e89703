"""The Mamba mixer against transformers', its state, its convolution, and its selection."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig as TheirConfig
from transformers.models.mamba.modeling_mamba import MambaMixer as TheirMixer

from medarch.ssm.causal_conv import causal_conv
from medarch.ssm.config import MambaConfig
from medarch.ssm.mamba import MambaMixer
from medarch.ssm.state import RecurrentState

CONFIGS = [
    MambaConfig(13, state_size=5, conv_kernel=3, time_step_rank=2),
    MambaConfig(18, state_size=7, use_bias=True, expand=3),
    MambaConfig(7, state_size=1, use_conv_bias=False, conv_kernel=2),
]


def mixer(config: MambaConfig, seed: int = 0) -> MambaMixer:
    return MambaMixer(config, torch.Generator().manual_seed(seed))


def inputs(config: MambaConfig, time: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, time, config.hidden_size, generator=torch.Generator().manual_seed(1))


def their_twin(ours: MambaMixer) -> TheirMixer:
    config = ours.config
    theirs = TheirMixer(
        TheirConfig(
            hidden_size=config.hidden_size,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            expand=config.expand,
            time_step_rank=config.rank,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    ).eval()
    weights = {
        "in_proj.weight": ours.in_proj,
        "in_proj.bias": ours.in_bias,
        "conv1d.weight": ours.conv1d_weight[:, None],
        "conv1d.bias": ours.conv1d_bias,
        "x_proj.weight": ours.x_proj,
        "dt_proj.weight": ours.dt_proj,
        "dt_proj.bias": ours.dt_bias,
        "A_log": ours.A_log,
        "D": ours.D,
        "out_proj.weight": ours.out_proj,
        "out_proj.bias": ours.out_bias,
    }
    theirs.load_state_dict({name: weight for name, weight in weights.items() if weight is not None})
    return theirs


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "bias", "no-conv-bias"])
def test_output_and_gradients_are_those_of_transformers(config: MambaConfig) -> None:
    ours = mixer(config)
    theirs, hidden = their_twin(ours), inputs(config, 19)
    answers, grads = [], []
    for model in (ours, theirs):
        given = hidden.clone().requires_grad_()
        answer = model(given)
        answer.square().sum().backward()
        answers.append(answer.detach())
        grads.append(given.grad)
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.A_log.grad, theirs.A_log.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours.dt_bias.grad, theirs.dt_proj.bias.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("config", [*CONFIGS, MambaConfig(11, inner_norms=True)])
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 6], [12], [2, 10]])
def test_whole_in_pieces_and_one_by_one(config: MambaConfig, cuts: list[int]) -> None:
    model, hidden = mixer(config).double(), inputs(config, 12).double()
    with torch.no_grad():
        whole, state = model(hidden), model.new_cache(2)
        empty = state.used_bytes
        pieces = [model(piece, state) for piece in hidden.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert (state.length, state.used_bytes) == (12, empty)


def test_the_state_has_the_bytes_that_its_shapes_say() -> None:
    state = mixer(MambaConfig(13, state_size=5, conv_kernel=3)).new_cache(3)
    assert state.used_bytes == 4 * 3 * 26 * (5 + 2)
    assert state.bytes_per_position == 0


def test_no_position_sees_a_later_one() -> None:
    config = CONFIGS[0]
    model, hidden = mixer(config), inputs(config, 9)
    hidden.requires_grad_()
    model(hidden)[:, 4].sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad[:, 5:].any()
    assert hidden.grad[:, :5].abs().amax((0, 2)).all()


def test_steps_start_within_their_bounds_and_rates_negative() -> None:
    model = mixer(MambaConfig(64, time_step_min=0.01, time_step_max=0.5))
    steps = torch.nn.functional.softplus(model.dt_bias)
    assert steps.min() >= 0.0099
    assert steps.max() <= 0.51
    assert steps.max() > 10 * steps.min()
    torch.testing.assert_close(model.A[3], -torch.arange(1.0, 17.0))


def test_selection_depends_on_the_input_and_a_does_not() -> None:
    model = mixer(CONFIGS[0])
    first, _ = model.select(inputs(CONFIGS[0], 6))
    other, _ = model.select(2 * inputs(CONFIGS[0], 6))
    for name in ("delta", "B", "C", "z"):
        assert not torch.allclose(getattr(first, name), getattr(other, name)), name
    assert torch.equal(first.A, other.A)
    assert (first.delta > 0).all()


def test_the_convolution_is_conv1d_and_carries_its_tail() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in [(2, 11, 5), (5, 4), (5,)])
    wanted = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=5)[..., :11]
    found, tail = causal_conv(x, weight, bias)
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    first, before = causal_conv(x[:, :2], weight, bias)
    second, end = causal_conv(x[:, 2:], weight, bias, before)
    torch.testing.assert_close(torch.cat([first, second], dim=1), found)
    torch.testing.assert_close(end, tail)


def test_bad_input_is_refused_by_name() -> None:
    model = mixer(CONFIGS[0])
    with pytest.raises(ValueError, match=r"hidden_states must be \(batch, time, hidden_size=13\).*got \(2, 5, 12\)"):
        model(torch.zeros(2, 5, 12))
    with pytest.raises(ValueError, match="at least one position"):
        model(torch.zeros(2, 0, 13))
    with pytest.raises(ValueError, match="the state holds a batch of 3, the input is a batch of 2"):
        model(torch.zeros(2, 1, 13), model.new_cache(3))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        ({"state_size": 2.5}, "state_size"),
        ({"time_step_rank": True}, "time_step_rank"),
        ({"time_step_min": 0.2}, r"time_step_min=0.2 exceeds time_step_max=0.1"),
        ({"time_step_max": "x"}, "time_step_max must be a positive and finite number, got 'x'"),
        ({"use_bias": "no"}, "use_bias must be True or False"),
        ({"initializer_range": float("nan")}, "initializer_range"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MambaConfig(**{"hidden_size": 8, **fields})
    assert MambaConfig(33).rank == 3


def test_a_state_detaches_what_it_keeps() -> None:
    model = mixer(CONFIGS[0])
    state: RecurrentState = model.new_cache(2)
    model(inputs(CONFIGS[0], 4).requires_grad_(), state)
    assert not state.ssm.requires_grad
    assert not state.conv.requires_grad


@pytest.mark.parametrize("piece", [1, 2, 50])
def test_the_state_keeps_nothing_alive_of_what_was_read(piece: int) -> None:
    ours = mixer(CONFIGS[1])
    state = ours.new_cache(2)
    with torch.no_grad():
        ours(inputs(CONFIGS[1], piece), state)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in (state.ssm, state.conv)
    }
    assert sum(held.values()) == state.used_bytes


def test_initial_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    mixer = MambaMixer(MambaConfig(64, time_step_floor=0.004), generator)
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() >= 0.004 * (1 - 1e-5)
    assert steps.max() <= 0.1 * (1 + 1e-5)
    assert (mixer.D == 1).all()
    assert mixer.dt_proj.abs().max() <= 4**-0.5  # the rank is 64 / 16
    assert mixer.conv1d_weight.abs().max() <= 4**-0.5  # four positions
    wide = MambaMixer(MambaConfig(64, initializer_range=0.05), generator)
    assert float(wide.in_proj.detach().std()) == pytest.approx(0.05, rel=0.05)


def test_step_sizes_rates_and_state_stay_in_float32() -> None:
    mixer = MambaMixer(MambaConfig(16), torch.Generator().manual_seed(0)).bfloat16()
    selection, _ = mixer.select(torch.ones(1, 3, 16, dtype=torch.bfloat16))
    assert selection.delta.dtype == selection.A.dtype == mixer.new_cache(2).ssm.dtype == torch.float32
