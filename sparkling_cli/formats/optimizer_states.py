"""What a piece of optimizer state is, by its name and shape: the one table.

A state has a *kind*, which says what its new entries start from, and a *form*, which says which dims of its
parameter it has. A name that is not in the table is decided by measuring (``plan.measure``), or by the user
(``--state NAME=KIND``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from math import prod

from sparkling_cli.layout.expr import Dim, Fixed, Role, TensorLayout
from sparkling_cli.storage.tensors import FLOATING, Shape


class StateKind(Enum):
    """How a state tensor follows its parameter."""

    MOMENT = "moment"
    """old entries kept, new ones zero (Eq. 24)"""
    WEIGHT = "weight"
    """a copy or an average of the weight, or what rounding took from it; widened like it"""
    FACTOR = "factor"
    """means of a second moment over one dim of the parameter: new entries are the mean of the old ones"""
    PRECONDITIONER = "preconditioner"
    """a matrix on one dim of the parameter: the old block kept, the new diagonal the old one's mean"""
    BASIS = "basis"
    """an orthogonal matrix on one dim: the old block kept, one on the new diagonal"""
    SCALAR = "scalar"
    """one number per tensor"""
    OTHER = "other"
    """it cannot follow a parameter that grows"""
    UNKNOWN = "unknown"
    """parameter-shaped, under a name that is not in the table"""


#: A second copy of the weights, which FSDP resumes from (``pytorch_model_fsdp.bin``).
FSDP_COPY = "fsdp"

#: state that holds weights, not moments
WEIGHT_LIKE = frozenset(
    {
        FSDP_COPY,
        "z", "schedule_free_z", "msam_z",  # schedule-free
        "master_param", "master_params", "master_weight", "fp32_param", "fp32", "param",  # fp32 masters
        "ax",  # ASGD
        "slow_buffer", "slow_params", "slow_param", "slow_weights", "lookahead_params",  # Ranger, Lookahead
        "cached_params",  # Lookahead of torch-optimizer and timm
        "p0",  # Prodigy
        "mov_avg_param", "pbar", "prev_param", "ema",  # SRMM, FOCUS, AdaSmooth, SPlus
        "kahan_comp",  # what rounding took from a bfloat16 weight: it lies on the weight's own scale
    }
)  # fmt: skip

#: weights of the first step, which say nothing of today's
INITIAL = frozenset({"p0"})

#: state that always has its parameter's shape, whose new entries start from zero
MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "variance"})

#: further moments of torch, pytorch_optimizer, bitsandbytes, lion-pytorch, prodigyopt, CAME, heavyball, SM3;
#: in these packages each of the names may also be one number
FURTHER_MOMENTS = frozenset(
    {
        "acc_delta", "approx_hessian", "avg_grad", "beta1_prod", "bg", "bhg", "accumulator",
        "exp_avg2", "exp_avg_diff", "exp_avg_grad", "exp_avg_lr", "exp_avg_slow", "exp_avg_var",
        "exp_grad", "exp_inf", "fim", "grad_avg", "grad_exp_avg", "grok_ema", "grok_exp_avg", "hessian",
        "hessian_moment", "last_grad", "max_exp_avg_sqs", "max_exp_avg_var", "moments", "momentum",
        "mov_avg_grad", "mug", "neg_exp_avg", "neg_momentum", "pos_momentum", "pre_grad", "prev",
        "prev_grad", "previous_diff", "previous_grad", "previous_update", "s",
        "square_avg", "state1", "state2", "step_size", "sum", "u", "update", "v", "variance_buffer",
        "vsgd_m", "grad_buffer", "ema_grad", "exp_avg_fast", "m1", "m2", "v_max", "sum_of_squares",
    }
)  # fmt: skip

#: means of a second moment over all but the last two dims' other one: Adafactor, CAME, EmoFact
ROWS = frozenset({"exp_avg_sq_row", "row_var", "exp_avg_res_row", "exp_avg_r"})
COLUMNS = frozenset({"exp_avg_sq_col", "col_var", "exp_avg_res_col", "exp_avg_c"})
#: the same, of whichever dim is left: NorMuon (of rows always; nanochat's of the longer side)
FACTORS = frozenset({"second_momentum_buffer"})

#: matrices on one dim: Shampoo, SOAP, SPlus, Kron
PRECONDITIONERS = frozenset({"GG", "pre_cond", "inv_pre_cond", "sides"})
BASES = frozenset({"Q", "q_sides"})
#: also the directions in which Dion keeps a matrix's momentum, fewer than the dim has: a product with the
#: momentum, and zero where it is; of columns, or, in one of its classes, of rows where these are fewer
DIRECTIONS = "Q"

_DUAL = "this optimizer makes the weights anew at every step, of such sums (dual averaging)"
_SUBSPACE = "it lies in a subspace that was chosen for the parameter at its old size"
#: state that is refused by name, and why
REFUSED = {
    **dict.fromkeys(("grad_sum_sq", "x0", "sk", "alpha_k", "x_k"), _DUAL),
    **dict.fromkeys(("U", "basis_l", "basis_r", "m_l", "m_r", "v_l", "v_r"), _SUBSPACE),
    **dict.fromkeys(("m_avg_r", "m_avg_c", "m_avg_u", "v_avg"), "factors of a first moment have no zero"),
    "mask": "it says which entries of the parameter have state",
}

#: options of an optimizer's groups -> state that has a name of the table there, and is something else
OTHERWISE = {frozenset({"kappa", "xi"}): {"momentum_buffer": "AccSGD's slow average of the weights"}}

#: tables of bitsandbytes' quantized state, whose size does not follow the parameter's shape alone
QUANTIZATION_TABLES = frozenset(
    {"absmax1", "absmax2", "qmap1", "qmap2", "max1", "max2", "new_max1", "new_max2", "gnorm_vec"}
)

#: endings of the parts of a quantized moment that is a tensor subclass (torchao): its codes, one for each
#: entry or two in a byte, a scale for each block, and what codes stand for
CODES, PACKED_CODES, SCALES, LEVELS = ".codes", ".packed", ".scale", ".qmap"

_KINDS = {
    StateKind.WEIGHT: WEIGHT_LIKE,
    StateKind.MOMENT: MOMENTS | FURTHER_MOMENTS,
    StateKind.FACTOR: ROWS | COLUMNS | FACTORS,
    StateKind.PRECONDITIONER: PRECONDITIONERS,
    StateKind.BASIS: BASES,
    StateKind.OTHER: QUANTIZATION_TABLES | REFUSED.keys(),
}
_TABLE = {name: kind for kind, names in _KINDS.items() for name in names}

#: state that may be parameter-shaped or not, but never one number
_WHOLE = WEIGHT_LIKE | MOMENTS
#: state whose shape says which parameter it belongs to
_TELLING = MOMENTS | ROWS | COLUMNS | {FSDP_COPY}
#: quantized state has a number for each block of so many entries
_BLOCKS = frozenset(2**power for power in range(4, 13))
#: how heavyball begins a state's name: by the step that it belongs to
_STEPS = ("update_by_", "scale_by_", "nesterov_", "exp_avg_exp_avg", "heavyball_", "mars_")


def base_name(slot: str) -> str:
    """The name in the table of a nested or numbered state: ``GG.0``, ``0.update_by_adam_exp_avg_3``."""
    parts = [part for part in slot.removesuffix(CODES).split(".") if not part.isdigit()]
    name = re.sub(r"_\d+$", "", parts[-1]) if parts else slot
    if name not in _TABLE and name.startswith(_STEPS):
        known = [own for own in _TABLE if name.endswith(f"_{own}")]
        return max(known, key=len, default=name)
    return name


def is_named(slot: str) -> bool:
    """Whether the table has the state."""
    return base_name(slot) in _TABLE


@dataclass(frozen=True)
class Form:
    """Which dims of its parameter a state has.

    Attributes:
        dims: for every dim of the state the parameter's; None for a dim of the state's own.
        flat: all of them are stored as one dim.
    """

    dims: tuple[int | None, ...]
    flat: bool = False

    def layout(self, parameter: TensorLayout, shape: Shape) -> TensorLayout:
        """What the state's dims mean.

        Args:
            parameter: what the parameter's mean.
            shape: of the state.
        """
        if self.flat or self.dims == tuple(range(len(parameter.dims))):
            return parameter
        dims = tuple(
            Dim(Fixed(size), Role.SCALE) if dim is None else parameter.dims[dim]
            for dim, size in zip(self.dims, shape, strict=True)
        )
        return TensorLayout(dims, f"{parameter.text} | dims {self.dims} of {shape}")

    def stored(self, shape: Shape) -> Shape:
        """The shape on disk of a state whose dims have these sizes."""
        return (prod(shape),) if self.flat else shape

    def of_copy(self, parameter: Shape) -> Shape:
        """The shape on disk of a state that has every entry of a parameter of this shape, once."""
        return (prod(parameter),) if self.flat else (1,) * self.dims.count(None) + parameter


def form_of(slot: str, shape: Shape, parameter: Shape) -> Form | None:
    """Which dims of a parameter a state of that name and shape has; None if it cannot be told.

    Args:
        slot: the state's name.
        shape: its shape.
        parameter: the parameter's shape.
    """
    name, count = base_name(slot), len(parameter)
    whole = tuple(range(count))
    if name == DIRECTIONS and count == len(shape) == 2 and shape[1] < shape[0] and shape[0] in parameter:
        return Form((int(shape[0] == parameter[1]), None))
    if name in PRECONDITIONERS | BASES:
        return _on_one_dim(slot, shape, parameter)
    if name in ROWS | COLUMNS and count > 1:
        dim = count - 2 if name in ROWS else count - 1
        left = (*whole[: count - 2], dim)
        kept = tuple(d if d in left else None for d in whole)
        if shape == tuple(parameter[d] for d in left):
            return Form(left)
        return Form(kept) if shape == _sizes(kept, parameter) else None
    if shape == parameter:
        return Form(whole)
    if count > 1 and shape == (prod(parameter),):
        return Form(whole, flat=True)
    own = len(shape) - count
    stacked = own > 0 and shape[own:] == parameter and count > 0
    if stacked and (prod(shape[:own]) == 1 or name == "state1"):  # bitsandbytes' AdEMAMix has two of them
        return Form((*(None for _ in shape[:own]), *whole))
    if len(shape) == count > 1 and prod(shape) > 1 and name in FACTORS | FURTHER_MOMENTS:
        kept = tuple(None if size == 1 else dim for dim, size in enumerate(shape))
        return Form(kept) if shape == _sizes(kept, parameter) else None
    return None


def turns(slot: str, shape: Shape, parameter: Shape) -> bool:
    """Whether a factor of columns is one of rows at its parameter's new size: of the longer side, or of both.

    Args:
        slot: the state's name.
        shape: of the state as stored; columns alone are kept where they are the longer side.
        parameter: the parameter's shape after widening.
    """
    columns = base_name(slot) in FACTORS and len(shape) == len(parameter) == 2 and shape[0] == 1 < shape[1]
    return columns and parameter[0] >= parameter[1]


def changes_sides(slot: str, shape: Shape, parameter: Shape, after: Shape) -> bool:
    """Whether an optimizer would take directions of one side for those of the other at the new size.

    Args:
        slot: the state's name.
        shape: of the state.
        parameter: the parameter's shape.
        after: the parameter's shape after widening.
    """
    if base_name(slot) != DIRECTIONS or len(shape) != 2 or shape[1] >= shape[0] or len(parameter) != 2:
        return False
    return (parameter[0] < parameter[1]) != (after[0] < after[1])


def _sizes(dims: tuple[int | None, ...], parameter: Shape) -> Shape:
    return tuple(1 if dim is None else parameter[dim] for dim in dims)


def _on_one_dim(slot: str, shape: Shape, parameter: Shape) -> Form | None:
    """A matrix (or, of a diagonal one, a vector) on the dim that the state's number names."""
    bare = shape
    while len(bare) > 1 and bare[0] == 1 != bare[-1]:
        bare = bare[1:]
    number = re.search(r"(\d+)$", slot)
    alike = [dim for dim, size in enumerate(parameter) if size == bare[-1]] if bare else []
    if number is not None and int(number[1]) in alike:
        alike = [int(number[1])]
    square = len(bare) == 2 and bare[0] == bare[1]
    if len(alike) != 1 or not (square or len(bare) == 1):
        return None
    return Form((*(None for _ in shape[: len(shape) - len(bare)]), *alike * len(bare)))


def state_kind(slot: str, dtype: str, shape: Shape, parameter_shape: Shape) -> StateKind:
    """The kind of one state tensor.

    Args:
        slot: its name in the optimizer's state (``exp_avg``).
        dtype: of the tensor.
        shape: its shape.
        parameter_shape: its parameter's shape.
    """
    name = base_name(slot)
    if name == "step" or (shape in ((), (1,)) and shape != parameter_shape):
        return StateKind.SCALAR if prod(shape) == 1 else StateKind.OTHER
    form = form_of(slot, shape, parameter_shape)
    if form is None or dtype not in FLOATING:
        return StateKind.OTHER
    if shape == parameter_shape and name not in _TABLE:
        return StateKind.UNKNOWN
    if name == DIRECTIONS and form.dims[-1] is None:
        return StateKind.MOMENT
    return _TABLE.get(name, StateKind.OTHER)


def is_apart(slot: str, shape: Shape, parameter_shape: Shape) -> bool:
    """Whether a tensor among a parameter's state, of an unknown name, has nothing to do with the parameter.

    Related are those with a dim of the parameter's, or a multiple of it (projections, factors); with numbers
    for parts of its dims alone (heads); and with one number for each block of it (quantization).

    Args:
        slot: its name.
        shape: its shape.
        parameter_shape: the parameter's shape.
    """
    if is_named(slot) or prod(shape) < 2 or form_of(slot, shape, parameter_shape) is not None:
        return False
    own, dims = ([size for size in one if size > 1] for one in (shape, parameter_shape))
    whole = any(size % dim == 0 for size in own for dim in dims)
    parts = all(any(dim % size == 0 for dim in dims) for size in own)
    block, left = divmod(prod(parameter_shape), prod(shape))
    return not (whole or parts or (left == 0 and block in _BLOCKS))


def is_telling(slot: str) -> bool:
    """Whether the shape of a state of that name says which parameter it belongs to."""
    return base_name(slot) in _TELLING


def fits(slot: str, shape: Shape, parameter_shape: Shape) -> bool:
    """Whether a parameter of that shape can have state of that name and shape.

    Args:
        slot: the state's name.
        shape: its shape.
        parameter_shape: the parameter's shape.
    """
    name = base_name(slot)
    if slot.endswith(PACKED_CODES):
        return 2 * prod(shape) == prod(parameter_shape)
    if form_of(slot, shape, parameter_shape) is not None:
        return True
    if shape in ((), (1,)):
        return name not in _WHOLE
    return (name in _TABLE or name != slot) and name not in _TELLING
