"""Convolution, bias and ReLU: PyTorch's convolution, and the ReLU in place over what it returned.

oneDNN can apply the ReLU while it writes the sums, but its ReLU makes 0 of NaN, where a diverged model has to show.
The pass over the output costs nothing that could be measured in a model: with oneDNN's ReLU AlexNet's inference took
0.98 to 1.02 of the time (Zen 4, one thread, 1 and 32 pictures, float32 and bfloat16).  Nor do weights that are kept in
oneDNN's layout between calls bring anything (0.95 to 1.03), and they could not be known to be those of the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex.kernels.geometry import fold_weight

Sizes = list[int] | tuple[int, ...]


@torch.no_grad()
def conv_relu_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> Tensor:
    """max(0, conv2d(x, weight) + bias): (N, C, H, W), (K, C/groups, R, S) -> (N, K, OH, OW).  NaN stays NaN."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu_()


@torch.no_grad()
def conv_input_grad(grad: Tensor, weight: Tensor, size: Sequence[int], stride: int, padding: int) -> Tensor:
    """The gradient (N, C, *size) of a convolution's input, channels_last; stride and padding hold in both directions.

    A strided convolution is one with stride 1 on blocks of pixels, whose gradient takes oneDNN a third of the time: for
    AlexNet's conv1 and 4 pictures of 256 x 256, on one thread of a Zen 4, 11 ms instead of 37.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    height, width = size
    if stride == 1:
        return _input_grad(grad, weight, (height, width), padding)
    folded = fold_weight(weight, stride)
    rows, columns = (g + k - 1 for g, k in zip(grad.shape[2:], folded.shape[2:], strict=True))
    blocks = (
        _input_grad(grad, folded, (rows, columns), 0).movedim(1, -1).unflatten(3, (stride, stride, weight.shape[1]))
    )
    pixels = blocks.transpose(2, 3).reshape(grad.shape[0], rows * stride, columns * stride, weight.shape[1])
    # no window reaches what lies behind the last block
    behind = max(0, padding + height - rows * stride), max(0, padding + width - columns * stride)
    pixels = F.pad(pixels, (0, 0, 0, behind[1], 0, behind[0]))
    return pixels[:, padding : padding + height, padding : padding + width].contiguous().movedim(-1, 1)


def _input_grad(grad: Tensor, weight: Tensor, size: tuple[int, int], padding: int) -> Tensor:
    """With stride 1; grad is channels_last."""
    last = torch.channels_last
    input = torch.empty((grad.shape[0], weight.shape[1], *size), dtype=grad.dtype, memory_format=last)  # not read
    geometry = ([1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False])
    found = torch.ops.aten.convolution_backward(grad, input, weight, None, *geometry)[0]
    return found.contiguous(memory_format=last)
