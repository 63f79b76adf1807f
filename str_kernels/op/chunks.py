"""The chunk loop: logits from hidden states a few rows at a time, and the gradients they lead to.

`linear_terms_and_grads` is the linear path's forward (terms, and gradients if wanted) and, for
reduction "none", also its backward. What happens inside a row is the row step's business.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import row_step_of, row_step_of_shard
from .contracts import LossArgs, RowTerms, accumulation_dtype
from .parallel import VocabShard
from .penalties import ON_LOG_PROBS
from .projection import Head, project_head

# Logits of one chunk. Enough rows for the products to be limited by arithmetic and not by reading
# the head again for every chunk; docs/log.md has the CPU's measurement.
_CHUNK_ROWS_CPU = 256
_CHUNK_BYTES_CPU = 64 << 20
_MORE_FOR_THE_HEAD = 4  # times: each chunk reads and writes all of the head's float32 gradient
_CHUNK_BYTES = 256 << 20
_MIN_CHUNK_ROWS = 1024
_TILE = 128 * 128  # of a product, per multiprocessor: fewer leave some of them idle
_HEAD_ROWS_PER_PRODUCT = 16384  # rows of grad_weight made at a time: bounds its temporary
_HEAD_ROWS_WIDENED = 2048  # the same, of its copy in float32
_PAD = 16  # elements: a row that starts aligned is loaded 16 bytes at a time


class Grads(NamedTuple):
    """A gradient, or an empty tensor, for each of hidden, the head's weight and bias, t and b."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    t: Tensor
    b: Tensor


class Plan(NamedTuple):
    """How the rows are gone through.

    Attributes:
        chunk_rows: rows of logits at a time.
        pack: leave rows that have neither loss out of the products. Their number has to be known
            for it, so a device is waited for.
        needs: which gradients are wanted, in the order of Grads' fields.
    """

    chunk_rows: int
    pack: bool
    needs: tuple[bool, ...]


def row_bytes(hidden: Tensor, vocab: int) -> int:
    """Return the bytes of one row of logits in the workspace."""
    return _padded(vocab) * hidden.dtype.itemsize


def rows_per_chunk(
    hidden: Tensor, vocab: int, chunk_bytes: int | None, head_gradient: bool = False
) -> int:
    """Return how many rows' logits fit the byte budget; at least 1."""
    of_row = row_bytes(hidden, vocab)
    if chunk_bytes is not None:
        return max(1, min(chunk_bytes // of_row, max(hidden.shape[0], 1)))
    if hidden.device.type == "cpu":
        times = _MORE_FOR_THE_HEAD if head_gradient else 1
        return max(1, min(times * _CHUNK_ROWS_CPU, times * _CHUNK_BYTES_CPU // of_row))
    rows = max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // of_row)
    if hidden.device.type == "cuda":
        processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
        rows = max(rows, -(-processors * _TILE // max(hidden.shape[1], 1)))
    return rows


def linear_terms_and_grads(
    hidden: Tensor,  # (N, D)
    head: Head,
    args: LossArgs,
    plan: Plan,
    ce_scale: Tensor,  # (N,)
    penalty_scale: Tensor,  # (N,)
    shard: VocabShard | None = None,
) -> tuple[RowTerms, Grads]:
    """Compute the row terms, and the gradients of sum(ce_scale ce + penalty_scale phi).

    Rows that take no part have terms and gradients of 0. With `shard` the head is this rank's part
    of it, the terms are those of the whole, and the rows' gradients are summed over the ranks in
    float32 before they are rounded.

    Where memory runs out, all is made again once with half the rows of logits at a time.

    Raises:
        torch.OutOfMemoryError: that did not fit either; says what to set.
    """
    try:
        return _in_chunks(hidden, head, args, plan, ce_scale, penalty_scale, shard)
    except (RuntimeError, MemoryError) as error:
        # The ranks of a vocabulary meet in every chunk: one of them alone cannot have more chunks.
        if not is_out_of_memory(error) or shard is not None:
            raise
        count = int(args.takes_part().sum()) if plan.pack else hidden.shape[0]
        rows = min(_rows_at_a_time(hidden, args, plan), count)
        if rows < 2:
            raise
    # Here, and not in the handler, whose traceback keeps the first attempt's tensors.
    plan = plan._replace(chunk_rows=rows // 2 * _times_wider(hidden, args))
    half = plan.chunk_rows * row_bytes(hidden, head.weight.shape[0])
    warnings.warn(
        f"out of memory with {rows:,} rows of logits at a time; trying half. Set "
        f"chunk_bytes={half} to begin with that",
        stacklevel=2,
    )
    try:
        return _in_chunks(hidden, head, args, plan, ce_scale, penalty_scale, shard)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            f"`chunk_bytes` must fit the free memory: {rows:,} rows of logits did not, nor did "
            f"half of them ({half:,} bytes). Set less, or give the model fewer tokens at a time or "
            f"gradient checkpointing. {error}"
        ) from error


# What else than OutOfMemoryError is raised: by the CPU's allocator, by oneDNN, by MPS, by C++, by
# CUDA's runtime and its BLAS.
_OUT_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "could not create a primitive",
)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out, by whichever library says so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def _times_wider(hidden: Tensor, args: LossArgs) -> int:
    """Return how many times wider than the hidden states the logits are made.

    Rounded to 16 bits a row's logits say less of its small probabilities than the finer safety
    logits beside them, and 1 - sum p would be the difference of the two.
    """
    if args.options.kind not in ON_LOG_PROBS:
        return 1
    return accumulation_dtype(hidden.dtype).itemsize // hidden.dtype.itemsize


def _rows_at_a_time(hidden: Tensor, args: LossArgs, plan: Plan) -> int:
    return max(1, plan.chunk_rows // _times_wider(hidden, args))


def _in_chunks(
    hidden: Tensor,  # (N, D)
    head: Head,
    args: LossArgs,
    plan: Plan,
    ce_scale: Tensor,  # (N,)
    penalty_scale: Tensor,  # (N,)
    shard: VocabShard | None,
) -> tuple[RowTerms, Grads]:
    vocab = head.weight.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):
        safety_logits = project_head(
            hidden, head, args.safety_ids, args.options.logit_scale, args.options.softcap, shard
        )
        takes_part = args.takes_part()
        rows = takes_part.nonzero().squeeze(1) if plan.pack else None
        if rows is not None and rows.shape[0] == hidden.shape[0]:
            rows = None
        n_rows = hidden.shape[0] if rows is None else rows.shape[0]
        wide = hidden.dtype if shard is None else accumulation_dtype(hidden.dtype)
        grads = _empty_grads(hidden, head, plan.needs, zeroed=rows is not None, of_rows=wide)
        wants_grad = any(plan.needs)
        step = row_step_of(args.backend) if shard is None else row_step_of_shard(shard)
        width = vocab if shard is None else vocab + 1  # one column for what is another rank's
        wider = args.options.kind in ON_LOG_PROBS
        of_logits = accumulation_dtype(hidden.dtype) if wider else hidden.dtype
        chunk_rows = _rows_at_a_time(hidden, args, plan)
        workspace = _workspace(hidden, width, min(chunk_rows, n_rows), of_logits)
        terms = []
        for start in range(0, n_rows, chunk_rows):
            part: slice | Tensor = slice(start, min(start + chunk_rows, n_rows))
            if rows is not None:
                part = rows[part]
            x, t = hidden[part], None if head.t is None else head.t[part]
            if not plan.pack:
                # The head's gradient sums over rows: a masked one's inf or NaN must not reach it.
                taken = takes_part[part].unsqueeze(1)
                x = torch.where(taken, x, 0.0)
                t = None if t is None else torch.where(taken, t, 0.0)
            logits = workspace[: x.shape[0]]
            _logits_into(logits[:, :vocab], x, t, head)
            found = step(
                logits,
                args.target[part],
                args.safety_ids,
                safety_logits[part],
                args.ref[part],
                args.id_weights,
                args.options,
                ce_scale=ce_scale[part] if wants_grad else None,
                penalty_scale=penalty_scale[part] if wants_grad else None,
                grad=logits if wants_grad else None,
                padded=True,
            )
            terms.append(found)
            if wants_grad:
                grad_logits = logits[:, :vocab].to(x.dtype)
                _add_grads(grads, plan.needs, grad_logits, x, t, head, part)
        if shard is not None:
            summed = (
                shard.sum_over_ranks_(grad).to(hidden.dtype) if need else grad.to(hidden.dtype)
                for grad, need in ((grads.hidden, plan.needs[0]), (grads.t, plan.needs[3]))
            )
            grads = grads._replace(**dict(zip(("hidden", "t"), summed, strict=True)))
        return _at_rows(_concatenate(terms, safety_logits), rows, hidden.shape[0]), grads


def _logits_into(logits: Tensor, x: Tensor, t: Tensor | None, head: Head) -> None:
    if logits.dtype != x.dtype:
        _wide_logits_into(logits, x, t, head)
        return
    if head.bias is None:
        torch.mm(x, head.weight.t(), out=logits)
    else:
        torch.addmm(head.bias, x, head.weight.t(), out=logits)
    if t is not None and head.b is not None:
        logits.addmm_(t, head.b.t())


def _wide_logits_into(logits: Tensor, x: Tensor, t: Tensor | None, head: Head) -> None:
    """Make unrounded logits of 16-bit operands; the head is widened a few rows at a time."""
    dtype = logits.dtype
    if x.device.type == "cuda":
        logits.copy_(torch.mm(x, head.weight.t(), out_dtype=dtype))
    else:
        wide = x.to(dtype)
        for columns, rows in zip(
            logits.split(_HEAD_ROWS_WIDENED, dim=1),
            head.weight.split(_HEAD_ROWS_WIDENED),
            strict=True,
        ):
            columns.copy_(wide @ rows.to(dtype).t())
    if head.bias is not None:
        logits.add_(head.bias)
    if t is not None and head.b is not None:
        logits.addmm_(t.to(dtype), head.b.to(dtype).t())


def _add_grads(
    grads: Grads,
    needs: tuple[bool, ...],
    grad_logits: Tensor,  # (c, V)
    x: Tensor,  # (c, D)
    t: Tensor | None,  # (c, r)
    head: Head,
    part: slice | Tensor,
) -> None:
    """Multiply one chunk's gradient of the logits with what they were made of."""
    need_hidden, need_weight, need_bias, need_t, need_b = needs
    for need, out, weight in ((need_hidden, grads.hidden, head.weight), (need_t, grads.t, head.b)):
        if not need or weight is None:
            continue
        if out.dtype != weight.dtype:
            out[part] = _wide_product(grad_logits, weight, out.dtype)
        elif isinstance(part, slice):
            torch.mm(grad_logits, weight, out=out[part])
        else:
            out[part] = torch.mm(grad_logits, weight)
    if need_weight:
        _add_product(grads.weight, grad_logits, x)
    if need_bias:
        grads.bias.add_(grad_logits.sum(dim=0, dtype=grads.bias.dtype))
    if need_b and t is not None:
        _add_product(grads.b, grad_logits, t)


def _wide_product(grad_logits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad_logits weight in float32, unrounded: the other ranks' will be added to it."""
    if weight.device.type == "cuda":
        return torch.mm(grad_logits, weight, out_dtype=dtype)
    out = grad_logits.new_zeros((grad_logits.shape[0], weight.shape[1]), dtype=dtype)
    for columns, rows in zip(
        grad_logits.split(_HEAD_ROWS_WIDENED, dim=1),
        weight.split(_HEAD_ROWS_WIDENED),
        strict=True,
    ):
        out.addmm_(columns.to(dtype), rows.to(dtype))
    return out


def _empty_grads(
    hidden: Tensor,
    head: Head,
    needs: tuple[bool, ...],
    *,
    zeroed: bool,
    of_rows: torch.dtype | None = None,
) -> Grads:
    """Allocate what is needed: a row's gradients as its dtype, the head's in float32, zeroed."""
    dtype = accumulation_dtype(hidden.dtype)
    of_rows = of_rows or hidden.dtype
    found = []
    are_rows = (True, False, False, True, False)
    for like, need, of_row in zip((hidden, *head), needs, are_rows, strict=True):
        if like is None or not need:
            found.append(hidden.new_empty(0, dtype=of_rows if of_row else dtype))
        elif of_row:
            found.append((torch.zeros_like if zeroed else torch.empty_like)(like, dtype=of_rows))
        else:
            found.append(like.new_zeros(like.shape, dtype=dtype))
    return Grads(*found)


def empty_like_grads(hidden: Tensor, head: Head, needs: tuple[bool, ...]) -> Grads:
    """Return tensors of the gradients' shapes and dtypes, for tracing."""
    return _empty_grads(hidden, head, needs, zeroed=False)


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


def _concatenate(terms: list[RowTerms], like: Tensor) -> RowTerms:
    if not terms:
        none = like.new_zeros(0)
        return RowTerms(none, none, none, like.new_zeros((2, 0)), none, none)
    return RowTerms(*(torch.cat(column, dim=-1) for column in zip(*terms, strict=True)))


def _at_rows(terms: RowTerms, rows: Tensor | None, n: int) -> RowTerms:
    """Put the terms of packed rows where they belong, 0 elsewhere."""
    if rows is None:
        return terms

    def spread(column: Tensor) -> Tensor:
        if column.shape[-1] != rows.shape[0]:  # not asked for
            return column
        out = column.new_zeros((*column.shape[:-1], n))
        out[..., rows] = column
        return out

    return RowTerms(*(spread(column) for column in terms))


def _workspace(hidden: Tensor, vocab: int, rows: int, dtype: torch.dtype) -> Tensor:
    workspace = hidden.new_empty((rows, _padded(vocab)), dtype=dtype)
    # oneDNN's 16-bit products read past the end of a row and multiply by 0: NaN must not be there.
    workspace[:, vocab:].zero_()
    return workspace[:, :vocab]


def _padded(vocab: int) -> int:
    return -(-vocab // _PAD) * _PAD
