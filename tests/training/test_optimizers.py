"""Every optimizer of the table: trained, widened, loaded by its own code, trained on."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparkling_cli
from sparkling_cli import api
from sparkling_cli.errors import SparklingError
from sparkling_cli.verification import verify
from tests.docs.blocks import blocks
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
    notes = [note for note in found.plan.notes if "shape of a matrix" in note]
    assert len(notes) == 1 and "down_proj" in notes[0] and "0.71 times" in notes[0]
    assert (
        notes[0] in sparkling_cli.plan_run(tmp_path / "narrow", "1B", expand_at="50%", axes={"ffn": 2}).notes
    )

    def step(*shape: int) -> float:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(shape))
        made = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0)
        weight.grad = torch.randn(shape)
        made.step()
        return float(weight.detach()[:, : opt.FFN].square().mean().sqrt())

    ratio = step(opt.HIDDEN, 2 * opt.FFN) / step(opt.HIDDEN, opt.FFN)
    assert abs(ratio - 0.5**0.5) < 0.05


def test_muon_steps_as_far_by_a_rate_of_its_own(tmp_path: Path) -> None:
    """The page's way: old entries of a matrix with twice the columns step 0.71 times as far, or as before."""
    case = next(case for case in CASES if case.name == "Muon (torch)")
    source = narrow(case, tmp_path / "narrow")
    api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    name = "model.layers.0.mlp.down_proj.weight"
    (before, after), (_, undone) = (
        [distances(path, case, name, by) for path in (source, tmp_path / "wide")] for by in (1.0, 0.5**0.5)
    )
    assert after / before == pytest.approx(0.5**0.5, abs=0.03)
    assert undone / before == pytest.approx(1.0, abs=0.03)


def distances(path: Path, case: Case, name: str, by: float) -> float:
    """How far the old entries of a matrix move in the tenth step, its rate divided by ``by``."""
    net, muon = opt.resumed(path, case)
    wider = [p for n, p in net.named_parameters() if n == name]
    (group,) = muon.param_groups
    group["params"] = [p for p in group["params"] if all(p is not q for q in wider)]
    muon.add_param_group({**group, "params": wider, "lr": group["lr"] / by})
    return float(opt.updates(net, muon, case, gradient)[-1][name][:, : opt.FFN].norm())


def eight_bit(source: Path, root: Path, *words: str) -> Path:
    """A copy of a checkpoint whose state the page's script has changed."""
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "optimizers.md"
    (root.parent / "bits.py").write_text(next(b.body for b in blocks(page) if b.title == "bits.py"))
    shutil.copytree(source, root)
    command = [sys.executable, "bits.py", *words, str(source / "optimizer.pt"), str(root / "optimizer.pt")]
    done = subprocess.run(command, cwd=root.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


def test_8_bit_state_by_the_pages_script(tmp_path: Path) -> None:
    """Made 32-bit, widened, made 8-bit: by half a step of the code where blocks move, bit-equal where not."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes==0.50.2")
    case = next(case for case in CASES if case.name == "AdamW, 8 bit")
    source = narrow(case, tmp_path / "narrow")
    with pytest.raises(SparklingError) as caught:
        api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    assert "docs/how-to/optimizers.md" in str(caught.value.hint)
    wide32 = tmp_path / "wide32"
    api.expand(eight_bit(source, tmp_path / "full", "32"), wide32, axes=FFN, report="none")
    api.verify(tmp_path / "full", wide32)
    # the first update of old entries, by the 8-bit optimizer, is the one that it would have made
    first = opt.updates(*opt.resumed(source, case), case, gradient)[0]
    for path in (wide32, eight_bit(wide32, tmp_path / "wide8", "8")):
        net, made = opt.resumed(path, case)
        again = opt.updates(net, made, case, gradient)[0]
        for name, update in first.items():
            same = again[name][tuple(slice(0, n) for n in update.shape)]
            exact = path is wide32 or "down_proj" not in name
            assert (same - update).abs().max() <= (1e-4 if exact else 0.1) * update.abs().max(), name
        losses = opt.train(net, made, case, range(12, 32))
        assert torch.isfinite(torch.tensor(losses)).all() and max(losses) < 8
    old, new = (torch.load(p / "optimizer.pt")["state"] for p in (source, tmp_path / "wide8"))
    moved = 0
    for number, kept in old.items():
        held, wide = (entry["__bnb_optimizer_quant_state__"] for entry in (kept, new[number]))
        for n in "12":
            if held[f"state{n}"].dtype == torch.uint8:
                moved += compared(held, wide, n)
    assert moved == 2  # down_proj's two moments


def compared(held: dict[str, Tensor], wide: dict[str, Tensor], n: str) -> bool:
    """Whether blocks have moved; old entries are equal to within half a step, and to the bit if not."""
    before, after = held[f"state{n}"], wide[f"state{n}"]
    same = tuple(slice(0, size) for size in before.shape)
    if before.shape[1] == after.shape[1]:
        assert torch.equal(after[same], before)
        scales = wide[f"absmax{n}"][: len(held[f"absmax{n}"])]
        assert torch.allclose(scales, held[f"absmax{n}"], rtol=2e-7, atol=0)
        return False
    code = held[f"qmap{n}"]
    values, limits = [], []
    for state, absmax in ((before, held[f"absmax{n}"]), (after, wide[f"absmax{n}"])):
        blocks_of = absmax.repeat_interleave(256)[: state.numel()].view(state.shape)
        values.append((code[state.long()] * blocks_of)[same])
        # half of the wider of the two gaps beside a code
        gaps = torch.diff(code, prepend=code[:1], append=code[-1:])
        limits.append((torch.maximum(gaps[:-1], gaps[1:])[state.long()] / 2 * blocks_of)[same])
    assert ((values[0] - values[1]).abs() <= limits[1] * (1 + 1e-5) + 1e-12).all()
    return True


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
