"""3x3 convolution with bias and ReLU as Winograd's F(2x2, 3x3): 16 products for 4 outputs where there were 36.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1:

    Y = At [(G w Gt) * (Bt x B)] A,    * elementwise, summed over the channels: 16 matrix products

in strips of tiles that stay in cache.  The transforms of inputs and outputs are additions only, and the sums behind an
output are nine times shorter: on 256 channels the error is a quarter of the direct convolution's.  As in every such
method, an infinity in the input makes NaN of up to four outputs around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalex import cpu

# Rows of each matrix product.  With 49 products are slower, with 400 the transformed tiles leave the cache.
TILES = 98
# Below, the products are too small to gain what the transforms cost.
MIN_CHANNELS = 96


def suits(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> bool:
    """Whether the convolution is of this kind and is faster this way: on one thread, and with numba."""
    return (
        tuple(weight.shape[2:]) == (3, 3)
        and stride == padding == dilation == (1, 1)
        and x.dtype == weight.dtype == torch.float32
        and min(weight.shape[0] // groups, weight.shape[1]) >= MIN_CHANNELS
        and torch.get_num_threads() == 1
        and cpu.compiled_for(x) is not None
    )


def transformed(weight: Tensor, groups: int) -> Tensor:
    """G w Gt, (K, C/groups, 3, 3) -> (16 * groups, C/groups, K/groups), computed in float64."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    tiles = torch.einsum("ar,gkcrs,bs->abgck", g, weight.double().unflatten(0, (groups, -1)), g)
    return tiles.float().flatten(0, 2).contiguous()


def conv_relu_fwd(x: Tensor, matrices: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """max(0, conv2d(x, weight, padding=1) + bias) in channels_last, as x is, from the `transformed` weight."""
    compiled = cpu.compiled_for(x)
    assert compiled is not None  # as `suits` found
    images, _, height, width = x.shape
    inside, outputs = matrices.shape[1:]
    y = torch.empty((images, groups * outputs, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    bias = x.new_zeros(y.shape[1]) if bias is None else bias.contiguous()
    across = (width + 1) // 2
    rows = images * ((height + 1) // 2)
    step = min(rows, -(-TILES // across))
    tiles = torch.empty((16 * groups, step * across, inside), dtype=x.dtype)
    products = torch.empty((16 * groups, step * across, outputs), dtype=x.dtype)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        used = slice(0, (stop - start) * across)
        compiled.winograd_tiles(start, stop, x, tiles, groups)
        torch.bmm(tiles[:, used], matrices, out=products[:, used])
        compiled.winograd_output(start, stop, products, bias, y, groups)
    return y
