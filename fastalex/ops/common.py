"""What every operator needs: its memory format, its kernels, and a plain refusal of double backward."""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalex import backend
from fastalex.kernels.layout import memory_format


def dense(input: Tensor) -> Tensor:
    """The input itself where its memory is packed in its format, else a packed copy (sliced and expanded tensors)."""
    return input.contiguous(memory_format=memory_format(input))


def empty(like: Tensor, shape: tuple[int, ...] | list[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of this shape in the memory format of `like`."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(like))


def implementation(name: str, operation: str, input: Tensor) -> ModuleType:
    """The module whose functions do the work for this tensor: fastalex.kernels.<name> or fastalex.cpu.<name>."""
    room = "kernels" if backend.takes_triton(operation, input) else "cpu"
    return importlib.import_module(f"fastalex.{room}.{name}")


def device_of(input: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches on the current device, whatever its arguments say."""
    return torch.cuda.device(input.device) if input.is_cuda else contextlib.nullcontext()


def refuse_double_backward(backward_op: Any, operation: str) -> None:
    """Registers a backward for a backward operator that raises a message instead of leaving zero gradients."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"fastalex.{operation} has no second derivative; for double backward run it under "
            'fastalex.backend.use("reference")'
        )

    backward_op.register_autograd(backward)
