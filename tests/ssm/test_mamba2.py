"""The Mamba-2 mixer: transformers' numbers, a state that is carried on, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from medarch.ssm.mamba2 import Mamba2Mixer
from medarch.ssm.mamba2_config import Mamba2Config
from medarch.ssm.mamba2_weights import load_mamba2_, save_mamba2_

CONFIGS = {
    "groups": Mamba2Config(21, state_size=5, head_dim=7, n_groups=3, chunk_size=4),
    "biases, limits, kernel 3": Mamba2Config(
        10, state_size=3, num_heads=5, head_dim=6, expand=3, conv_kernel=3, chunk_size=5, use_bias=True,
        time_step_limit=(0.02, 0.9), layer_norm_epsilon=1e-3,
    ),
    "no bias at all, one head": Mamba2Config(
        13, state_size=11, head_dim=26, conv_kernel=2, chunk_size=3, use_conv_bias=False
    ),
}  # fmt: skip


def make(config: Mamba2Config, dtype: torch.dtype = torch.float64, seed: int = 4) -> Mamba2Mixer:
    """A mixer all of whose weights are random, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    mixer = Mamba2Mixer(config, generator).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype), alpha=0.3)
    return mixer


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mamba2_block(config: Mamba2Config) -> nn.Module:
    from transformers import Mamba2Config as Theirs
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Block

    return Block(
        Theirs(
            hidden_size=config.hidden_size,
            state_size=config.state_size,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            n_groups=config.n_groups,
            expand=config.expand,
            conv_kernel=config.conv_kernel,
            chunk_size=config.chunk_size,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            time_step_limit=config.time_step_limit,
            layer_norm_epsilon=config.layer_norm_epsilon,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )


def granite_block(config: Mamba2Config) -> nn.Module:
    from transformers import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

    return GraniteMoeHybridMambaLayer(
        GraniteMoeHybridConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=1,
            mamba_d_state=config.state_size,
            mamba_n_heads=config.num_heads,
            mamba_d_head=config.head_dim,
            mamba_n_groups=config.n_groups,
            mamba_expand=config.expand,
            mamba_d_conv=config.conv_kernel,
            mamba_chunk_size=config.chunk_size,
            mamba_proj_bias=config.use_bias,
            mamba_conv_bias=config.use_conv_bias,
            time_step_limit=config.time_step_limit,
            rms_norm_eps=config.layer_norm_epsilon,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )


def bamba_block(config: Mamba2Config) -> nn.Module:
    from transformers import BambaConfig
    from transformers.models.bamba.modeling_bamba import BambaMixer

    return BambaMixer(
        BambaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=1,
            num_key_value_heads=1,
            mamba_d_state=config.state_size,
            mamba_n_heads=config.num_heads,
            mamba_d_head=config.head_dim,
            mamba_n_groups=config.n_groups,
            mamba_expand=config.expand,
            mamba_d_conv=config.conv_kernel,
            mamba_chunk_size=config.chunk_size,
            mamba_proj_bias=config.use_bias,
            mamba_conv_bias=config.use_conv_bias,
            time_step_limit=config.time_step_limit,
            rms_norm_eps=config.layer_norm_epsilon,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )


BLOCKS = {"mamba2": mamba2_block, "granite": granite_block, "bamba": bamba_block}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_it_is_the_mixer_of_transformers_with_every_gradient(config: Mamba2Config, block: object) -> None:
    mixer, theirs = make(config, torch.float32), block(config).train()
    save_mamba2_(mixer, theirs)
    results = []
    for module in (mixer, theirs):
        x = randn(3, 19, config.hidden_size, dtype=torch.float32).requires_grad_()
        y = module(x)
        y.backward(randn(*y.shape, dtype=torch.float32, seed=6))
        gradients = {name: parameter.grad.flatten() for name, parameter in module.named_parameters()}
        results.append([y.detach(), x.grad, *(gradients[name] for name in sorted(gradients, key=_plain))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5 * float(wanted.abs().max()))


def _plain(name: str) -> str:
    """One order for both naming schemes."""
    from medarch.ssm.mamba2_weights import NAMES

    return NAMES.get(name, name)


def test_weights_return_from_transformers_unchanged() -> None:
    config = CONFIGS["biases, limits, kernel 3"]
    mixer, other, block = make(config, seed=4), make(config, seed=7), mamba2_block(config).double()
    save_mamba2_(mixer, block)
    load_mamba2_(other, block)
    for own, returned in zip(mixer.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, returned)


def test_weights_that_do_not_fit_are_refused() -> None:
    config = CONFIGS["groups"]
    with_bias = mamba2_block(CONFIGS["biases, limits, kernel 3"])
    with pytest.raises(ValueError, match=r"in_proj.bias, out_proj.bias: do they agree in use_bias"):
        load_mamba2_(make(config), with_bias)
    wider = mamba2_block(Mamba2Config(21, state_size=6, head_dim=7, n_groups=3))
    with pytest.raises(
        ValueError, match=r"in_proj is \(120, 21\) but in_proj.weight of the Mamba2Mixer is \(126, 21\)"
    ):
        load_mamba2_(make(config), wider)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_prompt_may_be_read_whole_in_pieces_or_token_by_token(config: Mamba2Config) -> None:
    mixer = make(config)
    x = randn(2, 23, config.hidden_size)
    whole = mixer(x)
    for cuts in ([23], [1] * 23, [9, 1, 1, 12], [2, 21], [1, 22]):
        state = mixer.new_cache(2, 23)
        pieces = [mixer(piece, state) for piece in x.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
        assert state.length == 23
        assert not state.ssm.requires_grad
        assert not state.conv.requires_grad


def test_decoding_agrees_with_transformers() -> None:
    from transformers import DynamicCache
    from transformers import Mamba2Config as Theirs

    config = CONFIGS["groups"]
    mixer, block = make(config, torch.float32), mamba2_block(config).eval()
    save_mamba2_(mixer, block)
    cache = DynamicCache(
        config=Theirs(hidden_size=21, state_size=5, num_heads=6, head_dim=7, n_groups=3, num_hidden_layers=1)
    )
    state = mixer.new_cache(2)
    x = randn(2, 17, 21, dtype=torch.float32)
    with torch.no_grad():
        for piece in x.split([13, 1, 1, 1, 1], dim=1):
            torch.testing.assert_close(mixer(piece, state), block(piece, cache), rtol=1e-4, atol=1e-5)


def test_the_state_does_not_grow() -> None:
    mixer = make(CONFIGS["groups"], torch.float32)
    state = mixer.new_cache(2, capacity=1000)
    before = state.used_bytes
    mixer(randn(2, 50, 21, dtype=torch.float32), state)
    # 6 heads of 7 channels with 5 numbers each, and 3 positions of 42 + 2 * 3 * 5 channels, for 2 sequences.
    assert state.used_bytes == before == 4 * 2 * (6 * 7 * 5 + 3 * 72)


def test_the_chunk_size_does_not_matter() -> None:
    import dataclasses

    config = CONFIGS["groups"]
    mixer = make(config)
    x = randn(2, 23, 21)
    for size in (1, 7, 23, 100):
        other = Mamba2Mixer(dataclasses.replace(config, chunk_size=size)).double()
        other.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(other(x), mixer(x))


def test_what_the_scan_works_on() -> None:
    config = CONFIGS["biases, limits, kernel 3"]
    mixer = make(config)
    inputs, tail = mixer.select(randn(2, 23, 10) * 30)
    assert [tuple(each.shape) for each in inputs] == [
        (2, 23, 5, 6), (2, 23, 5), (5,), (2, 23, 1, 3), (2, 23, 1, 3), (2, 23, 30),
    ]  # fmt: skip
    assert tuple(tail.shape) == (2, 2, 36)
    assert (inputs.dt.min().item(), inputs.dt.max().item()) == (0.02, 0.9)
    assert (inputs.A < 0).all()


def test_initial_weights() -> None:
    config = Mamba2Config(64, head_dim=1, time_step_floor=0.004)
    mixer = Mamba2Mixer(config, torch.Generator().manual_seed(0))
    rates, steps = -mixer.A.detach(), torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert 1 <= rates.min() < 2
    assert 15 < rates.max() <= 16
    # Half of the logarithms lie below their middle.
    assert steps.min() >= 0.004 * (1 - 1e-5)
    assert steps.max() <= 0.1 * (1 + 1e-5)
    assert 0.3 < (steps < 0.01).double().mean() < 0.7
    assert mixer.in_proj.abs().max() <= 1 / 8
    assert mixer.out_proj.abs().max() <= 128**-0.5
    assert torch.equal(mixer.D, torch.ones(128))
    assert torch.equal(mixer.norm_weight, torch.ones(128))
    same, other = (Mamba2Mixer(config, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(mixer.parameters(), same.parameters(), strict=True))
    assert not torch.equal(mixer.in_proj, other.in_proj)
    normal = Mamba2Mixer(Mamba2Config(64, initializer_range=0.05), torch.Generator().manual_seed(0))
    assert float(normal.in_proj.detach().std()) == pytest.approx(0.05, rel=0.05)
    assert float(normal.out_proj.detach().std()) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    config = CONFIGS["groups"]
    mixer = make(config, dtype)
    exact = Mamba2Mixer(config).double()
    exact.load_state_dict({name: value.double() for name, value in mixer.state_dict().items()})
    x = randn(2, 23, 21, dtype=dtype)
    y, wanted = mixer(x), exact(x.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=0.05, atol=0.05 * float(wanted.detach().abs().max()))
    y.sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in mixer.parameters())


def test_autocast() -> None:
    mixer = make(CONFIGS["groups"], torch.float32)
    x = randn(2, 23, 21, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mixer(x), rtol=0.05, atol=0.05 * float(mixer(x).detach().abs().max()))


@pytest.mark.usefixtures("annotations_off")
def test_bad_input_is_refused_at_the_door() -> None:
    mixer = make(CONFIGS["groups"])
    for shape in ((2, 5, 20), (2, 0, 21), (5, 21)):
        with pytest.raises(ValueError, match=r"hidden_size=21\) with at least one position, got"):
            mixer(randn(*shape))
    with pytest.raises(ValueError, match="batch of 3, the input is a batch of 2"):
        mixer(randn(2, 5, 21), mixer.new_cache(3))


BAD = {
    "size": ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
    "heads": ({"num_heads": 3}, r"num_heads=3 of head_dim=4 make 12 channels, but expand=2 times hidden_size=8 are 16"),
    "head too wide": ({"head_dim": 64}, "num_heads=1 of head_dim=64 make 64 channels"),
    "groups": ({"n_groups": 3}, "num_heads=4 is not divisible by n_groups=3"),
    "bias": ({"use_bias": 1}, "use_bias must be True or False, got 1"),
    "steps": ({"time_step_min": 0.2}, "time_step_min=0.2 exceeds time_step_max=0.1"),
    "limit": ({"time_step_limit": (0.5, 0.1)}, r"time_step_limit must be two numbers in order.*\(0.5, 0.1\)"),
    "limit of one": ({"time_step_limit": (0.5,)}, "time_step_limit must be two numbers"),
    "rates": ({"A_init_range": (0.0, 2.0)}, "A_init_range must be positive"),
    "epsilon": ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon must be a positive and finite number"),
    "spread": ({"initializer_range": -1.0}, "initializer_range must be a positive"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_configuration_that_contradicts_itself_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2Config(**{"hidden_size": 8, "head_dim": 4, **change})


def test_a_configuration_survives_json() -> None:
    import dataclasses
    import json

    config = CONFIGS["biases, limits, kernel 3"]
    assert Mamba2Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert Mamba2Config(48, head_dim=12).heads == 8
    assert Mamba2Config(48, head_dim=12, n_groups=2, state_size=16).conv_dim == 96 + 64
