"""Faults put into the plan and the engine one at a time: ``verify`` finds every one of them.

Each of them writes an output that opens, has the right shapes and agrees with its own checksums.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError, VerificationError
from sparkling_cli.execute import bundle, worker
from sparkling_cli.layout.model import Compensation
from sparkling_cli.plan import account, build, naming
from sparkling_cli.storage import byte_ranges
from sparkling_cli.verification import verify
from sparkling_cli.widening import bfloat16, entries, fill, geometry, kernel
from sparkling_cli.widening.geometry import Fill, Growth, Run, View

Patch = pytest.MonkeyPatch
FFN: dict[str, Any] = {"axes": [{"axis": "ffn", "factor": 2}]}
WIDER: dict[str, Any] = {"axes": [{"axis": "hidden", "factor": 1.5}]}


def run_changed(change: Callable[[Run], Run]) -> Callable[..., tuple[Run, ...]]:
    """``geometry._grown_runs`` with other runs."""
    real = geometry._grown_runs

    def changed(*args: Any) -> tuple[Run, ...]:
        return tuple(map(change, real(*args)))

    return changed


def wrong_factor(patch: Patch) -> None:
    """Every fan-in factor is a thousandth too large."""
    real = Growth.__dict__["alpha"].func
    patch.setattr(Growth, "alpha", property(lambda growth: 1.001 * real(growth)))


def factor_of_the_other_case(patch: Patch) -> None:
    """The factor of independent entries for entries that are copies."""
    patch.setattr(Growth, "alpha", property(lambda growth: sqrt(growth.source / growth.target)))


def no_factor_on_old_columns(patch: Patch) -> None:
    """Only new columns are scaled."""
    change = run_changed(lambda run: run if run.new else replace(run, scale=1.0))
    patch.setattr(geometry, "_grown_runs", change)


def shifted_run(patch: Patch) -> None:
    """New entries copy the neighbours of their sources."""

    def shifted(run: Run) -> Run:
        if not run.new or run.length < 3:
            return run
        return replace(run, source=run.source + 1, length=run.length - 1)

    real = geometry._grown_runs

    def changed(*args: Any) -> tuple[Run, ...]:
        runs = []
        for run in real(*args):
            moved = shifted(run)
            runs.append(moved)
            if moved != run:
                end = run.target + moved.length
                runs.append(replace(run, target=end, source=run.source, length=run.length - moved.length))
        return tuple(runs)

    patch.setattr(geometry, "_grown_runs", changed)


def one_source_for_all(patch: Patch) -> None:
    """New query heads of a group all copy its first one."""
    real = Growth.__dict__["new_sources"].func

    def sources(growth: Growth) -> tuple[tuple[int, int], ...]:
        return ((0, 1),) * (growth.target - growth.source) if growth.source < 10 else real(growth)

    patch.setattr(Growth, "new_sources", property(sources))


def zeroed_gate(patch: Patch) -> None:
    """Zero fill does not spare q, k and gate."""
    patch.setattr(geometry, "NONLINEAR_LABELS", frozenset())


def copied_for_zero(patch: Patch) -> None:
    """New entries are copies where they should be zero."""
    real = build.view_of

    def copied(*args: Any, **named: Any) -> View:
        return tuple(
            replace(dim, runs=tuple(replace(run, fill=Fill.COPY) for run in dim.runs))
            for dim in real(*args, **named)
        )

    patch.setattr(build, "view_of", copied)


def state_kept(patch: Patch) -> None:
    """Moments of new entries are those of their sources."""
    real = build.state_view
    patch.setattr(build, "state_view", lambda view, _, *kind: real(view, "copy", *kind))


def state_lost(patch: Patch) -> None:
    """Moments of old entries are dropped."""
    real = build._Recipes.moment

    def moment(*args: Any, **named: Any) -> Any:
        recipe = real(*args, **named)
        object.__setattr__(recipe, "zero", True)
        return recipe

    patch.setattr(build._Recipes, "moment", moment)


def state_scaled(patch: Patch) -> None:
    """Moments are scaled like the weights."""
    real = build.state_view
    patch.setattr(build, "state_view", lambda view, _, *kind: real(view, "asymmetric-scaled", *kind))


def narrow_state(patch: Patch) -> None:
    """Second moments are carried over as they are."""
    real = build._state_rows

    def rows(checkpoint: Any, recipes: Any, *more: Any) -> Iterable[Any]:
        for row in real(checkpoint, recipes, *more):
            recipe = row.recipe
            if row.slot == "exp_avg_sq":
                view = tuple(
                    geometry.ViewDim(n, n, (Run(0, 0, n),), dim) for dim, n in enumerate(recipe.before)
                )
                object.__setattr__(recipe, "shape", recipe.before)
                object.__setattr__(recipe, "view", view)
            yield row

    patch.setattr(build, "_state_rows", rows)


def forgotten_compensation(patch: Patch) -> None:
    """The final norm of a tied head carries nothing."""
    patch.setattr(build._Recipes, "compensations", lambda *_: ())


def wrong_offset(patch: Patch) -> None:
    """A norm that computes ``1 + w`` is scaled as if it did not."""
    real = build._Recipes._factor

    def factor(self: Any, found: Iterable[Compensation], fitted: float) -> tuple[float, float]:
        return real(self, found, fitted)[0], 0.0

    patch.setattr(build._Recipes, "_factor", factor)


def wrong_deviation(patch: Patch) -> None:
    """Random entries are drawn a tenth too wide."""
    real = entries.draw_into

    def draw(noise: Any, moments: Any, *rest: Any) -> None:
        real(noise, moments._replace(squares=1.21 * moments.squares), *rest)

    patch.setattr(kernel, "draw_into", draw)


def another_stream(patch: Patch) -> None:
    """Random entries begin one number later."""

    def normal(seed: int, stream: str, start: int, stop: int) -> Any:
        return fill.normal(seed, stream, start + 1, stop + 1)

    patch.setattr(kernel, "normal", normal)


def rounded_twice(patch: Patch) -> None:
    """The factor is taken in two steps."""
    real = kernel.scale_into

    def scale(old: Any, factor: float, offset: float, into: Any, dtype: str) -> None:
        real(old, sqrt(factor), 0.0, into, dtype)
        real(into, sqrt(factor), offset, into, dtype)

    patch.setattr(kernel, "scale_into", scale)


def cut_off(patch: Patch) -> None:
    """bfloat16 numbers are cut off instead of rounded."""

    def cut(numbers: Any, into: Any) -> None:
        into[...] = numbers.view("uint32") >> 16

    patch.setattr(bfloat16, "round_into", cut)


def swapped_parts(patch: Patch) -> None:
    """Gate and up of fused experts change places."""
    real = naming._fused

    def fused(name: str, parts: Any, templates: int) -> Any:
        return real(name, {(at, templates - 1 - place): p for (at, place), p in parts.items()}, templates)

    patch.setattr(naming, "_fused", fused)


def unwritten(patch: Patch) -> None:
    """The last entries of a piece are never written."""
    real, seen = byte_ranges.write_range, []

    def write(handles: Any, path: str, offset: int, data: Any) -> None:
        seen.append(path)
        first = path.endswith(".safetensors") and seen.count(path) == 1
        real(handles, path, offset, memoryview(data)[:-8] if first else data)

    for module in (worker, bundle):
        patch.setattr(module, "write_range", write)


#: fault, checkpoint, what is asked for
FAULTS: list[tuple[Callable[[Patch], None], str, dict[str, Any]]] = [
    (wrong_factor, "dense", FFN),
    (wrong_factor, "moe", WIDER),
    (factor_of_the_other_case, "dense", FFN),
    (no_factor_on_old_columns, "dense", WIDER),
    (shifted_run, "dense", WIDER),
    (one_source_for_all, "dense", {"axes": [{"axis": "heads", "factor": 2}]}),
    (zeroed_gate, "dense", {**FFN, "init": "zero-copy"}),
    (copied_for_zero, "dense", {**FFN, "init": "zero-copy"}),
    (state_kept, "dense", FFN),
    (state_kept, "moe", WIDER),
    (state_lost, "dense", FFN),
    (state_scaled, "dense", FFN),
    (narrow_state, "dense", FFN),
    (forgotten_compensation, "moe", WIDER),
    (wrong_offset, "gemma2", {"axes": [{"axis": "hidden", "factor": 2}]}),
    (wrong_deviation, "dense", {**FFN, "init": "random-copy"}),
    (another_stream, "moe", {**FFN, "init": "random-random"}),
    (rounded_twice, "bfloat16", WIDER),
    (cut_off, "bfloat16", WIDER),
    (swapped_parts, "moe", FFN),
    (unwritten, "dense", FFN),
]


@pytest.fixture
def checkpoint(
    request: pytest.FixtureRequest, dense_checkpoint: Path, moe_checkpoint: Path, tiny_checkpoint: Any
) -> Path:
    """The checkpoint of that name."""
    if request.param in ("dense", "moe"):
        return {"dense": dense_checkpoint, "moe": moe_checkpoint}[request.param]
    if request.param == "bfloat16":
        return tiny_checkpoint("llama", dtype="bfloat16")  # type: ignore[no-any-return]
    return tiny_checkpoint(request.param)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("fault", "checkpoint", "options"),
    FAULTS,
    ids=[f"{fault.__name__}-{name}" for fault, name, _ in FAULTS],
    indirect=["checkpoint"],
)
def test_every_fault_is_found(
    fault: Callable[[Patch], None], checkpoint: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """The output with the fault is written and opens; ``verify`` says that it is not what was asked for."""
    with pytest.MonkeyPatch.context() as patch:
        kernel._compiled.cache_clear()
        fault(patch)
        api.expand(checkpoint, tmp_path / "wrong", report="none", **options)
    kernel._compiled.cache_clear()
    with pytest.raises(VerificationError):
        verify(checkpoint, tmp_path / "wrong")
    api.expand(checkpoint, tmp_path / "right", report="none", **options)
    verify(checkpoint, tmp_path / "right")


def test_what_the_plan_carries_unseen_is_found(dense_checkpoint: Path, tmp_path: Path) -> None:
    """An average that stays narrow in a file that no format reads: no tensor of that shape may be left."""
    source = tmp_path / "source"
    shutil.copytree(dense_checkpoint, source)
    average = {"shadow": [torch.zeros(96, 168), {"deep": torch.zeros(168, 96)}]}
    torch.save(average, source / "custom_checkpoint_0.pkl")
    with pytest.raises(CheckpointError, match="custom_checkpoint_0"):
        api.expand(source, tmp_path / "refused", report="none", **FFN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(account.Growing, "match", lambda *_: None)
        api.expand(source, tmp_path / "wrong", report="none", **FFN)
    with pytest.raises(VerificationError, match=r"which grew, are in files of the output"):
        verify(source, tmp_path / "wrong")
    api.expand(source, tmp_path / "wanted", report="none", carry=["custom_checkpoint_0*"], **FFN)
    verify(source, tmp_path / "wanted")


def test_an_account_that_is_not_the_sum_of_the_source(dense_checkpoint: Path, tmp_path: Path) -> None:
    """A line too few in the account of what became of the source's tensors."""
    real = build.account_of

    def short(*args: Any) -> Any:
        found = real(*args)
        return found.model_copy(update={"lines": found.lines[1:]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "account_of", short)
        api.expand(dense_checkpoint, tmp_path / "out", report="none", **FFN)
    with pytest.raises(VerificationError, match="the account gives the source"):
        verify(dense_checkpoint, tmp_path / "out")
