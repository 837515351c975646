"""Every optimizer of the table: trained, widened, loaded by its own code, trained on."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparkling_cli import api
from sparkling_cli.errors import SparklingError
from sparkling_cli.verification import verify
from tests.training import optimizers as opt
from tests.training.optimizers import CASES, Case

FFN = [{"axis": "ffn", "factor": 2}]


def needs(case: Case) -> None:
    """The case's package."""
    try:
        importlib.import_module(case.package)
    except ImportError:
        pytest.skip(f"{case.package} is not installed")


def narrow(case: Case, root: Path) -> Path:
    """A checkpoint after twelve steps."""
    net = opt.model()
    made = opt.optimizer(net, case)
    opt.train(net, made, case, range(12))
    return opt.save(net, made, case, root)


def gradient(step: int, name: str, shape: torch.Size) -> Tensor:
    """Of a parameter of the narrow model; in a wide one copies have their sources' gradients."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)) % 997)
    size = tuple(opt.FFN if n == 2 * opt.FFN else n for n in shape)
    drawn = torch.randn(size, generator=generator) * 0.01
    return drawn.repeat(*(wide // thin for wide, thin in zip(shape, size, strict=True)))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_widened_and_trained_on(case: Case, tmp_path: Path) -> None:
    """Old entries go on as they would have; copies part from their sources; others are refused by name."""
    needs(case)
    source = narrow(case, tmp_path / "narrow")
    if case.refused:
        with pytest.raises(SparklingError, match=case.refused) as caught:
            api.expand(source, tmp_path / "wide", axes=FFN, report="none")
        assert "random-copy" in str(caught.value.hint)
        (source / "optimizer.pt").unlink()
        api.expand(source, tmp_path / "wide", axes=FFN, init="random-copy", report="none")
        return
    api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    api.verify(source, tmp_path / "wide")
    verify(None, tmp_path / "wide")
    if case.old is not None:
        before = opt.updates(*opt.resumed(source, case), case, gradient)
        after = opt.updates(*opt.resumed(tmp_path / "wide", case), case, gradient)
        for old, new in zip(before, after, strict=True):
            for name, update in old.items():
                same = new[name][tuple(slice(0, n) for n in update.shape)]
                assert (same - update).abs().max() <= (case.old + 2e-7 / 1e-3) * update.abs().max(), name
    net, made = opt.resumed(tmp_path / "wide", case)
    losses = opt.train(net, made, case, range(12, 32))
    assert torch.isfinite(torch.tensor(losses)).all() and max(losses) < 8
    up = net.model.layers[0].mlp.up_proj.weight.detach()
    apart = (up[opt.FFN :] - up[: opt.FFN]).abs().max()
    assert bool(apart > 1e-5) == case.new


def test_muon_says_that_old_entries_step_less_far(tmp_path: Path) -> None:
    """And by how much: measured on a wider matrix whose new columns carry momentum as old ones do."""
    case = next(case for case in CASES if case.name == "Muon (torch)")
    found = api.make_plan(narrow(case, tmp_path / "narrow"), axes=FFN)
    notes = [note for note in found.plan.notes if "1/sqrt(columns)" in note]
    assert len(notes) == 1 and "down_proj" in notes[0] and "0.71 times" in notes[0]

    def step(*shape: int) -> float:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(shape))
        made = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0)
        weight.grad = torch.randn(shape)
        made.step()
        return float(weight.detach()[:, : opt.FFN].square().mean().sqrt())

    ratio = step(opt.HIDDEN, 2 * opt.FFN) / step(opt.HIDDEN, opt.FFN)
    assert abs(ratio - 0.5**0.5) < 0.05


def table() -> str:
    """The table of the docs."""
    lines = ["| optimizer | package | widened | old entries' updates | state |", "|---|---|---|---|---|"]
    for case in CASES:
        old = "" if case.refused else "by the whole tensor" if case.old is None else "as before"
        widened = "refused by name" if case.refused else "yes"
        lines.append(f"| {case.name} | `{case.package}` | {widened} | {old} | {case.what} |")
    return "\n".join(lines)


def test_the_docs_have_the_table() -> None:
    """``docs/how-to/optimizers.md`` says what the cases above say."""
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "optimizers.md"
    text = page.read_text(encoding="utf-8")
    found = text.partition("<!-- table -->\n")[2].partition("\n<!-- end of table -->")[0]
    assert found == table(), "put this between the marks:\n" + table()
