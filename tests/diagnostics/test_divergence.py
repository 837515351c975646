"""How far the residual stream differs behind every block: by hand, by hidden states, by proof."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnostics_support import opened
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fixtures.tiny import make_model
from sparkling_cli import api
from sparkling_cli.diagnostics.activations import measure_change
from sparkling_cli.diagnostics.data import Tokens
from sparkling_cli.results.measured import Activations

IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))


def saved(arch: str, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor] | None = None) -> Path:
    """A tiny model's directory, with its weights changed."""
    make_model(arch).save_pretrained(target)
    if change is not None:
        weights = load_file(target / "model.safetensors")
        changed = {name: change(name, weight).contiguous() for name, weight in weights.items()}
        save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def compared(before: Path, after: Path, **options: Any) -> Activations:
    """Both on the same tokens."""
    return measure_change(opened(before), opened(after), Tokens(IDS, "test"), **options)[0]


def turned(weight: torch.Tensor) -> torch.Tensor:
    """Every row at a right angle to what it was."""
    return torch.stack([-weight[:, 1::2], weight[:, ::2]], -1).flatten(1)


@pytest.mark.parametrize(
    ("change", "difference", "cosine"),
    [(lambda w: 1.25 * w, 0.25, 1.0), (turned, sqrt(2), 0.0), (lambda w: -w, 2.0, -1.0)],
    ids=["longer", "turned", "opposite"],
)
@pytest.mark.parametrize("memory", [1 << 30, 2048])
def test_by_hand(
    tmp_path: Path,
    memory: int,
    change: Callable[[torch.Tensor], torch.Tensor],
    difference: float,
    cosine: float,
) -> None:
    """Blocks that add nothing hand the embeddings through; on a few of the tokens it is the same."""

    def silent(name: str, weight: torch.Tensor) -> torch.Tensor:
        return 0 * weight if "o_proj" in name or "down_proj" in name else weight

    def moved(name: str, weight: torch.Tensor) -> torch.Tensor:
        return change(weight) if "embed_tokens" in name else silent(name, weight)

    found = compared(
        saved("llama", tmp_path / "a", silent), saved("llama", tmp_path / "b", moved), memory=memory
    )
    assert len(found.residual) > 2
    for place in found.residual:
        assert place.difference == pytest.approx(difference, rel=1e-6)
        assert place.cosine == pytest.approx(cosine, abs=1e-6)


def streams(directory: Path) -> tuple[torch.Tensor, ...]:
    """The stream that goes into every block, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return tuple(model(IDS, output_hidden_states=True, use_cache=False).hidden_states[:-1])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_against_hidden_states(tmp_path: Path, arch: str) -> None:
    """At a fractional factor: over the entries that the source has, which come first in the output."""
    axes = {"hidden": 1.5, "heads": 1.5} if arch == "gpt2" else {"hidden": 1.5}
    narrow, wide = saved(arch, tmp_path / "a"), tmp_path / "b"
    api.expand(narrow, wide, axes=axes, report="none", allow_locked=True)
    found = compared(narrow, wide)
    for place, old, new in zip(found.residual, streams(narrow), streams(wide), strict=False):
        ours = new[..., : old.shape[-1]]
        assert place.difference == pytest.approx(float((ours - old).norm() / old.norm()), rel=1e-4, abs=1e-6)
        assert place.cosine == pytest.approx(float((ours * old).sum() / ours.norm() / old.norm()), rel=1e-4)
    assert found.diverging and "and the residual stream by" in str(api.inspect(wide, narrow).verdict)


@pytest.mark.parametrize(
    ("arch", "axes"),
    [
        ("llama", {"hidden": 2, "ffn": 3}),
        ("gpt2", {"hidden": 2, "heads": 2}),
        ("gemma3_text", {"hidden": 2}),
        ("mixtral", {"hidden": 3}),
        ("qwen3_moe", {"ffn": 2}),
        ("llama", {"layers": 2}),
        ("llama", {"layers": 2, "hidden": 2}),
    ],
)
def test_what_keeps_the_function_keeps_the_stream(tmp_path: Path, arch: str, axes: dict[str, float]) -> None:
    """Behind every block; behind a layer that adds nothing yet it is that of the old one before it."""
    narrow, wide = saved(arch, tmp_path / "a"), tmp_path / "b"
    api.expand(narrow, wide, axes=axes, report="none", allow_locked=True)
    change = api.inspect(wide, narrow).change
    assert change is not None and not change.diverging
    assert [place.difference for place in change.residual] == pytest.approx(
        [0] * len(change.residual), abs=1e-5
    )
    assert len(change.residual) > 2


def test_places_that_cannot_be_compared(tmp_path: Path) -> None:
    """A stream that became narrower has no old entries to compare, which is no zero."""
    narrow, wide = saved("llama", tmp_path / "a"), tmp_path / "b"
    api.expand(narrow, wide, axes={"hidden": 2}, report="none", allow_locked=True)
    shutil.rmtree(wide / "sparkling")
    change = api.inspect(narrow, wide).change
    assert change is not None and {place.difference for place in change.residual} == {None}
