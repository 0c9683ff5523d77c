"""Kernels run in Triton's interpreter unless the environment says otherwise; the flag is read at decoration."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
