"""Random entries: normal, independent, and the same however they are asked for."""

from __future__ import annotations

import random
from math import erf, sqrt

import numpy as np
import pytest

from sparkling_cli.widening import fill

GOLDEN = [-0.9304189682006836, 0.8454485535621643, -0.697284460067749, 0.13369086384773254]


def test_any_part_is_a_part_of_the_whole() -> None:
    """Also across blocks, also of the first block alone."""
    whole = fill.normal(7, "w", 0, 3 * fill.BLOCK + 5)
    rng = random.Random(0)
    parts = [sorted(rng.sample(range(len(whole) + 1), 2)) for _ in range(50)]
    for start, stop in [*parts, (0, 1), (fill.BLOCK - 1, fill.BLOCK), (fill.BLOCK, fill.BLOCK + 1), (9, 9)]:
        part = fill.normal(7, "w", start, stop)
        assert part.dtype == np.float32
        assert np.array_equal(part, whole[start:stop])


def test_the_definition_does_not_change() -> None:
    """Numbers that any later version must make again: outputs are proved by them."""
    found = fill.normal(0, "model.layers.0.mlp.up_proj.weight", fill.BLOCK - 2, fill.BLOCK + 2)
    assert found.tolist() == GOLDEN


def test_they_are_standard_normal() -> None:
    """Kolmogorov-Smirnov against the normal distribution; moments; no correlation between neighbours."""
    count = 1 << 20
    numbers = fill.normal(1, "x", 0, count).astype(np.float64)
    ordered = np.sort(numbers)
    steps = np.arange(0, count, 64)
    normal = np.array([(1 + erf(x / sqrt(2))) / 2 for x in ordered[steps]])
    assert np.abs(normal - steps / count).max() < 1.63 / sqrt(count)  # exceeded once in 100 by chance
    assert abs(numbers.mean()) < 4 / sqrt(count)
    assert abs(numbers.var() - 1) < 4 * sqrt(2 / count)
    assert abs((numbers**4).mean() - 3) < 4 * sqrt(96 / count)
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 4 / sqrt(count)


@pytest.mark.parametrize(("seed", "stream"), [(1, "a"), (0, "b"), (0, "")])
def test_streams_are_independent(seed: int, stream: str) -> None:
    """Another seed, another name, another block: other numbers, uncorrelated."""
    count = fill.BLOCK
    one = fill.normal(0, "a", 0, count)
    for other in (fill.normal(seed, stream, 0, count), fill.normal(0, "a", count, 2 * count)):
        assert abs(float((one * other).mean())) < 4 / sqrt(count)
