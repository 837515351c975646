"""What ``--scaling calibrated`` keeps, on the text that it was fitted on and on another one.

``python -m benchmarks.calibrated``: one line per bundled checkpoint, axis, factor and initialization pair.
For the paper's factors (``rms``) and the fitted ones: the farthest that a ratio r = RMS(f(Norm h)) / RMS(h)
moved (Sec. 3.1, App. B of arXiv 2602.02472), as ``max |r'/r - 1|``, and the loss on held-out text. The models
saw neither text in training; every other sequence of it is *fitted* on, the others are *held-out*.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import torch

from sparkling_cli import expand
from sparkling_cli.diagnostics.activations import measure
from sparkling_cli.diagnostics.data import Tokens
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.results.measured import Measurement

ROOT = Path(__file__).resolve().parents[1]
#: tokens per sequence
LENGTH = 256
COPIES = "copy-copy"
#: checkpoint -> axis -> factors under copies, and under every other pair
AXES: dict[str, dict[str, tuple[float, ...]]] = {
    "dense-llama": {"ffn": (1.25, 1.5, 2.5), "heads": (4 / 3, 8 / 3), "hidden": (1.25, 1.5, 2.5)},
    "moe-qwen3": {"ffn": (1.25, 1.5, 2.5), "heads": (1.25, 1.5, 2.5), "hidden": (1.25, 1.5, 2.5)},
}
RANDOM = ("random-copy", "random-zero", "random-random", "zero-copy")


@dataclass(frozen=True)
class Case:
    """An expansion of a bundled checkpoint along one axis."""

    checkpoint: str
    axis: str
    factor: float
    init: str

    @property
    def title(self) -> str:
        """In the table."""
        return f"{self.checkpoint} {self.axis} {self.factor:.3g}x {self.init}"

    @property
    def source(self) -> Path:
        """The checkpoint's folder."""
        return next((ROOT / "fixtures" / self.checkpoint).glob("checkpoint-*"))


def cases() -> Iterator[Case]:
    """Every case that the checkpoints can have."""
    for checkpoint, axes in AXES.items():
        for axis, factors in axes.items():
            yield from (Case(checkpoint, axis, factor, COPIES) for factor in factors)
            for init in RANDOM:
                if (axis, init) != ("heads", "zero-copy"):  # more query heads per group: q is never zeroed
                    yield Case(checkpoint, axis, 2, init)


@dataclass(frozen=True)
class Texts:
    """Token files: what is fitted on, and what is not."""

    fitted: Path
    heldout: Path

    @staticmethod
    def of(checkpoint: Path, folder: Path, *, halves: bool = False) -> Texts:
        """The bundled held-out text as tokens: every other sequence is fitted on, or the first half."""
        import numpy as np
        from transformers import AutoTokenizer

        text = (ROOT / "fixtures" / "text" / "heldout.txt").read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(checkpoint)(text, verbose=False)["input_ids"]
        rows = np.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
        parts = Texts(*(folder / f"{checkpoint.parent.name}-{part}.npy" for part in ("fitted", "heldout")))
        cut = len(rows) // 2
        np.save(parts.fitted, rows[:cut] if halves else rows[::2])
        np.save(parts.heldout, rows[cut:] if halves else rows[1::2])
        return parts


def tokens(path: Path) -> Tokens:
    """All whole sequences of a token file."""
    import numpy as np

    ids = np.load(path)
    return Tokens(torch.from_numpy(ids), path.stem)


def moved(before: Measurement, after: Measurement) -> float:
    """The value of ``max |r'/r - 1|`` over the functions of all blocks."""
    found = {stat.name: stat.r for stat in after.functions}
    return max(abs((found[stat.name] or 0) / stat.r - 1) for stat in before.functions if stat.r)


@cache
def unwidened(source: Path, text: Path) -> Measurement:
    """The source on a text."""
    return measure(open_checkpoint(source), tokens(text))[0]


def measured(case: Case, scaling: str, texts: Texts, on: Sequence[str]) -> list[Measurement]:
    """An expansion, measured on texts."""
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "wide"
        expand(
            case.source,
            wide,
            axes=[{"axis": case.axis, "factor": case.factor}],
            init=case.init,
            scaling=scaling,
            data=texts.fitted if scaling == "calibrated" else None,
            report="none",
        )
        found = open_checkpoint(wide)
        return [measure(found, tokens(getattr(texts, text)))[0] for text in on]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--halves", action="store_true", help="fit on the first half of the text")
    asked = parser.parse_args()
    titles = ("r: rms", "r: fitted", "r: held-out", "loss: source", "loss: rms", "loss: calibrated")
    print("| case | " + " | ".join(titles) + " |", flush=True)
    print("|---" * (len(titles) + 1) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint, group in groupby(cases(), key=lambda case: case.source):
            texts = Texts.of(checkpoint, Path(folder), halves=asked.halves)
            for case in group:
                if asked.only in case.title:
                    print(f"| {case.title} | {' | '.join(cells(case, texts))} |", flush=True)


def cells(case: Case, texts: Texts) -> list[str]:
    """One line of the table."""
    (rms,) = measured(case, "rms", texts, ["heldout"])
    fitted, heldout = measured(case, "calibrated", texts, ["fitted", "heldout"])
    before, same = (unwidened(case.source, text) for text in (texts.heldout, texts.fitted))
    shares = (moved(before, rms), moved(same, fitted), moved(before, heldout))
    return [f"{share:.1%}" for share in shares] + [f"{m.loss:.4f}" for m in (before, rms, heldout)]


if __name__ == "__main__":
    main()
