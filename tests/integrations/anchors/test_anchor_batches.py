"""Anchors as rows of a batch: the same loss as in a pass of their own, whatever pads the batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from loss_checks import IDS, PENALTY, TOKENS, anchors_of, assert_close, attached_step, moved
from tiny_models import VOCAB
from torch.utils.data import DataLoader

from str_kernels import attach, project, safety_linear_cross_entropy
from str_kernels.integrations.anchors.batches import AnchorCollator, WithAnchors
from str_kernels.integrations.anchors.prompts import AnchorPrompts, AnchorRow


def rows_of(seed: int, count: int = 3) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        ids = torch.randint(3, VOCAB, (8 + row,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (2 + row) + ids[2 + row :]})
    return rows


def padding(side: str) -> Any:
    """A collator that pads as transformers' do."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def pad(values: list[int], value: int) -> list[int]:
            fill = [value] * (length - len(values))
            return fill + values if side == "left" else values + fill

        ones = [[1] * len(row["input_ids"]) for row in rows]
        return {
            "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
            "attention_mask": torch.tensor([pad(one, 0) for one in ones]),
            "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
        }

    return collate


@pytest.mark.parametrize("label_weight", [0, 1])
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_the_batch_equal_a_pass_of_their_own(
    side: str, label_weight: float, seed: int
) -> None:
    model = moved(seed)
    anchors = anchors_of(seed, penalty_weight=None)
    on_rows = "none" if label_weight == 0 else "response"
    plain = padding("right")(rows_of(seed))
    apart = attached_step(model, plain, anchors=anchors, positions=on_rows)
    batch = AnchorCollator(padding(side), anchors, label_weight=label_weight)(rows_of(seed))
    assert batch["input_ids"].shape[0] == 3 + 3
    assert bool((batch["labels"][3:] == -100).all())
    if side == "left":  # as generate() does; the model itself counts padding as positions
        batch["position_ids"] = batch["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    assert_close(attached_step(model, batch), apart)


def test_the_function_alone_gives_the_same(seed: int) -> None:
    model = moved(seed)
    anchors = anchors_of(seed, penalty_weight=None)
    batch = AnchorCollator(padding("right"), anchors, label_weight=0.5)(rows_of(seed))
    expected = attached_step(model, batch)
    assert expected.penalty > 1e-4
    inner = model.get_base_model()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    ids = torch.tensor(IDS)
    with torch.no_grad(), model.disable_adapter():
        states = inner.model(**inputs).last_hidden_state.flatten(0, 1)
        ref = project(states, inner.lm_head.weight, ids)
    hidden = inner.model(**inputs).last_hidden_state.flatten(0, 1)
    target = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    count = int((target != -100).sum())
    terms = safety_linear_cross_entropy(
        hidden, inner.lm_head.weight, target.flatten(), ids, ref, penalty=PENALTY,
        safety_row_weight=batch["safety_row_weight"].flatten(),
        num_items=count, num_safety_items=count,
    )  # fmt: skip
    assert float(terms.loss.detach()) == pytest.approx(expected.loss, rel=1e-6)


def test_a_collator_that_labels_everything_labels_no_anchor(seed: int) -> None:
    def plain_text(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = padding("right")(rows)
        labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
        return {**batch, "labels": labels}

    anchors = anchors_of(seed, penalty_weight=None)
    batch = AnchorCollator(plain_text, anchors, label_weight=0.25)(rows_of(seed))
    assert bool((batch["labels"][:3] != -100).any()) and bool((batch["labels"][3:] == -100).all())
    count = int((batch["labels"][:, 1:] != -100).sum())
    assert float(batch["safety_row_weight"][3:].sum()) == pytest.approx(count)
    assert float(batch["safety_row_weight"][:3].sum()) == 0.25 * count


def test_a_data_set_with_anchors_under_any_sampler_and_workers(seed: int) -> None:
    anchors = anchors_of(seed, per_step=1, harmless_per_step=1, penalty_weight=None)
    rows = rows_of(seed, 7)
    data = WithAnchors(rows, anchors, every=2)
    assert len(data) == 10
    items = [data[i] for i in range(10)]
    assert [i for i, item in enumerate(items) if "anchor_held" in item] == [2, 5, 8]
    assert [item for item in items if "anchor_held" not in item] == rows
    with pytest.raises(IndexError):
        data[10]
    assert len(list(data)) == 10
    collate = AnchorCollator(padding("right"))
    for batch in DataLoader(data, batch_size=5, shuffle=True, collate_fn=collate):
        assert bool((batch["attention_mask"] == (batch["input_ids"] != 0)).all())
        at_labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
        at_anchors = batch["safety_row_weight"][~at_labels]
        if bool((at_anchors > 0).any()):
            assert float(at_anchors.sum()) == pytest.approx(int(at_labels.sum()))
        assert bool((batch["safety_row_weight"][at_labels] == 0).all())


def drawn(loader: Any, epochs: int) -> list[int]:
    """Return the anchors that the batches of some epochs have, by the token that tells them."""
    found = []
    for _ in range(epochs):
        for batch in loader:
            held = (batch["labels"] == -100).all(dim=1)
            found += batch["input_ids"][held, 0].tolist()
    return found


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("batches", "epochs"), [(4, 3), (3, 5)])  # 3: one worker has twice as many
def test_every_anchor_has_its_turn_with_any_workers(
    workers: int, persistent: bool, batches: int, epochs: int, seed: int
) -> None:
    rows = [AnchorRow((10 + i, 3), kind="harmful" if i < 20 else "harmless") for i in range(30)]
    anchors = AnchorPrompts(rows, per_step=2, harmless_per_step=1, seed=seed)  # rounds of 10 turns

    def loader() -> Any:
        return DataLoader(
            rows_of(seed, 2 * batches),  # type: ignore[arg-type]
            batch_size=2,
            collate_fn=AnchorCollator(padding("right"), anchors),
            num_workers=workers,
            persistent_workers=persistent,
        )

    loaded = loader()
    first = drawn(loaded, epochs)
    assert len(set(first)) == 30, sorted(set(range(10, 40)) - set(first))
    counts = Counter(first + drawn(loaded, 5))  # in the long run as often as any other
    # a worker that started within a round may have it twice in two rounds, or not yet
    assert max(counts.values()) - min(counts.values()) <= max(2 * workers - 1, 1)
    assert drawn(loader(), epochs) == first  # and the same in another run


def test_every_anchor_has_its_turn_where_some_workers_have_none(seed: int) -> None:
    anchors = AnchorPrompts([AnchorRow((10 + i, 3)) for i in range(6)], per_step=1, seed=seed)
    collate = AnchorCollator(padding("right"), anchors)
    loader: Any = DataLoader(rows_of(seed, 2), batch_size=2, collate_fn=collate, num_workers=2)
    assert sorted(drawn(loader, 6)) == list(range(10, 16))  # one batch an epoch: worker 0 alone


def test_what_cannot_be_joined_is_named(seed: int) -> None:
    anchors = anchors_of(seed, penalty_weight=None)
    with pytest.raises(ValueError, match="`anchors` must have no `penalty_weight` for a collator"):
        AnchorCollator(padding("right"), anchors_of(seed))
    packed = [{**row, "position_ids": row["input_ids"]} for row in rows_of(seed)]
    with pytest.raises(ValueError, match="position_ids"):
        AnchorCollator(padding("right"), anchors)(packed)
    dropped = [{"input_ids": [4, 5], "labels": [-100, -100]}]
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        AnchorCollator(padding("right"))(dropped)
    with pytest.raises(ValueError, match="`every` must be >= 1"):
        WithAnchors([], anchors, 0)
    model = moved(seed)
    batch = padding("right")(rows_of(seed))
    with (
        attach(model, TOKENS, positions="response"),
        pytest.raises(ValueError, match="`safety_row_weight` must have"),
    ):
        model(**batch, safety_row_weight=torch.ones(2, 2))
    weight = torch.ones_like(batch["labels"], dtype=torch.float32)
    with attach(model, TOKENS, positions=3), pytest.raises(ValueError, match="`positions` must"):
        model(**batch, safety_row_weight=weight)
