"""How many tokens keep their experts when a mixture grows by half, and whether it matters what is copied.

``python -m benchmarks.routing``: a table in Markdown, measured on the bundled mixture, on the second half of
the bundled held-out text: the share of tokens that a router sends to the experts that it sent them to before,
over all routers, and the loss. At 1.5x half of the sources are copied. *In order* are the first ones, as
``expand`` takes them. *Chosen* are those that change least on the first half of the text: of the residual
stream the channels whose share of every token's mean square is nearest to a half, of attention the heads of
every group whose sum is nearest to half of all. They are put first in a copy of the checkpoint, which has the
same function.
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.calibrated import ROOT, Texts, tokens
from sparkling_cli import expand
from sparkling_cli.diagnostics.activations import measure_change
from sparkling_cli.diagnostics.data import Tokens
from sparkling_cli.formats.detect import open_checkpoint

CHECKPOINT = ROOT / "fixtures" / "moe-qwen3" / "checkpoint-600"
WEIGHTS = "model.safetensors"
FACTOR = 1.5
SCALINGS = ("rms", "function", "calibrated")
#: weights with the residual stream on their last dim; of those that add to it, it is the first
READS = ("embed_tokens", "norm.weight", "layernorm", "q_proj", "k_proj", "v_proj", "gate", "up_proj")
ADDS = ("o_proj", "down_proj")


def routed(checkpoint: Path, axis: str, scaling: str, texts: Texts) -> tuple[float, float]:
    """Share of tokens that keep their experts on held-out text, and the loss there."""
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "wide"
        expand(
            checkpoint,
            wide,
            axes=[{"axis": axis, "factor": FACTOR}],
            scaling=scaling,
            data=texts.fitted if scaling == "calibrated" else None,
            allow_locked=True,
            report="none",
        )
        pair = open_checkpoint(checkpoint), open_checkpoint(wide)
        change, _, after = measure_change(*pair, tokens(texts.heldout))
    if change.routed_as_before is None or after.loss is None:
        raise ValueError(f"{checkpoint} has no routers")
    return change.routed_as_before, after.loss


def channels(shares: torch.Tensor) -> list[int]:
    """Half of the channels, whose shares sum up to what is nearest to a half: by swaps, until none helps.

    Args:
        shares: of every token's mean square, [tokens, channels].
    """
    off = shares.double() - shares.double().sum(1, keepdim=True) / shares.shape[1]
    gram = off.T @ off
    side = torch.ones(len(gram), dtype=torch.double)
    side[len(gram) // 2 :] = -1
    while True:  # sum of squares of off @ side; what swapping i and j adds to it
        pull = gram @ side
        gain = 4 * (gram.diag()[:, None] + gram.diag() - 2 * gram) - 4 * (pull[:, None] - pull)
        gain[(side[:, None] < 0) | (side > 0)] = 0
        best = int(gain.argmin())
        if gain.reshape(-1)[best] >= -1e-9:
            return [i for i in range(len(gram)) if side[i] > 0]
        i, j = divmod(best, len(gram))
        side[i], side[j] = -1, 1


def heads(added: torch.Tensor) -> list[list[int]]:
    """Of every group half of the heads, such that the sum of what they add is nearest to half of all.

    Args:
        added: to the stream, [groups, heads of a group, tokens, channels].
    """
    half = added.shape[1] // 2
    of_group = list(combinations(range(added.shape[1]), half))
    whole = added.sum((0, 1)) / 2

    def off(chosen: tuple[tuple[int, ...], ...]) -> float:
        found = sum(added[group][list(these)].sum(0) for group, these in enumerate(chosen))
        return float((found - whole).norm())

    return [list(these) for these in min(product(of_group, repeat=len(added)), key=off)]


def observed(checkpoint: Path, text: Tokens) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of the source: shares of channels before every norm of a block, and by layer what every head adds."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    config = model.config
    shares: list[torch.Tensor] = []
    added: list[torch.Tensor] = []

    def norm(_: Any, given: tuple[torch.Tensor]) -> None:
        squares = given[0].flatten(0, 1).square()
        shares.append(squares / squares.sum(1, keepdim=True))

    def attention(module: Any, given: tuple[torch.Tensor]) -> None:
        x = given[0].flatten(0, 1)
        groups, size = config.num_key_value_heads, config.head_dim
        parts = x.view(len(x), groups, -1, size), module.weight.view(len(module.weight), groups, -1, size)
        added.append(torch.einsum("tghs,cghs->ghtc", *parts))

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(norm)
        layer.post_attention_layernorm.register_forward_pre_hook(norm)
        layer.self_attn.o_proj.register_forward_pre_hook(attention)
    with torch.no_grad():
        model(text.ids[:16])
    return torch.cat(shares), added


def reordered(axis: str, texts: Texts, folder: Path) -> Path:
    """The checkpoint with the chosen sources of an axis in front."""
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.pt", "*.pth", "*.bin"))
    weights = load_file(folder / WEIGHTS)
    shares, added = observed(CHECKPOINT, tokens(texts.fitted))
    if axis == "hidden":
        first = channels(shares)
        order = [*first, *(i for i in range(shares.shape[1]) if i not in first)]
        for name, value in weights.items():
            if any(part in name for part in ADDS):
                weights[name] = value[order].contiguous()
            elif any(part in name for part in READS) and "self_attn.q_norm" not in name:
                weights[name] = value if "k_norm" in name else value[..., order].contiguous()
    else:
        for layer, found in enumerate(added):
            groups, count = found.shape[:2]
            chosen = heads(found)
            order = [
                group * count + head
                for group, these in enumerate(chosen)
                for head in [*these, *(h for h in range(count) if h not in these)]
            ]
            for part, dim in (("q_proj", 0), ("o_proj", 1)):
                name = f"model.layers.{layer}.self_attn.{part}.weight"
                apart = weights[name].unflatten(dim, (groups * count, -1))
                picked = apart.index_select(dim, torch.tensor(order))
                weights[name] = picked.flatten(dim, dim + 1).contiguous()
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return folder


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = Texts.of(CHECKPOINT, folder, halves=True)
        print("| axis, copies | " + " | ".join(f"`{s}`: experts kept | loss" for s in SCALINGS) + " |")
        print("|---" * (2 * len(SCALINGS) + 1) + "|")
        for axis in ("ffn", "heads", "hidden"):
            cases = [(f"{axis}, in order", CHECKPOINT)]
            if axis != "ffn":
                cases.append((f"{axis}, chosen", reordered(axis, texts, folder / axis)))
            for title, checkpoint in cases:
                found = [routed(checkpoint, axis, scaling, texts) for scaling in SCALINGS]
                cells = (f"{kept:.1%} | {loss:.3f}" for kept, loss in found)
                print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
