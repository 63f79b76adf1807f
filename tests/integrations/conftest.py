"""What the integrations' tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def seed(rng: torch.Generator) -> int:
    """A seed of this test in this session, for models and batches."""
    return int(torch.randint(2**31, (), generator=rng))
