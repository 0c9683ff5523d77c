"""Every test of this folder runs with the loops that numba compiles and with the PyTorch operations."""

import importlib.util

import pytest

from fastalex import cpu


@pytest.fixture(autouse=True, params=["compiled", "pytorch"])
def kernels(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(cpu, "compiled_for", lambda *tensors: None)
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("needs numba")
    return request.param
