"""How much is measured when nobody says: everything on small models, less on large ones, nothing on huge."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import sparkling_cli
from sparkling_cli import outcome

FFN = {"axes": [{"axis": "ffn", "factor": 2}]}


@pytest.mark.parametrize("parameters", [1, 10**6, 10**7, 5 * 10**7, 3 * 10**8, 10**10])
def test_work_stays_in_bounds(parameters: int) -> None:
    """All of it on small models, at least 64 tokens on any, and between them no more work than allowed."""
    sequences, length = outcome.affordable(parameters)
    if parameters <= 10**7:
        assert (sequences, length) == (8, 256)
    elif parameters < 10**9:
        assert 0.4 * outcome.AUTO_WORK < 2 * parameters * sequences * length <= outcome.AUTO_WORK
    else:
        assert (sequences, length) == (1, 64)


@pytest.mark.parametrize(
    ("limit", "value"), [("AUTO_LIMIT", 1000), ("AUTO_TENSORS", 10), ("AUTO_WORK", 1e9), ("", None)]
)
def test_limits_hold_only_for_auto(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float | None
) -> None:
    """Too large by bytes or by tensors: not measured, with the way to do it. Else: fewer tokens, or all."""
    if limit:
        monkeypatch.setattr(outcome, limit, value)
    made = sparkling_cli.expand(dense_checkpoint, tmp_path / "auto", **FFN)
    assert made.report is not None
    if limit in ("AUTO_LIMIT", "AUTO_TENSORS"):
        assert made.report.activations is None
        assert "--report full" in made.report.activations_missing
        full = sparkling_cli.expand(dense_checkpoint, tmp_path / "full", report="full", **FFN)
        assert full.report is not None and full.report.activations is not None
        assert full.report.activations.tokens == 2048
        return
    assert made.report.activations is not None
    before, after = (
        sum(t.numel() for t in load_file(folder / "model.safetensors").values())
        for folder in (dense_checkpoint, tmp_path / "auto")
    )
    affordable = 1e9 / (2 * (before + after))
    assert made.report.activations.tokens == (affordable // 256 * 256 if limit else 2048)
