"""The report page and its facts: complete, safe, deterministic, and telling the truth."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import pytest

from sparkling_cli.errors import CheckpointError
from sparkling_cli.report import page
from sparkling_cli.report.page import breakable, render
from sparkling_cli.report.tensor_blocks import tensor_block
from sparkling_cli.results.expansion import Report, TensorChange
from sparkling_cli.results.numbers import signed
from sparkling_cli.results.verdict import (
    LOCKED,
    NO_REWARMUP,
    READY,
    offenders,
    verdict_of_change,
    verdict_of_expansion,
)
from tests.report.samples import activations, learning_rate, report

VOID = {"meta", "link", "br", "wbr", "img"}


class Balance(HTMLParser):
    """Checks that every element is closed where it should be; collects text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element begins."""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """An element ends: it must be the one that began last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text."""
        self.words.append(data)


@pytest.mark.parametrize(
    "data",
    [report(), report(good=False), report(bare=True), report(layers=1)],
    ids=["good", "bad", "bare", "one"],
)
def test_page_is_well_formed_and_its_drawings_are_xml(data: Report) -> None:
    """Elements are balanced; every SVG parses as XML and has a title and a description."""
    text = render(data).decode()
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    drawings = re.findall(r"<svg viewBox.*?</svg>", text, flags=re.S)
    charts = [d for d in drawings if 'role="img"' in d]
    assert charts
    for drawing in charts:
        root = ElementTree.fromstring(drawing)
        assert root[0].tag == "title"
        assert root[1].tag == "desc"
        assert "nan" not in drawing.lower().replace("finance", "")
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_page_is_self_contained() -> None:
    """No address is loaded: no src, no stylesheet, no import; the policy forbids the rest."""
    text = render(report()).decode()
    assert not re.search(r"\bsrc\s*=|@import|url\((?!#)|<link(?! rel=\"icon\" href=\"data:)", text)
    assert "default-src 'none'" in text


def test_equal_facts_give_equal_bytes() -> None:
    """Nothing in the page or the JSON depends on when it is made."""
    assert render(report()) == render(report())
    assert report().to_json() == report().to_json()


def test_the_compiled_template_is_kept_and_a_cache_that_fails_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An earlier run's code serves again, a damaged one is made again; where none can be kept, no harm."""

    def rendered(place: Path) -> bytes:
        monkeypatch.setenv("SPARKLING_CACHE_DIR", str(place))
        page._template.cache_clear()
        return render(report())

    first = rendered(tmp_path / "new")
    kept = {path: path.read_bytes() for path in (tmp_path / "new/page").iterdir()}
    assert kept
    with monkeypatch.context() as patched:
        patched.delattr(jinja2.Environment, "compile")
        assert rendered(tmp_path / "new") == first
    for path, code in kept.items():
        path.write_bytes(code[: len(code) // 2])
    assert rendered(tmp_path / "new") == first
    assert all(path.read_bytes() == code for path, code in kept.items())
    (tmp_path / "file").touch()
    assert rendered(tmp_path / "file/below") == first
    page._template.cache_clear()


def test_page_and_json_hold_the_same_facts() -> None:
    """The facts inside the page are those of report.json, and read back to the same report."""
    data = report(good=False)
    text = render(data).decode()
    match = re.search(r'<script type="application/json" id="facts">(.*?)</script>', text, flags=re.S)
    assert match
    assert json.loads(match[1]) == json.loads(data.to_json())
    assert Report.read(data.to_json(), "report.json") == data


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version": 2}', b'{"format_version": 1}'])
def test_another_report_is_refused_by_its_name(content: bytes) -> None:
    """Damaged, or of another version: an error of the checkpoint, with the file's name."""
    with pytest.raises(CheckpointError, match=r"report\.json"):
        Report.read(content, "report.json")


def test_the_page_shows_what_matters() -> None:
    """Sizes, losses, the worst layer, the command and every finding are in the visible text."""
    data = report(good=False)
    parser = Balance()
    parser.feed(render(data).decode())
    shown = " ".join("".join(parser.words).split())
    assert data.activations is not None
    worst = data.activations.worst(1)[0]
    numbers = ("2,816", "5,632", "408M", "616M", "2.3673", "2.6073", "653", "rng_state.pth", "5f3a90c1")
    for words in (*numbers, worst.name, data.command, *(f.text for f in data.verdict.findings)):
        assert words in shown, words


def test_where_the_streams_part_is_drawn() -> None:
    """Beside the stream's RMS, and in the sentence on the logits; not where the function is kept."""
    assert "Residual stream, apart" in render(report(good=False)).decode()
    assert "Residual stream, apart" not in render(report()).decode()
    verdict = verdict_of_change(activations(off=0.3))
    assert "the residual stream by 1.2% behind model.layers.1 and 29% behind model.layers.23." in str(verdict)


def test_what_did_not_move_is_one_row() -> None:
    """Of functions and of linear layers; where some moved, the others are."""
    calm, moved = (render(one).decode() for one in (report(), report(good=False)))
    assert [re.findall(r">(all \d+|\d+ others)<", page) for page in (calm, moved)] == [
        ["all 48", "all 168"],
        [],
    ]
    one = activations(off=0.3)
    still = one.model_copy(update={"functions": (*one.functions[:1], *activations().functions[1:])})
    assert ">47 others<" in render(report().model_copy(update={"activations": still})).decode()


def test_a_locked_output_is_not_to_be_trained_on() -> None:
    """The page has no line that does."""
    data = report()
    locked = data.model_copy(update={"verdict": data.verdict.model_copy(update={"headline": LOCKED})})
    pages = [render(one).decode() for one in (data, locked)]
    assert ["from sparkling_cli.training import" in page for page in pages] == [True, False]


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("trainer", 'Trainer(..., callbacks=[SparklingCallback("wide")])'),
        ("dcp", 'rewarm(optimizer, model, "wide")'),
    ],
)
def test_the_page_says_how_to_train_on(form: str, line: str) -> None:
    """Two lines of Python, of which the first imports what the second calls, from where it really is."""
    data = report()
    source = data.provenance.model_copy(update={"format": form})
    command = data.command.replace("checkpoint-30000-ffn2x", "wide")
    facts = {"destination": "wide", "provenance": source, "command": command}
    page = render(data.model_copy(update=facts)).decode()
    first, _, rest = page.partition("<pre>sparkling verify checkpoint-30000 wide</pre>")
    assert 'class="verdict' in first and 'class="tiles"' in rest  # at the top
    match = re.search(r"<pre>(from .*? import (\w+))\n(.*?)</pre>", page)
    assert match is not None
    exec(match[1], {})  # the name is there
    assert unescape(match[3]) == line
    assert match[2] in line


@pytest.mark.parametrize(
    ("value", "text"), [(-0.00001, "0.0000"), (0.0, "0.0000"), (0.02, "+0.0200"), (-1.5, "-1.5000")]
)
def test_nothing_has_no_sign(value: float, text: str) -> None:
    """A change that rounds to nothing is shown as nothing."""
    assert signed(value) == text


def test_hostile_names_do_not_leave_their_place() -> None:
    """Names from a checkpoint are text, in the page and in its JSON block."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    data = report().model_copy(update={"source": evil, "model": evil, "notes": (evil,)})
    text = render(data).decode()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert evil in unescape(text).replace("<wbr>", "")


def test_what_is_not_finite_is_said_and_drawn_as_a_gap() -> None:
    """A layer whose activations overflow is the worst offender and breaks no chart."""
    data = report()
    assert data.activations is not None
    functions = list(data.activations.functions)
    functions[12] = functions[12].model_copy(update={"y_after": None, "r_after": None, "deviation": None})
    measured = data.activations.model_copy(update={"functions": tuple(functions), "loss_after": None})
    data = data.model_copy(update={"activations": measured})
    assert offenders(measured) == [functions[12]]
    text = render(data).decode()
    assert "not finite" in text
    assert b"NaN" not in data.to_json()


def judged(**changes: object) -> tuple[str, str]:
    """Level and all words of a verdict."""
    given = {
        "activations": activations(),
        "activations_missing": "",
        "learning_rate": learning_rate(),
        "learning_rate_missing": "",
        "locked": None,
        "warnings": (),
        "copies": True,
        "keeps_function": True,
    } | changes
    found = verdict_of_expansion(**given)  # type: ignore[arg-type]
    return found.level, " ".join([found.headline, *(f.text for f in found.findings)])


def test_verdict_of_a_sound_widening_is_good() -> None:
    """All within limits."""
    level, words = judged()
    assert level == "good"
    assert "Ready" in words


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"activations": activations(off=0.24)}, "moved by more than 10%"),
        ({"warnings": ("beta2 is 0.999",)}, "beta2 is 0.999"),
        ({"locked": "copies stay equal for ever"}, "Copies stay equal for ever"),
        ({"activations": activations().model_copy(update={"loss_after": 2.5})}, "should keep the function"),
        ({"learning_rate": None, "learning_rate_missing": "nothing is known"}, "nothing is known"),
    ],
)
def test_verdict_names_what_needs_attention(changes: dict[str, object], expected: str) -> None:
    """Each fault alone is enough, and is said; the headline is never that one can train on."""
    level, words = judged(**changes)
    assert level == "attention"
    assert expected in words
    assert READY not in words


def test_logits_that_move_where_nothing_but_silent_layers_is_new() -> None:
    """A fault, though the loss stays: not both that they moved and that the function is kept."""
    strayed = activations().model_copy(update={"logit_change": 0.044})
    level, words = judged(activations=strayed, copies=None)
    assert level == "attention"
    assert "Logits moved by 4.4%" in words and "old ones are not what they were" in words
    assert "the function is kept" not in words and READY not in words
    assert judged(activations=activations(), copies=None)[0] == "good"


def test_headline_follows_the_order_of_harm() -> None:
    """Locked copies before a missing schedule, that before what moved."""
    wrong: dict[str, object] = {
        "activations": activations(off=0.24), "learning_rate": None, "locked": "copies stay equal"
    }  # fmt: skip
    assert judged(**wrong)[1].startswith(LOCKED)
    assert judged(**wrong | {"locked": None})[1].startswith(NO_REWARMUP)
    moved = judged(**wrong | {"locked": None, "learning_rate": learning_rate()})[1]
    assert moved.startswith("The signal is not kept")


def test_a_loss_jump_is_no_fault_where_the_function_is_not_kept() -> None:
    """App. F: the jump at the boundary does not predict the final loss."""
    moved = activations().model_copy(update={"loss_after": 2.5})
    level, words = judged(activations=moved, keeps_function=False)
    assert level == "good"
    assert "does not predict" in words


@pytest.mark.parametrize(
    ("after", "expected"), [(11.0, "worse than uniform prediction"), (3.1, "more than a small jump")]
)
def test_a_loss_above_a_ceiling_is_a_fault_in_any_case(after: float, expected: str) -> None:
    """log(50304) = 10.8 is what guessing costs; a rise by a third is no small jump either."""
    moved = activations().model_copy(update={"loss_after": after})
    level, words = judged(activations=moved, keeps_function=False)
    assert level == "attention"
    assert expected in words


def test_entries_that_start_different_are_not_locked() -> None:
    """Other pairs than copy-copy need no state to part."""
    level, words = judged(copies=False)
    assert level == "good"
    assert "nothing is locked" in words


def test_missing_parts_are_said() -> None:
    """What could not be measured is said with its reason; missing state asks for a decision."""
    level, words = judged(
        activations=None, activations_missing="no model can be built", learning_rate=None,
        learning_rate_missing="the baseline is not known", locked="copies stay equal",
    )  # fmt: skip
    assert level == "attention"
    assert "no model can be built" in words
    assert "the baseline is not known" in words
    assert "stay equal" in words


def test_names_break_behind_dots_and_numbers_do_not() -> None:
    """A share at the end of a line stays whole."""
    assert breakable("model.layers.2.mlp 97.2%") == "model.<wbr>layers.2.<wbr>mlp 97.2%"
    assert breakable("layers.{layers}.<b>") == "layers.<wbr>{layers}.&lt;b&gt;"


def test_new_matrices_of_a_stack_are_drawn() -> None:
    """Experts that grow are new rows below the old ones; a stack that does not grow is left out."""
    change = TensorChange(
        name="experts.up",
        layout="experts | ffn <- hidden",
        before=(4, 6, 8),
        after=(8, 6, 8),
        new_dims=(0,),
        role="elementwise",
        scale=(1.0, 1.0),
        fill=("copy",),
        count=1,
    )
    for changed, share in ((change, 0.5), (change.model_copy(update={"before": (8, 3, 8)}), 0.5)):
        sizes = [float(x) for x in re.findall(r'<rect[^>]*height="([\d.]+)"', tensor_block(changed))]
        assert sizes[1] / sizes[0] == pytest.approx(share, abs=0.01)
