"""Every causal-LM class, every proved axis: optimizer state and activations follow the weights.

A real AdamW step, saved as the Trainer saves it, widened by the public function, reloaded by the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inference_support import multiplier, small_config
from training_support import (
    Origin,
    Tensors,
    Trained,
    backward,
    in_double,
    origin,
    outputs_by_module,
    reloaded,
    rms,
    state_of,
    trained,
    values_of,
)

from sparkling_cli import api
from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import COUNTED
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.names import NameTemplate
from sparkling_cli.models.infer import infer
from sparkling_cli.models.skeleton import causal_lm_names

pytestmark = pytest.mark.survey

#: Of gradients, relative to a tensor's largest; many classes compute norms and softmax in float32.
GRADIENT = 1e-4
#: Gradients below this part of the model's largest are rounding: keys' biases, routers with one choice.
NOTHING = 1e-7
#: Of the RMS of what a module returns, at 2x copy-copy; where it returns widened parts and others in one
#: tensor, its RMS is another mean of theirs.
RMS, MIXED_RMS = 1e-3, 0.1


@pytest.mark.parametrize("model_type", sorted(causal_lm_names()))
def test_state_and_activations_follow_the_weights(model_type: str, tmp_path: Path) -> None:
    """For each axis doubled: state entry by entry, gradients by the chain rule, RMS module by module."""
    config = small_config(model_type)
    try:
        layout = infer(config)
    except LayoutError as error:
        pytest.skip(f"refused: {error}"[:200])
    groups = list(widenings(layout))
    if not groups:
        pytest.skip("no axis is proved")
    small = trained(config, tmp_path / "small")
    ahead = api.layout_of(small.folder).axes  # a file in the package goes before what was inferred
    groups = [
        list(dict.fromkeys([*group, *(j for axis in group if axis in ahead for j in ahead[axis].joint)]))
        for group in groups  # heads that a file counts by group (kv_heads, q_per_kv) are no axis of it
    ]
    known = {p.name for p in layout.tensors} | {d for parts in layout.assembly.values() for d in parts}
    # Where the disk fuses what the module keeps apart, names are chosen by the user (see test_naming).
    names = "auto" if all(p.name in known for p in layout.disk or ()) else "disk"
    wrong = []
    for axes in groups:
        for treatment in ("asymmetric", "copy"):
            asked = [{"axis": axis, "factor": 2} for axis in axes]
            target = tmp_path / f"{axes[0]}-{treatment}"
            api.expand(
                small.folder,
                target,
                axes=asked,
                optimizer=treatment,
                names=names,
                allow_locked=True,
                report="none",
                threads=1,
            )
        folder = tmp_path / axes[0]
        wrong += [f"{axes[0]}: {what}" for what in complaints(small, layout, folder)]
    assert not wrong, "\n".join(wrong[:20])


def widenings(layout: ModelLayout) -> Iterator[tuple[str, ...]]:
    """Every proved width, with the axes that must grow along."""
    seen: set[frozenset[str]] = set()
    for name, info in layout.axes.items():
        group = frozenset((name, *info.joint))
        if info.widenable and group not in seen and name not in COUNTED:
            seen.add(group)
            yield (name, *info.joint)


def complaints(small: Trained, layout: ModelLayout, folder: Path) -> Iterator[str]:
    """Whatever does not hold of one axis doubled, in words."""
    wide = reloaded(small, Path(f"{folder}-asymmetric"))
    widened = values_of(wide)
    origins: dict[str, Origin] = {}
    for name in small.numbers:
        try:
            origins[name] = origin(small.values[name], widened[name])
        except AssertionError as error:
            yield f"{name}: {error}"
    yield from of_state(small, folder, origins)
    wide = in_double(wide, small.ids)
    apart = folder.name == "kv_heads" and "q_per_kv" not in layout.axes and "heads" in layout.axes
    yield from of_gradients(backward(small.model, small.ids), backward(wide, small.ids), origins, apart=apart)
    yield from of_activations(small, wide, layout)


def of_state(small: Trained, folder: Path, origins: dict[str, Origin]) -> Iterator[str]:
    """``asymmetric``: the first entry of each source has its state, others zero; ``copy``: all have it."""
    before = state_of(small.folder)
    kept, copied = state_of(Path(f"{folder}-asymmetric")), state_of(Path(f"{folder}-copy"))
    if not before.keys() == kept.keys() == copied.keys():
        yield "other parameters have state"
    for name, found in origins.items():
        number, source = small.numbers[name], found.source
        places = torch.arange(len(source))
        first = torch.full((int(source.max()) + 1,), len(source)).scatter_reduce(0, source, places, "amin")
        old = torch.zeros(len(source), dtype=torch.bool)
        old[first] = True
        for slot, state in before.get(number, {}).items():
            everywhere = state.flatten()[source]
            if not torch.equal(copied[number][slot].flatten(), everywhere):
                yield f"{name}: {slot} is not copied to its weights' places"
            if not torch.equal(kept[number][slot].flatten(), everywhere * old):
                yield f"{name}: {slot} is not kept at old places and zero at new ones"


def of_gradients(
    before: Tensors, after: Tensors, origins: dict[str, Origin], *, apart: bool
) -> Iterator[str]:
    """Copies share their source's gradient equally: ``c m dL/dW'[i] = dL/dW[j]``, m copies of j.

    Where each copy has readers of its own, as key/value heads whose query heads stay, their sum is the
    source's.
    """
    if before.keys() != after.keys():
        yield f"the loss reaches other parameters: {sorted(before.keys() ^ after.keys())[:3]}"
    floor = NOTHING * max(float(g.abs().max()) for g in before.values())
    for name in sorted(before.keys() & after.keys() & origins.keys()):
        small, wide, found = before[name].flatten(), after[name].flatten(), origins[name]
        copies = torch.bincount(found.source, minlength=len(small))[found.source]
        shares = found.c * wide
        if apart:
            shares = torch.zeros_like(small).index_add(0, found.source, shares)[found.source] / copies
        error = float((copies * shares - small[found.source]).abs().max())
        scale = float(small.abs().max())
        if error > max(GRADIENT * scale, floor):
            yield f"{name}: gradients of copies are off by {error / scale:.1e}"


def of_activations(small: Trained, wide: torch.nn.Module, layout: ModelLayout) -> Iterator[str]:
    """Each module's output keeps its RMS, but for a final norm that carries a tied head's factor.

    A weight that takes a multiplier of the model's code back gives an output larger by just that, or, where
    the module itself multiplies, the same.
    """
    before, after = outputs_by_module(small.model, small.ids), outputs_by_module(wide, small.ids)
    factored = {c.tensor.rpartition(".")[0] for c in layout.compensations if c.fan_in}
    factors = [
        (NameTemplate(c.tensor), multiplier(c, layout.sizes[c.axis], 2 * layout.sizes[c.axis]))
        for c in layout.compensations
        if c.power and not c.fan_in
    ]
    passed_on = {before[name].data_ptr() for name in factored if name in before}
    for name, output in before.items():
        if name not in after:
            yield f"{name} is not run"
            continue
        if output.data_ptr() in passed_on or rms(output) == 0:
            continue
        now = after[name]
        limit = RMS if now.numel() in (output.numel(), 2 * output.numel()) else MIXED_RMS
        expected = [1.0, *(by for t, by in factors if t.matches(f"{name}.weight"))]
        if min(abs(rms(now) / rms(output) / by - 1) for by in expected) > limit:
            yield f"{name}: RMS {rms(output):.4g} becomes {rms(now):.4g}"
