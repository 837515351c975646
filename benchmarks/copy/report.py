"""The page that says what was measured."""

from __future__ import annotations

from collections.abc import Callable
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
  imports and plan, without a byte of tensor data.
- `cp` leaves its bytes in the page cache; `cp + sync` waits for the disk, as `expand` does.
- The obvious script loads all, joins with `torch.cat`, and saves with `save_file` and `torch.save`. It does
  not sync, and holds source and output in memory; where they would not fit it was not run.
- Sources were in the page cache for everybody.
- Memory is the peak resident size of the process, less that of a Python that only imports torch.
"""


def write_report(results: dict[str, Any], middle: Callable[[list[float]], float]) -> str:
    """Markdown from the figures of a run."""
    idle = results["idle"]["rss"]
    head = [
        "checkpoint", "source", "output", "tensors", "`expand`", "of it, the plan", "vs `cp`",
        "vs `cp` + sync", "obvious script vs `expand`", "memory over idle", "obvious script's", "`verify`",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in results["cases"]:
        rounds = case["rounds"]

        def wall(name: str, rounds: list[Any] = rounds) -> float:
            return middle([one[name]["wall"] for one in rounds])

        def ratio(a: str, b: str, rounds: list[Any] = rounds) -> str:
            if any(a not in one or b not in one for one in rounds):
                return "not run"
            return f"{middle([one[a]['wall'] / one[b]['wall'] for one in rounds]):.2f}x"

        def memory(name: str, rounds: list[Any] = rounds) -> str:
            if any(name not in one for one in rounds):
                return "not run"
            return f"{(max(one[name]['rss'] for one in rounds) - idle) / 2**20:,.0f} MiB"

        lines.append(
            f"| {case['case']['name']} | {case['source bytes'] / 1e9:.2f} GB "
            f"| {case['output bytes'] / 1e9:.2f} GB | {case['tensors']:,} | {wall('expand'):.1f} s "
            f"| {wall('plan'):.1f} s | {ratio('expand', 'cp')} | {ratio('expand', 'cp and sync')} "
            f"| {ratio('obvious', 'expand')} | {memory('expand')} | {memory('obvious')} "
            f"| {wall('verify'):.1f} s |"
        )
    counts = sorted({len(case["rounds"]) for case in results["cases"]}) or [0]
    rounds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    where = f"Measured on {results['machine']}; medians of {rounds} round(s)"
    where += f"; an idle `import torch` takes {idle / 2**20:,.0f} MiB.\n\n"
    return _HEAD + where + "\n".join(lines) + "\n" + _NOTES
