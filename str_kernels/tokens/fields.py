"""Checks and conversions of the fields of SafetyTokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..op import check_id_weights


def as_ids(ids: object) -> Tensor:
    """Return ids (K,) as int64 on the CPU; TypeError unless they are integers."""
    if isinstance(ids, Tensor):
        if ids.dtype != torch.int64:
            raise TypeError(f"`ids` must be int64; got {ids.dtype}")
        values = ids.detach().cpu()
    else:
        listed = list(ids) if isinstance(ids, Iterable) else [ids]
        for value in listed:
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`ids` must be integers; got {value!r}")
            if value >= 2**63:
                raise ValueError(f"`ids` must be below 2^63; got {value}")
        values = torch.tensor(listed, dtype=torch.int64)
    if values.dim() != 1:
        raise ValueError(f"`ids` must have shape (K,); got {tuple(values.shape)}")
    return values


def as_weights(id_weights: Tensor | Sequence[float]) -> Tensor:
    """Return weights (K,) as float32 on the CPU; TypeError, ValueError unless >= 0 and finite."""
    try:
        weights = torch.as_tensor(id_weights, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`id_weights` must be numbers; got {id_weights!r}") from error
    check_id_weights(weights)
    return weights.detach().cpu()


def as_scores(scores: Sequence[float], count: int) -> tuple[float, ...]:
    """Return scores as floats; TypeError unless numbers, ValueError unless `count` finite ones."""
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise TypeError(f"`scores` must be numbers; got {score!r}")
        if not math.isfinite(score):
            raise ValueError(f"`scores` must be finite; got {score}")
    if len(scores) != count:
        raise ValueError(f"`scores` must have {count} entries; got {len(scores)}")
    return tuple(float(score) for score in scores)
