"""What messages and pages say of our measurements is what the records in ``benchmarks/results`` hold."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.train import horizon, models, table
from benchmarks.train.horizon import COPY_COPY, KEPT, Setting, above
from benchmarks.train.jobs import SCRATCH, Widening
from benchmarks.train.loop import preset
from sparkling_cli.results import evidence, verdict

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
#: final losses of the paper's Table 6: copy-copy, zero-copy, random-copy, each with both measures
PAPER = (2.3153, 2.3154, 2.3171)
#: optimizer -> how far random-zero that keeps the function was behind copy-copy at most
BEHIND = {"muon": "0.007", "muon-original": "0.005", "soap": "0.002"}


@pytest.fixture(scope="module")
def found() -> list[Setting]:
    """Every setting of the records."""
    return horizon.settings(ROOT / "benchmarks" / "results")


@pytest.fixture(scope="module")
def quoted(found: list[Setting]) -> dict[int, Setting]:
    """The settings that messages quote, by the steps after the expansion."""
    widened = [s for s in found if s.results.widening == Widening(("ffn",)) and s.left in evidence.AHEAD]
    same = [s for s in widened if (s.results.kind, s.results.optimizer) == ("dense", "adamw")]
    return {s.left: s for s in same if s.run == preset("horizon", steps=s.run.steps, beta2=evidence.BETA2)}


@pytest.fixture(scope="module")
def main(found: list[Setting]) -> Setting:
    """The setting with most seeds, whose curves the page shows."""
    return found[0]


def test_the_pair_that_was_ahead_was_ahead_everywhere(main: Setting, quoted: dict[int, Setting]) -> None:
    """In every seed, at every step measured, and at the end by what is said; of one length in two seeds."""
    assert set(quoted) == set(evidence.AHEAD) and quoted[12_000] is main
    for left, setting in quoted.items():
        curve = above(setting, KEPT)
        assert max(curve) == left
        assert all(difference < 0 for values in curve.values() for difference in values)
        ends = setting.results.paired(KEPT, COPY_COPY)
        assert round(-statistics.fmean(ends), 3) == evidence.AHEAD[left]
    assert all(len(values) >= 2 for values in above(main, KEPT).values())
    assert len(main.results.paired(KEPT, COPY_COPY)) >= 2


def test_where_the_pair_was_ahead(found: list[Setting]) -> None:
    """Under AdamW and a cosine at every step measured; at a constant rate, Muon and SOAP as the page says.

    At the end too, but for the expansion early in a run, and SOAP, where the page calls both level.
    """
    compared = [setting for setting in found if above(setting, KEPT) and setting.run.size != "large"]
    assert len(compared) >= 9 and {setting.run.schedule for setting in compared} == {"cosine", "wsd"}
    for setting in compared:
        most = max(max(values) for values in above(setting, KEPT).values())
        if setting.results.optimizer in BEHIND:
            assert f"{most:.3f}" == BEHIND[setting.results.optimizer]
        else:
            assert most < 0 if setting.run.schedule == "cosine" else f"{most:.3f}" == "0.002"
        ends = setting.results.paired(KEPT, COPY_COPY)
        if setting.results.widening.share < 0.5:
            assert f"{min(ends):.3f} {max(ends):.3f}" == "-0.004 0.000"
        elif setting.results.optimizer == "soap":
            assert f"{max(ends):.3f}" == "0.001"
        else:
            assert all(difference < 0 for difference in ends)


def test_leads_with_one_thing_different(found: list[Setting], main: Setting) -> None:
    """At the end, in the mean over seeds: by how much, and where copies were without weight decay."""
    alone = [s for s in found if s.results.optimizer == "adamw" and s.run.steps == main.run.steps]
    others: dict[str, tuple[str, dict[str, Any]]] = {
        "at 4x": ("ffn*4", {}),
        "widened after a quarter of the run": ("ffn@0.25", {}),
        "widened after three quarters of it": ("ffn@0.75", {}),
        "under WSD": ("ffn", {"schedule": "wsd"}),
        "no decay": ("ffn", {"decay": 0.0}),
    }
    ends, cosines = {}, {}
    for name, (axes, changes) in others.items():
        run = preset("horizon", **changes)
        (one,) = (s for s in alone if str(s.results.widening) == axes and s.run == run)
        ends[name] = round(-statistics.fmean(one.results.paired(KEPT, COPY_COPY)), 3)
        cosines[name] = end_cosine(one)
    assert (ends.pop("no decay"), cosines["no decay"]) == (evidence.NO_DECAY, evidence.NO_DECAY_COSINE)
    assert ends == evidence.LIKE
    assert (main.run.decay, end_cosine(main)) == (evidence.DECAY, evidence.DECAY_COSINE)
    assert main.left == evidence.NO_DECAY_STEPS


def test_where_copies_came_out_ahead(found: list[Setting]) -> None:
    """In the larger model, as the messages say."""
    (large,) = (setting for setting in found if setting.run.size == "large")
    curve = {step: values[0] for step, values in above(large, KEPT).items()}
    assert max(curve) == large.left == evidence.LARGER_STEPS
    assert max(step for step, value in curve.items() if value < 0) == evidence.LARGER_AHEAD
    assert round(-min(curve.values()), 2) == evidence.LARGER_LEAD
    (end,) = large.results.paired(KEPT, COPY_COPY)
    assert round(end, 3) == evidence.LARGER_BEHIND
    parameters = large.results.runs[KEPT][6]["parameters"]
    assert round(parameters / 1e6, 1) == evidence.LARGER_MODEL
    tokens = large.left * large.run.rows * large.run.length / parameters
    assert round(tokens, 1) == evidence.LARGER_TOKENS


def test_the_wide_model_at_equal_compute(main: Setting) -> None:
    """How far below the expanded ones it ended, in the mean over the seeds that have it."""
    names = {"copy-copy": COPY_COPY, "random-zero": KEPT}
    ends = {pair: main.results.paired("wide-compute", name) for pair, name in names.items()}
    assert {len(values) for values in ends.values()} == {evidence.SCRATCH_SEEDS}
    below = {pair: round(-statistics.fmean(values), 3) for pair, values in ends.items()}
    assert (below, main.left) == (evidence.SCRATCH_BELOW, evidence.SCRATCH_STEPS)
    method = (ROOT / "docs" / "explanation" / "method.md").read_text(encoding="utf-8")
    assert f"SPARKLING does: by\n  {evidence.PAPER_ABOVE}," in method


def end_cosine(setting: Setting) -> float:
    """The cosine of copy-copy's copies to their sources at the end, to the digits that are written."""
    logs = [log for log in setting.results.runs[COPY_COPY].values() if "final" in log]
    return round(statistics.fmean(log["cosine"][str(setting.run.steps)] for log in logs), 2)


def test_no_other_expansion_was_better_at_any_step(main: Setting) -> None:
    """What ``auto`` stands for: in the seeds that both have, and by their mean, none is below it by 0.001."""
    others = {name: above(main, name, KEPT) for name in main.results.runs.keys() - {*SCRATCH, KEPT}}
    compared = {name: curve for name, curve in others.items() if curve}
    assert compared.keys() >= {COPY_COPY, "random-copy", "random-zero", "noise-0.3", "mix-0.5", "naive"}
    for name, curve in compared.items():
        assert all(statistics.fmean(values) > -0.001 for values in curve.values()), name


def test_cosine_and_tokens_are_those_of_the_runs(main: Setting, quoted: dict[int, Setting]) -> None:
    """To the digits that are written."""
    runs = main.results.runs
    step = str(main.expansion + evidence.COSINE_STEPS)
    cosines = [log["cosine"][step] for log in runs[COPY_COPY].values()]
    assert round(statistics.fmean(cosines), 2) == evidence.COSINE
    small, wide = (next(iter(runs[name].values()))["parameters"] for name in ("small", COPY_COPY))
    tokens = [setting.left * setting.run.rows * setting.run.length for setting in quoted.values()]
    assert (round(min(tokens) / small), round(max(tokens) / small)) == evidence.TOKENS_BEFORE
    assert (round(min(tokens) / wide), round(max(tokens) / wide)) == evidence.TOKENS_AFTER


def test_the_sentences_have_these_numbers_and_no_others() -> None:
    """A number in a sentence is one of the run's own, one that is held above, or the paper's."""
    said = evidence.pair_note(["ffn"], "copy-copy", 777)
    assert said is not None
    leads = [f"{other - PAPER[0]:.4f}" for other in PAPER[1:]]
    ends = [text for steps, lead in evidence.AHEAD.items() for text in (f"{steps:,}", f"{lead:g}")]
    larger = {f"{evidence.LARGER_AHEAD:,}", f"{evidence.LARGER_STEPS:,}"} | {
        f"{number:g}"
        for number in (
            evidence.LARGER_MODEL,
            evidence.LARGER_TOKENS,
            evidence.LARGER_LEAD,
            evidence.LARGER_BEHIND,
        )
    }
    known = {"777", *ends, "32,000", *leads, *larger}
    assert set(re.findall(r"\d[\d,.]*\d|\d", said)) == known
    more = evidence.pair_note(["ffn"], "copy-copy", evidence.STEPS + 1)
    assert more is not None and "more steps were not measured" in more
    assert evidence.pair_note(["hidden"], "copy-copy", 777) is None
    assert evidence.pair_note(["ffn"], "random-zero", 777) is None
    nearer = evidence.pair_note(["ffn"], "copy-copy", 777, evidence.like(4.0, 0.5, "wsd"))
    alike = "copy-copy by 0.044 nats per byte in a run at 4x, by 0.003 nats per byte in a run under WSD."
    assert nearer is not None and f"random-zero ended ahead of {alike}" in nearer
    assert evidence.like(2.0, 0.5, "cosine") == ()
    said = evidence.decay_note(["ffn"], "copy-copy")
    assert said is not None
    known = {f"{evidence.NO_DECAY_STEPS:,}"} | {
        f"{number:g}"
        for number in (evidence.NO_DECAY, evidence.NO_DECAY_COSINE, evidence.DECAY, evidence.DECAY_COSINE)
    }
    assert set(re.findall(r"\d[\d.,]*\d|\d", said)) == known
    assert evidence.decay_note(["ffn"], "random-zero") is evidence.decay_note(["hidden"], "copy-copy") is None
    said = evidence.compute_note(["ffn"])
    assert said is not None and evidence.compute_note(["hidden"]) is None
    leads = [f"{above:g}" for above in evidence.SCRATCH_BELOW.values()]
    known = {*leads, f"{evidence.SCRATCH_STEPS:,}", str(evidence.SCRATCH_SEEDS), f"{evidence.PAPER_ABOVE:g}"}
    assert set(re.findall(r"\d[\d.,]*\d|\d", said)) == known
    said = evidence.tokens_note(["ffn"], 12.34, 5.6)
    assert said is not None
    known = {"12.3", "5.6", *map(str, (*evidence.TOKENS_BEFORE, *evidence.TOKENS_AFTER))}
    assert set(re.findall(r"\d[\d.]*\d|\d", said)) == known and "carry over" not in said
    for outside in ((1.1e6, 20.0), (20.0, 1.1e6)):
        said = evidence.tokens_note(["ffn"], *outside)
        assert said is not None and "1.10M" in said and "may not carry over" in said


def test_the_pages_say_how_far_auto_reaches() -> None:
    """In steps, as it is in the code."""
    choosing = (ROOT / "docs" / "how-to" / "choosing.md").read_text(encoding="utf-8")
    most = sum(p.numel() for p in models.fresh("dense", "pilot", {}, 0).parameters())
    assert most == evidence.PARAMETERS
    size = f"up to {most / 1000:.0f} thousand parameters"
    assert f"inner widths, {size}, up to {evidence.STEPS:,} steps left" in choosing
    assert f"| `ffn` of experts or dense layers, {size}, up to {evidence.STEPS:,} steps left |" in PAGE


def test_locked_copies_are_none_or_all(found: list[Setting]) -> None:
    """The verdict's shares: every finished run is far on one side of them, but for copies in new layers.

    Of these, which are as many as there are new layers, all stay locked, as the page says.
    """
    widths = [s for s in found if not s.counts and "layers" not in s.results.widening.axes]
    logs = [(name, log) for s in widths for name, runs in s.results.runs.items() for log in runs.values()]
    ended = [(name, log["locked"]) for name, log in logs if "locked" in log]
    assert {name for name, _ in ended} >= {COPY_COPY, "random-zero", "naive"}
    for name, locked in ended:
        assert locked == (1.0 if name == "naive" else 0.0)
    for setting in (s for s in found if not s.counts and "layers" in s.results.widening.axes):
        new = 1 - 1 / setting.results.widening.factor
        for name, runs in setting.results.runs.items():
            share = {COPY_COPY: round(new, 4), KEPT: 0.0}.get(name)
            assert all(log.get("locked") == share for log in runs.values()), name
    assert 0 < verdict.FEW_LOCKED < verdict.LOCKED_SHARE < 1


def test_the_page_has_the_tables_of_the_records(found: list[Setting], main: Setting) -> None:
    """As the command prints them."""
    for made in (
        table.table(main.results),
        horizon.curve_table(main),
        horizon.between_table(main),
        horizon.longer_table(found),
        horizon.calibrated_table(found),
        horizon.overview(found),
        horizon.counted_table(found),
        horizon.shapes_table(found),
    ):
        assert made and made in PAGE


def test_what_is_counted_needs_its_rewarmup_more_than_fresh_state(found: list[Setting]) -> None:
    """In every seed, as the page says."""
    doubled = [s.results for s in found if s.counts and s.results.widening.factor == 2]
    counted = {results.widening.axes: results for results in doubled}
    assert set(counted) == {("layers",), ("experts",), ("experts", "experts_per_token")}
    for axes, results in counted.items():
        ways = {name: results.paired(name, COPY_COPY) for name in (*horizon.STATES, "small")}
        assert len(ways["naive"]) == len(ways["small"]) == 3
        assert min(ways["naive"]) > 0.01 and min(ways["small"]) > 0.005
        above_small = results.paired("naive", "small")
        if axes == ("layers",):
            assert len(ways["asymmetric"]) == 3 and min(ways["asymmetric"]) > 0.01
            assert all(abs(difference) < 0.0025 for difference in ways["state-copied"])
        elif axes == ("experts",):
            assert min(above_small) > 0.009
        else:
            assert all(abs(difference) < 0.0015 for difference in above_small)


def test_width_and_depth_together_are_where_the_page_says(found: list[Setting]) -> None:
    """At equal cost: behind ``ffn`` alone at 1.5x, ahead of either at 2x, in every seed, by both pairs."""
    runs = {str(s.results.widening): s.results for s in found if s.run.steps == 3000}

    def ends(shape: str, name: str, other: str, than: str) -> list[float]:
        a, b = runs[shape].final(name), runs[other].final(than)
        return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]

    for name in (COPY_COPY, KEPT):
        assert min(ends("ffn+layers*1.5", name, "ffn*2.75", name)) > 0
        assert max(ends("ffn+layers", name, "ffn*5", name)) < 0
        assert max(ends("ffn+layers", name, "layers*3", COPY_COPY)) < 0
        assert max(ends("ffn+layers*1.5", KEPT, "ffn+layers*1.5", COPY_COPY)) < 0


def test_the_way_to_the_wide_model_is_that_of_the_records(main: Setting) -> None:
    """Shares of the way from the small model to the wide one from scratch, on the page and in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    finals = {name: main.results.final(name) for name in ("small", "wide", COPY_COPY, KEPT)}
    seeds = sorted(set.intersection(*(set(found) for found in finals.values())))
    small, wide, *ways = (statistics.fmean(finals[name][seed] for seed in seeds) for name in finals)
    for way in ways:
        share = f"{(small - way) / (small - wide):.0%}".replace("%", " %")
        assert share in PAGE and share in readme


def test_fresh_bias_correction_cost_what_the_note_says() -> None:
    """``expand`` says that longer first updates ended lower: the page's table of beta2 = 0.999."""
    (row,) = re.findall(r"\| SPARKLING with fresh bias correction \| 3 \| .*? \| (.*?) ± (.*?) \|", PAGE)
    above_sparkling, error = map(float, row)
    assert above_sparkling > 3 * error > 0
