"""Sums of float64 numbers without rounding, so that their bits depend on neither order nor grouping.

A total is an integer in units of 2^-384, in 32 digits to the base 2^32, each from -2^31 to 2^31 - 1, the least
significant first: the only such digits, so that equal sums have equal bits.

Shapes: B numbers to be added, N totals, D = 32 digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradscale.errors import GradscaleError

DIGITS = 32
_BITS = 32  # of a digit
_LOWEST = -384  # the exponent of a unit: what a number has below is cut off. The square of 2^-384 rounds to zero
_LIMIT = 2.0**600
_PIECE = 18  # bits of a number's 53 that are added at a time
_ADDED = 1 << 12  # numbers that may be added before carries are passed on: 2^12 2^50 < 2^63


def zero_total(size: int) -> Tensor:
    """[N, D] int64."""
    return torch.zeros(size, DIGITS, dtype=torch.int64)


def total_of(values: Tensor) -> Tensor:
    """[B, N] float64 -> [N, D] int64, the exact sum over B. Cost: 3 B N additions.

    Raises: GradscaleError if a number is not below 2^600; the products of a gradient with a finite square are.
    """
    if not bool((values.abs() < _LIMIT).all()):
        raise GradscaleError(
            f"numbers to be added must be below 2^600, got {float(values.abs().max())}; measure in a wider dtype, or "
            "scale the losses down"
        )
    total = zero_total(values.shape[1]).to(values.device)
    for part in values.split(_ADDED):
        total = add_totals(total, _unsettled(part))
    return total


def add_totals(left: Tensor, right: Tensor) -> Tensor:
    """The sum of two totals [N, D]: associative and commutative to the bit."""
    digits = list((left + right).unbind(dim=1))
    half = 1 << (_BITS - 1)
    for k in range(DIGITS - 1):
        carry = (digits[k] + half) >> _BITS
        digits[k] = digits[k] - (carry << _BITS)
        digits[k + 1] = digits[k + 1] + carry
    return torch.stack(digits, dim=1)


def value_of(total: Tensor) -> Tensor:
    """[N] float64, from the highest digit down: each is at least as large as all below it, so that none cancels."""
    value = torch.zeros(len(total), dtype=torch.float64, device=total.device)
    for k in reversed(range(DIGITS)):
        value += total[:, k].double() * 2.0 ** (_LOWEST + _BITS * k)
    return value


def _unsettled(values: Tensor) -> Tensor:
    """[N, D]: the sum over at most _ADDED rows, its carries not passed on."""
    mantissa, exponent = torch.frexp(values.double())
    whole = (mantissa.abs() * 2.0**53).long()
    sign = values.sign().long()
    position = exponent.long() - 53 - _LOWEST  # of the lowest of the 53 bits
    total = zero_total(values.shape[1]).to(values.device)
    for start in range(0, 53, _PIECE):
        piece = (whole >> start) & ((1 << _PIECE) - 1)
        place = position + start
        piece = torch.where(place < 0, piece >> (-place).clamp(0, 63), piece)
        place = place.clamp(min=0)
        total.scatter_add_(1, (place // _BITS).T, (sign * (piece << (place % _BITS))).T)
    return total
