"""The line of a run before its expansion, against lines that are known."""

from __future__ import annotations

from math import log, nan, sqrt

import pytest

from sparkling_cli.training.expected_loss import LossForecast, losses


def line(step: int) -> float:
    """What is logged."""
    return 5.0 - 0.3 * log(step)


def test_a_line_is_found_and_goes_on() -> None:
    """From the last half of the run alone: what was logged before, or later, or is no number, has no say."""
    logged = [(step, line(step)) for step in range(10, 101, 10)]
    others = [(1, 9.0), (40, 7.0), (60, nan), (110, 0.0)]
    found = LossForecast.of([*others, *((s, v) for s, v in logged if s != 40), *logged[4:]], 100)
    assert found is not None and (found.first, found.last) == (50, 100)
    assert found.spread == pytest.approx(0.0, abs=1e-9)
    for step in (100, 200, 1000):
        assert found.at(step) == pytest.approx(line(step))


def test_the_spread_is_that_of_the_log() -> None:
    """Losses by turns above and below the line, of which two numbers are fitted."""
    logged = [(500 + step, line(500 + step) + (0.1 if step // 2 % 2 else -0.1)) for step in range(400)]
    found = LossForecast.of(logged, 900)
    assert found is not None
    assert found.spread == pytest.approx(0.1 * sqrt(400 / 398), rel=1e-3)
    assert found.at(1000) == pytest.approx(line(1000), abs=2e-3)


@pytest.mark.parametrize("logged", [[], [(step, line(step)) for step in range(94, 101)], [(100, 3.0)] * 20])
def test_too_little_gives_no_forecast(logged: list[tuple[int, float]]) -> None:
    """Nothing, seven losses, or all of one step."""
    assert LossForecast.of(logged, 100) is None


def test_losses_of_a_log() -> None:
    """Of training; evaluations, the summary at the end and what is none are left out."""
    log_history = [
        {"loss": 3, "step": 10}, {"eval_loss": 2.0, "step": 10}, {"train_loss": 2.5, "step": 10},
        {"loss": "3", "step": 20}, {"loss": 3.0, "step": "20"}, {"loss": 3.0}, None,
        {"loss": 2.5, "step": 30},
    ]  # fmt: skip
    assert losses(log_history) == [(10, 3.0), (30, 2.5)]
