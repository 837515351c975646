"""Expansions, good and bad, read as the method reads them.

The paper's quantities are RMS(f(Norm h)) / RMS(h) of a block (Sec. 3.1, App. B) and what follows from it, the
residual stream and the logits; a small jump of the loss is no criterion (App. F).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparkling_cli
from sparkling_cli.results.expansion import Report
from sparkling_cli.results.verdict import MOVED, READY


@dataclass(frozen=True)
class Case:
    """An expansion and how its verdict reads.

    Attributes:
        model: dense or moe.
        axis: to widen.
        factor: by how much.
        init: pair.
        moved: kinds of functions that the verdict must name; none for a sound expansion.
        words: that must be there.
        why: the reason.
    """

    model: str
    axis: str
    factor: float
    init: str
    moved: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        """For the test's name."""
        return f"{self.model}-{self.axis}-{self.factor:g}-{self.init}"


COPIES = "copies on both sides at a whole factor keep the function exactly (Eq. 16-17)"
ALIGNED = "half of the inner channels add nothing or less than trained ones, and all are scaled by sqrt(1/2)"
#: of the verdict, where tokens go to other experts
ROUTED = ("routed to the experts that they were routed to before",)
CASES = (
    Case("dense", "ffn", 2, "copy-copy", why=COPIES),
    Case("dense", "hidden", 2, "copy-copy", why=COPIES),
    Case("dense", "heads", 2, "copy-copy", why=COPIES),
    Case("dense", "ffn", 3, "copy-copy", why=COPIES),
    Case("dense", "hidden", 2, "zero-copy", why="the norms take the zeros' factor out again: 3e-5 in logits"),
    Case("dense", "ffn", 2, "zero-copy", ("mlp",), ("mlp -29%",), ALIGNED),
    Case("dense", "ffn", 2, "random-zero", ("mlp",), (), ALIGNED),
    Case("dense", "ffn", 2, "random-copy", ("mlp",), (), ALIGNED),
    Case("dense", "ffn", 2, "random-random", ("mlp",), (), ALIGNED),
    Case("dense", "hidden", 2, "random-copy", ("self_attn", "mlp"), (), "random rows add less"),
    Case("dense", "heads", 2, "random-zero", ("self_attn",), (), ALIGNED),
    Case("moe", "ffn", 2, "copy-copy", (), ("100.0% of tokens",), COPIES),
    Case("moe", "hidden", 2, "copy-copy", (), ("100.0% of tokens",), COPIES),
    Case("moe", "hidden", 2, "zero-copy", (), ("100.0% of tokens",), "as in the dense model, tied or not"),
    Case("moe", "ffn", 2, "zero-copy", ("mlp",), ROUTED, ALIGNED),
    Case("moe", "ffn", 2, "random-zero", ("mlp",), ROUTED, ALIGNED),
    Case("moe", "hidden", 2, "random-copy", ("self_attn", "mlp"), ("worse than uniform prediction",),
         "a tied table with random columns: the head adds noise to every logit"),
    Case("moe", "heads", 2, "random-random", ("self_attn",), ROUTED, ALIGNED),
)  # fmt: skip


@pytest.fixture(scope="module")
def expanded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: case -> (source, output, report), each made once."""
    made: dict[Case, tuple[Path, Path, Report]] = {}

    def make(case: Case) -> tuple[Path, Path, Report]:
        if case not in made:
            source: Path = request.getfixturevalue(f"{case.model}_checkpoint")
            axes = [{"axis": case.axis, "factor": case.factor}]
            target = tmp_path_factory.mktemp("verdict") / "wide"
            found = sparkling_cli.expand(source, target, axes=axes, init=case.init, threads=1)
            assert found.report is not None
            made[case] = source, target, found.report
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES, ids=str)
def test_verdict(case: Case, expanded: Any) -> None:
    """The headline, the functions that are named, and no attention where nothing is wrong."""
    report: Report = expanded(case)[2]
    text = " ".join(finding.text for finding in report.verdict.findings)
    attention = [finding.text for finding in report.verdict.findings if finding.level == "attention"]
    if not case.moved:
        assert report.verdict.headline.startswith(READY.rstrip(".")), case.why
        assert attention == [], case.why
        assert "the function is kept" in text
    else:
        assert report.verdict.headline == MOVED, case.why
        assert attention[0].startswith("The signal ratio RMS(f(Norm h))/RMS(h) moved")
        assert any("--scaling calibrated" in text and "--init copy-copy" in text for text in attention)
        for kind in case.moved:
            assert f"{kind} in " in attention[0], case.why
    for words in case.words:
        assert words in text, case.why


def test_what_the_mlp_adds_is_what_the_model_says(expanded: Any, tmp_path: Path) -> None:
    """At ffn 2x zero-copy each MLP adds 23-29% less, while down_proj keeps its ratio; by transformers."""
    case = next(c for c in CASES if (c.model, c.axis, c.init) == ("dense", "ffn", "zero-copy"))
    source, target, report = expanded(case)
    text = "The sea was calm, and the whale had not been seen. " * 40
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt")["input_ids"][:, :256]
    added: dict[str, list[float]] = {}
    for name, path in (("before", source), ("after", target)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        sizes = added.setdefault(name, [])
        for block in model.model.layers:
            block.mlp.register_forward_hook(lambda _m, _a, out, sizes=sizes: sizes.append(float(out.norm())))
        with torch.no_grad():
            model(ids)
    truth = [after / before - 1 for before, after in zip(added["before"], added["after"], strict=True)]
    assert all(-0.30 < change < -0.20 for change in truth)
    assert report.activations is not None
    found = [f for f in report.activations.functions if f.role == "mlp"]
    for function, change in zip(found, truth, strict=True):
        assert function.y_after / function.y_before - 1 == pytest.approx(change, abs=0.05)
    down = [e for e in report.activations.layers if e.role == "mlp.down_proj"]
    assert all(entry.moved < 0.1 for entry in down if entry.layer)


def test_expand_and_inspect_agree(expanded: Any) -> None:
    """The same two checkpoints: the same functions, the same stream, the same findings."""
    source, target, report = expanded(CASES[5])
    found = sparkling_cli.inspect(target, source)
    assert found.change is not None and report.activations is not None
    assert found.change.functions == report.activations.functions
    assert found.change.residual == report.activations.residual
    assert found.verdict is not None
    assert {f.text for f in found.verdict.findings} <= {f.text for f in report.verdict.findings}
