"""What docs/evidence.md measured, where a message quotes it: the numbers, and the sentences.

Every number is held to the records in ``benchmarks/results`` by ``tests/benchmarks/test_quoted.py``. The
models measured were small, so a sentence says what was measured and where, and leaves the choice.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Inner widths of MLPs, by the names that axes have: what the quoted runs widened.
INNER = ("ffn", "expert_ffn", "shared_ffn")
#: Adam's beta2 in the quoted runs.
BETA2 = 0.95
#: Steps after the expansion -> by how many nats per byte ``random-zero`` that keeps the function ended below
#: ``copy-copy``, in the mean over seeds; under AdamW and a cosine it was below it at every step measured.
AHEAD = {1500: 0.014, 12_000: 0.011, 20_000: 0.006, 32_000: 0.006}
STEPS = max(AHEAD)
#: The cosine of ``copy-copy``'s copies to their sources, after so many steps.
COSINE, COSINE_STEPS = 0.97, 2000
#: Tokens per parameter of the small model before the expansion, and of the wide one after it: least and most.
TOKENS_BEFORE, TOKENS_AFTER = (6, 133), (5, 102)


def pair_for(axes: Iterable[str], left: int | None) -> tuple[str, str]:
    """Initialization and scaling that were ahead on these axes up to so many steps after the expansion.

    The paper's choice where nothing was measured.

    Args:
        axes: that grow.
        left: steps that remain; None where that is not known.
    """
    inner = set(axes) - {"layers", "experts", "experts_per_token"}  # in new ones copies would stay locked
    measured = bool(inner) and inner <= set(INNER) and left is not None and left <= STEPS
    return ("random-zero", "function") if measured else ("copy-copy", "rms")


def pair_note(axes: Iterable[str], init: str, left: int) -> str | None:
    """Which pair was ahead with so many steps left, for inner widths that are copied on both sides.

    Args:
        axes: that grow.
        init: the pair asked for.
        left: steps that remain.
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
        "that stays high, the two came level. In the paper's model copy-copy ended ahead of zero-copy by "
        "0.0001 and of random-copy by 0.0018, after 32,000 (docs/evidence.md)"
    )


def tokens_note(axes: Iterable[str], before: float, after: float) -> str | None:
    """How far a planned expansion is from what was measured, in tokens per parameter.

    Args:
        axes: that grow.
        before: tokens per parameter of the model before the expansion, up to it.
        after: tokens per parameter of the model after it, from it on.
    """
    if not set(axes) <= set(INNER):
        return None
    measured = ", ".join("{} to {}".format(*ends) for ends in (TOKENS_BEFORE, TOKENS_AFTER))
    return (
        f"{before:.3g} tokens per parameter before the expansion of {', '.join(axes)}, {after:.3g} after it; "
        f"which pair to take was measured at {measured} (docs/evidence.md)"
    )
