"""What the integrations' tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def seed(rng: torch.Generator) -> int:
    """A seed of this test in this session, for models and batches."""
    return int(torch.randint(2**31, (), generator=rng))


@pytest.fixture(autouse=True)
def no_loader_of_another_test() -> Iterator[None]:
    """Forget accelerate's loaders: it thinks that one is in use whose trainer raised.

    At the end of such a loader every micro-step would be a step, in the next test too.
    """
    yield
    if "accelerate.state" in sys.modules:
        state: Any = sys.modules["accelerate.state"].GradientState
        state._reset_state()
