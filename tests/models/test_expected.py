"""An output is held to its model's own class before it appears; the class is asked once for a config."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparkling_cli import api
from sparkling_cli.errors import OutputError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.layout.file import to_toml
from sparkling_cli.models import expected
from sparkling_cli.models.expected import Asking, ask_class, class_faults, weight_shapes
from sparkling_cli.plan import build
from tests.conftest import TinyCheckpoint

FFN = {"axes": [{"axis": "ffn", "factor": 2}]}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_a_checkpoint_has_what_its_class_has(tiny_checkpoint: TinyCheckpoint, arch: str) -> None:
    """Tied heads are absent, buffers aside, experts under the names on disk or of the module."""
    found = open_checkpoint(tiny_checkpoint(arch))
    assert found.config is not None
    answer = ask_class(found.config)
    shapes = weight_shapes(found)
    assert answer.name and answer.faults(shapes) == {}
    name = max(shapes)
    assert name in answer.faults({**shapes, name: (1, 2, 3)})
    assert name in answer.faults({n: s for n, s in shapes.items() if n != name})
    assert answer.faults({**shapes, "stranger.weight": (3,)}) == {
        "stranger.weight": f"is no tensor of {answer.name}"
    }


def test_an_output_that_its_class_would_not_load_never_appears(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are wide and the config is narrow: refused before the rename, and nothing is left."""
    monkeypatch.setattr(build, "changed_config", lambda *_: {})
    with pytest.raises(OutputError, match=r"down_proj.*LlamaForCausalLM has"):
        api.expand(dense_checkpoint, tmp_path / "out", report="none", **FFN)
    assert list(tmp_path.iterdir()) == []


def test_what_the_source_has_already_is_no_fault_of_the_output(dense_checkpoint: Path) -> None:
    """A tensor that the class does not know, in both: nobody's fault here."""
    found = open_checkpoint(dense_checkpoint)
    assert found.config is not None
    shapes = {**weight_shapes(found), "leftover": (5,)}
    answer = ask_class(found.config)
    assert class_faults(answer, shapes, lambda: (found.config, shapes)) == []
    assert class_faults(answer, shapes, lambda: (found.config, weight_shapes(found))) != []


def test_it_is_asked_once_and_beside_the_work(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Where transformers is not imported yet: a process of its own the first time, the cache the second."""
    code = (
        "import sys, subprocess\n"
        "from pathlib import Path\n"
        "from sparkling_cli import api\n"
        "from sparkling_cli.models import expected\n"
        "real, started = expected._started, []\n"
        "expected._started = lambda config: started.append(1) or real(config)\n"
        "for name in ('a', 'b'):\n"
        "    api.expand(sys.argv[1], Path(sys.argv[2]) / name, report='none',\n"
        "               axes=[{'axis': 'ffn', 'factor': 2}], init='random-copy', layout=Path(sys.argv[3]))\n"
        "assert 'transformers' not in sys.modules\n"
        "print(len(started))\n"
    )
    layout = tmp_path / "layout.toml"
    layout.write_text(to_toml(api.layout_of(dense_checkpoint)))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(dense_checkpoint / name, bare / name)
    done = subprocess.run(
        [sys.executable, "-c", code, str(bare), str(tmp_path), str(layout)],
        env={**os.environ, "SPARKLING_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


def test_leaving_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends early ends the process that it asked."""
    monkeypatch.setattr(expected.cache, "load", lambda *_: None)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with Asking({"model_type": "llama"}) as asked:
        process = asked._process
        assert isinstance(process, subprocess.Popen)
    assert process.poll() is not None


def test_a_config_without_a_class_is_not_asked_about() -> None:
    """A model of one's own: nothing to be held to."""
    with Asking({"n_embd": 8}) as asked:
        assert asked.answer() is None
    assert ask_class({"model_type": "nobody-knows"}).reason
    assert expected._JSON.dump_json(ask_class({"model_type": "nobody-knows"}))


def test_the_answer_is_made_while_others_work(
    monkeypatch: pytest.MonkeyPatch, dense_checkpoint: Path
) -> None:
    """The process that is asked ends by itself, before anybody waits for its answer."""
    monkeypatch.setattr(expected.cache, "load", lambda *_: None)
    monkeypatch.setattr(expected.cache, "store", lambda *_: None)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with Asking(open_checkpoint(dense_checkpoint).config) as asked:
        assert asked._process is not None
        assert asked._process.wait(timeout=500) == 0
        answer = asked.answer()
    assert answer is not None and answer.name == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("instead", "why"),
    [
        ("_transformers_is_there", "transformers is not installed"),
        ("_started", "its process ended without an answer"),
    ],
)
def test_a_class_that_cannot_be_asked_is_said(
    instead: str, why: str, dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the report and by ``verify``, which no longer says whose names and shapes they are."""
    silent = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    value = False if instead == "_transformers_is_there" else silent
    monkeypatch.setattr(expected, instead, lambda *_: value)
    monkeypatch.setattr(expected.cache, "load", lambda *_: None)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    result = api.expand(dense_checkpoint, tmp_path / "out", report="none", **FFN)
    assert result.report is not None
    assert f"names and shapes were not compared with the model's own class: {why}" in result.report.notes
    monkeypatch.setattr(expected, instead, lambda *_: False)
    monkeypatch.setattr(expected, "_transformers_is_there", lambda: False)
    found = api.verify(dense_checkpoint, tmp_path / "out")
    assert (found.model, found.model_missing) == ("", "transformers is not installed")
    assert "not compared with the model's own class: transformers is not installed" in found.summary()


def test_without_a_source_no_class_is_claimed(dense_checkpoint: Path, tmp_path: Path) -> None:
    """What only compares digests does not say whose names and shapes the weights have."""
    from sparkling_cli.verification import verify

    api.expand(dense_checkpoint, tmp_path / "out", report="none", **FFN)
    assert verify(dense_checkpoint, tmp_path / "out").model == "LlamaForCausalLM"
    assert verify(None, tmp_path / "out").model == ""
