"""Max-pooling on PyTorch's channels_last kernel, a few images at a time, with window codes of one byte.

PyTorch's kernel for channels_last is fast (4 ms for 32 x 96 x 55 x 55 on one thread), its kernel for contiguous
tensors is not (100 ms), so contiguous images are transposed on the way.  Its int64 indices live only as long as one
block of images, in a buffer that is reused; what is kept is the code of `fastalex.kernels.geometry`.

An index and a code say the same about a window: index = window's first cell + offset of the cell, where the first
cell depends on the position only and the offset on the code only.  So one subtraction and one table turn indices
into codes, and one table and one addition turn codes into indices.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, overload

import torch
from torch import Tensor

from fastalex import cpu
from fastalex.cpu.pieces import SERIAL, scratch
from fastalex.kernels import geometry
from fastalex.kernels.geometry import dense, in_layout_of, is_channels_last, memory_format

Pair = tuple[int, int]

# max_pool2d_with_indices_backward skips this index
NO_CELL = -1


@torch.no_grad()
def max_pool_fwd(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    *,
    codes: bool = True,
    after_relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(N, C, H, W) -> the maxima (N, C, OH, OW) and, with `codes`, the int8 code of each window's maximum.

    Both in x's memory format.  Ties and NaN as in torch.nn.functional.max_pool2d.  `after_relu` promises that x is
    not negative: windows with maximum 0 then get the code that matches no cell.
    """
    x = dense(x)
    channels_last = is_channels_last(x)
    if x.numel() == 0 or (channels_last and not codes):
        y = torch.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
        return y, torch.empty_like(y, dtype=torch.int8) if codes else None

    windows = Windows(plane_of(x), kernel_size, stride, padding, dilation, ceil_mode)
    images, channels = x.shape[:2]
    y = empty_in_layout_of(x, images, channels, *windows.output_size)
    found = torch.empty_like(y, dtype=torch.int8) if codes else None
    compiled = cpu.compiled_for(x)
    # an image of one pixel is channels_last, too, and what is pooled from its padding need not be
    if compiled and dilation == (1, 1) and is_channels_last(y):
        compiled.max_pool_fwd(x, y, found, kernel_size, stride, padding, after_relu)
        return y, found
    step = images_per_block(channels * windows.output_size[0] * windows.output_size[1])
    for first in range(0, images, step):
        block = slice(first, first + step)
        windows.pool(x[block], y[block], None if found is None else found[block], after_relu)
    return y, found


@overload
def max_pool_bwd(
    grad: Tensor,
    codes: Tensor,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    bias_partials: Literal[False] = False,
) -> Tensor: ...
@overload
def max_pool_bwd(
    grad: Tensor,
    codes: Tensor,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    bias_partials: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@torch.no_grad()
def max_pool_bwd(
    grad: Tensor,
    codes: Tensor,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    bias_partials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The gradient (N, C, *input_size) of `max_pool_fwd`'s input, in grad's dtype and the codes' memory format.

    Overlapping windows are summed in fp32 (fp64 for fp64).  With `bias_partials` also the sums of the gradient over
    each image's pixels, (N, C) in that dtype: the bias gradient of a convolution below, in parts.
    """
    codes = dense(codes)
    grad = in_layout_of(codes, grad)
    images, channels = codes.shape[:2]
    dx = empty_in_layout_of(codes, images, channels, *input_size, dtype=grad.dtype)
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    partials = torch.zeros(images, channels, dtype=compute)
    if dx.numel() == 0 or codes.numel() == 0:
        dx.zero_()
        return (dx, partials) if bias_partials else dx

    compiled = cpu.compiled_for(dx, grad)
    if compiled and dilation == (1, 1) and not bias_partials:
        compiled.max_pool_bwd(grad, codes, dx, kernel_size, stride, padding)
        return dx

    windows = Windows(input_size, kernel_size, stride, padding, dilation, output_size=plane_of(codes))
    step = images_per_block(channels * input_size[0] * input_size[1])
    for first in range(0, images, step):
        block = slice(first, first + step)
        target = dx[block]
        wide = target if dx.dtype == compute else scratch_in_layout_of(target, "pool dx", compute)
        windows.scatter(grad[block], codes[block], wide)
        if wide is not target:
            target.copy_(wide)
        if bias_partials:
            torch.sum(wide, (2, 3), out=partials[block])
    return (dx, partials) if bias_partials else dx


@torch.no_grad()
def max_pool_indices(
    codes: Tensor, input_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """torch's indices h * W + w of the input plane, int64, in the codes' memory format; -1 for the code of no cell."""
    codes = dense(codes)
    indices = torch.empty_like(codes, dtype=torch.int64)
    if codes.numel():
        windows = Windows(input_size, kernel_size, stride, padding, dilation, output_size=plane_of(codes))
        windows.decode(codes, indices)
    return indices


def plane_of(x: Tensor) -> Pair:
    """Height and width."""
    return x.shape[2], x.shape[3]


def images_per_block(elements: int) -> int:
    """How many images one call of PyTorch's pooling takes: few in cache on one thread, nearly all on more.

    Unlike elementwise operations pooling is split over threads however small it is, and beside busy processes every
    split can wait for a thread that does not run: 16 x 96 x 55 x 55, forward and backward with LRN on two threads, took
    0.61 s in blocks of 2**20 elements and 0.15 s as a whole.
    """
    budget = 4 * SERIAL if torch.get_num_threads() == 1 else 2**24
    return max(1, budget // max(1, elements))


def empty_in_layout_of(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        shape,
        dtype=dtype or x.dtype,
        memory_format=memory_format(x),
    )


def scratch_in_layout_of(x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A buffer of `scratch` with the shape and the layout of the dense tensor x."""
    return scratch(name, x.numel(), dtype).as_strided(x.shape, x.stride())


def channels_last_scratch(name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    images, channels, height, width = shape
    buffer = scratch(name, images * channels * height * width, dtype)
    return buffer.view(images, height, width, channels).permute(0, 3, 1, 2)


class Windows:
    """All windows over planes of one size; `output_size`, where it is given, says what `ceil_mode` was."""

    def __init__(
        self,
        input_size: Pair,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        ceil_mode: bool = False,
        *,
        output_size: Pair | None = None,
    ) -> None:
        arguments = input_size, kernel_size, stride, padding, dilation
        if output_size is None:
            height, width = geometry.output_size(*arguments, ceil_mode)
            output_size = height, width
        else:
            # where no whole window fits, that is 0 or less
            ceil_mode = output_size != geometry.output_size(*arguments)
        self.arguments = kernel_size, stride, padding, dilation, ceil_mode
        self.output_size = output_size
        self.width = input_size[1]
        self.tables = _tables(self.width, output_size, kernel_size, stride, padding, dilation)

    def pool(self, x: Tensor, y: Tensor, codes: Tensor | None, after_relu: bool = False) -> None:
        """The maxima of some dense images x into y, and their codes in y's layout."""
        source, target, target_codes = x, y, codes
        if not is_channels_last(x):
            source = channels_last_scratch("pool x", x.shape, x.dtype).copy_(x)
        if not is_channels_last(y):
            target = channels_last_scratch("pool y", y.shape, y.dtype)
            target_codes = channels_last_scratch("pool codes", y.shape, torch.int8)
        indices = channels_last_scratch("pool indices", y.shape, torch.int64)
        torch.ops.aten.max_pool2d_with_indices.out(source, *self.arguments, out=target, indices=indices)
        if codes is not None and target_codes is not None:
            self.encode(indices, target_codes)
            if after_relu:
                # In y's dtype: a comparison that writes bools takes three times as long, a masked fill ten times.
                dead = torch.eq(target, 0, out=channels_last_scratch("pool dead", y.shape, y.dtype))
                # the dead code has every bit that a code may have
                flags = channels_last_scratch("pool flags", y.shape, torch.int8).copy_(dead)
                target_codes.bitwise_or_(flags.mul_(geometry.no_cell(*self.arguments[0])))
        if target is not y:
            y.copy_(target)
            if codes is not None and target_codes is not None:
                codes.copy_(target_codes)

    def encode(self, indices: Tensor, codes: Tensor) -> None:
        """PyTorch's indices -> codes; both channels_last."""
        tables = self.tables
        offsets = scratch("pool offsets", indices.numel(), torch.int32)
        flat = offsets.view(indices.permute(0, 2, 3, 1).shape)
        flat.copy_(indices.permute(0, 2, 3, 1))
        if tables.plane_width != self.width:
            # a plane too narrow for a window, where two cells of different rows may have one offset
            flat.add_(flat.div(self.width, rounding_mode="floor"), alpha=tables.plane_width - self.width)
        flat.sub_(tables.first_cells.unsqueeze(-1))
        torch.index_select(tables.code_of_offset, 0, offsets, out=codes.permute(0, 2, 3, 1).view(-1))

    def decode(self, codes: Tensor, indices: Tensor) -> None:
        """Codes -> PyTorch's indices; both in one layout, `NO_CELL` where the code is the dead one."""
        tables = self.tables
        if is_channels_last(codes):
            codes, indices, first_cells = (
                codes.permute(0, 2, 3, 1),
                indices.permute(0, 2, 3, 1),
                tables.narrow_first_cells.unsqueeze(-1),
            )
        else:
            first_cells = tables.narrow_first_cells
        cells = scratch("pool cells", codes.numel(), torch.int32).copy_(codes.reshape(-1))
        offsets = scratch("pool offsets", codes.numel(), torch.int32)
        torch.index_select(tables.offset_of_code, 0, cells, out=offsets)
        # The offset of the dead code is so low that no first cell brings it above -1.
        offsets.view(codes.shape).add_(first_cells).clamp_min_(NO_CELL)
        indices.copy_(offsets.view(codes.shape))

    def scatter(self, grad: Tensor, codes: Tensor, dx: Tensor) -> None:
        """dx = the gradient of the inputs of some images, in dx's dtype; grad, codes and dx in one layout."""
        if grad.dtype != dx.dtype:
            grad = scratch_in_layout_of(grad, "pool grad", dx.dtype).copy_(grad)
        indices = scratch_in_layout_of(codes, "pool indices", torch.int64)
        self.decode(codes, indices)
        # the second argument is asked for its shape and layout only
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(grad, dx, *self.arguments, indices, grad_input=dx)


class _Tables:
    """Between indices and codes.  In planes of `plane_width` columns offsets tell all cells of a window apart."""

    def __init__(
        self, width: int, output_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
    ) -> None:
        rows, columns = kernel_size
        self.plane_width = max(width, (columns - 1) * dilation[1] + 1)
        row = torch.arange(output_size[0], dtype=torch.int32)[:, None] * stride[0] - padding[0]
        column = torch.arange(output_size[1], dtype=torch.int32) * stride[1] - padding[1]
        self.first_cells = row * self.plane_width + column
        self.narrow_first_cells = row * width + column
        last = (rows - 1) * dilation[0] * self.plane_width + (columns - 1) * dilation[1]
        self.code_of_offset = torch.zeros(last + 1, dtype=torch.int8)
        self.offset_of_code = torch.full((geometry.MAX_CELLS + 1,), -(2**30), dtype=torch.int32)
        for r in range(rows):
            for c in range(columns):
                code = geometry.cell_code(r, c, rows, columns)
                self.code_of_offset[r * dilation[0] * self.plane_width + c * dilation[1]] = code
                self.offset_of_code[code] = r * dilation[0] * width + c * dilation[1]


@lru_cache(maxsize=64)
def _tables(*geometry: int | Pair) -> _Tables:
    # a table made in inference mode could not be used outside it
    with torch.inference_mode(False):
        return _Tables(*geometry)  # type: ignore[arg-type]
