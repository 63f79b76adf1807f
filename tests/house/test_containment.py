"""What a row that takes no part holds reaches nobody, with a cap as without; weight 0 is 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import KINDS, Case, make_case

pytestmark = pytest.mark.gpu

BACKENDS = ["eager", "torch", "triton"]
CAPS = ["none", "scale+cap"]
ROW = 4


def broken(case: Case, value: float) -> Case:
    """Break a row that has neither loss."""
    name = "hidden" if case.linear else "logits"
    leaves = {**case.leaves, name: case.leaves[name].clone()}
    leaves[name][ROW] = value
    case.target[ROW] = case.options["ignore_index"]
    case.options["safety_row_weight"][ROW] = 0.0
    return case.changed(leaves=leaves)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("transform", CAPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["logits", "linear", "linear+lora"])
def test_a_masked_row_reaches_nobody(path, backend, transform, value, rng, device) -> None:
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.01, "kind": "logprob"}
    case = make_case(
        rng, device, path=path, transform=transform, safety_rows="weights", vocab=37, **options
    )
    if case.linear:  # on a CPU the row would be left out of the products
        case = case.with_options(pack_rows=False)
    sound = broken(case, 0.5).run(backend)
    result = broken(case, value).run(backend)
    assert torch.equal(result.terms.loss, sound.terms.loss)
    for name, grad in result.grads.items():
        assert torch.equal(grad, sound.grads[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_weight_0_is_plain_cross_entropy_whatever_the_reference(
    path, backend, kind, rng, device
) -> None:
    case = make_case(rng, device, path=path, kind=kind, vocab=37)
    case = case.with_options(penalty=replace(case.options["penalty"], weight=0.0))
    plain = case.changed(ids=None, ref=None).run(backend)
    result = case.changed(ref=case.ref * torch.nan).run(backend)
    torch.testing.assert_close(result.terms.loss, plain.terms.loss)
    for name, grad in result.grads.items():
        torch.testing.assert_close(grad, plain.grads[name])
