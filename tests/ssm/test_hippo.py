"""HiPPO: the state is the best polynomial for the past, checked against projections made without any recurrence."""

import numpy as np
import pytest
import torch
from numpy.polynomial import Legendre

from medarch.ssm.hippo import (
    diagonal_spectrum,
    legendre,
    legs,
    normal_plus_low_rank,
    reconstruct,
    remember,
    remember_fading,
)


def signal(time, seed=0):
    return torch.randn(time, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_matrix_by_hand():
    A, B = legs(3)
    s = np.sqrt
    expected = [[-1, 0, 0], [-s(3), -2, 0], [-s(5), -s(15), -3]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B[:, 0], torch.tensor([1, s(3), s(5)], dtype=torch.float64))


@pytest.mark.parametrize("states", [1, 2, 7])
def test_the_basis_is_numpys_and_orthonormal(states):
    points, weights = np.polynomial.legendre.leggauss(11)
    basis = legendre(torch.tensor((points + 1) / 2), states)
    for n in range(states):
        np.testing.assert_allclose(basis[:, n].numpy(), np.sqrt(2 * n + 1) * Legendre.basis(n)(points), atol=1e-12)
    gram = basis.T @ (torch.tensor(weights / 2)[:, None] * basis)
    torch.testing.assert_close(gram, torch.eye(states, dtype=torch.float64))


def integrals(edges, states):
    """The integral of each basis polynomial over each interval between two edges, from numpy's antiderivatives."""
    x = 2 * np.asarray(edges) - 1
    return np.stack([np.sqrt(2 * n + 1) / 2 * np.diff(Legendre.basis(n).integ()(x)) for n in range(states)], axis=1)


@pytest.mark.parametrize("time", [1, 2, 3, 17, 61])
def test_remembering_is_projecting_the_whole_past(time):
    """No recurrence here: the coefficients of a held signal are integrals, one for each sample and polynomial."""
    u = signal(time)
    expected = u.numpy() @ integrals(np.linspace(0, 1, time + 1), 13)
    np.testing.assert_allclose(remember(u, 13)[-1].numpy(), expected, atol=1e-9)


def test_every_moments_memory_is_that_of_the_signal_up_to_it():
    u = signal(19)
    for at in (0, 4, 18):
        torch.testing.assert_close(remember(u, 7)[at], remember(u[: at + 1], 7)[-1])


@pytest.mark.parametrize("step", [0.05, 0.4])
def test_the_fading_memory_is_a_projection_onto_exponentially_aged_polynomials(step):
    """With x = exp(-age), the interval of a sample in x has the ends of its ages; before the first sample was zero."""
    u = signal(23)
    edges = np.exp(-step * np.arange(23, -1, -1.0))
    expected = u.numpy() @ integrals(edges, 9)
    np.testing.assert_allclose(remember_fading(u, 9, step)[-1].numpy(), expected, atol=1e-9)


def test_a_polynomial_is_remembered_for_ever():
    middles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    u = 1 - 3 * middles + 2 * middles**3
    rebuilt = reconstruct(remember(u, 6)[-1], middles)
    torch.testing.assert_close(rebuilt, u, rtol=0, atol=1e-3)  # the signal is held for 1/400 of the time


def test_more_numbers_remember_more():
    u = signal(64).cumsum(0)
    middles = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    errors = [float((reconstruct(remember(u, states)[-1], middles) - u).square().mean()) for states in (2, 8, 32)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("states", [1, 2, 9, 64])
def test_normal_plus_low_rank_gives_the_matrix_back(states):
    A, _ = legs(states)
    split = normal_plus_low_rank(states)
    one = torch.eye(states, dtype=torch.complex128)
    torch.testing.assert_close(split.V @ split.V.conj().T, one)
    rebuilt = (split.V * split.spectrum) @ split.V.conj().T - torch.outer(split.P, split.P)
    torch.testing.assert_close(rebuilt, A.to(torch.complex128), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(split.normal @ split.normal.T, split.normal.T @ split.normal)
    torch.testing.assert_close(split.spectrum.real, torch.full((states,), -0.5, dtype=torch.float64))


def test_the_matrix_itself_has_no_usable_eigenvectors():
    A, _ = legs(24)
    assert torch.linalg.cond(torch.linalg.eig(A)[1]) > 1e15
    assert torch.linalg.cond(normal_plus_low_rank(24).V) == pytest.approx(1)


def test_without_its_low_rank_part_it_answers_a_step_alike_when_there_are_many_states():
    """Gu et al. 2022c, theorem 3, with half the input: the state after a time of constant input, at many times."""

    def answer(A, B, time):
        return torch.linalg.solve(A, (torch.linalg.matrix_exp(time * A) - torch.eye(len(A)).double()) @ B)[:3, 0]

    errors = []
    for states in (8, 32, 128):
        (A, B), normal = legs(states), normal_plus_low_rank(states).normal
        gaps = [answer(A, B, time) - answer(normal, B / 2, time) for time in (0.3, 0.7, 1.1, 1.5, 1.9)]
        errors.append(float(torch.stack(gaps).square().mean().sqrt()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_diagonal_spectra():
    lin, inv, real, exact = (diagonal_spectrum(64, name) for name in ("lin", "inv", "real", "legs"))
    for spectrum in (lin, inv, exact):
        torch.testing.assert_close(spectrum.real, torch.full((32,), -0.5, dtype=torch.float64))
    torch.testing.assert_close(lin.imag, torch.pi * torch.arange(32, dtype=torch.float64))
    torch.testing.assert_close(real, -(1 + torch.arange(32)).to(torch.complex128))
    assert float(inv[0].imag) == pytest.approx(64 / np.pi * 63)
    assert float(inv[31].imag) == pytest.approx(64 / np.pi * (64 / 63 - 1))
    # the formula comes near the matrix's largest frequencies
    torch.testing.assert_close(inv.imag[:3].flip(0), exact.imag[-3:], rtol=0.08, atol=0)
    everything = normal_plus_low_rank(64).spectrum.imag
    torch.testing.assert_close(torch.cat([-exact.imag.flip(0), exact.imag]), everything)


@pytest.mark.usefixtures("annotations_off")
def test_refused():
    with pytest.raises(ValueError, match="states must be at least 1, got 0"):
        legs(0)
    with pytest.raises(ValueError, match="states must be at least 1, got -3"):
        legendre(torch.zeros(2), -3)
    with pytest.raises(ValueError, match="the signal is empty"):
        remember(torch.zeros(0), 4)
    with pytest.raises(ValueError, match="the signal is empty"):
        remember_fading(torch.zeros(0), 4, 0.1)
    with pytest.raises(ValueError, match=r"step must be positive and finite, got 0\.0"):
        remember_fading(torch.zeros(3), 4, 0.0)
    with pytest.raises(ValueError, match="states=7 must be even"):
        diagonal_spectrum(7)
    with pytest.raises(ValueError, match="spectrum='fourier' is not one of"):
        diagonal_spectrum(8, "fourier")
