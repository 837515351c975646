"""Quantized moments, in states of bitsandbytes' and torchao's form that are made here by hand."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError, SparklingError, VerificationError
from sparkling_cli.widening.geometry import Fill, Run, ViewDim
from sparkling_cli.widening.quantized import Blocks, Levels, float8_table, requantized
from tests.training import optimizers as opt
from tests.training.optimizers import Case

HELD = "__bnb_optimizer_quant_state__"
PLAIN = Case("by hand", "torch", opt.of("torch.optim", "AdamW", lr=1e-3), "")
DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def signed_levels() -> Tensor:
    """256 levels with a zero, denser near it; the lowest is not the highest's negative."""
    half = torch.logspace(-6, 0, 128)
    return torch.cat([-half[:-1].flip(0) * 0.99, torch.zeros(1), half])


def coded(shape: tuple[int, ...], size: int, levels: Tensor) -> dict[str, Tensor]:
    """Random codes and scales of one tensor."""
    count = torch.Size(shape).numel()
    codes = torch.randint(len(levels), shape, dtype=torch.uint8)
    return {"codes": codes, "scales": torch.rand(-(-count // size)) + 0.01, "levels": levels}


def said(part: dict[str, Tensor], size: int) -> Tensor:
    """The numbers, by torch."""
    codes = part["codes"].flatten().long()
    scales = part["scales"].repeat_interleave(size)[: len(codes)]
    return (part["levels"][codes] * scales).view(part["codes"].shape)


def checkpoint(root: Path) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A Trainer's directory with state of bitsandbytes' form; of both matrices the first moment's parts."""
    torch.manual_seed(1)
    net = opt.model()
    made = opt.optimizer(net, PLAIN)
    opt.train(net, made, PLAIN, range(2))
    opt.save(net, made, PLAIN, root)
    saved = torch.load(root / "optimizer.pt", weights_only=True)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    parts = {}
    levels = signed_levels()
    for number, name in enumerate(names):
        own = saved["state"][number]
        first, second = own.pop("exp_avg"), own.pop("exp_avg_sq")
        if first.numel() < 4096:
            own[HELD] = {"state1": first, "state2": second}
            continue
        one, two = coded(tuple(first.shape), 256, levels), coded(tuple(first.shape), 256, levels.abs())
        parts[name] = one
        own[HELD] = {
            "state1": one["codes"], "absmax1": one["scales"], "qmap1": levels,
            "state2": two["codes"], "absmax2": two["scales"], "qmap2": two["levels"],
        }  # fmt: skip
    torch.save(saved, root / "optimizer.pt")
    return root, parts


def parts_of(root: Path, name: str) -> dict[str, Tensor]:
    """The first moment's parts in an output."""
    saved = torch.load(root / "optimizer.pt", weights_only=True)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    held = saved["state"][names.index(name)][HELD]
    return {"codes": held["state1"], "scales": held["absmax1"], "levels": held["qmap1"]}


@pytest.mark.parametrize("factor", [2, 1.5, 4])
def test_blocks_that_stay_are_bit_equal_and_others_within_half_a_step(tmp_path: Path, factor: float) -> None:
    """New rows move no block; new columns do, and every number is the nearest that its block can say."""
    source, parts = checkpoint(tmp_path / "narrow")
    api.expand(source, tmp_path / "wide", axes=[{"axis": "ffn", "factor": factor}], report="none")
    api.verify(source, tmp_path / "wide")
    old, new = parts[UP], parts_of(tmp_path / "wide", UP)
    assert torch.equal(new["codes"][: opt.FFN], old["codes"])
    assert torch.equal(new["scales"][: len(old["scales"])], old["scales"])
    assert not said(new, 256)[opt.FFN :].any()
    old, new = parts[DOWN], parts_of(tmp_path / "wide", DOWN)
    before, after = said(old, 256), said(new, 256)
    assert not after[:, opt.FFN :].any()
    scales = new["scales"].repeat_interleave(256)[: after.numel()].view(after.shape)[:, : opt.FFN]
    nearest = (new["levels"].sort().values[None] * scales.reshape(-1, 1) - before.reshape(-1, 1)).abs()
    off = (after[:, : opt.FFN] - before).abs().reshape(-1)
    assert (off <= nearest.min(dim=1).values + 1e-6 * scales.reshape(-1)).all()
    home = torch.arange(before.numel()).view(before.shape) // 256
    blocks = torch.arange(after.numel()).view(after.shape)[:, : opt.FFN] // 256
    alone = 0
    for block in blocks.unique():
        inside = blocks == block
        if len(home[inside].unique()) == 1:  # entries of one old block: the same numbers to the bit
            assert torch.equal(after[:, : opt.FFN][inside], before[inside])
            alone += 1
    assert 0 < alone < len(new["scales"])


def test_every_treatment_of_state(tmp_path: Path) -> None:
    """Copied, scaled and dropped state: what moments in float32 become, as near as a block can say it."""
    source, parts = checkpoint(tmp_path / "narrow")
    wide = {}
    for treatment in ("copy", "asymmetric-scaled", "drop"):
        output = tmp_path / treatment
        api.expand(
            source,
            output,
            axes=[{"axis": "ffn", "factor": 2}],
            init="copy-copy",
            optimizer=treatment,
            report="none",
            allow_locked=True,
        )
        api.verify(source, output)
        wide[treatment] = {name: parts_of(output, name) for name in (UP, DOWN)}
    old = said(parts[UP], 256)
    assert torch.equal(said(wide["copy"][UP], 256), old.repeat(2, 1))
    scaled = said(wide["asymmetric-scaled"][DOWN], 256)[:, : opt.FFN]
    expected = said(parts[DOWN], 256) * 0.5  # Eq. 16: all of them are twice there
    assert (scaled - expected).norm() < 0.05 * expected.norm()
    assert not any(said(wide["drop"][name], 256).any() for name in (UP, DOWN))


@pytest.mark.parametrize("slot", ["state1", "absmax1"])
def test_verify_finds_a_byte_that_is_another(tmp_path: Path, slot: str) -> None:
    """Of codes and of scales; with a manifest that has the changed file's checksums it still does."""
    from sparkling_cli.execute import worker

    source, _ = checkpoint(tmp_path / "narrow")
    real = worker.requantized

    def wrong(view: Any, factor: float, blocks: Blocks, parts: Any) -> Any:
        made = real(view, factor, blocks, parts)
        if blocks.scales == (slot == "absmax1"):
            made[3] = made[3] * 2 if blocks.scales else made[3] ^ 64
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "requantized", wrong)
        api.expand(source, tmp_path / "wide", axes=[{"axis": "ffn", "factor": 2}], report="none")
    with pytest.raises(VerificationError, match=r"scale of a block|code"):
        api.verify(source, tmp_path / "wide")


def test_new_layers_start_without_history(tmp_path: Path) -> None:
    """All of a new layer's quantized moments say zero."""
    source, parts = checkpoint(tmp_path / "narrow")
    api.expand(source, tmp_path / "deep", axes=[{"axis": "layers", "factor": 2}], report="none")
    api.verify(source, tmp_path / "deep")
    saved = torch.load(tmp_path / "deep" / "optimizer.pt", weights_only=True)["state"]
    zero = [one[HELD] for one in saved.values() if not one[HELD].get("absmax1", torch.ones(1)).any()]
    assert len(zero) == len([name for name in parts if ".layers." in name])


def test_levels_of_float8_are_torchs() -> None:
    """Every byte says what torch says."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert np.array_equal(float8_table(), every.numpy(), equal_nan=True)
    assert Levels(float8_table()).nearest(np.zeros(1, np.float32)).tolist() == [0]


def test_four_bits_by_hand() -> None:
    """A row of two blocks of two entries gets as many new ones; the second block starts where it started."""
    table = np.array([-0.5, 0, 0.5, 1] + [9] * 12, np.float32)
    table[4:] = np.linspace(2, 3, 12)
    view = (ViewDim(4, 8, (Run(0, 0, 4), Run(4, 0, 4, new=True, fill=Fill.ZERO)), 0),)
    bytes_of = lambda *numbers: np.frombuffer(struct.pack(f"<{len(numbers)}f", *numbers), np.uint8)  # noqa: E731
    codes = np.array([0 << 4 | 3, 2 << 4 | 1], np.uint8)
    parts = (codes, bytes_of(4.0, 8.0), table.view(np.uint8))
    blocks = Blocks(2, 4, scales=False, table=True)
    assert requantized(view, 1.0, blocks, parts).tolist() == [0 << 4 | 3, 2 << 4 | 1, 1 << 4 | 1, 1 << 4 | 1]
    assert requantized(view, 1.0, blocks._replace(scales=True), parts).tolist() == [4.0, 8.0, 0.0, 0.0]


def test_scales_without_their_codes_are_refused(tmp_path: Path) -> None:
    """State whose parts do not belong together is refused by name, with a way out."""
    source, _ = checkpoint(tmp_path / "narrow")
    saved = torch.load(source / "optimizer.pt", weights_only=True)
    for own in saved["state"].values():
        own[HELD].pop("qmap1", None)
    torch.save(saved, source / "optimizer.pt")
    with pytest.raises(SparklingError, match="state1") as caught:
        api.expand(source, tmp_path / "wide", axes=[{"axis": "ffn", "factor": 2}], report="none")
    assert "random-copy" in str(caught.value.hint)


class Quantized(torch.Tensor):
    """A tensor subclass that is pickled as torchao's quantized state is."""

    @staticmethod
    def __new__(cls, parts: dict[str, Any]) -> Quantized:
        """A tensor without data of its own."""
        shape = parts.get("_shape", parts["codes"].shape)
        made: Quantized = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        return made

    def __init__(self, parts: dict[str, Any]) -> None:
        self.__dict__.update(parts)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing is computed here."""
        raise NotImplementedError


@pytest.fixture(params=["8bit", "4bit", "fp8"])
def subclass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, type[Quantized]]:
    """A class under the name that torchao gives its own."""
    kind = str(request.param)
    name, home = f"OptimState{kind.replace('fp8', 'Fp8')}", f"torchao.optim.subclass_{kind}"
    made = type(name, (Quantized,), {"__module__": home, "__qualname__": name})
    module = ModuleType(home)
    setattr(module, name, made)
    for parent in ("torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, home, module)
    return kind, made


def held(kind: str, shape: torch.Size) -> dict[str, Any]:
    """Codes, scales, levels and settings of a random moment."""
    count = shape.numel()
    if kind == "8bit":
        part = coded(tuple(shape), 256, signed_levels())
        return {"codes": part["codes"], "scale": part["scales"], "qmap": part["levels"], "signed": True}
    if kind == "4bit":
        codes = torch.randint(256, (count // 2,), dtype=torch.uint8)
        levels = torch.linspace(-0.875, 1, 16)
        return {"codes": codes, "scale": torch.rand(count // 128) + 0.01, "qmap": levels, "_shape": shape}
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    return {"codes": codes, "scale": torch.rand(count // 256) + 0.01}


def said_by(part: Quantized) -> Tensor:
    """The numbers of a moment, by torch."""
    own = part.__dict__
    codes, scale = own["codes"].flatten(), own["scale"]
    if own["codes"].dtype == torch.uint8:
        if "_shape" in own:
            codes = torch.stack([codes >> 4, codes & 15], dim=-1).flatten()
        codes = own["qmap"][codes.long()]
    numbers = codes.float().view(len(scale), -1) * scale[:, None]
    return numbers.view(part.shape)


@pytest.mark.parametrize("axis", ["ffn", "layers", "hidden"])
def test_tensor_subclasses_are_widened_inside(
    tmp_path: Path, subclass: tuple[str, type[Quantized]], axis: str
) -> None:
    """Codes, scales and the size that the subclass itself has; a moment in float32 beside it."""
    kind, made = subclass
    source, _ = checkpoint(tmp_path / "narrow")
    saved = torch.load(source / "optimizer.pt", weights_only=True)
    old = {}
    for number, state in saved["state"].items():
        first = state.pop(HELD)["state1"]
        state["exp_avg"], state["exp_avg_sq"] = first.float(), first.float() ** 2
        if first.numel() >= 4096:
            state["exp_avg"], state["exp_avg_sq"] = (made(held(kind, first.shape)) for _ in range(2))
            old[number] = state["exp_avg"]
    torch.save(saved, source / "optimizer.pt")
    wide = tmp_path / "wide"
    api.expand(source, wide, axes=[{"axis": axis, "factor": 2}], report="none")
    api.verify(source, wide)
    found = torch.load(wide / "optimizer.pt", weights_only=False)
    names = [name for group in found["param_groups"] for name in group["param_names"]]
    before = [name for group in saved["param_groups"] for name in group["param_names"]]
    model = opt.loaded(wide)
    for number, part in old.items():
        new = found["state"][names.index(before[number])]["exp_avg"]
        assert isinstance(new, Quantized) and new.shape == model.get_parameter(before[number]).shape
        numbers, kept = said_by(new), said_by(part)
        same = numbers[tuple(slice(0, size) for size in kept.shape)]
        if kept.shape[1] == new.shape[1]:  # no block has moved
            assert torch.equal(same, kept)
            assert not numbers[len(kept) :].any()
        else:
            assert (same - kept).norm() < (0.2 if kind == "4bit" else 0.05) * kept.norm()


def test_other_subclasses_are_refused(tmp_path: Path) -> None:
    """A tensor with Python attributes is none of the known classes."""
    from sparkling_cli.formats.torchfile import read_torch_file

    odd = torch.zeros(3)
    odd.note = "attribute"  # type: ignore[attr-defined]
    torch.save({"odd": odd}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="subclass or a tensor with Python attributes"):
        read_torch_file(tmp_path / "odd.pt", "odd.pt")
