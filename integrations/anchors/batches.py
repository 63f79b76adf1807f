"""Anchors as rows of a batch, for your own training loop or sampler.

`attach(..., anchors=...)` needs none of this: it runs the anchors in a separate pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ...op import IGNORE_INDEX, check_number
from ..models import ROW_WEIGHT, shift
from .prompts import AnchorPrompts, AnchorRow

_SLOTS = 1024  # one counter per worker of a DataLoader
HELD = "anchor_held"  # column of an anchor: at how many last positions the penalty is taken
_COLUMNS = {"input_ids", "attention_mask", "labels", HELD}


class AnchorCollator:
    """Wraps a collator: adds anchors to each batch, and the penalty's row weights.

    The batch gains `safety_row_weight` (B, T) float32. With n labels in the batch and P positions
    at which anchors are held, it is label_weight where a label follows and n / P at the held
    positions. With

        target = shift(labels),  num_items = num_safety_items = n

    the loss is then that of `attach(..., anchors=...)`, with the penalty's own weight. An attached
    model (`positions="response"`) reads the weights from the batch. In your own loop, flatten them
    and pass them to `safety_linear_cross_entropy(..., safety_row_weight=)`.

    Args:
        collate: pads rows of input_ids, attention_mask and labels, on either side.
        anchors: the anchors to add. None if the rows come from `WithAnchors`.
        label_weight: 0 takes the penalty only at the anchors, 1 at every label too.

    Raises:
        ValueError: `anchors` has its own penalty weight. When called: a row has other columns, such
            as position_ids of packed rows; or, without `anchors`, has no label and is no anchor.

    Notes:
        For training batches only. Each worker of a DataLoader goes through all anchors, starting at
        another place than the others; in the next epoch it continues where it stopped.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], Any],
        anchors: AnchorPrompts | None = None,
        *,
        label_weight: float = 0.0,  # keyword only: another weight had this place before
    ) -> None:
        if anchors is not None and anchors.penalty_weight is not None:
            raise ValueError(
                "`anchors` must have no `penalty_weight` for a collator, in whose batches the "
                f"penalty has its own weight everywhere; got {anchors.penalty_weight}"
            )
        self.collate = collate
        self.anchors = anchors
        self.label_weight = check_number("label_weight", label_weight)
        # Shared memory, since each epoch starts new worker processes with copies of the rest.
        self._drawn = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        """Collate the rows together with the next anchors."""
        rows = [*rows, *self._next_anchors()]
        self._check(rows)
        held = torch.tensor([int(row.get(HELD, 0)) for row in rows]).unsqueeze(1)  # (B, 1)
        batch = self.collate([_columns(row) for row in rows])
        labels, mask = batch["labels"], batch["attention_mask"]
        labels[held.squeeze(1) > 0] = IGNORE_INDEX  # a collator for plain text labels every token
        column = torch.arange(labels.shape[1])
        end = torch.where(mask.bool(), column, -1).max(dim=1, keepdim=True).values  # (B, 1)
        at_anchors = (column > end - held) & (column <= end) & (held > 0)
        at_labels = shift(labels) != IGNORE_INDEX
        share = at_labels.sum() / at_anchors.sum().clamp(min=1)
        batch[ROW_WEIGHT] = at_labels * self.label_weight + at_anchors * share
        return batch

    def _next_anchors(self) -> list[dict[str, Any]]:
        if self.anchors is None:
            return []
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        slot = worker_id % _SLOTS
        turn = int(self._drawn[slot]) + worker_id * _round(self.anchors) // workers
        self._drawn[slot] += 1  # no other process writes there
        return [anchor_row(self.anchors.rows[place]) for place in self.anchors.draw(turn)]

    def _check(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            others = set(row) - _COLUMNS
            if others:
                raise ValueError(
                    f"`rows` must have the columns input_ids, attention_mask and labels beside "
                    f"anchors; got {sorted(others)} too. attach(..., anchors=) takes any batch"
                )
            if self.anchors is None and HELD not in row and _has_no_label(row):
                raise ValueError(
                    f"`rows` must have a label each or be anchors ({HELD!r}); got a row without. "
                    "Trainer drops that column unless remove_unused_columns=False"
                )


def _round(anchors: AnchorPrompts) -> int:
    """Return the number of turns after which every anchor was used."""
    there = Counter[str](row.kind for row in anchors.rows)
    asked = {"harmful": anchors.per_step, "harmless": anchors.harmless_per_step}
    return max(-(-there[kind] // count) for kind, count in asked.items() if count)


class WithAnchors(Dataset[dict[str, Any]]):
    """A data set with an anchor after every `every` rows, for loops with their own sampler.

    Args:
        dataset: has a length and rows with input_ids and labels.
        anchors: used in the order that `draw` gives.
        every: number of rows between anchors.

    Notes:
        An index always gives the same row or anchor, whatever the sampler, worker or rank. Collate
        with AnchorCollator(collate).
    """

    def __init__(self, dataset: Any, anchors: AnchorPrompts, every: int) -> None:
        if every < 1:
            raise ValueError(f"`every` must be >= 1; got {every}")
        self.dataset = dataset
        self.anchors = anchors
        self.every = every

    def __len__(self) -> int:
        """Return the number of rows and anchors."""
        return len(self.dataset) + len(self.dataset) // self.every

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row of the data set or an anchor."""
        group, place = divmod(index, self.every + 1)
        if not 0 <= index < len(self):
            raise IndexError(index)
        if place < self.every:
            row: dict[str, Any] = self.dataset[group * self.every + place]
            return row
        per_step = self.anchors.per_step + self.anchors.harmless_per_step
        step, turn = divmod(group, per_step)
        return anchor_row(self.anchors.rows[self.anchors.draw(step)[turn]])


def anchor_row(anchor: AnchorRow) -> dict[str, Any]:
    """Return an anchor as a row of a data set: without labels, with the HELD column."""
    ids = list(anchor.input_ids)
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [IGNORE_INDEX] * len(ids),
        HELD: anchor.held,
    }


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns to pad, adding a missing mask: all rows must have the same columns."""
    columns = {name: value for name, value in row.items() if name != HELD}
    columns.setdefault("attention_mask", [1] * len(columns["input_ids"]))
    return columns


def _has_no_label(row: dict[str, Any]) -> bool:
    labels = row.get("labels")
    if labels is None:
        return False
    values = labels.tolist() if isinstance(labels, Tensor) else labels
    return all(label == IGNORE_INDEX for label in values)
