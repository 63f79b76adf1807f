"""The ops: cross-entropy with the safety penalty, from logits and from hidden states.

Both are functional torch.library ops. The linear path makes its gradient together with the loss, a
chunk of rows at a time, as extra outputs; the logits path makes it in backward by a second op. What
happens inside a row is the row step's business. docs/loss.md has the mathematics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .backends import row_step_of
from .checks import check_values
from .contracts import LossArgs, RowTerms, SafetyLoss, accumulation_dtype
from .eager import max_over, weighted
from .projection import project

# Logits of one chunk. A CPU wants few enough to keep them in cache; a device wants enough rows for
# the products to be limited by arithmetic and not by reading the head again for every chunk.
_CHUNK_BYTES_CPU = 16 << 20
_CHUNK_BYTES = 256 << 20
_MIN_CHUNK_ROWS = 1024
_HEAD_ROWS_PER_PRODUCT = 16384  # rows of grad_weight made at a time: bounds its temporary
_PAD = 16  # elements: a row that starts aligned is loaded 16 bytes at a time

_ARGS = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(LossArgs).items())
_N_ARGS = len(LossArgs._fields)
_LINEAR_SCHEMA = (
    f"(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, {_ARGS}, SymInt chunk_rows, "
    "bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LOGITS_SCHEMA = f"(Tensor logits, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
_GRAD_SCHEMA = f"(Tensor logits, {_ARGS}, Tensor norm, Tensor grad_loss) -> Tensor"
_GRAD_INPLACE_SCHEMA = f"(Tensor(a!) logits, {_ARGS}, Tensor norm, Tensor grad_loss) -> ()"


class _Once(torch.autograd.Function):
    """Passes a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("the safety loss has no second derivative, except with backend='eager'")


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative raise.

    torch's own decorator lets one that starts from a gradient without history pass as a constant,
    which is a wrong gradient.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # it is on only under create_graph=True
            return tuple(found)
        anchor = torch.zeros((), requires_grad=True)
        mark: Callable[..., Tensor] = _Once.apply
        return tuple(None if grad is None else mark(grad, anchor) for grad in found)

    return run


def linear_cross_entropy(
    hidden: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    linear_bias: Tensor | None,  # (V,)
    args: LossArgs,
    chunk_bytes: int | None,
) -> SafetyLoss:
    """Compute the loss without ever holding (N, V) logits."""
    live = torch.is_grad_enabled()
    outputs = _linear_op(
        hidden,
        linear_weight,
        linear_bias,
        *args,
        rows_per_chunk(hidden, linear_weight, chunk_bytes),
        live and hidden.requires_grad,
        live and linear_weight.requires_grad,
        live and linear_bias is not None and linear_bias.requires_grad,
    )
    return SafetyLoss(*outputs[:4])


def cross_entropy(logits: Tensor, args: LossArgs, inplace: bool) -> SafetyLoss:
    """Compute the loss from (N, V) logits; with `inplace` the gradient overwrites them."""
    op = _logits_inplace_op if inplace else _logits_op
    return SafetyLoss(*op(logits, *args)[:4])


def rows_per_chunk(hidden: Tensor, linear_weight: Tensor, chunk_bytes: int | None) -> int:
    """Return how many rows' logits fit the byte budget; at least 1."""
    row_bytes = _padded(linear_weight.shape[0]) * hidden.dtype.itemsize
    if chunk_bytes is not None:
        return max(1, chunk_bytes // row_bytes)
    if hidden.device.type == "cpu":
        return max(1, _CHUNK_BYTES_CPU // row_bytes)
    return max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // row_bytes)


@torch.library.custom_op(
    "str_kernels::linear_cross_entropy", mutates_args=(), schema=_LINEAR_SCHEMA
)
def _linear_op(
    hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    args = LossArgs(*rest[:_N_ARGS])
    chunk_rows, need_hidden, need_weight, need_bias = rest[_N_ARGS:]
    check_values(args.target, args.safety_ids, linear_weight.shape[0], args.ignore_index)
    takes_part = args.takes_part().unsqueeze(1)
    with torch.autocast(hidden.device.type, enabled=False):
        safety_logits = project(
            hidden,
            linear_weight,
            args.safety_ids,
            linear_bias,
            logit_scale=args.logit_scale,
            softcap=args.softcap,
        )
        grads = _empty_grads(hidden, linear_weight, need_hidden, need_weight, need_bias)
        grad_hidden, grad_weight, grad_bias = grads
        # The gradient is stored divided by about 1/num_items and multiplied by it in backward:
        # with it folded in, most float16 entries would underflow. A power of two rounds nothing.
        factor = _gradient_factor(args)
        ce_scale = args.row_ce * (args.inv_items / factor)
        penalty_scale = args.row_safety * (args.penalty_weight * args.inv_safety_items / factor)
        row_step = row_step_of(args.backend)
        workspace = _workspace(hidden, linear_weight.shape[0], min(chunk_rows, hidden.shape[0]))
        terms = []
        for start in range(0, hidden.shape[0], chunk_rows):
            part = slice(start, min(start + chunk_rows, hidden.shape[0]))
            # The head's gradient sums over rows: inf or NaN of a masked one must not reach it.
            x = torch.where(takes_part[part], hidden[part], 0.0)
            logits = workspace[: x.shape[0]]
            if linear_bias is None:
                torch.mm(x, linear_weight.t(), out=logits)
            else:
                torch.addmm(linear_bias, x, linear_weight.t(), out=logits)
            chunk_terms = row_step(
                logits,
                args.target[part],
                args.safety_ids,
                safety_logits[part],
                args.ref[part],
                args.id_weights,
                args.options,
                ce_scale=ce_scale[part],
                penalty_scale=penalty_scale[part],
                grad=logits if need_hidden or need_weight or need_bias else None,
            )
            terms.append(chunk_terms)
            if need_hidden:
                torch.mm(logits, linear_weight, out=grad_hidden[part])
            if need_weight:
                _add_product(grad_weight, logits, x)
            if need_bias:
                grad_bias += logits.sum(dim=0, dtype=grad_bias.dtype)
        reduced = _reduce(_concatenate(terms, factor), args)
        return (*reduced, grad_hidden, grad_weight, grad_bias, factor)


@_linear_op.register_fake
def _linear_fake(
    hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    args = LossArgs(*rest[:_N_ARGS])
    grads = _empty_grads(hidden, linear_weight, *rest[_N_ARGS + 1 :])
    scalars = [torch.empty_like(args.penalty_weight) for _ in range(5)]
    return (*scalars[:4], *grads, scalars[4])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ce, penalty, max_drift, grad_hidden, grad_weight, grad_bias, factor = output
    ctx.mark_non_differentiable(ce, penalty, max_drift, grad_hidden, grad_weight, grad_bias, factor)
    ctx.set_materialize_grads(False)  # else a zero cotangent of grad_weight's size would be made
    ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, factor)
    ctx.dtypes = tuple(None if x is None else x.dtype for x in inputs[:3])
    ctx.needs = inputs[-3:]
    ctx.n_inputs = len(inputs)


@_once_differentiable
def _linear_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *grads, factor = ctx.saved_tensors
    nothing = (None,) * (ctx.n_inputs - 3)
    if grad_loss is None:
        return (None, None, None, *nothing)
    scale = factor * grad_loss
    scaled = (
        _scaled(grad, scale).to(dtype) if need else None
        for grad, dtype, need in zip(grads, ctx.dtypes, ctx.needs, strict=True)
    )
    return (*scaled, *nothing)


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def _logits_forward(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    args = LossArgs(*rest)
    check_values(args.target, args.safety_ids, logits.shape[1], args.ignore_index)
    terms = row_step_of(args.backend)(
        logits, args.target, args.safety_ids, None, args.ref, args.id_weights, args.options
    )
    return (*_reduce(terms, args), terms.norm)


def _logits_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    args = LossArgs(*rest)
    scalars = (torch.empty_like(args.penalty_weight) for _ in range(4))
    return (*scalars, args.row_ce.new_empty((2, args.row_ce.shape[0])))


def _write_logits_grad(
    logits: Tensor, args: LossArgs, norm: Tensor, grad_loss: Tensor, grad: Tensor
) -> None:
    row_step_of(args.backend)(
        logits,
        args.target,
        args.safety_ids,
        None,
        args.ref,
        args.id_weights,
        args.options,
        norm=norm,
        ce_scale=args.row_ce * (args.inv_items * grad_loss),
        penalty_scale=args.row_safety * (args.penalty_weight * args.inv_safety_items * grad_loss),
        grad=grad,
    )


@torch.library.custom_op("str_kernels::cross_entropy_grad", mutates_args=(), schema=_GRAD_SCHEMA)
def _logits_grad_op(logits: Tensor, *rest: Any) -> Tensor:
    *args, norm, grad_loss = rest
    grad = torch.empty_like(logits)
    _write_logits_grad(logits, LossArgs(*args), norm, grad_loss, grad)
    return grad


@_logits_grad_op.register_fake
def _logits_grad_fake(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op(
    "str_kernels::cross_entropy_grad_", mutates_args=("logits",), schema=_GRAD_INPLACE_SCHEMA
)
def _logits_grad_inplace_op(logits: Tensor, *rest: Any) -> None:
    *args, norm, grad_loss = rest
    _write_logits_grad(logits, LossArgs(*args), norm, grad_loss, logits)


@_logits_grad_inplace_op.register_fake
def _logits_grad_inplace_fake(logits: Tensor, *rest: Any) -> None:
    return None


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ce, penalty, max_drift, norm = output
    ctx.mark_non_differentiable(ce, penalty, max_drift, norm)
    ctx.set_materialize_grads(False)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, norm)
    ctx.numbers = inputs[len(tensors) :]  # LossArgs lists its tensors first


@_once_differentiable
def _logits_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    logits, *tensors, norm = ctx.saved_tensors
    args = (*tensors, *ctx.numbers)
    nothing = (None,) * len(args)
    if grad_loss is None:
        return (None, *nothing)
    return (_logits_grad_op(logits, *args, norm, grad_loss), *nothing)


@_once_differentiable
def _logits_inplace_backward(
    ctx: Any, grad_loss: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    logits, *tensors, norm = ctx.saved_tensors
    args = (*tensors, *ctx.numbers)
    nothing = (None,) * len(args)
    if grad_loss is None:
        return (None, *nothing)
    _logits_grad_inplace_op(logits, *args, norm, grad_loss)
    return (logits.detach(), *nothing)  # the gradient has no history of its own


def _make_logits_op(name: str, backward: Any) -> Any:
    op = torch.library.custom_op(name, _logits_forward, mutates_args=(), schema=_LOGITS_SCHEMA)
    op.register_fake(_logits_fake)
    op.register_autograd(backward, setup_context=_logits_setup)
    return op


_logits_op = _make_logits_op("str_kernels::cross_entropy", _logits_backward)
_logits_inplace_op = _make_logits_op(
    "str_kernels::cross_entropy_inplace_backward", _logits_inplace_backward
)


def _reduce(terms: RowTerms, args: LossArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum the rows that take part; a row with weight 0 may hold inf or NaN and adds 0."""
    ce = _masked_sum(args.row_ce, terms.ce) * args.inv_items
    penalty = _masked_sum(args.row_safety, terms.penalty) * args.inv_safety_items
    drift = torch.where(args.row_safety != 0, terms.drift, 0.0)
    return ce + weighted(args.penalty_weight, penalty), ce, penalty, max_over(drift)


def _masked_sum(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight != 0, weight * value, 0.0).sum()


def _gradient_factor(args: LossArgs) -> Tensor:
    # The larger of the two scales, so that neither part of the stored gradient can overflow.
    wanted = torch.maximum(args.inv_items, args.penalty_weight * args.inv_safety_items)
    return torch.where(wanted > 0, torch.exp2(torch.floor(torch.log2(wanted))), 1.0)


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """Multiply; a GPU rounds a 0-d scale to float16 first, in which 65,536 is inf."""
    return (grad if grad.device.type == "cpu" else grad.to(scale.dtype)) * scale


def _concatenate(terms: list[RowTerms], like: Tensor) -> RowTerms:
    if not terms:
        return RowTerms(*(like.new_zeros(0) for _ in RowTerms._fields))
    return RowTerms(*(torch.cat(column, dim=-1) for column in zip(*terms, strict=True)))


def _empty_grads(
    hidden: Tensor, linear_weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what is needed: grad_hidden as hidden, the head's gradients in float32, zeroed."""
    dtype = accumulation_dtype(hidden.dtype)
    vocab = linear_weight.shape[0]
    shape = linear_weight.shape if need_weight else (0,)
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        linear_weight.new_zeros(shape, dtype=dtype),
        linear_weight.new_zeros(vocab if need_bias else 0, dtype=dtype),
    )


def _add_product(grad_weight: Tensor, grad_logits: Tensor, x: Tensor) -> None:
    """Add grad_logits^T x to grad_weight, which is float32 (float64 for float64 inputs)."""
    if x.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad_logits.t(), x)
        return
    for block, columns in zip(
        grad_weight.split(_HEAD_ROWS_PER_PRODUCT),
        grad_logits.split(_HEAD_ROWS_PER_PRODUCT, dim=1),
        strict=True,
    ):
        if x.device.type == "cuda":
            block += torch.mm(columns.t(), x, out_dtype=grad_weight.dtype)
        else:  # one rounding per chunk to the input's dtype; the sum over chunks is exact
            block += torch.mm(columns.t(), x)


def _workspace(hidden: Tensor, vocab: int, rows: int) -> Tensor:
    workspace = hidden.new_empty((rows, _padded(vocab)))
    # oneDNN's 16-bit products read past the end of a row and multiply by 0: NaN must not be there.
    workspace[:, vocab:].zero_()
    return workspace[:, :vocab]


def _padded(vocab: int) -> int:
    return -(-vocab // _PAD) * _PAD
