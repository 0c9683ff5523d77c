"""The ways to compute relu(x @ weight.T + bias) on Triton's devices, for `fastalex.gpu.dispatch`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastalex import gpu, private
from fastalex.gpu import dispatch
from fastalex.gpu.dispatch import Candidate, Operation


def linear_bias_relu(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The library's product, then bias and ReLU in one pass over it, in place."""
    return gpu.bias_relu.bias_relu_(F.linear(rows, weight), bias)


def linear_epilogue(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Bias and ReLU in the epilogue of cublasLt's product.  It has no derivative of its own; ours needs none."""
    return private.addmm_relu(bias, rows, weight.t())


def no_epilogue(rows: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if not rows.is_cuda or not private.has_addmm_relu():
        return "needs a GPU and a PyTorch with _addmm_activation"
    return "needs a bias" if bias is None else None


# Dropout needs a pass of its own, which then does bias and ReLU as well: there is nothing to choose.
LINEAR_RELU = dispatch.register(
    Operation(
        "linear_relu",
        {
            "library": Candidate("library", linear_bias_relu, lambda *args: None),
            "cublaslt_epilogue": Candidate("cublaslt_epilogue", linear_epilogue, no_epilogue),
        },
        # the epilogue is 2 us faster per layer on an H100; whether it keeps a NaN, `tune` must see first
        lambda *args: ["library"],
        lambda rows, weight, bias: f"{weight.shape[1]} -> {weight.shape[0]}",
        "library",
    )
)
