"""The catalog says what inference would find, about nothing but what was proved, and without its imports."""

from __future__ import annotations

import importlib.metadata
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from catalog_support import agreement, unseen

from sparkling_cli.layout.packaged import packaged_names
from sparkling_cli.models import catalog
from sparkling_cli.models.catalog import lookup
from sparkling_cli.models.catalog.teach import learn, written
from sparkling_cli.models.catalog.terms import evaluate

Config = dict[str, Any]
ENTRIES = lookup.entry_names()
#: Entries that the default tests look at; all others are the survey's.
QUICK = ("llama-LlamaForCausalLM", "qwen3_moe-Qwen3MoeForCausalLM", "deepseek_v3-DeepseekV3ForCausalLM")


def config_of(checkpoint: Path) -> Config:
    """The config of a checkpoint."""
    found: Config = json.loads((checkpoint / "config.json").read_text())
    return found


def test_the_catalog_is_of_the_installed_transformers() -> None:
    """Another version needs another catalog: until it is made, every first run would infer again."""
    made_with = {lookup.read_entry(name)["transformers"] for name in ENTRIES}
    assert made_with == {importlib.metadata.version("transformers")}, (
        "make the catalog again: python -m sparkling_cli.models.catalog.teach"
    )


@pytest.mark.parametrize("name", QUICK)
def test_sizes_that_were_never_seen_are_told_as_inference_tells_them(name: str) -> None:
    """Layout, order and shapes of parameters, and the decayed ones."""
    assert sum(agreement(raw) for raw in unseen(name, "quick", 3)) >= 2


@pytest.mark.survey
@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_says_what_inference_says(name: str) -> None:
    """A dozen structures in unseen sizes; keys left out, numbers that do not matter at random."""
    assert sum(agreement(raw) for raw in unseen(name, "survey", 12)) >= 5


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_bundled_checkpoints_are_known(kind: str, dense_checkpoint: Path, moe_checkpoint: Path) -> None:
    """What the bundled configs say is proved, and equal to what inference finds now."""
    assert agreement(config_of(dense_checkpoint if kind == "dense" else moe_checkpoint))


#: what is changed in the bundled Llama's config -> why it must not be known
NEAR_MISSES: dict[str, Config] = {
    "an unknown key": {"my_own_key": 1},
    "another activation": {"hidden_act": "gelu"},
    "remote code": {"auto_map": {"AutoModel": "x.Y"}},
    "two biases, proved one by one only": {"attention_bias": True, "mlp_bias": True},
    "another class": {"architectures": ["MistralForCausalLM"]},
    "no class": {"architectures": None},
    "two classes": {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
    "heads in no groups": {"num_key_value_heads": 4},
    "an odd head": {"head_dim": 15},
    "hidden no multiple of twice the heads": {"hidden_size": 90},
    "a token outside of the vocabulary": {"pad_token_id": 512},
    "numbers in words": {"intermediate_size": "168"},
    "a size that is no whole number": {"intermediate_size": 168.0},
    "a switch that is a number": {"attention_bias": 0},
    "an epsilon that swallows all": {"rms_norm_eps": 10.0},
    "one layer": {"num_hidden_layers": 1},
    "tables of rotary factors": {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                            "long_factor": [1.0] * 8, "original_max_position_embeddings": 64}},
    "an unknown rotary key": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "x": 1}},
    "a rotary number that is missing": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    "a part of the head rotated": {"partial_rotary_factor": 0.7},
    "a quantized model": {"quantization_config": {"bits": 4}},
    "few positions": {"max_position_embeddings": 32},
    "no heads": {"num_attention_heads": 0},
}  # fmt: skip


@pytest.mark.parametrize("why", sorted(NEAR_MISSES))
def test_what_was_not_proved_is_not_known(why: str, dense_checkpoint: Path) -> None:
    """One key away from a known config."""
    config = config_of(dense_checkpoint)
    assert catalog.known(config) is not None
    assert catalog.known({**config, **NEAR_MISSES[why]}) is None


NONSENSE: list[Any] = [[], {}, [[]], {"rope_type": []}, "", -1, 0, 0.5, True, [1, 2, 3], {"a": {"b": 1}}]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_nonsense_is_not_known_and_no_accident(
    kind: str, dense_checkpoint: Path, moe_checkpoint: Path
) -> None:
    """Anything in the place of any value: the question is answered, and a size of that kind is not known."""
    config = config_of(dense_checkpoint if kind == "dense" else moe_checkpoint)
    for key in config:
        for value in NONSENSE:
            found = catalog.known({**config, key: value})
            if key in ("hidden_size", "num_attention_heads", "architectures", "model_type", "hidden_act"):
                assert found is None, (key, value)
        catalog.known({**config, key: 10**12})


def test_lists_of_another_length_are_not_known() -> None:
    """A list with an entry per layer is as long as there are layers, or the class refuses it."""
    raw = next(raw for raw in unseen("qwen3-Qwen3ForCausalLM", "lists", 9) if catalog.known(raw))
    assert catalog.known({**raw, "layer_types": raw["layer_types"][:2]}) is None


def test_another_version_of_transformers_counts(
    dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed version, whatever the config says; the config's where none is installed."""
    config = config_of(dense_checkpoint)
    made_with = lookup.read_entry(QUICK[0])["transformers"]

    def says(found: str | None) -> None:
        def version(name: str) -> str:
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(lookup.importlib.metadata, "version", version)

    says("4.0.0")
    assert catalog.known(config) is None
    says(made_with)
    assert catalog.known({**config, "transformers_version": "4.0.0"}) is not None
    says(None)
    assert catalog.known({**config, "transformers_version": made_with}) is not None
    assert catalog.known({**config, "transformers_version": "4.0.0"}) is None


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_first_plan_imports_neither_torch_nor_transformers(
    kind: str, dense_checkpoint: Path, moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``expand --dry-run`` with nothing in the cache; afterwards there is still nothing in it."""
    checkpoint = dense_checkpoint if kind == "dense" else moe_checkpoint
    monkeypatch.setenv("SPARKLING_CACHE_DIR", str(tmp_path / "cache"))
    code = (
        "import sys\n"
        "from sparkling_cli.cli.app import app\n"
        "from sparkling_cli.cli.console import run\n"
        "status = run(app)\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    asked = ["expand", str(checkpoint), str(tmp_path / "out"), "--axis", "ffn", "--factor", "2", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "model_type",
    ["gpt2", *(pytest.param(m, marks=pytest.mark.survey) for m in ("llama", "mistral", "olmo2", "gemma2"))],
)
def test_entries_are_what_they_would_be_if_they_were_made_today(model_type: str) -> None:
    """A change of inference, or of what makes entries, is a change of the catalog."""
    entry, _ = learn(model_type)
    name = f"{model_type}-{entry['architecture']}"
    folder = Path(lookup.__file__).parents[2].joinpath(*lookup.FOLDER)
    assert written(entry) == (folder / f"{name}.json").read_text(encoding="utf-8"), (
        "make the catalog again: python -m sparkling_cli.models.catalog.teach"
    )


def test_entries_are_no_layout_files() -> None:
    """They lie beside the layout files of the package and are none."""
    assert not set(packaged_names()) & {"transformers", *ENTRIES}


def test_expressions_are_exact() -> None:
    """From left to right; what does not divide, or has no number, has no value."""
    numbers = {"a": 12, "b": 4, "c": 5}
    assert evaluate("2 * a / b", numbers) == 6
    assert evaluate("a + 3", numbers) == 15
    assert evaluate("a / c", numbers) is None
    assert evaluate("a * d", numbers) is None


def test_what_is_asked_for_at_random_is_asked_for_again() -> None:
    """Equal seeds give equal configs."""
    assert list(unseen(QUICK[0], "again", 2)) == list(unseen(QUICK[0], "again", 2))
    assert random.Random("again").random() == random.Random("again").random()
