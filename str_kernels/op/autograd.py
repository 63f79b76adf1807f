"""The ops: cross-entropy with the safety penalty, from logits and from hidden states.

All are functional torch.library ops, except the one that overwrites its logits. The linear path
computes its gradient together with the loss, as extra outputs. With reduction "none" it cannot,
because each row's upstream gradient is known only in backward, where a second op computes the
gradient. The logits path always computes it there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .backends import row_step_of
from .checks import check_values
from .chunks import Plan, empty_like_grads, linear_terms_and_grads
from .contracts import ROW_OPTIONS, LossArgs, RowTerms, SafetyLoss
from .eager import reduce_rows
from .parallel import VocabShard
from .projection import Head

_TYPES = get_type_hints(LossArgs)
_OF_ROWS = get_type_hints(_TYPES.pop("options"))
_TYPES.update({name: _OF_ROWS[name] for name in ROW_OPTIONS})
_ARGS = ", ".join(
    f"{'int[]' if kind == list[int] else kind.__name__} {name}" for name, kind in _TYPES.items()
)
_N_ARGS = len(_TYPES)
_N_TERMS = len(SafetyLoss._fields)
_ROWS_SCALED = 2048
_PULL_ROOM = 64  # the penalty's gradient at |d| = 256 and K = 1 still fits in float16
_N_HEAD = 1 + len(Head._fields)  # hidden and the parts of the head


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


_LINEAR_INPUTS = (
    "Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor? t, Tensor? b, "
    f"{_ARGS}, SymInt chunk_rows, bool pack"
)
_LINEAR_SCHEMA = (
    f"({_LINEAR_INPUTS}, bool need_hidden, bool need_weight, bool need_bias, bool need_t, "
    f"bool need_b) -> {_tensors(_N_TERMS + _N_HEAD + 2)}"
)
_LINEAR_GRAD_SCHEMA = (
    f"({_LINEAR_INPUTS}, bool need_hidden, bool need_weight, bool need_bias, bool need_t, "
    f"bool need_b, Tensor grad_loss) -> {_tensors(_N_HEAD)}"
)
_LOGITS_SCHEMA = f"(Tensor logits, {_ARGS}) -> {_tensors(_N_TERMS + 1)}"
_GRAD_SCHEMA = f"(Tensor logits, {_ARGS}, Tensor norm, Tensor grad_loss) -> Tensor"
_GRAD_INPLACE_SCHEMA = f"(Tensor(a!) logits, {_ARGS}, Tensor norm, Tensor grad_loss) -> ()"


class _Once(torch.autograd.Function):
    """The identity on a gradient, whose own derivative raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("the safety loss has no second derivative, except with backend='eager'")


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative raise.

    torch's own decorator treats the gradient as a constant if the incoming gradient has no history;
    the second derivative would then be silently wrong.
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
    head: Head,
    args: LossArgs,
    chunk_rows: int,
    pack: bool,
) -> SafetyLoss:
    """Compute the loss without materialising the (N, V) logits."""
    live = torch.is_grad_enabled()
    leaves = (hidden, *head)
    needs = (live and leaf is not None and leaf.requires_grad for leaf in leaves)
    return _as_loss(_linear_op(*leaves, *args.flat(), chunk_rows, pack, *needs), args)


def log_normalizer(hidden: Tensor, head: Head, args: LossArgs, chunk_rows: int) -> Tensor:  # (N,)
    """Compute logsumexp(z) of every row, without a gradient."""
    needs = (False,) * _N_HEAD
    norm: Tensor = _linear_op(hidden, *head, *args.flat(), chunk_rows, False, *needs)[-1]
    return norm.sum(dim=0)


def cross_entropy(logits: Tensor, args: LossArgs, inplace: bool) -> SafetyLoss:
    """Compute the loss from (N, V) logits; with `inplace` the gradient overwrites them."""
    op = _logits_inplace_op if inplace else _logits_op
    return _as_loss(op(logits, *args.flat()), args)


def _as_loss(outputs: tuple[Tensor, ...], args: LossArgs) -> SafetyLoss:
    terms = outputs[:_N_TERMS]
    return SafetyLoss(*(terms if args.options.metrics else terms[:-2]))


def _from_inputs(inputs: tuple[Any, ...]) -> tuple[Tensor, Head, LossArgs, Plan]:
    """Split an op's inputs, the five flags included."""
    hidden, *head = inputs[:_N_HEAD]
    rest = inputs[_N_HEAD + _N_ARGS :]
    args = LossArgs.from_flat(inputs[_N_HEAD : _N_HEAD + _N_ARGS])
    return hidden, Head(*head), args, Plan(rest[0], rest[1], tuple(rest[2:7]))


@torch.library.custom_op(
    add_op_namespace_prefix("linear_cross_entropy"), mutates_args=(), schema=_LINEAR_SCHEMA
)
def _linear_op(*inputs: Any) -> tuple[Tensor, ...]:
    hidden, head, args, plan = _from_inputs(inputs)
    shard = VocabShard.named(args.group_name, args.shard_sizes)
    vocab = head.weight.shape[0] if shard is None else shard.vocab
    check_values(args.target, args.safety_ids, vocab, args.options.ignore_index)
    if not args.reduce:  # each row's upstream gradient is known only in backward
        plan = plan._replace(needs=(False,) * _N_HEAD)
    factor, ce_scale, penalty_scale = _scales(args, torch.ones_like(args.inv_items))
    terms, grads = linear_terms_and_grads(hidden, head, args, plan, ce_scale, penalty_scale, shard)
    return (*_reduce(terms, args), *grads, factor, terms.norm)


@_linear_op.register_fake
def _linear_fake(*inputs: Any) -> tuple[Tensor, ...]:
    hidden, head, args, plan = _from_inputs(inputs)
    if not args.reduce:
        plan = plan._replace(needs=(False,) * _N_HEAD)
    return (
        *_fake_terms(args),
        *empty_like_grads(hidden, head, plan.needs),
        torch.empty_like(args.penalty_weight),
        args.row_ce.new_empty((2, args.row_ce.shape[0])),
    )


@torch.library.custom_op(
    add_op_namespace_prefix("linear_cross_entropy_grad"),
    mutates_args=(),
    schema=_LINEAR_GRAD_SCHEMA,
)
def _linear_grad_op(*inputs: Any) -> tuple[Tensor, ...]:
    hidden, head, args, plan = _from_inputs(inputs)
    factor, ce_scale, penalty_scale = _scales(args, inputs[-1])
    shard = VocabShard.named(args.group_name, args.shard_sizes)
    _, grads = linear_terms_and_grads(hidden, head, args, plan, ce_scale, penalty_scale, shard)
    return tuple(
        _scaled(grad, factor, grad.dtype if leaf is None else leaf.dtype)
        for grad, leaf in zip(grads, (hidden, *head), strict=True)
    )


@_linear_grad_op.register_fake
def _linear_grad_fake(*inputs: Any) -> tuple[Tensor, ...]:
    hidden, head, _, plan = _from_inputs(inputs)
    return tuple(
        grad if leaf is None else grad.to(leaf.dtype)
        for grad, leaf in zip(
            empty_like_grads(hidden, head, plan.needs), (hidden, *head), strict=True
        )
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *grads, factor, _ = output[_N_TERMS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of grad_weight's size would be allocated
    ctx.n_inputs = len(inputs)
    ctx.dtypes = tuple(None if x is None else x.dtype for x in inputs[:_N_HEAD])
    ctx.reduce = _from_inputs(inputs)[2].reduce
    if ctx.reduce:
        ctx.save_for_backward(*grads, factor)
        ctx.needs = inputs[-_N_HEAD:]
        return
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]


@_once_differentiable
def _linear_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (ctx.n_inputs - _N_HEAD)
    if grad_loss is None:
        return (*(None for _ in range(_N_HEAD)), *nothing)
    if not ctx.reduce:
        tensors = iter(ctx.saved_tensors)
        inputs = [
            next(tensors) if is_tensor else other
            for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        ]
        found = _linear_grad_op(*inputs, grad_loss)
        needs = inputs[-_N_HEAD:]
        wanted = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return (*wanted, *nothing)
    *grads, factor = ctx.saved_tensors
    scale = factor * grad_loss
    scaled = (
        _scaled(grad, scale, dtype) if need else None
        for grad, dtype, need in zip(grads, ctx.dtypes, ctx.needs, strict=True)
    )
    return (*scaled, *nothing)


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def _logits_forward(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    args = LossArgs.from_flat(rest)
    check_values(args.target, args.safety_ids, logits.shape[1], args.options.ignore_index)
    terms = row_step_of(args.backend)(
        logits, args.target, args.safety_ids, None, args.ref, args.id_weights, args.options
    )
    return (*_reduce(terms, args), terms.norm)


def _logits_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    args = LossArgs.from_flat(rest)
    return (*_fake_terms(args), args.row_ce.new_empty((2, args.row_ce.shape[0])))


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


@torch.library.custom_op(
    add_op_namespace_prefix("cross_entropy_grad"), mutates_args=(), schema=_GRAD_SCHEMA
)
def _logits_grad_op(logits: Tensor, *rest: Any) -> Tensor:
    *args, norm, grad_loss = rest
    grad = torch.empty_like(logits)
    _write_logits_grad(logits, LossArgs.from_flat(args), norm, grad_loss, grad)
    return grad


@_logits_grad_op.register_fake
def _logits_grad_fake(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op(
    add_op_namespace_prefix("cross_entropy_grad_"),
    mutates_args=("logits",),
    schema=_GRAD_INPLACE_SCHEMA,
)
def _logits_grad_inplace_op(logits: Tensor, *rest: Any) -> None:
    *args, norm, grad_loss = rest
    _write_logits_grad(logits, LossArgs.from_flat(args), norm, grad_loss, logits)


@_logits_grad_inplace_op.register_fake
def _logits_grad_inplace_fake(logits: Tensor, *rest: Any) -> None:
    return None


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, norm = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, norm)
    ctx.numbers = inputs[len(tensors) :]  # `flat` puts the tensors first


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


_logits_op = _make_logits_op(add_op_namespace_prefix("cross_entropy"), _logits_backward)
_logits_inplace_op = _make_logits_op(
    add_op_namespace_prefix("cross_entropy_inplace_backward"), _logits_inplace_backward
)


def _reduce(terms: RowTerms, args: LossArgs) -> tuple[Tensor, ...]:
    """Weight and sum the rows; metrics that are not requested are empty tensors."""
    total = terms.ce
    if args.options.z_loss_weight > 0:
        total = total + args.options.z_loss_weight * terms.norm.sum(dim=0).square()
    metrics = (terms.right, terms.entropy) if args.options.metrics else (None, None)
    found = reduce_rows(args, terms.ce, total, terms.penalty, terms.drift, *metrics)
    return tuple(terms.ce.new_empty(0) if term is None else term for term in found)


def _fake_terms(args: LossArgs) -> tuple[Tensor, ...]:
    like = args.penalty_weight if args.reduce else args.row_ce
    wanted = _N_TERMS if args.options.metrics else _N_TERMS - 2
    return tuple(
        torch.empty_like(like) if i < wanted else like.new_empty(0) for i in range(_N_TERMS)
    )


def _scales(args: LossArgs, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a factor f, and the scales of the rows' ce and penalty divided by f.

    The gradient is stored divided by f, about 1 / num_items, and multiplied by f at the end:
    otherwise most float16 entries would underflow. f is a power of two, so this rounds nothing. It
    follows the penalty's scale if that is much larger, as with few anchor rows, to avoid overflow.
    """
    ce, penalty = args.inv_items * upstream, args.penalty_weight * args.inv_safety_items * upstream
    held = torch.where(ce == 0, penalty, penalty / _PULL_ROOM).abs()
    wanted = torch.maximum(ce.abs(), held)
    if wanted.dim():
        wanted = wanted.amax() if wanted.numel() else wanted.new_zeros(())
    finite = (wanted > 0) & wanted.isfinite()
    factor = torch.where(finite, torch.exp2(torch.floor(torch.log2(wanted))), 1.0)
    return factor, args.row_ce * (ce / factor), args.row_safety * (penalty / factor)


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in float32 and round to the leaf's dtype, some rows at a time.

    `grad * scale` on the whole tensor would make a float32 copy of it, and a GPU would first round
    the 0-d scale to float16, in which 65,536 is inf.
    """
    if grad.dtype == dtype and (grad.device.type == "cpu" or scale.dtype == dtype):
        return grad * scale
    out = torch.empty_like(grad, dtype=dtype)
    for part, block in zip(out.split(_ROWS_SCALED), grad.split(_ROWS_SCALED), strict=True):
        part.copy_(block.to(scale.dtype) * scale)
    return out
