"""Kernels run in Triton's interpreter unless the environment says otherwise; the flag is read at decoration."""

import os
import signal

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# Tests send Ctrl-C to themselves and their children, and a job in the background of a script starts with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
