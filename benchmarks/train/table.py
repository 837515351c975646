"""Tables and plots of the runs that have finished, whatever their number."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from benchmarks.train.jobs import Store, Widening
from benchmarks.train.treatments import TREATMENTS

NAMES: Mapping[str, str] = {
    "small": "small model, not expanded",
    "wide": "wide model, from scratch",
    "wide-compute": "wide model, from scratch, for the compute of the expanded run",
    **{name: treatment.says for name, treatment in TREATMENTS.items()},
}


@dataclass(frozen=True)
class Results:
    """Runs of one setting: name -> seed -> what the run measured so far."""

    kind: str
    optimizer: str
    widening: Widening
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]]

    @property
    def setting(self) -> str:
        """Its name in files."""
        return f"{self.kind}-{self.optimizer}-{self.widening}"

    def final(self, name: str) -> dict[int, float]:
        """Loss at the end by seed, on all of the held-out text; of the runs that have come to their end."""
        logs = self.runs.get(name, {})
        return {seed: float(log["final"]) for seed, log in logs.items() if "final" in log}

    def paired(self, name: str, other: str) -> list[float]:
        """Differences of final losses in the seeds that both have."""
        a, b = self.final(name), self.final(other)
        return [a[seed] - b[seed] for seed in sorted(a) if seed in b]


def load(path: Path) -> list[Results]:
    """Every setting in one file of results, by kind, optimizer and widening."""
    records = Store(path).read()
    found = []
    expanded = (job for job in sorted(records) if job.name not in ("small", "wide"))
    for kind, optimizer, axes in dict.fromkeys((job.kind, job.optimizer, job.axes) for job in expanded):
        widening = Widening.parse(axes)
        whole = str(replace(widening, share=0.5))
        serves = {"": ("small",), whole: ("wide",)}
        runs: dict[str, dict[int, Any]] = {}
        for job, record in records.items():
            same = (job.kind, job.optimizer) == (kind, optimizer)
            if same and (job.axes == axes or job.name in serves.get(job.axes, ())):
                runs.setdefault(job.name, {})[job.seed] = record
        found.append(Results(kind, optimizer, widening, runs))
    return found


def mean_error(values: Sequence[float]) -> str:
    """Mean and standard error; no error from one value."""
    if not values:
        return "—"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values) / sqrt(len(values)):.4f}"


def table(results: Results) -> str:
    """One Markdown table: final loss, difference from SPARKLING in the same seeds, copies still locked."""
    lines = [
        "| run | seeds | held-out loss | above SPARKLING | gap closed | copies locked |",
        "|---|---|---|---|---|---|",
    ]
    order = [name for name in NAMES if results.final(name)]
    for name in sorted(order, key=lambda n: statistics.fmean(results.final(n).values())):
        locked = [log["locked"] for log in results.runs[name].values() if "locked" in log]
        finals = list(results.final(name).values())
        above = results.paired(name, "sparkling") if name != "sparkling" else []
        lines.append(
            f"| {NAMES[name]} | {len(finals)} | {mean_error(finals)} "
            f"| {mean_error(above)} | {closed(results, name)} "
            f"| {f'{statistics.fmean(locked):.0%}' if locked else '—'} |"
        )
    return "\n".join(lines)


def closed(results: Results, name: str) -> str:
    """Share of the gap from naive copy to the wide model from scratch, of mean losses over common seeds."""
    naive, wide, this = (results.final(n) for n in ("naive", "wide", name))
    seeds = sorted(set(naive) & set(wide) & set(this))
    if not seeds or name in ("naive", "wide"):
        return "—"
    gap = statistics.fmean(naive[s] - wide[s] for s in seeds)
    return f"{statistics.fmean(naive[s] - this[s] for s in seeds) / gap:.0%}" if gap > 0 else "—"


def plot(results: Results, path: Path) -> None:
    """Held-out loss by step, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, end) = pyplot.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 2), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for i, name in enumerate(NAMES):
        logs = list(results.runs.get(name, {}).values())
        if not logs:
            continue
        steps = sorted(set.intersection(*({int(s) for s in log["heldout"]} for log in logs)))
        steps = [s for s in steps if s >= max(steps) // 3]
        values = [statistics.fmean(log["heldout"][str(s)] for log in logs) for s in steps]
        style = "--" if name in ("small", "wide") else "-"
        marker = "os^vD"[i % 5]
        for axes, kept in ((whole, len(steps)), (end, 2)):
            axes.plot(
                steps[-kept:],
                values[-kept:],
                style,
                marker=marker,
                color=colours[i % len(colours)],
                label=name,
                linewidth=1.4,
            )
    for axes in (whole, end):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    whole.set_ylabel("held-out loss, nats per byte")
    whole.set_title(results.setting)
    end.set_title("the end of it")
    figure.legend(*whole.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def report(path: Path, markdown: Path | None) -> None:
    """Print every setting's table, plot it, and write all into a Markdown file if asked to."""
    parts = []
    for results in load(path):
        plot(results, path.with_name(f"{path.stem}-{results.setting}.svg"))
        parts.append(f"### {path.stem}: {results.setting}\n\n{table(results)}\n")
        print(parts[-1])
    if markdown is not None:
        markdown.write_text("\n".join(parts))
