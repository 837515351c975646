"""``sparkling schedule`` and ``inspect --plot``: curves for people, as tables and pictures."""

from __future__ import annotations

import json
import shlex
import shutil
from math import cos, pi
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from sparkling_cli import api
from sparkling_cli.cli.app import app
from sparkling_cli.errors import CheckpointError, OutputError, SpecError, VerificationError
from sparkling_cli.training import read_history
from tests.formats.make_nanogpt import make_nanogpt


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory, dense_checkpoint: Path) -> Path:
    """A widened checkpoint: expansion at step 600 of 1200, cosine from 4e-3 with 36 steps of warmup."""
    target = tmp_path_factory.mktemp("schedule") / "wide"
    axes = [{"axis": "ffn", "factor": 2}]
    api.expand(dense_checkpoint, target, axes=axes, rewarmup={"steps": 100}, report="none")
    return target


def shown(*arguments: str | Path) -> str:
    """What the command prints for people."""
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def eta_old(step: int) -> float:
    """Eq. 25-26 of the bundled run."""
    return 4e-3 * (1 + cos(pi * (step - 36) / (1200 - 36))) / 2


def test_the_table_holds_the_equations_numbers(widened: Path) -> None:
    """Old by Eq. 26, new by Eq. 27-28, their ratio; worked out here."""
    rows = [line.split() for line in shown("schedule", widened, "--steps", "600:720").splitlines()]
    found = {int(r[0]): [float(x) for x in r[1:4]] for r in rows if len(r) == 4 and r[0].isdigit()}
    start = eta_old(600)
    assert set(range(600, 721)) <= set(found)
    for step in (600, 650, 700, 720):
        if step <= 700:
            new = start + 0.3 * start * (step - 600) / 100
        else:
            new = 1.3 * start * (1 + cos(pi * (step - 700) / 500)) / 2
        assert found[step][0] == pytest.approx(eta_old(step), rel=1e-4)
        assert found[step][1] == pytest.approx(new, rel=1e-4)
        assert found[step][2] == pytest.approx(new / eta_old(step), abs=6e-4)


def test_the_json_file_itself_can_be_given(widened: Path) -> None:
    """The directory and its rewarmup.json say the same."""
    assert shown("schedule", widened) == shown("schedule", widened / "sparkling" / "rewarmup.json")


@pytest.mark.parametrize("steps", ["7", "a:b", "700:600", "0:1201", "-5:3"])
def test_ranges_that_are_none_are_refused(steps: str, widened: Path) -> None:
    """The message says what the range may be."""
    with pytest.raises(SpecError, match="1200"):
        CliRunner().invoke(app, ["schedule", str(widened), f"--steps={steps}"], catch_exceptions=False)


def test_a_checkpoint_without_a_schedule_is_an_error(dense_checkpoint: Path) -> None:
    """Nothing is made up for a checkpoint that was never widened."""
    with pytest.raises(CheckpointError, match="re-warmup"):
        CliRunner().invoke(app, ["schedule", str(dense_checkpoint)], catch_exceptions=False)


def test_pictures_of_the_schedule(widened: Path, tmp_path: Path) -> None:
    """An SVG that parses; an unknown ending is refused and nothing written."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "schedule.svg"
    shown("schedule", widened, "--plot", picture)
    ElementTree.parse(picture)
    with pytest.raises(OutputError, match="gif"):
        CliRunner().invoke(
            app, ["schedule", str(widened), "--plot", str(tmp_path / "x.gif")], catch_exceptions=False
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["schedule.svg"]


def test_pictures_of_activations(widened: Path, dense_checkpoint: Path, tmp_path: Path) -> None:
    """One model alone, and two on the same tokens; without activations there is nothing to draw."""
    pytest.importorskip("matplotlib")
    short = ("--sequences", "2", "--length", "32", "--plot")
    for name, more in (("alone", ()), ("both", ("--against", str(dense_checkpoint)))):
        picture = tmp_path / f"{name}.svg"
        shown("inspect", widened, *more, *short, picture)
        text = picture.read_text()
        assert "residual stream" in text
        ElementTree.parse(picture)
    with pytest.raises(SpecError, match="nothing to draw"):
        CliRunner().invoke(
            app,
            ["inspect", str(widened), "--no-activations", "--plot", str(tmp_path / "x.png")],
            catch_exceptions=False,
        )


FFN = ("--axis", "ffn", "--factor", "2")
WSD = (
    "--schedule",
    "wsd",
    "--decay",
    "linear",
    "--decay-steps",
    "200",
    "--min-lr",
    "1e-05",
    "--warmup-steps",
    "36",
)
OTHER = ("--rho", "1.25", "--rewarmup-steps", "20")


@pytest.fixture(scope="module")
def no_schedule(tmp_path_factory: pytest.TempPathFactory, dense_checkpoint: Path) -> Path:
    """The run of ``widened`` without the file that says which schedule it is on."""
    source = tmp_path_factory.mktemp("unknown") / "checkpoint-600"
    shutil.copytree(dense_checkpoint, source)
    (source / "training_args.bin").unlink()
    return source


def contents(root: Path) -> dict[str, bytes]:
    """Every file of an output."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("first", [(), OTHER], ids=["none before", "another before"])
def test_a_written_schedule_is_as_if_made_with(
    first: tuple[str, ...],
    no_schedule: Path,
    dense_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every byte of the output is that of ``expand`` with the options: report, manifest and digests too."""
    source = dense_checkpoint if first else no_schedule
    for folder, more in (("made", (*OTHER, *WSD)), ("written", first)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        shown("expand", source, "wide", *FFN, *more, "--report", "none")
    before = contents(Path("wide"))
    api.verify(source, "wide")
    shown("schedule", "wide", "--write", *OTHER, *WSD)
    api.verify(source, "wide")
    made, written = contents(tmp_path / "made"), contents(tmp_path / "written")
    assert made.keys() == written.keys()
    assert [name for name in made if made[name] != written[name]] == []
    assert before != contents(Path("wide"))


def test_the_command_that_is_printed_works(
    no_schedule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pasted as it stands, on the terminal's words and on the report's; the headline says what is missing."""
    monkeypatch.chdir(tmp_path)
    text = shown("expand", no_schedule, "wide", *FFN, "--report", "none")
    assert "Ready to train" not in text
    report = json.loads(Path("wide/sparkling/report.json").read_text())
    assert "no re-warmup" in report["verdict"]["headline"].lower()
    api.verify(no_schedule, "wide")
    (line,) = [line for line in text.splitlines() if line.startswith("add one  ")]
    command = line.removeprefix("add one  ")
    assert command in report["learning_rate_missing"]
    words = shlex.split(command)
    assert words[:2] == ["sparkling", "schedule"]
    table = shown(*words[1:])
    assert "1.300" in table
    api.verify(no_schedule, "wide")
    report = json.loads(Path("wide/sparkling/report.json").read_text())
    assert report["learning_rate"]["rate_at_expansion"] == pytest.approx(eta_old(600))
    assert report["learning_rate_missing"] == ""
    assert "no re-warmup" not in report["verdict"]["headline"].lower()
    assert words[4:6] == ["--schedule", "constant"]
    assert (
        "report.html" in "".join(contents(Path("wide")))
        and "No schedule" not in Path("wide/sparkling/report.html").read_text()
    )


def test_a_single_file_and_what_training_made_of_an_output(tmp_path: Path) -> None:
    """Beside a file, and in a later checkpoint that has the history alone, it is written just so."""
    make_nanogpt(tmp_path / "ckpt.pt")
    axes = [{"axis": name, "factor": 2} for name in ("hidden", "heads", "ffn")]
    target = tmp_path / "wide.pt"
    api.expand(tmp_path / "ckpt.pt", target, axes=axes, report="none")
    found = api.write_schedule(target, rewarmup={"rho": 1.5, "steps": 3})
    assert (found.stages[0].rho, found.stages[0].steps) == (1.5, 3)
    api.verify(tmp_path / "ckpt.pt", target)
    later = tmp_path / "later.pt"
    shutil.copyfile(target, later)
    (tmp_path / "later.pt.sparkling" / "sparkling").mkdir(parents=True)
    for name in ("manifest.json", "rewarmup.json", "rewarmup.csv"):
        place = Path("sparkling", name)
        shutil.copy(tmp_path / "wide.pt.sparkling" / place, tmp_path / "later.pt.sparkling" / place)
    assert api.write_schedule(later, rewarmup={"steps": 7}).stages[0].rho == 1.5


def test_nothing_is_written_over_damage(widened: Path, dense_checkpoint: Path, tmp_path: Path) -> None:
    """A changed file is not given a new digest; options need --write; a source has no schedule to write."""
    output = tmp_path / "wide"
    shutil.copytree(widened, output)
    with pytest.raises(SpecError, match="--write"):
        CliRunner().invoke(app, ["schedule", str(output), "--rho", "2"], catch_exceptions=False)
    with (output / "sparkling" / "report.json").open("ab") as file:
        file.write(b" ")
    before = contents(output)
    with pytest.raises(VerificationError, match=r"report\.json was changed"):
        api.write_schedule(output, rewarmup={"rho": 2.0})
    with pytest.raises(CheckpointError, match="manifest"):
        api.write_schedule(dense_checkpoint)
    assert contents(output) == before


def test_an_output_of_the_former_version(widened: Path, tmp_path: Path) -> None:
    """Its report cannot be read, and stays; the schedule is written all the same."""
    output = tmp_path / "wide"
    shutil.copytree(widened, output)
    for name in ("rewarmup.csv", "rewarmup.json", "report.html"):
        (output / "sparkling" / name).unlink()
    report = (output / "sparkling" / "report.json").read_bytes()
    older = report.replace(b'"format_version": 2', b'"format_version": 1')
    assert older != report
    (output / "sparkling" / "report.json").write_bytes(older)
    (output / "sparkling" / "files.crc32").unlink()
    result = CliRunner().invoke(app, ["schedule", str(output), "--write"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "the report stays as it was" in " ".join(result.output.split())
    assert (output / "sparkling" / "report.json").read_bytes() == older
    assert (output / "sparkling" / "rewarmup.json").read_bytes() == (
        widened / "sparkling" / "rewarmup.json"
    ).read_bytes()


@pytest.mark.parametrize("known", [True, False], ids=["read", "made up"])
def test_the_hint_for_an_output_without_a_schedule_works(
    known: bool, dense_checkpoint: Path, no_schedule: Path, tmp_path: Path
) -> None:
    """The command that ``schedule`` and the training side name runs, with options where it needs some."""
    target = tmp_path / "wide one"
    api.expand(no_schedule, target, axes=[{"axis": "ffn", "factor": 2}], report="none")
    if known:
        shutil.copy(dense_checkpoint / "training_args.bin", target)
    hints = []
    for ask in (lambda: read_history(target), lambda: shown("schedule", target)):
        with pytest.raises(CheckpointError) as caught:
            ask()
        hints.append(str(caught.value.hint))
    assert hints[0] == hints[1]
    command = hints[0].split("`")[3]
    assert ("--schedule constant" in command) is not known
    assert ("the present rate" in hints[0]) is not known
    shown(*shlex.split(command)[1:])
    start = eta_old(600)
    assert api.write_schedule(target).baseline(600) == pytest.approx(start, rel=1e-6)


def test_a_peak_that_the_files_do_not_have(widened: Path, tmp_path: Path) -> None:
    """``expand`` warns of it; so does ``schedule``, when it is written and when it is shown."""
    output = tmp_path / "wide"
    shutil.copytree(widened, output)

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["schedule", str(output), *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return " ".join(result.output.split())

    doubt = "--peak-lr 0.009: the checkpoint's own files have 0.004"
    assert doubt not in said()
    assert doubt in said("--write", "--peak-lr", "9e-3")
    assert doubt in said()
    assert "own files have" not in said("--write", "--peak-lr", "4e-3")
    assert "own files have" not in said()
