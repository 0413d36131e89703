"""Sums of powers: what a diagonal state space needs to become a convolution, and to skip to its last state."""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def vandermonde_product_direct(
    coefficients: Complex[Tensor, "*batch states"], exponents: Complex[Tensor, "*#batch states"], length: int
) -> Complex[Tensor, "*batch length"]:
    """sum_n coefficients_n exp(exponents_n l) for l = 0, ..., length - 1: the specification.

    The matrix of powers, with the powers of one number in each row, is called Vandermonde's. Here it is built whole.
    """
    ages = torch.arange(length, device=exponents.device)
    return (coefficients[..., None] * torch.exp(exponents[..., None] * ages)).sum(-2)


def vandermonde_product(
    coefficients: Complex[Tensor, "*batch states"], exponents: Complex[Tensor, "*#batch states"], length: int
) -> Complex[Tensor, "*batch length"]:
    """The same with two matrices of about sqrt(length) columns in place of one of ``length``.

    With l = i block + j, the power is a product of one that depends on i and one that depends on j alone, so that the
    sum over the states is a matrix product.
    """
    coarse, fine = _powers(exponents, length)
    product = (coefficients[..., None] * coarse).transpose(-1, -2) @ fine
    return product.flatten(-2)[..., :length]


def last_state(
    u: Float[Tensor, "batch time hidden"], exponents: Complex[Tensor, "hidden states"]
) -> Complex[Tensor, "batch hidden states"]:
    """sum_t exp(exponents (time - 1 - t)) u_t: what a recurrence has added up when the sequence ends."""
    batch, time, hidden = u.shape
    coarse, fine = _powers(exponents, time)
    blocks, block = coarse.shape[-1], fine.shape[-1]
    silent = u.new_zeros(batch, blocks * block - time, hidden)
    ages = torch.cat([u.flip(1), silent], dim=1).reshape(batch, blocks, block, hidden).to(exponents.dtype)
    return torch.einsum("bijh,hnj,hni->bhn", ages, fine, coarse)


def _powers(exponents: Tensor, length: int) -> tuple[Tensor, Tensor]:
    block = max(1, math.isqrt(length))
    blocks = -(-length // block)
    steps = torch.arange(max(block, blocks), device=exponents.device)
    coarse = torch.exp(exponents[..., None] * (block * steps[:blocks]))
    return coarse, torch.exp(exponents[..., None] * steps[:block])
