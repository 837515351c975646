"""What is given as a checkpoint and is none is named for what it is, with what to do."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint


def refused(path: Path | str) -> str:
    """The whole message."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_files_for_inference_are_named(tmp_path: Path) -> None:
    """GGUF by its ending or its first bytes, alone or in a folder; ONNX, Keras, Flax."""
    (tmp_path / "llama.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "llama").write_bytes(b"GGUF\x03\x00\x00\x00")
    for path in (tmp_path / "llama.gguf", tmp_path / "llama", tmp_path):
        assert "is a GGUF file" in refused(path)
        assert "the checkpoint that it was converted from" in refused(path)
    for name, word in (("m.onnx", "ONNX"), ("tf_model.h5", "Keras"), ("flax_model.msgpack", "Flax")):
        (tmp_path / name).write_bytes(b"")
        assert word in refused(tmp_path / name)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    """A folder of PEFT: how to make a model of it."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "is an adapter" in refused(tmp_path)
    assert "merge_and_unload()" in refused(tmp_path)


@pytest.mark.parametrize(
    ("mark", "name", "way"),
    [
        ("checkpoint_metadata.json", "nanotron", "convert_nanotron_to_hf.py"),
        ("_CHECKPOINT_METADATA", "JAX", "export it to transformers"),
        ("manifest.ocdbt", "JAX", "export it to transformers"),
    ],
)
def test_a_trainer_whose_checkpoints_are_not_read(tmp_path: Path, mark: str, name: str, way: str) -> None:
    """One sentence, and the way out; also where a folder of safetensors or torch files lies in it."""
    (tmp_path / "model").mkdir()
    (tmp_path / mark).write_text("{}")
    (tmp_path / "config.yaml").write_text("{}")
    text = refused(tmp_path)
    assert f"is a checkpoint of {'a ' if name == 'JAX' else ''}{name}" in text
    assert way in text and "--init random-copy" in text


@dataclass
class ParamConfig:
    """What modded-nanogpt keeps of a parameter's options; its script is ``__main__``."""

    label: str


def test_state_by_addresses_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """modded-nanogpt's one file: the weights alone can be saved anew and are opened."""
    model = {"qk_bank": torch.ones(4, 2, 2)}
    monkeypatch.setattr(ParamConfig, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "ParamConfig", ParamConfig, raising=False)
    state = {140_000: {"momentum_buffer": torch.ones(4, 2, 2)}}
    optimizer = {"param_states": state, "param_cfgs": {140_000: ParamConfig("qk_bank")}}
    torch.save({"step": 1, "code": "", "model": model, "optimizer": optimizer}, tmp_path / "state.pt")
    assert "modded-nanogpt" in refused(tmp_path / "state.pt")
    torch.save({"model": model}, tmp_path / "weights.pt")
    assert list(open_checkpoint(tmp_path / "weights.pt").weights) == ["qk_bank"]


def test_a_name_on_the_hub_is_downloaded_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that downloads it; a URL likewise."""
    monkeypatch.chdir(tmp_path)
    assert "hf download meta-llama/Llama-3.2-1B --local-dir" in refused("meta-llama/Llama-3.2-1B")
    assert "download it" in refused("https://huggingface.co/gpt2")


def test_what_holds_nothing_known_is_not_guessed_at(tmp_path: Path) -> None:
    """Other files are listed as before."""
    (tmp_path / "notes.txt").write_text("x")
    assert "no known checkpoint format" in refused(tmp_path)
