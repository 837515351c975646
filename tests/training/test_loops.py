"""Every loop of the table: equal to separate parameters, and the same run when it is left and taken up."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from sparkling_cli.errors import SpecError
from sparkling_cli.training.held import Held
from tests.training import loops
from tests.training import reference as ref
from tests.training.loops import BFLOAT16, FLOAT32, FLOAT64, STEPS, Case
from tests.training.patched import apply, litgpt, nanochat, nanogpt, patches

PATCH = "the change below, to its script"
CASES = [
    *loops.CASES,
    Case("nanoGPT", "torch", PATCH, nanogpt),
    Case("LitGPT", "lightning", PATCH, litgpt),
    Case("nanochat", "torch", PATCH, nanochat),
]
ZERO = "`rewarm` with the engine's `optimizer` and `module`"
#: what test_sharded and test_zero hold, in several processes
MEGATRON = "`rewarm` with Megatron's optimizer and its list of models"
SHARDED = [
    ("FSDP 2 (`fully_shard`), two processes", "`rewarm`", FLOAT64),
    ("FSDP 2 with `CPUOffloadPolicy` (without a GPU), two processes", "`rewarm`", FLOAT64),
    (
        "FSDP 1 (`FullyShardedDataParallel`), two processes; hybrid, four",
        "`rewarm` with the wrapped model",
        FLOAT64,
    ),
    ("FSDP 1 wrapped by accelerate, two processes", "`rewarm` with the wrapped model", FLOAT64),
    ("tensor parallel and FSDP 2 (a mesh of 2 x 2 processes)", "`rewarm`", FLOAT64),
    ("flat tensors of any framework", "`rewarm` with `Piece`s", FLOAT64),
    ("DeepSpeed, ZeRO 1, 2 and 3, two processes", ZERO, FLOAT32),
    ("DeepSpeed, ZeRO 2, prepared by accelerate", "`rewarm` with what `prepare` returned", FLOAT32),
    ("DeepSpeed, ZeRO 2 and 3, under the Trainer, one process", "its callback", FLOAT32),
    ("DeepSpeed, ZeRO 2 and 3 with torch's AdamW on the CPU", ZERO, FLOAT32),
    (
        "DeepSpeed, ZeRO 2 and 3 with its `DeepSpeedCPUAdam`",
        ZERO,
        FLOAT32,
        "to rounding, as it resumes itself",
    ),
    ("DeepSpeed, ZeRO 2 and 3 in bfloat16", ZERO, BFLOAT16),
    (
        "Megatron's distributed optimizer in bfloat16; data, tensor, pipeline and expert parallel",
        MEGATRON,
        FLOAT32,
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_equals_separate_parameters_and_itself(case: Case, tmp_path: Path) -> None:
    """Fifty steps; and twenty, saved by the framework, and thirty after loading: bit for bit."""
    try:
        importlib.import_module(case.package)
    except ImportError:
        pytest.skip(f"{case.package} is not installed")
    (tmp_path / "whole").mkdir()
    (tmp_path / "legs").mkdir()
    whole = case.run(tmp_path / "whole", (STEPS,))
    assert ref.distance(whole, case.reference()) < FLOAT64.limit
    in_legs = case.run(tmp_path / "legs", (20, STEPS - 20))
    assert [name for name, value in whole.items() if not torch.equal(value, in_legs[name])] == []


def test_the_reference_is_told_from_a_run_without_the_adapter() -> None:
    """What the cases above are held to is further away than any of their tolerances."""
    net, optimizer, sched = loops.start()
    for _ in ref.steps(net, optimizer, sched, ref.TE, ref.TE + STEPS):
        pass
    assert ref.distance(ref.parameters(net), loops.separate()) > 1e-3


def test_the_change_of_litgpt_applies_to_its_script(tmp_path: Path) -> None:
    """As the package has it."""
    package = pytest.importorskip("litgpt", reason="pip install litgpt==0.5.13")
    (tmp_path / "litgpt").mkdir()
    script = (Path(package.__file__).parent / "pretrain.py").read_text()
    (tmp_path / "litgpt" / "pretrain.py").write_text(script)
    apply(patches()["litgpt"], tmp_path)
    changed = (tmp_path / "litgpt" / "pretrain.py").read_text()
    assert changed != script
    compile(changed, "pretrain.py", "exec")


def test_a_run_that_begins_too_early_is_refused() -> None:
    """A framework that has loaded no checkpoint of the expanded run counts from zero."""
    net, optimizer, _ = loops.start()
    with pytest.raises(SpecError, match="step 0 lies before the expansion at step 30"):
        Held(loops.history()).begin([optimizer], net, 0)


def test_state_that_is_loaded_late_counts_too() -> None:
    """Counters loaded after the run has begun, or before: both are gone on from."""
    for late in (False, True):
        net, optimizer, _ = loops.start()
        held = Held(loops.history())
        state = {"steps": [ref.TE + 7]}
        if not late:
            held.load_state_dict(state)
        held.begin([optimizer], net, ref.TE)
        if late:
            held.load_state_dict(state)
        assert held.state_dict() == state
        held.end()
        assert held.state_dict() == state and held.figures() == {}


def table() -> str:
    """The table of the docs."""
    lines = ["| loop | adapter | equal to separate parameters | left and resumed |", "|---|---|---|---|"]
    rows = [(case.name, case.adapter, FLOAT64) for case in CASES] + SHARDED
    for name, adapter, exact, *resumed in rows:
        lines.append(f"| {name} | {adapter} | {exact.words} | {(*resumed, 'bit for bit')[0]} |")
    return "\n".join(lines)


def test_the_docs_have_the_table() -> None:
    """``docs/how-to/loops.md`` says what the cases above say."""
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "loops.md"
    text = page.read_text(encoding="utf-8")
    found = text.partition("<!-- table -->\n")[2].partition("\n<!-- end of table -->")[0]
    assert found == table(), "put this between the marks:\n" + table()
