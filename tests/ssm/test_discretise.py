"""Discretisation: against scipy, against a numerical solution of the differential equation, and for a singular A."""

import numpy as np
import pytest
import scipy.integrate
import scipy.signal
import torch

from medarch.ssm.discretise import (
    bilinear,
    bilinear_diagonal,
    discretise,
    euler,
    zero_order_hold,
    zero_order_hold_diagonal,
)
from medarch.ssm.linear import LinearStateSpace, recurrence, spectral_radius

RULES = {"zero-order hold": "zoh", "bilinear": "bilinear", "euler": "euler"}


def continuous(states=5, inputs=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(states, states, generator=generator, dtype=torch.float64) - 3 * torch.eye(states).double()
    B, C, D = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((states, inputs), (1, states), (1, inputs))
    )
    return LinearStateSpace(A, B, C, D)


@pytest.mark.parametrize("step", [0.003, 0.17, 1.9])
@pytest.mark.parametrize("rule", RULES)
def test_equal_to_scipy(rule, step):
    system = continuous()
    ours = discretise(system, step, rule)
    A, B, *_ = scipy.signal.cont2discrete([getattr(system, name).numpy() for name in "ABCD"], step, RULES[rule])
    np.testing.assert_allclose(ours.A.numpy(), A, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ours.B.numpy(), B, rtol=1e-9, atol=1e-12)
    assert ours.C is system.C
    assert ours.step == step


def test_zero_order_hold_is_the_exact_solution_for_a_held_input():
    system, step = continuous(), 0.2
    u = torch.randn(1, 13, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, states = recurrence(discretise(system, step), u)
    A, B = system.A.numpy(), system.B.numpy()
    state = np.zeros(5)
    for at, held in enumerate(u[0].numpy()):  # an integrator of its own kind for each piece
        solved = scipy.integrate.solve_ivp(
            lambda _, h, held=held: A @ h + B @ held, (0, step), state, rtol=1e-11, atol=1e-13
        )
        state = solved.y[:, -1]
        np.testing.assert_allclose(states[0, at].numpy(), state, atol=1e-9)


@pytest.mark.parametrize("states", [1, 2, 3])
def test_a_singular_matrix_is_an_integrator(states):
    """A chain of integrators: A has no inverse, and the step response is a power of time over a factorial."""
    A = torch.diag(torch.ones(states - 1, dtype=torch.float64), -1)
    B = torch.eye(states, 1, dtype=torch.float64)
    Ad, Bd = zero_order_hold(A, B, 0.5)
    expected = torch.tensor([[0.5, 0.5**2 / 2, 0.5**3 / 6][:states]]).T
    torch.testing.assert_close(Bd, expected.double())
    assert spectral_radius(Ad) == pytest.approx(1)


def test_the_bilinear_rule_and_the_hold_keep_a_stable_system_stable_and_eulers_does_not():
    system = continuous()
    for step in (0.01, 1.0, 100.0):
        assert discretise(system, step).stable
        assert discretise(system, step, "bilinear").stable
    assert discretise(system, 0.01, "euler").stable
    assert not discretise(system, 1.0, "euler").stable


@pytest.mark.parametrize(("rule", "order"), [(bilinear, 2), (euler, 1)])
def test_order_of_the_error(rule, order):
    """Over a fixed time, halving the step divides the error of exp(A t) by two to the order."""
    A, B = continuous().A, continuous().B
    exact = torch.linalg.matrix_exp(A)
    errors = [
        float((torch.linalg.matrix_power(rule(A, B, 1 / steps)[0], steps) - exact).norm()) for steps in (200, 400)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize(
    ("diagonal", "dense"), [(zero_order_hold_diagonal, zero_order_hold), (bilinear_diagonal, bilinear)]
)
def test_diagonal_entries_equal_the_dense_matrix(diagonal, dense):
    entries = torch.tensor([-0.5 + 3j, -4.0, -0.5 + 100j, -1e-9, 0.0, 1e-4j, -0.3], dtype=torch.complex128)
    A, B = diagonal(entries, torch.tensor([0.07], dtype=torch.float64))
    for at, entry in enumerate(entries):  # a complex number acts on (real, imaginary) as a matrix of two by two
        turn = torch.stack([torch.view_as_real(entry), torch.view_as_real(1j * entry)], dim=1)
        full, driven = dense(turn, torch.tensor([[1.0], [0.0]], dtype=torch.float64), 0.07)
        torch.testing.assert_close(torch.view_as_real(A[at]), full[:, 0])
        torch.testing.assert_close(torch.view_as_real(B[at]), driven[:, 0])


@pytest.mark.parametrize("diagonal", [zero_order_hold_diagonal, bilinear_diagonal])
def test_gradients_of_the_diagonal_rules_also_at_and_near_zero(diagonal):
    entries = torch.tensor(
        [-0.5 + 3j, 0.0, 1e-13 + 1e-13j, 1e-6, -0.1j, 0.499, 0.501, -9.0], dtype=torch.complex128, requires_grad=True
    )
    step = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(diagonal, (entries, step))


@pytest.mark.parametrize(("kind", "digits"), [(torch.complex64, 3e-7), (torch.complex128, 2e-15)])
@pytest.mark.parametrize("size", [1e-12, 1e-5, 0.49, 0.51])
def test_no_digits_are_lost_near_zero(size, kind, digits):
    A = torch.tensor([-size + 0j], dtype=kind)
    _, driven = zero_order_hold_diagonal(A, torch.ones(1, dtype=A.real.dtype))
    assert float(driven.real) == pytest.approx(-np.expm1(-size) / size, rel=digits)


@pytest.mark.usefixtures("annotations_off")
def test_refused():
    system = continuous()
    for step in (0.0, -1.0, float("nan"), float("inf")):
        for rule in (zero_order_hold, bilinear, euler):
            with pytest.raises(ValueError, match="step must be positive and finite, got"):
                rule(system.A, system.B, step)
    with pytest.raises(ValueError, match="rule='zoh' is not one of"):
        discretise(system, 0.1, "zoh")
    with pytest.raises(ValueError, match=r"discrete already, with step=0\.1"):
        discretise(discretise(system, 0.1), 0.1)
