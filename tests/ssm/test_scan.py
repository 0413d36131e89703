"""The selective scan: three forms, one function, with every gradient; and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medarch.ssm import scan
from medarch.ssm.scan import CHUNK, selective_scan, selective_scan_chunked

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def arguments(
    batch: int, channels: int, states: int, time: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "u": (batch, channels, time),
        "delta": (batch, channels, time),
        "A": (channels, states),
        "B": (batch, states, time),
        "C": (batch, states, time),
        "D": (channels,),
        "z": (batch, channels, time),
        "delta_bias": (channels,),
        "initial_state": (batch, channels, states),
    }
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    made["A"] = -made["A"].abs() - 0.05
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def run(inputs: dict[str, Tensor], method: str) -> list[Tensor]:
    """Output, last state and all gradients under random cotangents."""
    for tensor in inputs.values():
        tensor.grad = None
    y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, method=method)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in (y, last)]
    ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
    return [y.detach(), last.detach(), *(tensor.grad for tensor in inputs.values())]


@pytest.mark.parametrize("time", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
@pytest.mark.parametrize("method", ["associative", "chunked"])
def test_the_forms_are_equal_with_every_gradient(method: str, time: int) -> None:
    inputs = arguments(2, 3, 5, time)
    for name, found, wanted in zip(("y", "last", *NAMES), run(inputs, method), run(inputs, "loop"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 41), st.integers(1, 9))
def test_any_chunk_gives_the_same(batch: int, channels: int, states: int, time: int, chunk: int) -> None:
    inputs = arguments(batch, channels, states, time)
    plain = {name: inputs[name].detach() for name in ("u", "A", "B", "C")}
    step, state = inputs["delta"].detach().exp(), inputs["initial_state"].detach()
    found, last = selective_scan_chunked(**plain, delta=step, state=state, chunk=chunk)
    wanted, end = selective_scan(**plain, delta=step, initial_state=state, return_last_state=True, method="loop")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(last, end)


def test_gradients_in_float64_by_finite_differences() -> None:
    inputs = arguments(2, 2, 3, 5)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(NAMES, tensors, strict=True))
        y, last = selective_scan(**named, delta_softplus=True, return_last_state=True)
        return y, last

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_two_steps_by_hand() -> None:
    # h1 = 1 * 2 * 3 = 6; h2 = exp(-ln 2) * 6 + 1 * 1 * 5 = 8; y = C h + D u, and silu(0) = 0 would shut the gate.
    u = torch.tensor([[[3.0, 5.0]]])
    y, last = selective_scan(
        u,
        torch.ones(1, 1, 2),
        torch.tensor([[-math.log(2.0)]]),
        torch.tensor([[[2.0, 1.0]]]),
        torch.tensor([[[1.0, 10.0]]]),
        torch.tensor([0.5]),
        return_last_state=True,
    )
    torch.testing.assert_close(y, torch.tensor([[[6.0 + 1.5, 80.0 + 2.5]]]))
    torch.testing.assert_close(last, torch.tensor([[[8.0]]]))
    shut = selective_scan(u, torch.ones(1, 1, 2), -torch.ones(1, 1), *[torch.ones(1, 1, 2)] * 2, z=torch.zeros(1, 1, 2))
    assert not shut.any()


def test_a_state_is_carried_over_a_cut() -> None:
    inputs = {name: tensor.detach() for name, tensor in arguments(2, 3, 5, 77).items()}
    whole, end = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    state, pieces = inputs["initial_state"], []
    for part in (slice(0, 1), slice(1, 50), slice(50, 77)):
        cut = {name: inputs[name][..., part] for name in ("u", "delta", "B", "C", "z")}
        kept = {name: inputs[name] for name in ("A", "D", "delta_bias")}
        piece, state = selective_scan(**cut, **kept, initial_state=state, delta_softplus=True, return_last_state=True)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), whole)
    torch.testing.assert_close(state, end)


def test_strided_inputs_and_expanded_gradients() -> None:
    inputs = arguments(2, 3, 5, 40)
    strided = {
        name: tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() if tensor.dim() > 1
        else tensor.detach().clone().requires_grad_()
        for name, tensor in inputs.items()
    }  # fmt: skip
    assert not strided["u"].is_contiguous()
    for found, wanted in zip(run(strided, "chunked"), run(inputs, "loop"), strict=True):
        torch.testing.assert_close(found, wanted)
    grads = []
    for method in ("chunked", "loop"):
        u = inputs["u"].detach().clone().requires_grad_()
        # The gradient of a sum is one number, expanded.
        selective_scan(**{**inputs, "u": u}, delta_softplus=True, method=method).sum().backward()
        grads.append(u.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = {name: tensor.detach().to(dtype) for name, tensor in arguments(1, 3, 5, 40).items()}
    found, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    assert (found.dtype, last.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(found, selective_scan(**wide, delta_softplus=True).to(dtype))


def test_strong_decay_neither_overflows_nor_loses_the_present() -> None:
    inputs = {name: tensor.detach() for name, tensor in arguments(1, 2, 3, 300, torch.float32).items()}
    inputs["A"] = torch.full_like(inputs["A"], -16.0)
    inputs["delta"] = inputs["delta"].abs() * 10
    assert selective_scan(**inputs).isfinite().all()
    exact = selective_scan(**{name: tensor.double() for name, tensor in inputs.items()}, method="loop")
    torch.testing.assert_close(selective_scan(**inputs).double(), exact, rtol=1e-4, atol=1e-4)


def test_memory_of_training_does_not_hold_the_states() -> None:
    from medarch.bench.memory import peak_memory

    batch, channels, states, time = 1, 32, 16, 1024
    inputs = arguments(batch, channels, states, time, torch.float32)
    all_states = batch * channels * states * time * 4

    def train(method: str) -> None:
        selective_scan(**inputs, delta_softplus=True, method=method).sum().backward()

    assert peak_memory(lambda: train("chunked")) < all_states < peak_memory(lambda: train("loop"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"delta": torch.ones(2, 3, 8)}, r"delta has shape \(2, 3, 8\), but u \(2, 3, 7\)"),
        ({"A": -torch.ones(4, 5)}, r"A has shape \(4, 5\)"),
        ({"A": torch.zeros(3, 5)}, "A must be negative.*largest entry is 0.*A = -exp"),
        ({"B": torch.ones(2, 5, 1)}, r"B has shape \(2, 5, 1\)"),
        ({"C": torch.ones(2, 5, 7).double()}, "C is torch.float64 and u torch.float32"),
        ({"D": torch.ones(3).long()}, "D must be of floating point"),
        ({"initial_state": torch.zeros(1, 3, 5)}, r"initial_state has shape \(1, 3, 5\)"),
        ({"u": torch.ones(2, 3, 0)}, "nothing to scan"),
        ({"u": torch.ones(3, 7)}, r"u must be \(batch, channels, time\)"),
        ({"u": torch.ones(2, 3, 7, device="meta")}, "delta is on cpu and u on meta"),
        ({"method": "fft"}, "method='fft' is not one of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, object], told: str) -> None:
    fitting = {
        "u": torch.ones(2, 3, 7),
        "delta": torch.ones(2, 3, 7),
        "A": -torch.ones(3, 5),
        "B": torch.ones(2, 5, 7),
        "C": torch.ones(2, 5, 7),
    }
    selective_scan(**fitting)
    with pytest.raises(ValueError, match=told):
        selective_scan(**{**fitting, **change})


def test_the_form_is_chosen_by_device_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("selective_scan_loop", "selective_scan_chunked"):
        form = getattr(scan, name)
        monkeypatch.setattr(scan, name, lambda *tensors, name=name, form=form: taken.append(name) or form(*tensors))
    for time in (1, 2):
        inputs = {name: tensor.detach() for name, tensor in arguments(1, 2, 3, time).items()}
        selective_scan(**inputs, delta_softplus=True)
    assert taken == ["selective_scan_loop", "selective_scan_chunked"]


def test_without_triton_its_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_has_triton", lambda: False)
    inputs = {name: tensor.detach() for name, tensor in arguments(1, 2, 3, 4).items()}
    with pytest.raises(ValueError, match="package triton, which is not installed"):
        selective_scan(**inputs, method="triton")
