"""Bad input once more: on every backend, in safety_log_probs, in heads of other tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_checks import META, good, label, named

from str_kernels import safety_cross_entropy, safety_linear_cross_entropy, safety_log_probs


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="labels are read on a CPU only, by design")
def test_every_backend_makes_the_same_checks(backend: str) -> None:
    """The truth, too: else a test would pass where a user's call fails."""
    bad = [
        ({"chunk_bytes": 63}, "chunk_bytes"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"low_rank": (torch.zeros(4, 2), torch.zeros(10, 3))}, "low_rank"),
        ({"safety_ids": torch.tensor([2, 5, 2])}, "safety_ids"),
        ({"target": torch.tensor([0, 1, 10, 0])}, "target"),
    ]
    for options, name in bad:
        for more in ({}, {"reduction": "none"}, {"pack_rows": True}):
            given = {**good(safety_linear_cross_entropy), **options, **more}
            with pytest.raises(ValueError) as caught:
                safety_linear_cross_entropy(**given, backend=backend)
            assert named(caught) == name


LOG_PROBS: list[tuple[str, Any, type[Exception], str]] = [
    ("hidden", torch.zeros(4), ValueError, "hidden"),
    ("linear_weight", torch.zeros(10, 7), ValueError, "linear_weight"),
    ("linear_weight", torch.zeros(10, 6).double(), TypeError, "linear_weight"),
    ("safety_ids", [1, 2], TypeError, "safety_ids"),
    ("safety_ids", torch.tensor([[1, 2]]), ValueError, "safety_ids"),
    ("safety_ids", torch.tensor([1.0, 2.0]), TypeError, "safety_ids"),
    ("safety_ids", torch.tensor([1, 10]), ValueError, "safety_ids"),
    ("safety_ids", torch.tensor([1, -1]), ValueError, "safety_ids"),
    ("safety_ids", torch.tensor([1, 1]), ValueError, "safety_ids"),
    ("safety_ids", torch.zeros(2, dtype=torch.int64, device=META), ValueError, "safety_ids"),
    ("linear_bias", torch.zeros(9), ValueError, "linear_bias"),
    ("low_rank", (torch.zeros(4, 2), torch.zeros(10, 3)), ValueError, "low_rank"),
    ("logit_scale", 0.0, ValueError, "logit_scale"),
    ("softcap", 0.0, ValueError, "softcap"),
    ("chunk_bytes", 63, ValueError, "chunk_bytes"),
    ("backend", "cuda", ValueError, "backend"),
]


@pytest.mark.parametrize(("argument", "value", "error", "name"), LOG_PROBS, ids=label)
def test_safety_log_probs_names_a_bad_argument(argument, value, error, name) -> None:
    given = {
        "hidden": torch.zeros(4, 6),
        "linear_weight": torch.zeros(10, 6),
        "safety_ids": torch.tensor([1, 2]),
    }
    assert safety_log_probs(**given).shape == (4, 2)
    with pytest.raises(error) as caught:
        safety_log_probs(**{**given, argument: value})
    assert named(caught) == name


@pytest.fixture
def one_process() -> Iterator[Any]:
    """A process group of this process alone, for a DTensor to be placed on."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed = torch.distributed
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield distributed.device_mesh.init_device_mesh("cpu", (2,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
@pytest.mark.parametrize("placement", ["shard", "replicate"])
def test_a_sharded_head_is_refused_by_name(placement: str, one_process) -> None:
    """FSDP and tensor parallelism leave DTensors, whose shape is the whole and memory a part."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    given = good(safety_linear_cross_entropy)
    if placement == "shard":  # of rows it is taken as it is, see test_parallel
        head = DTensor.from_local(torch.zeros(10, 3), one_process, [Shard(1)])
    else:
        head = DTensor.from_local(torch.zeros(10, 6), one_process, [Replicate()])
    assert head.shape == (10, 6)
    for backend in ("auto", "torch", "eager"):
        with pytest.raises((TypeError, ValueError)) as caught:
            safety_linear_cross_entropy(**{**given, "linear_weight": head}, backend=backend)
        assert named(caught) == "linear_weight"
    bias = DTensor.from_local(torch.zeros(10), one_process, [Replicate()])
    with pytest.raises((TypeError, ValueError)) as caught:
        safety_linear_cross_entropy(**given, linear_bias=bias)
    assert named(caught) == "linear_bias"
    hidden = DTensor.from_local(torch.zeros(4, 6), one_process, [Replicate()])
    with pytest.raises((TypeError, ValueError)) as caught:
        safety_linear_cross_entropy(**{**given, "hidden": hidden})
    assert named(caught) == "hidden"
    logits = DTensor.from_local(torch.zeros(4, 10), one_process, [Replicate()])
    with pytest.raises((TypeError, ValueError)) as caught:
        safety_cross_entropy(**{**good(safety_cross_entropy), "logits": logits})
    assert named(caught) == "logits"
