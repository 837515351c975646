"""Proofs are made once; the survey says per class what is proved and why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparkling_cli.errors import LayoutError, SpecError
from sparkling_cli.models import infer as module
from sparkling_cli.models import packaged_proof, survey
from sparkling_cli.storage import cache

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_second_call_proves_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout comes from the cache, equal to the first."""
    first = module.infer(CONFIG)

    def never(*args: object) -> None:
        raise AssertionError("inferred twice")

    monkeypatch.setattr(module, "_inferred", never)
    assert module.infer(dict(CONFIG)) == first
    with pytest.raises(AssertionError, match="twice"):
        module.infer({**CONFIG, "intermediate_size": 48})


def test_damaged_entries_are_as_good_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache file that is no JSON is ignored; a cache that cannot be written is no error."""
    monkeypatch.setenv("SPARKLING_CACHE_DIR", str(tmp_path))
    cache.store("layouts", "key", {"a": 1})
    assert cache.load("layouts", "key") == {"a": 1}
    (tmp_path / "layouts" / "key.json").write_text("{")
    assert cache.load("layouts", "key") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARKLING_CACHE_DIR", str(tmp_path / "file"))
    cache.store("layouts", "key", {"a": 1})
    assert cache.load("layouts", "key") is None


def test_the_survey_lists_proved_axes_and_reasons() -> None:
    """GPT-2 couples hidden to heads; the page says so, counts it, and is made of the same rows."""
    rows = survey.survey(["gpt2"])
    assert rows[0].proved({"hidden"}) == ("hidden",)
    assert survey.counts(rows) == {"ffn": 1, "hidden": 1, "heads": 1}
    page = survey.to_markdown(rows)
    assert "| gpt2 | GPT2LMHeadModel | ffn | hidden (with heads) | heads (with hidden) |" in page
    assert survey.result(rows).architectures[0].class_name == "GPT2LMHeadModel"
    assert survey.survey(["gpt2"]) == rows


def test_an_inner_width_without_a_key_grows_with_hidden() -> None:
    """GPT-1's is four times hidden in code: one axis more that grows with it, and is asked for with it."""
    row = survey.survey(["openai-gpt"])[0]
    ffn = next(axis for axis in row.axes if axis.name == "ffn")
    assert ffn.proved and set(ffn.joint) == {"hidden", "heads"}
    assert "| ffn (with hidden, heads) |" in survey.to_markdown([row])


def test_an_axis_that_a_class_does_not_have_has_a_reason() -> None:
    """Mamba has no attention."""
    row = survey.survey(["mamba"])[0]
    heads = next(axis for axis in row.axes if axis.name == "heads")
    assert not heads.proved and heads.reason == "no key of its config sizes heads: its mixers have none"


def test_what_a_layout_file_proves_is_counted_and_marked() -> None:
    """Helium's hidden and heads are not inferred; its file is tried on a tiny model, and named."""
    row = survey.survey(["helium"])[0]
    found = {axis.name: axis for axis in row.axes if axis.layout_file}
    assert found.keys() == {"hidden", "kv_heads"} and all(axis.proved for axis in found.values())
    assert survey.counts([row]) == {"ffn": 1, "hidden": 1, "heads": 1}
    page = survey.to_markdown([row])
    assert "| hidden (with kv_heads; layout file) | kv_heads (with hidden; layout file) |" in page


def test_a_file_that_is_wrong_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys' channels outside their heads: what is left is what has nothing to do with them."""
    data = packaged_proof.packaged_data("helium")
    wrong = {
        **data["tensors"],
        "model.layers.{layers}.self_attn.k_proj.weight": "(head_dim kv_heads) <- hidden",
    }
    monkeypatch.setattr(packaged_proof, "packaged_data", lambda name: {**data, "tensors": wrong})
    monkeypatch.setattr(packaged_proof, "file_of", lambda model_type: "helium")
    assert {axis.name for axis in packaged_proof.proved_by_file("helium")} == {"ffn"}


def test_a_type_that_the_library_lacks_is_refused() -> None:
    """The error proposes the nearest name."""
    with pytest.raises(SpecError, match="lama3") as caught:
        survey.survey(["lama3"])
    assert "llama" in str(caught.value)


def test_a_refusal_is_kept_as_a_proof_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second answer is the first, and nothing is tried again; what a package would mend is tried."""
    calls: list[str] = []

    def refusing(config: dict[str, Any], *_: object) -> None:
        calls.append(config["why"])
        raise LayoutError(f"no tiny model could be run: {config['why']}", hint="give a layout file")

    monkeypatch.setattr(module, "_inferred", refusing)
    for why in ("sizes do not fit", "ImportError: timm"):
        for _ in range(2):
            with pytest.raises(LayoutError, match=why) as caught:
                module.infer({**CONFIG, "why": why})
            assert caught.value.hint == "give a layout file"
    assert calls == ["sizes do not fit", "ImportError: timm", "ImportError: timm"]
