"""What a user should know, and what a user should act on, before anything is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import log1p

from sparkling_cli.errors import SpecError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.formats.optimizer_states import FSDP_COPY
from sparkling_cli.layout.depth import LAYERS, new_layers
from sparkling_cli.layout.expr import COUNTED
from sparkling_cli.layout.model import ModelLayout, entries_of
from sparkling_cli.layout.names import compress
from sparkling_cli.plan.model import Row
from sparkling_cli.plan.resolve import all_chosen
from sparkling_cli.plan.steps import step_notes
from sparkling_cli.plan.symmetry import locked_axes, locked_within, parting_inits
from sparkling_cli.results.evidence import INNER, decay_note
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.widening.geometry import Growth

#: the format of ``transformers`` directories, as ``checkpoint.trainer`` names it
TRAINER = "trainer"


def notes_for(
    checkpoint: Checkpoint,
    layout: ModelLayout,
    spec: ExpansionSpec,
    growth: Mapping[str, Growth],
    renamed: bool,
) -> tuple[str, ...]:
    """Facts about this expansion."""
    notes = [*checkpoint.notes]
    if not checkpoint.states and not any("no optimizer state" in note for note in notes):
        notes.append("there is no optimizer state in the source: the output has weights only")
    if renamed:
        notes.append(
            "weights are written under the module's names: resuming a Trainer run skips the name "
            "conversion of this class; from_pretrained reads both"
        )
    asked = {layout.aliases.get(axis.axis, axis.axis) for axis in spec.axes}
    if "kv_heads" in asked and "heads" not in asked and "q_per_kv" in layout.axes:
        kv = growth["kv_heads"]
        per_kv = layout.axes["q_per_kv"].size
        notes.append(f"query heads grow with their groups: {kv.source * per_kv} -> {kv.target * per_kv}")
    fractional = [a for a, g in growth.items() if g.target % g.source and a not in COUNTED]
    if fractional and spec.init == "copy-copy" and spec.scaling == "rms":
        near = ", ".join(f"{a} {max(2, round(growth[a].target / growth[a].source))}x" for a in fractional)
        notes.append(
            f"fractional growth of {', '.join(fractional)} keeps RMS, not the function: the loss may jump "
            f"(the nearest whole factor, which keeps it: {near}; or --scaling calibrated)"
        )
    if spec.optimizer.startswith("asymmetric"):
        notes += undecayed_notes(checkpoint, growth, spec.init)
    if "experts" in growth:
        notes.append(_experts_note(growth, layout))
    if LAYERS in growth:
        notes.append(_layers_note(spec, growth[LAYERS]))
        if LAYERS not in layout.config.values():
            notes.append(
                "the checkpoint does not say how many layers there are: build the model with "
                f"{growth[LAYERS].target}"
            )
    if "vocab" in growth:
        notes += _vocab_notes(checkpoint, spec, growth["vocab"])
    return (*notes, *step_notes(checkpoint, layout, growth))


def _experts_note(growth: Mapping[str, Growth], layout: ModelLayout) -> str:
    """What copies of experts do to routing."""
    experts = growth["experts"]
    orders = experts.by_layer or (experts.sources,)
    every = [count for order in orders for count in Counter(order).values()]
    if len(set(every)) > 1:
        return (
            f"there are {min(every)} to {max(every)} of each expert, copies included: a token goes to all of "
            "the best of its experts first, so to fewer different ones, and scores that are shares of all "
            "are smaller; no number of experts for each token keeps the function"
        )
    times = experts.target // experts.source
    if "experts_per_token" not in layout.axes:
        return (
            f"how many experts a token goes to is not in the checkpoint: built with {times} times as many, "
            f"the model sends it to all {times} copies of each, and computes what it did; with as many as "
            "before it takes copies of the best alone, and does not"
        )
    if all_chosen(growth):
        return f"every token goes to all {times} copies of each expert that it went to: the function is kept"
    if experts.source == 1:
        return (
            "all experts are copies of the only one, whichever a token goes to: the function is kept where "
            "the weights of the chosen ones add up to 1 (norm_topk_prob)"
        )
    if "experts_per_token" in growth:
        return (
            f"experts_per_token grows by less than experts: a token goes to {times} copies of the best of "
            "its experts and not to all of the others, so the function is not kept"
        )
    return (
        f"experts_per_token stays: a token goes to {times} copies of the best of its experts and no others, "
        "so the function is not kept; --axis experts_per_token by the same factor keeps it, at "
        "the cost of more experts for each token"
    )


def _layers_note(spec: ExpansionSpec, layers: Growth) -> str:
    """Where new layers are, and what they do to the function."""
    new = new_layers(layers.order)
    places = compress(target for target, flag in enumerate(new) if flag)
    text = (
        f"layers {places} of the output are new (counted from 0), the others are the old ones in their order"
    )
    if spec.layer_mode == "identity":
        return f"{text}; new ones add nothing to the residual stream yet: the function is kept"
    return f"{text}; new ones do again what their sources do, so the function is not kept"


#: Config keys of a cap on logits, which are no linear function of the head's rows then.
_CAPPED = re.compile(r"(final|output).*soft_?cap|logits?_soft_?cap")


def _vocab_notes(checkpoint: Checkpoint, spec: ExpansionSpec, vocab: Growth) -> list[str]:
    """What a larger vocabulary leaves to the user, and how much the loss on old tokens can rise.

    Of a new token t whose row is the mean of the rows of old tokens S, the logit is the mean of theirs, and
    exp(mean) <= mean(exp) (Jensen). So all new tokens together add to the softmax's denominator Z at most
    sum_s w_s exp(z_s) <= max(w) Z, where w_s is the sum of 1/|S| over the means that s is in.
    """
    new = vocab.target - vocab.source
    notes = [
        f"the vocabulary has {new} new entries, {vocab.source} to {vocab.target - 1}; the tokenizer's files "
        "stay as they are: its new tokens are yours to add"
    ]
    if spec.vocab_fill != "mean":
        notes.append(
            f"new rows are {spec.vocab_fill}: nothing bounds what they add to the loss on old tokens"
        )
    elif any(value and _CAPPED.search(key) for key, value in (checkpoint.config or {}).items()):
        notes.append("logits are capped: no bound holds for what new rows add to the loss on old tokens")
    else:
        named: dict[int, float] = {0: 0.0}
        for means in vocab.means or ((),) * new:
            for token in means:
                named[token] = named.get(token, 0.0) + 1 / len(means)
        everywhere = sum(not means for means in vocab.means or ((),) * new) / vocab.source
        most = everywhere + max(named.values())
        notes.append(
            f"new rows of the head are means of old ones: the loss on old tokens rises by at most "
            f"log(1 + {most:.4g}) = {log1p(most):.4g}"
        )
    return notes


#: A smaller share of the parameters of all MLPs is worth a word.
_SMALL = 0.1


def small_share(layout: ModelLayout, growth: Mapping[str, Growth]) -> str | None:
    """That an inner width grows which few of the MLPs' parameters have, while a wider spread one does not.

    In a class whose first layers are dense, ``ffn`` may be theirs alone.
    """
    held = {
        axis: sum(entries_of(p, layout.sizes) for p in layout.tensors if axis in p.dims.axes())
        for axis in INNER
        if axis in layout.axes
    }
    total = sum(held.values())
    asked = [axis for axis in held if axis in growth]
    left = [axis for axis in held if axis not in growth and layout.axes[axis].widenable]
    if not asked or not left or sum(held[axis] for axis in asked) >= _SMALL * total:
        return None
    most = max(left, key=lambda axis: held[axis])
    share = sum(held[axis] for axis in asked) / total
    return (
        f"{' and '.join(asked)} is in {share:.1%} of the MLPs' parameters; {most} is in "
        f"{held[most] / total:.1%} of them: --axis {most} is probably meant"
    )


def check_locked(
    checkpoint: Checkpoint,
    layout: ModelLayout,
    spec: ExpansionSpec,
    growth: Mapping[str, Growth],
    *,
    moments: bool,
) -> str | None:
    """Copies part from their sources: by the fills that are used, or by their optimizer state.

    Args:
        checkpoint: the source.
        layout: of the model.
        spec: what was asked for.
        growth: of the plan, with the fills that are used.
        moments: whether there is optimizer state that is parameter-shaped and no copy of the weights.

    Returns:
        A warning where copies stay locked and the spec allows it, or in new layers and experts alone; None
        where they part.

    Raises:
        SpecError: they stay locked, and the spec does not allow it.
    """
    optimizer = spec.optimizer if moments else None
    stateless = _stateless(checkpoint, layout, growth) if moments else {}
    locked = symmetry_warning(growth, optimizer) or symmetry_warning(
        stateless, None, "the optimizer has no state for any of their parameters:"
    )
    if locked is None:
        return within_warning(layout, spec, growth)
    if spec.allow_locked:
        return locked
    if not moments and any(set(state.tensors) - {FSDP_COPY} for state in checkpoint.states):
        return (  # of torch's ASGD, for one: what else it keeps may be more than is known here
            "the optimizer's state holds copies of the weights and no moments: copies and their sources may "
            f"stay equal for ever (axes {', '.join(locked_axes(growth, None))}); --init random-copy parts "
            "them"
        )
    ways = []
    if optimizer is not None and not stateless:
        ways.append("use --optimizer asymmetric (the default)")
    elif checkpoint.format == TRAINER and not checkpoint.states:
        ways.append("copy optimizer.pt into the checkpoint")
    inits = parting_inits(growth, layout, spec)
    if inits:
        ways.append(f"choose {' or '.join(f'--init {init}' for init in inits)}")
    ways.append("add --allow-locked for an experiment")
    raise SpecError(locked, hint="; or ".join(ways))


def within_warning(layout: ModelLayout, spec: ExpansionSpec, growth: Mapping[str, Growth]) -> str | None:
    """What to know of copies that part in old layers and experts alone; None where they part in all.

    Args:
        layout: of the model before.
        spec: what was asked for.
        growth: of the plan, with the fills that are used.
    """
    locked = locked_within(growth, layout)
    if not locked:
        return None
    inside = {axis: growth[axis] for axes in locked.values() for axis in axes}
    inits = parting_inits(inside, layout, spec)
    ways = [f"--init {init} parts them, or " for init in inits[-1:]]
    where = "; ".join(f"of {', '.join(axes)} in new {outer}" for outer, axes in locked.items())
    return (
        f"copies {where} stay equal to their sources for ever, as neither has state; in old ones they part: "
        f"{''.join(ways)}grow them later, in an expansion of their own (docs/evidence.md)"
    )


def _stateless(
    checkpoint: Checkpoint, layout: ModelLayout, growth: Mapping[str, Growth]
) -> dict[str, Growth]:
    """The axes of whose parameters the optimizer has state of none."""
    sized = {axis for pattern in layout.tensors for axis in pattern.dims.axes()}  # the rest are mere numbers
    left = {axis: grown for axis, grown in growth.items() if axis in sized}
    for state in checkpoint.states:
        name = layout.canonical(state.param)
        if left and set(state.tensors) - {FSDP_COPY} and layout.module_table.has(name):
            for axis in layout.module_table.find(name).dims.axes() & left.keys():
                del left[axis]
    return left


def symmetry_warning(
    growth: Mapping[str, Growth],
    optimizer: str | None,
    cause: str = "there is no optimizer state: under a fresh optimizer",
) -> str | None:
    """The one sentence on copies that no optimizer state tells from their sources; None where they part.

    Args:
        growth: of the plan.
        optimizer: what becomes of the state; None where there is none.
        cause: why there is none.
    """
    locked = locked_axes(growth, optimizer)
    if not locked:
        return None
    if optimizer is not None:
        cause = f"the optimizer state is {'copied' if optimizer == 'copy' else 'dropped'}:"
    return (
        f"{cause} copies and their sources get equal updates and stay equal for ever "
        f"(axes {', '.join(locked)})"
    )


def undecayed_notes(checkpoint: Checkpoint, growth: Iterable[str], init: str) -> list[str]:
    """What was measured of copies under Adam without weight decay, where the optimizer has none."""
    decays = [group.get("weight_decay") for group in checkpoint.param_groups if "betas" in group]
    note = decay_note(growth, init) if decays and all(decay == 0 for decay in decays) else None
    return [note] if note else []


def turned_notes(rows: Iterable[Row]) -> Iterator[str]:
    """What became of factors that keep the other side of their matrices than before."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.slot and any(dim.target < dim.source for dim in row.recipe.view):
            found.setdefault(row.slot, []).append(row.name)
    for slot, names in found.items():
        yield (
            f"{slot} of {len(names)} matrices ({names[0]}, ...) had a mean for every column, and at the new "
            "sizes has one for every row: each is the mean of all old entries"
        )
