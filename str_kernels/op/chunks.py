"""The chunk loop: computes logits from hidden states, a chunk of rows at a time, and gradients.

`linear_terms_and_grads` is the linear path's forward (terms, and gradients if needed) and, for
reduction "none", also its backward. The row step computes each row's terms and gradient.
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

# Sizes of a chunk: enough rows that arithmetic limits the matrix products, not reading the head
# again for each chunk. docs/log.md has the measurement on a CPU.
_CHUNK_ROWS_CPU = 256
_CHUNK_BYTES_CPU = 64 << 20
_MORE_FOR_THE_HEAD = 4  # times, since each chunk reads and writes the head's float32 gradient
_CHUNK_BYTES = 256 << 20
_MIN_CHUNK_ROWS = 1024
_TILE = 128 * 128  # outputs of a matrix product per multiprocessor; with fewer, some are idle
_HEAD_ROWS_PER_PRODUCT = 16384  # rows of grad_weight at a time, to bound the temporary
_HEAD_ROWS_WIDENED = 2048  # rows of the head copied to float32 at a time
_PAD = 16  # elements: an aligned row can be loaded 16 bytes at a time


class Grads(NamedTuple):
    """A gradient, or an empty tensor, for each of hidden, the head's weight and bias, t and b."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    t: Tensor
    b: Tensor


class Plan(NamedTuple):
    """How the chunk loop goes through the rows.

    Attributes:
        chunk_rows: rows of logits at a time.
        pack: leave rows with neither loss out of the matrix products. This needs their number, and
            so waits for the device.
        needs: which gradients are needed, in the order of Grads' fields.
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
    """Return how many rows of logits fit in the byte budget; at least 1."""
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

    Rows that take no part have terms and gradients of 0. With `shard`, `head` is this rank's part,
    the terms are those of the whole vocabulary, and the rows' gradients are summed over the ranks
    in float32 before they are rounded.

    If memory runs out, everything is computed again, once, with half the rows per chunk.

    Raises:
        torch.OutOfMemoryError: half the rows did not fit either; the message says what to set.
    """
    try:
        return _in_chunks(hidden, head, args, plan, ce_scale, penalty_scale, shard)
    except (RuntimeError, MemoryError) as error:
        # The ranks of a shard communicate in every chunk, so all need the same number of chunks.
        if not is_out_of_memory(error) or shard is not None:
            raise
        count = int(args.takes_part().sum()) if plan.pack else hidden.shape[0]
        rows = min(_rows_at_a_time(hidden, args, plan), count)
        if rows < 2:
            raise
    # Outside the handler, whose traceback keeps the tensors of the first attempt alive.
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


# Messages of errors other than OutOfMemoryError: from the CPU's allocator, oneDNN, MPS, C++, the
# CUDA runtime and cuBLAS.
_OUT_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "could not create a primitive",
)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of any library means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def _times_wider(hidden: Tensor, args: LossArgs) -> int:
    """Return how many times wider than the hidden states' dtype that of the logits is.

    Kinds on log-probabilities combine the row's logits with float32 safety logits. If the former
    were rounded to 16 bits, 1 - sum p would consist mostly of that rounding.
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
        width = vocab if shard is None else vocab + 1  # one column for all ids of other ranks
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
                # The head's gradient sums over rows: inf or NaN in a masked row must not reach it.
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
    """Compute float32 logits from 16-bit operands; the head is converted a few rows at a time."""
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
    """Add one chunk's part of the gradients, from the gradient of its logits."""
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
    """Return grad_logits @ weight in float32, since the other ranks' products are added to it."""
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
    """Allocate the needed gradients: of rows in their dtype, of the head as zeros in float32."""
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
        else:  # rounds each chunk's product to the input's dtype, but not the sum over chunks
            block += torch.mm(columns.t(), x)


def _concatenate(terms: list[RowTerms], like: Tensor) -> RowTerms:
    if not terms:
        none = like.new_zeros(0)
        return RowTerms(none, none, none, like.new_zeros((2, 0)), none, none)
    return RowTerms(*(torch.cat(column, dim=-1) for column in zip(*terms, strict=True)))


def _at_rows(terms: RowTerms, rows: Tensor | None, n: int) -> RowTerms:
    """Put the terms of packed rows at their original rows, and 0 elsewhere."""
    if rows is None:
        return terms

    def spread(column: Tensor) -> Tensor:
        if column.shape[-1] != rows.shape[0]:  # a metric that was not requested
            return column
        out = column.new_zeros((*column.shape[:-1], n))
        out[..., rows] = column
        return out

    return RowTerms(*(spread(column) for column in terms))


def _workspace(hidden: Tensor, vocab: int, rows: int, dtype: torch.dtype) -> Tensor:
    workspace = hidden.new_empty((rows, _padded(vocab)), dtype=dtype)
    # oneDNN's 16-bit products read past the end of a row and multiply by 0: NaN would stay NaN.
    workspace[:, vocab:].zero_()
    return workspace[:, :vocab]


def _padded(vocab: int) -> int:
    return -(-vocab // _PAD) * _PAD
