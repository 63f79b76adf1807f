"""pack_rows: rows with neither loss are left out of the products, or computed and masked."""

from __future__ import annotations

import pytest
import torch
from cases import EXTRAS, PATHS, ROW_WEIGHTS, Case, assert_same, make_case
from tolerance import assert_matches_truth

from str_kernels.op import chunks

pytestmark = pytest.mark.gpu

BACKENDS = ["eager", "torch", "triton"]
OURS = ["torch", "triton"]
IGNORED = -100


def sparse(rng, device, path: str = "linear+lora", **options) -> Case:
    """Of 12 rows, 4 have a loss: by the target, by the penalty alone, or by both."""
    case = make_case(rng, device, path=path, rows=12, **ROW_WEIGHTS, **options)
    case = case.changed(target=case.target.clamp(min=0))
    case.target[[1, 3, 4, 6, 7, 9, 10]] = IGNORED
    case.options["safety_row_weight"][:] = 0.0
    case.options["safety_row_weight"][[0, 4]] = torch.tensor([0.5, 2.0], device=device)
    case.options["ce_row_weight"][[0, 2, 8]] = 1.0
    case.options["ce_row_weight"][[5, 11]] = 0.0  # kept, and of no weight
    return case


TAKEN = [0, 2, 4, 8]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("backend", "kind", "path"),
    [
        *(("torch", kind, path) for kind in ("mse", "logprob") for path in PATHS[1:]),
        ("triton", "logprob", "linear+lora"),
    ],
)
def test_packed_rows_are_the_masked_ones(backend, reduction, kind, path, rng, device) -> None:
    """In the same chunks of one row the very same; in others by the rule."""
    case = sparse(rng, device, path, reduction=reduction, kind=kind, vocab=37, **EXTRAS)
    one_row = case.with_options(chunk_bytes=48 * 4)
    for chunked in (one_row, case.with_options(chunk_bytes=3 * 48 * 4), case):
        packed, masked, default = (
            chunked.with_options(pack_rows=pack).run(backend) for pack in (True, False, None)
        )
        for result in (packed, masked):
            assert_matches_truth(chunked, result, backend)
            others = [i for i in range(12) if i not in TAKEN]
            assert not result.grads["hidden"][others].any()
        like_default = packed if device.type == "cpu" else masked
        assert torch.equal(default.terms.loss, like_default.terms.loss)
        if chunked is not one_row:
            continue
        for mine, wanted in zip(packed.terms, masked.terms, strict=True):
            if reduction == "none":  # a sum over rows may be ordered otherwise
                assert torch.equal(mine, wanted)
        assert torch.equal(packed.grads["hidden"], masked.grads["hidden"])


@pytest.mark.parametrize("pack_rows", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_rows_with_a_loss_are_multiplied(pack_rows, reduction, rng, device, monkeypatch):
    """Row steps see 4 rows in forward, and with "none" 4 more in backward; else all 12."""
    seen = []
    original = chunks.row_step_of

    def spying(name: str):
        def row_step(logits, *args, **kwargs):
            seen.append(len(logits))
            return original(name)(logits, *args, **kwargs)

        return row_step

    monkeypatch.setattr(chunks, "row_step_of", spying)
    sparse(rng, device, reduction=reduction, pack_rows=pack_rows).run("torch")
    assert sum(seen) == (4 if pack_rows else 12) * (2 if reduction == "none" else 1)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("pack_rows", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_dropped_rows_may_hold_anything(backend, pack_rows, reduction, poison, rng, device) -> None:
    case = sparse(rng, device, reduction=reduction, pack_rows=pack_rows)
    clean = case.run(backend)
    leaves = case.leaves
    hidden, t, ref = (x.clone() for x in (leaves["hidden"], leaves["low_rank_t"], case.ref))
    others = torch.ones(12, dtype=torch.bool, device=device)
    others[TAKEN] = False
    for x in (hidden, t, ref):
        x[others] = poison
    spoilt = case.with_leaves(hidden=hidden, low_rank_t=t).changed(ref=ref).run(backend)
    assert_same(spoilt, clean)
    assert not spoilt.grads["hidden"][others].any()
    assert not spoilt.grads["low_rank_t"][others].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pack_rows", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_row_is_dropped(backend, pack_rows, reduction, rng, device) -> None:
    case = sparse(rng, device, reduction=reduction, pack_rows=pack_rows, metrics=True)
    case.target[:] = IGNORED
    case.options["safety_row_weight"][:] = 0.0
    result = case.run(backend)
    assert not any(bool(x.any()) for x in result.terms)
    for name, grad in result.grads.items():
        assert grad.shape == case.leaves[name].shape and not grad.any(), name
