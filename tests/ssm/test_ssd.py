"""State space duality: three forms, one function, with every gradient; and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medarch.ssm.ssd import CHUNK_SIZE, each_head, segment_sum, ssd, ssd_chunked, ssd_matrix, ssd_recurrent, step_sizes

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def arguments(
    time: int,
    batch: int = 2,
    heads: int = 6,
    head: int = 3,
    groups: int = 2,
    states: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, time, heads, head),
        "dt": (batch, time, heads),
        "A": (heads,),
        "B": (batch, time, groups, states),
        "C": (batch, time, groups, states),
        "D": (heads,),
        "z": (batch, time, heads, head),
        "dt_bias": (heads,),
        "initial_states": (batch, heads, head, states),
    }
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    made["A"] = -made["A"].abs() - 0.05
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def run(inputs: dict[str, Tensor], method: str, **options: object) -> list[Tensor]:
    """Output, last states and all gradients under random cotangents."""
    for tensor in inputs.values():
        tensor.grad = None
    y, last = ssd(**inputs, dt_softplus=True, return_final_states=True, method=method, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in (y, last)]
    ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
    return [y.detach(), last.detach(), *(tensor.grad for tensor in inputs.values())]


@pytest.mark.parametrize("time", [1, 2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 7])
@pytest.mark.parametrize("method", ["quadratic", "chunked"])
def test_the_forms_are_equal_with_every_gradient(method: str, time: int) -> None:
    inputs = arguments(time)
    for name, found, wanted in zip(("y", "last", *NAMES), run(inputs, method), run(inputs, "recurrent"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 41),
    st.integers(1, 50),
)  # fmt: skip
def test_any_chunk_and_any_sizes_give_the_same(
    batch: int, groups: int, members: int, head: int, states: int, time: int, chunk: int
) -> None:
    inputs = arguments(time, batch, groups * members, head, groups, states)
    plain = {name: inputs[name].detach() for name in ("x", "dt", "A", "B", "C")}
    plain |= {"dt": plain["dt"].exp(), "states": inputs["initial_states"].detach()}
    for found, wanted in zip(ssd_chunked(**plain, chunk_size=chunk), ssd_recurrent(**plain), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_in_float64_by_finite_differences(groups: int) -> None:
    inputs = arguments(5, 1, 4, 2, groups, 2)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(NAMES, tensors, strict=True))
        y, last = ssd(**named, chunk_size=2, dt_softplus=True, dt_limit=(0.6, 1.2), return_final_states=True)
        return y, last

    step = step_sizes(inputs["dt"], inputs["dt_bias"], dt_softplus=True)
    assert step.min() < 0.6 < 1.2 < step.max(), "the limits should limit something"
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_two_steps_by_hand() -> None:
    # h1 = 1 * 3 * 2 = 6; h2 = exp(-ln 2) * 6 + 1 * 5 * 1 = 8; y = C h + D x, and silu(0) = 0 would shut the gate.
    x = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    dt, rate = torch.ones(1, 2, 1), torch.tensor([-math.log(2.0)])
    B, C = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1), torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    for method in ("recurrent", "quadratic", "chunked"):
        y, last = ssd(x, dt, rate, B, C, D=torch.tensor([0.5]), return_final_states=True, method=method)
        torch.testing.assert_close(y.flatten(), torch.tensor([6.0 + 1.5, 80.0 + 2.5]))
        torch.testing.assert_close(last.flatten(), torch.tensor([8.0]))
        assert not ssd(x, dt, rate, B, C, z=torch.zeros(1, 2, 1, 1), method=method).any()
    # M_21 = (C_2 . B_1) exp(-ln 2) dt_1 = 10 * 2 / 2.
    torch.testing.assert_close(ssd_matrix(dt, rate, B, C)[0, 0], torch.tensor([[2.0, 0.0], [10.0, 10.0]]))


def test_it_is_the_selective_scan_when_all_of_a_head_fades_alike() -> None:
    from medarch.ssm.scan import selective_scan

    inputs = {name: tensor.detach() for name, tensor in arguments(37, groups=1).items()}
    channels = {name: inputs[name].flatten(2).transpose(1, 2) for name in ("x", "z")}
    wanted, end = selective_scan(
        channels["x"],
        inputs["dt"].transpose(1, 2).repeat_interleave(3, dim=1),
        inputs["A"].repeat_interleave(3)[:, None].expand(-1, 5),
        inputs["B"][:, :, 0].transpose(1, 2),
        inputs["C"][:, :, 0].transpose(1, 2),
        inputs["D"].repeat_interleave(3),
        channels["z"],
        inputs["dt_bias"].repeat_interleave(3),
        delta_softplus=True,
        return_last_state=True,
        initial_state=inputs["initial_states"].flatten(1, 2),
        method="loop",
    )
    y, last = ssd(**inputs, dt_softplus=True, return_final_states=True)
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), wanted)
    torch.testing.assert_close(last.flatten(1, 2), end)


def test_a_state_is_carried_over_a_cut() -> None:
    inputs = {name: tensor.detach() for name, tensor in arguments(77).items()}
    whole, end = ssd(**inputs, dt_softplus=True, return_final_states=True)
    states, pieces = inputs["initial_states"], []
    for part in (slice(0, 1), slice(1, 50), slice(50, 77)):
        cut = {name: inputs[name][:, part] for name in ("x", "dt", "B", "C", "z")}
        kept = {name: inputs[name] for name in ("A", "D", "dt_bias")}
        piece, states = ssd(**cut, **kept, initial_states=states, dt_softplus=True, return_final_states=True)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(states, end)


def test_step_sizes_are_clamped_last() -> None:
    dt, bias = torch.tensor([[[-1.0, 2.0, 0.1]]]), torch.tensor([0.5, 0.5, 0.0])
    torch.testing.assert_close(step_sizes(dt), torch.tensor([[[0.0, 2.0, 0.1]]]))
    torch.testing.assert_close(step_sizes(dt, bias, dt_limit=(0.2, 1.5)), torch.tensor([[[0.2, 1.5, 0.2]]]))
    soft = torch.nn.functional.softplus(dt + bias)
    torch.testing.assert_close(step_sizes(dt, bias, dt_softplus=True), soft)
    torch.testing.assert_close(step_sizes(dt, bias, True, (0.6, 0.7)), soft.clamp(0.6, 0.7))


def test_strided_inputs_and_expanded_gradients() -> None:
    inputs = arguments(40)
    strided = {
        name: tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() if tensor.dim() > 1
        else tensor.detach().clone().requires_grad_()
        for name, tensor in inputs.items()
    }  # fmt: skip
    assert not strided["x"].is_contiguous()
    for found, wanted in zip(run(strided, "chunked"), run(inputs, "recurrent"), strict=True):
        torch.testing.assert_close(found, wanted)
    grads = []
    for method in ("chunked", "recurrent"):
        x = inputs["x"].detach().clone().requires_grad_()
        # The gradient of a sum is one number, expanded.
        ssd(**{**inputs, "x": x}, dt_softplus=True, method=method).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = {name: tensor.detach().to(dtype) for name, tensor in arguments(40).items()}
    found, last = ssd(**inputs, dt_softplus=True, return_final_states=True)
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    assert (found.dtype, last.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(found, ssd(**wide, dt_softplus=True).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssd(**wide, dt_softplus=True), ssd(**wide, dt_softplus=True, method="chunked"))
        torch.testing.assert_close(ssd(**wide, dt_softplus=True), ssd(**wide, dt_softplus=True, method="recurrent"))


def strong(time: int = 301) -> dict[str, Tensor]:
    """Decay by up to exp(-160) a step, with steps of hardly any in between."""
    inputs = {name: tensor.detach() for name, tensor in arguments(time, dtype=torch.float32).items()}
    generator = torch.Generator().manual_seed(3)
    inputs["A"] = torch.full_like(inputs["A"], -16.0)
    large = torch.rand(inputs["dt"].shape, generator=generator) < 0.5
    inputs["dt"] = torch.rand(inputs["dt"].shape, generator=generator) * torch.where(large, 10.0, 0.01)
    return inputs


@pytest.mark.parametrize("method", ["quadratic", "chunked"])
@pytest.mark.parametrize("chunk_size", [32, 64])
def test_strong_decay_loses_no_digits(method: str, chunk_size: int) -> None:
    inputs = strong()
    del inputs["dt_bias"]
    results = []
    for dtype, form in ((torch.float32, method), (torch.float64, "recurrent")):
        cast = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in inputs.items()}
        y = ssd(**cast, chunk_size=chunk_size, method=form)
        y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(dtype))
        results.append([y.detach(), *(tensor.grad for tensor in cast.values())])
    for name, found, wanted in zip(("y", *inputs), *results, strict=True):
        assert found.isfinite().all(), name
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 2e-6, f"{name}: {error}"


def test_a_segment_sum_keeps_what_a_weak_decay_adds_to_strong_ones() -> None:
    log_decay = torch.tensor([-0.25, -70000.0, -3e-4, -0.125])
    sums = segment_sum(log_decay)
    assert sums.triu(1)[0].tolist() == [0, -math.inf, -math.inf, -math.inf]
    assert not sums.diagonal().any()
    torch.testing.assert_close(sums[3, 1], torch.tensor(-0.1253), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[3, 0], torch.tensor(-70000.1253))


def test_blocks_off_the_diagonal_have_the_rank_of_the_state() -> None:
    inputs = {name: tensor.detach() for name, tensor in arguments(48, 1, 2, 3, 1, 5).items()}
    matrix = ssd_matrix(inputs["dt"].exp() * 0.05, inputs["A"], inputs["B"], inputs["C"])
    assert torch.linalg.matrix_rank(matrix[:, :, 20:, :20]).tolist() == [[5, 5]]
    assert torch.linalg.matrix_rank(matrix).tolist() == [[48, 48]]
    assert not matrix.triu(1).any()


def test_heads_of_a_group_see_the_same() -> None:
    grouped = torch.arange(4.0).view(1, 1, 2, 2)
    assert each_head(grouped, 4)[0, 0].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_memory_of_training_is_linear_in_the_length() -> None:
    from medarch.bench.memory import peak_memory

    def peak(time: int, chunk_size: int) -> int:
        inputs = arguments(time, 1, 4, 16, 1, 16, torch.float32)
        return peak_memory(
            lambda: ssd(**inputs, dt_softplus=True, chunk_size=chunk_size).sum().backward(), warm_up=False
        )

    assert peak(768, 32) < 2.2 * peak(384, 32)


BAD = {
    "no step": ({"x": torch.zeros(2, 0, 6, 3)}, r"at least one step, got \(2, 0, 6, 3\)"),
    "x without heads": ({"x": torch.zeros(2, 7, 18)}, r"x must be \(batch, time, heads, head\)"),
    "groups do not divide": (
        {"B": torch.zeros(2, 7, 4, 5), "C": torch.zeros(2, 7, 4, 5)},
        r"divide the 6 heads of x, got \(2, 7, 4, 5\)",
    ),
    "no group": ({"B": torch.zeros(2, 7, 0, 5)}, "groups that divide"),
    "C of other states": ({"C": torch.zeros(2, 7, 2, 4)}, r"C is \(2, 7, 2, 4\) but must be \(2, 7, 2, 5\)"),
    "dt of another length": ({"dt": torch.zeros(2, 8, 6)}, r"dt is \(2, 8, 6\) but must be \(2, 7, 6\)"),
    "A with states": ({"A": -torch.ones(6, 5)}, r"A is \(6, 5\) but must be \(6,\)"),
    "A positive": ({"A": torch.tensor([-1.0, -1, 0.5, -1, -1, -1])}, "A must be negative.*0.5"),
    "A zero": ({"A": torch.zeros(6)}, "A must be negative"),
    "A not a number": ({"A": torch.full((6,), math.nan)}, "A must be negative"),
    "state of another batch": (
        {"initial_states": torch.zeros(3, 6, 3, 5)},
        r"initial_states is \(3, 6, 3, 5\) but must be \(2, 6, 3, 5\)",
    ),
    "types": ({"B": torch.zeros(2, 7, 2, 5).double()}, "B is torch.float64 but x is torch.float32"),
    "integers": ({"x": torch.zeros(2, 7, 6, 3, dtype=torch.int64)}, "x is torch.int64"),
    "device": ({"C": torch.zeros(2, 7, 2, 5, device="meta")}, "C is on meta but x is on cpu"),
    "chunk": ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
    "method": ({"method": "magic"}, "'magic' is not one of"),
    "limits": ({"dt_limit": (0.2, 0.1)}, r"in order.*got \(0.2, 0.1\)"),
    "negative limit": ({"dt_limit": (-1.0, 1.0)}, "the first not negative"),
}


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_at_the_door(change: dict[str, object], message: str) -> None:
    inputs = {name: tensor.detach() for name, tensor in arguments(7, dtype=torch.float32).items()}
    if change.get("x") is not None and change["x"].dtype == torch.int64:
        message = "but x is torch.int64"
    with pytest.raises(ValueError, match=message):
        ssd(**{**inputs, **change})
