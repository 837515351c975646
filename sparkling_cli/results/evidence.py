"""What docs/evidence.md measured, where a message quotes it: the numbers, and the sentences.

Every number is held to the records in ``benchmarks/results`` by ``tests/benchmarks/test_quoted.py``. The
models measured were small, so a sentence says what was measured and where, and leaves the choice.
"""

from __future__ import annotations

from collections.abc import Iterable

from sparkling_cli.results.numbers import count

#: Inner widths of MLPs, by the names that axes have: what the quoted runs widened.
INNER = ("ffn", "expert_ffn", "shared_ffn")
#: Adam's beta2 in the quoted runs.
BETA2 = 0.95
#: Steps after the expansion -> by how many nats per byte ``random-zero`` that keeps the function ended below
#: ``copy-copy``, in the mean over seeds; under AdamW and a cosine it was below it at every step measured.
AHEAD = {1500: 0.014, 12_000: 0.012, 20_000: 0.006, 32_000: 0.006}
STEPS = max(AHEAD)
#: Parameters, before it grew, of the largest model in which ``random-zero`` ended ahead.
PARAMETERS = 344_928
#: One run of a larger model: millions of parameters after the expansion, tokens for each from then on, steps;
#: the last one measured at which ``random-zero`` was ahead, its largest lead, how far it ended behind.
LARGER_MODEL, LARGER_TOKENS, LARGER_STEPS = 6.4, 0.3, 2000
LARGER_AHEAD, LARGER_LEAD, LARGER_BEHIND = 1500, 0.02, 0.004
#: The same at the end of runs with one thing different.
LIKE = {
    "at 4x": 0.044,
    "widened after a quarter of the run": 0.002,
    "widened after three quarters of it": 0.012,
    "under WSD": 0.003,
}
#: The same without weight decay, and the cosine of ``copy-copy``'s copies there, after so many steps.
NO_DECAY, NO_DECAY_COSINE, NO_DECAY_STEPS = 0.022, 0.95, 12_000
#: That cosine at the end of the same steps with weight decay.
DECAY, DECAY_COSINE = 0.1, 0.67
#: Pair -> by how many nats per byte it ended above the wide model from scratch at equal compute, in the mean
#: over so many seeds, after so many steps; and how far below it the paper's ended (Table 1, inner 2x).
SCRATCH_BELOW = {"copy-copy": 0.032, "random-zero": 0.02}
SCRATCH_SEEDS, SCRATCH_STEPS, PAPER_ABOVE = 3, 12_000, 0.0163
#: The cosine of ``copy-copy``'s copies to their sources, after so many steps.
COSINE, COSINE_STEPS = 0.97, 2000
#: Tokens per parameter of the small model before the expansion, and of the wide one after it: least and most.
TOKENS_BEFORE, TOKENS_AFTER = (6, 133), (5, 102)


def pair_for(axes: Iterable[str], left: int | None, parameters: int) -> tuple[str, str]:
    """Initialization and scaling that were ahead on these axes up to so many steps after the expansion.

    The paper's choice where nothing was measured, and in larger models, of which the one measured and the
    paper's speak for it; but in new layers and experts copies would stay locked, whatever the size.

    Args:
        axes: that grow.
        left: steps that remain; None where that is not known.
        parameters: of the model, before it grows.
    """
    inner = set(axes) - {"layers", "experts", "experts_per_token"}
    small = parameters <= PARAMETERS or inner < set(axes)
    measured = bool(inner) and inner <= set(INNER) and left is not None and left <= STEPS
    return ("random-zero", "function") if measured and small else ("copy-copy", "rms")


def like(factor: float, share: float, schedule: str) -> tuple[str, ...]:
    """The entries of ``LIKE`` that a run resembles more than the runs that they differ from.

    Args:
        factor: new size / old size.
        share: of the run that is done at the expansion.
        schedule: the baseline's type (``cosine``, ``wsd``, ...).
    """
    found = (factor >= 3, share <= 0.375, share >= 0.625, schedule in ("wsd", "constant"))
    return tuple(name for name, alike in zip(LIKE, found, strict=True) if alike)


def pair_note(axes: Iterable[str], init: str, left: int, near: Iterable[str] = ()) -> str | None:
    """Which pair was ahead with so many steps left, for inner widths that are copied on both sides.

    Args:
        axes: that grow.
        init: the pair asked for.
        left: steps that remain.
        near: what :func:`like` says of the run.
    """
    if init != "copy-copy" or not set(axes) <= set(INNER):
        return None
    beyond = "" if left <= STEPS else "; more steps were not measured"
    leads, ends = (
        f"{', '.join(words[:-1])} and {words[-1]}"
        for words in ([f"{lead:g}" for lead in AHEAD.values()], [f"{steps:,}" for steps in AHEAD])
    )
    return (
        f"{left:,} steps remain. In small models widened half-way, under AdamW and a cosine, --init "
        "random-zero with --scaling function was ahead of copy-copy at every step measured, and ended ahead "
        f"by {leads} nats per byte after {ends}{beyond}; widened after a quarter of the run, or at a rate "
        f"that stays high, the two came level.{_nearer(near)} In one run of {LARGER_MODEL:g}M parameters, "
        f"with {LARGER_TOKENS:g} tokens for each, a lead of {LARGER_LEAD:g} was gone after {LARGER_AHEAD:,} "
        f"of {LARGER_STEPS:,} steps, and copy-copy ended ahead by {LARGER_BEHIND:g}. In the paper's model "
        "copy-copy ended ahead of zero-copy by 0.0001 and of random-copy by 0.0018, after 32,000 "
        "(docs/evidence.md)"
    )


def _nearer(near: Iterable[str]) -> str:
    alike = ", ".join(f"by {LIKE[name]:g} nats per byte in a run {name}" for name in near)
    said = f" Of small runs with one thing as here, random-zero ended ahead of copy-copy {alike}."
    return said if alike else ""


def decay_note(axes: Iterable[str], init: str) -> str | None:
    """What copies do without weight decay, for inner widths that are copied on both sides.

    Args:
        axes: that grow.
        init: the pair asked for.
    """
    if init != "copy-copy" or not set(axes) <= set(INNER):
        return None
    return (
        "the optimizer has no weight decay, without which copies hardly part: in a small model under AdamW "
        f"their cosine to their sources was {NO_DECAY_COSINE:g} after {NO_DECAY_STEPS:,} steps "
        f"({DECAY_COSINE:g} with a decay of {DECAY:g}), and --init random-zero with --scaling function ended "
        f"{NO_DECAY:g} nats per byte ahead (docs/evidence.md)"
    )


def tokens_note(axes: Iterable[str], before: float, after: float, near: Iterable[str] = ()) -> str | None:
    """How far a planned expansion is from what was measured, in tokens per parameter.

    Args:
        axes: that grow.
        before: tokens per parameter of the model before the expansion, up to it.
        after: tokens per parameter of the model after it, from it on.
        near: what :func:`like` says of the run.
    """
    if not set(axes) <= set(INNER):
        return None
    ranges = (TOKENS_BEFORE, TOKENS_AFTER)
    inside = all(low <= each <= high for each, (low, high) in zip((before, after), ranges, strict=True))
    carry = "" if inside else ", so those results may not carry over"
    own = [f"{each:.3g}" if each < 1000 else count(each) for each in (before, after)]
    first, then = ("{} to {}".format(*ends) for ends in ranges)
    return (
        f"which --init is best was measured only with {first} tokens per parameter before the expansion of "
        f"{', '.join(axes)} and {then} after it; this run has {own[0]} and {own[1]}{carry} "
        f"(docs/evidence.md).{_nearer(near)}"
    )


def compute_note(axes: Iterable[str]) -> str | None:
    """What an expansion was worth against the wide model from scratch, both with the same compute.

    Args:
        axes: that grow.
    """
    if not set(axes) <= set(INNER):
        return None
    pairs = " and ".join(f"{above:g} by {pair}" for pair, above in SCRATCH_BELOW.items())
    return (
        "the share saved is at equal tokens, where the wide model from scratch ends lower; at equal compute "
        f"the paper's expanded model ended {PAPER_ABOVE:g} below it, and our small ones, with "
        f"{SCRATCH_STEPS:,} steps after the expansion, ended above it: {pairs} (nats per byte, mean of "
        f"{SCRATCH_SEEDS} seeds; docs/evidence.md)"
    )
