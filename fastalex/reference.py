"""The operations, written from their formulas in plain PyTorch.

Any floating dtype (computed in that dtype; use float64 as the truth), any device, any memory format,
differentiable by autograd to any order, no Triton.  Tests compare every kernel with this file, and
`FASTALEX_BACKEND=reference` runs whole models on it.  Shapes are as in `torch.nn.functional`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex.kernels.geometry import Pair, output_size

IntOrPair = int | Sequence[int]


def pair(value: IntOrPair, name: str = "value") -> tuple[int, int]:
    """(height, width) from what torch.nn.functional takes: an int for both, [int], or [height, width]; NumPy's too."""
    if isinstance(value, int | torch.SymInt):
        return value, value  # type: ignore[return-value]
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    values = tuple(v if isinstance(v, int | torch.SymInt) else operator.index(v) for v in values)
    if len(values) not in (1, 2):
        raise ValueError(f"{name} must be an int or two ints, got {value!r}")
    return values[0], values[-1]


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """max(0, conv2d(input, weight) + bias): (N, C, H, W) -> (N, K, OH, OW)."""
    return torch.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    groups: int = 1,
) -> Tensor:
    """y_c = x_c / (k + alpha/size * sum of x_j^2 over the window of c) ** beta, j inside the channel group of c.

    The window of channel c is [c - size//2, c + (size-1)//2], cut off at the group's ends (which equals
    padding with zeros).  This is PyTorch's and Caffe's convention, alpha/size; the 2012 paper prints a sum
    without the division, which is alpha * size here.

    Source: Krizhevsky et al. 2012, section 3.3; torch.nn.functional.local_response_norm.
    """
    if torch.onnx.is_in_onnx_export() and size % 2:  # an even window of ONNX's is longer above, not below
        return _onnx_response_norm(input, size, alpha, beta, k, groups)
    channels = input.shape[1]
    grouped = input.unflatten(1, (groups, channels // groups))
    below, above = size // 2, (size - 1) // 2
    # The window runs over the channels, which must be last for F.pad, and padded ends add nothing to a sum.
    squares = F.pad(grouped.square().movedim(2, -1), (below, above))
    sums = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 2)
    return (grouped / (k + alpha / size * sums) ** beta).flatten(1, 2)


def _onnx_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    """ONNX's LRN, the same formula as one node of its graph (https://onnx.ai/onnx/operators/onnx__LRN.html)."""
    grouped = input.unflatten(1, (groups, -1)).flatten(0, 1)
    attributes: dict[str, Any] = {"size": size, "alpha": float(alpha), "beta": float(beta), "bias": float(k)}
    output = torch.onnx.ops.symbolic("LRN", (grouped,), attributes, dtype=input.dtype, shape=grouped.shape)
    return output.reshape(input.shape)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the operators add up tensors of this dtype: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_vectors(x: Tensor) -> Tensor:
    """x over the norm of its channels plus 1e-10; zero, and without a gradient, where all of them are zero."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * torch.where(norm == 0, 0, 1 / (norm + 1e-10))


def feature_distance(a: Tensor, b: Tensor, weight: Tensor | None = None, *, spatial: bool = False) -> Tensor:
    """sum_c w_c (a_c / (|a| + eps) - b_c / (|b| + eps))^2, |.| over the channels, eps = 1e-10.

    (N, C, H, W) each, b's batch N or 1, [C] or None for ones -> the mean over the pixels (N,), or with `spatial` the
    map (N, H, W).  A pixel whose channels are all zero has no direction: its gradient is zero.

    Source: Zhang et al. 2018 (LPIPS), equation 1; `normalize_tensor` of the lpips package.
    """
    squares = (unit_vectors(a) - unit_vectors(b)).square()
    if weight is not None:
        squares = squares * weight.view(1, -1, 1, 1)
    distance = squares.sum(1)
    return distance if spatial else distance.mean((1, 2))


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum of each window: (N, C, H, W) -> (N, C, OH, OW), or the same without N.

    Padding counts as minus infinity; the first maximum in row-major order wins, the last NaN beats everything;
    indices are h * W + w of the input plane.  All as in torch.nn.functional.max_pool2d.
    """
    if input.dim() == 3:
        out = max_pool2d(input[None], kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return (out[0][0], out[1][0]) if isinstance(out, tuple) else out[0]
    if torch.onnx.is_in_onnx_export():
        pool: Any = F.max_pool2d_with_indices if return_indices else F.max_pool2d
        return pool(input, kernel_size, stride, padding, dilation, ceil_mode)
    window, step = pair(kernel_size), pair(kernel_size if stride is None else stride)
    output, _, indices = pooled_cells(input, window, step, pair(padding), pair(dilation), ceil_mode)
    return (output, indices) if return_indices else output


def pooled_cells(
    input: Tensor, window: Pair, step: Pair, border: Pair, spread: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`max_pool2d` of (N, C, H, W); which cell of its window, in row-major order, each maximum is; and its index."""
    height, width = input.shape[2:]
    out_h, out_w = output_size((height, width), window, step, border, spread, ceil_mode)
    (rows, columns), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = window, step, border, spread

    # Windows as rows of a (cells, OH, OW) index: where each cell lies in the padded plane.
    index_h = stride_h * torch.arange(out_h)[:, None] + dilation_h * torch.arange(rows) - pad_h
    index_w = stride_w * torch.arange(out_w)[:, None] + dilation_w * torch.arange(columns) - pad_w
    inside = ((index_h >= 0) & (index_h < height))[:, None, :, None] & ((index_w >= 0) & (index_w < width))[
        None, :, None, :
    ]
    index = index_h.clamp(0, height - 1)[:, None, :, None] * width + index_w.clamp(0, width - 1)[None, :, None, :]
    inside = inside.flatten(2).to(input.device)
    index = index.flatten(2).to(input.device)

    cells = input.flatten(2)[:, :, index].masked_fill(~inside, -torch.inf)
    with torch.no_grad():
        # first maximum: argmax on a mask; any NaN beats every number, and the last NaN of a window counts
        nan = cells.isnan()
        maximum = cells.masked_fill(nan, -torch.inf).amax(-1, keepdim=True)
        first = ((cells == maximum) & inside).to(torch.uint8).argmax(-1, keepdim=True)
        last_nan = index.shape[-1] - 1 - nan.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
        cell = torch.where(nan.any(-1, keepdim=True), last_nan, first)
    indices = index.expand(cells.shape).gather(-1, cell)
    return cells.gather(-1, cell).squeeze(-1), cell.squeeze(-1), indices.squeeze(-1)


def lrn_max_pool2d(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    kernel_size: IntOrPair = 3,
    stride: IntOrPair | None = 2,
    *,
    groups: int = 1,
) -> Tensor:
    """max_pool2d(local_response_norm(input)): (N, C, H, W) -> (N, C, OH, OW)."""
    normalised = local_response_norm(input, size, alpha, beta, k, groups=groups)
    output = max_pool2d(normalised, kernel_size, stride)
    assert isinstance(output, Tensor)
    return output


def linear_relu_dropout(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, p: float = 0.5, training: bool = True
) -> Tensor:
    """dropout(max(0, input @ weight.T + bias), p): (..., C) -> (..., K), kept values scaled by 1 / (1 - p)."""
    return F.dropout(torch.relu(F.linear(input, weight, bias)), p, training)
