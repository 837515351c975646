"""How numbers are written for people: the one place for terminal, page and pictures."""

from __future__ import annotations

from math import floor, isfinite, log10

#: A change below this share is rounding, and is called none.
ROUNDING = 5e-6


def count(value: float) -> str:
    """A count with three significant digits and a unit: ``449M``, ``2.56B``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            scaled = value / size
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0f}"


def nbytes(value: float) -> str:
    """Bytes in binary units: ``11.2 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def significant(value: float | None, digits: int = 3) -> str:
    """A number by its first digits: ``0.00196`` as ``1.96e-3``, ``12345`` as ``12,345``."""
    if value is None or not isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - floor(log10(size)))
    found = f"{value:,.{decimals}f}"
    return found.rstrip("0").rstrip(".") if "." in found else found


def signed(value: float) -> str:
    """A change of the loss, with four decimals; one that rounds to nothing has no sign."""
    text = f"{value:+.4f}"
    return text[1:] if text in ("+0.0000", "-0.0000") else text


def percent(share: float | None, *, signed: bool = False) -> str:
    """A share: ``12%``, ``3.1%``, ``0.02%``, ``<0.001%``; ``not finite`` for None."""
    if share is None or not isfinite(share):
        return "not finite"
    size = abs(share) * 100
    sign = "+" if signed and share >= 0 else ""
    if size == 0:
        return "0%"
    if size < 0.001:
        return "<0.001%"
    digits = 0 if size >= 10 else 1 if size >= 1 else 2 if size >= 0.1 else 3
    return f"{sign}{share * 100:.{digits}f}%"


def moved(deviation: float | None, before: float | None = None, after: float | None = None) -> str:
    """A deviation with its sign; ``unchanged`` for what rounding explains.

    Of what was zero, and has no deviation, ``from 0 to 0.12``.
    """
    if deviation is None and before == 0 and after is not None:
        return f"from 0 to {significant(after)}"
    if deviation is not None and abs(deviation) < ROUNDING:
        return "unchanged"
    return percent(deviation, signed=True)


def factor(scale: tuple[float, float]) -> str:
    """A factor, or the smallest and the largest."""
    low, high = scale
    return significant(low, 4) if low == high else f"{significant(low, 4)} to {significant(high, 4)}"
