"""The diagonal layer: convolution, recurrence and carried states agree, with all gradients; a dense system too."""

import math
from typing import get_args

import pytest
import torch

from medarch.ssm.discretise import discretise
from medarch.ssm.hippo import Spectrum
from medarch.ssm.linear import LinearStateSpace, impulse_response
from medarch.ssm.s4d import S4D, DiagonalRule, S4DBlock, S4DConfig
from medarch.ssm.vandermonde import last_state, vandermonde_product, vandermonde_product_direct


def layer(seed=0, **changes):
    config = S4DConfig(**({"hidden_size": 3, "state_size": 10, "step_min": 0.05, "step_max": 0.3} | changes))
    made = S4D(config, torch.Generator().manual_seed(seed))
    return made.to(torch.float64)  # torch's complex views follow: they are made of real parameters


def signal(batch, time, hidden=3, seed=1):
    return torch.randn(batch, time, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_state(batch, seed=2):
    shape = batch, 3, 5
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)


@pytest.mark.parametrize("rule", get_args(DiagonalRule))
@pytest.mark.parametrize("spectrum", get_args(Spectrum))
def test_convolution_equals_the_recurrence(rule, spectrum):
    made, u = layer(rule=rule, spectrum=spectrum), signal(2, 37)
    stepped, last = made.recurrence(u)
    torch.testing.assert_close(made(u), stepped)
    torch.testing.assert_close(made.read(u, want_state=True)[1], last)


@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 16, 17])
def test_from_a_given_state_at_every_length(time):
    made, u, state = layer(), signal(2, time), some_state(2)
    expected, last = made.recurrence(u, state)
    y, ours = made.read(u, state, want_state=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours, last)


def test_whole_in_pieces_and_step_by_step_are_one():
    made, u = layer(), signal(2, 23)
    whole, last = made.read(u, want_state=True)
    first, state = made.read(u[:, :11], want_state=True)
    second, state = made.read(u[:, 11:14], state, want_state=True)
    outputs = [first, second]
    for sample in u[:, 14:].unbind(1):
        y, state = made.step(sample, state)
        outputs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("rule", get_args(DiagonalRule))
def test_every_gradient_equals_the_recurrences(rule):
    def gradients(run):
        made, u, state = layer(rule=rule), signal(2, 13).requires_grad_(), some_state(2).requires_grad_()
        y, last = run(made, u, state)
        ((y * signal(2, 13, seed=7)).sum() + last.real.square().sum() + (3 * last.imag).sum()).backward()
        return {name: weight.grad for name, weight in made.named_parameters()} | {"u": u.grad, "state": state.grad}

    expected = gradients(lambda made, u, state: made.recurrence(u, state))
    ours = gradients(lambda made, u, state: made.read(u, state, want_state=True))
    assert set(ours) == {"log_step", "log_decay", "frequency", "C", "D", "u", "state"}
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rule", get_args(DiagonalRule))
def test_the_kernel_is_that_of_a_dense_real_system(rule):
    """Each complex number of the state as two real ones, discretised and multiplied out by the dense code."""
    made = layer(rule=rule)
    for channel in range(3):
        decay, turn = made.log_decay[channel].exp(), made.frequency[channel]
        A = torch.block_diag(
            *(torch.tensor([[-a, -w], [w, -a]]) for a, w in zip(decay.tolist(), turn.tolist(), strict=True))
        ).double()
        B = torch.tensor([1.0, 0.0] * 5, dtype=torch.float64)[:, None]
        C = 2 * (made.C[channel].detach() * torch.tensor([1.0, -1.0])).reshape(1, 10)  # the real part of C h
        system = LinearStateSpace(A, B, C, torch.zeros(1, 1).double())
        expected = impulse_response(discretise(system, float(made.log_step[channel].detach().exp()), rule), 29)[0, 0]
        torch.testing.assert_close(made.kernel(29)[channel], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", get_args(DiagonalRule))
def test_it_stays_stable_whatever_training_does(rule):
    made = layer(rule=rule)
    with torch.no_grad():
        for weight in made.parameters():
            weight += 3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        exponents, _ = made.discrete()
        assert (exponents.real < 0).all()
        y, _ = made.recurrence(torch.ones(1, 200, 3, dtype=torch.float64))
        assert torch.isfinite(y).all()


def test_the_real_spectrum_does_not_learn_to_turn():
    made = layer(spectrum="real")
    assert "frequency" not in dict(made.named_parameters())
    assert made.frequency.abs().max() == 0


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 24, 61])
def test_both_vandermonde_products_agree_with_all_gradients(length):
    generator = torch.Generator().manual_seed(length)
    exponents = torch.complex(-torch.rand(2, 4, generator=generator), torch.randn(2, 4, generator=generator))
    coefficients = torch.randn(3, 2, 4, generator=generator, dtype=torch.complex128)
    weight = torch.randn(3, 2, length, generator=generator, dtype=torch.float64)
    found = []
    for form in (vandermonde_product_direct, vandermonde_product):
        leaves = coefficients.clone().requires_grad_(), exponents.to(torch.complex128).requires_grad_()
        product = form(*leaves, length)
        (product * weight).sum().backward()
        found.append([product.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected)


def test_powers_that_vanish_do_no_harm():
    """Rates at which float32 underflows after a few steps: the sums and their gradients stay those of float64."""
    exponents = torch.tensor([[-3.0 + 2j, -200.0 + 1j, -0.01 + 1j]])
    leaf = torch.ones(1, 3, dtype=torch.complex64, requires_grad=True)
    product = vandermonde_product(leaf, exponents, 400)
    expected = vandermonde_product_direct(leaf.detach().to(torch.complex128), exponents.to(torch.complex128), 400)
    torch.testing.assert_close(product.double(), expected, rtol=0, atol=1e-4)
    product.sum().backward()
    assert torch.isfinite(torch.view_as_real(leaf.grad)).all()


@pytest.mark.parametrize("time", [1, 2, 7, 12])
def test_the_last_state_is_the_sum_of_what_each_input_has_left(time):
    exponents = torch.tensor([[-0.1 + 1j, -0.4]], dtype=torch.complex128)
    u = signal(2, time, 1)
    expected = sum(torch.exp(exponents * (time - 1 - t)) * u[:, t, :, None] for t in range(time))
    torch.testing.assert_close(last_state(u, exponents), expected)


def test_the_block_steps_as_it_reads():
    block = S4DBlock(S4DConfig(3, 10), torch.Generator().manual_seed(0)).to(torch.float64)
    u, state = signal(2, 9), block.state_space.new_state(2)
    outputs = []
    for sample in u.unbind(1):
        y, state = block.step(sample, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), block(u))


def test_the_generator_decides_the_weights():
    one, same, other = (S4D(S4DConfig(3, 10), torch.Generator().manual_seed(seed)) for seed in (4, 4, 5))
    for name, weight in one.named_parameters():
        torch.testing.assert_close(weight, same.get_parameter(name))
    assert not torch.equal(one.C, other.C)
    assert not torch.equal(one.log_step, other.log_step)
    steps = one.log_step.exp()
    assert 0.001 <= steps.min() <= steps.max() <= 0.1


REFUSED = {
    "hidden size": ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
    "state size": ({"state_size": 2.0}, r"state_size must be .* got 2\.0"),
    "odd state size": ({"state_size": 7}, "state_size=7 must be even"),
    "spectrum": ({"spectrum": "hippo"}, "spectrum must be one of .* got 'hippo'"),
    "rule": ({"rule": "euler"}, "rule must be one of .* got 'euler'"),
    "no step": ({"step_min": 0.0}, r"0 < step_min <= step_max is needed, got 0\.0 and 0\.1"),
    "steps the wrong way round": ({"step_min": 0.2}, r"got 0\.2 and 0\.1"),
    "a step of NaN": ({"step_max": math.nan}, "is needed"),
}


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_configurations_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        S4DConfig(**({"hidden_size": 3} | changes))


@pytest.mark.usefixtures("annotations_off")
def test_inputs_refused():
    made = layer()
    for shape in ((2, 0, 3), (2, 5, 4), (5, 3)):
        with pytest.raises(ValueError, match=r"\(batch, time, 3\) is needed"):
            made(torch.ones(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"the state has the shape \(3, 3, 5\), but \(2, 3, 5\) is needed"):
        made.read(signal(2, 5), some_state(3))
    with pytest.raises(ValueError, match=r"the state has the shape \(3, 3, 5\), but \(2, 3, 5\) is needed"):
        made.step(signal(2, 1)[:, 0], some_state(3))
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        made.kernel(0)
