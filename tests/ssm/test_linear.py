"""The linear state space model: three forms that agree with one another, with all gradients, and with scipy."""

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medarch.ssm.linear import (
    LinearStateSpace,
    causal_convolution,
    convolution,
    impulse_response,
    recurrence,
    scan,
    spectral_abscissa,
    spectral_radius,
)


def drawn(states=5, inputs=3, outputs=2, radius=0.9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(states, states, generator=generator, dtype=torch.float64)
    A *= radius / spectral_radius(A)
    shapes = ((states, inputs), (outputs, states), (outputs, inputs))
    B, C, D = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return LinearStateSpace(*(matrix.to(dtype) for matrix in (A, B, C, D)), step=1.0)


def signal(batch, time, inputs=3, seed=1, dtype=torch.float64):
    return torch.randn(batch, time, inputs, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_by_hand():
    system = LinearStateSpace(*(torch.tensor([[value]]) for value in (0.5, 2.0, 3.0, 10.0)), step=1.0)
    y, states = recurrence(system, torch.tensor([[[1.0], [0.0], [1.0]]]))
    torch.testing.assert_close(states.flatten(), torch.tensor([2.0, 1.0, 2.5]))
    torch.testing.assert_close(y.flatten(), torch.tensor([16.0, 3.0, 17.5]))


@pytest.mark.parametrize("time", [1, 2, 3, 7, 16, 61])
def test_scan_and_convolution_equal_the_recurrence(time):
    system, u = drawn(), signal(2, time)
    y, states = recurrence(system, u)
    scanned, history = scan(system, u)
    torch.testing.assert_close(scanned, y)
    torch.testing.assert_close(history, states)
    torch.testing.assert_close(convolution(system, u), y)


@pytest.mark.parametrize("form", [scan, convolution], ids=["scan", "convolution"])
def test_every_gradient_equals_the_recurrences(form):
    def gradients(run):
        leaves = [getattr(drawn(), name).requires_grad_() for name in "ABCD"]
        u = signal(2, 11).requires_grad_()
        y = run(LinearStateSpace(*leaves, step=1.0), u)
        y = y[0] if isinstance(y, tuple) else y
        (y * signal(2, 11, 2, seed=3)).sum().backward()
        return [leaf.grad for leaf in (*leaves, u)]

    for ours, theirs in zip(gradients(form), gradients(recurrence), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", [recurrence, scan], ids=["recurrence", "scan"])
@pytest.mark.parametrize("cut", [1, 6, 12])
def test_a_carried_state_continues_the_sequence(form, cut):
    system, u = drawn(), signal(2, 13)
    start = torch.randn(2, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)
    whole, states = recurrence(system, u, start)
    first, history = form(system, u[:, :cut], start)
    second, last = form(system, u[:, cut:], history[:, -1])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last[:, -1], states[:, -1])
    expected = torch.autograd.grad(whole.square().sum(), start)[0]
    torch.testing.assert_close(torch.autograd.grad(first.square().sum() + second.square().sum(), start)[0], expected)


def test_equal_to_scipy_whose_states_are_one_step_late():
    system, u = drawn(), signal(1, 23)
    A, B, C, D = (getattr(system, name).numpy() for name in "ABCD")
    _, _, states = scipy.signal.dlsim((A, B, C, D, 1.0), np.vstack([u[0].numpy(), np.zeros(3)]))
    y, ours = recurrence(system, u)
    np.testing.assert_allclose(ours[0].numpy(), states[1:], atol=1e-12)
    _, outputs, _ = scipy.signal.dlsim((A, B, C @ A, C @ B + D, 1.0), u[0].numpy())
    np.testing.assert_allclose(y[0].numpy(), outputs, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5, 19])
def test_the_impulse_response_is_what_an_impulse_leaves(length):
    system = drawn()
    impulses = torch.zeros(3, length, 3, dtype=torch.float64)
    impulses[torch.arange(3), 0, torch.arange(3)] = 1
    y, _ = recurrence(system, impulses)
    y[:, 0] -= system.D.T  # the direct path
    torch.testing.assert_close(impulse_response(system, length), y.permute(2, 0, 1))


@settings(max_examples=25, deadline=None)
@given(time=st.integers(1, 40), at=st.integers(0, 39), seed=st.integers(0, 99))
def test_no_form_looks_ahead(time, at, seed):
    at %= time
    system, u = drawn(seed=seed), signal(1, time, seed=seed)
    changed = u.clone()
    changed[:, at:] += 1
    for form in (lambda u: scan(system, u)[0], lambda u: convolution(system, u)):
        torch.testing.assert_close(form(u)[:, :at], form(changed)[:, :at])


def test_the_convolution_does_not_go_around_the_circle():
    kernel = torch.zeros(1, 1, 7, dtype=torch.float64)
    kernel[..., 6] = 1  # a delay of six steps
    u = signal(1, 7, 1)
    y = causal_convolution(u, kernel)
    torch.testing.assert_close(y[:, 6], u[:, 0])
    torch.testing.assert_close(y[:, :6], torch.zeros(1, 6, 1, dtype=torch.float64))


def test_noncontiguous_input_and_float32():
    system = drawn(dtype=torch.float32)
    u = signal(3, 2, 17, dtype=torch.float32).permute(1, 2, 0)
    assert not u.is_contiguous()
    y, _ = recurrence(system, u)
    assert y.dtype == torch.float32
    torch.testing.assert_close(scan(system, u)[0], y)
    torch.testing.assert_close(convolution(system, u), y, rtol=1e-4, atol=1e-4)


def test_radius_and_abscissa_decide_stability():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)  # turns for ever: eigenvalues +i and -i
    assert spectral_radius(turn) == pytest.approx(1)
    assert spectral_abscissa(turn) == pytest.approx(0)
    rest = (torch.ones(2, 1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1).double())
    one = torch.eye(2, dtype=torch.float64)
    for matrix, step, stable in [
        (0.99 * turn, 1.0, True),
        (1.01 * turn, 1.0, False),
        (-0.99 * one, 1.0, True),
        (-1.01 * one, 1.0, False),
        (turn - 0.01 * one, None, True),
        (turn + 0.01 * one, None, False),
    ]:
        assert LinearStateSpace(matrix, *rest, step=step).stable is stable


@pytest.mark.parametrize("radius", [0.06, 0.5, 0.95])
def test_the_response_falls_by_the_spectral_radius_at_each_step(radius):
    system = drawn(radius=radius, seed=4)
    response = impulse_response(system, 120).abs().amax((0, 1))
    per_step = (response[100] / response[60]) ** (1 / 40)
    assert float(per_step) == pytest.approx(radius, rel=0.05)


def matrices(**changes):
    return {"A": torch.eye(5), "B": torch.ones(5, 3), "C": torch.ones(2, 5), "D": torch.ones(2, 3)} | changes


REFUSED = {
    "A not square": ({"A": torch.ones(5, 4)}, r"A: \(5, 4\).* do not fit"),
    "B of other states": ({"B": torch.ones(4, 3)}, r"B: \(4, 3\).* do not fit"),
    "C of other states": ({"C": torch.ones(2, 4)}, r"C: \(2, 4\).* do not fit"),
    "D of other outputs": ({"D": torch.ones(3, 3)}, r"D: \(3, 3\).* do not fit"),
    "D as a vector": ({"D": torch.ones(3)}, "must be matrices"),
    "no states": ({"A": torch.ones(0, 0), "B": torch.ones(0, 3), "C": torch.ones(2, 0)}, "at least one row"),
    "two types": ({"A": torch.eye(5, dtype=torch.float64)}, "must have one type and device"),
    "a step of zero": ({"step": 0.0}, "step must be positive and finite, .* got 0.0"),
    "a step of NaN": ({"step": float("nan")}, "step must be positive and finite"),
}


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_matrices_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LinearStateSpace(**matrices(**changes))


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize("form", [recurrence, scan, convolution])
def test_inputs_refused(form):
    system = LinearStateSpace(**matrices(), step=1.0)
    with pytest.raises(ValueError, match=r"u has the shape \(1, 0, 3\).* at least one step"):
        form(system, torch.ones(1, 0, 3))
    with pytest.raises(ValueError, match=r"u has the shape \(1, 7, 2\).* 3 inputs"):
        form(system, torch.ones(1, 7, 2))
    with pytest.raises(ValueError, match=r"u is torch\.float64 on cpu, but the system is torch\.float32"):
        form(system, torch.ones(1, 7, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="discretise it first"):
        form(LinearStateSpace(**matrices()), torch.ones(1, 7, 3))
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        impulse_response(system, 0)


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize("form", [recurrence, scan])
def test_a_state_of_another_batch_is_refused(form):
    system = LinearStateSpace(**matrices(), step=1.0)
    with pytest.raises(ValueError, match=r"initial_state has the shape \(3, 5\).* need \(2, 5\)"):
        form(system, torch.ones(2, 7, 3), torch.ones(3, 5))
