"""bfloat16 in numpy against torch's own, for every number there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparkling_cli.widening import bfloat16
from sparkling_cli.widening.entries import count_nonfinite, draw_into, scale_into
from sparkling_cli.widening.moments import Moments

EVERY = np.arange(1 << 16, dtype=np.uint16)


def as_torch(entries: np.ndarray) -> torch.Tensor:
    """The same bits as a torch tensor."""
    return torch.from_numpy(entries.view(np.int16)).view(torch.bfloat16)


def assert_equal(found: np.ndarray, wanted: torch.Tensor) -> None:
    """Bit by bit, but for the payloads of NaN."""
    assert wanted.dtype == torch.bfloat16
    lost = wanted.isnan().numpy()
    np.testing.assert_array_equal(as_torch(found).isnan().numpy(), lost)
    np.testing.assert_array_equal(found[~lost], wanted.view(torch.int16).numpy().view(np.uint16)[~lost])


def test_widened() -> None:
    """To float32, bit by bit."""
    wanted = as_torch(EVERY).float()
    found = torch.from_numpy(bfloat16.widened(EVERY))
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.7071067811865476, 1 / 3, -2.5, 1e-30, 3e38])
@pytest.mark.parametrize("offset", [0.0, 1.0, -0.3])
def test_every_number_scaled(factor: float, offset: float) -> None:
    """Computed in float32, rounded once; zeros, subnormal numbers, Inf and NaN among them."""
    into = np.empty_like(EVERY)
    with np.errstate(all="ignore"):
        scale_into(EVERY, factor, offset, into, "bfloat16")
    wide = as_torch(EVERY).float() * torch.tensor(factor, dtype=torch.float32)
    wide = wide + torch.tensor(offset, dtype=torch.float32) if offset else wide
    assert_equal(into, wide.to(torch.bfloat16))


def test_rounding_of_any_float32() -> None:
    """Random bit patterns, and every kind of tie."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint64).astype(np.uint32)
    ties = (EVERY.astype(np.uint32) << 16) | 0x8000
    numbers = np.concatenate([bits, ties, ties - 1, ties + 1]).view(np.float32)
    into = np.empty(numbers.shape, np.uint16)
    wanted = torch.from_numpy(numbers.copy()).to(torch.bfloat16)
    bfloat16.round_into(numbers, into)
    assert_equal(into, wanted)


def test_in_boxes_of_a_larger_array() -> None:
    """Neither side need be contiguous."""
    old = np.arange(15000, 15000 + 240, dtype=np.uint16).reshape(4, 6, 10)
    new = np.zeros((4, 12, 20), np.uint16)
    scale_into(old[:, 1:5, ::2], 0.3, 0.0, new[:, 6:10, 5:10], "bfloat16")
    wanted = (as_torch(old[:, 1:5, ::2].copy()).float() * np.float32(0.3)).to(torch.bfloat16)
    assert_equal(new[:, 6:10, 5:10].copy(), wanted)
    new[:, 6:10, 5:10] = 0
    assert not new.any()


def test_drawn() -> None:
    """Random entries are rounded once, from float32."""
    noise = np.random.default_rng(1).standard_normal((64, 33), dtype=np.float32)
    into = np.empty((64, 33), np.uint16)
    draw_into(noise, Moments(1, 0.0, 0.02**2), 1.5, 0.0, into, "bfloat16")
    spread = torch.tensor(0.02) * torch.tensor(1.5)
    assert_equal(into, (torch.from_numpy(noise) * spread).to(torch.bfloat16))


def test_nonfinite_are_counted() -> None:
    """Two signs, 128 numbers each with the highest exponent."""
    assert count_nonfinite(EVERY.view(np.uint8), "bfloat16") == 2 * 128
    finite = EVERY[as_torch(EVERY).isfinite().numpy()]
    assert count_nonfinite(finite.view(np.uint8), "bfloat16") == 0


def test_torch_is_not_needed(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Weights in bfloat16 are widened, all of them computed, without importing torch."""
    source = tmp_path / "source"
    source.mkdir()
    weights = load_file(dense_checkpoint / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(rounded, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_bytes((dense_checkpoint / "config.json").read_bytes())
    words = ["expand", str(source), str(tmp_path / "out"), "--axis", "ffn", "--factor", "2"]
    words += ["--init", "random-copy"]
    program = (
        "import sys\n"
        "from sparkling_cli.cli.app import app\n"
        "from sparkling_cli.cli.console import run\n"
        f"sys.argv[1:] = {[*words, '--report', 'none']!r}\n"
        "assert run(app) == 0\n"
        "print('torch' in sys.modules)\n"
    )
    plan = [sys.executable, "-m", "sparkling_cli", *words, "--dry-run"]
    subprocess.run(plan, check=True, capture_output=True)  # fills the cache of layouts
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
