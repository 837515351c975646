"""What a piece of optimizer state is, by its name and shape: the one table.

A name that is not in it is decided by measuring (``plan.measure``), or by the user (``--state NAME=KIND``).
"""

from __future__ import annotations

from enum import Enum

from sparkling_cli.storage.tensors import FLOATING


class StateKind(Enum):
    """How a state tensor follows its parameter."""

    MOMENT = "moment"
    """parameter-shaped; old entries kept, new ones zero (Eq. 24)"""
    WEIGHT = "weight"
    """a copy or an average of the weight, or what rounding took from it; widened like it"""
    SCALAR = "scalar"
    """one number per tensor"""
    OTHER = "other"
    """factored or quantized: it cannot follow a parameter that grows"""
    UNKNOWN = "unknown"
    """parameter-shaped, under a name that is not in the table"""


#: A second copy of the weights, which FSDP resumes from (``pytorch_model_fsdp.bin``).
FSDP_COPY = "fsdp"

#: parameter-shaped state that holds weights, not moments
WEIGHT_LIKE = frozenset(
    {
        FSDP_COPY,
        "z",  # schedule-free
        "master_param", "master_params", "fp32_param", "fp32", "param",  # fp32 masters
        "ax",  # ASGD
        "slow_buffer", "slow_params", "slow_param", "slow_weights", "lookahead_params",  # Ranger, Lookahead
        "p0",  # Prodigy
        "mov_avg_param", "pbar", "prev_param",  # SRMM, FOCUS, AdaSmooth
        "kahan_comp",  # what rounding took from a bfloat16 weight: it lies on the weight's own scale
    }
)  # fmt: skip

#: weights of the first step, which say nothing of today's
INITIAL = frozenset({"p0"})

#: where dual averaging starts (MADGRAD, DAdaptSGD): at every step it makes the weights anew, of
#: that and of sums of gradients, so a wider model's would not last
STARTING_POINTS = frozenset({"x0"})

#: state that always has its parameter's shape, whose new entries start from zero
MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "variance"})

#: further moments of torch, pytorch_optimizer, bitsandbytes, lion-pytorch, prodigyopt, dadaptation, CAME;
#: in these packages each of the names may also be one number
FURTHER_MOMENTS = frozenset(
    {
        "acc_delta", "alpha_k", "alphak", "approx_hessian", "avg_grad", "beta1_prod", "bg", "bhg",
        "exp_avg2", "exp_avg_diff", "exp_avg_grad", "exp_avg_lr", "exp_avg_slow", "exp_avg_var",
        "exp_grad", "exp_inf", "fim", "grad_avg", "grad_exp_avg", "grok_ema", "grok_exp_avg", "hessian",
        "hessian_moment", "last_grad", "max_exp_avg_sqs", "max_exp_avg_var", "moments", "momentum",
        "mov_avg_grad", "mug", "neg_exp_avg", "neg_momentum", "pos_momentum", "pre_grad", "prev",
        "prev_grad", "previous_diff", "previous_grad", "previous_update", "second_momentum_buffer", "sk",
        "square_avg", "state1", "state2", "step_size", "sum", "u", "update", "v", "variance_buffer",
        "vsgd_m", "grad_buffer", "ema_grad", "exp_avg_fast", "m1", "m2", "v_max", "sum_of_squares",
    }
)  # fmt: skip

#: factored or quantized state, by name: transformers' and torch's Adafactor, bitsandbytes
NEVER_WIDENED = frozenset({"exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "absmax1", "absmax2"})

#: tables of bitsandbytes' quantized state, whose size does not follow the parameter's shape alone
QUANTIZATION_TABLES = frozenset(
    {"absmax1", "absmax2", "qmap1", "qmap2", "max1", "max2", "new_max1", "new_max2", "gnorm_vec"}
)

#: state that may be parameter-shaped or not, but never one number
_WHOLE = WEIGHT_LIKE | MOMENTS


def state_kind(slot: str, dtype: str, shape: tuple[int, ...], parameter_shape: tuple[int, ...]) -> StateKind:
    """The kind of one state tensor.

    Args:
        slot: its name in the optimizer's state (``exp_avg``).
        dtype: of the tensor.
        shape: its shape.
        parameter_shape: its parameter's shape.
    """
    if slot in NEVER_WIDENED:
        return StateKind.OTHER
    if shape == parameter_shape and slot != "step":
        if dtype not in FLOATING:
            return StateKind.OTHER
        if slot in WEIGHT_LIKE:
            return StateKind.WEIGHT
        return StateKind.MOMENT if slot in MOMENTS | FURTHER_MOMENTS else StateKind.UNKNOWN
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
    return shape == parameter_shape or (slot not in _WHOLE and shape in ((), (1,)))
