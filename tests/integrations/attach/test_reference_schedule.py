"""A reference asked less often, or of less: what is compared, how it weighs, and what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_checks import (
    IDS,
    PENALTY,
    TOKENS,
    WEIGHT,
    anchors_of,
    assert_close,
    gradients,
    reference_logits,
)
from peft import PromptTuningConfig, get_peft_model
from tiny_models import batch_of, naive_loss, tiny_model, with_lora

from str_kernels import attach


def test_every_third_forward_counts_three_times(seed: int) -> None:
    model = with_lora(tiny_model("llama", seed), seed).train()
    batch = batch_of(seed)
    with attach(model, TOKENS, penalty=PENALTY, positions="response") as handle:
        model(**batch)
        full = handle.last
    forwards: list[int] = []
    with attach(model, TOKENS, penalty=PENALTY, ref_every=3, positions="response") as handle:
        layer = model.get_base_model().model.layers[0]
        hook = layer.register_forward_hook(lambda *_: forwards.append(1))
        losses, penalties = [], []
        for _ in range(6):
            losses.append(float(model(**batch).loss.detach()))
            penalties.append(float(handle.last.penalty))
        hook.remove()
    assert len(forwards) == 6 + 2
    three = 3 * float(full.penalty)
    assert penalties == pytest.approx([three, 0, 0, three, 0, 0], rel=1e-6)
    for loss, penalty in zip(losses, penalties, strict=True):
        assert loss == pytest.approx(float(full.ce) + WEIGHT * penalty, rel=1e-6)


@pytest.mark.parametrize("positions", ["response", "all", 3])
def test_the_reference_reads_the_first_columns_only(positions: Any, seed: int) -> None:
    model = with_lora(tiny_model("llama", seed), seed).train()
    batch, cut = batch_of(seed), 6
    ref = reference_logits(model, batch)
    labels, mask = batch["labels"][:, 1:], batch["attention_mask"][:, 1:]
    kept = labels != -100
    if positions == "all":
        kept = mask.bool()
    elif positions == 3:
        kept = kept & (kept.cumsum(1) <= 3)
    kept = kept & (torch.arange(kept.shape[1]) < cut)
    expected, penalty = naive_loss(
        model, ref, batch, torch.tensor(IDS), WEIGHT, row_weight=kept.float()
    )
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    lengths: list[int] = []
    options: dict[str, Any] = {"penalty": PENALTY, "positions": positions, "ref_tokens": cut}
    with attach(model, TOKENS, **{"positions": "response", **options}) as handle:
        layer = model.get_base_model().model.layers[0]
        hook = layer.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
        output = model(**batch)
        output.loss.backward()
        hook.remove()
        assert float(handle.last.penalty) == pytest.approx(float(penalty.detach()), rel=1e-4)
    assert lengths == [cut, 11]
    assert_close(output.loss, expected, gradients(model), wanted)


def test_anchors_are_read_whole_and_held_in_each_step(seed: int) -> None:
    model = with_lora(tiny_model("llama", seed), seed).train()
    batch, anchors = batch_of(seed), anchors_of(seed)
    with attach(model, TOKENS, penalty=PENALTY, anchors=anchors, positions="response") as handle:
        model(**batch)
        expected = float(handle.last_anchors.penalty)
    options: dict[str, Any] = {"ref_tokens": 2, "ref_every": 2, "anchors": anchors}
    with attach(model, TOKENS, penalty=PENALTY, **{"positions": "response", **options}) as handle:
        for _ in range(2):
            model(**batch).loss.backward()
            assert float(handle.last_anchors.penalty) == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_shortened_is_refused(seed: int) -> None:
    model = with_lora(tiny_model("llama", seed), seed).train()
    for name in ("ref_every", "ref_tokens"):
        for value in (0, 1.5, True, "2"):
            with pytest.raises(ValueError, match=f"`{name}` must be an int >= 1; got {value!r}"):
                attach(model, TOKENS, **{name: value}, positions="response")
    with pytest.raises(ValueError, match="beside `reference`"):
        attach(
            model, TOKENS, reference=lambda *_: torch.zeros(1), ref_tokens=3, positions="response"
        )
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompted = get_peft_model(tiny_model("llama", seed), config)
    with pytest.raises(ValueError, match="`ref_tokens` must be None for prompt learning"):
        attach(prompted, TOKENS, ref_tokens=3, positions="response")
    for packed in (
        {"position_ids": torch.arange(11).remainder(6).expand(3, 11)},
        {"cu_seq_lens_q": torch.tensor([0, 6, 11])},
    ):
        with (
            attach(model, TOKENS, ref_tokens=3, positions="response"),
            pytest.raises(ValueError, match="packed rows"),
        ):
            model(**batch_of(seed), **packed)
    batch = batch_of(seed)
    batch["attention_mask"] = torch.zeros(3, 1, 11, 11)
    with (
        attach(model, TOKENS, ref_tokens=3, positions="response"),
        pytest.raises(ValueError, match="`attention_mask`"),
    ):
        model(**batch)
