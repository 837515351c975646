"""One class while its entry is made: structure by structure, each held to what inference finds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparkling_cli.models.catalog.filled import filled
from sparkling_cli.models.catalog.irrelevant import ROPE, SWITCHES, number_range
from sparkling_cli.models.catalog.lookup import answer
from sparkling_cli.models.catalog.structure import difference, head_rule, plausible, text_of, tried
from sparkling_cli.models.catalog.teach_rules import completed, reduced, rules
from sparkling_cli.models.catalog.teach_template import Instance, Unclean, plain, template_of
from sparkling_cli.models.catalog.teach_variants import Structure, sample
from sparkling_cli.models.court import Judgement, judge
from sparkling_cli.models.locate import ask_model
from sparkling_cli.models.realize import realize
from sparkling_cli.models.shrink import Trials, shrink
from sparkling_cli.models.skeleton import ConfigDict, causal_lm_names, default_config, text_config

#: What checkpoints of a class say although its defaults do not, or without which it does not run.
ASSUMED: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "nemotron": {"num_key_value_heads": 8},
}
#: further sizes in which the shapes of all parameters are looked at, and sizes inferred at most
_CHECKED, _MOST = 8, 6
#: rule of heads (``structure.head_rule``) -> how many sizes a structure is inferred in
_SIZES = {2: 3, 1: 1, 0: 1}


class Class:
    """A class and what is known of it so far.

    Attributes:
        entry: its entry, as it will be written.
        usual: the structure that others are varied from.
    """

    def __init__(self, model_type: str) -> None:
        self.model_type, self.architecture = model_type, causal_lm_names()[model_type]
        self.head = {"model_type": model_type, "architectures": [self.architecture]}
        usual = {**default_config(model_type), **ASSUMED.get(model_type, {}), **self.head}
        real = completed(usual)
        if real is None:
            raise Unclean("its default config does not build")
        if any(isinstance(v, dict) and k != "rope_parameters" for k, v in real.items()):
            raise Unclean("its config has parts of its own")
        self.defaults = real
        self._judged: dict[str, Judgement] = {}
        tiny = shrink({**real, **self.head})
        self.extra = ("head_dim",) if "head_dim" in tiny and "head_dim" not in real else ()
        latent = any("qk_rope" in key for key in real)  # its heads have no one size
        asked = completed({**real, **self.head, "head_dim": 34})
        honoured = asked is not None and asked.get("head_dim") == 34
        self.keyed_head = "head_dim" in real and not latent and honoured
        self.usual = Structure("mha" if latent else "gqa", {})
        taught = [self.complete(self.usual, f"rules {n}", n, layers=(29, 13, 6, 7)[n]) for n in range(4)]
        self.entry = rules(model_type, self.architecture, real, taught)
        self.entry["extra"] = list(self.extra)
        self.entry["base"] = tried(reduced(self.entry, real), [(0, 0)])[0]
        self.entry |= {"structures": [], "templates": []}

    def complete(
        self, structure: Structure, seed: str, turn: int, *, rule: int = 2, layers: int = 0
    ) -> ConfigDict:
        """A completed config of a structure, in sizes of its own."""
        explicit = any(k in structure.changes for k in self.extra) or self.keyed_head
        own = sample(self.defaults, structure, rule, explicit, seed, turn=turn, layers=layers)
        real = completed({**self.head, **own})
        if real is None:
            raise Unclean(f"the class refuses {own}")
        return real

    def inferred(self, raw: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Instance, Trials]:
        """What inference finds, the verdict on equal tiny models reached once."""
        trials: Trials = []
        tiny = shrink(raw, trials=trials)
        key = text_of(tiny)
        if key not in self._judged:
            self._judged[key] = judge(tiny)
        layout = realize(self._judged[key], raw, text_config(raw), name=self.architecture)
        said = ask_model(raw, None)
        parameters = [(name, tuple(shape)) for name, shape in said["parameters"]], set(said["decayed"])
        return Instance(config, layout, parameters), trials

    def agrees(self, raw: Mapping[str, Any], truth: Instance | None = None) -> bool:
        """Whether the entry says about a config what inference does."""
        found = answer(self.entry, raw)
        if found is None:
            return False
        if truth is None:
            try:
                truth, _ = self.inferred(raw, {})
            except Exception:  # inference refuses it: the entry shall not answer
                return False
        same = text_of(plain(found.layout)) == text_of(plain(truth.layout))
        return same and found.parameters == truth.parameters

    def learn(self, structure: Structure) -> None:
        """Add a structure to the entry.

        Raises:
            Unclean: no template gives back what inference finds.
        """
        seen: dict[int, list[tuple[ConfigDict, Instance]]] = {}
        trials: Trials = []
        needs: set[str] = set()
        usual = not set(structure.changes) - {*self.extra, "tie_word_embeddings"}
        keyed = usual and (self.keyed_head or bool(set(self.extra) & set(structure.changes)))
        for rule in _SIZES if keyed else (2,):
            try:
                for n in range(_SIZES[rule] if usual else 2):
                    full = self.complete(structure, f"{structure} {rule} {n}", n, rule=rule)
                    raw = {**self.head, **full}
                    instance, trials = self.inferred(raw, self._config_of(full, rule))
                    seen.setdefault(rule, []).append((raw, instance))
                    needs |= self._needed(full)
                    self._check_spellings(full, needs)
            except Exception:
                if rule == 2:
                    raise
                seen.pop(rule, None)
        while True:
            self._keep(seen, trials, needs, stressed=usual)
            other = self._contradicted(structure)
            if other is None:
                return
            self.entry["structures"].pop()
            if len(seen[2]) > _MOST:
                raise Unclean("no expression gives its sizes")
            instance, _ = self.inferred(other, self._config_of(other, 2))
            seen[2].append((other, instance))

    def _contradicted(self, structure: Structure) -> ConfigDict | None:
        """A config of a structure in whose sizes the entry's parameters are not those of the model."""
        for n in range(_CHECKED):
            raw = {**self.head, **self.complete(structure, f"{structure} check {n}", n)}
            found = answer(self.entry, raw)
            said = ask_model(raw, None)
            if found is None:
                raise Unclean("it is not known in other sizes")
            if [[name, list(shape)] for name, shape in found.parameters[0]] != said["parameters"]:
                return raw
        return None

    def _config_of(self, full: ConfigDict, rule: int) -> ConfigDict:
        config, wanted = filled(self.entry, {**self.head, **full}), reduced(self.entry, full)
        if config is None or text_of(config) != text_of(wanted):
            raise Unclean(f"completed otherwise: {_unequal(wanted, config)}")
        if not plausible(config) or head_rule(config) != rule:
            raise Unclean("sizes are not as asked")
        return config

    def _keep(
        self,
        seen: Mapping[int, Sequence[tuple[ConfigDict, Instance]]],
        trials: Trials,
        needs: set[str],
        *,
        stressed: bool,
    ) -> None:
        """Keep a structure for those rules of heads for which it gives back all that inference found.

        ``stressed``: also with everything that should not matter at the end of its range.
        """
        instances = [instance for _, instance in seen[2]]
        known = self.entry["templates"][0]["axes"] if self.entry["templates"] else {}
        template, kinds = template_of(instances, {name: axis["size"] for name, axis in known.items()})
        differs = [self._differs(i.config, trials) for i in instances]
        if len({text_of(d) for d in differs}) > 1:
            raise Unclean(f"shrinks differently: {differs[:2]}")
        if template not in self.entry["templates"]:
            self.entry["templates"].append(template)
        row: dict[str, Any] = {
            "tried": [list(trial) for trial in trials],
            "differs": differs[0],
            "kinds": kinds,
            "heads": [],
            "needs": sorted(needs),
            "template": self.entry["templates"].index(template),
        }
        rows = self.entry["structures"]
        rows.append(row)
        for rule, cases in seen.items():
            row["heads"].append(rule)
            if not all(self.agrees(raw, truth) for raw, truth in cases):
                row["heads"].remove(rule)
        if len(rows) == 1 and row["heads"]:
            self._hold(seen[2][0][0], row, trials)
        extreme = self._stressed(seen[2][0][0], len(rows))
        if 2 not in row["heads"] or (stressed and not self.agrees(extreme)):
            rows.remove(row)
            raise Unclean("its template does not give back what inference finds")

    def _differs(self, config: Mapping[str, Any], trials: Trials) -> list[dict[str, Any]]:
        """What the tiny models of a completed config have otherwise than the usual one."""
        return [difference(self.entry["base"], tiny) for tiny in tried(config, trials)]

    def _needed(self, full: ConfigDict) -> set[str]:
        """Keys that must be there, as the rule for their absence does not hold in this structure."""
        found = set()
        for key in self.entry["absent"]:
            if key not in full or key in self.entry["free"] or key == "rope_parameters":
                continue
            raw = {k: v for k, v in full.items() if k != key}
            if not self._completed_alike(raw):
                found.add(key)
        return found

    def _completed_alike(self, raw: ConfigDict) -> bool:
        """Whether the entry completes a config as the class does, or does not complete it."""
        config = filled(self.entry, {**self.head, **raw})
        if config is None or not plausible(config):
            return True
        real = completed({**self.head, **raw})
        return real is not None and text_of(config) == text_of(reduced(self.entry, real))

    def _check_spellings(self, full: ConfigDict, needs: set[str]) -> None:
        """Configs that leave keys to the class, or say rotary parameters as they once were said.

        Raises:
            Unclean: one is completed otherwise.
        """
        for raw in _spellings(full, needs):
            if not self._completed_alike(raw):
                self.entry["spelled"] = False  # only as the class itself writes it today
            if not self._completed_alike(raw):
                raise Unclean(f"spelled otherwise, it is completed otherwise: {sorted(set(full) - set(raw))}")

    def _hold(self, raw: ConfigDict, row: dict[str, Any], trials: Trials) -> None:
        """Hold keys to their default on which a layout does depend, and leave out rotary types that count."""
        entry = self.entry
        for key in list(entry["free"]):
            if not all(self.agrees({**raw, key: value}) for value in _extremes(self.defaults[key], key)):
                entry["free"].remove(key)
                # what is held is part of what tiny models are compared by
                entry["base"] = tried(reduced(entry, self.defaults), [(0, 0)])[0]
                row["differs"] = self._differs(reduced(entry, raw), trials)
        if isinstance(entry["keys"].get("rope_parameters"), str):
            for kind in sorted(ROPE):
                if kind != "default" and not self.agrees(_rotated(raw, kind)):
                    entry["rope"].remove(kind)

    def _stressed(self, raw: ConfigDict, turn: int) -> ConfigDict:
        """The config with everything irrelevant at one end of its range, another one every time."""
        changed = dict(raw)
        for place, key in enumerate(self.entry["free"]):
            ends = list(_extremes(self.defaults[key], key))
            changed[key] = ends[(turn + place) % len(ends)]
        if isinstance(self.entry["keys"].get("rope_parameters"), str):
            kinds = self.entry["rope"]
            changed = _rotated(changed, kinds[turn % len(kinds)])
        return changed


def _spellings(full: ConfigDict, needs: set[str]) -> Iterator[ConfigDict]:
    rng = random.Random(len(full))
    for share in (0.2, 0.5, 0.8):
        yield {k: v for k, v in full.items() if k in needs or rng.random() > share}
    rest = {k: v for k, v in full.items() if k != "rope_parameters"}
    if "rope_parameters" in full:
        yield {**rest, "rope_theta": 5000.0, "rope_scaling": None}
        yield {**rest, "rope_theta": 5000, "rope_scaling": {"type": "linear", "factor": 2.0}}
        yield {**rest, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
        yield {**rest, "rope_theta": 5000.0, "partial_rotary_factor": 0.5}


def _rotated(raw: ConfigDict, kind: str) -> ConfigDict:
    """The config with rotary parameters of a type, of the same part of the head."""
    numbers = dict.fromkeys(sorted(ROPE[kind][0]), 2.0)
    high = {"high_freq_factor": 4.0} if kind == "llama3" else {}
    part = {k: v for k, v in raw["rope_parameters"].items() if k == "partial_rotary_factor"}
    return {**raw, "rope_parameters": {"rope_theta": 20000.0, "rope_type": kind, **numbers, **high, **part}}


def _extremes(default: Any, key: str) -> Iterator[Any]:
    """Values of a key that no layout should depend on."""
    span = number_range(key)
    if key in SWITCHES:
        yield from (not default, default)
    elif span is None:
        yield from (3 if default is None else None, default if isinstance(default, list) else 2)
    else:
        yield from (type(default)(end) for end in span)


def _unequal(wanted: Mapping[str, Any], found: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys in which two completed configs differ."""
    if found is None:
        return {"unknown": True}
    keys = sorted({*wanted, *found})
    return {k: (wanted.get(k), found.get(k)) for k in keys if text_of(wanted.get(k)) != text_of(found.get(k))}
