"""A model much larger than the budget is measured within it; peak resident memory of a process tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig

from sparkling_cli.models.skeleton import build_model

MIB = 1 << 20
LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 3,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "hidden_size": 768,
    "intermediate_size": 1536,
    "num_local_experts": 15,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}

#: Measures each checkpoint in a fork of its own, and prints by how much the fork's peak rose.
CHILD = """
import json, os, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
memory = int(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from diagnostics_support import opened
from sparkling_cli.diagnostics.activations import measure_change
from sparkling_cli.diagnostics.data import Tokens
ids = torch.arange(64).reshape(2, 32)
def run(name):
    return measure_change(opened(Path(name)), opened(Path(name)), Tokens(ids, ""), memory=memory)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for small, large in zip(sys.argv[3::2], sys.argv[4::2]):
    run(small)  # imports
    if os.fork() == 0:
        run(small)  # maps the libraries' pages, which a fork does anew
        before = peak()
        report, one, _ = run(large)
        facts = {"rise": peak() - before, "layers": len(one.layers), "loss": report.loss_after}
        print(json.dumps(facts), flush=True)
        os._exit(0)
    os.wait()
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


def test_peak_stays_in_the_budget(tmp_path: Path) -> None:
    """Two models of 3 times the budget and more, compared: peak memory rises by less than the budget."""
    budget = 128 * MIB
    folders = []
    for arch, sizes in (("llama", LLAMA), ("mixtral", MIXTRAL)):
        small = {**sizes, "num_hidden_layers": 1, "vocab_size": 100, "hidden_size": 64}
        for name, chosen in (("small", small), ("large", sizes)):
            folder = tmp_path / f"{arch}-{name}"
            folder.mkdir()
            written = sparse_checkpoint(folder, arch, chosen)
            folders.append(str(folder))
        assert written > 3 * budget
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(budget), str(Path(__file__).parent), *folders],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    facts = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert len(facts) == 2
    for fact in facts:
        assert fact["layers"] > 4
        assert fact["loss"] > 0
        assert 0 < fact["rise"] < budget
