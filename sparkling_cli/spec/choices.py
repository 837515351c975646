"""The values that options and spec fields choose from; light, so that ``--help`` can show them."""

from __future__ import annotations

from typing import Literal

InitPair = Literal["copy-copy", "zero-copy", "random-copy", "random-zero", "random-random"]
Init = Literal[InitPair, "auto"]
Scaling = Literal["rms", "function", "none", "calibrated"]
OptimizerTreatment = Literal["asymmetric", "asymmetric-scaled", "copy", "drop"]
VocabFill = Literal["mean", "random", "zero"]
LayerMode = Literal["identity", "interleave", "stack"]
LayerPlace = Literal["even", "end"]
StateTreatment = Literal["weight", "moment", "carry"]
BiasCorrection = Literal["inherit", "fresh"]
BaselineType = Literal["cosine", "linear", "constant", "wsd"]
DecayShape = Literal["cosine", "linear", "1-sqrt"]
Names = Literal["auto", "disk", "module"]
ReportKind = Literal["auto", "full", "none"]
#: a layer's number, or all layers that are not named
LayerKey = int | Literal["all"]
ALL: Literal["all"] = "all"
