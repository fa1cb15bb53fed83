"""Counter-based random numbers: the number at a position depends on a key and the position alone.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") in torch
integer operations, and standard normals from its words by the inverse distribution function AS 241
(Wichura 1988, PPND16). Only +, -, *, / and sqrt of float64 are used, which IEEE 754 rounds correctly, so
the bits are the same on every device. `tests/test_philox.py` pins them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CACHE_WORDS = 1 << 17  # made at a time

Key = tuple[int, int]


def key_of(*parts: str | int) -> Key:
    """A 64-bit key from names and numbers, as two 32-bit words."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(key: Key, counters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words (in int64) for each counter, given as four int64 tensors of equal shape.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(int(word)) for word in philox((0, 0), (zero, zero, zero, zero))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0 = high1.bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = high0.bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = low1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def normals(key: Key, start: int, stop: int, dim: int, device: torch.device, first: int = 0) -> Tensor:
    """[stop - start, dim] float32 standard normals; row p and column k depend on the key, p and k alone.

    The columns are `first`, a multiple of four, and those after it.
    """
    assert first % 4 == 0, "a call of Philox gives four numbers"
    rows = max(1, _CACHE_WORDS // dim)  # as many as stay in the processor's cache
    parts = [_normals(key, p, min(p + rows, stop), dim, device, first) for p in range(start, stop, rows)]
    return torch.cat(parts) if parts else torch.empty(0, dim, device=device)


def _normals(key: Key, start: int, stop: int, dim: int, device: torch.device, first: int) -> Tensor:
    blocks = -(-dim // 4)
    position = torch.arange(start, stop, device=device).repeat_interleave(blocks)
    block = torch.arange(first // 4, first // 4 + blocks, device=device).repeat(stop - start)
    words = philox(key, (position & _MASK, position >> 32, block, torch.zeros_like(block)))
    return normal_of(torch.stack(words, dim=1).view(stop - start, -1)[:, :dim])


def normal_of(words: Tensor) -> Tensor:
    """float32 standard normals from 32-bit words: the inverse distribution function at (word + 1/2) / 2^32."""
    centred = (words.double() + 0.5) * 2.0**-32 - 0.5
    squared = 0.180625 - centred * centred
    central = centred * _ratio(_CENTRAL, squared)
    index = (squared < 0).nonzero(as_tuple=True)
    if len(index[0]):
        tail = centred[index]
        radius = torch.sqrt(-_log(0.5 - tail.abs()))
        central[index] = _ratio(_NEAR, radius - 1.6) * tail.sign()  # 32-bit words never reach radius 5
    return central.float()


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a product of 32-bit words: int64 products wrap, as the golden bits check."""
    product = x * factor
    return (product >> 32).bitwise_and_(_MASK), product.bitwise_and_(_MASK)


def _log(x: Tensor) -> Tensor:
    """The natural logarithm of 0 < x < 1 by atanh, from correctly rounded operations only."""
    mantissa, exponent = torch.frexp(x)
    s = (mantissa - _SQRT_HALF) / (mantissa + _SQRT_HALF)
    series = torch.full_like(s, 1.0 / 23.0)
    for odd in range(21, 0, -2):
        series = series * (s * s) + 1.0 / odd
    return 2.0 * s * series + (exponent.double() * _LN2 - 0.5 * _LN2)


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Tensor) -> Tensor:
    numerator, denominator = coefficients
    return _polynomial(numerator, x) / _polynomial(denominator, x)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value.mul_(x).add_(coefficient)
    return value


_SQRT_HALF = 0.7071067811865476
_LN2 = 0.6931471805599453

# AS 241, PPND16: numerator and denominator, constant term first.
_CENTRAL = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_NEAR = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
