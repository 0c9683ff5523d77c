"""A linear layer with bias and ReLU: oneDNN's product with bias where this PyTorch has it, and the ReLU in place.

oneDNN's operator is private to PyTorch, so it is looked for and never required.  It reads bias and weight as packed
memory, whatever their strides say, and its own ReLU makes 0 of NaN.

Under autocast the parameters come in fp32 and are narrowed here, in a buffer that is reused, and their gradient is
widened here, while it is in cache.  Copies of fc6 as tensors of their own cost more in page faults than in arithmetic:
75 MB were converted in 43 ms instead of 8, the gradient made in 115 to 119 ms instead of 76 to 82 (Zen 4, 32 rows).
"""

from __future__ import annotations

import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import private
from fastalex.kernels.geometry import dense

# Of one product of `weight_grad`.
BLOCK_ELEMENTS = 2**20
# Larger buffers are not kept between calls.  The weight of AlexNet's fc6 takes 72 MiB in half precision.
KEEP_BYTES = 80 * 2**20

_local = threading.local()


@torch.no_grad()
def linear_relu_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> Tensor:
    """max(0, x @ weight.T + bias), without the maximum if not `relu`: (N, C), (K, C) -> (N, K), in x's dtype."""
    weight = narrowed(weight, x.dtype)
    bias = None if bias is None else dense(bias.to(x.dtype))
    if x.shape[0] == 1 and x.dtype == torch.bfloat16 and bias is not None and prefers_addmv():
        y = torch.addmv(bias, weight, x[0])[None]
    elif x.numel() and private.has_onednn_linear() and private.onednn_computes_in(x.dtype):
        y = private.onednn_linear(dense(x), dense(weight), bias)
    else:
        y = F.linear(x, weight, bias)
    return y.relu_() if relu else y


@torch.no_grad()
def narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight itself where it has this dtype, else its values in a buffer that the next call overwrites."""
    if weight.dtype == dtype:
        return weight
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < weight.numel():
        # a buffer made in inference mode could not be written outside it
        with torch.inference_mode(False):
            buffer = torch.empty(weight.numel(), dtype=dtype)
        if buffer.nbytes <= KEEP_BYTES:
            _local.buffer = buffer
    return buffer[: weight.numel()].view(weight.shape).copy_(weight)


@torch.no_grad()
def weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad.T @ x: (N, K), (N, C) -> (K, C); in another dtype than theirs by blocks of rows."""
    if dtype == grad.dtype:
        return grad.t() @ x
    result = torch.empty(grad.shape[1], x.shape[1], dtype=dtype)
    rows = max(1, BLOCK_ELEMENTS // max(1, x.shape[1]))
    for part, block in zip(grad.split(rows, 1), result.split(rows), strict=True):
        block.copy_(part.t() @ x)
    return result


@cache
def prefers_addmv() -> bool:
    """Whether one bf16 row is better off as a matrix-vector product: where the processor has AMX.

    There oneDNN reorders the weight first, and addmv took 0.64 to 0.72 of the time (Sapphire Rapids); without AMX
    it took 1.15 times oneDNN's (Zen 4, 9216 to 4096).
    """
    return private.has_amx()
