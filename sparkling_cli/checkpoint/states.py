"""What a piece of optimizer state is, by its name and shape: the one table."""

from __future__ import annotations

from enum import Enum


class StateKind(Enum):
    """How a state tensor follows its parameter."""

    MOMENT = "moment"
    """parameter-shaped; old entries kept, new ones zero (Eq. 24)"""
    WEIGHT = "weight"
    """a copy of the weight; widened like it"""
    SCALAR = "scalar"
    """one number per tensor"""
    OTHER = "other"
    """factored or quantized: it cannot follow a parameter that grows"""


#: parameter-shaped state that holds weights, not moments: schedule-free's z, fp32 masters.
WEIGHT_LIKE = frozenset({"z", "master_param", "master_params", "fp32_param", "fp32", "param"})

#: factored or quantized state, by name: transformers' and torch's Adafactor, bitsandbytes.
NEVER_WIDENED = frozenset(
    {"exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "state1", "state2", "absmax1", "absmax2"}
)


def state_kind(slot: str, shape: tuple[int, ...], parameter_shape: tuple[int, ...]) -> StateKind:
    """The kind of one state tensor.

    Args:
        slot: its name in the optimizer's state (``exp_avg``).
        shape: its shape.
        parameter_shape: its parameter's shape.
    """
    if slot in NEVER_WIDENED:
        return StateKind.OTHER
    if shape == parameter_shape and slot != "step":
        return StateKind.WEIGHT if slot in WEIGHT_LIKE else StateKind.MOMENT
    if shape in ((), (1,)):
        return StateKind.SCALAR
    return StateKind.OTHER
