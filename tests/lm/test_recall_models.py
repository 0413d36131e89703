"""The compared models: of one size, and each part of Mamba's selectivity can be taken away by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medarch.lm.fixed_selection import SELECTED, FixedSelectionMixer
from medarch.lm.recall_models import FIXED, KINDS, ModelSpec, sizes
from medarch.ssm.causal_conv import causal_conv
from medarch.ssm.config import MambaConfig
from medarch.ssm.mamba import MambaMixer

CONFIG = MambaConfig(hidden_size=10, state_size=5, conv_kernel=3, time_step_rank=2)


@pytest.mark.parametrize("layers", [2, 4])
def test_all_are_of_one_size(layers: int) -> None:
    counted = {}
    for kind in KINDS:
        model = ModelSpec(kind, 64, layers).build(31, seed=0)
        counted[kind] = sum(weight.numel() for weight in model.layers.parameters())
        assert all(weight.requires_grad for weight in model.parameters())
    for kind, count in counted.items():
        # A constant step size needs no projection.
        near = {"fixed-step": 0.05, "fixed-all": 0.05}.get(kind, 0.01)
        assert count == pytest.approx(counted["mamba"], rel=near), kind


def test_sizes_count_what_a_sequence_needs() -> None:
    found = {kind: sizes(ModelSpec(kind, 32, 4).build(9, 0), 40) for kind in KINDS}
    longer = {kind: sizes(ModelSpec(kind, 32, 4).build(9, 0), 80) for kind in KINDS}
    for kind in KINDS:
        grown = longer[kind]["memory_bytes"] - found[kind]["memory_bytes"]
        attention = {"attention": 4, "attention-no-positions": 4, "hybrid": 1}.get(kind, 0)
        assert grown == attention * 40 * 2 * 32 * 4
    assert found["mamba"]["memory_bytes"] == 4 * 4 * (64 * 16 + 64 * 3)
    assert found["attention"]["without_embedding"] == found["attention"]["parameters"] - 9 * 32


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_the_weights(kind: str) -> None:
    torch.manual_seed(1)
    first = ModelSpec(kind, 16).build(9, 3).state_dict()
    torch.manual_seed(2)
    again, other = (ModelSpec(kind, 16).build(9, seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_the_hybrid_has_one_layer_of_attention_in_its_middle() -> None:
    for layers, pattern in ((2, "ma"), (4, "mmam")):
        model = ModelSpec("hybrid", 16, layers).build(9, 0)
        assert "".join(mixer[0] for mixer, _ in model.config.layer_kinds) == pattern
    with pytest.raises(ValueError, match="at least two layers"):
        ModelSpec("hybrid", 16, 1)
    with pytest.raises(ValueError, match="'transformer' is not one of"):
        ModelSpec("transformer")


def test_with_nothing_constant_it_is_the_mamba_mixer(generator: torch.Generator) -> None:
    plain = MambaMixer(CONFIG, generator).double()
    fixed = FixedSelectionMixer(CONFIG, (), generator).double()
    fixed.load_state_dict(plain.state_dict())
    hidden = torch.randn(3, 11, 10, dtype=torch.float64, generator=generator)
    results = []
    for mixer in (plain, fixed):
        out = mixer(hidden)
        out.square().sum().backward()
        results.append((out, {name: weight.grad for name, weight in mixer.named_parameters()}))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-9)
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], rtol=1e-7, atol=1e-12), name


@pytest.mark.parametrize("constant", FIXED.values(), ids=FIXED)
def test_what_is_constant_no_longer_looks_at_the_input(constant: tuple[str, ...], generator: torch.Generator) -> None:
    mixer = FixedSelectionMixer(CONFIG, constant, generator)
    u = torch.randn(2, 7, 20, generator=generator)
    for name, part in zip(SELECTED, mixer._selection(u), strict=True):
        by_time = part.dim() > 2 and not torch.equal(part[:, 0], part[:, 1])
        assert by_time == (name not in constant), name
    mixer(torch.randn(2, 7, 10, generator=generator)).square().sum().backward()
    for name, weight in mixer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_time_invariant_it_is_a_convolution(generator: torch.Generator) -> None:
    """All three constant, the scan adds up past inputs, each weighed by how long ago it came and by nothing else."""
    mixer = FixedSelectionMixer(CONFIG, SELECTED, generator).double()
    hidden = torch.randn(2, 9, 10, dtype=torch.float64, generator=generator)
    u, z = F.linear(hidden, mixer.in_proj).chunk(2, dim=-1)
    u = F.silu(causal_conv(u, mixer.conv1d_weight, mixer.conv1d_bias)[0])
    step = F.softplus(mixer.dt_bias)[:, None]
    decays = torch.stack([torch.exp(lag * step * mixer.A) for lag in range(9)])
    kernel = (decays * mixer.B * mixer.C).sum(-1) * step[:, 0]
    filtered = torch.stack([sum(kernel[lag] * u[:, time - lag] for lag in range(time + 1)) for time in range(9)], dim=1)
    expected = ((filtered + mixer.D * u) * F.silu(z)) @ mixer.out_proj.T
    assert torch.allclose(mixer(hidden), expected, rtol=1e-9)


@pytest.mark.parametrize("constant", [("B",), SELECTED])
def test_it_reads_in_pieces_what_it_reads_whole(constant: tuple[str, ...], generator: torch.Generator) -> None:
    mixer = FixedSelectionMixer(CONFIG, constant, generator)
    hidden = torch.randn(2, 13, 10, generator=generator)
    state = mixer.new_cache(2)
    pieces = [mixer(piece, state) for piece in hidden.split([1, 5, 7], dim=1)]
    assert torch.allclose(torch.cat(pieces, 1), mixer(hidden), atol=1e-6)
    assert state.length == 13
    assert state.ssm.shape == (2, 20, 5)


def test_what_cannot_be_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="names 'A'"):
        FixedSelectionMixer(CONFIG, ("A",))
    with pytest.raises(ValueError, match="inner_norms"):
        FixedSelectionMixer(MambaConfig(8, inner_norms=True), ("B",))
