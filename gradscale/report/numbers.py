"""Numbers as people read them: a value with its standard error, two digits of the error."""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNDEFINED = "undefined"
_NEGLIGIBLE = 2e-7
_SMALL = 1e-4  # errors below it are written with a power of ten


def estimate_text(value: float, stderr: float) -> str:
    """`value ± stderr`; a stderr of 0 means exact, NaN that no error is known.

    >>> estimate_text(0.21345, 0.0172), estimate_text(12345678.0, 54321.0)
    ('0.213 ± 0.017', '(1.2346 ± 0.0054)×10⁷')
    >>> estimate_text(0.25, 0.0), estimate_text(0.25, math.nan), estimate_text(math.nan, 0.1)
    ('0.25 ± 0', '0.25 ± ?', 'undefined')
    >>> estimate_text(33.264712345, 1e-13)  # an error that is not worth so many digits
    '33.264712 ± 10⁻¹³'
    >>> estimate_text(-0.1199985724, 5.13e-8)
    '-0.119998572 ± 5.1×10⁻⁸'
    """
    if not math.isfinite(value):
        return UNDEFINED if math.isnan(value) else f"{'-' if value < 0 else ''}infinite"
    if not math.isfinite(stderr):
        return f"{number_text(value)} ± ?"
    if stderr == 0.0:
        return f"{number_text(value, 6)} ± 0"
    if stderr < _NEGLIGIBLE * abs(value):
        return f"{number_text(value, 8)} ± {number_text(stderr, 2)}"
    exponent = _exponent(max(abs(value), stderr))
    last_digit = _exponent(float(f"{stderr:.1e}")) - 1  # the second digit of the error
    if -4 <= exponent < 5:
        decimals = max(0, -last_digit)
        error = number_text(stderr, 2) if stderr < _SMALL else f"{_rounded(stderr, last_digit):.{decimals}f}"
        return f"{_rounded(value, last_digit):.{decimals}f} ± {error}"
    decimals, scale = max(0, exponent - last_digit), 10.0**exponent
    return f"({_rounded(value / scale, -decimals):.{decimals}f} ± {stderr / scale:.{decimals}f})×{power_text(exponent)}"


def number_text(value: float, digits: int = 4) -> str:
    """`digits` significant digits, trailing zeros cut, powers of ten beyond 10⁵ and below 10⁻⁴.

    >>> number_text(0.5), number_text(1234.5678), number_text(3.2e-7)
    ('0.5', '1235', '3.2×10⁻⁷')
    """
    if not math.isfinite(value):
        return UNDEFINED if math.isnan(value) else f"{'-' if value < 0 else ''}infinite"
    if value == 0.0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    if -4 <= int(exponent) < 5:
        text = f"{float(f'{mantissa}e{exponent}'):.{max(0, digits - 1 - int(exponent))}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return power_text(int(exponent)) if mantissa == "1" else f"{mantissa}×{power_text(int(exponent))}"


def power_text(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def _exponent(value: float) -> int:
    return math.floor(math.log10(value)) if value > 0 else 0


def _rounded(value: float, last_digit: int) -> float:
    """To the second digit of the error, above the point too (1234 -> 1200), and without a negative zero."""
    return round(value, -last_digit) + 0.0
