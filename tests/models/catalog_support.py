"""Configs of a class that the catalog was not made from, and what inference says about them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from sparkling_cli.models import catalog
from sparkling_cli.models import infer as module
from sparkling_cli.models.catalog.irrelevant import number_range
from sparkling_cli.models.catalog.lookup import read_entry
from sparkling_cli.models.catalog.teach_class import ASSUMED
from sparkling_cli.models.catalog.teach_rules import completed
from sparkling_cli.models.catalog.teach_template import plain
from sparkling_cli.models.catalog.teach_variants import sample, structures
from sparkling_cli.models.locate import ask_model
from sparkling_cli.models.skeleton import default_config

Config = dict[str, Any]


def unseen(name: str, seed: str, count: int) -> Iterator[Config]:
    """Configs of an entry's class in sizes of their own: the usual structure first, then any.

    Keys are left out and numbers that no layout depends on are changed at random; some configs are not
    accepted by the class and some are not known: these are yielded too.
    """
    entry = read_entry(name)
    head = {"model_type": entry["model_type"], "architectures": [entry["architecture"]]}
    assumed = ASSUMED.get(entry["model_type"], {})
    defaults = completed({**default_config(entry["model_type"]), **assumed, **head})
    assert defaults is not None
    every = list(structures(defaults, tuple(entry["extra"])))
    for n in range(count):
        rng = random.Random(f"{name} {seed} {n}")
        structure = every[n % len(every)] if n < 2 else rng.choice(every)
        keyed = "head_dim" in defaults and not any("qk_rope" in key for key in defaults)
        own = sample(
            defaults, structure, rng.choice([2, 2, 1, 0]) if n else 2, keyed, f"{seed} {n}", turn=n + 1
        )
        full = completed({**head, **own})
        if full is None:
            continue
        raw = {**head, **{k: v for k, v in full.items() if k in own or rng.random() > 0.3}}
        for key in set(entry["free"]) & set(raw):
            span = number_range(key)
            if span is not None and isinstance(raw[key], float):
                raw[key] = rng.uniform(*span)
        yield raw


def agreement(raw: Config) -> bool:
    """Whether a config is known; what is said about it is then what inference finds.

    Raises:
        AssertionError: it is not.
    """
    found = catalog.known(raw)
    if found is None:
        return False
    truth = module._inferred(raw, None, None)
    assert plain(found.layout) == plain(truth), raw
    assert list(plain(found.layout)["tensors"]) == list(plain(truth)["tensors"])
    assert list(found.layout.axes) == list(truth.axes)
    said = ask_model(raw, None)
    assert [[name, list(shape)] for name, shape in found.parameters[0]] == said["parameters"], raw
    assert sorted(found.parameters[1]) == said["decayed"]
    return True
