"""Sizes as expressions in config keys: ``num_attention_heads / num_key_value_heads``, ``2 * hidden_size``.

Read from left to right, without precedence; a division must be exact. Where a value is a list with one
entry per layer, ``each`` writes the entries that repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def evaluate(text: str, numbers: Mapping[str, int]) -> int | None:
    """The value of an expression; None if a key has no number or a division is not exact."""
    words = text.split()
    value = _operand(words[0], numbers)
    for operator, word in zip(words[1::2], words[2::2], strict=True):
        operand = _operand(word, numbers)
        if value is None or operand is None:
            return None
        if operator == "/":
            if operand == 0 or value % operand:
                return None
            value //= operand
        else:
            value = value * operand if operator == "*" else value + operand
    return value


def _operand(word: str, numbers: Mapping[str, int]) -> int | None:
    return int(word) if word.isdigit() else numbers.get(word)


def numbers_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The positive whole numbers of a config."""
    return {k: v for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool) and v > 0}


def apply(rule: Mapping[str, Any], config: Mapping[str, Any], layers: int) -> tuple[bool, Any]:
    """Whether a rule gives a value, and the value.

    A rule is ``{"value": constant}``, ``{"term": expression}``, ``{"each": entries that repeat}``, or
    ``{"absent": true}``: the class leaves the key away.
    """
    if "value" in rule:
        return True, rule["value"]
    if "each" in rule:
        entries = rule["each"]
        return True, [entries[i % len(entries)] for i in range(layers)]
    found = evaluate(rule["term"], numbers_of(config))
    return found is not None, found
