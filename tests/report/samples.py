"""Reports to draw: a good one, and one in which much went wrong."""

from __future__ import annotations

from math import cos, pi

from sparkling_cli.results.account import Account, AccountEntry, AccountLine, Fate, Kind
from sparkling_cli.results.base import change, deviation_of
from sparkling_cli.results.expansion import (
    AxisChange,
    Compute,
    LearningRate,
    OptimizerSummary,
    Provenance,
    Report,
    Size,
    StateSlot,
    TensorChange,
)
from sparkling_cli.results.measured import Activations, LayerActivation, ResidualPoint
from sparkling_cli.results.verdict import verdict_of_expansion

SPEC = {
    "axes": [{"axis": "ffn", "factor": 2.0, "to": None}],
    "init": "copy-copy",
    "scaling": "rms",
    "optimizer": "asymmetric",
    "rewarmup": {"rho": 1.3, "steps": 250, "bias_correction": "inherit"},
    "seed": 0,
}
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def entry(name: str, role: str, layer: int, widened: bool, r: float, moved: float) -> LayerActivation:
    """A linear layer or a function of a block whose input has an RMS of one."""
    return LayerActivation(
        name=name,
        role=role,
        layer=layer,
        widened=widened,
        x_before=1.0,
        x_after=1.0,
        y_before=r,
        y_after=r * (1 + moved),
        r_before=r,
        r_after=r * (1 + moved),
        deviation=moved,
    )


def point(layer: int | None, before: float, after: float, apart: float = 0.0) -> ResidualPoint:
    """A place of the residual stream."""
    name = "embeddings" if layer is None else f"model.layers.{layer}"
    return ResidualPoint(
        name=name, layer=layer, before=before, after=after, deviation=deviation_of(before, after),
        difference=apart, cosine=1 - apart**2 / 2,
    )  # fmt: skip


def activations(layers: int = 24, *, off: float = 0.0) -> Activations:
    """Made-up measurements; ``off`` is how far the widened layers moved."""
    entries, functions = [], []
    for layer in range(layers):
        for n, role in enumerate(ROLES):
            widened = role in ("gate_proj", "up_proj", "down_proj")
            moved = off * cos(layer * 0.9 + n) if widened else off * 0.02
            r = 0.6 + 0.1 * n + 0.2 * cos(layer / 5 + n)
            block = "mlp" if widened else "self_attn"
            entries.append(entry(f"model.layers.{layer}.{block}.{role}", role, layer, widened, r, moved))
            if role in ("o_proj", "down_proj"):
                functions.append(entry(f"model.layers.{layer}.{block}", block, layer, widened, r, moved))
    residual = [
        point(i, 0.1 * 1.25**i, 0.1 * 1.25**i * (1 + off / 4), off * i / layers) for i in range(layers)
    ]
    return Activations(
        data="the bundled text, through the checkpoint's tokenizer",
        random_tokens=False,
        tokens=4096,
        layers=tuple(entries),
        functions=tuple(functions),
        residual=(point(None, 0.1, 0.1), *residual),
        logits=change(8.0, 8.0),
        loss_before=2.3673,
        loss_after=2.3673 + off,
        logit_change=4e-7 + off,
        logit_largest=4e-7 + off,
        vocabulary=50304,
        routing=(),
        only_before=(),
        only_after=(),
    )


def learning_rate(total: int = 60000, at: int = 30000) -> LearningRate:
    """Cosine with 3% warmup, re-warmed at the expansion."""
    peak, low, warmup, tau, rho = 1.9556e-3, 1.9556e-5, round(0.03 * total), 250, 1.3

    def old(t: float) -> float:
        if t < warmup:
            return peak * t / warmup
        return low + (peak - low) * (1 + cos(pi * (t - warmup) / (total - warmup))) / 2

    base = old(at)

    def new(t: int) -> float | None:
        if t < at:
            return None
        if t - at < tau:
            return base * (1 + (rho - 1) * (t - at) / tau)
        return low + (rho * base - low) * (1 + cos(pi * (t - at - tau) / (total - at - tau))) / 2

    steps = sorted({*range(0, total + 1, total // 200), warmup, at, at + tau})
    return LearningRate(
        baseline="cosine",
        expansion_step=at,
        total_steps=total,
        rho=rho,
        rewarmup_steps=tau,
        rate_at_expansion=base,
        peak_new=rho * base,
        minimum=low,
        bias_correction="inherit",
        steps=tuple(steps),
        old=tuple(map(old, steps)),
        new=tuple(map(new, steps)),
    )


def tensors() -> tuple[TensorChange, ...]:
    """The MLP of a dense model."""
    up = TensorChange(
        name="model.layers.{layers}.mlp.up_proj.weight",
        layout="ffn <- hidden",
        before=(2816, 1024),
        after=(5632, 1024),
        new_dims=(0,),
        role="fan-out",
        scale=(1.0, 1.0),
        fill=("copy",),
        count=24,
    )
    gate = up.model_copy(update={"name": "model.layers.{layers}.mlp.gate_proj.weight"})
    down = TensorChange(
        name="model.layers.{layers}.mlp.down_proj.weight",
        layout="hidden <- ffn",
        before=(1024, 2816),
        after=(1024, 5632),
        new_dims=(1,),
        role="fan-in",
        scale=(0.5, 0.5),
        fill=("copy",),
        count=24,
    )
    return gate, up, down


def account() -> Account:
    """Weights, moments and a random state."""
    weights, moments = 816_000_000, 3_264_000_000

    def line(kind: Kind, fate: Fate, tensors: int, before: int, after: int) -> AccountLine:
        return AccountLine(kind=kind, fate=fate, tensors=tensors, bytes_before=before, bytes_after=after)

    lines = (
        line(Kind.WEIGHT, Fate.WIDENED, 72, weights, 2 * weights),
        line(Kind.MOMENT, Fate.WIDENED, 580, moments, 2 * moments),
        line(Kind.OTHER, Fate.CARRIED, 1, 5056, 5056),
    )
    state = AccountEntry(
        name="rng_state.pth: cpu", dtype="uint8", shape=(5056,), kind=Kind.OTHER, fate=Fate.CARRIED
    )
    return Account(lines=lines, entries=(state,))


def report(*, good: bool = True, layers: int = 24, bare: bool = False) -> Report:
    """A whole report; ``bare`` leaves out all that can be missing."""
    measured = None if bare else activations(layers, off=0.0 if good else 0.24)
    missing = "the checkpoint has no model that can be built" if bare else ""
    rate = None if bare else learning_rate()
    entries = 2_816 * 1024 * 3 * 24 * 2
    summary = OptimizerSummary(
        treatment="asymmetric" if good else "copy",
        name="AdamW",
        beta2=0.95,
        slots=tuple(
            StateSlot(slot=slot, tensors=290, entries=entries, kept=entries * 3 // 5, bytes=4 * entries)
            for slot in ("exp_avg", "exp_avg_sq")
        ),
    )
    warnings = () if good else ("beta2 is 0.999: the first updates of new entries are up to 6.6x the usual.",)
    return Report(
        source="checkpoint-30000",
        destination="checkpoint-30000-ffn2x",
        model="LlamaForCausalLM",
        command="sparkling expand checkpoint-30000 checkpoint-30000-ffn2x --axis ffn --factor 2",
        spec=SPEC,
        axes=(AxisChange(axis="ffn", before=2816, after=5632, original=2816),),
        tensors=tensors(),
        account=account(),
        before=Size(
            parameters=408_000_000,
            active=408_000_000,
            embedding=50_000_000,
            weight_bytes=816_000_000,
            state_bytes=3_264_000_000,
        ),
        after=Size(
            parameters=616_000_000,
            active=616_000_000,
            embedding=60_000_000,
            weight_bytes=1_232_000_000,
            state_bytes=4_928_000_000,
        ),
        activations=measured,
        activations_missing=missing,
        learning_rate=rate,
        learning_rate_missing="the baseline schedule is not known" if bare else "",
        optimizer=None if bare else summary,
        compute=None if bare else Compute(expansion_step=30000, total_steps=60000, saved=0.169),
        provenance=Provenance(
            tool="sparkling-cli",
            version="0.1.0",
            source="checkpoint-30000",
            format="trainer",
            tensors=873,
            source_digest="5f3a90c1",
            stages=("step 30,000: ffn 2,816 → 5,632",),
        ),
        notes=(
            "Resume from the output with the same arguments; the model's sizes come from its config.json.",
        ),
        warnings=warnings,
        verdict=verdict_of_expansion(
            measured,
            missing,
            rate,
            "the baseline schedule is not known",
            None if good and not bare else "copies stay equal for ever",
            warnings,
            copies=True,
            keeps_function=True,
        ),
    )
