"""Which pair, at which horizon: ``python -m benchmarks.train.horizon`` makes its tables and its figure.

It reads every file of results in ``--results``, whatever has finished, and trains nothing. Losses are
compared with those of copy-copy (the default) in the same seed, on the same text; below zero is better.
Along a run the loss is that of the training text since the measurement before, which is new to every run
and more than the held-out text; at the end it is that of the held-out text.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from benchmarks.train.jobs import Widening
from benchmarks.train.loop import Run
from benchmarks.train.optim import DECAY
from benchmarks.train.table import Results, closed, load, mean_error, table
from benchmarks.train.treatments import TREATMENTS

COPY_COPY = "sparkling"
#: what is compared with copy-copy, and its colour
OTHERS: Mapping[str, str] = {
    "random-copy": "tab:blue",
    "random-zero": "tab:green",
    "random-zero-function": "tab:cyan",
    "zero-copy": "tab:olive",
    "naive": "tab:red",
    "small": "tab:gray",
    "wide": "black",
    "wide-compute": "tab:purple",
}
#: those that a curve is drawn of: the shorter run has a schedule of its own, so only its end is compared
ALONG = tuple(name for name in OTHERS if name != "wide-compute")
#: the one that ``--init auto`` stands for
KEPT = "random-zero-function"
#: the pairs among them
PAIRS = ("random-copy", "random-zero", KEPT, "zero-copy")
#: between copies and random entries; in a table of their own, with a pair to judge by
BETWEEN = (
    KEPT,
    "random-random",
    *(name for name, treatment in TREATMENTS.items() if treatment.between),
)
#: factors that keep r, or the function, exactly; name -> the same run with the method's own factors
CALIBRATED: Mapping[str, str] = {
    "function": COPY_COPY,
    **{name: name.removesuffix("-calibrated") for name in TREATMENTS if name.endswith("-calibrated")},
}
#: how optimizers are called
OPTIMIZERS: Mapping[str, str] = {
    "muon": "Muon with matched RMS",
    "muon-original": "Muon as published",
    "soap": "SOAP",
}
#: axes that are no widths
COUNTED = ("experts", "experts_per_token", "layers")
#: what can become of the state of what is counted, beside the asymmetric reset with its re-warmup
STATES: Mapping[str, str] = {
    "asymmetric": "without re-warmup",
    "state-copied": "copied state, re-warmed",
    "naive": "copied state",
    "drop": "dropped state",
}
#: steps after the expansion in the table of the curve
MARKS = (50, 250, 500, 1000, 2000, 3000, 4000, 6000, 8000, 10_000, 12_000)
MARKS += (16_000, 20_000, 24_000, 28_000, 32_000)


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
        stages = " then ".join(_stages(self.results.widening))
        parts = [f"{self.left:,} steps left", f"beta2 {self.run.beta2:g}", stages]
        if self.run.schedule != "cosine":
            parts.append(self.run.schedule.upper())
        if self.run.decay != DECAY:
            parts.append(f"weight decay {self.run.decay:g}")
        if self.results.optimizer != "adamw":
            parts.append(OPTIMIZERS[self.results.optimizer])
        if self.results.kind != "dense":
            parts.insert(0, "mixture of experts")
        if self.run.size != "horizon":
            parts.insert(0, self.run.size)
        return ", ".join(parts)

    @property
    def counts(self) -> bool:
        """Whether what grows is counted: experts or layers, without a width."""
        return set(self.results.widening.axes) <= set(COUNTED)

    @property
    def rank(self) -> tuple[object, ...]:
        """Place in tables: the main setting first, then by what differs from it."""
        w, run = self.results.widening, self.run
        model = (run.size != "horizon", run.size, self.results.kind != "dense", w.before is not None, w.axes)
        return (
            *model,
            self.results.optimizer,
            run.decay != DECAY,
            run.schedule,
            run.beta2,
            abs(w.share - 0.5),
            w.share,
            w.factor != 2,
            w.factor,
            -len(self.results.runs[COPY_COPY]),
            -self.left,
        )


def _stages(widening: Widening) -> list[str]:
    """Every stage in words."""
    before = _stages(widening.before) if widening.before else []
    return [*before, f"{'+'.join(widening.axes)} {widening.factor:g}x, at {widening.share:.0%}"]


def settings(folder: Path) -> list[Setting]:
    """Everything that has copy-copy to compare with, in the order of tables."""
    found = [
        Setting(Run.of_label(path.stem), results)
        for path in sorted(folder.glob("*.jsonl"))
        for results in load(path)
        if COPY_COPY in results.runs
    ]
    return sorted(found, key=lambda setting: setting.rank)


def above(setting: Setting, name: str, other: str = COPY_COPY) -> dict[int, list[float]]:
    """Steps after the expansion -> differences from another run, one for each seed that has come so far.

    Of the loss on the text since the measurement before.
    """
    found: dict[int, list[float]] = {}
    for seed, ours in sorted(setting.results.runs.get(other, {}).items()):
        theirs = setting.results.runs.get(name, {}).get(seed)
        if theirs is None:
            continue
        a, b = theirs["train"], ours["train"]
        for step in sorted(int(s) for s in a.keys() & b.keys()):
            if step > setting.expansion:
                found.setdefault(step - setting.expansion, []).append(a[str(step)] - b[str(step)])
    return dict(sorted(found.items()))


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
    """How far every run lies above copy-copy along the horizon, copy-copy's cosine, and where they cross."""
    curves = {name: above(setting, name) for name in ALONG}
    lines = _along(curves, {"cosine of copy-copy's copies there": _cosines_at_marks(setting)})
    return "\n".join([*lines, "", *(crossing_stated(n, curves[n]) for n in PAIRS if curves[n])])


def between_table(setting: Setting) -> str:
    """How far what lies between the pairs is above copy-copy along the horizon; "" if nothing was run."""
    curves = {name: above(setting, name) for name in BETWEEN}
    if not any(curves[name] for name in BETWEEN[2:]):
        return ""
    last = max(step for name in BETWEEN[2:] for step in curves[name])
    curves = {name: {s: found for s, found in curve.items() if s <= last} for name, curve in curves.items()}
    return "\n".join(_along(curves, {}))


def longer_table(found: Sequence[Setting]) -> str:
    """The lead of what ``auto`` stands for, by the steps that the whole run has left; "" for one length."""
    main = found[0]
    same = [s for s in found if replace(s.run, steps=main.run.steps, warmup=main.run.warmup) == main.run]
    kind = (main.results.kind, main.results.optimizer, main.results.widening)
    same = [s for s in same if (s.results.kind, s.results.optimizer, s.results.widening) == kind]
    same = [s for s in same if above(s, KEPT)]
    same.sort(key=lambda setting: setting.left)
    curves = {f"of {s.left:,}": above(s, KEPT) for s in same}
    more = {f"cosine of copies, of {s.left:,}": _cosines_at_marks(s) for s in same}
    ends = [*(mean_error(s.results.paired(KEPT, COPY_COPY)) for s in same), *("—" for _ in same)]
    lines = [*_along(curves, more), f"| held-out, at the end | {' | '.join(ends)} |"]
    return "\n".join(lines) if len(same) > 1 else ""


def _cosines_at_marks(setting: Setting) -> list[str]:
    """Of copy-copy's copies to their sources, in the mean over seeds."""
    logs = setting.results.runs[COPY_COPY].values()
    steps = [str(mark + setting.expansion) for mark in MARKS]
    found = [[log["cosine"][step] for log in logs if step in log["cosine"]] for step in steps]
    return [f"{statistics.fmean(values):.2f}" if values else "—" for values in found]


def calibrated_table(found: Sequence[Setting]) -> str:
    """Where factors were fitted on tokens: how far the run is above that with the method's own factors."""
    marks = (50, 1000, 10_000)
    head = [
        "setting",
        "factors",
        "against",
        *(f"up to step {mark:,}" for mark in marks),
        "held-out, at the end",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for setting in found:
        for name, other in CALIBRATED.items():
            curve = above(setting, name, other)
            if curve:
                cells = [mean_error(curve.get(mark, ())) for mark in marks]
                cells.append(mean_error(setting.results.paired(name, other)))
                against = "copy-copy" if other == COPY_COPY else other
                lines.append(f"| {setting.says} | {name} | {against} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _along(
    curves: Mapping[str, Mapping[int, Sequence[float]]], more: Mapping[str, Sequence[str]]
) -> list[str]:
    """Lines of a table, a row for every mark that a run has come to; ``more``: a cell for each mark."""
    curves = {name: curve for name, curve in curves.items() if curve}
    head = ["after the expansion, up to step", *curves, *more]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for number, mark in enumerate(MARKS):
        if any(mark in curve for curve in curves.values()):
            cells = [mean_error(curve.get(mark, ())) for curve in curves.values()]
            lines.append(
                f"| {mark:,} | {' | '.join([*cells, *(cells_of[number] for cells_of in more.values())])} |"
            )
    return lines


def crossing_stated(name: str, curve: Mapping[int, Sequence[float]]) -> str:
    """One sentence on where copy-copy overtakes a pair."""
    found, last = crossing(curve), max(curve)
    where = "no crossing" if found is None else f"copy-copy is better from step {found:,} on"
    return f"- {name}: {where} (up to {last:,} steps; seeds that came so far: {len(curve[last])})"


def overview(found: Sequence[Setting]) -> str:
    """The end of every setting, on all of the held-out text: one row for each that has come to its end."""
    names = [name for name in OTHERS if any(name in s.results.runs for s in found)]
    head = ["setting", "seeds", *names, "gap closed by copy-copy", "by random-copy", "cosine at the end"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for setting in found:
        results, ends = setting.results, setting.results.final(COPY_COPY)
        if not ends or "layers" in results.widening.axes or setting.counts:
            continue
        last = str(setting.run.steps)
        cosine = statistics.fmean(results.runs[COPY_COPY][seed]["cosine"][last] for seed in ends)
        cells = [mean_error(results.paired(name, COPY_COPY)) for name in names]
        gaps = [closed(results, COPY_COPY), closed(results, "random-copy")]
        lines.append(
            f"| {setting.says} | {len(ends)} | {' | '.join(cells)} | {' | '.join(gaps)} | {cosine:.2f} |"
        )
    return "\n".join(lines)


def counted_table(found: Sequence[Setting]) -> str:
    """Experts and layers: the end of every way of going on, above the asymmetric reset with its re-warmup."""
    head = ["setting", "seeds", *STATES.values(), "small model, not grown"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for setting in found:
        ends = setting.results.final(COPY_COPY)
        if setting.counts and ends:
            names = [*STATES, "small"]
            cells = [mean_error(setting.results.paired(name, COPY_COPY)) for name in names]
            lines.append(f"| {setting.says} | {len(ends)} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def shapes_table(found: Sequence[Setting]) -> str:
    """Width, depth, and both, where layers grew: the end against the small model, by parameters.

    What has as many parameters costs as much, by C = 6 N D.
    """
    runs = {setting.run for setting in found if setting.results.widening.axes == ("layers",)}
    head = [
        "grown",
        "parameters",
        "steps left",
        "seeds",
        "copy-copy, above the small model",
        f"{KEPT}, above it",
    ]
    rows = []
    for setting in found:
        results = setting.results
        small, ends = results.paired(COPY_COPY, "small"), results.final(COPY_COPY)
        if setting.run in runs and results.kind == "dense" and results.optimizer == "adamw" and small:
            parameters = next(iter(results.runs[COPY_COPY].values()))["parameters"]
            grown = " then ".join(_stages(results.widening))
            kept = mean_error(results.paired(KEPT, "small"))
            cells = [grown, f"{parameters:,}", f"{setting.left:,}", f"{len(ends)}", mean_error(small), kept]
            rows.append((parameters, f"| {' | '.join(cells)} |"))
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(row for _, row in sorted(rows))]
    return "\n".join(lines) if rows else ""


def figure(found: Sequence[Setting], path: Path) -> None:
    """Left the curve of the first setting, right the ends of all."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sparkling"
    from matplotlib import pyplot

    ended = [setting for setting in found if setting.results.final(COPY_COPY)]
    drawing = pyplot.figure(figsize=(12, max(5.4, 3.6 + 0.42 * len(ended))), layout="constrained")
    panels = drawing.subplot_mosaic([["curves", "cosines"], ["curves", "ends"]], width_ratios=(5, 4))
    _curves(panels["curves"], found[0])
    _cosines(panels["cosines"], found[0])
    _ends(panels["ends"], [setting for setting in ended if not setting.counts])
    handles = {h.get_label(): h for p in panels.values() for h in p.get_legend_handles_labels()[0]}
    columns = -(-len(handles) // 2)
    drawing.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(drawing)


def _curves(panel: Any, setting: Setting) -> None:
    late: list[float] = []
    for name in ALONG:
        found, colour = above(setting, name), OTHERS[name]
        if not found:
            continue
        means = [statistics.fmean(values) for values in found.values()]
        errors = [_error(values) for values in found.values()]
        panel.errorbar(list(found), means, errors, fmt=".-", color=colour, label=name, elinewidth=0.8)
        late += [m for s, m in zip(found, means, strict=True) if s >= 500 and name != "wide"]
    if late and max(late) > min(late):  # the jump of the first steps, and the wide model, may leave the panel
        room = 0.15 * (max(late) - min(late))
        panel.set_ylim(min(late) - room, max(late) + room)
    panel.set_xscale("log")
    panel.axhline(0, color="tab:orange", linewidth=2)
    panel.set_xlabel("optimizer steps after the expansion")
    panel.set_ylabel("loss above copy-copy, nats per byte")
    panel.set_title(f"below the line: better than copy-copy\n({setting.says})", fontsize=9)
    panel.grid(alpha=0.3)


def _cosines(panel: Any, setting: Setting) -> None:
    for name, colour in {COPY_COPY: "tab:orange", **OTHERS}.items():
        logs = setting.results.runs.get(name, {}).values()
        steps = sorted({int(s) for log in logs for s in log["cosine"] if int(s) > setting.expansion})
        if steps:
            label = "copy-copy" if name == COPY_COPY else name
            means = [
                statistics.fmean(log["cosine"][str(s)] for log in logs if str(s) in log["cosine"])
                for s in steps
            ]
            panel.plot([s - setting.expansion for s in steps], means, color=colour, label=label)
    panel.set_xscale("log")
    panel.set_title("cosine between new channels and their sources", fontsize=9)
    panel.grid(alpha=0.3)


def _ends(panel: Any, found: Sequence[Setting]) -> None:
    for row, setting in enumerate(found):
        for name, colour in OTHERS.items():
            values = setting.results.paired(name, COPY_COPY)
            if values:
                mean, error = statistics.fmean(values), _error(values)
                panel.errorbar(mean, -row, xerr=error, fmt="o", color=colour, label=name, capsize=3)
        panel.text(0.01, -row + 0.12, setting.says, fontsize=7, transform=panel.get_yaxis_transform())
    panel.axvline(0, color="tab:orange", linewidth=2)
    panel.set_yticks([])
    panel.set_ylim(0.6 - len(found), 0.6)
    panel.set_xlabel("held-out loss above copy-copy at the end (left of the line: better)", fontsize=9)
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
    for setting in found:
        print(f"## {setting.says}\n\n{table(setting.results)}\n\n{curve_table(setting)}\n")
        between = between_table(setting)
        if between:
            print(f"### Between the pairs\n\n{between}\n")
    tables = (overview, longer_table, calibrated_table, counted_table, shapes_table)
    print("\n\n".join(["## All settings", *(text for made in tables if (text := made(found)))]))
    if options.figure is not None:
        figure(found, options.figure)


if __name__ == "__main__":
    main()
