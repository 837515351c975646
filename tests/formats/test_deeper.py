"""More layers in the files of other trainers, held to the trainer's own model, loader and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sparkling_cli.api import expand
from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.training import rewarm
from tests.formats import make_dcp, make_nanogpt, test_lingua, test_olmo
from tests.formats.test_singlefile import _layout_file
from tests.formats.widening import widen

Pair = tuple[nn.Module, torch.optim.Optimizer]
TWICE = {"layers": 2.0}
#: for every layer of four, the one of two that it is read from
SPREAD, BEHIND = (0, 0, 1, 1), (0, 1, 0, 1)


def source_of(name: str, order: tuple[int, ...]) -> tuple[str, bool]:
    """The parameter that one of the deeper model is read from, and whether it is new."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return name, False
    layer = int(parts[at])
    source = ".".join([*parts[:at], str(order[layer]), *parts[at + 1 :]])
    return source, order[layer] in order[:layer]


def check(
    old: Pair,
    new: Pair,
    logits: Callable[[nn.Module], torch.Tensor],
    silent: int,
    order: tuple[int, ...] = SPREAD,
) -> None:
    """Logits bit by bit; every weight and all state by the layer that it is of; new layers learn.

    Args:
        old: the source's model and optimizer.
        new: the output's, as its trainer loaded them.
        logits: of a model, on tokens that no step has seen.
        silent: tensors of a new layer that are zero.
        order: of the layers.
    """
    with torch.no_grad():
        assert torch.equal(logits(new[0]), logits(old[0]))
    before, after = (dict(model.named_parameters()) for model, _ in (old, new))
    zeros = 0
    for name, value in after.items():
        source, fresh = source_of(name, order)
        if fresh and not value.any():
            zeros += 1
        else:
            assert torch.equal(value, before[source]), name
        states = old[1].state[before[source]], new[1].state[value]
        assert states[0].keys() == states[1].keys(), name
        for slot, kept in states[0].items():
            wanted = torch.zeros_like(kept) if fresh and slot != "step" else kept
            assert torch.equal(torch.as_tensor(states[1][slot]), torch.as_tensor(wanted)), (name, slot)
    assert len(after) - len(before) == sum(source_of(name, order)[1] for name in after)
    assert zeros == 2 * silent
    logits(new[0]).square().mean().backward()
    for name, value in after.items():
        if source_of(name, order)[1] and not value.any():
            assert value.grad is not None and value.grad.any(), name


def test_nanogpt(tmp_path: Path) -> None:
    """One torch file, compiled names, numbered parameters; trained on with the re-warmup."""
    (tmp_path / "run").mkdir()
    make_nanogpt.make_nanogpt(tmp_path / "run" / "ckpt.pt", prefix="_orig_mod.")
    source, optimizer, _ = make_nanogpt.resume_nanogpt(tmp_path / "run" / "ckpt.pt")
    target = widen(tmp_path / "run" / "ckpt.pt", tmp_path / "deep" / "ckpt.pt", TWICE)
    model, resumed, found = make_nanogpt.resume_nanogpt(target)
    assert found["model_args"]["n_layer"] == 4 and found["iter_num"] == 4
    ids = make_nanogpt.batch(source.config, 9)
    check((source, optimizer), (model, resumed), lambda one: one(ids), silent=4)
    rewarming = rewarm(resumed, model, target, step=4)
    make_nanogpt.train(model, resumed, model.config, 3)
    assert rewarming.metrics()["learning_rate_new"] > 0
    assert all(value.any() for value in model.parameters())


def test_nanogpt_with_widths_and_once_more(tmp_path: Path) -> None:
    """Depth and width in one call, and a second stage on the output: the function stays."""
    old = make_nanogpt.make_nanogpt(tmp_path / "ckpt.pt")
    widths = {"hidden": 2.0, "heads": 2.0, "ffn": 2.0}
    first = widen(tmp_path / "ckpt.pt", tmp_path / "one" / "ckpt.pt", {**TWICE, **widths})
    second = widen(first, tmp_path / "two" / "ckpt.pt", {"layers": 1.5}, at="end")
    ids = make_nanogpt.batch(old.config, 9)
    model, _, found = make_nanogpt.resume_nanogpt(second)
    assert (found["model_args"]["n_layer"], found["model_args"]["n_embd"]) == (6, 48)
    torch.testing.assert_close(model(ids), old(ids), rtol=1e-5, atol=2e-5)


def silent_layout(folder: Path, head_dim: int) -> Path:
    """A layout file of nanoGPT that says what makes its layers silent."""
    text = _layout_file(folder, head_dim=head_dim).read_text()
    names = (f"{part}.c_proj.{kind}" for part in ("attn", "mlp") for kind in ("weight", "bias"))
    silent = "".join(f'"transformer.h.*.{name}" = 0\n' for name in names)
    (folder / "deep.toml").write_text(f"{text}\n[silent]\n{silent}")
    return folder / "deep.toml"


def test_dcp(tmp_path: Path) -> None:
    """torch.distributed.checkpoint with groups that list their parameters, by a layout file."""
    make_dcp.save_single(tmp_path / "run")
    silent_layout(tmp_path, head_dim=5)
    with pytest.raises(SpecError, match="does not say which tensors make a layer silent"):
        widen(tmp_path / "run", tmp_path / "no", TWICE, layout=tmp_path / "layout.toml")
    deep = widen(tmp_path / "run", tmp_path / "deep", TWICE, layout=tmp_path / "deep.toml")
    old = make_dcp.load_whole(tmp_path / "run", make_dcp.CONFIG)
    new = make_dcp.load_whole(deep, replace(make_dcp.CONFIG, n_layer=4))
    ids = make_nanogpt.batch(make_dcp.CONFIG, 9)
    check((old[0], old[1]), (new[0], new[1]), lambda one: one(ids), silent=4)


def test_lingua_s(tmp_path: Path) -> None:
    """The directories of lingua."""
    test_lingua.make_lingua(tmp_path / "run")
    target = widen(tmp_path / "run", tmp_path / "deep", TWICE)
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(9))
    check(test_lingua.load(tmp_path / "run"), test_lingua.load(target), lambda one: one(ids), silent=2)


def test_olmo_s(tmp_path: Path) -> None:
    """OLMo's unsharded steps, whose groups name their parameters; other blocks are refused."""
    test_olmo.make_olmo(tmp_path / "run")
    target = widen(tmp_path / "run", tmp_path / "deep", TWICE)
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(9))
    check(test_olmo.load(tmp_path / "run"), test_olmo.load(target), lambda one: one(ids), silent=2)
    test_olmo.make_olmo(tmp_path / "after", norm_after=True)
    with pytest.raises(SpecError, match="norm_after is true"):
        expand(tmp_path / "after", tmp_path / "no", axes={"layers": 2}, report="none")


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama3", "qwen3", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("fuse_qkv", [True, False])
def test_torchtitan(tmp_path: Path, family: str, fuse_qkv: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flattened groups; state by the module's names, of other matrices than the weights'."""
    pytest.importorskip("torchtitan", reason="pip install torchtitan==0.3.0 triton")
    from tests.formats import make_torchtitan as made
    from tests.formats.titan_families import compute_on_cpu

    compute_on_cpu(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with one_process(tmp_path):
        run = made.make_torchtitan(tmp_path / "run", fuse_qkv=fuse_qkv, family=family)
        order = BEHIND if family == "gpt-oss" else SPREAD  # every other layer of it has a window
        options = {"at": "end"} if order == BEHIND else {}
        widen(tmp_path / "run" / "step-3", tmp_path / "deep" / "step-3", TWICE, **options)
        resumed = made.Run(tmp_path / "deep", made.Sizes(layers=4), fuse_qkv=fuse_qkv, family=family)
        assert resumed.manager.load(3)
        pairs = [(one.model, one.optimizers.optimizers[0]) for one in (run, resumed)]
        ids = made.batch(run.sizes, 9)
        silent = {"gpt-oss": 4}.get(family, 2)
        check(pairs[0], pairs[1], lambda one: made.logits_of(one, ids), silent, order)
        resumed.optimizers.zero_grad()
        resumed.train(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "silent"),
    [({}, 2), ({"block_name": "reordered_norm"}, 2), ({"qk_norm": False, "use_head_qk_norm": False}, 2)],
)
def test_olmo_core(tmp_path: Path, sizes: dict[str, Any], silent: int) -> None:
    """Blocks with norms in front and behind: behind, it is the norms that are silent."""
    pytest.importorskip("olmo_core", reason="pip install ai2-olmo-core==3.0.0")
    from tests.formats import make_olmo_core as made

    old = made.make_olmo_core(tmp_path / "step3", {**made.NARROW, **sizes}, tmp_path)
    target = widen(tmp_path / "step3", tmp_path / "deep", TWICE)
    new, state = made.resume_olmo_core(target, tmp_path)
    assert state["global_step"] == 3
    check((old.model, old.optim), (new.model, new.optim), lambda one: one(made.batch(9)), silent)


@pytest.mark.slow
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("family", ["LLAMA", "NEOX", "MIXTRAL", "GROUPED"])
def test_litgpt(tmp_path: Path, family: str, behind: bool) -> None:
    """Norms behind the parts or not, by the config."""
    if behind and family == "NEOX":
        pytest.skip("LayerNorms behind the parts are in no layout file")
    pytest.importorskip("litgpt", reason="pip install litgpt==0.5.13")
    from tests.formats import make_litgpt as made

    sizes = {**getattr(made, family), "post_attention_norm": behind, "post_mlp_norm": behind}
    made.make_litgpt(tmp_path / "step-3", sizes)
    target = widen(tmp_path / "step-3", tmp_path / "deep", TWICE)
    old, new = (made.resume_litgpt(folder) for folder in (tmp_path / "step-3", target))
    check(
        (old[1], old[2]),
        (new[1], new[2]),
        lambda one: one(made.batch(9)),
        silent={"LLAMA": 2, "NEOX": 4, "MIXTRAL": 5, "GROUPED": 16}[family] if not behind else 2,
    )


def test_what_has_no_place_for_layers_is_refused(tmp_path: Path) -> None:
    """By the format's name, with what to do."""
    from tests.formats.make_nanochat import make_nanochat

    source = make_nanochat(tmp_path / "run")
    with pytest.raises((SpecError, CheckpointError)) as caught:
        expand(tmp_path / "run", tmp_path / "no", axes={"layers": 2}, report="none")
    assert source is not None and "follows from how many there are" in caught.value.message
