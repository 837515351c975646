"""Parameters, active parameters and FLOPs, from a layout and axis sizes alone.

``shape`` counts parameters, ``flops`` compares training progressively with training from scratch,
``quantity`` reads and writes numbers such as ``200B``.
"""

from sparkling_cli.compute.flops import plan_compute, run_flops, share_saved, step_saving, train_flops
from sparkling_cli.compute.quantity import parse_count
from sparkling_cli.compute.shape import ModelShape, ParameterCount, experts_per_token, shape_of

__all__ = [
    "ModelShape",
    "ParameterCount",
    "experts_per_token",
    "parse_count",
    "plan_compute",
    "run_flops",
    "shape_of",
    "share_saved",
    "step_saving",
    "train_flops",
]
