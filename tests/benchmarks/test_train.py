"""``benchmarks.train``: a stopped run goes on, results add up, tables say what is in them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.train import between, corpus, gpu, horizon, models, table
from benchmarks.train.__main__ import attempt, jobs, parse, store
from benchmarks.train.base import equal_compute
from benchmarks.train.data import Text, batch, load_text
from benchmarks.train.jobs import Job, Store, Widening
from benchmarks.train.loop import Run, Training, preset


class StoppedError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("text", "widening"),
    [
        ("ffn", Widening(("ffn",), 2, 0.5)),
        ("ffn+hidden*1.5", Widening(("ffn", "hidden"), 1.5, 0.5)),
        ("hidden*4@0.25", Widening(("hidden",), 4, 0.25)),
        ("ffn@0.75", Widening(("ffn",), 2, 0.75)),
        ("ffn,ffn+hidden*3@0.75", Widening(("ffn", "hidden"), 3, 0.75, Widening(("ffn",)))),
    ],
)
def test_widenings_are_read_as_they_are_written(text: str, widening: Widening) -> None:
    """The notation of ``--plan``, there and back."""
    assert Widening.parse(text) == widening
    assert str(widening) == text


@pytest.mark.parametrize(
    "run",
    [
        preset("horizon"),
        preset("pilot", beta2=0.999),
        preset("horizon", steps=600, lr=5e-4, schedule="wsd"),
        preset("horizon", decay=0.0, schedule="wsd"),
        preset("horizon", decay=0.03),
    ],
)
def test_a_label_names_its_runs(run: Run) -> None:
    """A file's name gives the constants of the runs in it."""
    assert Run.of_label(run.label) == replace(run, compile=True)


def test_one_small_model_serves_every_widening_and_one_wide_one_every_time() -> None:
    """Nothing is trained twice."""
    plan = ["dense/adamw/ffn", "dense/adamw/ffn@0.25", "dense/adamw/ffn*4"]
    options = parse(["--plan", *plan, "--treatments", "sparkling", "--seeds", "3"])
    counted = Counter((job.name, job.axes) for job in jobs(options))
    assert counted == {
        ("small", ""): 1,
        ("wide", "ffn"): 1,
        ("wide", "ffn*4"): 1,
        ("sparkling", "ffn"): 1,
        ("sparkling", "ffn@0.25"): 1,
        ("sparkling", "ffn*4"): 1,
    }


def test_factors_of_stages_are_multiplied() -> None:
    """Of the axes that grew twice; the wide model has all of them."""
    widening = Widening.parse("ffn,ffn+hidden*3@0.75")
    assert widening.factors() == {"ffn": 6.0, "hidden": 3.0}
    job = Job.of("dense", "adamw", widening, 0, "wide")
    assert Widening.parse(job.axes).factors() == widening.factors()
    assert Job.of("dense", "adamw", widening, 0, "naive").base == Job("dense", "adamw", "ffn", 0, "naive")


def test_what_is_counted_is_as_many_times_as_many() -> None:
    """Layers, experts and the experts of a token, beside widths."""
    deeper = models.fresh("dense", "micro", {"layers": 1.5, "ffn": 2}, 0).config
    assert (deeper.num_hidden_layers, deeper.intermediate_size, deeper.hidden_size) == (3, 96, 48)
    more = models.fresh("moe", "micro", {"experts": 2, "experts_per_token": 2}, 0).config
    assert (more.num_experts, more.num_experts_per_tok, more.moe_intermediate_size) == (16, 4, 24)


def test_a_module_is_reused_for_the_same_model_alone() -> None:
    """Models of the same shapes whose tokens go to other numbers of experts are two."""
    held, both = (
        models.fresh("moe", "micro", {"experts": 2, "experts_per_token": factor}, 0) for factor in (1, 2)
    )
    kept = [models.reusable(model, compile_=False)[0] for model in (held, both)]
    assert [model.config.num_experts_per_tok for model in kept] == [2, 4]
    again = models.fresh("moe", "micro", {"experts": 2}, 1)
    assert models.reusable(again, compile_=False)[0] is held
    ids = torch.arange(16)[None]
    assert not torch.equal(kept[0](input_ids=ids).logits, kept[1](input_ids=ids).logits)


def test_results_are_added_and_put_in_place_of_the_same_jobs(tmp_path: Path) -> None:
    """Sorted by job, so that a file's history reads well."""
    kept = Store(tmp_path / "results" / "x.jsonl")
    assert kept.read() == {}
    second, first = (Job("dense", "adamw", "ffn", seed, "naive") for seed in (1, 0))
    kept.add(second, {"final": 2.0})
    kept.add(first, {"final": 1.0})
    kept.add(second, {"final": 3.0})
    assert kept.read() == {first: {"final": 1.0}, second: {"final": 3.0}}
    assert [json.loads(line)["job"]["seed"] for line in kept.path.read_text().splitlines()] == [0, 1]


def _tree(root: Path, renamed: str = "") -> Path:
    """Files of text with a licence in all of them, and one file twice."""
    root.mkdir()
    for i in range(200):
        own = f"def number_{i}():\n    return {i}  # the only function that returns {i} and nothing else"
        (root / f"{renamed}{i}.py").write_text(
            f"# A licence that stands at the top of every file.\n\n{own}\n"
        )
    (root / f"{renamed}again.py").write_text((root / f"{renamed}7.py").read_text())
    (root / "table.csv").write_text("1,2,3\n" * 100)
    return root


def test_collected_text_repeats_nothing_and_holds_files_apart(tmp_path: Path) -> None:
    """Neither the licence nor the second copy of a file comes again."""
    train, held = corpus.collect([_tree(tmp_path / "a")], heldout_bytes=512)
    assert (train + held).count(
        b"A licence"
    ) <= 2  # once, and once more if a piece of the held-out text cuts it
    numbers = [n for n in range(200) if f"def number_{n}()".encode() in train]
    assert len(numbers) > 150
    assert all(train.count(f"def number_{n}()".encode()) == 1 for n in numbers)
    assert not any(f"def number_{n}()".encode() in held for n in numbers)
    assert b"1,2,3" not in train


def test_collected_text_depends_on_contents_alone(tmp_path: Path) -> None:
    """Other names and places, same bytes."""
    first = corpus.collect([_tree(tmp_path / "a")], heldout_bytes=512)
    assert first == corpus.collect([_tree(tmp_path / "b", "other-")], heldout_bytes=512)


def test_too_little_to_hold_out_is_said(tmp_path: Path) -> None:
    """The message names the option to use."""
    with pytest.raises(ValueError, match="--roots"):
        corpus.collect([_tree(tmp_path / "a")], heldout_bytes=1 << 20)


def test_text_to_be_used_once_is_used_once(tmp_path: Path) -> None:
    """Every byte once, in an order of the seed's own, then an error."""
    data = torch.arange(240, dtype=torch.uint8)
    text = Text("x", data, data[:16], once=True)
    orders = [torch.cat([batch(text, seed, step, 3, 8).flatten() for step in range(10)]) for seed in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(240))
    assert orders[0].tolist() != orders[1].tolist()
    with pytest.raises(ValueError, match="used up"):
        batch(text, 0, 10, 3, 8)


def test_equal_compute_is_that_of_the_expanded_run() -> None:
    """6 N D on both sides, without the 6."""
    run = preset("horizon", steps=1000)
    steps = equal_compute(run, small=600, wide=1000, share=0.25)
    assert steps * 1000 == 250 * 600 + 750 * 1000


def test_the_length_of_runs_fits_the_time() -> None:
    """A whole small and a whole wide run, and four half ones of the wide model."""
    assert gpu.affordable(0.01, 0.02, 500) == 7100  # 500 / (0.01 + 0.02 + 4 * 0.01)


OPTIONS = ["--size", "micro", "--steps", "24", "--plan", "dense/adamw/ffn", "--seeds", "0", "--only"]


def _small(tmp_path: Path, name: str) -> tuple[Any, Run, Text]:
    options = parse([*OPTIONS, "--treatments", "small", "sparkling", "--out", str(tmp_path / name)])
    run = replace(preset("micro", steps=24, compile=False), rows=2, length=16, eval_every=4)
    text = load_text(None)
    return options, run, Text("part", text.train[:4096], text.heldout[:512])


def test_a_run_stopped_anywhere_ends_as_one_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every seventh step the process ends; losses, cosines and all are the same bits."""
    options, run, text = _small(tmp_path, "whole")
    for job in jobs(options):
        assert attempt(job, options, run, text)
    whole = store(options, run).read()

    pieces, _, _ = _small(tmp_path, "pieces")
    advance = Training.advance
    budget = 0

    def step(training: Training, number: int) -> float:
        nonlocal budget
        if budget == 0:
            raise StoppedError
        budget -= 1
        return advance(training, number)

    monkeypatch.setattr(Training, "advance", step)
    stops = 0
    for job in jobs(pieces):
        done = False
        while not done:
            budget = 7  # more than from one measurement to the next, else nothing is gained
            try:
                done = attempt(job, pieces, run, text)
            except StoppedError:
                stops += 1
    assert stops >= 6
    result = store(pieces, run).read()
    assert set(result) == set(whole)
    for job, record in result.items():
        assert {**record, "seconds": 0} == {**whole[job], "seconds": 0}


def test_a_run_may_stop_at_a_step_and_go_on(tmp_path: Path) -> None:
    """What was measured up to there is kept; the end is that of a run that was never stopped."""
    options, run, text = _small(tmp_path, "whole")
    for job in jobs(options):
        attempt(job, options, run, text)
    whole = store(options, run).read()
    pieces, _, _ = _small(tmp_path, "pieces")
    small, sparkling = jobs(pieces)
    for job, until in ((small, 12), (sparkling, 20)):  # the checkpoint to expand is that of step 12
        assert attempt(job, pieces, replace(run, until=until), text)
        record = store(pieces, run).read()[job]
        assert "final" not in record and max(map(int, record["heldout"])) == until
    for job in (small, sparkling):
        assert attempt(job, pieces, run, text)
        assert {**store(pieces, run).read()[job], "seconds": 0} == {**whole[job], "seconds": 0}


@pytest.mark.parametrize(("noise", "mix"), [(0, 0), (0.3, 0), (3, 0), (0, 0.5), (0.5, 0.25)])
@pytest.mark.parametrize("old", [2000, 3000, 4000])
def test_alpha_between_the_pairs_keeps_the_size(old: int, noise: float, mix: float) -> None:
    """Of W x, on features and weights that are what alpha supposes them to be; at 3x, 2x and 1.5x."""
    new = 6000
    generator = torch.Generator().manual_seed(old)
    matrix, features = (torch.randn(old, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    copies = torch.arange(new - old - round(mix * (new - old))) % old

    def wider(values: torch.Tensor) -> torch.Tensor:
        numbers = torch.randn(new - old, 64, generator=generator, dtype=torch.float64)
        kept = (values[copies] + noise * numbers[: len(copies)]) / (1 + noise * noise) ** 0.5
        return torch.cat([values, kept, numbers[len(copies) :]])

    before, after = matrix.T @ features, wider(matrix).T @ wider(features)
    ratio = between.alpha(old, new, noise, mix) * after.square().mean().sqrt() / before.square().mean().sqrt()
    assert float(ratio) == pytest.approx(1, abs=0.04)


def test_alpha_between_the_pairs_has_theirs_at_its_ends() -> None:
    """Eq. 16 for copies, Eq. 14 for random entries."""
    assert between.alpha(4, 8, 0, 0) == pytest.approx(0.5)
    assert between.alpha(4, 6, 0, 0) == pytest.approx((1 + 3 * 0.5) ** -0.5)
    assert between.alpha(4, 8, 0, 1) == pytest.approx(0.5**0.5)
    assert between.alpha(4, 8, 1e6, 0) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(("noise", "mix", "cosine"), [(0.75, 0.0, 0.8), (0.0, 0.25, 0.75)])
def test_channels_between_the_pairs_are_what_they_are_called(
    tmp_path: Path, noise: float, mix: float, cosine: float
) -> None:
    """New ones have the old ones' deviation and the correlation asked for; old ones are as they were."""
    old, new = 600, 1200
    generator = torch.Generator().manual_seed(0)
    halves = {
        f"mlp.{n}_proj.weight": torch.randn(old, 400, generator=generator) for n in ("up", "gate", "down")
    }
    copied = {name: torch.cat([half, half]) for name, half in halves.items()}
    down = "mlp.down_proj.weight"
    save_file({**copied, down: (copied[down] / 2).T.contiguous()}, tmp_path / "model.safetensors")
    between.change(tmp_path, old, 5, noise=noise, mix=mix)
    found = load_file(tmp_path / "model.safetensors")
    for name, half in halves.items():
        alpha = between.alpha(old, new, noise, mix) if name == down else 1.0
        now = (found[name].T if name == down else found[name]) / alpha
        assert torch.allclose(now[:old], half, atol=1e-6)
        assert float(now[old:].std() / half.std()) == pytest.approx(1, abs=0.01)
        cosines = nn.functional.cosine_similarity(now[old:], half)
        assert float(cosines.mean()) == pytest.approx(cosine, abs=0.01)
        assert noise or int((cosines > 0.99).sum()) == 450


def test_the_checkpoint_of_a_result_made_elsewhere_is_trained_anew(tmp_path: Path) -> None:
    """A result is kept; what it came from is not."""
    options, run, text = _small(tmp_path, "here")
    small, sparkling = jobs(options)
    store(options, run).add(small, {"final": 9.0})
    assert attempt(small, options, run, text)
    assert not attempt(sparkling, options, run, text)  # trains the checkpoint
    assert attempt(sparkling, options, run, text)
    result = store(options, run).read()
    assert result[small] == {"final": 9.0}
    assert set(result) == {small, sparkling}


def test_a_second_stage_goes_on_from_the_first(tmp_path: Path) -> None:
    """From the first one's checkpoint, trained anew where only its result is there; 4x as wide in the end."""
    options, run, text = _small(tmp_path, "first")
    small, first = jobs(options)
    first = Job.of("dense", "adamw", Widening.parse("ffn"), 0, "sparkling")
    second = Job.of("dense", "adamw", Widening.parse("ffn,ffn@0.75"), 0, "sparkling")
    for job in (small, first, second):
        assert attempt(job, options, run, text)
    kept = store(options, run).read()
    widest = models.fresh("dense", "micro", {"ffn": 4}, 0)
    assert kept[second]["parameters"] == sum(p.numel() for p in widest.parameters())
    assert set(kept[second]["cosine"]) == {"18", "22", "24"}

    elsewhere, _, _ = _small(tmp_path, "second")
    store(elsewhere, run).add(first, kept[first])
    assert attempt(small, elsewhere, run, text)
    assert not attempt(second, elsewhere, run, text)  # trains the first stage
    assert attempt(second, elsewhere, run, text)
    found = store(elsewhere, run).read()
    assert found[first] == kept[first]
    assert {**found[second], "seconds": 0} == {**kept[second], "seconds": 0}


def test_layers_and_experts_have_tables_of_their_own(tmp_path: Path) -> None:
    """By hand, on made-up losses; layers have no copies to be locked."""
    run = preset("horizon", steps=8)
    kept = Store(tmp_path / f"{run.label}.jsonl")
    ends = {"sparkling": 2.0, "asymmetric": 2.1, "naive": 2.25, "small": 2.5, "random-zero-function": 1.9}
    for kind, axes in (("dense", "layers"), ("dense", "ffn*3"), ("moe", "experts+experts_per_token")):
        for name, end in ends.items():
            record = {"parameters": 7, "final": end, "heldout": {}, "train": {}, "cosine": {8: 0.5}}
            kept.add(Job(kind, "adamw", "" if name == "small" else axes, 0, name), record)
    found = horizon.settings(tmp_path)
    assert [setting.counts for setting in found] == [False, True, True]
    depth, experts = horizon.counted_table(found).splitlines()[2:]
    assert depth == ("| 4 steps left, beta2 0.95, layers 2x, at 50% | 1 | 0.1000 | — | 0.2500 | — | 0.5000 |")
    assert experts.startswith("| mixture of experts, 4 steps left, beta2 0.95, experts+experts_per_token 2x")
    assert [line.split(" | ")[3:] for line in horizon.shapes_table(found).splitlines()[2:]] == [
        ["1", "-0.5000", "-0.6000 |"],
        ["1", "-0.5000", "-0.6000 |"],
    ]
    assert len(horizon.overview(found).splitlines()) == 3


def _results(tmp_path: Path) -> Path:
    """Made-up results at 8 steps, expanded at 4: random-copy leads first and falls behind from step 6 on."""
    run = preset("horizon", steps=8)
    kept = Store(tmp_path / f"{run.label}.jsonl")
    curves = {
        "sparkling": [2.0, 1.9, 1.8, 1.7, 1.6],
        "random-copy": [2.5, 1.8, 1.81, 1.72, 1.62],
        "naive": [2.0, 2.0, 1.9, 1.9, 1.8],
        "wide": [1.9, 1.8, 1.7, 1.6, 1.5],
    }
    for name, curve in curves.items():
        for seed in (0, 1):
            heldout = {step: loss + 0.1 * seed for step, loss in zip(range(4, 9), curve, strict=True)}
            if name == "random-copy" and seed:
                heldout[8] += 0.02
            cosine = dict.fromkeys(range(4, 9), 0.5)
            record = {"final": heldout[8], "heldout": heldout, "train": heldout, "cosine": cosine}
            kept.add(Job("dense", "adamw", "ffn", seed, name), record)
    return tmp_path


def test_differences_errors_and_crossings_are_those_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, on made-up losses."""
    (setting,) = horizon.settings(_results(tmp_path))
    assert (setting.expansion, setting.left) == (4, 4)
    curve = horizon.above(setting, "random-copy")
    assert curve[1] == pytest.approx([-0.1, -0.1])
    assert curve[4] == pytest.approx([0.02, 0.04])
    assert horizon.crossing(curve) == 2
    assert horizon.crossing(horizon.above(setting, "wide")) is None
    assert horizon.crossing(horizon.above(setting, "naive")) == 1
    # mean 0.03; standard deviation 0.01 * sqrt(2) of two, divided by sqrt(2)
    assert table.mean_error(setting.results.paired("random-copy", "sparkling")) == "0.0300 ± 0.0100"
    # the gap from naive to wide is 0.3, of which copy-copy closes 0.2
    assert table.closed(setting.results, "sparkling") == "67%"
    monkeypatch.setattr(horizon, "MARKS", (1, 4))
    text = horizon.curve_table(setting)
    assert "| 1 | -0.1000 ± 0.0000 |" in text
    assert (
        "- random-copy: copy-copy is better from step 2 on (up to 4 steps; seeds that came so far: 2)" in text
    )


def test_a_run_on_its_course_counts_where_it_has_come_to(tmp_path: Path) -> None:
    """In the curve, up to there, and not among the ends."""
    folder = _results(tmp_path)
    (path,) = folder.glob("*.jsonl")
    job = Job("dense", "adamw", "ffn", 1, "random-copy")
    record = Store(path).read()[job]
    train = {step: loss for step, loss in record["train"].items() if int(step) <= 6}
    Store(path).add(job, {"train": train, "cosine": {}})
    (setting,) = horizon.settings(folder)
    assert {step: len(values) for step, values in horizon.above(setting, "random-copy").items()} == {
        1: 2,
        2: 2,
        3: 1,
        4: 1,
    }
    assert len(setting.results.paired("random-copy", "sparkling")) == 1


def test_the_figure_is_the_same_every_time(tmp_path: Path) -> None:
    """Two drawings, same bytes."""
    found = horizon.settings(_results(tmp_path))
    for name in ("a.svg", "b.svg"):
        horizon.figure(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
