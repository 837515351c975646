"""``sparkling plan``: from a config to parameters, FLOPs and the share saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparkling_cli.cli.app import app
from sparkling_cli.errors import SpecError
from sparkling_cli.forecast import parse_then
from sparkling_cli.layout.file import to_toml
from sparkling_cli.layout.model import AxisInfo, ModelLayout, TensorPattern
from tests.compute.paper import PAPER_LAYOUT, TABLE_2_FLOPS, TABLE_2_PARAMETERS

CONFIG = Path(__file__).resolve().parents[2] / "docs" / "examples" / "paper-config.json"


@pytest.fixture
def layout_file(tmp_path: Path) -> Path:
    """The paper's layout as a file, so that no model is built."""
    path = tmp_path / "paper.toml"
    path.write_text(to_toml(PAPER_LAYOUT))
    return path


def planned(*arguments: str) -> dict[str, object]:
    """The command's JSON."""
    result = CliRunner().invoke(app, ["plan", str(CONFIG), *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)  # type: ignore[no-any-return]


@pytest.mark.parametrize("axes", TABLE_2_FLOPS)
def test_table_2_from_the_command_line(axes: tuple[str, ...], layout_file: Path) -> None:
    """Active and total parameters, FLOPs and the share saved, to the paper's rounding of N."""
    options = [word for axis in axes for word in ("--axis", axis)]
    found = planned(
        *options, "--factor", "2", "--tokens", "200B", "--expand-at", "100B", "--layout", str(layout_file)
    )
    scratch, progressive, saved = TABLE_2_FLOPS[axes]
    assert found["flops"]["scratch"] / 1e20 == pytest.approx(scratch, rel=3e-3)  # type: ignore[index]
    assert found["flops"]["progressive"] / 1e20 == pytest.approx(progressive, rel=3e-3)  # type: ignore[index]
    assert round(found["saved"], 2) == saved  # type: ignore[call-overload]


def test_several_stages_and_the_memory_of_sizes(layout_file: Path) -> None:
    """256 -> 512 -> 1024 as in the paper's two-stage run: a later factor starts from the earlier size."""
    found = planned(
        "-a", "ffn", "-f", "2", "--tokens", "200B", "--expand-at", "50B", "--then", "ffn=2@100B",
        "--layout", str(layout_file),
    )  # fmt: skip
    phases = found["phases"]
    assert [phase["sizes"]["ffn"] for phase in phases] == [512, 1024, 2048]  # type: ignore[attr-defined]
    by_hand = sum(6 * p["active_parameters"] * (p["stop_tokens"] - p["start_tokens"]) for p in phases)  # type: ignore[attr-defined]
    assert found["flops"]["progressive"] == by_hand  # type: ignore[index]


def test_people_get_a_table_without_escape_codes(layout_file: Path) -> None:
    """Piped output is plain text with the same numbers."""
    result = CliRunner().invoke(
        app,
        ["plan", str(CONFIG), "-a", "ffn", "-f", "2", "--tokens", "200B", "--expand-at", "100B",
         "--layout", str(layout_file)],
    )  # fmt: skip
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    for words in ("2.56B", "4.98B", "450M", "751M", "saved 20.1%", "embeddings"):
        assert words in result.output


def test_an_inner_width_of_few_layers_is_said_as_in_a_dry_run(tmp_path: Path) -> None:
    """``ffn`` of three dense layers of sixty: the warning of the dry run, for people and in JSON."""
    path = tmp_path / "deep.toml"
    axes = {"hidden": 8, "ffn": 18, "expert_ffn": 2, "experts": 256, "layers": 61}
    widths = {name: AxisInfo(size, widenable=name.endswith("ffn")) for name, size in axes.items()}
    patterns = (
        TensorPattern("h.{layers=0-2}.up", "ffn <- hidden"),
        TensorPattern("h.{layers=3-60}.up", "experts | expert_ffn <- hidden"),
    )
    path.write_text(to_toml(ModelLayout("deep", widths, patterns)))
    options = ["-a", "ffn", "-f", "2", "--tokens", "200B", "--expand-at", "100B", "--layout", str(path),
               "--experts-per-token", "8"]  # fmt: skip
    (warning,) = planned(*options)["warnings"]  # type: ignore[misc]
    assert "--axis expert_ffn is probably meant" in warning
    assert "warning: ffn is in" in CliRunner().invoke(app, ["plan", str(CONFIG), *options]).output


def test_a_moment_may_be_a_share_of_the_run(layout_file: Path) -> None:
    """50% of 200B is 100B; shares outside of the run are refused."""

    def planned(moment: str) -> str:
        words = ["plan", str(CONFIG), "-a", "ffn", "-f", "2", "--tokens", "200B", "--expand-at", moment]
        result = CliRunner().invoke(app, [*words, "--layout", str(layout_file), "--json"])
        return result.output if result.exit_code == 0 else str(result.exception)

    assert planned("50%") == planned("100B")
    assert "is not inside the run" in planned("100%")
    assert parse_then("ffn=2@12.5%", 200 * 10**9).tokens == 25 * 10**9


@pytest.mark.parametrize(
    "arguments",
    [
        ["-a", "ffn", "-f", "2", "--tokens", "200B"],
        ["--expand-at", "100B", "--tokens", "200B"],
        ["-a", "ffn", "-f", "2", "--tokens", "200B", "--expand-at", "300B"],
        ["-a", "ffn", "-f", "2", "--tokens", "many", "--expand-at", "1B"],
        ["-a", "fnn", "-f", "2", "--tokens", "200B", "--expand-at", "100B"],
        ["-a", "head_dim", "-f", "2", "--tokens", "200B", "--expand-at", "100B"],
    ],
)
def test_what_cannot_be_planned_is_a_spec_error(arguments: list[str], layout_file: Path) -> None:
    """The moment missing, the axis missing, outside the run, no number, no such axis, not widenable."""
    with pytest.raises(SpecError):
        CliRunner().invoke(
            app, ["plan", str(CONFIG), *arguments, "--layout", str(layout_file)], catch_exceptions=False
        )


@pytest.mark.parametrize("text", ["ffn=2", "ffn@100B", "ffn=x@100B", "=2@1B", "ffn=2@", "ffn=0.5@1B"])
def test_malformed_later_expansions_are_refused(text: str) -> None:
    """Axis, factor and moment are all needed."""
    with pytest.raises(SpecError):
        parse_then(text, 200 * 10**9)


def test_inference_counts_the_papers_model_from_its_config_alone() -> None:
    """Without a layout file, the model's own code gives the same numbers."""
    pytest.importorskip("transformers")
    found = planned("--tokens", "200B")
    (phase,) = found["phases"]  # type: ignore[misc]
    assert phase["active_parameters"] == pytest.approx(449.5e6, rel=1e-3)  # type: ignore[index]
    assert f"{phase['parameters'] / 1e9:.2f}B" == TABLE_2_PARAMETERS[()][1]  # type: ignore[index]
