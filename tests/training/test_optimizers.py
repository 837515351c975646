"""Every optimizer of the table: trained, widened, loaded by its own code, trained on."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparkling_cli
from sparkling_cli import api
from sparkling_cli.errors import SparklingError
from sparkling_cli.verification import verify
from tests.training import optimizers as opt
from tests.training.optimizers import CASES, Case

FFN = [{"axis": "ffn", "factor": 2}]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Steps that their packages compile run as they are written."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


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
        trained_on(opt.loaded(tmp_path / "wide"), None, case)
        return
    api.expand(source, tmp_path / "wide", axes=FFN, report="none")
    api.verify(source, tmp_path / "wide")
    verify(None, tmp_path / "wide")
    if case.old is not None and not case.quantized:
        before = opt.updates(*opt.resumed(source, case), case, gradient)
        after = opt.updates(*opt.resumed(tmp_path / "wide", case), case, gradient)
        for old, new in zip(before, after, strict=True):
            for name, update in old.items():
                same = new[name][tuple(slice(0, n) for n in update.shape)]
                assert (same - update).abs().max() <= (case.old + 2e-7 / 1e-3) * update.abs().max(), name
    net = trained_on(*opt.resumed(tmp_path / "wide", case), case)
    up = net.model.layers[0].mlp.up_proj.weight.detach()
    apart = (up[opt.FFN :] - up[: opt.FFN]).abs().max()
    assert bool(apart > 1e-5) == case.new


def trained_on(net: Any, made: Any, case: Case) -> Any:
    """The model after 20 more steps by its optimizer, or by a new one."""
    losses = opt.train(net, opt.optimizer(net, case) if made is None else made, case, range(12, 32))
    assert torch.isfinite(torch.tensor(losses)).all() and max(losses) < 8
    return net


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


QUANTIZED = [case for case in CASES if case.quantized]


def in_full(made: Any) -> Any:
    """The same optimizer with its moments in float32, which it takes as it finds them."""
    for state in made.state.values():
        for name, value in list(state.items()):
            if hasattr(value, "dequantize") and type(value) is not Tensor:
                state[name] = value.dequantize()
            elif getattr(value, "dtype", None) == torch.uint8:
                from bitsandbytes.functional import dequantize_blockwise

                n = name[-1]
                scales, code = state.pop(f"absmax{n}"), state.pop(f"qmap{n}")
                pairs = zip(value, scales, strict=True) if scales.ndim > 1 else [(value, scales)]
                full = [dequantize_blockwise(one, absmax=own, code=code, blocksize=256) for one, own in pairs]
                state[name] = torch.stack(full) if scales.ndim > 1 else full[0]
    return made


@pytest.mark.parametrize("case", QUANTIZED, ids=[case.name for case in QUANTIZED])
def test_updates_of_quantized_state(case: Case, tmp_path: Path) -> None:
    """Ten updates of old entries: the unwidened run's where no block moves, else within the format's error.

    The error of the format is what parts the unwidened run from one that goes on from the same numbers in
    float32. Both runs have such errors, each its own, so their difference has the norm of two at most.
    """
    needs(case)
    source, wide = narrow(case, tmp_path / "narrow"), tmp_path / "wide"
    api.expand(source, wide, axes=FFN, report="none")
    before = opt.updates(*opt.resumed(source, case), case, gradient)
    after = opt.updates(*opt.resumed(wide, case), case, gradient)
    net, made = opt.resumed(source, case)
    exact = opt.updates(net, in_full(made), case, gradient)
    down = "model.layers.0.mlp.down_proj.weight"
    error = max((old[down] - full[down]).norm() for old, full in zip(before, exact, strict=True))
    assert error > 0
    for old, new in zip(before, after, strict=True):
        for name, update in old.items():
            same = new[name][tuple(slice(0, n) for n in update.shape)]
            if name == down:  # its blocks of 256 entries, two and two thirds of its rows, come apart
                assert (same - update).norm() <= 2 * error, (float((same - update).norm()), float(error))
            else:
                assert (same - update).abs().max() <= 2e-4 * update.abs().max(), name


def test_torchaos_blocks_must_make_up_the_tensor(tmp_path: Path) -> None:
    """Else it is refused by name; in whole blocks it goes on, by any factor, and in new layers too."""
    case = next(case for case in CASES if case.name == "AdamW, 8 bit (torchao)")
    needs(case)
    source = narrow(case, tmp_path / "narrow")
    with pytest.raises(SparklingError, match="blocks of 256") as caught:
        api.expand(source, tmp_path / "odd", axes=[{"axis": "ffn", "factor": 102 / 96}], report="none")
    assert "random-copy" in str(caught.value.hint)
    for name, axes in (
        ("wider", [{"axis": "ffn", "factor": 1.125}]),
        ("deeper", [{"axis": "layers", "factor": 2}, {"axis": "hidden", "factor": 2}]),
    ):
        api.expand(source, tmp_path / name, axes=axes, report="none")
        api.verify(source, tmp_path / name)
        trained_on(*opt.resumed(tmp_path / name, case), case)


def test_directions_that_change_sides_are_refused(tmp_path: Path) -> None:
    """Dion takes them of rows where these are fewer: at a size where they no longer are, it is refused."""
    case = next(case for case in CASES if case.name == "Dion")
    needs(case)
    source = narrow(case, tmp_path / "narrow")
    with pytest.raises(SparklingError, match="directions") as caught:
        api.expand(source, tmp_path / "wide", axes=[{"axis": "hidden", "factor": 2}], report="none")
    assert "random-copy" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("option", "package"), [("adamw_torch_8bit", "torchao"), ("adamw_bnb_8bit", "bitsandbytes")]
)
def test_the_trainer_goes_on_with_quantized_state(tmp_path: Path, option: str, package: str) -> None:
    """Transformers' own: ten steps, wider, resumed from there for twenty more, its state as it was saved."""
    pytest.importorskip(package, reason=f"pip install {package}")
    from transformers import Trainer, TrainingArguments

    def run(net: Any, folder: Path, steps: int, resumed: str | None = None) -> Any:
        options: dict[str, Any] = {"optim": option, "max_steps": steps, "save_steps": 10, "use_cpu": True}
        args = TrainingArguments(str(folder), report_to=[], learning_rate=1e-3, **options)
        tokens = [opt.batch(step)[0] for step in range(8 * steps)]
        trainer = Trainer(net, args, train_dataset=[{"input_ids": t, "labels": t} for t in tokens])
        trainer.train(resume_from_checkpoint=resumed)
        return trainer

    run(opt.model(), tmp_path / "narrow", 10)
    narrow, wide = (tmp_path / name / "checkpoint-10" for name in ("narrow", "wide"))
    api.expand(narrow, wide, axes=FFN, report="none")
    api.verify(narrow, wide)
    trainer = run(opt.loaded(wide), tmp_path / "wide", 30, str(wide))
    assert trainer.state.global_step == 30
    up = trainer.model.model.layers[0].mlp.up_proj.weight.detach()
    assert (up[opt.FFN :] - up[: opt.FFN]).abs().max() > 1e-5
    states = trainer.optimizer.optimizer.state.values()
    quantized = [v for s in states for v in s.values() if hasattr(v, "codes") or is_code(v)]
    assert len(quantized) >= 2 * 6  # of all matrices; bitsandbytes keeps the embedding's in 32 bits


def is_code(value: Any) -> bool:
    """Whether a piece of state is bitsandbytes' codes."""
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def table() -> str:
    """The table of the docs."""
    lines = ["| optimizer | package | widened | old entries' updates | state |", "|---|---|---|---|---|"]
    for case in CASES:
        old = "" if case.refused else "by the whole tensor" if case.old is None else "as before"
        old += " to the format's error" * case.quantized
        widened = "refused by name" if case.refused else "yes"
        lines.append(f"| {case.name} | `{case.package}` | {widened} | {old} | {case.what} |")
    return "\n".join(lines)


def test_the_docs_have_the_table() -> None:
    """``docs/how-to/optimizers.md`` says what the cases above say."""
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "optimizers.md"
    text = page.read_text(encoding="utf-8")
    found = text.partition("<!-- table -->\n")[2].partition("\n<!-- end of table -->")[0]
    assert found == table(), "put this between the marks:\n" + table()
