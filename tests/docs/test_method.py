"""The method's page: every rule has its code and its test, every figure its command."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "explanation" / "method.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the table whose first column has this heading, without its two head lines."""
    lines = iter(PAGE.splitlines())
    rows = []
    for line in lines:
        if line.startswith(f"| {heading} |"):
            next(lines)
            for row in lines:
                if not row.startswith("|"):
                    return rows
                rows.append([cell.strip() for cell in row.strip("|").split("|")])
    return rows


def defined(path: Path, dotted: str) -> bool:
    """Whether a file defines a function, a class, or a member of one."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for name in dotted.split("."):
        found = [
            node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
        ]
        if not found:
            return False
        body = found[0].body
    return True


RULES = table("rule")


@pytest.mark.parametrize("row", RULES, ids=[row[0][:40] for row in RULES])
def test_a_rule_has_its_code_and_its_test(row: list[str]) -> None:
    """Both exist; the source is a place in the paper, or says that the rule is ours."""
    _, source, code, test = row
    assert re.search(r"\bours\b|Eq\. |App\. |Sec\. ", source), source
    for cell, folder in ((code, "sparkling_cli/"), (test, "tests/")):
        path, _, name = cell.strip("`").partition("::")
        assert path.startswith(folder)
        assert (ROOT / path).is_file(), path
        assert defined(ROOT / path, name), cell
    assert "::test_" in test


def test_there_are_rules_of_ours_and_of_the_paper() -> None:
    """The table was read."""
    assert len(RULES) > 15
    assert sum("ours" in row[1] for row in RULES) > 5


def test_adams_arithmetic_is_what_the_page_says() -> None:
    """The second table, to the letter, and the ratios of learning rates."""
    from benchmarks import boundary

    assert [f"| {' | '.join(row)} |" for row in table("beta2")] == boundary.adam_rows()
    largest, mean, summed = boundary.paper_ratios()
    assert f"{largest:.2f}, and\n{mean:.2f} on average" in PAGE
    assert f"ones, is {summed:.2f})" in PAGE


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_adams_arithmetic_is_adams(beta2: float) -> None:
    """Torch's own Adam takes these steps: a steady gradient that is halved, and moments set to zero."""
    from benchmarks import boundary

    param = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([param], lr=1.0, betas=(boundary.BETA1, beta2), eps=0.0)
    param.grad = torch.ones_like(param)
    for _ in range(20_000 if beta2 == 0.999 else 2_000):
        optimizer.step()
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[param][moment][1] = 0
    param.grad = torch.tensor([0.5, 1.0], dtype=torch.float64)
    for t in range(1, 60):
        before = param.detach().clone()
        optimizer.step()
        old, new = (before - param.detach()).tolist()
        assert old == pytest.approx(boundary.old_fan_out_step(beta2, t), rel=1e-6)
        assert new == pytest.approx(boundary.new_step(beta2, t), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("row", table("checkpoint"), ids=lambda row: "-".join(row[:2]))
def test_gradients_at_the_boundary(row: list[str]) -> None:
    """The first table, measured again; the norm to a percentage point, as it depends on rounding."""
    from benchmarks import boundary

    found = boundary.boundary(row[0], row[1])
    assert found.fan_out == pytest.approx((float(row[2]),) * 2, abs=1e-3)
    assert found.fan_in == pytest.approx((float(row[3]),) * 2, abs=1e-3)
    assert 100 * (found.norm - 1) == pytest.approx(float(row[4].rstrip("%")), abs=1)
