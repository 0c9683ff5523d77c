"""A linear layer with bias and ReLU, through oneDNN's fused form where this PyTorch has it."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex.cpu.conv_relu import has_onednn_dtype


def has_fused_linear() -> bool:
    """Whether this build of PyTorch has oneDNN's fused linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.no_grad()
def linear_relu_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> Tensor:
    """max(0, x @ weight.T + bias), without the maximum if not `relu`: (N, C), (K, C) -> (N, K)."""
    if x.shape[0] == 1 and x.dtype == torch.bfloat16 and bias is not None and prefers_addmv():
        y = torch.addmv(bias, weight, x[0])[None]
    elif x.numel() and has_fused_linear() and has_onednn_dtype(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
    else:
        y = F.linear(x, weight, bias)
    return y.relu_() if relu else y


@cache
def prefers_addmv() -> bool:
    """Whether one bf16 row is better off as a matrix-vector product: where the processor has AMX.

    There oneDNN reorders the weight first, and addmv took 0.64 to 0.72 of the time (Sapphire Rapids); without AMX
    it took 1.15 times oneDNN's (Zen 4, 9216 to 4096).
    """
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()
