"""The seam: modes, refusals and their messages."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from fastalex import backend
from fastalex import functional as F


def test_unknown_mode():
    with pytest.raises(ValueError, match="one of auto, triton, reference, got 'cuda'"), backend.use("cuda"):
        pass


def test_use_restores_the_mode_after_an_error():
    def fail():
        assert backend.current() == "reference"
        raise KeyError

    with pytest.raises(KeyError), backend.use("reference"):
        fail()
    assert backend.current() == "auto"


def test_environment_variable():
    code = "from fastalex import backend; print(backend.current())"
    environment = {**os.environ, "FASTALEX_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "reference"


def test_triton_mode_says_why_it_cannot_run():
    """Compiled kernels need a driver for the tensor's device; without the interpreter a CPU tensor has none."""
    code = (
        "import torch; from fastalex import backend, functional as F\n"
        "with backend.use('triton'): F.local_response_norm(torch.ones(1, 8, 2, 2), 5)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "fastalex.local_response_norm: the Triton kernel cannot run: Triton's active driver is" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


def test_triton_mode_refuses_float64():
    x = torch.ones(1, 8, 4, 4, dtype=torch.float64)
    with backend.use("triton"), pytest.raises(RuntimeError, match="float32, float16 and bfloat16, not float64"):
        F.local_response_norm(x, 5)


def test_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert backend.refusal(torch.ones(1)) == "the triton package is not installed"
    with backend.use("triton"), pytest.raises(RuntimeError, match="triton package is not installed"):
        F.local_response_norm(torch.ones(1, 8, 4, 4), 5)


def test_fallback_is_logged_once(monkeypatch, caplog):
    """As a CUDA tensor sees it where Triton is missing."""
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    backend._log_once.cache_clear()

    class OnGPU:
        device = torch.device("cuda")

    with caplog.at_level(logging.WARNING, "fastalex"):
        assert backend.takes_reference("max_pool2d", OnGPU())
        assert backend.takes_reference("max_pool2d", OnGPU())
    assert [r.getMessage() for r in caplog.records] == [
        "fastalex.max_pool2d takes the reference path: the triton package is not installed"
    ]
