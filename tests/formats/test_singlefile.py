"""One-file checkpoints: nanoGPT and plain dictionaries are widened, resumed, and refused when unsound."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli.api import expand
from sparkling_cli.errors import CheckpointError, SpecError, UnsafePickleError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.schedule.rewarmup import read_rewarmup
from tests.formats.make_nanogpt import (
    GPT,
    GPTConfig,
    batch,
    loss_of,
    make_nanogpt,
    resume_nanogpt,
)
from tests.formats.widening import check_moments, widen

JOINT = {"hidden": 2, "heads": 2, "ffn": 2}


@pytest.mark.parametrize(("prefix", "bias"), [("_orig_mod.", True), ("", False)])
def test_nanogpt_resumes_where_it_was(tmp_path: Path, prefix: str, bias: bool) -> None:
    """Logits, first loss, step, config numbers and every moment, through nanoGPT's own resume."""
    source = tmp_path / "ckpt.pt"
    model = make_nanogpt(source, GPTConfig(bias=bias), prefix=prefix)
    before = source.read_bytes()
    target = widen(source, tmp_path / "wide.pt", JOINT)
    assert source.read_bytes() == before
    wide, optimizer, checkpoint = resume_nanogpt(target)
    ids = batch(model.config, 9)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_of(wide, ids), loss_of(model, ids), rtol=1e-6, atol=1e-6)
    assert checkpoint["iter_num"] == 4
    assert checkpoint["model_args"]["n_embd"] == checkpoint["config"]["n_embd"] == 48
    assert checkpoint["model_args"]["n_head"] == 6
    assert torch.equal(checkpoint["best_val_loss"], torch.tensor(4.25))
    _, old_optimizer, _ = resume_nanogpt(source)
    old_params = [p for group in old_optimizer.param_groups for p in group["params"]]
    new_params = [p for group in optimizer.param_groups for p in group["params"]]
    for old, new in zip(old_params, new_params, strict=True):
        state = optimizer.state[new]
        assert state["step"] == 4
        assert state["exp_avg"].shape == new.shape
        check_moments({name: old_optimizer.state[old][name] for name in ("exp_avg", "exp_avg_sq")}, state)
    loss_of(wide, ids).backward()
    optimizer.step()


def _get_lr(it: int, config: dict[str, Any]) -> float:
    """NanoGPT's own function (train.py), past its warmup."""
    if it > config["lr_decay_iters"]:
        return float(config["min_lr"])
    ratio = (it - config["warmup_iters"]) / (config["lr_decay_iters"] - config["warmup_iters"])
    share = 0.5 * (1.0 + math.cos(math.pi * ratio))
    return float(config["min_lr"] + share * (config["learning_rate"] - config["min_lr"]))


def test_the_schedule_is_nanogpts(tmp_path: Path) -> None:
    """The old entries' curve is read from the options in the file; the new entries start on it."""
    make_nanogpt(tmp_path / "ckpt.pt")
    config = torch.load(tmp_path / "ckpt.pt", weights_only=True)["config"]
    widen(tmp_path / "ckpt.pt", tmp_path / "wide.pt", JOINT)
    rewarmup = read_rewarmup(tmp_path / "wide.pt.sparkling")
    for step in range(4, 40):
        assert rewarmup.baseline(step) == pytest.approx(_get_lr(step, config), rel=1e-12)
    assert rewarmup.expansion_step == 4
    assert rewarmup.curves[0](0) == pytest.approx(_get_lr(4, config), rel=1e-12)


def test_tied_matrix_stays_one_storage(tmp_path: Path) -> None:
    """Embedding and head are written once and share memory after loading."""
    make_nanogpt(tmp_path / "ckpt.pt")
    target = widen(tmp_path / "ckpt.pt", tmp_path / "wide.pt", JOINT)
    weights = torch.load(target, weights_only=True)["model"]
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()


def test_nanogpt_ffn_alone_is_refused(tmp_path: Path) -> None:
    """Unmodified nanoGPT has no MLP that is not 4 x n_embd: the error names what must grow along."""
    make_nanogpt(tmp_path / "ckpt.pt")
    with pytest.raises(SpecError, match="hidden"):
        widen(tmp_path / "ckpt.pt", tmp_path / "wide.pt", {"ffn": 2})
    assert not (tmp_path / "wide.pt").exists()


def test_same_bytes_twice(tmp_path: Path) -> None:
    """Two runs give identical files."""
    make_nanogpt(tmp_path / "ckpt.pt")
    one = widen(tmp_path / "ckpt.pt", tmp_path / "one.pt", JOINT, init="random-random", seed=3)
    two = widen(tmp_path / "ckpt.pt", tmp_path / "two.pt", JOINT, init="random-random", seed=3)
    assert one.read_bytes() == two.read_bytes()


def test_dropped_state_restarts_the_counters(tmp_path: Path) -> None:
    """``drop`` zeroes moments and step counters inside the file."""
    make_nanogpt(tmp_path / "ckpt.pt")
    target = widen(tmp_path / "ckpt.pt", tmp_path / "wide.pt", JOINT, optimizer="drop", allow_locked=True)
    state = torch.load(target, weights_only=True)["optimizer"]["state"]
    assert all(float(s["step"]) == 0 and not s["exp_avg"].any() for s in state.values())


def _plain(path: Path, **changes: Any) -> GPT:
    """The same model as a plain dictionary under other keys, with a wrapper's prefix."""
    model = make_nanogpt(path)
    checkpoint = torch.load(path, weights_only=True)
    torch.save(
        {
            "epoch": 1,
            "global_step": 4,
            "model_state_dict": {f"module.{k}": v for k, v in checkpoint["model"].items()},
            "optimizer_state_dict": checkpoint["optimizer"],
            "config": checkpoint["model_args"],
            "rng": torch.get_rng_state(),
            **changes,
        },
        path,
    )
    return model


def test_plain_dictionary(tmp_path: Path) -> None:
    """Other keys, a DataParallel prefix, random state carried over, config numbers edited."""
    model = _plain(tmp_path / "last.ckpt")
    target = widen(tmp_path / "last.ckpt", tmp_path / "wide.ckpt", JOINT, allow_locked=True)
    source = torch.load(tmp_path / "last.ckpt", weights_only=True)
    output = torch.load(target, weights_only=True)
    assert list(output) == list(source)
    assert torch.equal(output["rng"], source["rng"])
    assert output["config"]["n_embd"] == 48
    wide = GPT(GPTConfig(**output["config"]))
    wide.load_state_dict({k.removeprefix("module."): v for k, v in output["model_state_dict"].items()})
    ids = batch(model.config, 9)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_bare_state_dict(tmp_path: Path) -> None:
    """A file that is nothing but weights; its sizes come from a layout file that leaves them open."""
    path = tmp_path / "weights.bin"
    model = make_nanogpt(path)
    torch.save(torch.load(path, weights_only=True)["model"], path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.states == ()
    assert "weights only" in checkpoint.notes[0]
    layout = _layout_file(tmp_path, head_dim=8)
    target = widen(path, tmp_path / "wide.bin", JOINT, layout=layout, allow_locked=True)
    wide = GPT(GPTConfig(n_embd=48, n_head=6))
    wide.load_state_dict(torch.load(target, weights_only=True))
    ids = batch(model.config, 9)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=1e-5)


def _layout_file(folder: Path, **sizes: int) -> Path:
    """The packaged layout of nanoGPT without config keys, with some sizes given."""
    from importlib.resources import files

    text = files("sparkling_cli").joinpath("layouts", "nanogpt.toml").read_text()
    head, _, rest = text.partition("[config]")
    text = head + "[tensors]" + rest.partition("[tensors]")[2]
    for axis, size in sizes.items():
        text = text.replace(f"[axes.{axis}]", f"[axes.{axis}]\nsize = {size}")
    path = folder / "layout.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "weights_of": 1}, "no state dict under"),
        ([1, 2], "expected a dictionary"),
        ({"model": {"a": torch.ones(2)}, "state_dict": {"a": torch.ones(2)}}, "two models"),
        (
            {
                "model": {"a": torch.ones(2)},
                "optimizer": [
                    {"state": {"a": {"exp_avg": torch.ones(2)}}, "param_groups": []},
                    {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
                ],
            },
            "by number, another by name",
        ),
    ],
)
def test_almost_a_checkpoint(tmp_path: Path, content: Any, message: str) -> None:
    """What is missing, or there too often, is named."""
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "odd.pt")


def _two_optimizers(path: Path, keys: Any) -> GPT:
    """As in speed runs: Muon for the hidden matrices, AdamW with two groups for all else, side by side."""
    config = GPTConfig(bias=True)
    model = make_nanogpt(path, config)
    checkpoint = torch.load(path, weights_only=True)
    named = list(model.named_parameters())
    hidden = [p for n, p in named if p.dim() == 2 and ".h." in n]
    tables = [p for n, p in named if p.dim() == 2 and ".h." not in n]
    vectors = [p for n, p in named if p.dim() < 2]
    adam = torch.optim.AdamW([{"params": tables, "lr": 3e-3}, {"params": vectors}], lr=1e-3)
    muon = torch.optim.Muon(hidden, lr=1e-2)
    for step in range(3):
        loss_of(model, batch(config, step)).backward()
        for optimizer in (adam, muon):
            optimizer.step()
            optimizer.zero_grad()
    del checkpoint["optimizer"]
    checkpoint["model"] = model.state_dict()
    checkpoint.update(keys(adam.state_dict(), muon.state_dict()))
    torch.save(checkpoint, path)
    return model


@pytest.mark.parametrize(
    "keys",
    [
        lambda adam, muon: {"optimizers": [adam, muon]},
        lambda adam, muon: {"optimizers": {"adam": adam, "muon": muon}},
        lambda adam, muon: {"adam_state": adam, "muon_state": muon},
    ],
)
def test_two_optimizers(tmp_path: Path, keys: Any) -> None:
    """Every number finds its parameter in the right optimizer; both resume with every moment."""
    source = tmp_path / "ckpt.pt"
    model = _two_optimizers(source, keys)
    opened = open_checkpoint(source)
    assert opened.facts["optimizer_class"] == "Muon with AdamW"
    target = widen(source, tmp_path / "wide.pt", JOINT)
    checkpoint = torch.load(target, weights_only=True)
    wide = GPT(GPTConfig(**checkpoint["model_args"]))
    wide.load_state_dict(checkpoint["model"])
    ids = batch(model.config, 9)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=1e-5)
    narrow = torch.load(source, weights_only=True)
    named = list(wide.named_parameters())
    hidden = [p for n, p in named if p.dim() == 2 and ".h." in n]
    tables = [p for n, p in named if p.dim() == 2 and ".h." not in n]
    vectors = [p for n, p in named if p.dim() < 2]
    optimizers = (
        torch.optim.AdamW([{"params": tables}, {"params": vectors}]),
        torch.optim.Muon(hidden),
    )
    found = [[_holders(c, k) for k in ("exp_avg", "momentum_buffer")] for c in (narrow, checkpoint)]
    for optimizer, old, new in zip(optimizers, *found, strict=True):
        optimizer.load_state_dict(new)
        for number, state in new["state"].items():
            slots = [s for s in state if s != "step"]
            check_moments({s: old["state"][number][s] for s in slots}, state, str(number))
        loss_of(wide, ids).backward()
        assert all(v.shape in (p.shape, ()) for p, s in optimizer.state.items() for v in s.values())
        optimizer.step()


def _holders(tree: Any, slot: str) -> Any:
    """The optimizer's state dict that has this slot, wherever it is."""
    for value in tree.values() if isinstance(tree, dict) else tree:
        if not isinstance(value, (dict, list)):
            continue
        if isinstance(value, dict) and "param_groups" in value:
            if slot in next(iter(value["state"].values())):
                return value
        else:
            found = _holders(value, slot)
            if found is not None:
                return found
    return None


def test_two_optimizers_in_doubt(tmp_path: Path) -> None:
    """An embedding and a head of one shape in groups of their own: nobody knows which is which."""
    layout = tmp_path / "layout.toml"
    layout.write_text(
        """format = 1
name = "small"
[axes]
hidden = { size = 4 }
ffn = { size = 8 }
vocab = { size = 9, widenable = false }
[tensors]
"in.weight" = "vocab -> hidden"
"up.weight" = "ffn <- hidden"
"down.weight" = "hidden <- ffn"
"out.weight" = "vocab <- hidden"
"""
    )
    shapes = {"in.weight": (9, 4), "up.weight": (8, 4), "down.weight": (4, 8), "out.weight": (9, 4)}
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.AdamW([{"params": [params["out.weight"]]}, {"params": [params["in.weight"]]}])
    muon = torch.optim.Muon([params["up.weight"], params["down.weight"]])
    adam.step()
    muon.step()
    weights = {name: parameter.detach() for name, parameter in params.items()}
    state = {"model": weights, "optimizers": [adam.state_dict(), muon.state_dict()]}
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"'in\.weight', 'out\.weight'") as caught:
        widen(tmp_path / "ckpt.pt", tmp_path / "wide.pt", {"ffn": 2}, layout=layout)
    assert "--param-order" in (caught.value.hint or "")
    order = tmp_path / "order.txt"  # what the hint's code prints, for one optimizer after the other
    order.write_text("".join(f"{n}\n" for n in ("out.weight", "in.weight", "up.weight", "down.weight")))
    wide = tmp_path / "wide.pt"
    expand(tmp_path / "ckpt.pt", wide, axes={"ffn": 2}, layout=layout, param_order=order, report="none")
    found = torch.load(wide, weights_only=True)["optimizers"]
    assert torch.equal(found[0]["state"][0]["exp_avg"], adam.state_dict()["state"][0]["exp_avg"])
    muon_state = muon.state_dict()["state"][0]["momentum_buffer"]
    check_moments({"up": muon_state}, {"up": found[1]["state"][0]["momentum_buffer"]})


class _Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def test_unsafe_pickle_is_refused_unexecuted(tmp_path: Path) -> None:
    """A pickle that calls code is named and not run."""
    made = tmp_path / "made"
    torch.save({"model": {"a": torch.ones(2)}, "trap": _Trap(str(made))}, tmp_path / "trap.pt")
    with pytest.raises(UnsafePickleError, match="mkdir"):
        open_checkpoint(tmp_path / "trap.pt")
    assert not made.exists()
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "raw.pt")


def test_nested_state_is_read(tmp_path: Path) -> None:
    """A tensor in a list is state under its place in it: nothing is carried along unseen."""
    path = tmp_path / "ckpt.pt"
    make_nanogpt(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer"]["state"][0]["blocks"] = [torch.ones(3)]
    torch.save(checkpoint, path)
    state = open_checkpoint(path).states[0]
    assert state.tensors["blocks.0"].endswith("optimizer.state.0.blocks.0")
