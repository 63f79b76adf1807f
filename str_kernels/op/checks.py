"""The checks of the loss functions' arguments, and their error messages.

A message reads "`<argument>` must <rule>; got <value>". Shapes, dtypes and devices are always
checked. Values (labels in range, ids distinct) are checked on a CPU only: reading them from a GPU
would make every step wait for the device.
"""

from __future__ import annotations

import json
from typing import Any, get_args

import torch
from torch import Tensor

from .contracts import Backend, check_number, check_plain
from .projection import Head

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object, shape: tuple[int | str, ...]) -> Tensor:
    """Check that `value` is a tensor of `shape`, in which a letter matches any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(value).__name__}")
    check_plain(name, value)
    sizes = tuple(value.shape)
    fits = len(sizes) == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"`{name}` must have shape ({wanted}); got {sizes}")
    return value


def check_float(
    name: str, value: Tensor, like: torch.dtype | None = None, of: str = "logits"
) -> None:
    """Check that `value` is float32, bfloat16, float16 or float64, and of dtype `like` if given."""
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"`{name}` must be float32, bfloat16, float16 or float64; got {value.dtype}"
        )
    if like is not None and value.dtype != like:
        raise TypeError(f"`{name}` must have the dtype of `{of}`, {like}; got {value.dtype}")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """Check that `value` is on `device`, that of the logits or hidden states."""
    if value.device != device:
        raise ValueError(f"`{name}` must be on device {device}; got {value.device}")


def check_int64(name: str, value: Tensor) -> None:
    """Check for int64, the dtype of all ids and targets."""
    if value.dtype != torch.int64:
        raise TypeError(f"`{name}` must be int64; got {value.dtype}")


def check_rows(
    target: object,
    safety_ids: Tensor | None,
    ref: Tensor | None,
    like: Tensor,  # (N, ...) logits or hidden states
) -> None:
    """Check target (N,), safety_ids (K,) and ref_safety_logits against each other."""
    rows = like.shape[0]
    target = check_tensor("target", target, (rows,))
    check_int64("target", target)
    check_device("target", target, like.device)
    if (safety_ids is None) != (ref is None):
        raise ValueError(
            "`ref_safety_logits` must be given together with `safety_ids`; got "
            f"safety_ids={_brief(safety_ids)}, ref_safety_logits={_brief(ref)}"
        )
    if safety_ids is None or ref is None:
        return
    check_tensor("safety_ids", safety_ids, ("K",))
    check_int64("safety_ids", safety_ids)
    check_device("safety_ids", safety_ids, like.device)
    ids = safety_ids.shape[0]
    if not isinstance(ref, Tensor) or tuple(ref.shape) not in ((rows, ids), (ids,)):
        raise ValueError(
            f"`ref_safety_logits` must have shape ({rows}, {ids}) or ({ids},); got {_brief(ref)}"
        )
    check_plain("ref_safety_logits", ref)
    check_float("ref_safety_logits", ref)
    check_device("ref_safety_logits", ref, like.device)


def check_row_weight(name: str, value: Tensor | None, like: Tensor) -> None:
    """Check a per-row weight: (N,), floating point, on the device of the rows."""
    if value is None:
        return
    value = check_tensor(name, value, (like.shape[0],))
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must be a floating-point tensor; got {value.dtype}")
    check_device(name, value, like.device)


def check_count(name: str, value: object, device: torch.device) -> None:
    """Check a divisor: a number >= 0, or a 0-d tensor on the device or on the CPU."""
    if value is None:
        return
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"`{name}` must be a number or a 0-d tensor; got {_brief(value)}")
        check_plain(name, value)
        if value.is_complex():
            raise TypeError(f"`{name}` must be a real number; got {value.dtype}")
        check_device_of_number(name, value, device)
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number or a 0-d tensor; got {type(value).__name__}")
    check_number(name, value)


def check_device_of_number(name: str, value: object, device: torch.device) -> None:
    """Check that a 0-d tensor is on the loss's type of device, or on the CPU, to be copied."""
    if isinstance(value, Tensor) and value.device.type not in ("cpu", device.type):
        wanted = device if device.type == "cpu" else f"{device} or cpu"
        raise ValueError(f"`{name}` must be on device {wanted}; got {value.device}")


def check_head(hidden: object, head: Head) -> None:
    """Check hidden (N, D) and every part of the head against each other."""
    hidden = check_tensor("hidden", hidden, ("N", "D"))
    check_float("hidden", hidden)
    rows, dim = hidden.shape
    check_tensor("linear_weight", head.weight, ("V", dim))
    parts = {"linear_weight": head.weight}
    if head.bias is not None:
        parts["linear_bias"] = check_tensor("linear_bias", head.bias, (head.weight.shape[0],))
    if head.t is not None or head.b is not None:
        t = check_tensor("low_rank[0]", head.t, (rows, "r"))
        b = check_tensor("low_rank[1]", head.b, (head.weight.shape[0], t.shape[1]))
        parts.update({"low_rank[0]": t, "low_rank[1]": b})
    for name, value in parts.items():
        check_float(name, value)
        check_device(name, value, hidden.device)


def check_low_rank(low_rank: object) -> tuple[Tensor, ...]:
    """Check that a LoRA head is a pair of tensors; `check_head` checks the tensors."""
    if low_rank is None:
        return ()
    if not isinstance(low_rank, (tuple, list)):
        got = type(low_rank).__name__
    elif len(low_rank) == 2 and all(isinstance(x, Tensor) for x in low_rank):
        return tuple(low_rank)
    else:
        got = f"({', '.join(type(x).__name__ for x in low_rank)})"
    raise TypeError(f"`low_rank` must be a pair (t, B) of tensors; got {got}")


def check_chunk_bytes(chunk_bytes: object, row_bytes: int = 1) -> None:
    """Check a memory budget: None, or an int that is enough for one row of logits."""
    if chunk_bytes is None:
        return
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
        raise TypeError(f"`chunk_bytes` must be an int or None; got {type(chunk_bytes).__name__}")
    if chunk_bytes < max(row_bytes, 1):
        raise ValueError(
            f"`chunk_bytes` must be at least {max(row_bytes, 1)}, one row of logits; "
            f"got {chunk_bytes}"
        )


def check_backend(backend: str) -> None:
    """Check that the name is one of the backends."""
    if not isinstance(backend, str) or backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise ValueError(f"`backend` must be one of {names}; got {backend!r}")


def check_values(target: Tensor, safety_ids: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Check the values of labels and ids on a CPU; do nothing on a GPU or while compiling."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"`target` must be in [0, {vocab_size}) or {ignore_index} (ignore_index); "
            f"got {int(target[row])} in row {row}"
        )
    check_id_values("safety_ids", safety_ids.tolist(), vocab_size)


def check_id_values(name: str, ids: list[int], vocab_size: int | None) -> None:
    """Check that ids are distinct, not negative and, if V is known, inside the vocabulary."""
    for value in ids:
        if value < 0 or (vocab_size is not None and value >= vocab_size):
            limit = "V" if vocab_size is None else vocab_size
            raise ValueError(f"`{name}` must be in [0, {limit}); got {value}")
    if len(set(ids)) != len(ids):
        twice = sorted({value for value in ids if ids.count(value) > 1})
        raise ValueError(f"`{name}` must be distinct; got {twice[:5]} more than once")


def _brief(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def read_json_object(name: str, text: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """Parse an option that is a JSON object; return a dict or None unchanged."""
    value: Any = text
    if isinstance(text, str):
        try:
            value = json.loads(text)
        except ValueError:
            value = text
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a JSON object; got {text!r:.80}")
    return value
