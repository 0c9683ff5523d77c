"""What kernels, the CPU's code and operators agree on: memory layouts, output sizes, windows, codes of their cells.

Needs no Triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Pair = tuple[int, int]

# ------------------------------------------------------------------------------------------------- memory layouts
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which `dense(x)` is packed, and an operator's output with it.

    Kernels and fake tensors must agree on it, also where sizes of 1 leave both: those count as contiguous.
    """
    if x.dim() in _CHANNELS_LAST and not x.is_contiguous() and _channels_are_innermost(x):
        return _CHANNELS_LAST[x.dim()]
    return torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether memory is packed with the channels (dimension 1) innermost.  One channel counts as contiguous."""
    return x.dim() > 1 and x.shape[1] > 1 and x.movedim(1, -1).is_contiguous()


def is_packed(x: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order of the dimensions."""
    size = 1
    for stride, length in sorted((stride, n) for stride, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != size:
            return False
        size *= length
    return True


def lies_like(x: Tensor, like: Tensor) -> bool:
    """Whether the elements of both tensors, of which the second is packed, have the same places in memory."""
    if x.shape != like.shape:
        return False
    return x.stride() == like.stride() or all(
        a == b for a, b, n in zip(x.stride(), like.stride(), x.shape, strict=True) if n > 1
    )


def refuse_shared_memory(written: Mapping[str, Tensor]) -> None:
    """Raises ValueError if two of these packed tensors, by their names, lie in the same memory."""
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, name) for name, x in written.items())
    for (_, end, name), (start, _, other) in pairwise(span for span in spans if span[0] < span[1] and span[0]):
        if start < end:
            raise ValueError(f"{name} and {other} share memory: updating one would change the other")


def dense(x: Tensor) -> Tensor:
    """What every kernel, Triton's and the CPU's, may be given: x if it is packed, channels last or contiguous;
    otherwise (sliced, transposed, expanded) a packed copy in the nearer layout.

    The operators bring all their tensors here, weights, biases and gradients too.  Nearer: channels last if no
    dimension of more than one element has a smaller stride than the channels.  Dimensions of one element, whose
    strides mean nothing, have those of packed memory: PyTorch's own convolutions look at them.
    """
    if x.is_contiguous():
        return _with_strides(x)
    if is_channels_last(x):
        if 1 not in x.shape:
            return x
        return _with_strides(x.movedim(1, -1)).movedim(-1, 1)
    if _channels_are_innermost(x):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def _with_strides(x: Tensor) -> Tensor:
    """A contiguous x, with the strides that a new tensor of its shape has."""
    if 1 not in x.shape:
        return x
    strides, size = [], 1
    for length in reversed(x.shape):
        strides.append(size)
        size *= max(1, length)
    strides.reverse()
    return x if x.stride() == tuple(strides) else x.as_strided(x.shape, strides)


def _channels_are_innermost(x: Tensor) -> bool:
    # where everything behind the channels has one element both layouts are one, which counts as contiguous
    if x.dim() < 3 or x.shape[1] <= 1 or x.shape[2:].numel() == 1:
        return False
    # an expanded dimension (stride 0) says nothing about the layout
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and stride > 0]
    return x.stride(1) == min(strides, default=0)


def channels_last(x: Tensor) -> Tensor:
    """x packed with the channels innermost, also where sizes of 1 let PyTorch think so of any memory."""
    return x if x.movedim(1, -1).is_contiguous() else x.movedim(1, -1).contiguous().movedim(-1, 1)


def in_layout_of(x: Tensor, t: Tensor) -> Tensor:
    """t in the layout of the dense tensor x: t itself, or a copy."""
    return channels_last(t) if is_channels_last(x) else t.contiguous()


# --------------------------------------------------------------------------------------------------------- windows
def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int | Pair] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[int, ...]:
    """How many windows fit along each dimension, 0 or less if none: the output size of a convolution or a pooling.

    padding: of both sides, or (before, after).  With ceil_mode also those that reach over the end and start inside the
    input or the padding before it.
    """
    found = []
    for length, cells, step, pads, spread in zip(size, kernel_size, stride, padding, dilation, strict=True):
        before, after = pads if isinstance(pads, tuple) else (pads, pads)
        reach = length + before + after - spread * (cells - 1) - 1
        windows = -(-reach // step) + 1 if ceil_mode else reach // step + 1
        if ceil_mode and (windows - 1) * step >= length + before:
            windows -= 1
        found.append(windows)
    return tuple(found)


@dataclass(frozen=True)
class Window:
    """Kernel size, stride, padding and dilation, (height, width) each, checked."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def __post_init__(self):
        rows, columns = self.kernel_size
        for name, smallest in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            if min(value) < smallest:
                raise ValueError(f"max_pool: {name} must be at least {smallest} in both dimensions, got {value}")
        if rows * columns > MAX_CELLS:
            raise ValueError(
                f"max_pool: kernel_size {self.kernel_size} has {rows * columns} cells, one-byte codes reach {MAX_CELLS}"
            )
        if 2 * self.padding[0] > rows or 2 * self.padding[1] > columns:
            raise ValueError(
                f"max_pool: padding must be at most half of kernel_size {self.kernel_size}, got {self.padding}"
            )

    @property
    def flat(self) -> tuple[int, ...]:
        """Rows, columns, then stride, padding and dilation, height and width each: the kernels' WINDOW."""
        return (*self.kernel_size, *self.stride, *self.padding, *self.dilation)

    @property
    def is_3x3_stride_2(self) -> bool:
        return self == Window((3, 3), (2, 2), (0, 0), (1, 1))

    def inside(self, size: Pair, out: Pair) -> bool:
        """Whether no window reaches over the border: no padding, and no partial window from ceil_mode."""
        ends = (
            (o - 1) * s + d * (k - 1)
            for o, s, d, k in zip(out, self.stride, self.dilation, self.kernel_size, strict=True)
        )
        return self.padding == (0, 0) and all(end < length for end, length in zip(ends, size, strict=True))

    def output_size(self, size: Pair, ceil_mode: bool) -> Pair:
        """(OH, OW) of a map of this size.  Raises ValueError where no window fits."""
        out = self.windows(size, ceil_mode)
        if min(out) < 1:
            raise ValueError(
                f"max_pool: no window fits: input size {size}, kernel_size {self.kernel_size}, "
                f"padding {self.padding}, dilation {self.dilation} give output size {out}"
            )
        return out

    def windows(self, size: Pair, ceil_mode: bool) -> Pair:
        """`output_size`, 0 or less where none fits."""
        oh, ow = output_size(size, self.kernel_size, self.stride, self.padding, self.dilation, ceil_mode)
        return oh, ow


# ---------------------------------------------------------------------------------------------------- window codes
# Which cell of a pooling window held the maximum, in one byte.
#
# Forward pooling writes one code per output element (0.24 bytes per input element for 3x3 windows with stride 2, where
# int64 indices cost 1.9) and backward reads it.  Every backend writes the same codes.
#
# Small windows (rows + columns <= 6: 3x3, 2x2, 3x2, 1x5, ...) use two inverted one-hot fields, the row in the high bits
# and the column in the low bits, earlier cells in higher bits.  Backward then tests four packed codes without unpacking
# them: cell (r, s) is the maximum where `code & one_hot(r, s) == 0`.  Before the inversion an earlier cell has the
# larger number, so the integer maximum of (value, one_hot) pairs resolves ties as PyTorch does, in favour of the first
# cell in row-major order.
#
# Larger windows, up to 127 cells, use the row-major number of the cell.
#
# `no_cell(window)` is the code of an output that receives no gradient.  It is written where a pooled ReLU output is 0.
MAX_CELLS = 127


def is_one_hot(rows: int, columns: int) -> bool:
    """Whether windows of this size use the inverted one-hot form."""
    return rows + columns <= 6


def one_hot(row: int, column: int, rows: int, columns: int) -> int:
    """The two bits of cell (row, column), before inversion."""
    return 1 << (columns + rows - 1 - row) | 1 << (columns - 1 - column)


def no_cell(rows: int, columns: int) -> int:
    """The code that matches no cell."""
    return (1 << rows + columns) - 1 if is_one_hot(rows, columns) else MAX_CELLS


def cell_code(row: int, column: int, rows: int, columns: int) -> int:
    """The byte stored for cell (row, column) of a window of rows x columns cells."""
    if is_one_hot(rows, columns):
        return no_cell(rows, columns) ^ one_hot(row, column, rows, columns)
    return row * columns + column


# ------------------------------------------------------------------------------------------------- space to depth
def fold_weight(weight: Tensor, block: int) -> Tensor:
    """The weight that does to `space_to_depth(x, block)` with stride 1 what `weight` does to x with stride `block`.

    (K, C, R, S) -> (K, block * block * C, ceil(R / block), ceil(S / block)), channels_last; the rows and columns that
    R and S lack to multiples of block are zeros.  Differentiable.  The image must be padded so that its blocks cover
    the windows: (OH + ceil(R / block) - 1) * block rows.
    """
    rows, columns = weight.shape[2:]
    padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(3, (-1, block)).unflatten(2, (-1, block))  # (K, C, R', i, S', j)
    folded = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3)  # (K, R', S', (i, j, C))
    return folded.contiguous().permute(0, 3, 1, 2)


def unfold_weight_grad(grad: Tensor, kernel_size: tuple[int, int], block: int) -> Tensor:
    """The gradient of `weight` from that of `fold_weight(weight, block)`: drops what stands for the added zeros.

    (K, block * block * C, R', S') -> (K, C, R, S), contiguous, with (R, S) = kernel_size.
    """
    blocks = grad.unflatten(1, (block, block, -1))  # (K, i, j, C, R', S')
    whole = blocks.permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
    return whole[:, :, : kernel_size[0], : kernel_size[1]].contiguous()
