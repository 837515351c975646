"""The page that says what was measured."""

from __future__ import annotations

from statistics import median
from typing import Any

_HEAD = """# Performance

Widening is a copy with some arithmetic, so the measure is `cp` of the output's bytes on the same disk.
This page is written by one command, which makes the checkpoints, measures, and removes them:

```
python -m benchmarks.copy --folder EMPTY_FOLDER --write docs/performance.md
```

"""

_NOTES = """
How to read it:

- `expand` is the whole command: Python, imports, the plan, all bytes, checksums of every tensor and file,
  `fsync`, opening the output once more, the rename. `of it, the plan` is what `--dry-run` takes: start,
  imports and plan, without a byte of tensor data, with an empty cache (the layouts of the two classes here
  come with the package; to infer one takes some seconds).
- `first time` is `expand` of a config that was not expanded before, with an empty cache: beside the writing,
  transformers is imported to build the model's own class, which the output is held to. That takes some
  seconds of one core, whatever the size, so that a large expansion hardly sees it; the answer is kept.
- `cp` leaves its bytes in the page cache; `cp + sync` waits for the disk, as `expand` does.
- The obvious script loads all, joins with `torch.cat`, and saves with `save_file` and `torch.save`. It does
  not sync, and holds source and output in memory; where they would not fit it was not run.
- Sources were in the page cache for everybody, as far as they fit. Before every command that writes, as many
  bytes were written and removed. A virtual machine may give that memory back to its host at once, and who
  fills the page cache then waits for it: `cp` does; `cp` + sync, which comes next, and `expand`, which keeps
  little in the page cache, hardly do. Where memory is at hand, `cp` + sync is the column to look at.
- Memory is the peak resident size of the process, less that of a Python that only imports torch (float32 and
  bfloat16 are widened without importing torch, hence negative figures).
- Ratios are taken within a round, whose measurements follow each other; medians over the rounds are shown.
"""

_OTHERS = """
## Other tools

No general tool was found that widens a checkpoint with its optimizer state, or that widens the weights of
any architecture. Two research codes keep optimizer state, each for one architecture:

| candidate | what it is |
|---|---|
| [staged-training][s] | a paper's code: doubles a GPT-2 in its own script, both moments of Adam with it |
| [MSG][g] | a paper's code: grows a BERT in its own script; old moments are kept, new ones zero |
| `mergekit` (PyPI) | merges models of one shape, stacks layers; growing the width is [asked for][m] |
| `gromo` (PyPI) | grows layers of a PyTorch model while it trains; reads no checkpoint directory |
| `mup` (PyPI) | parametrization across widths; copies no weights |
| `nvidia-modelopt` (PyPI) | prunes widths, does not grow them |
| Net2Net, bert2BERT, LiGO, LEMON | papers; under these names PyPI has no tool for it |
| `transformers` | `resize_token_embeddings` grows the vocabulary only |

[s]: https://github.com/allenai/staged-training
[g]: https://github.com/cofe-ai/MSG
[m]: https://github.com/arcee-ai/mergekit/issues/320

What can be compared is how fast bytes are moved. `mergekit` reads and writes weights tensor by tensor; its
`passthrough` copies them as they are. On a checkpoint without optimizer it was asked to copy what `expand`
had written, so it writes the same bytes and computes nothing.
"""


def write_report(results: dict[str, Any]) -> str:
    """Markdown from the figures of a run."""
    idle, cases = results["idle"]["rss"], results["cases"]
    head = [
        "checkpoint", "source", "output", "tensors", "rounds", "`expand`", "of it, the plan", "first time",
        "vs `cp`", "vs `cp` + sync", "obvious script vs `expand`", "memory over idle",
        "obvious script's", "`verify`",
    ]  # fmt: skip
    lines = [
        f"Measured on {results['machine']}; an idle `import torch` takes {idle / 2**20:,.0f} MiB.\n",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *(_line(case, idle) for case in cases),
        "",
        *_goals(cases, idle),
    ]
    return _HEAD + "\n".join([*lines, _NOTES, *_expected(cases), _OTHERS]) + _rival(results)


def _line(case: dict[str, Any], idle: int) -> str:
    rounds = case["rounds"]
    return (
        f"| {case['case']['name']} | {case['source bytes'] / 1e9:.2f} GB "
        f"| {case['output bytes'] / 1e9:.2f} GB | {case['tensors']:,} | {len(rounds)} "
        f"| {wall(rounds, 'expand'):.1f} s | {wall(rounds, 'plan'):.1f} s | {wall(rounds, 'first'):.1f} s "
        f"| {_times(ratio(rounds, 'expand', 'cp'))} | {_times(ratio(rounds, 'expand', 'cp and sync'))} "
        f"| {_times(ratio(rounds, 'obvious', 'expand'))} | {_mebibytes(rounds, 'expand', idle)} "
        f"| {_mebibytes(rounds, 'obvious', idle)} | {wall(rounds, 'verify'):.1f} s |"
    )


def _goals(cases: list[dict[str, Any]], idle: int) -> list[str]:
    """What was aimed at, and whether the figures reach it."""

    def of(name: str, size: float) -> list[Any] | None:
        found = (c["rounds"] for c in cases if (c["case"]["name"], c["case"]["gigabytes"]) == (name, size))
        return next(found, None)

    large, small = of("few large tensors", 8.0), of("few large tensors", 1.0)
    four = of("few large tensors", 4.0)
    goals: list[tuple[str, str, bool | None]] = []

    def at_most(what: str, value: float | None, limit: float) -> None:
        goals.append((f"{what} at most {limit:g}x", _times(value), None if value is None else value <= limit))

    at_most("4 GB, few large tensors: of `cp`", ratio(four, "expand", "cp"), 1.25)
    gain = ratio(four, "obvious", "expand")
    goals.append(
        ("4 GB: the obvious script takes at least 2x", _times(gain), None if not gain else gain >= 2)
    )
    for size in (2.0, 4.0):
        found = of("random fill", size)
        at_most(f"{size:g} GB, random fill: of `cp`", ratio(found, "expand", "cp"), 2)
    found = of("40,000 small tensors", 2.0)
    at_most("40,000 small tensors: of `cp`", ratio(found, "expand", "cp"), 1.5)
    at_most("40,000 small tensors: of `cp` + sync", ratio(found, "expand", "cp and sync"), 1.5)
    if four:
        more = max(one["expand"]["rss"] for one in four) - idle
        goals.append(("4 GB: at most 1 GiB over idle", _mebibytes(four, "expand", idle), more <= 2**30))
    if large and small:
        peaks = [max(one["expand"]["rss"] for one in rounds) for rounds in (small, large)]
        said = " and ".join(f"{peak / 2**20:,.0f} MiB" for peak in peaks)
        same = abs(peaks[1] - peaks[0]) < 64 * 2**20
        goals.append(("the same peak memory for 1 GB and 8 GB (within 64 MiB)", said, same))
    lines = ["| aim | measured | reached |", "|---|---|---|"]
    words = {None: "not measured", True: "yes", False: "**no**"}
    return [*lines, *(f"| {aim} | {value} | {words[held]} |" for aim, value, held in goals)]


def _expected(cases: list[dict[str, Any]]) -> list[str]:
    """Disk and time by the size of a model, from the largest dense checkpoint; nothing without one."""
    dense = [case for case in cases if case["case"]["name"] == "few large tensors"]
    if not dense:
        return []
    large = max(dense, key=lambda case: case["output bytes"])
    seconds = wall(large["rounds"], "expand")
    rate = large["output bytes"] / 1e9 / seconds
    return expected(large["output bytes"] / large["source bytes"], rate)


def expected(growth: float, rate: float) -> list[str]:
    """The section, for an output that is ``growth`` times its source, written at ``rate`` GB a second."""
    lines = [
        "## What to expect",
        "",
        "In float32 with AdamW's two moments a parameter takes 12 bytes. With the growth and the rate of the",
        f"largest checkpoint in the table ({growth:.2f} times, {rate:.1f} GB of output a second),",
        "that is:",
        "",
        "| parameters before | source | output, and free disk needed | `expand --report none` |",
        "|---|---|---|---|",
    ]
    for size, name in ((0.1, "100M"), (1, "1B"), (7, "7B"), (30, "30B"), (70, "70B")):
        output = 12 * size * growth
        seconds = output / rate
        time = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        lines.append(f"| {name} | {12 * size:,.1f} GB | {output:,.1f} GB | {time} |")
    return [
        *lines,
        "",
        "Memory does not grow with the model: `--memory` bounds it (1 GB if nothing is said). `verify` reads",
        "both checkpoints and takes about as long. The default report measures activations on top.",
    ]


def _rival(results: dict[str, Any]) -> str:
    rounds: list[Any] | None
    rounds = next((c["rounds"] for c in results["cases"] if c["case"]["kind"] == "weights"), None)
    times = ratio(rounds, "rival", "expand")
    if rounds is None or times is None:
        return "\nIt was not installed when this page was made.\n"
    ours, theirs = (_mebibytes(rounds, name, results["idle"]["rss"]) for name in ("expand", "rival"))
    return (
        f"\n`mergekit` {results['rival']} took {wall(rounds, 'rival'):.1f} s where `expand` took "
        f"{wall(rounds, 'expand'):.1f} s ({times:.2f}x), without syncing or checksums, and "
        f"{theirs} over an idle torch against {ours}.\n"
    )


def wall(rounds: list[Any], name: str) -> float:
    """Median seconds of one command."""
    return float(median(one[name]["wall"] for one in rounds))


def ratio(rounds: list[Any] | None, one: str, other: str) -> float | None:
    """Median of one command's time over another's; None where it was not run."""
    if rounds is None or any(name not in costs for costs in rounds for name in (one, other)):
        return None
    return float(median(costs[one]["wall"] / costs[other]["wall"] for costs in rounds))


def _times(value: float | None) -> str:
    return "not run" if value is None else f"{value:.2f}x"


def _mebibytes(rounds: list[Any], name: str, idle: int) -> str:
    if any(name not in one for one in rounds):
        return "not run"
    return f"{(max(one[name]['rss'] for one in rounds) - idle) / 2**20:,.0f} MiB"
