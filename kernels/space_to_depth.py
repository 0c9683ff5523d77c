"""Space to depth: an image becomes a smaller one whose pixels are blocks, normalised and padded on the way.

    y[n, (i * block + j) * C + c, h, w] = (x[n, c, h * block + i - top, w * block + j - left] - mean_c) / std_c

A convolution with stride `block` over x is one with stride 1 over y (`fold_weight`): conv1 of AlexNet, 3 channels and
stride 4, becomes 48 channels and stride 1, which tensor cores and 16-byte loads can use.  The pass costs what the copy
of an uint8 image to half precision costs anyway: 150 KB read and 312 KB written per image of 3x224x224.
"""

import math

import torch
import triton
import triton.language as tl

from .geometry import dense, fold_weight, is_channels_last, unfold_weight_grad
from .registers import DTYPES, pack, take, unpack, vector_width, warps

__all__ = ["fold_weight", "space_to_depth", "unfold_weight_grad"]

THREADS = 128
# A thread keeps one or more rows of a block in registers.
MAX_ROW = 64


@triton.jit
def space_to_depth_kernel(
    x_ptr,  # (N, PLANES, height, width) rows of a plane, or of a whole image whose channels lie next to each other
    y_ptr,  # (N, out_height, out_width, SQUARE * SQUARE * C)
    items,  # N * out_height * out_width * (SQUARE / ROWS)
    height,
    width,  # pieces in a row of x
    out_height,
    out_width,
    top,
    left,  # pieces in front of a row of x
    SCALE: tl.constexpr,  # C numbers
    SHIFT: tl.constexpr,  # C numbers
    C: tl.constexpr,
    PLANES: tl.constexpr,  # C, or 1 where the channels lie next to each other
    SQUARE: tl.constexpr,  # pixels a side of a block
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,  # elements loaded at once, all inside x or all outside
    VEC: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """An item is ROWS rows of one block: ROWS * SQUARE * C neighbours in y, whatever the layout of x."""
    PIECES: tl.constexpr = SQUARE * C // PLANES // PIECE
    program = tl.program_id(0)
    if LARGE:
        program = program.to(tl.int64)
    item = program * BLOCK + tl.arange(0, BLOCK)
    part = item % (SQUARE // ROWS)
    pixel = item // (SQUARE // ROWS)
    column = pixel % out_width * PIECES - left
    row = pixel // out_width % out_height * SQUARE + part * ROWS - top
    image = pixel // (out_width * out_height)

    values = ()
    for r in tl.static_range(ROWS):
        in_image = (row + r >= 0) & (row + r < height) & (item < items)
        loaded = ()  # PLANES * PIECES * PIECE values
        for plane in tl.static_range(PLANES):
            start = ((image.to(tl.int64) * PLANES + plane) * height + (row + r)) * width + column
            for piece in tl.static_range(PIECES):
                inside = in_image & (column + piece >= 0) & (column + piece < width)
                index = ((start + piece) * PIECE)[:, None] + tl.arange(0, PIECE)[None, :]
                x = unpack(tl.load(x_ptr + index, mask=inside[:, None], other=0).to(tl.float32), PIECE)
                for i in tl.static_range(PIECE):
                    # the channel is the plane, or runs with the elements of the only plane
                    value = (
                        x[i] * SCALE[plane + (piece * PIECE + i) % (C // PLANES)]
                        + SHIFT[plane + (piece * PIECE + i) % (C // PLANES)]
                    )
                    loaded = loaded + (tl.where(inside, value, 0.0),)
        for i in tl.static_range(PIECES * PIECE):
            for plane in tl.static_range(PLANES):
                values = values + (loaded[plane * PIECES * PIECE + i],)

    first = item.to(tl.int64) * (ROWS * SQUARE * C)
    for v in tl.static_range(ROWS * SQUARE * C // VEC):
        y = pack(take(values, v * VEC, (v + 1) * VEC), VEC).to(y_ptr.dtype.element_ty)
        index = (first + v * VEC)[:, None] + tl.arange(0, VEC)[None, :]
        tl.store(y_ptr + index, y, mask=(item < items)[:, None])


def space_to_depth(x, block, padding=((0, 0), (0, 0)), *, mean=None, std=None, dtype=None):
    """Blocks of block x block pixels as channels: (N, C, H, W) -> (N, block * block * C, H', W') in channels_last.

    Channel (i * block + j) * C + c holds pixel (i, j) of a block.  x: uint8, fp16, bf16 or fp32, contiguous or
    channels_last (anything else is copied first).  uint8 is divided by 255; then `mean` is subtracted and divided by
    `std` (numbers per channel; none means 0 and 1), in fp32.  padding: ((top, bottom), (left, right)) in pixels,
    zeros after the normalisation; negative numbers crop.  H + top + bottom and W + left + right must be multiples of
    block.  dtype: fp16, bf16 or fp32; by default x's, and fp16 for uint8.

    Raises ValueError for what does not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W), got shape {tuple(x.shape)}")
    if x.dtype not in (*DTYPES, torch.uint8):
        raise ValueError(f"x must be uint8, fp16, bf16 or fp32, got {x.dtype}")
    if dtype is None:
        dtype = torch.float16 if x.dtype == torch.uint8 else x.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be fp16, bf16 or fp32, got {dtype}")
    batch, channels, height, width = x.shape
    if block < 1 or block & block - 1 or not 1 <= block * channels <= MAX_ROW:
        raise ValueError(
            f"block must be a power of two with block * channels in 1..{MAX_ROW}, got {block} for {channels} channels"
        )
    (top, bottom), (left, right) = padding
    out_height, out_width = (height + top + bottom) // block, (width + left + right) // block
    if out_height < 1 or out_width < 1 or (height + top + bottom) % block or (width + left + right) % block:
        raise ValueError(
            f"padding must make height and width positive multiples of block {block}, "
            f"got {padding} for {height}x{width}"
        )
    mean = tuple(map(float, (0.0,) * channels if mean is None else mean))
    std = tuple(map(float, (1.0,) * channels if std is None else std))
    if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
        raise ValueError(f"mean and std must be {channels} numbers, std above 0, got {mean} and {std}")

    y = torch.empty(
        (batch, block * block * channels, out_height, out_width),
        dtype=dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    if y.numel() == 0:
        return y
    x = dense(x)
    planes = 1 if is_channels_last(x) else channels
    # elements in a row of memory, and in front of it
    width, left = width * channels // planes, left * channels // planes
    piece = math.gcd(width, left, block * channels // planes, 16 // x.dtype.itemsize)
    # enough rows for whole vectors: two rows of 12 channels are three vectors of 8
    vec = vector_width(dtype)
    rows = min(block, vec // math.gcd(block * channels, vec))
    items = batch * out_height * out_width * (block // rows)
    unit = 255.0 if x.dtype == torch.uint8 else 1.0
    space_to_depth_kernel[(triton.cdiv(items, THREADS),)](
        x, y, items, height, width // piece, out_height, out_width, top, left // piece,
        SCALE=tuple(1 / (unit * s) for s in std),
        SHIFT=tuple(-m / s for m, s in zip(mean, std, strict=True)),
        C=channels,
        PLANES=planes,
        SQUARE=block,
        ROWS=rows,
        PIECE=piece,
        VEC=math.gcd(rows * block * channels, vec),
        LARGE=max(x.numel(), y.numel()) >= 2**31 - 2**16,
        BLOCK=THREADS,
        num_warps=warps(THREADS),
    )  # fmt: skip
    return y
