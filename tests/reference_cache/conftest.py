"""What the tests of reference caches share."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from cache_faults import build


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache that was built without interruption, and is not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    build(folder)
    return folder


@pytest.fixture
def cache(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "cache")


@pytest.fixture
def draw(rng):
    return random.Random(int(torch.randint(2**31, (), generator=rng)))
