"""Sums of powers: what a diagonal state space needs to become a convolution, and to skip to its last state.

The matrix of powers, with those of one number in each row, is called Vandermonde's. The specification,
``vandermonde_product_direct``, builds it whole. The fast forms use that with l = i block + j a power is a product of
one that depends on i and one that depends on j alone, so that two matrices of about sqrt(length) columns will do.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def vandermonde_product_direct(
    coefficients: Complex[Tensor, "*batch states"], exponents: Complex[Tensor, "*#batch states"], length: int
) -> Float[Tensor, "*batch length"]:
    """The real part of sum_n coefficients_n exp(exponents_n l) for l = 0, ..., length - 1."""
    ages = torch.arange(length, device=exponents.device)
    return (coefficients[..., None] * torch.exp(exponents[..., None] * ages)).sum(-2).real


def vandermonde_product(
    coefficients: Complex[Tensor, "*batch states"], exponents: Complex[Tensor, "*#batch states"], length: int
) -> Float[Tensor, "*batch length"]:
    """The same as matrix products of real numbers, of which processors are fonder than of complex ones."""
    (coarse_real, coarse_imag), (fine_real, fine_imag) = _powers(exponents, length)
    real, imag = coefficients.real[..., None], coefficients.imag[..., None]
    left_real = (real * coarse_real - imag * coarse_imag).transpose(-1, -2)
    left_imag = (real * coarse_imag + imag * coarse_real).transpose(-1, -2)
    return (left_real @ fine_real - left_imag @ fine_imag).flatten(-2)[..., :length]


def last_state(
    u: Float[Tensor, "batch time hidden"], exponents: Complex[Tensor, "hidden states"]
) -> Complex[Tensor, "batch hidden states"]:
    """sum_t exp(exponents (time - 1 - t)) u_t: what a recurrence has added up when the sequence ends."""
    batch, time, hidden = u.shape
    (coarse_real, coarse_imag), (fine_real, fine_imag) = _powers(exponents, time)
    blocks, block = coarse_real.shape[-1], fine_real.shape[-1]
    silent = u.new_zeros(batch, blocks * block - time, hidden)
    by_age = torch.cat([u.flip(1), silent], dim=1).reshape(batch, blocks, block, hidden).permute(0, 3, 1, 2)
    inner_real, inner_imag = (by_age @ fine.transpose(-1, -2) for fine in (fine_real, fine_imag))
    coarse_real, coarse_imag = coarse_real.transpose(-1, -2), coarse_imag.transpose(-1, -2)
    return torch.complex(
        (inner_real * coarse_real - inner_imag * coarse_imag).sum(-2),
        (inner_real * coarse_imag + inner_imag * coarse_real).sum(-2),
    )


Parts = tuple[Tensor, Tensor]


def _powers(exponents: Tensor, length: int) -> tuple[Parts, Parts]:
    """exp(exponents block i) and exp(exponents j), as real and imaginary parts."""
    block = max(1, math.isqrt(length))
    blocks = -(-length // block)
    rate, angle = exponents.real.contiguous()[..., None], exponents.imag.contiguous()[..., None]
    steps = torch.arange(max(block, blocks), device=rate.device, dtype=rate.dtype)
    # A product of two such sizes is no smaller than the smallest normal number: below it processors are very slow,
    # and beside the sum's other terms there is nothing left to see.
    floor = 0.45 * math.log(torch.finfo(rate.dtype).tiny)

    def power(steps: Tensor) -> Parts:
        size = torch.exp((rate * steps).clamp(min=floor))
        return size * torch.cos(angle * steps), size * torch.sin(angle * steps)

    return power(block * steps[:blocks]), power(steps[:block])
