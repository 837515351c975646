"""The verdict on kinds of models that are not among the bundled ones, trained for a moment.

What it must say follows from the equations: copies by two keep every function (Eq. 16-17); zeroed channels in
front of a plain matrix take their share of its output away, as all is multiplied by sqrt(1/2) (App. B); where
a norm stands behind the function, or before its last matrix, it takes a common factor out again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixtures.tiny import CONFIGS, make_model
from sparkling_cli import api
from sparkling_cli.models.skeleton import build_model
from tests.plan.test_parting import KINDS

TEXT = Path(__file__).parents[2] / "fixtures" / "text"
#: kind -> axis inside a block, what its function is called, whether zeroed channels are seen in what it adds
BLOCKS: dict[str, tuple[str, str, bool]] = {
    "gpt2": ("ffn", "mlp", True),
    "gpt_neox": ("ffn", "mlp", True),  # attention and MLP in parallel
    "mixtral": ("ffn", "", True),  # its experts' module has another name from version to version
    "gemma2": ("ffn", "mlp", False),  # a norm behind every function
    "mamba2": ("mamba_expand", "mixer", False),  # a norm before the last matrix
}


def ids(name: str, rows: int) -> torch.Tensor:
    """The bytes of a bundled text as tokens [rows, 32]."""
    raw = (TEXT / name).read_bytes()[: rows * 32]
    return torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.int64) % 101).view(rows, 32)


def trained(kind: str, folder: Path) -> Path:
    """A small model after 150 steps."""
    torch.manual_seed(0)
    model: Any = (
        make_model(kind) if kind in CONFIGS else build_model({**KINDS[kind], "model_type": kind}, meta=False)
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for batch in ids("train.txt", 150 * 8).split(8):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
def test_good_and_bad_expansions_of_a_trained_model(kind: str, tmp_path: Path) -> None:
    """Copies are found to keep the signal; zeros are named where they do not, and only there."""
    axis, function, seen = BLOCKS[kind]
    source = trained(kind, tmp_path / "small")
    np.save(tmp_path / "tokens.npy", ids("heldout.txt", 16).numpy().reshape(-1))
    for init in ("copy-copy", "zero-copy"):
        report = api.expand(
            source,
            tmp_path / init,
            axes=[{"axis": axis, "factor": 2}],
            init=init,
            data=tmp_path / "tokens.npy",
            allow_locked=True,
            threads=1,
        ).report
        assert report is not None and report.activations is not None
        assert len(report.activations.functions) >= 2
        found = [f.text for f in report.verdict.findings if "signal ratio RMS(f(Norm h))" in f.text]
        moved = [text for text in found if "moved by more than 10%" in text]
        if init == "copy-copy" or not seen:
            assert not moved, (kind, init)
            assert any("keep their signal ratio" in text for text in found), (kind, init)
        else:
            assert any(f"{function} in 2 of 2" in text for text in moved), (kind, found)
