"""What a copy-copy expansion by two changes in the training that follows it, beside what it is meant to.

``python -m benchmarks.boundary``: tables in Markdown. The first is measured on the bundled checkpoints:
gradients of the same batch before and after. The second is Adam's arithmetic at a steady gradient, of old
fan-out entries, whose gradient is halved, and of new entries, whose moments start at zero while the step
counter goes on. A last line gives the ratio of new to old learning rates over the paper's run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sparkling_cli import expand
from sparkling_cli.schedule.curves import Curve
from sparkling_cli.schedule.rewarmup import add_stage

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ("dense-llama", "moe-qwen3")
BETA1 = 0.9
#: a step this much of the usual one counts as a whole one again
WHOLE = 0.9

Gradients = Mapping[str, torch.Tensor]


def gradients(checkpoint: Path) -> Gradients:
    """Of the mean loss of 64 sequences of 64 tokens of the bundled held-out text, by parameter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = (ROOT / "fixtures" / "text" / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][: 64 * 64].view(64, 64)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def norm(of: Gradients) -> float:
    """The norm that gradient clipping looks at."""
    return float(torch.stack([gradient.norm() for gradient in of.values()]).norm())


@dataclass(frozen=True)
class Boundary:
    """One checkpoint, one axis.

    Attributes:
        fan_out: gradient of old fan-out entries, as a share of before; smallest and largest over matrices.
        fan_in: of old fan-in entries.
        norm: norm of the whole gradient, as a share of before.
    """

    fan_out: tuple[float, float]
    fan_in: tuple[float, float]
    norm: float


def boundary(name: str, axis: str) -> Boundary:
    """Measured on a bundled checkpoint that is widened by two."""
    (source,) = (ROOT / "fixtures" / name).glob("checkpoint-*")
    before = gradients(source)
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "wide"
        expand(source, wide, axes=[{"axis": axis, "factor": 2}], report="none")
        after = gradients(wide)
    shares: dict[int, list[float]] = {-2: [], -1: []}
    for parameter, old in before.items():
        new = after[parameter]
        if old.dim() == 3 and "gate_up" in parameter:  # experts x (gate, up) x hidden
            old, new = (g.unflatten(1, (2, -1)) for g in (old, new))
        grown = [dim for dim in (-2, -1) if old.dim() > 1 and new.shape[dim] > old.shape[dim]]
        if len(grown) != 1 or parameter.startswith(("model.embed", "lm_head")):
            continue
        kept = new[tuple(slice(0, size) for size in old.shape)]
        shares[grown[0]].append(float((kept * old).sum() / old.square().sum()))
    out, into = ((min(found), max(found)) for found in (shares[-2], shares[-1]))
    return Boundary(out, into, norm(after) / norm(before))


def old_fan_out_step(beta2: float, t: int) -> float:
    """Length of an old fan-out entry's step ``t`` after the expansion, as a share of the usual one.

    The gradient was steady and is half of it from the expansion on; both moments follow at their own speed.
    """
    moment = 0.5 + 0.5 * BETA1**t
    square = 0.25 + 0.75 * beta2**t
    return float(moment / square**0.5)


def new_step(beta2: float, t: int) -> float:
    """Length of a new entry's step ``t`` after the expansion, as a share of the usual one."""
    return float((1 - BETA1**t) / (1 - beta2**t) ** 0.5)


def adam_rows() -> list[str]:
    """One row per beta2."""
    rows = []
    for beta2 in (0.95, 0.999):
        steps = range(1, 20_000)
        old = [old_fan_out_step(beta2, t) for t in steps]
        new = [new_step(beta2, t) for t in steps]
        below = sum(step < WHOLE for step in old)
        shortest, longest = old.index(min(old)) + 1, new.index(max(new)) + 1
        rows.append(
            f"| {beta2} | {min(old):.2f} (step {shortest}) | {below:,} steps "
            f"| {new[0]:.2f} | {max(new):.2f} (step {longest}) |"
        )
    return rows


def paper_ratios() -> tuple[float, float, float]:
    """Ratio eta_new / eta_old in the paper's run, after the expansion (Eq. 25-28).

    Its largest value, its mean, and the ratio of the means of both rates.

    200B tokens in batches of 768 x 4096, warmup over 3 %, cosine to a hundredth, expansion at the half.
    """
    total = round(200e9 / (768 * 4096))
    baseline = Curve("cosine", 1.9556e-3, 1.9556e-5, 0.0, round(0.03 * total), total)
    rewarmup = add_stage(None, baseline, total // 2, rho=1.3, steps=250)
    (curve,) = rewarmup.curves
    found = [curve.ratio(step) for step in range(total // 2, total + 1)]
    old = [baseline(step) for step in range(total // 2, total + 1)]
    summed = sum(ratio * rate for ratio, rate in zip(found, old, strict=True))
    return max(found), sum(found) / len(found), summed / sum(old)


def _share(found: tuple[float, float]) -> str:
    low, high = (f"{value:.3f}" for value in found)
    return low if low == high else f"{low} to {high}"


def main() -> None:
    """Everything, as Markdown."""
    torch.set_num_threads(1)
    print("| checkpoint | axis | gradient of old fan-out entries | of old fan-in entries | whole norm |")
    print("|---|---|---|---|---|")
    for name in CHECKPOINTS:
        for axis in ("ffn", "hidden"):
            found = boundary(name, axis)
            out, into = _share(found.fan_out), _share(found.fan_in)
            print(f"| {name} | {axis} | {out} | {into} | {found.norm - 1:+.0%} |")
    print()
    print(
        "| beta2 | old fan-out entries: shortest step | below 0.9 for | new entries: first step | longest |"
    )
    print("|---|---|---|---|---|")
    print("\n".join(adam_rows()))
    largest, mean, summed = paper_ratios()
    print(
        f"\nThe paper's run: eta_new / eta_old at most {largest:.2f}, {mean:.2f} on average; "
        f"sum of eta_new / sum of eta_old: {summed:.2f}."
    )


if __name__ == "__main__":
    main()
