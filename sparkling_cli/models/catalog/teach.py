"""Makes the catalog: ``python -m sparkling_cli.models.catalog.teach [MODEL_TYPE ...] [--out FOLDER]``.

Every structure of a class is inferred in several random sizes; what comes out is made into a template, and
an entry keeps those structures whose template gives back, through the very code that reads it later, every
layout and every list of parameters that inference found. What does not is left to inference, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparkling_cli.models.catalog.filled import free_keys
from sparkling_cli.models.catalog.irrelevant import ROPE
from sparkling_cli.models.catalog.lookup import FOLDER
from sparkling_cli.models.catalog.teach_class import Class
from sparkling_cli.models.catalog.teach_template import Unclean
from sparkling_cli.models.catalog.teach_variants import structures

#: The classes that are taught where none is named. Not granitemoe: its multipliers decide whether two experts
#: of a tiny model come so close that inference itself cannot tell.
CLASSES = """
llama qwen3_moe qwen3 qwen2 mistral mixtral deepseek_v3 gemma gemma2 gemma3_text gpt2 gpt_neox olmo olmo2
olmo3 olmoe phi phi3 gptj opt falcon starcoder2 cohere cohere2 granite gpt_oss qwen2_moe
deepseek_v2 glm glm4 smollm3 stablelm nemotron ministral glm4_moe ministral3 ernie4_5 seed_oss arcee exaone4
dots1 hunyuan_v1_dense gpt_bigcode minimax_m2 flex_olmo apertus granitemoeshared
"""


def learn(model_type: str) -> tuple[dict[str, Any], list[str]]:
    """The entry of a class, and what was left out with the reason.

    Raises:
        Unclean: nothing of the class can be told by an entry.
    """
    taught = Class(model_type)
    entry = taught.entry
    left: list[str] = []
    for structure in structures(taught.defaults, taught.extra):
        if not entry["structures"]:
            taught.usual = structure
        try:
            taught.learn(structure)
        except Exception as error:  # inference and the class's code may refuse a structure as they like
            said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            left.append(f"{structure.relation} {dict(structure.changes)}: {said}")
    if not entry["structures"]:
        raise Unclean("; ".join(left[:2]) or "no structure was found")
    held = sorted(set(free_keys(entry["keys"])) - set(entry["free"]))
    left += [f"{key} is held to {entry['keys'][key]!r}" for key in held]
    if isinstance(entry["keys"].get("rope_parameters"), str):
        left += [f"rotary type {k} is left to inference" for k in sorted(set(ROPE) - set(entry["rope"]))]
    return _closed(taught), left


def _closed(taught: Class) -> dict[str, Any]:
    """The entry as it is written: templates that are used, put together from parts."""
    entry = taught.entry
    used = sorted({row["template"] for row in entry["structures"]})
    rows = [{**row, "template": used.index(row["template"])} for row in entry["structures"]]
    templates, parts = pooled([entry["templates"][i] for i in used])
    head = {
        "model_type": taught.model_type,
        "architecture": taught.architecture,
        "transformers": version("transformers"),
    }
    return {**head, **entry, "structures": rows, "parts": parts, "templates": templates}


def pooled(templates: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, int]], list[Any]]:
    """Templates that name their parts by number, as most parts occur in several; and the parts."""
    parts: dict[str, tuple[int, Any]] = {}

    def place(value: Any) -> int:
        return parts.setdefault(json.dumps(value), (len(parts), value))[0]

    rows = [{key: place(value) for key, value in template.items()} for template in templates]
    return rows, [value for _, value in parts.values()]


def written(entry: Mapping[str, Any]) -> str:
    """An entry as text: one line per key, structure, template and part."""
    lines = []
    for key, value in entry.items():
        if key in ("structures", "templates", "parts"):
            rows = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in value)
            lines.append(f'"{key}": [\n{rows}\n ]')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _teach_one(model_type: str) -> tuple[str, str, list[str]]:
    """Name and text of an entry, and what was left out; an empty text if all was."""
    import torch

    torch.set_num_threads(1)
    try:
        entry, left = learn(model_type)
    except Exception as error:  # the class's code may raise anything
        return model_type, "", [" ".join(f"{type(error).__name__}: {error}".split())[:400]]
    return f"{model_type}-{entry['architecture']}", written(entry), left


def main(arguments: Sequence[str] | None = None) -> int:
    """Teach classes and write their entries; returns the exit code."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("classes", nargs="*", metavar="MODEL_TYPE", help="default: those of the catalog")
    own = Path(__file__).resolve().parents[2].joinpath(*FOLDER)
    parser.add_argument("--out", type=Path, default=own, help="folder of the entries")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs) as pool:
        tasks = [pool.submit(_teach_one, name) for name in options.classes or CLASSES.split()]
        for done in as_completed(tasks):
            name, text, left = done.result()
            if text:
                (options.out / f"{name}.json").write_text(text, encoding="utf-8")
            sys.stdout.write(f"{name}: {f'{len(text):,} bytes' if text else 'left out'}\n")
            sys.stdout.writelines(f"  {line}\n" for line in left)
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
