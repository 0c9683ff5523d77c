"""Every test of this folder runs with the loops that numba compiles and with the formulas that stand in for them."""

import importlib.util

import pytest

from fastalex import cpu


@pytest.fixture(autouse=True, params=["loops", "formulas"])
def kernels(request, monkeypatch):
    if request.param == "formulas":
        monkeypatch.setattr(cpu, "compiled_loops", lambda: None)
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("needs numba")
    return request.param
