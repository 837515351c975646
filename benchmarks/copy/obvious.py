"""What one writes by hand: load everything, ``torch.cat``, save. Doubles ffn (``python -m ... SRC DST``)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def widened(name: str, tensor: torch.Tensor, *, moment: bool) -> torch.Tensor:
    """Rows of up and gate, columns of down; moments get zeros."""
    if "gate_proj" not in name and "up_proj" not in name and "down_proj" not in name:
        return tensor
    more = torch.zeros_like(tensor) if moment else tensor
    if "down_proj" in name:
        return torch.cat([tensor, more], dim=1) * (1.0 if moment else 0.5)
    return torch.cat([tensor, more], dim=0)


def main(source: Path, target: Path) -> None:
    """Widen a checkpoint in memory."""
    target.mkdir()
    weights = load_file(source / "model.safetensors")
    names = list(weights)
    wide = {name: widened(name, tensor, moment=False) for name, tensor in weights.items()}
    save_file(wide, target / "model.safetensors", metadata={"format": "pt"})
    del wide
    if (source / "optimizer.pt").exists():
        saved = torch.load(source / "optimizer.pt", weights_only=True)
        # the Trainer numbers decayed parameters first, in the module's order; found by shape here
        shapes = {name: tuple(weights[name].shape) for name in names}
        del weights
        layered = [n for n in shapes if "norm" not in n]
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name in layered + [n for n in shapes if "norm" in n]:
            by_shape.setdefault(shapes[name], []).append(name)
        for state in saved["state"].values():
            name = by_shape[tuple(state["exp_avg"].shape)][0]
            for slot in ("exp_avg", "exp_avg_sq"):
                state[slot] = widened(name, state[slot], moment=True)
        torch.save(saved, target / "optimizer.pt")
    config = json.loads((source / "config.json").read_bytes())
    key = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    config[key] *= 2
    (target / "config.json").write_text(json.dumps(config))
    for path in source.iterdir():
        if not (target / path.name).exists():
            shutil.copy(path, target / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
