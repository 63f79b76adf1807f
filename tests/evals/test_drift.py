from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from str_kernels.evals import drift_statistics


def batches(sizes: list[int], ids: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, ids) for size in sizes]
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for shape in shapes
    ]


def test_statistics_are_those_of_all_entries_at_once() -> None:
    pairs = batches([3, 0, 1, 7])
    drift = torch.cat([z.double() - r.double() for z, r in pairs])
    found = drift_statistics(pairs)
    assert found.rows == 11
    assert found.rms == pytest.approx(drift.square().mean().sqrt().item(), rel=1e-12)
    assert found.mean_abs == pytest.approx(drift.abs().mean().item(), rel=1e-12)
    assert found.max_abs == drift.abs().max().item()


def test_an_iterator_will_do_and_the_same_logits_give_exact_zeros() -> None:
    z = torch.randn(4, 3)
    assert drift_statistics((z, z.clone()) for _ in range(2)) == (8, 0.0, 0.0, 0.0)


def test_bfloat16_is_subtracted_in_float64() -> None:
    # Both numbers are exact in bfloat16; their difference would round to 256 there.
    z, r = (torch.tensor([[x]], dtype=torch.bfloat16) for x in (256.0, 0.5))
    assert drift_statistics([(z, r)]).max_abs == 255.5


def test_sums_do_not_lose_small_terms() -> None:
    # float32 sums stop growing at 2^24 when 1 is added
    big, small = torch.full((1, 1), 2.0**12), torch.ones(1000, 1)
    found = drift_statistics([(big, torch.zeros(1, 1)), (small, torch.zeros(1000, 1))])
    assert found.rms == pytest.approx(math.sqrt((2.0**24 + 1000) / 1001), rel=1e-12)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spoilt_entry_shows_wherever_it_is(position: int, value: float) -> None:
    pairs = batches([2, 2, 2])
    pairs[position][0][1, 3] = value
    found = drift_statistics(pairs)
    for number in (found.rms, found.mean_abs, found.max_abs):
        assert math.isnan(number) if math.isnan(value) else number == math.inf


def test_gradients_are_left_alone() -> None:
    z = torch.randn(2, 2, requires_grad=True)
    drift_statistics([(z, torch.zeros(2, 2))])
    assert z.grad is None


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "`pairs` must hold at least one row"),
        ([(torch.zeros(0, 3), torch.zeros(0, 3))], "`pairs` must hold at least one row"),
        ([(torch.zeros(2, 0), torch.zeros(2, 0))], "`pairs` must hold at least one row"),
        ([(torch.zeros(3), torch.zeros(3))], r"`safety_logits` must have shape \(n, K\); got"),
        ([(torch.zeros(2, 3), torch.zeros(2, 4))], r"`ref_safety_logits` must have shape \(n, 3\)"),
        ([(torch.zeros(2, 3), torch.zeros(3))], r"`ref_safety_logits` must have shape \(n, 3\)"),
        ([(torch.zeros(2, 3), torch.zeros(1, 3))], r"`ref_safety_logits` must have the shape of"),
        (
            [(torch.zeros(2, 3), torch.zeros(2, 3)), (torch.zeros(2, 4), torch.zeros(2, 4))],
            r"`safety_logits` must have shape \(n, 3\); got \(2, 4\)",
        ),
    ],
)
def test_shapes_are_checked(pairs: list[tuple[Tensor, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drift_statistics(pairs)


def test_types_are_checked() -> None:
    with pytest.raises(TypeError, match="`safety_logits` must be a floating-point tensor"):
        drift_statistics([(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))])
    with pytest.raises(TypeError, match="`ref_safety_logits` must be a tensor; got list"):
        drift_statistics([(torch.zeros(2, 3), [[0.0]])])  # type: ignore[list-item]
