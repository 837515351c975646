"""Which pair, at which horizon: ``python -m benchmarks.train.horizon`` makes its tables and its figure.

It reads every file of results in ``--results``, whatever has finished, and trains nothing. Losses are
compared with those of copy-copy (the default) in the same seed, on the same text; below zero is better.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from benchmarks.train.loop import Run
from benchmarks.train.table import Results, closed, load, mean_error, table

COPY_COPY = "sparkling"
#: what is compared with copy-copy, and its colour
OTHERS: Mapping[str, str] = {
    "random-copy": "tab:blue",
    "random-zero": "tab:green",
    "zero-copy": "tab:olive",
    "naive": "tab:red",
    "small": "tab:gray",
    "wide": "black",
    "wide-compute": "tab:purple",
}
#: steps after the expansion in the table of the curve
MARKS = (50, 250, 500, 1000, 2000, 3000, 4000, 6000, 8000, 10_000, 12_000)


@dataclass(frozen=True)
class Setting:
    """One setting's results and its constants."""

    run: Run
    results: Results

    @property
    def expansion(self) -> int:
        """Step of the expansion."""
        return self.run.at(self.results.widening.share)

    @property
    def left(self) -> int:
        """Steps after the expansion."""
        return self.run.steps - self.expansion

    @property
    def says(self) -> str:
        """The setting in words."""
        widening = self.results.widening
        parts = [
            f"{self.left:,} steps left",
            f"b2 {self.run.beta2:g}",
            f"{'+'.join(widening.axes)} {widening.factor:g}x",
            f"at {widening.share:.0%}",
        ]
        return ", ".join(parts + ([] if self.run.schedule == "cosine" else [self.run.schedule.upper()]))

    @property
    def rank(self) -> tuple[object, ...]:
        """Place in tables: the main setting first, then by what differs from it."""
        w, run = self.results.widening, self.run
        return (run.schedule, run.beta2, abs(w.share - 0.5), w.share, abs(w.factor - 2), w.factor, -self.left)


def settings(folder: Path) -> list[Setting]:
    """Everything that has copy-copy to compare with, in the order of tables."""
    found = [
        Setting(Run.of_label(path.stem), results)
        for path in sorted(folder.glob("*.jsonl"))
        for results in load(path)
        if COPY_COPY in results.runs
    ]
    return sorted(found, key=lambda setting: setting.rank)


def above(setting: Setting, name: str) -> dict[int, list[float]]:
    """Steps after the expansion -> differences from copy-copy, one for each seed that both have."""
    ours, others = setting.results.runs[COPY_COPY], setting.results.runs.get(name, {})
    pairs = [
        (others[seed]["heldout"], log["heldout"]) for seed, log in sorted(ours.items()) if seed in others
    ]
    if not pairs:
        return {}
    steps = set.intersection(*({int(s) for s in curve} for pair in pairs for curve in pair))
    return {
        step - setting.expansion: [theirs[str(step)] - our[str(step)] for theirs, our in pairs]
        for step in sorted(steps)
        if step >= setting.expansion
    }


def crossing(curve: Mapping[int, Sequence[float]]) -> int | None:
    """The first measured step from which copy-copy is better up to the end, in the mean over seeds.

    None: it is not better at the end.
    """
    found = None
    for step in sorted(curve, reverse=True):
        if statistics.fmean(curve[step]) <= 0:
            break
        found = step
    return found


def curve_table(setting: Setting) -> str:
    """How far every run lies above copy-copy along the horizon, and copy-copy's cosine."""
    curves = {name: above(setting, name) for name in OTHERS}
    curves = {name: curve for name, curve in curves.items() if curve}
    marks = [m for m in MARKS if all(m in curve for curve in curves.values())]
    head = ["steps after the expansion", *curves, "cosine of copy-copy's copies"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    cosines = [log["cosine"] for log in setting.results.runs[COPY_COPY].values()]
    for mark in marks:
        cosine = statistics.fmean(curve[str(mark + setting.expansion)] for curve in cosines)
        cells = [mean_error(curve[mark]) for curve in curves.values()]
        lines.append(f"| {mark:,} | {' | '.join(cells)} | {cosine:.2f} |")
    crossings = {
        name: crossing(curve) for name, curve in curves.items() if "-" in name and name[:4] != "wide"
    }
    stated = [
        f"{name}: copy-copy is better from step {step:,} on" if step is not None else f"{name}: none"
        for name, step in crossings.items()
    ]
    lines += ["", f"Crossings up to {setting.left:,} steps: {'; '.join(stated)}."]
    return "\n".join(lines)


def overview(found: Sequence[Setting]) -> str:
    """The end of every setting, on all of the held-out text: one row each."""
    names = [name for name in OTHERS if any(name in s.results.runs for s in found)]
    head = ["setting", "seeds", *names, "gap closed by copy-copy", "by random-copy", "cosine at the end"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for setting in found:
        results = setting.results
        ours = results.runs[COPY_COPY]
        cosine = statistics.fmean(log["cosine"][str(setting.run.steps)] for log in ours.values())
        cells = [mean_error(results.paired(name, COPY_COPY)) for name in names]
        gaps = [closed(results, COPY_COPY), closed(results, "random-copy")]
        lines.append(
            f"| {setting.says} | {len(ours)} | {' | '.join(cells)} | {' | '.join(gaps)} | {cosine:.2f} |"
        )
    return "\n".join(lines)


def figure(found: Sequence[Setting], path: Path) -> None:
    """Left the curve of the first setting, right the ends of all."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sparkling"
    from matplotlib import pyplot

    height = max(4.6, 1.6 + 0.42 * len(found))
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(12, height), layout="constrained")
    _curves(left, found[0])
    _ends(right, found)
    handles = {h.get_label(): h for panel in (left, right) for h in panel.get_legend_handles_labels()[0]}
    drawing.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(drawing)


def _curves(panel: Any, setting: Setting) -> None:
    low = high = 0.0
    for name, colour in OTHERS.items():
        curve = {step: values for step, values in above(setting, name).items() if step > 0}
        if not curve:
            continue
        steps = list(curve)
        means = [statistics.fmean(values) for values in curve.values()]
        errors = [_error(values) for values in curve.values()]
        panel.plot(steps, means, color=colour, marker=".", label=name)
        lower, upper = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        panel.fill_between(steps, lower, upper, color=colour, alpha=0.2, linewidth=0)
        late = [m for s, m in zip(steps, means, strict=True) if s >= 500]
        low, high = min([low, *late]), max([high, *late])
    if high > low:  # the jump of the first steps may leave the panel
        room = 0.1 * (high - low)
        panel.set_ylim(low - room, high + room)
    panel.set_xscale("log")
    panel.axhline(0, color="tab:orange", linewidth=2)
    panel.set_xlabel("optimizer steps after the expansion")
    panel.set_ylabel(
        "held-out loss above copy-copy, nats per byte\n(below the line: better than the default)"
    )
    panel.set_title(f"along one run: {setting.says}", fontsize=10)
    panel.grid(alpha=0.3)


def _ends(panel: Any, found: Sequence[Setting]) -> None:
    for row, setting in enumerate(found):
        for name, colour in OTHERS.items():
            values = setting.results.paired(name, COPY_COPY)
            if values:
                mean, error = statistics.fmean(values), _error(values)
                panel.errorbar(mean, -row, xerr=error, fmt="o", color=colour, label=name, capsize=3)
    panel.axvline(0, color="tab:orange", linewidth=2)
    panel.set_yticks([-row for row in range(len(found))], [s.says for s in found], fontsize=8)
    panel.set_xlabel("at the end: held-out loss above copy-copy (left of the line: better)")
    panel.set_title("at the end of every setting", fontsize=10)
    panel.grid(alpha=0.3)


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def main() -> None:
    """Print the tables, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--figure", type=Path, help="where to draw it (.svg or .png)")
    options = parser.parse_args()
    found = settings(options.results)
    if not found:
        parser.error(f"{options.results}: no finished run of copy-copy to compare with")
    print(f"## {found[0].says}\n\n{table(found[0].results)}\n\n{curve_table(found[0])}\n")
    print(f"## All settings\n\n{overview(found)}")
    if options.figure is not None:
        figure(found, options.figure)


if __name__ == "__main__":
    main()
