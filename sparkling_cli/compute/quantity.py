"""Counts as people write them: ``200B`` tokens, ``1.5T``, ``2e11``."""

from __future__ import annotations

import re

from sparkling_cli.errors import SpecError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_COUNT = re.compile(r"(?P<number>\d[\d_]*(?:\.\d+)?(?:[eE][+]?\d{1,2})?)\s*(?P<unit>[KMBGTkmbgt]?)")
#: a moment before this share of the run is a slip: steps, or a unit that is missing
EARLIEST = 1e-4
_SHARE = re.compile(r"(?P<percent>\d+(?:\.\d+)?)\s*%")


def parse_count(text: str, what: str = "count") -> int:
    """``"200B"`` as 200,000,000,000. Units are decimal: K, M, B (or G), T.

    Raises:
        SpecError: not such a number, or not a whole one.
    """
    match = _COUNT.fullmatch(text.strip().replace(",", ""))
    if match is None:
        raise SpecError(
            f"{what}: {text!r} is not a count", hint="write it as 200B, 1.5T, 500M, 2e11 or 200000000000"
        )
    number = match["number"].replace("_", "")
    unit = _UNITS[match["unit"].upper()]
    # whole numbers stay exact; others are decimal fractions of a unit, exact in float up to 2^53
    count = int(number) * unit if number.isdigit() else round(float(number) * unit)
    if count < 1:
        raise SpecError(f"{what}: {text!r} must be above zero")
    return count


def parse_moment(text: str, total: int, what: str) -> int:
    """A count, or a share of the whole run: ``"50%"`` of ``total``.

    Raises:
        SpecError: neither of them, or no moment inside the run.
    """
    share = _SHARE.fullmatch(text.strip())
    if share is None:
        if re.fullmatch(r"0?\.\d+", text.strip()):
            raise SpecError(
                f"{what}: {text!r} is not a count", hint=f"a share is written as {100 * float(text):g}%"
            )
        count = parse_count(text, what)
        if count < EARLIEST * total:
            raise SpecError(
                f"{what}: {count:,} of {total:,} tokens is the very beginning of the run",
                hint="it counts tokens, not steps: write it as 100B, or as 50%",
            )
        return count
    count = round(float(share["percent"]) / 100 * total)
    if not 0 < count < total:
        raise SpecError(
            f"{what}: {text!r} is not inside the run", hint="give more than 0% and less than 100%"
        )
    return count
