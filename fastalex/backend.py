"""Which implementation runs: the one seam between the functions and the kernels.

``auto`` (the default)
    CUDA tensors take the Triton kernels, CPU tensors `fastalex.cpu`; whatever the kernels refuse (float64 on CUDA,
    other devices, no Triton installed) takes `fastalex.reference`, and each reason is logged once.
``triton``
    The Triton kernels run, on any device, or a `RuntimeError` says why not.  CPU tensors need Triton's interpreter
    (``TRITON_INTERPRET=1`` before the first import of a kernel).
``reference``
    The formulas of `fastalex.reference`, differentiated by autograd.  `torch.onnx.export` sees these in every mode.

The environment variable ``FASTALEX_BACKEND`` sets the mode of a process; `use` changes it for a while.  The mode is
process-wide, not per thread, because autograd runs CUDA backward passes in threads of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["auto", "triton", "reference"]
MODES: tuple[Mode, ...] = get_args(Mode)
HAS_TRITON = importlib.util.find_spec("triton") is not None

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_log = logging.getLogger("fastalex")


def _checked(mode: str) -> Mode:
    for known in MODES:
        if mode == known:
            return known
    raise ValueError(f"backend must be one of {', '.join(MODES)}, got {mode!r}")


_mode = _checked(os.environ.get("FASTALEX_BACKEND", "auto"))


def current() -> Mode:
    """The mode in force: "auto", "triton" or "reference"."""
    return _mode


@contextlib.contextmanager
def use(mode: Mode) -> Iterator[None]:
    """Run the block in the given mode.  Raises ValueError for a mode that does not exist."""
    global _mode
    before, _mode = _mode, _checked(mode)
    try:
        yield
    finally:
        _mode = before


def refusal(tensor: Tensor) -> str | None:
    """Why the Triton kernels cannot run on this tensor here, or None if they can."""
    if not HAS_TRITON:
        return "the triton package is not installed"
    if tensor.is_floating_point() and tensor.dtype not in KERNEL_DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.is_cuda:
        return None
    return _cannot_launch_on(tensor.device.type)


@functools.cache
def _cannot_launch_on(device_type: str) -> str | None:
    import triton

    if triton.knobs.runtime.interpret:
        return None
    try:
        active = triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError as error:
        active = f"none ({error})"
    if active == device_type:
        return None
    return (
        f"Triton's active driver is {active} and the tensor is on {device_type}; "
        "set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
    )


def takes_reference(operation: str, tensor: Tensor) -> bool:
    """Whether a call of `operation` on this tensor takes `fastalex.reference` instead of an operator."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():  # ONNX knows nothing of our operators
        return True
    if _mode == "auto":
        if tensor.device.type == "cpu" or tensor.device.type == "meta":
            return False
        reason = refusal(tensor)
        if reason is not None:
            _log_once(operation, reason)
        return reason is not None
    return _mode == "reference"


def takes_triton(operation: str, tensor: Tensor) -> bool:
    """Whether the operator runs its Triton kernel (True) or its CPU kernel (False) on this tensor.

    Raises RuntimeError where the mode, or the device, leaves no choice but Triton and Triton cannot run.
    """
    if tensor.device.type == "cpu" and _mode != "triton":
        return False
    reason = refusal(tensor)
    if reason is not None:
        raise RuntimeError(f"fastalex.{operation}: the Triton kernel cannot run: {reason}")
    return True


@functools.cache
def _log_once(operation: str, reason: str) -> None:
    _log.warning("fastalex.%s takes the reference path: %s", operation, reason)
