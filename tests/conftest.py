"""What the tests share, beside the small chain of all stages and the helpers of test_common.py."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_common import chain, toy  # noqa: fixtures; before torch, whose threads it settles

import torch


@pytest.fixture(scope="session")
def real_data():
    """A folder of real videos (videos/), lists (splits/) and a part of UCF101 (ucf101/)."""
    if "TIMEBALANCE_TEST_DATA" not in os.environ:
        pytest.skip("TIMEBALANCE_TEST_DATA is not set")
    return Path(os.environ["TIMEBALANCE_TEST_DATA"])


@pytest.fixture(scope="session")
def real_clips(real_data):
    return sorted(path for path in (real_data / "videos").iterdir()
                  if path.suffix in (".avi", ".mp4"))


@pytest.fixture
def float64():
    """In float32 the order of a sum can turn a ReLU on or off."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
