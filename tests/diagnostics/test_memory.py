"""A model much larger than the budget is measured within it; peak resident memory of a process tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from sparkling_cli.inference.skeleton import build_model

MIB = 1 << 20
LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 3,
    "vocab_size": 20_000,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "hidden_size": 768,
    "intermediate_size": 1536,
    "num_local_experts": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}

#: Runs the measurement in a process of its own and prints by how much its peak rose.
CHILD = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[4])
from diagnostics_support import opened
from sparkling_cli.diagnostics.activations import measure_change
from sparkling_cli.diagnostics.data import Tokens
large, small, memory = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
ids = torch.arange(64).reshape(2, 32)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
measure_change(opened(small), opened(small), Tokens(ids, ""), memory=memory)  # imports, thread pools
before = peak()
report, one, _ = measure_change(opened(large), opened(large), Tokens(ids, ""), memory=memory)
print(json.dumps({"rise": peak() - before, "layers": len(one.layers), "loss": report.loss_after}))
"""


def sparse_checkpoint(directory: Path, arch: str, sizes: dict[str, int]) -> int:
    """A model directory whose float32 weights are all zero and take no space; returns their bytes."""
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.for_model(arch, **sizes)
    config.architectures = [{"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}[arch]]
    config.save_pretrained(directory)
    model = build_model(json.loads((directory / "config.json").read_text()))
    on_disk = revert_weight_conversion(model, model.state_dict())
    header, offset = {}, 0
    for name, tensor in on_disk.items():
        end = offset + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


@pytest.mark.parametrize(("arch", "sizes"), [("llama", LLAMA), ("mixtral", MIXTRAL)])
def test_peak_stays_in_the_budget(tmp_path: Path, arch: str, sizes: dict[str, int]) -> None:
    """Two models of 5 times the budget and more, compared: peak memory rises by less than the budget."""
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    budget = 64 * MIB
    assert sparse_checkpoint(tmp_path / "large", arch, sizes) > 4 * budget
    small = {**sizes, "num_hidden_layers": 1, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64}
    sparse_checkpoint(tmp_path / "small", arch, small)
    found = subprocess.run(
        [
            sys.executable, "-c", CHILD, str(tmp_path / "large"), str(tmp_path / "small"), str(budget),
            str(Path(__file__).parent),
        ],
        capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    facts = json.loads(found.stdout.splitlines()[-1])
    assert facts["layers"] > 4
    assert facts["loss"] > 0
    assert facts["rise"] < budget
