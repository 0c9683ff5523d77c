"""Local response normalisation across channels.

    y_c = x_c / s_c ** beta,    s_c = k + alpha / size * sum of x_j ** 2 over j in [c - size//2, c + (size-1)//2]

The backward pass recomputes s from x, the only tensor saved:

    dx_c = g_c / s_c ** beta - 2 alpha beta / size * x_c * sum of g_j x_j / s_j ** (beta + 1)

over the j whose window holds c, which is the mirrored window.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalex import cpu
from fastalex.cpu import formulas
from fastalex.kernels.geometry import dense, in_layout_of, is_channels_last

# Elements of a run of pixels of all channels, where a channel is a plane.
RUN = 32768


@torch.no_grad()
def lrn_fwd(x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int = 1) -> Tensor:
    """y as above: (N, C, *) -> (N, C, *) in x's dtype and memory format; fp64 in fp64, others computed in fp32."""
    x = dense(x)
    loops = cpu.compiled_loops()
    if x.dtype == torch.float16 and loops is not None:
        return lrn_fwd(x.float(), size, alpha, beta, k, groups).half()
    y = torch.empty_like(x)
    if loops is None:
        return y.copy_(formulas.lrn(x, size, alpha, beta, k, groups))
    _run(loops, (loops.lrn_kernel, loops.lrn_planes_kernel), (x, y), size, alpha, beta, k, groups)
    return y


@torch.no_grad()
def lrn_bwd(grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int = 1) -> Tensor:
    """dx as above, from the gradient of y and the input x of `lrn_fwd`; shape, dtype and memory format of x."""
    x = dense(x)
    loops = cpu.compiled_loops()
    if x.dtype == torch.float16 and loops is not None:
        return lrn_bwd(grad.float(), x.float(), size, alpha, beta, k, groups).half()
    grad = in_layout_of(x, grad)
    dx = torch.empty_like(x)
    if loops is None:
        return dx.copy_(formulas.lrn_backward(grad, x, size, alpha, beta, k, groups))
    kernels = loops.lrn_backward_kernel, loops.lrn_planes_backward_kernel
    _run(loops, kernels, (grad, x, dx), size, alpha, beta, k, groups)
    return dx


def _run(
    loops: ModuleType,
    kernels: tuple[Any, Any],
    tensors: tuple[Tensor, ...],
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
) -> None:
    """The first of the kernels over tensors in channels_last, the second over contiguous ones."""
    x = tensors[-1]
    if x.numel() == 0:
        return
    images, channels = x.shape[0] * groups, x.shape[1] // groups
    pixels = x.numel() // (images * channels)
    numbers = numbers_of(x, size, alpha, beta, k)
    if is_channels_last(x):
        arrays = [loops.array(t).reshape(-1, channels) for t in tensors]
        loops.share(kernels[0], images * pixels, x.numel(), *arrays, norm_of(size, channels), numbers)
    else:
        arrays = [loops.array(t).reshape(images, channels, pixels) for t in tensors]
        step = min(pixels, max(32, RUN // channels // 32 * 32))
        rows = images * -(-pixels // step)
        loops.share(kernels[1], rows, x.numel(), *arrays, norm_of(size, channels, step), numbers)


def norm_of(size: int, channels: int, step: int = 1) -> tuple[int, int, int]:
    """Channels of a window below its own, channels of a window, and how many elements apart they are.

    Beyond the other end of the group there is nothing to add.
    """
    below, above = min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)
    return below, below + 1 + above, step


def numbers_of(x: Tensor, size: int, alpha: float, beta: float, k: float) -> np.ndarray:
    """What the formulas above multiply and add, in the dtype in which x is computed."""
    dtype = np.float64 if x.dtype == torch.float64 else np.float32
    return np.array([alpha / size, k, beta, -2 * alpha * beta / size], dtype)
