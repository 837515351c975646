"""DeepSpeed's Universal Checkpoint: a faithful small one always, real ZeRO runs where DeepSpeed is there."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparkling_cli.api import make_plan
from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from tests.formats.make_nanogpt import GPT, GPTConfig, batch, scatter, train
from tests.formats.test_deeper import SPREAD, silent_layout, source_of
from tests.formats.test_singlefile import _layout_file
from tests.formats.widening import check_moments, tensors_of, widen

JOINT = {"hidden": 2, "heads": 2, "ffn": 2}
WIDE = GPTConfig(n_embd=48, n_head=6)


@pytest.fixture(scope="module", autouse=True)
def one_group() -> Iterator[None]:
    """DeepSpeed keeps its process group and its rank for ever; modules tested later have their own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if dist.is_initialized():
        dist.destroy_process_group()


def _universal(root: Path, *, partitioned: bool) -> GPT:
    """A Universal Checkpoint as the converter writes it, after real steps."""
    model = GPT(GPTConfig())
    scatter(model)
    optimizer = model.optimizer()
    train(model, optimizer, GPTConfig(), 3)
    for name, parameter in model.named_parameters():
        folder = root / "zero" / name
        folder.mkdir(parents=True)
        state = optimizer.state[parameter]
        slots = {"fp32": parameter.detach(), **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}
        for slot, value in slots.items():
            value = value.clone()
            whole = value.flatten() if partitioned else {"cat_dim": 0, "param": value}
            torch.save(whole, folder / f"{slot}.pt")
        if not partitioned:
            torch.save(state["step"], folder / "step.pt")
    module = OrderedDict((k, v.bfloat16()) for k, v in model.state_dict().items())
    module["lm_head.weight"] = module["transformer.wte.weight"]
    if partitioned:
        module = OrderedDict((k, torch.empty(0, dtype=torch.bfloat16)) for k in module)
    states: dict[str, Any] = {
        "module": module,
        "param_shapes": [OrderedDict((n, p.shape) for n, p in model.named_parameters())],
        "shared_params": {"lm_head.weight": "transformer.wte.weight"},
        "frozen_param_fragments": None,
        "global_steps": 3,
    }
    prefix = "zero_pp_rank_0_" if partitioned else ""
    torch.save(states, root / f"{prefix}mp_rank_00_model_states.pt")
    options: dict[str, Any] = {"param_groups": [{"lr": 1e-3}]}
    if partitioned:  # the converter puts one rank's flat partitions in, and the only step counter there is
        flat = torch.ones(sum(p.numel() for p in model.parameters()))
        state = {"step": torch.tensor(3.0), "exp_avg": flat, "exp_avg_sq": flat.clone()}
        options["optimizer_state_dict"] = {"state": {0: state}, "param_groups": [{"lr": 1e-3}]}
        marked = flat.clone()
        marked.ds_id = 0  # type: ignore[attr-defined]  # as DeepSpeed's own have, so that they are pickled otherwise
        options["fp32_flat_groups"] = [marked]
    torch.save(options, root / "zero" / "optimizer_state.pt")
    return model


@pytest.mark.parametrize("partitioned", [False, True])
def test_parameter_folders(tmp_path: Path, partitioned: bool) -> None:
    """fp32 weights give the same logits, moments are kept, shapes and module follow."""
    root = tmp_path / "step3_universal"
    model = _universal(root, partitioned=partitioned)
    layout = _layout_file(tmp_path, head_dim=8)
    target = widen(root, tmp_path / "wide", JOINT, layout=layout)
    source = open_checkpoint(root)
    assert (source.facts["global_step"], source.facts["zero_3"]) == (3, partitioned)

    def load(path: Path, name: str, slot: str) -> torch.Tensor:
        found = torch.load(path / "zero" / name / f"{slot}.pt", weights_only=True)
        assert isinstance(found, dict) is not partitioned
        assert not partitioned or found.dim() == 1
        return found if partitioned else found["param"]

    wide = GPT(WIDE)
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(load(target, name, "fp32").view_as(parameter))
    ids = batch(WIDE, 9)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=1e-5)
    for name, _ in wide.named_parameters():
        slots = ("exp_avg", "exp_avg_sq")
        old = {slot: load(root, name, slot) for slot in slots}
        check_moments(old, {slot: load(target, name, slot) for slot in slots}, name)
        if not partitioned:
            assert torch.load(target / "zero" / name / "step.pt", weights_only=True) == 3
    options = torch.load(target / "zero" / "optimizer_state.pt", weights_only=True)
    assert options["param_groups"] == [{"lr": 1e-3}]
    assert {state.scalars["step"] for state in source.states if state.tensors} == {3.0}
    if partitioned:  # what is left of the flat partitions is what DeepSpeed reads
        assert options["optimizer_state_dict"]["state"] == {0: {"step": torch.tensor(3.0)}}
        assert "fp32_flat_groups" not in options
    (states,) = target.glob("*_model_states.pt")
    found = torch.load(states, weights_only=True)
    shapes = dict(found["param_shapes"][0])
    assert shapes == {n: p.shape for n, p in wide.named_parameters()}
    if not partitioned:
        halves = {n: p.detach().bfloat16() for n, p in wide.state_dict().items()}
        for name, value in found["module"].items():
            torch.testing.assert_close(value, halves[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("partitioned", [False, True])
def test_more_layers(tmp_path: Path, partitioned: bool) -> None:
    """A folder for each new parameter, with its step; module, shapes and buffers under their new names."""
    root = tmp_path / "step3_universal"
    model = _universal(root, partitioned=partitioned)
    layout = silent_layout(tmp_path, head_dim=8)
    target = widen(root, tmp_path / "deep", {"layers": 2}, layout=layout)
    wide = GPT(replace(GPTConfig(), n_layer=4))
    folders = {path.name for path in (target / "zero").iterdir() if path.is_dir()}
    assert folders == {name for name, _ in wide.named_parameters()}
    zeros = 0
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            found = {path.stem: torch.load(path) for path in (target / "zero" / name).iterdir()}
            whole = {
                slot: value["param"] if isinstance(value, dict) else value for slot, value in found.items()
            }
            assert found.keys() == {
                path.stem for path in (root / "zero" / "transformer.wte.weight").iterdir()
            }
            assert partitioned or found["step"] == 3
            parameter.copy_(whole["fp32"].view_as(parameter))
            source, new = source_of(name, SPREAD)
            zeros += not parameter.any()
            old = {s: torch.load(root / "zero" / source / f"{s}.pt") for s in ("exp_avg", "exp_avg_sq")}
            for slot, value in old.items():
                kept = value["param"] if isinstance(value, dict) else value
                if new:
                    assert not whole[slot].any(), name
                else:
                    assert torch.equal(whole[slot], kept), (name, slot)
        ids = batch(WIDE, 9)
        assert torch.equal(wide(ids), model(ids))
    assert zeros == 8
    (states,) = target.glob("*_model_states.pt")
    said = torch.load(states, weights_only=True)
    assert dict(said["param_shapes"][0]) == {n: p.shape for n, p in wide.named_parameters()}
    assert said["module"].keys() == wide.state_dict().keys()
    if not partitioned:
        halves = {n: p.detach().bfloat16() for n, p in wide.state_dict().items()}
        for name, value in said["module"].items():
            torch.testing.assert_close(value, halves[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("partitioned", [False, True])
def test_dropped_state_restarts_the_counters(tmp_path: Path, partitioned: bool) -> None:
    """``drop`` zeroes moments and every step counter, also the one that ZeRO-3 keeps for all parameters."""
    root = tmp_path / "step3_universal"
    _universal(root, partitioned=partitioned)
    layout = _layout_file(tmp_path, head_dim=8)
    target = widen(root, tmp_path / "wide", JOINT, layout=layout, optimizer="drop", allow_locked=True)
    steps = list(target.glob("zero/*/step.pt"))
    assert bool(steps) is not partitioned
    assert all(torch.load(path, weights_only=True) == 0 for path in steps)
    if partitioned:
        options = torch.load(target / "zero" / "optimizer_state.pt", weights_only=True)
        assert options["optimizer_state_dict"]["state"][0]["step"] == 0
    for path in target.glob("zero/*/exp_avg*.pt"):
        found = torch.load(path, weights_only=True)
        assert not (found if partitioned else found["param"]).any()


def test_three_without_a_step(tmp_path: Path) -> None:
    """Under ZeRO-3 DeepSpeed resumes by one file's step: without it, nothing is written."""
    root = tmp_path / "step3_universal"
    _universal(root, partitioned=True)
    torch.save({"param_groups": []}, root / "zero" / "optimizer_state.pt")
    with pytest.raises(CheckpointError, match="with a step in it"):
        open_checkpoint(root)
    (root / "zero" / "optimizer_state.pt").unlink()
    with pytest.raises(CheckpointError, match="not finished"):
        open_checkpoint(root)


def test_flat_partitions_are_refused(tmp_path: Path) -> None:
    """The error names DeepSpeed's own converter, with the paths filled in."""
    root = tmp_path / "step3"
    root.mkdir()
    (root / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="ds_to_universal") as caught:
        open_checkpoint(root)
    assert str(root) in str(caught.value)


def test_unfinished_conversion(tmp_path: Path) -> None:
    """A folder without its fp32 weights is named."""
    _universal(tmp_path / "u", partitioned=False)
    (tmp_path / "u" / "zero" / "transformer.wpe.weight" / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match="wpe"):
        open_checkpoint(tmp_path / "u")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumes_where_it_was(tmp_path: Path, stage: int) -> None:
    """ZeRO saved, converted, widened, loaded by ``load_universal``: the next losses are the source's."""
    pytest.importorskip("deepspeed", reason="DS_ACCELERATOR=cpu DS_BUILD_OPS=0 pip install deepspeed==0.19.8")
    from tests.formats import make_deepspeed as made

    deepspeed = made.start(tmp_path)
    config = GPTConfig()
    engine = made.engine_of(deepspeed, config, stage)
    made.train(engine, config, 3)
    engine.save_checkpoint(str(tmp_path / "run"), tag="step3")
    expected = made.train(engine, config, 2, first=3)
    source = made.convert(tmp_path / "run", "step3")
    (tmp_path / "out").mkdir()
    layout = _layout_file(tmp_path, head_dim=8)
    target = widen(source, tmp_path / "out" / "step3_universal", JOINT, layout=layout)
    (tmp_path / "out" / "latest_universal").write_text(target.name)
    wide = made.engine_of(deepspeed, WIDE, stage, universal=True)
    path, _ = wide.load_checkpoint(str(tmp_path / "out"))
    assert path is not None
    assert wide.global_steps == 3
    assert made.steps_of(wide) == {3.0}
    losses = made.train(wide, WIDE, 2, first=3)
    assert losses[0] == pytest.approx(expected[0], abs=0.02)
    assert losses[1] == pytest.approx(expected[1], abs=0.1)
    dropped = widen(
        source, tmp_path / "dropped" / target.name, JOINT, layout=layout, optimizer="drop", allow_locked=True
    )
    (tmp_path / "dropped" / "latest_universal").write_text(dropped.name)
    fresh = made.engine_of(deepspeed, WIDE, stage, universal=True)
    fresh.load_checkpoint(str(tmp_path / "dropped"))
    assert made.steps_of(fresh) == {0.0}
    assert made.train(fresh, WIDE, 1, first=3)[0] == pytest.approx(expected[0], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deeper_and_resumed(tmp_path: Path, stage: int) -> None:
    """The next loss is the source's bit by bit; what DeepSpeed loaded it saves again, entry by entry."""
    pytest.importorskip("deepspeed", reason="DS_ACCELERATOR=cpu DS_BUILD_OPS=0 pip install deepspeed==0.19.8")
    from tests.formats import make_deepspeed as made

    deepspeed = made.start(tmp_path)
    config, deep = GPTConfig(), replace(GPTConfig(), n_layer=4)
    engine = made.engine_of(deepspeed, config, stage)
    made.train(engine, config, 3)
    engine.save_checkpoint(str(tmp_path / "run"), tag="step3")
    expected = made.train(engine, config, 2, first=3)
    source = made.convert(tmp_path / "run", "step3")
    (tmp_path / "out").mkdir()
    layout = silent_layout(tmp_path, head_dim=8)
    target = widen(source, tmp_path / "out" / "step3_universal", {"layers": 2}, layout=layout)
    (tmp_path / "out" / "latest_universal").write_text(target.name)
    resumed = made.engine_of(deepspeed, deep, stage, universal=True)
    path, _ = resumed.load_checkpoint(str(tmp_path / "out"))
    assert path is not None and resumed.global_steps == 3
    assert made.steps_of(resumed) == {3.0}
    resumed.save_checkpoint(str(tmp_path / "again"), tag="step3")
    again, new = tensors_of(made.convert(tmp_path / "again", "step3")), tensors_of(target)
    assert again.keys() == new.keys()
    for key, tensor in new.items():
        assert torch.equal(again[key], tensor), key
    losses = made.train(resumed, deep, 2, first=3)
    assert losses[0] == expected[0]
    assert losses[1] == pytest.approx(expected[1], abs=0.1)


def _pipeline(root: Path, *, gated: bool = False) -> dict[str, torch.Tensor]:
    """GPT-NeoX's layers after the conversion: a file each, no module, steps that are Python numbers.

    Args:
        root: where they are written.
        gated: as of its configs for Llama: RMS norms, SwiGLU, no biases.
    """
    hidden, ffn, vocab, heads = 32, 512, 61, 4  # its MLPs' widths are rounded up to 512
    generator = torch.Generator().manual_seed(1)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    layers: dict[int, dict[str, torch.Tensor]] = {0: {"word_embeddings.weight": made(vocab, hidden)}}
    for number in (2, 3):
        layers[number] = {
            **{
                f"{norm}_layernorm.{part}": made(hidden)
                for norm in ("input", "post_attention")
                for part in PARTS
            },
            "attention.query_key_value.weight": made(3 * hidden, hidden),
            "attention.query_key_value.bias": made(3 * hidden),
            "attention.rotary_emb.inv_freq": made(4),
            "attention.dense.weight": made(hidden, hidden),
            "attention.dense.bias": made(hidden),
            "mlp.linear1.weight": made(ffn, hidden),
            "mlp.linear1.bias": made(ffn),
            "mlp.linear2.weight": made(hidden, ffn // 2 if gated else ffn),
            "mlp.linear2.bias": made(hidden),
        }
    layers[5] = {"norm.weight": made(hidden), "norm.bias": made(hidden)}
    layers[6] = {"final_linear.weight": made(vocab, hidden)}
    if gated:
        for number, tensors in layers.items():
            bare = {name: value for name, value in tensors.items() if not name.endswith("bias")}
            layers[number] = {
                name.replace("norm.weight", "norm.scale"): value for name, value in bare.items()
            }
    root.mkdir()
    weights = {}
    for number, tensors in layers.items():
        torch.save(tensors, root / f"layer_{number:02d}-model_00-model_states.pt")
        weights.update({f"{number}.{name}": value for name, value in tensors.items()})
    trained = {name: value for name, value in weights.items() if "inv_freq" not in name}
    for name, value in trained.items():
        folder = root / "zero" / name
        folder.mkdir(parents=True)
        for slot, tensor in (("fp32", value), ("exp_avg", 0.1 * value), ("exp_avg_sq", value.square())):
            torch.save({"cat_dim": 0, "param": tensor.clone()}, folder / f"{slot}.pt")
        torch.save(20, folder / "step.pt")
    args = {  # what its save_ds_checkpoint writes
        "num_layers": 2, "hidden_size": hidden, "num_attention_heads": heads, "max_position_embeddings": 64,
        "make_vocab_size_divisible_by": 1, "padded_vocab_size": vocab, "tokenizer_type": "HFTokenizer",
        "model_parallel_size": 1,
    }  # fmt: skip
    states = {
        "module": None,
        "param_shapes": [OrderedDict((name, value.shape) for name, value in trained.items())],
        "global_steps": 20,
        "args": args,
    }
    torch.save(states, root / "mp_rank_00_model_states.pt")
    torch.save({"param_groups": [{"lr": 1e-3}]}, root / "zero" / "optimizer_state.pt")
    return weights


PARTS = ("weight", "bias")


def _neox(weights: dict[str, torch.Tensor], ids: torch.Tensor, heads: int) -> torch.Tensor:
    """Logits of GPT-NeoX's layers (parallel residual, no positions), plain or gated."""
    functional = torch.nn.functional
    x = functional.embedding(ids, weights["0.word_embeddings.weight"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.scale" in weights:
            return functional.rms_norm(x, x.shape[-1:], weights[f"{name}.scale"], 1e-8)
        return functional.layer_norm(x, x.shape[-1:], *(weights[f"{name}.{part}"] for part in PARTS))

    for number in (2, 3):
        a, b = (norm(x, f"{number}.{name}_layernorm") for name in ("input", "post_attention"))
        qkv = linear(a, f"{number}.attention.query_key_value")
        q, k, v = qkv.view(*ids.shape, heads, 3, -1).permute(3, 0, 2, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        inner = linear(b, f"{number}.mlp.linear1")
        if f"{number}.input_layernorm.scale" in weights:
            up, gate = inner.chunk(2, dim=-1)
            inner = functional.silu(gate) * up
        else:
            inner = functional.gelu(inner)
        x = x + linear(mixed, f"{number}.attention.dense") + linear(inner, f"{number}.mlp.linear2")
    return linear(norm(x, "5.norm"), "6.final_linear")


@pytest.mark.parametrize("gated", [False, True])
def test_pipeline_model(tmp_path: Path, gated: bool) -> None:
    """Recognized without options; the same logits, wide state and numbers; steps that are no tensors."""
    narrow = _pipeline(tmp_path / "step20_universal", gated=gated)
    target = widen(tmp_path / "step20_universal", tmp_path / "wide", {**JOINT, "vocab": 2})
    wide, fp32 = {}, {}
    for path in sorted(target.glob("layer_*")):
        number = int(path.name.split("_")[1].partition("-")[0])
        loaded = torch.load(path, weights_only=True)
        wide.update({f"{number}.{name}": value for name, value in loaded.items()})
    for folder in (target / "zero").iterdir():
        if folder.is_dir():
            fp32[folder.name] = torch.load(folder / "fp32.pt", weights_only=True)["param"]
            assert torch.load(folder / "step.pt", weights_only=True) == 20
            old = torch.load(tmp_path / "step20_universal" / "zero" / folder.name / "exp_avg.pt")["param"]
            new = torch.load(folder / "exp_avg.pt", weights_only=True)["param"]
            check_moments({"exp_avg": old}, {"exp_avg": new}, folder.name)
    assert all(torch.equal(wide[name], value) for name, value in fp32.items())
    ids = torch.arange(24).reshape(2, 12)
    exact = [{name: value.double() for name, value in one.items()} for one in (wide, narrow)]
    wider = _neox(exact[0], ids, 8)[..., :61]
    torch.testing.assert_close(wider, _neox(exact[1], ids, 4), rtol=1e-5, atol=1e-5)
    states = torch.load(target / "mp_rank_00_model_states.pt", weights_only=True)
    found = [states["args"][key] for key in ("hidden_size", "num_attention_heads", "padded_vocab_size")]
    assert found == [64, 8, 122]
    # the option of the wider run: NeoX takes 2/3 of it for both halves of a gated MLP
    assert states["args"]["intermediate_size"] == (1536 if gated else 1024)
    assert all(tuple(wide[name].shape) == tuple(shape) for name, shape in states["param_shapes"][0].items())


def test_pipeline_model_without_its_layers(tmp_path: Path) -> None:
    """The converter leaves the layers' files behind; the message says so."""
    _pipeline(tmp_path / "step20_universal")
    (tmp_path / "step20_universal" / "layer_03-model_00-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"none has '3\.") as refused:
        open_checkpoint(tmp_path / "step20_universal")
    assert "copy them" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("lost", "fault"),
    [
        ("mp_rank_00_model_states.pt", r"mp_rank_00_model_states\.pt is missing"),
        ("zero/2.mlp.linear1.weight", r"zero/2\.mlp\.linear1\.weight is missing"),
        ("zero/2.mlp.linear1.weight/fp32.pt", r"zero/2\.mlp\.linear1\.weight has no fp32\.pt"),
        ("zero", r"a pipeline model's layers, and no zero/"),
    ],
)
def test_almost_a_universal_checkpoint(tmp_path: Path, lost: str, fault: str) -> None:
    """What is missing is named; without the optimizer's options DeepSpeed would not load it."""
    root = tmp_path / "step20_universal"
    _pipeline(root)
    (root / "zero" / "optimizer_state.pt").unlink()
    assert any("optimizer_state.pt is missing" in note for note in open_checkpoint(root).notes)
    (shutil.rmtree if (root / lost).is_dir() else Path.unlink)(root / lost)
    with pytest.raises(CheckpointError, match=fault):
        open_checkpoint(root)


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq"])
def test_a_moment_of_one_parameter_is_missing(lost: str, tmp_path: Path) -> None:
    """Universal Checkpoints keep a file for every moment; one that is not there is named."""
    root = tmp_path / "step20_universal"
    _pipeline(root)
    (root / "zero" / "2.mlp.linear1.weight" / f"{lost}.pt").unlink()
    with pytest.raises(CheckpointError, match=rf"but no '{lost}', which \d+ other"):
        make_plan(root, axis="ffn", factor=2)


def test_steps_that_are_python_numbers_restart(tmp_path: Path) -> None:
    """A dropped optimizer's counters are zero in their own type."""
    _pipeline(tmp_path / "step20_universal")
    target = widen(
        tmp_path / "step20_universal", tmp_path / "wide", {"ffn": 2}, optimizer="drop", allow_locked=True
    )
    steps = {torch.load(path, weights_only=True) for path in (target / "zero").glob("*/step.pt")}
    assert steps == {0} and all(type(step) is int for step in steps)
