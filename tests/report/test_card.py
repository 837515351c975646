"""The model card section: front matter kept, the section once, every expansion listed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.plan.model import Expansion, Invocation, Plan
from sparkling_cli.report.model_card import BEGIN, END, extended, front_matter, with_card
from sparkling_cli.spec.model import AxisSpec, ExpansionSpec
from sparkling_cli.widening.geometry import Growth, Treatment

FRONT = "---\nlicense: apache-2.0\ntags:\n- tiny\n---\n\n# My model\n\nIt tells stories.\n"


def expansion_of(
    root: Path, *carried: str, config_file: str = "config.json", previous: Any = None
) -> Expansion:
    """An expansion of which the card asks no more than this."""
    checkpoint = Checkpoint(
        root=root, format="trainer", tensors={}, weights={}, config={}, config_file=config_file,
        carried=tuple(carried), facts={"global_step": 600},
    )  # fmt: skip
    spec = ExpansionSpec(axes=(AxisSpec(axis="ffn", factor=2.0),))
    layout, growth = ModelLayout("LlamaForCausalLM", {}, ()), {"ffn": Growth(168, 336)}
    plan = Plan(checkpoint, layout, spec, growth, Treatment(), (), ())
    return Expansion(plan, (), root / "wide", Invocation(root), previous)


def readme(expansion: Expansion) -> str:
    """The README that would be written."""
    (file,) = with_card(expansion).files
    assert file.path == "README.md"
    ((offset, content),) = file.literals
    assert (offset, len(content)) == (0, file.size)
    return content.decode()


def test_a_readme_is_extended_and_its_front_matter_kept(tmp_path: Path) -> None:
    """Every byte of the source's README stays; the section follows; the file is no longer carried."""
    (tmp_path / "README.md").write_text(FRONT)
    expansion = expansion_of(tmp_path, "README.md", "config.json")
    text = readme(expansion)
    assert text.startswith(FRONT.rstrip("\n"))
    assert "| 1 | 600 | ffn | 168 | 336 | copy-copy |" in text
    assert with_card(expansion).plan.source.carried == ("config.json",)


def test_the_front_matter_is_the_hubs() -> None:
    """huggingface_hub reads it, with the base model where the config names one of the hub."""
    hub = pytest.importorskip("huggingface_hub")
    config = {"model_type": "llama", "_name_or_path": "meta-llama/Llama-3.2-1B"}
    card = hub.ModelCard(extended("", "section", "name", front_matter(config)))
    assert card.data.base_model == "meta-llama/Llama-3.2-1B"
    assert card.data.library_name == "transformers" and "sparkling" in card.data.tags
    for other in (None, {"d_model": 8}, {"model_type": "llama", "_name_or_path": "/data/run 1"}):
        assert hub.ModelCard(extended("", "section", "name", front_matter(other))).data.base_model is None


def test_without_a_readme_a_new_one_is_made(tmp_path: Path) -> None:
    """Front matter, a heading and the section."""
    text = readme(expansion_of(tmp_path))
    assert re.match(r"---\n(.+\n)+---\n\n# ", text)
    assert text.count(BEGIN) == text.count(END) == 1


def test_a_second_expansion_replaces_the_section_by_one_that_lists_both(tmp_path: Path) -> None:
    """What stands before and after the section stays as it is."""
    first = readme(expansion_of(tmp_path))
    (tmp_path / "README.md").write_text(FRONT + first + "\n## Evaluation\n")
    stage = SimpleNamespace(
        stage=1, step=300, growth={"ffn": (84, 168)}, spec={"init": "zero-copy", "optimizer": "asymmetric"}
    )
    text = readme(expansion_of(tmp_path, "README.md", previous=SimpleNamespace(stages=(stage,))))
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.startswith(FRONT)
    assert text.endswith("\n## Evaluation\n")
    assert "| 1 | 300 | ffn | 84 | 168 | zero-copy | asymmetric |" in text
    assert "| 2 | 600 | ffn | 168 | 336 | copy-copy |" in text


def test_formats_where_nobody_looks_get_none(tmp_path: Path) -> None:
    """No README in a directory without one and without config.json, nor beside a single file."""
    expansion = expansion_of(tmp_path, config_file="train_config")
    assert with_card(expansion) is expansion


def test_a_readme_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    """It is neither dropped nor mangled."""
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        with_card(expansion_of(tmp_path, "README.md"))
