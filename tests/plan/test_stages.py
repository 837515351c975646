"""Expansions one after the other: copies are counted over the whole history."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sparkling_cli import api
from sparkling_cli.diagnostics.symmetry import measure_symmetry
from sparkling_cli.widening.geometry import Growth
from tests.conftest import TinyCheckpoint

IDS = torch.randint(2, 100, (3, 40), generator=torch.Generator().manual_seed(4))


def logits(folder: Path) -> torch.Tensor:
    """Of the model in a folder, in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("scaling", ["rms", "function"])
@pytest.mark.parametrize(
    ("arch", "axes"),
    [
        ("llama", ("ffn",)),
        ("llama", ("hidden",)),
        ("llama", ("heads",)),
        ("qwen3_moe", ("expert_ffn", "hidden", "heads")),
        ("gpt2", ("ffn", "heads", "hidden")),
    ],
)
def test_one_and_a_half_and_then_four_thirds_is_twice(
    arch: str, axes: tuple[str, ...], scaling: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """The logits of the two steps are those of the one, which are the small model's."""
    sizes = {"llama": {"intermediate_size": 60, "hidden_size": 48}, "gpt2": {"n_inner": 60}}
    many = {"num_attention_heads": 8, "num_key_value_heads": 2} if arch != "gpt2" else {}
    source = tiny_checkpoint(arch, **sizes.get(arch, {}), **many)
    one = tmp_path / "one"

    def widen(start: Path, target: Path, factor: float) -> None:
        asked = [{"axis": axis, "to": round(size(start, axis) * factor)} for axis in axes]
        api.expand(start, target, axes=asked, scaling=scaling, report="none", threads=1)
        api.verify(start, target)

    widen(source, one, 1.5)
    widen(one, tmp_path / "two", 4 / 3)
    before, after = logits(source), logits(tmp_path / "two")
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def size(folder: Path, axis: str) -> int:
    """Entries of an axis now."""
    layout = api.layout_of(folder)
    name = layout.aliases.get(axis, axis)
    if name == "heads" and "heads" not in layout.axes:
        return layout.axes["kv_heads"].size * layout.axes["q_per_kv"].size
    return layout.axes[name].size


def test_the_meter_knows_the_sources_of_a_second_stage(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Right after 1.5x and 4/3x every new channel equals the one that it was copied from."""
    source = tiny_checkpoint("llama", intermediate_size=60)
    for start, target, to in ((source, "one", 90), (tmp_path / "one", "two", 120)):
        api.expand(start, tmp_path / target, axes=[{"axis": "ffn", "to": to}], report="none", threads=1)
    assert measure_symmetry(tmp_path / "two", tmp_path / "two").distance < 1e-6


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=4))
def test_copies_are_spread_over_the_originals(d: int, steps: list[tuple[int, bool]]) -> None:
    """A fraction copies what occurs least; a whole factor copies all alike; factors multiply as derived."""
    originals = list(range(d))
    growth = Growth(d, d + 1)
    for more, copied in steps:
        growth = Growth(
            len(originals),
            len(originals) + more,
            copied,
            growth.originals_after if len(originals) > d else (),
        )
        sources = [i for start, length in growth.new_sources for i in range(start, start + length)]
        assert len(sources) == more
        times = Counter(originals)
        for source in sources:
            if growth.target % growth.source:
                assert times[originals[source]] == min(times.values())
            times[originals[source]] += 1
        squares = [sum(m * m for m in count.values()) for count in (Counter(originals), times)]
        if copied:
            assert growth.alpha == pytest.approx((squares[0] / squares[1]) ** 0.5)
        fresh = range(max(originals) + 1, max(originals) + 1 + more)
        originals += [originals[i] for i in sources] if copied else fresh
        got = [i for start, length in growth.originals_after for i in range(start, start + length)]
        assert got == originals
