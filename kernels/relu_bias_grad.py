"""The backward of bias and ReLU in one pass: the masked gradient and its sum per channel.

    dz_ck = grad_ck * scale where not y_ck <= 0, else 0          db_c = sum of dz_ck over everything but channels

PyTorch reads grad and y, writes dz, and then reads dz again for the sum.  Here the sum rides along: DRAM sees
two reads and one write, and partial sums of less than 2 % of that (one row of partials per 128 rows or more).
Sums are fp32, in a fixed order, over the products before they are rounded to dz's dtype.
"""

import torch
import triton
import triton.language as tl

from .geometry import dense, in_layout_of, is_channels_last
from .partial_sums import sum_partials
from .registers import DTYPES, warps

THREADS = 128
# Elements that a program handles at once: 16 per thread, two 16-byte loads of grad and of y in fp16.
TILE = 2048
# Channels of a tile in channels-last memory: one row of it is two 32-byte sectors in fp16.
BLOCK_CHANNELS = 32
# Enough programs to fill the largest GPU, few enough partial sums for one small second kernel.
MAX_PARTIALS = 512
# 8 bytes of partials per channel (written and read) for 6 bytes per element in fp16: 1 % at 128 rows.
MIN_ROWS = 128


@triton.jit
def masked(grad, y, scale):
    """grad * scale in fp32 where the ReLU passed; a NaN in y passes, as in torch's threshold_backward."""
    return tl.where(y.to(tl.float32) <= 0, 0.0, grad.to(tl.float32) * scale)


@triton.jit
def relu_bias_grad_kernel(
    grad_ptr,  # rows x channels
    y_ptr,  # the same
    dz_ptr,  # the same
    partials_ptr,  # programs per channel block x channels, fp32, or None
    rows,
    channels,
    steps,  # tiles of BLOCK_R rows per program
    scale,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Channels last.  A program walks down `steps` tiles of one channel block; neighbours share the rows."""
    blocks = tl.cdiv(channels, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    c = (tl.program_id(0) - chunk * blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first = chunk.to(tl.int64) * (steps * BLOCK_R)
    lane = tl.arange(0, BLOCK_R)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for step in range(steps):
        row = first + step * BLOCK_R + lane
        mask = (row < rows) & (c < channels)
        offset = row * channels + c
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0)
        y = tl.load(y_ptr + offset, mask=mask, other=0.0)
        dz = masked(grad, y, scale)
        tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        total += dz
    if partials_ptr is not None:
        tl.store(partials_ptr + chunk * channels + c, tl.sum(total, 0)[None, :], mask=c < channels)


@triton.jit
def relu_bias_grad_nchw_kernel(
    grad_ptr,  # (images, channels, plane)
    y_ptr,  # the same
    dz_ptr,  # the same
    partials_ptr,  # programs per channel x channels, fp32, or None
    images,
    channels,
    plane,
    steps,  # tiles of BLOCK_N images x BLOCK_P pixels per program
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Contiguous.  A program handles `steps` tiles of one channel."""
    chunk = tl.program_id(0) // channels
    channel = tl.program_id(0) - chunk * channels
    pixel_blocks = tl.cdiv(plane, BLOCK_P)
    total = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for step in range(steps):
        tile = chunk * steps + step
        image_block = tile // pixel_blocks
        image = image_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        pixel = (tile - image_block * pixel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        mask = (image < images) & (pixel < plane)
        offset = (image * channels + channel) * plane + pixel
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0)
        y = tl.load(y_ptr + offset, mask=mask, other=0.0)
        dz = masked(grad, y, scale)
        tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        total += dz
    if partials_ptr is not None:
        tl.store(partials_ptr + chunk * channels + channel, tl.sum(total))


def relu_bias_grad(grad, y, *, bias=True, scale=1.0):
    """The gradients of y = max(0, z + bias) * scale with respect to z and to bias, from y.

    dz = grad * scale where y > 0 or y is NaN (torch's rule), else 0; with `scale` = 1/(1-p) and y the output of
    `bias_relu_` this undoes dropout as well.  db = sum of dz over all dimensions but the channels, taken in fp32
    from the values before they are rounded to dz's dtype.

    y: (N, C) or (N, C, ...), fp16, bf16 or fp32, channels last or contiguous (anything else is copied to the
    nearer of the two first); grad: shape and dtype of y, any strides.

    Returns (dz, db): dz in y's shape, dtype and memory format; db fp32 [C], or None without `bias`.  Two runs
    give equal bits.  Raises ValueError for a wrong rank, shape or dtype.
    """
    if y.dim() < 2:
        raise ValueError(f"y must have 2 or more dimensions (N, C, ...), got shape {tuple(y.shape)}")
    if y.dtype not in DTYPES:
        raise ValueError(f"y must be fp16, bf16 or fp32, got {y.dtype}")
    if grad.shape != y.shape or grad.dtype != y.dtype:
        raise ValueError(
            f"grad must have the shape and dtype of y, {tuple(y.shape)} {y.dtype}, got {tuple(grad.shape)} {grad.dtype}"
        )
    y = dense(y)
    grad = in_layout_of(y, grad)
    dz = torch.empty_like(y)
    channels = y.shape[1]
    if y.numel() == 0:
        return dz, torch.zeros(channels, dtype=torch.float32, device=y.device) if bias else None

    rows = y.numel() // channels
    if is_channels_last(y):
        # a divisor of the channels needs no mask and wastes no lanes: 96 is three blocks of 32
        columns = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
        block = TILE // columns
        tiles = triton.cdiv(rows, block)
        programs = triton.cdiv(channels, columns)
    else:
        plane = rows // y.shape[0]
        columns = min(1024, triton.next_power_of_2(plane))
        block = TILE // columns
        tiles = triton.cdiv(y.shape[0], block) * triton.cdiv(plane, columns)
        programs = channels
    steps = triton.cdiv(tiles, max(1, min(tiles, MAX_PARTIALS, rows // MIN_ROWS)))
    chunks = triton.cdiv(tiles, steps)
    partials = torch.empty(chunks, channels, dtype=torch.float32, device=y.device) if bias else None
    grid = (chunks * programs,)
    if is_channels_last(y):
        relu_bias_grad_kernel[grid](
            grad, y, dz, partials, rows, channels, steps, scale,
            BLOCK_R=block, BLOCK_C=columns, num_warps=warps(THREADS),
        )  # fmt: skip
    else:
        relu_bias_grad_nchw_kernel[grid](
            grad, y, dz, partials, y.shape[0], channels, plane, steps, scale,
            BLOCK_N=block, BLOCK_P=columns, num_warps=warps(THREADS),
        )  # fmt: skip
    return dz, sum_partials(partials) if bias else None
