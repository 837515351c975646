"""What a new user gets wrong, one mistake a row: the message names it, and what it says to type is right."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from sparkling_cli import expand, verify
from sparkling_cli.errors import SparklingError
from sparkling_cli.models.skeleton import causal_lm_names
from tests.cli.test_expand_command import Command

#: what is typed behind ``sparkling``, in a folder with a checkpoint ``ckpt``, its output ``wide`` and a run
#: ``run``; the exit code; what the message says
MISTAKES = [
    # commands
    ("report wide", 2, "DST/sparkling/report.html"),
    ("resume wide", 2, "`sparkling expand` prints the line to add to it"),
    ("help", 2, "`sparkling --help`"),
    ("verify ckpt", 2, "for example `sparkling verify ckpt/ ckpt-ffn2x/`"),
    ("plan ckpt", 2, "for example `sparkling plan config.json --axis ffn=2 --tokens 200B --expand-at 50%`"),
    ("plan ckpt --tokens 200 billion", 2, "--tokens 200B"),
    ("inspect ckpt wide", 2, "sparkling inspect CKPT --against OTHER"),
    ("inspect ckpt --against", 2, "see `sparkling inspect --help`"),
    ("expand ckpt ffn 2", 2, "an axis goes by an option: sparkling expand ckpt/ --axis ffn --factor 2"),
    ("expand ckpt a b --axis ffn=2", 2, "one checkpoint and one output"),
    ("verify ckpt wide/sparkling", 4, "give the output's folder, wide"),
    ("schedule wide --rho 2", 3, "add --write"),
    ("schedule wide --steps 600-620", 3, "--steps 600:620"),
    ("plan ckpt --tokens 200 --axis ffn=2 --expand-at 50%", 3, "--tokens 200B"),
    # options
    ("expand ckpt --axis ffn=2 --dryrun", 2, "did you mean --dry-run?"),
    ("expand ckpt --axis ffn=2 --layers 0,1", 2, "more layers: --axis layers=2"),
    ("expand ckpt --axis ffn=2 --dtype bf16", 2, "the types of the source"),
    ("expand ckpt --axis ffn=2 --no-optimizer", 2, "--optimizer drop, with an --init other than copy-copy"),
    ("expand ckpt --axis ffn=2 --rewarmup 10", 2, "did you mean --rewarmup-steps?"),
    ("expand ckpt --axis ffn=2 --threads 0", 2, "expected 1 or more"),
    ("inspect ckpt --sequences 0", 2, "expected 1 or more"),
    ("sparkling expand ckpt --axis ffn=2", 2, "leave out the first word"),
    ("expand --src ckpt --axis ffn=2", 2, "the checkpoint is the first argument"),
    ("expand ckpt --axis ffn=2 --device cuda", 2, "everything runs on the CPU"),
    ("layout ckpt --out mine.toml", 2, "sparkling layout CKPT > mine.toml"),
    # axes
    ("expand ckpt --axis depth --factor 2", 3, "did you mean 'layers'?"),
    ("expand ckpt --axis layer --factor 2", 3, "did you mean 'layers'?"),
    ("expand ckpt --axis num_hidden_layers=2", 3, "the config's name for the axis 'layers': --axis layers"),
    ("expand ckpt --axis head_size=2", 3, "'head_dim' cannot be widened here: attention is scaled by it"),
    ("expand ckpt --axis width=2", 3, "did you mean 'hidden'?"),
    ("expand ckpt --axis d_model=2", 3, "did you mean 'hidden'?"),
    ("expand ckpt --axis mlp=2", 3, "did you mean 'ffn'?"),
    ("expand ckpt --axis FFN=2", 3, "did you mean 'ffn'?"),
    ("expand ckpt --axis experts=2", 3, "choose one of these; sparkling layout CKPT shows each"),
    ("expand ckpt --axis ffn:2", 3, "write ffn=2"),
    ("expand ckpt --axis ffnx2", 3, "write ffn=2"),
    ("expand ckpt --axis ffn hidden --factor 2", 2, "write --axis ffn --axis hidden"),
    ("expand ckpt --axis ffn --factor 2 3x", 2, "write --axis ffn=3"),
    ("expand ckpt --axis ffn --axis ffn --factor 2", 3, "give it once"),
    ("expand ckpt --axis ffn2", 3, "write --axis ffn=2"),
    ("expand ckpt --axis hidden1.5x", 3, "write --axis hidden=1.5"),
    ("expand ckpt --axis mlp.up_proj=2", 3, "did you mean 'ffn'?"),
    ("expand ckpt --axis model.layers.0.self_attn=2", 3, "did you mean 'heads'?"),
    ("expand ckpt --axis hidden,ffn=2", 3, "--axis hidden --axis ffn=2"),
    ("expand ckpt --axis ffn --to 168", 3, "--to 336"),
    ("expand ckpt --axis heads=1.5", 3, "--axis heads --to 8"),
    ("expand ckpt --axis layers=2 --at 5", 3, "--at 2"),
    ("expand ckpt --axis ffn=2 --at 1", 3, "add --axis layers --factor 2"),
    ("expand ckpt --axis ffn=2 --vocab-from 512=1", 3, "add --axis vocab --to SIZE"),
    # factors
    ("expand ckpt --axis ffn --factor 2,3", 2, "--axis ffn=2 --axis hidden=3"),
    ("expand ckpt --axis ffn --factor 1,5", 2, "write 1.5"),
    ("expand ckpt --axis ffn --to 4,096", 2, "write 4096"),
    ("expand ckpt --axis ffn --factor 200%", 2, "write 2"),
    ("expand ckpt --axis ffn --factor 4096", 3, "for a size: --to 4096"),
    (
        "expand ckpt --axis ffn --axis hidden --factor 2 --factor 3 --factor 4",
        3,
        "--axis ffn=2 --axis hidden",
    ),
    ("expand ckpt --factor 2", 3, "e.g. --axis ffn --factor 2"),
    # values
    ("expand ckpt --axis ffn=2 --init zero", 3, "--init: expected 'copy-copy', 'zero-copy'"),
    ("expand ckpt --axis ffn=2 --schedule cos", 3, "did you mean 'cosine'?"),
    ("expand ckpt --axis ffn=2 --schedule warmup_stable_decay", 3, "did you mean 'wsd'?"),
    ("expand ckpt --axis ffn=2 --optimizer none", 3, "did you mean 'drop'?"),
    ("expand ckpt --axis ffn=2 --optimizer adam", 3, "leave it out for the default, 'asymmetric'"),
    ("expand ckpt --axis ffn=2 --rho 0", 3, "--rho: expected greater than 0 (found 0.0)"),
    ("expand ckpt --axis ffn=2 --model json:lods", 5, "did you mean json:loads?"),
    ("expand ckpt --axis ffn=2 --layout none.toml", 5, "sparkling layout CKPT > mine.toml"),
    ("expand ckpt --axis ffn=2 --layout ckpt/config.json", 5, "sparkling layout CKPT > mine.toml"),
    ("architectures LamaForCausalLM", 3, "did you mean 'llama'?"),
    ("expand ckpt --axis ffn=2 --seed abc", 2, "'--seed': expected a whole number"),
    ("expand ckpt --axis ffn=2 --rewarmup-steps 10%", 2, "'--rewarmup-steps': expected a whole number"),
    ("expand ckpt --axis ffn=2 --param-order none.txt", 4, "none.txt: No such file or directory"),
    ("expand ckpt --axis ffn=2 --carry none*", 3, "there is rng_state.pth: cpu, rng_state.pth: numpy.1"),
    ("expand ckpt --axis ffn=2 --carry rng_state.pt:*", 3, "did you mean 'rng_state.pth: cpu'"),
    ("expand ckpt --axis ffn=2 --carry exp_avg", 3, "optimizer state goes by --state NAME=carry"),
    ("expand ckpt --axis ffn=2 --carry lm_head.weight", 3, "weights follow the layout"),
    ("expand ckpt --axis ffn=2 --state momentum=moment", 3, "there is exp_avg, exp_avg_sq, step"),
    ("plan ckpt --axis ffn=2 --tokens 200B --expand-at 2026", 3, "it counts tokens, not steps"),
    ("plan ckpt --axis ffn=2 --tokens 200B --expand-at 100", 3, "write it as 100B, or as 50%"),
    ("plan ckpt --axis ffn=2 --tokens 200B --expand-at 0.5", 3, "a share is written as 50%"),
    ("plan ckpt/tokenizer.json --axis ffn=2 --tokens 2B --expand-at 1B", 5, "give the config.json"),
    ("expand ckpt --axis ffn=2 --init copy_copy", 3, "did you mean 'copy-copy'?"),
    ("expand ckpt --axis ffn=2 --memory lots", 3, "512M or 2G"),
    ("expand ckpt --axis ffn=2 --data notes.txt --report none", 3, "leave out one of them"),
    ("expand ckpt --axis ffn=2 --total-steps 500", 3, "the length of the run that goes on"),
    # places
    ("expand ckpt notes.txt/out --axis ffn=2", 7, "choose a place in a folder"),
    ("expand run/checkpoint-700 --axis ffn=2", 4, "did you mean run/checkpoint-600?"),
    ("expand ckpt wide --axis ffn=2", 7, "choose another name, or remove it"),
    ("expand ckpt ckpt/in --axis ffn=2", 7, "choose a place beside it"),
    ("expand ckptt --axis ffn=2", 4, "did you mean ckpt?"),
    ("expand gpt2 --axis ffn=2", 4, "hf download gpt2 --local-dir DIR"),
    ("expand https://huggingface.co/org/name/tree/main --axis ffn=2", 4, "hf download org/name --local-dir"),
    ("expand hf://org/name --axis ffn=2", 4, "hf://org/name: there is nothing"),
    ("expand s3://bucket/name --axis ffn=2", 4, "s3://bucket/name: there is nothing"),
    ("expand run --axis ffn=2", 4, "choose one: run/checkpoint-600"),
    ("expand ckpt/config.json --axis ffn=2", 4, "give its folder, ckpt"),
    ("expand ckpt/optimizer.pt --axis ffn=2", 4, "give its folder, ckpt"),
    ("inspect wide/sparkling/report.html", 4, "give its folder, wide"),
    ("inspect empty", 4, "it is empty"),
    ("verify ckpt wied", 4, "did you mean wide?"),
    ("verify wide ckpt", 4, "the source comes first: sparkling verify ckpt wide"),
    ("schedule wied", 4, "cannot read wied: No such file or directory"),
    ("schedule ckpt", 4, "give an output of `sparkling expand`"),
    ("schedule ckpt --write", 4, "give the output"),
    # files
    ("expand ckpt --axis ffn=2 --data ckpt", 3, "--data ckpt: is a folder"),
    (
        "expand ckpt --axis ffn=2 --data ckpt/model.safetensors",
        3,
        "neither UTF-8 text nor a known token",
    ),
    ("expand ckpt --spec ckpt", 3, "is a folder"),
    ("expand ckpt --spec none.yaml", 3, "there is no spec file none.yaml"),
    ("expand ckpt --spec ckpt/rng_state.pth", 3, "cannot read the spec file"),
]
#: words that speak of the program's inside
PYTHONS = re.compile(r"Errno|\btuple\b|NoneType|Input should")


@pytest.fixture
def sparkling(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dense_checkpoint: Path,
    tmp_path: Path,
) -> Command:
    """The command line in a folder with a checkpoint, its output and a run."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense_checkpoint, "ckpt")
    Path("run").mkdir()
    Path("empty").mkdir()
    Path("notes.txt").write_text("some text\n" * 100)
    Path("run/checkpoint-500").symlink_to(tmp_path / "ckpt")
    Path("run/checkpoint-600").symlink_to(tmp_path / "ckpt")
    command = Command(monkeypatch, capsys)
    assert command("expand", "ckpt", "wide", "--axis", "ffn=2", "--report", "none", "--quiet").code == 0
    return command


def test_each_message_leads_on(sparkling: Command) -> None:
    """One error, one hint, its exit code; no word of Python's; nothing is written."""
    before = sorted(Path().iterdir())
    wrong = []
    for typed, code, said in MISTAKES:
        done = sparkling(*typed.split())
        message = " ".join(done.err.split())
        sound = message.count("error: ") == 1 and message.count("hint: ") <= 1 and not PYTHONS.search(message)
        if done.code != code or said not in message or not sound:
            wrong.append((typed, done.code, message))
    assert not wrong
    assert sorted(Path().iterdir()) == before


def test_what_is_likely_a_slip_is_warned_of(sparkling: Command) -> None:
    """A peak of 13 times the rate; and what a message about state says to type is right."""
    done = sparkling("expand", "ckpt", "--axis", "ffn=2", "--rho", 13, "--dry-run")
    assert done.code == 0 and "1.25 to 1.3 was best" in " ".join(done.err.split())
    options = ("--axis", "ffn=2", "--optimizer", "drop", "--init", "zero-copy", "--dry-run")
    assert sparkling("expand", "ckpt", *options).code == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("axes: ffn", "axes: expected a list (found 'ffn')"),
        ("axes: [ffn]", "axes.0: expected a mapping of fields"),
        ("axes: [{axis: ffn, by: 2}]", "hint: "),
        ("axes: [{axis: ffn, factor: two}]", "axes.0.factor: expected a number (found 'two')"),
        ("axes: [{axis: ffn, factor: 2}]\nintit: copy-copy", "did you mean init?"),
        ("axes: [{axis: ffn, factor: 2}]\nmemory: 2G", "pass --memory beside it"),
        ("axes: [{axis: ffn, factor: 2}]\nrewarmup: {rhoo: 2}", "did you mean rho?"),
        ("axes: [{axis: ffn, factor: 2}]\nbaseline: {type: cos}", "did you mean 'cosine'?"),
        ("axes:\n- axis: ffn\n   factor: 2", "axes: [{axis: ffn, factor: 2}]"),
        ("", "found nothing"),
        ("hello", "found 'hello'"),
    ],
)
def test_a_spec_file_with_a_mistake(sparkling: Command, text: str, said: str) -> None:
    """The field, what was expected, and what a right file looks like or what was meant."""
    Path("spec.yaml").write_text(text)
    done = sparkling("expand", "ckpt", "out", "--spec", "spec.yaml", "--dry-run")
    message = " ".join(done.err.split())
    assert done.code == 3 and said in message and message.count("hint: ") == 1, message
    assert not PYTHONS.search(message)


def test_axes_of_a_spec_file_as_factors(sparkling: Command) -> None:
    """As in Python: axis and factor."""
    Path("spec.yaml").write_text("axes: {ffn: 2, hidden: 1.5}")
    done = sparkling("expand", "ckpt", "out", "--spec", "spec.yaml", "--dry-run")
    assert done.code == 0 and "336" in done.out and "144" in done.out, done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"axes": "fnn", "factor": 2}, "did you mean 'ffn'?"),
        ({"axes": ["ffn", "hidden"], "factor": [2]}, "2 axes but 1 values"),
        ({"axis": "ffn", "factr": 2}, "did you mean factor?"),
        ({"axis": "ffn", "factor": 2, "dry_run": True}, "make_plan(...) takes the same"),
        ({"axis": "ffn", "factor": 2, "rewarmup_step": 9}, "did you mean rewarmup_steps?"),
        ({"axis": "ffn", "factor": 2, "init": "zero"}, "init: expected"),
        ({"axis": "ffn=2", "factor": 2}, "give it once"),
        ({"axes": {"ffn": 2}, "carry": "none*"}, 'carry="none*": matches nothing'),
        ({"spec": {"axes": {"ffn": 2}}, "rho": 2}, "not both"),
        ({"spec": "none.yaml"}, "there is no spec file none.yaml"),
    ],
)
def test_mistakes_in_python(sparkling: Command, options: dict[str, object], said: str) -> None:
    """In the words of a call."""
    with pytest.raises(SparklingError) as caught:
        expand("ckpt", "out", **options)  # type: ignore[arg-type]
    assert said in str(caught.value) and "--" not in str(caught.value)


def test_the_wrong_order_in_python(sparkling: Command) -> None:
    """As on the command line."""
    with pytest.raises(SparklingError, match="the source comes first: sparkling verify ckpt wide"):
        verify("wide", "ckpt")


def test_the_list_of_classes_without_transformers(
    sparkling: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing package is named, with what installs it."""
    causal_lm_names.cache_clear()
    for name in ("transformers", "transformers.models.auto.modeling_auto"):
        monkeypatch.setitem(sys.modules, name, None)
    done = sparkling("architectures")
    assert done.code == 9 and "pip install '.[hf]'" in done.err and "Traceback" not in done.err
