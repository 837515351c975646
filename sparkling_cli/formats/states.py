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


#: A second copy of the weights, which FSDP resumes from (``pytorch_model_fsdp.bin``).
FSDP_COPY = "fsdp"

#: parameter-shaped state that holds weights, not moments: schedule-free's z, fp32 masters, FSDP's copy.
WEIGHT_LIKE = frozenset({"z", "master_param", "master_params", "fp32_param", "fp32", "param", FSDP_COPY})

#: factored or quantized state, by name: transformers' and torch's Adafactor, bitsandbytes.
NEVER_WIDENED = frozenset(
    {"exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "state1", "state2", "absmax1", "absmax2"}
)

#: tables of bitsandbytes' quantized state, whose size does not follow the parameter's shape alone.
QUANTIZATION_TABLES = frozenset(
    {"absmax1", "absmax2", "qmap1", "qmap2", "max1", "max2", "new_max1", "new_max2", "gnorm_vec"}
)

#: state that always has its parameter's shape; any other may be one number.
MOMENTS = WEIGHT_LIKE | {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "variance"}


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


def fits(slot: str, shape: tuple[int, ...], parameter_shape: tuple[int, ...]) -> bool:
    """Whether a parameter of that shape can have state of that name and shape.

    Args:
        slot: the state's name.
        shape: its shape.
        parameter_shape: the parameter's shape.
    """
    if slot in ("exp_avg_sq_row", "row_var"):
        kept = (1,) if slot == "row_var" else ()
        return shape == parameter_shape[:-1] + kept
    if slot in ("exp_avg_sq_col", "col_var"):
        kept = (1,) if slot == "col_var" else ()
        return shape == parameter_shape[:-2] + kept + parameter_shape[-1:]
    if slot in QUANTIZATION_TABLES:
        return True
    return shape == parameter_shape or (slot not in MOMENTS and shape in ((), (1,)))
