"""Kernels run in Triton's interpreter unless the environment says otherwise; the flag is read at decoration."""

import os
import signal
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# --device
pytest_plugins = ["on_device"]

# Tests send Ctrl-C to themselves and their children, and a job in the background of a script starts with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


# A source distribution holds the kernels once, in the package.
KERNELS = Path(__file__).parents[1] / "kernels"
if not KERNELS.exists():
    KERNELS.symlink_to("fastalex/kernels")


def pytest_configure(config):
    # after the flag above: an import of Triton decorates functions
    from fastalex.inspection import interpreter

    interpreter.mend()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
