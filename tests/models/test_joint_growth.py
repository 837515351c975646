"""Axes of all kinds grown together, in one stage or two, by every pair of initializations: a sample.

What grows alone is tested axis by axis; here a class, axes, factor, pair and treatment are drawn by a fixed
seed. An output is what plan and engine make, and must be what ``verify`` derives by itself from the spec;
where no part of a request changes the function, it must say what the source said.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_support import small_config
from training_support import Trained, in_double, reloaded, trained

from sparkling_cli import api
from sparkling_cli.errors import LayoutError, SpecError
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.models.infer import infer
from sparkling_cli.models.skeleton import causal_lm_names

pytestmark = pytest.mark.survey

DRAWS = 30
#: of logits, relative to the largest; many classes compute norms and softmax in float32
LOGITS = 1e-4
PAIRS = (("copy-copy", "rms"), ("random-zero", "function"), ("random-copy", "rms"), ("zero-copy", "rms"))


def request(rng: random.Random, layout: ModelLayout) -> dict[str, Any]:
    """Up to three axes with those that must grow along, and what becomes of the state."""
    grow = [name for name, info in layout.axes.items() if info.widenable]
    chosen = set(rng.sample(grow, min(len(grow), rng.choice((2, 3)))))
    chosen |= {other for name in chosen for other in layout.axes[name].joint}
    factor = rng.choice((2, 2, 3))
    asked: dict[str, Any] = {"axes": [{"axis": name, "factor": factor} for name in sorted(chosen)]}
    asked["optimizer"] = rng.choice(("asymmetric", "drop"))
    if "layers" in chosen:
        asked["layer_mode"] = rng.choice(("identity", "interleave", "stack"))
    return asked


def keeps(asked: dict[str, Any]) -> bool:
    """Whether nothing that is asked for changes what the model computes."""
    axes = {one["axis"] for one in asked["axes"]}
    held = "experts" in axes and "experts_per_token" not in axes
    pair = (asked["init"], asked["scaling"]) in PAIRS[:2]
    return pair and not held and asked.get("layer_mode", "identity") == "identity"


def said(small: Trained, folder: Path, entries: int) -> torch.Tensor:
    """Logits of what a folder holds, of the first entries of the vocabulary."""
    with torch.no_grad():
        model = in_double(reloaded(small, folder), small.ids)
        logits: torch.Tensor = model(input_ids=small.ids, use_cache=False).logits
    return logits[..., :entries].double()


@pytest.mark.parametrize("seed", range(DRAWS))
def test_drawn_requests_are_carried_out_as_verify_derives_them(seed: int, tmp_path: Path) -> None:
    """Or refused with a way out."""
    rng = random.Random(seed)
    config = small_config(rng.choice(sorted(causal_lm_names())))
    try:
        infer(config)
    except LayoutError as error:
        pytest.skip(f"refused: {error}"[:200])
    small = trained(config, tmp_path / "0")
    stages = 0
    for stage in range(rng.choice((1, 2))):
        source, target = tmp_path / str(stage), tmp_path / str(stage + 1)
        layout = api.layout_of(source)
        asked = request(rng, layout)
        for init, scaling in rng.sample(PAIRS, len(PAIRS)):
            asked |= {"init": init, "scaling": scaling}
            try:
                api.expand(source, target, **asked, report="none", threads=1)
            except (SpecError, LayoutError) as error:
                assert error.hint, f"{asked}: {error}"
            else:
                break
        else:
            break
        assert api.verify(source, target).ok, asked
        if keeps(asked):
            entries = layout.axes["vocab"].size
            before, after = (said(small, folder, entries) for folder in (source, target))
            assert (after - before).abs().max() < LOGITS * before.abs().max(), asked
        stages += 1
    if not stages:
        pytest.skip("refused, with a way out")
