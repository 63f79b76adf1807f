"""A reference asked less often, or of less: what is compared, how it weighs, and what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_checks import (
    ON_ROWS,
    TOKENS,
    WEIGHT,
    anchors_of,
    assert_close,
    attached_step,
    moved,
    naive_step,
    reference_logits,
)
from peft import PromptTuningConfig, get_peft_model
from tiny_models import batch_of, tiny_model

from str_kernels import attach


def test_every_third_forward_counts_three_times(seed: int) -> None:
    model = moved(seed)
    batch = batch_of(seed)
    full = attached_step(model, batch)
    forwards: list[int] = []
    with attach(model, TOKENS, ref_every=3, **ON_ROWS) as handle:
        layer = model.get_base_model().model.layers[0]
        hook = layer.register_forward_hook(lambda *_: forwards.append(1))
        losses, penalties = [], []
        for _ in range(6):
            losses.append(float(model(**batch).loss.detach()))
            penalties.append(float(handle.last.penalty))
        hook.remove()
    assert len(forwards) == 6 + 2
    three, ce = 3 * full.penalty, full.loss - WEIGHT * full.penalty
    assert penalties == pytest.approx([three, 0, 0, three, 0, 0], rel=1e-6)
    for loss, penalty in zip(losses, penalties, strict=True):
        assert loss == pytest.approx(ce + WEIGHT * penalty, rel=1e-6)


@pytest.mark.parametrize("positions", ["response", "all", 3])
def test_the_reference_reads_the_first_columns_only(positions: Any, seed: int) -> None:
    model = moved(seed)
    batch, cut = batch_of(seed), 6
    ref = reference_logits(model, batch)
    labels, mask = batch["labels"][:, 1:], batch["attention_mask"][:, 1:]
    kept = labels != -100
    if positions == "all":
        kept = mask.bool()
    elif positions == 3:
        kept = kept & (kept.cumsum(1) <= 3)
    kept = kept & (torch.arange(kept.shape[1]) < cut)
    expected = naive_step(model, ref, batch, row_weight=kept.float())
    lengths: list[int] = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    got = attached_step(model, batch, positions=positions, ref_tokens=cut)
    assert got.penalty == pytest.approx(expected.penalty, rel=1e-4)
    assert lengths[-2:] == [cut, 11]  # after attach()'s own
    assert_close(got, expected)


def test_anchors_are_read_whole_and_held_in_each_step(seed: int) -> None:
    model = moved(seed)
    batch, anchors = batch_of(seed), anchors_of(seed)
    expected = attached_step(model, batch, anchors=anchors).anchor_penalty
    options: dict[str, Any] = {"ref_tokens": 2, "ref_every": 2, "anchors": anchors}
    with attach(model, TOKENS, **ON_ROWS, **options) as handle:
        for _ in range(2):
            model(**batch).loss.backward()
            assert float(handle.last_anchors.penalty) == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_shortened_is_refused(seed: int) -> None:
    model = moved(seed)
    for name in ("ref_every", "ref_tokens"):
        for value in (0, 1.5, True, "2"):
            with pytest.raises(ValueError, match=f"`{name}` must be an int >= 1; got {value!r}"):
                attach(model, TOKENS, **{name: value}, positions="response")
    options: dict[str, Any] = {"ref_tokens": 3, "positions": "response"}
    with pytest.raises(ValueError, match="beside `reference`"):
        attach(model, TOKENS, reference=lambda *_: torch.zeros(1), **options)
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompted = get_peft_model(tiny_model("llama", seed), config)
    with pytest.raises(ValueError, match="`ref_tokens` must be None for prompt learning"):
        attach(prompted, TOKENS, **options)
    for wrong, match in (
        ({"position_ids": torch.arange(11).remainder(6).expand(3, 11)}, "packed rows"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 11])}, "packed rows"),
        ({"attention_mask": torch.zeros(3, 1, 11, 11)}, "`attention_mask`"),
    ):
        with attach(model, TOKENS, **options), pytest.raises(ValueError, match=match):
            model(**{**batch_of(seed), **wrong})
