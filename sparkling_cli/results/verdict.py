"""What measurements and schedules mean, in sentences that a person can act on.

The measured quantities are the paper's: what a block's function adds to the residual stream against the
stream, RMS(f(Norm h)) / RMS(h) (Sec. 3.1, App. B), the growth of the stream over depth, the logits. A
single matrix may move while its block does not (a norm takes a common factor out again), and the other way
round (fewer active channels in front of an unchanged matrix), so matrices are shown and not judged. A small
jump of the loss does not predict the final loss (App. F); one above a ceiling means a broken model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import log

from sparkling_cli.results.base import Finding, Level, Verdict
from sparkling_cli.results.evidence import COSINE, COSINE_STEPS
from sparkling_cli.results.expansion import LearningRate
from sparkling_cli.results.measured import (
    DEVIATION_LIMIT,
    STREAM_ROUNDING,
    Activations,
    LayerActivation,
    LoggedLoss,
    Symmetry,
)
from sparkling_cli.results.numbers import moved, percent, signed, significant

# The limits of the verdict are ours: the paper compares whole runs and gives none. Each stands between what
# sound and unsound expansions of the bundled models give (docs/explanation/method.md): DEVIATION_LIMIT (see
# ``results.measured``), a tenth, between the 4 % by which ratios differ from text to text without widening
# and the 23-29 % that zeroed inner channels cost (App. B).

#: A loss that moves by more than this where the widening keeps the function is a fault: rounding gives 1e-4.
LOSS_TOLERANCE = 0.01
#: A rise of the loss by more than this share of it is never what the method promises: fractional copies give
#: up to 6 %, random columns under a tied head more than 300 %.
LOSS_SHARE = 0.25
#: Shares of tokens that must go to the same experts: below the first it is noted, below the second warned.
#: Whole factors keep 100 %; hidden 1.5x keeps 95 % with 1/multiplicity per column and 47 % with one alpha.
ROUTING_NOTE, ROUTING_LIMIT = 0.99, 0.90

#: Of new channels, the shares that may be equal to their sources some steps after an expansion: above the
#: first it is no-go, above the second noted. Measured: none, or all (docs/evidence.md, "In one screen").
LOCKED_SHARE, FEW_LOCKED = 0.5, 0.05
#: A cosine above this, so many steps after the expansion, is noted.
SLOW_COSINE, SLOW_STEPS = 0.995, COSINE_STEPS

#: How far new entries are from where they began, over how far old ones are, is usually between these.
UPDATE_RATIO = (0.5, 4.0)
#: A logged loss by this share above the line of the run before the expansion is noted.
LOSS_ABOVE = 0.03

LOCKED = "Locked: copies would stay equal to their sources for ever. Do not train on this output."
NO_REWARMUP = "No re-warmup: new entries would train at the learning rate of the old ones."
MOVED = "The signal is not kept: read what moved before you train on."
READY = "Ready to train on."


def _good(text: str) -> Finding:
    return Finding(level="good", text=text)


def _note(text: str) -> Finding:
    return Finding(level="note", text=text)


def _attention(text: str) -> Finding:
    return Finding(level="attention", text=text)


def verdict_of_expansion(
    activations: Activations | None,
    activations_missing: str,
    learning_rate: LearningRate | None,
    learning_rate_missing: str,
    locked: str | None,
    warnings: Sequence[str],
    *,
    copies: bool | None,
    keeps_function: bool,
    remedy: str = "",
) -> Verdict:
    """The verdict on an expansion, by the order of harm: locked copies, no re-warmup, what moved, the rest.

    Args:
        activations: measured before and after, if they were.
        activations_missing: why not.
        learning_rate: the re-warmup, if the baseline is known.
        learning_rate_missing: why not, and what to do.
        locked: why copies cannot part from their sources; None where they can.
        warnings: of the plan.
        copies: whether new entries start as copies on both sides; None where nothing but layers is new.
        keeps_function: whether this widening is exactly function-preserving.
        remedy: what would keep a signal that has moved, in a sentence.
    """
    symmetry = list(_symmetry(locked, copies))
    schedule = list(_schedule(learning_rate, learning_rate_missing))
    if activations is None:
        text = f"Activations were not measured: {activations_missing or 'not asked for'}."
        signal = [_note(text)]
    else:
        exact = keeps_function and copies is None  # layers that add nothing round nothing
        signal = list(_signal(activations, keeps_function=keeps_function, exact=exact))
        if remedy and _needs_attention(signal):
            signal.append(_attention(remedy))
    known = {finding.text for finding in (*symmetry, *schedule, *signal)}
    others = [_attention(sentence(w)) for w in warnings if sentence(w) not in known]
    if locked is not None:
        headline = LOCKED
    elif learning_rate is None:
        headline = NO_REWARMUP
    elif _needs_attention(signal):
        headline = MOVED
    else:
        headline = ""
    return _verdict([*symmetry, *schedule, *signal, *others], headline)


def verdict_of_change(activations: Activations, trained: int | None = None, instead: str = "") -> Verdict:
    """The verdict on the difference between two checkpoints, of which nothing else is known.

    Args:
        activations: of both.
        trained: steps of training that lie between them; None where that is not known.
        instead: what would judge the training alone, in a sentence.
    """
    findings = list(_signal(activations, keeps_function=None))
    moved_away = _needs_attention(findings)
    if trained:
        said = (
            f"{trained:,} steps of training lie between the two: what moved is what they have learned, too."
        )
        findings.insert(0, _note(f"{said} {instead}".strip()))
        return _verdict(
            findings, f"{trained:,} steps of training lie between: this says little of a widening."
        )
    return _verdict(findings, "The signal is not kept: read what moved." if moved_away else "Signal kept.")


def verdict_of_training(
    symmetry: Symmetry,
    logged: LoggedLoss | None,
    change: Activations | None,
    nonfinite: Sequence[str],
    steps: int | None,
    alike: str = "",
) -> Verdict:
    """Go or no-go, some steps after an expansion: have copies parted, is the loss where it should be.

    Args:
        symmetry: of new channels and their sources, and how far new and old entries moved.
        logged: the log's losses since then, if there is a log.
        change: from the expanded checkpoint to this one, if it was measured.
        nonfinite: names of weights and state with NaN or Inf.
        steps: trained since; None where the checkpoints do not say it.
        alike: why new copies began with the state of their sources; "" where they did not.
    """
    findings = [*_parted(symmetry, steps, alike), *_travelled(symmetry, steps), *_logged(logged)]
    if nonfinite:
        findings.append(_attention(f"NaN or Inf in {len(nonfinite)} tensors: {nonfinite[0]}."))
    if change is None:
        findings.append(_note("The loss was not measured."))
    else:
        findings += [*_finiteness(change), *_loss(change, None)]
    stop = _needs_attention(findings)
    return _verdict(findings, "No-go: do not train on from here." if stop else "Go: train on.")


def _parted(symmetry: Symmetry, steps: int | None, alike: str) -> Iterator[Finding]:
    """Whether new channels have left their sources, against what was measured in other runs.

    Copies with their sources' state differ from them by the re-warmup's rate alone: no longer equal, and
    nearly parallel. How far they are apart does not tell that from copies that part, so it is not judged.
    """
    locked, cosine = symmetry.locked, symmetry.cosine
    if alike:
        yield _attention(
            f"By the manifest, {alike}: such copies and their sources get the same gradients, and differ by "
            "their learning rate alone where the re-warmup is applied, else not at all. Expand again with "
            "--optimizer asymmetric, or by an --init that is no copy."
        )
        yield _note(
            f"{percent(locked)} of new channels are still equal to their sources; the mean cosine to them "
            f"is {significant(cosine, 4)}."
        )
        return
    if steps == 0:
        yield _note("Nothing was trained since the expansion: every copy is its source.")
        return
    if locked is None or locked > LOCKED_SHARE:
        yield _attention(
            f"{percent(locked)} of new channels are still equal to their sources (limit "
            f"{LOCKED_SHARE:.0%}; measured: 0% after the first steps with the optimizer's state, 100% for "
            "ever without it). Was that state loaded, and was it --optimizer asymmetric?"
        )
    else:
        few = locked <= FEW_LOCKED
        yield Finding(
            level="good" if few else "note",
            text=f"{percent(locked)} of new channels are still equal to their sources"
            + ("." if few else ": so are those that get no gradient, of experts without tokens for one."),
        )
    slow = steps is not None and steps >= SLOW_STEPS and cosine is not None and cosine > SLOW_COSINE
    yield Finding(
        level="note" if slow else "good",
        text=f"The mean cosine of new channels to their sources is {significant(cosine, 4)}"
        + (
            f" after {steps:,} steps; elsewhere it was {COSINE:g} after {COSINE_STEPS:,} (docs/evidence.md)."
            if slow
            else "."
        ),
    )


def _travelled(symmetry: Symmetry, steps: int | None) -> Iterator[Finding]:
    """Whether new entries train, and no further than old ones by much."""
    ratio = symmetry.moved
    if ratio is None or steps == 0:
        return
    low, high = UPDATE_RATIO
    text = f"New entries are {significant(ratio)} times as far from where they began as old ones"
    if ratio == 0:
        yield _attention("New entries have not moved, and old ones have: they are not trained.")
    elif low <= ratio <= high:
        yield _good(f"{text}.")
    elif ratio < low:
        yield _note(f"{text}, where {low:g} to {high:g} is usual: is the re-warmup applied?")
    else:
        yield _note(
            f"{text}, where {low:g} to {high:g} is usual: with Adam's beta2 near 1 their first updates are "
            "long. That parts copies sooner, and helped where it was measured; should the loss spike, "
            "--bias-correction fresh takes it out (docs/how-to/choosing.md)."
        )


def _logged(logged: LoggedLoss | None) -> Iterator[Finding]:
    """Whether the log goes on where the run would have gone without the expansion."""
    if logged is None or logged.loss is None or logged.forecast is None:
        return
    above = logged.loss / logged.forecast - 1
    text = (
        f"The log's last {logged.values} losses are {logged.loss:.4f} on average, "
        f"{signed(logged.loss - logged.forecast)} against {logged.forecast:.4f}, the line of the run before "
        "the expansion"
    )
    if above > LOSS_SHARE:
        yield _attention(f"{text}: more than {LOSS_SHARE:.0%} above it.")
    elif above > LOSS_ABOVE:
        yield _note(f"{text}: more than {LOSS_ABOVE:.0%} above it; look again some steps later.")
    else:
        yield _good(f"{text}.")


def _verdict(findings: list[Finding], headline: str) -> Verdict:
    attention = [finding for finding in findings if finding.level == "attention"]
    noted = [finding for finding in findings if finding.level == "note"]
    level: Level = "attention" if attention else "note" if noted else "good"
    if not headline:
        if attention:
            count = "One thing needs" if len(attention) == 1 else f"{len(attention)} things need"
            headline = f"{count} your attention before you train on."
        else:
            headline = READY if not noted else "Ready to train on; read the notes."
    return Verdict(
        level=level,
        headline=headline,
        findings=tuple(sorted(findings, key=lambda finding: finding.level != "attention")),
    )


def _needs_attention(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "attention" for finding in findings)


def _symmetry(locked: str | None, copies: bool | None) -> Iterator[Finding]:
    if locked is not None:
        yield _attention(sentence(locked))
    elif copies is None:
        yield _good(
            "New layers get gradients of their own, as they stand at other depths than their sources: "
            "nothing is locked to a copy."
        )
    elif copies:
        yield _good(
            "Old entries keep their optimizer state and new ones start from zero, so copies of "
            "old entries part from them at the first step."
        )
    else:
        yield _good("New entries start different from their sources, so nothing is locked to a copy.")


def _schedule(learning_rate: LearningRate | None, missing: str) -> Iterator[Finding]:
    if learning_rate is None:
        text = f"No re-warmup schedule was written: {missing or 'the old schedule is not known'}."
        yield _attention(text)
        return
    yield _good(
        f"New entries re-warm over {learning_rate.rewarmup_steps} steps to {learning_rate.rho:g} x the "
        "learning rate at the expansion. Only the training side can apply it: add the callback or hook."
    )


def _signal(
    activations: Activations, *, keeps_function: bool | None, exact: bool = False
) -> Iterator[Finding]:
    """Findings on two models: functions of the blocks, residual stream, logits, loss, routing."""
    strayed = exact and (activations.logit_change or 0.0) > STREAM_ROUNDING
    yield from _finiteness(activations)
    yield from _functions(activations)
    yield from _stream(activations)
    yield from _logits(activations, strayed=strayed)
    yield from _loss(activations, keeps_function and not strayed)
    yield from _routing(activations)


def _finiteness(activations: Activations) -> Iterator[Finding]:
    broken = [e.name for e in (*activations.layers, *activations.functions) if e.y_after is None]
    broken += [point.name for point in activations.residual if point.after is None]
    broken += ["the logits"] if activations.logits.after is None else []
    if broken:
        yield _attention(
            f"Activations are not finite after the change in {len(broken)} place(s), the first is "
            f"{broken[0]}."
        )


def judged(activations: Activations) -> tuple[tuple[LayerActivation, ...], str, str]:
    """What the verdict looks at, its ratio in words, and what it is called: functions, where there are any.

    In a model whose blocks are not found (no list of blocks, or nothing is added to a stream), the linear
    layers have to stand for them.
    """
    if activations.functions:
        return activations.functions, "RMS(f(Norm h))/RMS(h)", "functions of the blocks"
    return activations.layers, "RMS(y)/RMS(x)", "linear layers"


def offenders(activations: Activations) -> list[LayerActivation]:
    """What the verdict names: functions whose ratio moved by more than the limit, the farthest first."""
    entries, _, _ = judged(activations)
    return sorted((e for e in entries if e.far()), key=lambda e: -e.moved)


def _functions(activations: Activations) -> Iterator[Finding]:
    entries, ratio, what = judged(activations)
    if not entries:
        return
    limit = f"{DEVIATION_LIMIT:.0%}"
    far = offenders(activations)
    if far:
        kinds = {e.role: [f for f in far if f.role == e.role] for e in far}
        words = "; ".join(
            f"{kind} in {len(found)} of {sum(e.role == kind for e in entries)}, "
            f"most in {found[0].name} ({_moved(found[0])})"
            for kind, found in kinds.items()
        )
        yield _attention(
            f"The signal ratio {ratio} moved by more than {limit} in {len(far)} of {len(entries)} "
            f"{what}: {words}.{_added(activations)}"
        )
        return
    worst = max(entries, key=lambda e: e.moved)
    farthest = (
        "none moved by more than rounding"
        if worst.moved < 5e-5
        else f"the farthest, {worst.name}, moved {_by(worst)}"
    )
    yield _good(f"All {len(entries)} {what} keep their signal ratio {ratio} within {limit}; {farthest}.")
    matrix = activations.worst(1)
    if activations.functions and matrix and matrix[0].far():
        yield _good(
            f"RMS(y)/RMS(x) of a single matrix may move where its block does not: {matrix[0].name} "
            f"moved {_by(matrix[0])}."
        )


def _moved(entry: LayerActivation) -> str:
    return moved(entry.deviation, entry.r_before, entry.r_after)


def _by(entry: LayerActivation) -> str:
    words = _moved(entry)
    return words if words.startswith("from") else f"by {words}"


def _added(activations: Activations) -> str:
    """By how much the RMS of what each kind of function adds moved."""
    ranges = []
    for kind in dict.fromkeys(entry.role for entry in activations.functions):
        found = [e for e in activations.functions if e.role == kind and e.y_before and e.y_after is not None]
        changes = [e.y_after / e.y_before - 1 for e in found]  # type: ignore[operator]
        if changes:
            low, high = moved(min(changes)), moved(max(changes))
            ranges.append(f"{kind} {low}" if low == high else f"{kind} {low} to {high}")
    return f" RMS of what is added to the stream: {', '.join(ranges)}." if ranges else ""


def _stream(activations: Activations) -> Iterator[Finding]:
    growth = activations.growth
    if not growth:
        return
    point, deviation = max(growth, key=lambda pair: float("inf") if pair[1] is None else abs(pair[1]))
    if deviation is None or abs(deviation) > DEVIATION_LIMIT:
        yield _attention(
            f"The residual stream grows otherwise over depth: behind {point.name} its RMS, relative to "
            f"the embeddings, moved by {moved(deviation)}."
        )


def _logits(activations: Activations, *, strayed: bool) -> Iterator[Finding]:
    logits = activations.logits
    if logits.moved > DEVIATION_LIMIT:
        change = "" if logits.before == 0 else f" by {moved(logits.deviation)}"
        yield _attention(
            f"The RMS of the logits moved{change}, from "
            f"{significant(logits.before)} to {significant(logits.after)}."
        )
    difference = activations.logit_change
    if difference is None:
        return
    if difference == 0:
        yield _good("The function is preserved: every logit is equal to the last bit.")
    elif difference <= STREAM_ROUNDING:
        yield _good(
            f"The function is preserved to rounding: logits differ by {percent(difference)} of their RMS."
        )
    else:
        text = f"Logits moved by {percent(difference)} of their RMS"
        stream = [point for point in activations.diverging if (point.difference or 0.0) > STREAM_ROUNDING]
        if stream:
            places = {one.name: percent(one.difference) for one in (stream[0], stream[-1])}
            words = " and ".join(f"{share} behind {name}" for name, share in places.items())
            text += f", and the residual stream by {words}"
        if strayed:
            yield _attention(
                f"{text}, although new layers should add nothing: old ones are not what they were. "
                "Compare logits in float32 before you train on."
            )
        else:
            yield _good(f"{text}.")


def _loss(activations: Activations, keeps_function: bool | None) -> Iterator[Finding]:
    before, after = activations.loss_before, activations.loss_after
    if before is None or after is None:
        return
    text = f"The loss goes from {before:.4f} to {after:.4f} ({signed(after - before)})"
    where = " on random tokens, which says little" if activations.random_tokens else ""
    uniform = log(activations.vocabulary)
    if keeps_function and abs(after - before) > LOSS_TOLERANCE:
        yield _attention(
            f"{text}{where}, although this widening should keep the function: "
            "compare logits in float32 before you train on."
        )
    elif not activations.random_tokens and before < uniform < after:
        yield _attention(
            f"{text}: worse than uniform prediction, which costs log({activations.vocabulary}) = "
            f"{uniform:.4f}. The model has lost what it knew; choose another --init."
        )
    elif not activations.random_tokens and after - before > LOSS_SHARE * before:
        yield _attention(f"{text}, by {percent(after / before - 1)}: more than a small jump at the boundary.")
    elif keeps_function or abs(after - before) <= LOSS_TOLERANCE:
        change = activations.logit_change
        equal = keeps_function or (change is not None and change <= STREAM_ROUNDING)
        what = "the function is kept" if equal else "nearly as before"
        yield _good(f"{text}{where}: {what}.")
    elif after < before:
        yield _good(f"{text}{where}.")
    else:
        yield _good(
            f"{text}{where}. A jump at the boundary is expected here and does not predict the final loss."
        )


def _routing(activations: Activations) -> Iterator[Finding]:
    kept = activations.routed_as_before
    if kept is None:
        return
    level: Level = "good" if kept >= ROUTING_NOTE else "note" if kept >= ROUTING_LIMIT else "attention"
    worst = min(activations.routing, key=lambda router: router.kept)
    text = f"{kept:.1%} of tokens are routed to the experts that they were routed to before"
    if level != "good":
        text += f" (in {worst.name} {worst.kept:.1%}): experts see tokens that they were not trained on"
    yield Finding(level=level, text=f"{text}.")


def sentence(text: str) -> str:
    """A warning or note as a sentence: with a capital, unless it begins with the name of something."""
    first = text.split(" ", 1)[0]
    word = first.removeprefix("re-").isalpha() and first.islower()
    start = text[:1].upper() if word else text[:1]
    return start + text[1:].rstrip(".") + "."
