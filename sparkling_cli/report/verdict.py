"""What the facts of an expansion mean, in sentences that a person can act on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sparkling_cli.plan.advice import symmetry_warning
from sparkling_cli.report.model import (
    DEVIATION_LIMIT,
    Activations,
    Finding,
    LayerActivation,
    LearningRate,
    OptimizerSummary,
    Verdict,
)
from sparkling_cli.report.svg import signed
from sparkling_cli.widening.geometry import Growth

#: A loss that jumps by more than this at the boundary is worth a look when the widening keeps the function.
LOSS_TOLERANCE = 0.01


def verdict(
    growth: Mapping[str, Growth],
    activations: Activations | None,
    activations_missing: str,
    learning_rate: LearningRate | None,
    learning_rate_missing: str,
    optimizer: OptimizerSummary | None,
    warnings: Sequence[str],
    *,
    keeps_function: bool,
    form: str = "",
) -> Verdict:
    """The verdict on an expansion.

    Args:
        growth: of the plan's axes.
        activations: measured before and after, if they were.
        activations_missing: why not.
        learning_rate: the re-warmup, if the baseline is known.
        learning_rate_missing: why not.
        optimizer: what became of its state; None without state.
        warnings: of the plan.
        keeps_function: whether this widening is exactly function-preserving (whole factors, copies).
        form: the checkpoint's format.
    """
    findings = [
        *_signal(activations, activations_missing, keeps_function),
        *_symmetry(optimizer, growth, form),
        *_schedule(learning_rate, learning_rate_missing),
    ]
    said = {finding.text for finding in findings}
    findings += [Finding(level="attention", text=text) for text in warnings if sentence(text) not in said]
    attention = [finding for finding in findings if finding.level == "attention"]
    if not attention:
        noted = [finding for finding in findings if finding.level == "note"]
        headline = "Ready to train on." if not noted else "Ready to train on; read the notes."
        return Verdict(level="good" if not noted else "note", headline=headline, findings=tuple(findings))
    count = "One thing needs" if len(attention) == 1 else f"{len(attention)} things need"
    return Verdict(
        level="attention",
        headline=f"{count} your attention before you train on.",
        findings=tuple(sorted(findings, key=lambda f: f.level != "attention")),
    )


def _signal(activations: Activations | None, missing: str, keeps_function: bool) -> Iterator[Finding]:
    if activations is None:
        yield Finding(level="note", text=f"Activations were not measured: {missing or 'not asked for'}.")
        return
    offenders = activations.offenders
    limit = f"{DEVIATION_LIMIT:.0%}"
    if offenders:
        named = ", ".join(f"{e.name} ({percent(e.deviation)})" for e in offenders[:3])
        more = f" and {len(offenders) - 3} more" if len(offenders) > 3 else ""
        yield Finding(
            level="attention",
            text=f"The signal ratio r = RMS(y)/RMS(x) moved by more than {limit} in {len(offenders)} of "
            f"{len(activations.layers)} linear layers: {named}{more}.",
        )
    elif activations.layers:
        worst = activations.worst(1)[0]
        yield Finding(
            level="good",
            text=f"Every one of {len(activations.layers)} linear layers keeps its signal ratio "
            f"r = RMS(y)/RMS(x) within {limit}; {_farthest(worst)}.",
        )
    yield from _loss(activations, keeps_function)


def _loss(activations: Activations, keeps_function: bool) -> Iterator[Finding]:
    before, after = activations.loss_before, activations.loss_after
    if before is None or after is None:
        return
    moved = f"The loss goes from {before:.4f} to {after:.4f} ({signed(after - before)})"
    where = " on random tokens, which says little" if activations.random_tokens else ""
    if keeps_function and abs(after - before) > LOSS_TOLERANCE:
        yield Finding(
            level="attention",
            text=f"{moved}{where}, although this widening should keep the function: "
            "compare logits in float32 before you train on.",
        )
    elif keeps_function:
        yield Finding(level="good", text=f"{moved}{where}: the function is kept.")
    else:
        yield Finding(
            level="good",
            text=f"{moved}{where}. A jump at the boundary is expected here and does not predict "
            "the final loss.",
        )


def _symmetry(
    optimizer: OptimizerSummary | None, growth: Mapping[str, Growth], form: str
) -> Iterator[Finding]:
    if not any(grown.copied for grown in growth.values()):
        yield Finding(
            level="good",
            text="New entries start different from their sources, so nothing is locked to a copy.",
        )
        return
    warning = symmetry_warning(growth, None if optimizer is None else optimizer.treatment, form)
    if warning is not None:
        yield Finding(level="attention", text=sentence(warning))
        return
    yield Finding(
        level="good",
        text="Old entries keep their optimizer state and new ones start from zero, so copies part "
        "from their sources at the first step.",
    )


def _schedule(learning_rate: LearningRate | None, missing: str) -> Iterator[Finding]:
    if learning_rate is None:
        yield Finding(level="note", text=f"No re-warmup schedule was written: {missing or 'not known'}.")
        return
    yield Finding(
        level="good",
        text=f"New entries re-warm over {learning_rate.rewarmup_steps} steps to {learning_rate.rho:g} x the "
        "learning rate at the expansion. Only the training side can apply it: add the callback or hook.",
    )


def _farthest(worst: LayerActivation) -> str:
    """How far the layer that moved most moved."""
    if worst.moved < 5e-5:
        return "none moved by more than rounding"
    return f"the farthest, {worst.name}, moved by {worst.deviation:+.2%}"


def sentence(text: str) -> str:
    """A warning as a sentence."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def percent(deviation: float | None) -> str:
    """A deviation with its sign; ``not finite`` for null."""
    return "not finite" if deviation is None else f"{deviation:+.0%}"
