"""Trainer, accelerate and plain model directories: opened, laid out unchanged, refused when contradictory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparkling_cli.errors import CheckpointError, SparklingError
from sparkling_cli.formats.detect import format_of, open_checkpoint
from sparkling_cli.formats.model import Checkpoint, Declared, OutputRequest
from tests.formats.filling import filled, read_stored, write_outputs

TinyCheckpoint = Callable[..., Path]


def request_for(checkpoint: Checkpoint, **changes: Any) -> OutputRequest:
    """All tensors as they are."""
    state_keys = [key for state in checkpoint.states for key in state.tensors.values()]
    names = {key: name for name, key in reversed(checkpoint.weights.items())}
    rows = [*names.items(), *((key, "") for key in state_keys)]
    declared = tuple(
        Declared(key, name, t.dtype, t.shape, t.extents[0].path)
        for key, name in rows
        for t in [checkpoint.tensors[key]]
    )
    return OutputRequest(declared, **changes)


def rewritten(checkpoint: Checkpoint, target: Path, **changes: Any) -> list[str]:
    """Write the checkpoint's own files with unchanged tensors; returns their names."""
    outputs = format_of(checkpoint.format).outputs(checkpoint, request_for(checkpoint, **changes))
    write_outputs(target, checkpoint.root, outputs, checkpoint.tensors)
    return [output.path for output in outputs]


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("qwen3_moe", {"shard_size": "20KB", "dtype": "bfloat16"}),
        ("gpt2", {"optimizer": "sgd", "shard_size": "30KB"}),
    ],
)
def test_unchanged_checkpoint_comes_out_byte_for_byte(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, arch: str, options: Mapping[str, Any]
) -> None:
    """Weights, shards, index, config and optimizer of a real checkpoint are laid out as they were written."""
    source = tiny_checkpoint(arch, **options)
    checkpoint = open_checkpoint(source)
    written = rewritten(checkpoint, tmp_path)
    for name in written:
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes(), name
    assert sorted([*written, *checkpoint.carried]) == sorted(p.name for p in source.iterdir())
    assert "optimizer.pt" in written and ("model.safetensors.index.json" in written) == (
        "shard_size" in options
    )


def test_what_is_known_of_a_run(tiny_checkpoint: TinyCheckpoint) -> None:
    """Steps, schedule and optimizer are those that the Trainer was given."""
    facts = open_checkpoint(tiny_checkpoint("llama")).facts
    assert (facts["global_step"], facts["max_steps"], facts["last_epoch"]) == (3, 6, 3)
    assert facts["schedule"] == {
        "type": "cosine", "peak": 2e-3, "minimum": 0.0, "warmup_steps": 1, "kwargs": {},
    }  # fmt: skip
    assert facts["optimizer_class"] == "AdamW"
    assert facts["training_args"]["adam_beta2"] == 0.95


def test_state_is_where_torch_finds_it(tiny_checkpoint: TinyCheckpoint) -> None:
    """Moments and counters are those that torch.load reads."""
    source = tiny_checkpoint("llama")
    checkpoint = open_checkpoint(source)
    truth = torch.load(source / "optimizer.pt", weights_only=True)
    assert [state.param for state in checkpoint.states] == [str(i) for i in truth["state"]]
    for state in checkpoint.states:
        expected = truth["state"][int(state.param)]
        assert state.scalars == {"step": float(expected["step"])}
        assert set(state.tensors) == {"exp_avg", "exp_avg_sq"}
        for slot, key in state.tensors.items():
            found = read_stored(source, checkpoint.tensors[key]).tobytes()
            assert found == expected[slot].numpy().tobytes()


def test_dropped_counters_and_new_sizes(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """A reset ``step`` and new config numbers are written; the rest of both files stays."""
    source = tiny_checkpoint("llama")
    checkpoint = open_checkpoint(source)
    states = tuple(replace(s, param=f"named.{s.param}") for s in checkpoint.states)
    checkpoint = replace(checkpoint, states=states)
    rewritten(checkpoint, tmp_path, config={"intermediate_size": 118}, scalars={"named.2.step": 0.0})
    steps = [float(s["step"]) for s in torch.load(tmp_path / "optimizer.pt")["state"].values()]
    assert steps == [0.0 if i == 2 else 3.0 for i in range(len(steps))]
    before = (source / "config.json").read_text()
    assert (tmp_path / "config.json").read_text() == before.replace(
        '"intermediate_size": 59', '"intermediate_size": 118'
    )


def test_widened_tensors_go_into_their_shards(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """The index of a widened model is the one that transformers writes, and it loads."""
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint("llama", shard_size="20KB")
    checkpoint = open_checkpoint(source)
    request = request_for(checkpoint, config={"intermediate_size": 118})
    wide = {59: 118}
    declared = tuple(d._replace(shape=tuple(wide.get(n, n) for n in d.shape)) for d in request.tensors)
    outputs = format_of("trainer").outputs(checkpoint, replace(request, tensors=declared))
    for output in outputs:
        shapes = {d.key: d for d in declared}
        values = {k: np.zeros(shapes[k].shape, "V4") for k, _ in output.tensors}
        (tmp_path / output.path).write_bytes(filled(output, values.__getitem__))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    assert model.model.layers[0].mlp.up_proj.weight.shape == (118, 48)
    before = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == before["weight_map"]


def test_renamed_weights(tmp_path: Path) -> None:
    """Weights under other names come out under these, fused ones in the shard of their first part."""
    root = model_directory(tmp_path / "source", shards=2)
    checkpoint = open_checkpoint(root)
    first = checkpoint.weight("a").extents[0].path
    declared = (
        Declared("fused", "fused", "float32", (2, 3, 4), first),
        Declared("c", "c", "float32", (3, 4), checkpoint.weight("c").extents[0].path),
    )
    outputs = format_of("trainer").outputs(checkpoint, OutputRequest(declared))
    index = json.loads(next(o for o in outputs if o.path.endswith(".json")).literals[0][1])
    assert index["weight_map"] == {"fused": first, "c": checkpoint.weight("c").extents[0].path}


def model_directory(root: Path, *, shards: int = 1, kind: str = "safetensors") -> Path:
    """A model directory with weights a, b, c and d of (3, 4) by hand."""
    root.mkdir(parents=True)
    torch.manual_seed(0)
    tensors = {name: torch.randn(3, 4) for name in "abcd"}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for number in range(shards):
        name = f"{stem}.{kind}" if shards == 1 else f"{stem}-{number + 1:05}-of-{shards:05}.{kind}"
        part = {k: t for i, (k, t) in enumerate(tensors.items()) if i * shards // 4 == number}
        weight_map.update(dict.fromkeys(part, name))
        if kind == "safetensors":
            save_file(part, root / name, metadata={"format": "pt"})
        else:
            torch.save(part, root / name)
    if shards > 1:
        index = {"metadata": {"total_size": 192}, "weight_map": weight_map}
        (root / f"{stem}.{kind}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (root / "config.json").write_text('{\n  "model_type": "x"\n}\n')
    return root


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_alone(tmp_path: Path, kind: str, shards: int) -> None:
    """Directories without optimizer, in either format, sharded or not, work and say what is missing."""
    root = model_directory(tmp_path / "source", shards=shards, kind=kind)
    checkpoint = open_checkpoint(root)
    assert list(checkpoint.weights) == list("abcd") and "weights only" in checkpoint.notes[0]
    written = rewritten(checkpoint, tmp_path / "target")
    for name in written:
        assert (tmp_path / "target" / name).read_bytes() == (root / name).read_bytes(), name


def test_torch_weights_under_new_names(tmp_path: Path) -> None:
    """A torch state dict with other names is written anew, and torch.load reads it."""
    root = model_directory(tmp_path / "source", kind="bin")
    checkpoint = open_checkpoint(root)
    declared = tuple(Declared(n, f"new.{n}", "float32", (3, 4), "pytorch_model.bin") for n in "abcd")
    outputs = format_of("trainer").outputs(checkpoint, OutputRequest(declared))
    write_outputs(tmp_path / "target", root, outputs, checkpoint.tensors)
    loaded = torch.load(tmp_path / "target" / "pytorch_model.bin", weights_only=True)
    before = torch.load(root / "pytorch_model.bin", weights_only=True)
    assert {f"new.{n}": t.tolist() for n, t in before.items()} == {n: t.tolist() for n, t in loaded.items()}


def test_tied_torch_weights_share_a_key(tmp_path: Path) -> None:
    """Names that share bytes in a torch file share a key, and still share bytes in the output."""
    root = model_directory(tmp_path / "source", kind="bin")
    table = torch.randn(5, 4)
    torch.save({"embed": table, "norm": torch.ones(4), "head": table}, root / "pytorch_model.bin")
    checkpoint = open_checkpoint(root)
    assert checkpoint.weights == {"embed": "embed", "norm": "norm", "head": "embed"}
    rewritten(checkpoint, tmp_path / "target")
    loaded = torch.load(tmp_path / "target" / "pytorch_model.bin", weights_only=True)
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr()
    assert torch.equal(loaded["head"], table)


def test_accelerate_state(tmp_path: Path) -> None:
    """A directory of accelerate's save_state is opened and comes out as it was."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    accelerator.save_state(str(tmp_path / "source"))
    checkpoint = open_checkpoint(tmp_path / "source")
    assert len(checkpoint.states) == 4 and checkpoint.config is None
    assert {"scheduler.bin", "random_states_0.pkl"} <= set(checkpoint.carried)
    assert checkpoint.facts["base_lrs"] == [1e-3]
    for name in rewritten(checkpoint, tmp_path / "target"):
        assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "source" / name).read_bytes(), name


def edit_index(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the parsed index of a sharded directory."""
    path = root / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def refused(root: Path) -> str:
    """The message with which a directory is refused."""
    with pytest.raises(SparklingError) as caught:
        open_checkpoint(root)
    return str(caught.value)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update(e=FIRST), "'e' is in model-00001"),
        (lambda i: i["weight_map"].pop("a"), "holds 'a', which"),
        (lambda i: i["weight_map"].update(a=SECOND), "'a'"),
        (lambda i: i["weight_map"].update(a="absent.safetensors"), "missing"),
        (lambda i: i["weight_map"].update(a="../source/" + FIRST), "no path inside"),
        (lambda i: i["weight_map"].update(a="/etc/passwd"), "no path inside"),
        (lambda i: i["weight_map"].update(a="..\\x"), "no path inside"),
        (lambda i: i["weight_map"].update(a=""), "no path inside"),
        (lambda i: i["weight_map"].update(a=5), "must map names to files"),
        (lambda i: i.pop("weight_map"), "must map names to files"),
        (lambda i: i.update(metadata=[]), "metadata must be an object"),
        (lambda i: [i["weight_map"].pop(n) for n in "ab"], "left over"),
    ],
)
def test_index_and_shards_that_disagree(tmp_path: Path, change: Any, message: str) -> None:
    """Whatever an index says that its shards do not is refused, and so are paths that lead out."""
    root = model_directory(tmp_path / "source", shards=2)
    edit_index(root, change)
    assert message in refused(root)


def test_missing_and_extra_and_double_shards(tmp_path: Path) -> None:
    """A shard that is gone, one too many, one name in two shards, weights beside an index."""
    root = model_directory(tmp_path / "a", shards=2)
    (root / SECOND).unlink()
    assert "missing" in refused(root)
    root = model_directory(tmp_path / "b", shards=2)
    save_file({"e": torch.zeros(1)}, root / "model-00003-of-00003.safetensors")
    assert "does not name it" in refused(root)
    root = model_directory(tmp_path / "c", shards=2)
    save_file({**load_file(root / FIRST), **load_file(root / SECOND)}, root / SECOND)
    assert "holds 'a'" in refused(root)
    root = model_directory(tmp_path / "d", shards=2)
    save_file({"e": torch.zeros(1)}, root / "model.safetensors")
    assert "left over" in refused(root)


def test_links(tmp_path: Path) -> None:
    """Links out of the directory are refused; the Hugging Face cache, which is made of links, is read."""
    root = model_directory(tmp_path / "a")
    (tmp_path / "outside.txt").write_text("secret")
    (root / "notes.txt").symlink_to(tmp_path / "outside.txt")
    assert "leads out of the checkpoint" in refused(root)
    root = model_directory(tmp_path / "b")
    shutil.move(root / "model.safetensors", tmp_path / "weights")
    (root / "model.safetensors").symlink_to(tmp_path / "weights")
    assert "leads out of the checkpoint" in refused(root)
    root = model_directory(tmp_path / "c")
    (root / "folder").symlink_to(tmp_path)
    assert "link to a folder" in refused(root)
    root = model_directory(tmp_path / "hub" / "snapshots" / "abc")
    (tmp_path / "hub" / "blobs").mkdir()
    shutil.move(root / "model.safetensors", tmp_path / "hub" / "blobs" / "123")
    (root / "model.safetensors").symlink_to("../../blobs/123")
    assert list(open_checkpoint(root).weights) == list("abcd")
    root = model_directory(tmp_path / "hub" / "snapshots" / "abc" / "last-checkpoint")
    shutil.move(root / "model.safetensors", tmp_path / "hub" / "blobs" / "456")
    (root / "model.safetensors").symlink_to("../../../blobs/456")
    assert list(open_checkpoint(root).weights) == list("abcd")
    (root / "notes.txt").symlink_to(tmp_path / "outside.txt")
    assert "leads out of the checkpoint" in refused(root)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    """A named pipe in the directory would block whoever copies it."""
    root = model_directory(tmp_path / "a")
    os.mkfifo(root / "pipe")
    assert "regular file" in refused(root)


def test_what_is_carried(tmp_path: Path) -> None:
    """All other files, in folders too, but not an earlier expansion's own, nor weights in other formats."""
    root = model_directory(tmp_path / "a")
    (root / "sparkling").mkdir()
    (root / "sparkling" / "manifest.json").write_text("{}")
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "er" / "file").write_text("x")
    (root / "tf_model.h5").write_text("x")
    torch.save({"a": torch.zeros(1)}, root / "pytorch_model.bin")
    checkpoint = open_checkpoint(root)
    assert checkpoint.carried == ("deep/er/file",)
    assert all(
        any(name in note for note in checkpoint.notes) for name in ("tf_model.h5", "pytorch_model.bin")
    )


def test_almost_checkpoints(tmp_path: Path) -> None:
    """Paths that are nothing, or nearly something, get an error that says what was looked for."""
    assert "nothing of that name" in refused(tmp_path / "absent")
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    assert "checkpoint-10" in refused(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refused(tmp_path / "empty")
    root = model_directory(tmp_path / "a")
    (root / "model.safetensors").unlink()
    assert "config.json, but none of model.safetensors" in refused(root)
    (tmp_path / "text.txt").write_text("hello")
    assert "no known checkpoint format" in refused(tmp_path / "text.txt")


def test_paths_that_lead_nowhere_get_a_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo, an address, a name on the hub, one file of a checkpoint, a folder that is not there."""

    def hint(path: Path | str) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        return caught.value.hint or ""

    root = model_directory(tmp_path / "checkpoint-500")
    assert hint(tmp_path / "checkpont-500") == f"did you mean {root}?"
    assert hint(tmp_path / "none" / "of" / "these") == f"{tmp_path} is there, and holds no 'none'"
    assert "download it" in hint("https://example.org/model")
    assert "download it" in hint(Path("s3://bucket/model"))
    monkeypatch.chdir(tmp_path)
    assert hint("Qwen/Qwen3-0.6B").endswith("hf download Qwen/Qwen3-0.6B --local-dir DIR")
    assert hint("checkpoint-500/600000") == f"{root} is there, and holds no '600000'"
    assert hint(root / "model.safetensors") == f"it is one file of a checkpoint: give its folder, {root}"
    assert hint(root / "model.safetensors" / "x") == f"{root / 'model.safetensors'} is a file"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "cannot be read as JSON"),
        ("config.json", b"[1]", "expected a JSON object"),
        ("config.json", b'{"a": 1, "a": 2}', "same key twice"),
        ("config.json", b"\xff", "cannot be read as JSON"),
        ("trainer_state.json", b"nope", "cannot be read as JSON"),
        ("optimizer.pt", b"nope", "not a torch file"),
        ("scheduler.pt", b"nope", "not a torch file"),
        ("model.safetensors.index.json", b"{}", "left over"),
    ],
)
def test_damaged_small_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Each small file that is read is checked, and named when it is wrong."""
    root = model_directory(tmp_path / "a")
    (root / name).write_bytes(content)
    assert message in refused(root)


def test_damaged_arguments_are_only_noted(tmp_path: Path) -> None:
    """Nothing but the schedule depends on training_args.bin, so that it says what it cannot tell."""
    root = model_directory(tmp_path / "a")
    (root / "training_args.bin").write_bytes(b"nope")
    assert any("training_args.bin" in note for note in open_checkpoint(root).notes)


def test_several_optimizers_and_foreign_training_state(tmp_path: Path) -> None:
    """Two optimizers, something else in the optimizer's place, and DeepSpeed's folders are refused."""
    root = model_directory(tmp_path / "a")
    for name in ("optimizer.bin", "optimizer_1.bin"):
        torch.save({"state": {}, "param_groups": []}, root / name)
    assert "several optimizers" in refused(root)
    root = model_directory(tmp_path / "b")
    torch.save([1], root / "optimizer.pt")
    assert "expected an optimizer's state dict" in refused(root)
    root = model_directory(tmp_path / "c")
    (root / "zero_to_fp32.py").write_text("")
    assert "ds_to_universal" in refused(root)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("shards", [1, 2])
def test_wrapped_names_stay_as_they_are_in_the_files(tmp_path: Path, kind: str, shards: int) -> None:
    """Weights of a compiled model have the module's names; what is written has the wrapper's again."""
    root = model_directory(tmp_path / "source", shards=shards, kind=kind)
    for path in (p for p in root.iterdir() if p.suffix in (".bin", ".safetensors")):
        tensors = load_file(path) if kind == "safetensors" else torch.load(path, weights_only=True)
        wrapped = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
        if kind == "safetensors":
            save_file(wrapped, path, metadata={"format": "pt"})
        else:
            torch.save(wrapped, path)
    for path in root.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = {f"_orig_mod.{n}": file for n, file in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    checkpoint = open_checkpoint(root)
    assert list(checkpoint.weights) == list("abcd")
    for name in rewritten(checkpoint, tmp_path / "target"):
        assert (tmp_path / "target" / name).read_bytes() == (root / name).read_bytes(), name


@pytest.mark.parametrize("warmup", [0, 0.0, 0.03, 0.999, 1, 1.0, 7])
def test_warmup_is_counted_as_the_trainer_counts_it(tmp_path: Path, warmup: float) -> None:
    """Below one it is a share of the run, rounded up; older arguments have the share under another name."""
    from transformers import TrainingArguments

    from sparkling_cli.formats.trainer_facts import warmup_steps

    args = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup, report_to=[])
    expected = args.get_warmup_steps(1001)
    assert warmup_steps({"warmup_steps": warmup}, 1001) == expected
    if warmup < 1:
        assert warmup_steps({"warmup_steps": 0, "warmup_ratio": warmup}, 1001) == expected
        assert warmup_steps({"warmup_steps": warmup}, None) == (0 if warmup == 0 else None)
