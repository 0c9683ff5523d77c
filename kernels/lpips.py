"""LPIPS (Zhang et al. 2018) around the convolutions: the distance of two feature maps, its gradient, image scaling.

With u = a / (|a| + eps), v = b / (|b| + eps), |.| over the C channels of a pixel and eps = 1e-10:

    d     = mean over pixels of sum_c w_c (u_c - v_c)^2
    g_c   = 2 w_c (u_c - v_c) * grad / pixels
    da_c  = g_c / (|a| + eps) - u_c * (sum_k u_k g_k) / |a|        0 where |a| = 0, where autograd has NaN

A program holds whole pixels, all channels of both maps, in registers.  Compulsory traffic in fp16: forward reads both
maps once, 4 bytes per element of one of them; backward reads both and the gradient that comes from the layer above,
and writes the gradient before the ReLU below, 8 bytes.  Where a max-pool lies between, its gradient is gathered in the
same pass, through the codes of geometry.py.  Sums are fp32, in a fixed order; no atomics.

Source: https://github.com/richzhang/PerceptualSimilarity, lpips/lpips.py and normalize_tensor of lpips/__init__.py.
"""

import torch
import triton
import triton.language as tl

from .geometry import channels_last, is_channels_last
from .max_pool import cell_code
from .partial_sums import sum_partials
from .registers import DTYPES, warps

EPS = tl.constexpr(1e-10)
THREADS = 128
# Elements of a tile: a 16-byte load of fp16 a thread.
TILE = 1024
# Where a max-pool's gradient is gathered: what is computed for a row, its windows, then serves two vectors.
GATHER_TILE = 2048
# A row lies in equal tiles: with 2, a thread has 16 channels of it and shares its sums with few others; 3 where padding
# would waste lanes, 192 = 3 x 64.  On a B200 one tile would be bound by instructions, 32 per element for 14.
COUNTS = (2, 3, 4, 1)
# 16 warps with 64 channels of each map a thread: beyond that values spill.
MAX_CHANNELS = 16384
IMAGE_BLOCK = 1024


def tiles_of(channels):
    """(how many, width): the equal tiles, powers of two, that cover so many channels with the least padding."""
    widths = [(count, triton.next_power_of_2(triton.cdiv(channels, count))) for count in COUNTS]
    return min(widths, key=lambda tiles: tiles[0] * tiles[1])


@triton.jit
def load_tiles(ptr, offset, c, rows, C: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr):
    """A tuple of fp32 tiles, channels c + i * BLOCK_C of some rows, 0 outside."""
    out = ()
    for i in tl.static_range(TILES):
        if (i + 1) * BLOCK_C <= C:
            mask = rows
        else:
            mask = rows & (c + i * BLOCK_C < C)
        out = out + (tl.load(ptr + (offset + i * BLOCK_C), mask=mask, other=0.0).to(tl.float32),)
    return out


@triton.jit
def weighted(x, w_ptr, c, C: tl.constexpr):
    """x times the weights of the channels c; x itself without weights."""
    if w_ptr is None:
        return x
    else:
        # a whole tile of pointers, so that it lies in registers as x does
        channel = tl.broadcast_to(c, x.shape)
        return x * tl.load(w_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)


@triton.jit
def row_products(x, y, TILES: tl.constexpr):
    """sum_c x_c y_c of each row, over all tiles."""
    total = x[0] * y[0]
    for i in tl.static_range(1, TILES):
        total += x[i] * y[i]
    return tl.sum(total, 1)[:, None]


@triton.jit
def lpips_fwd_kernel(
    a_ptr,  # (N, H, W, C)
    b_ptr,  # (others, H, W, C); image i is compared with image i % others
    w_ptr,  # [C], or None for ones
    out_ptr,  # fp32: maps (N, out_stride) if SPATIAL else partial sums (tiles, out_stride)
    pixels,
    tiles,  # programs per image
    others,
    out_stride,
    image_stride,
    first,
    scale,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
    SPATIAL: tl.constexpr,
):
    """A map goes to out[image, first + pixel], a sum times `scale` to out[tile, image * image_stride + first]."""
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) - image * tiles
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    rows = r < pixels
    offset = r * C + c
    a_image = a_ptr + image.to(tl.int64) * pixels * C
    b_image = b_ptr + (image % others).to(tl.int64) * pixels * C
    a = load_tiles(a_image, offset, c, rows, C, BLOCK_C, TILES)
    b = load_tiles(b_image, offset, c, rows, C, BLOCK_C, TILES)
    a_scale = 1.0 / (tl.sqrt(row_products(a, a, TILES)) + EPS)
    b_scale = 1.0 / (tl.sqrt(row_products(b, b, TILES)) + EPS)
    d = a[0] * a_scale - b[0] * b_scale
    total = weighted(d * d, w_ptr, c, C)
    for i in tl.static_range(1, TILES):
        d = a[i] * a_scale - b[i] * b_scale
        total += weighted(d * d, w_ptr, c + i * BLOCK_C, C)
    total = tl.sum(total, 1)
    if SPATIAL:
        pixel = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        tl.store(out_ptr + image.to(tl.int64) * out_stride + first + pixel, total, mask=pixel < pixels)
    else:
        place = tile.to(tl.int64) * out_stride + image * image_stride + first
        tl.store(out_ptr + place, tl.sum(total, 0) * scale)


@triton.jit
def lpips_bwd_kernel(
    x_ptr,  # (images, H, W, C): the maps whose gradient is asked for
    y_ptr,  # (others, H, W, C): image i is compared with image (i + shift) % others
    w_ptr,  # [C], or None for ones
    g_ptr,  # the layer's columns of (rows, g_stride), fp32: image i has row i % g_rows
    next_ptr,  # (images, H, W, C), or (images, OH, OW, C) with codes: from the layer above, or None
    codes_ptr,  # (images, OH, OW, C) int8, or None
    dx_ptr,  # as x
    pixels,
    shift,
    others,
    g_rows,
    g_stride,
    W,
    OH,
    OW,
    C: tl.constexpr,
    WINDOW: tl.constexpr,  # of the pooling: its side and its stride
    TILE: tl.constexpr,  # BLOCK_R pixels x TILES times BLOCK_C channels
    SPATIAL: tl.constexpr,
    AFTER_RELU: tl.constexpr,
):
    """(The gradient of the distance + what comes from above), with AFTER_RELU 0 where x <= 0."""
    K: tl.constexpr = WINDOW[0]
    S: tl.constexpr = WINDOW[1]
    BLOCK_R: tl.constexpr = TILE[0]
    BLOCK_C: tl.constexpr = TILE[1]
    TILES: tl.constexpr = TILE[2]
    if codes_ptr is None:
        tiles = tl.cdiv(pixels, BLOCK_R)
    else:
        tiles = S * S * tl.cdiv(tl.cdiv(pixels // W, S) * tl.cdiv(W, S), BLOCK_R)
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) - image * tiles
    lane = tl.arange(0, BLOCK_R)[:, None]
    if codes_ptr is None:
        r = tile * BLOCK_R + lane
        rows = r < pixels
    else:
        # pixels of one place in the stride: as many windows cover each of them
        top = tile % (S * S) // S
        left = tile % S
        columns = (W + S - 1) // S
        block = tile // (S * S) * BLOCK_R + lane
        down = block // columns
        across = block - down * columns
        r = (down * S + top) * W + across * S + left
        rows = (r < pixels) & (across * S + left < W)
    c = tl.arange(0, BLOCK_C)[None, :]
    offset = r * C + c
    base = image.to(tl.int64) * pixels * C
    y_image = y_ptr + ((image + shift) % others).to(tl.int64) * pixels * C
    x = load_tiles(x_ptr + base, offset, c, rows, C, BLOCK_C, TILES)
    y = load_tiles(y_image, offset, c, rows, C, BLOCK_C, TILES)
    g_row = g_ptr + (image % g_rows).to(tl.int64) * g_stride
    if SPATIAL:
        incoming = tl.load(g_row + r, mask=rows, other=0.0) * 2.0
    else:
        incoming = tl.load(g_row) * (2.0 / pixels)
    norm = tl.sqrt(row_products(x, x, TILES))
    x_scale = 1.0 / (norm + EPS)
    y_scale = 1.0 / (tl.sqrt(row_products(y, y, TILES)) + EPS)
    g = ()
    for i in tl.static_range(TILES):
        g = g + (weighted(x[i] * x_scale - y[i] * y_scale, w_ptr, c + i * BLOCK_C, C),)
    # the gradient is outer * g - along * x
    outer = incoming * x_scale
    along = row_products(x, g, TILES) * x_scale * outer / tl.where(norm == 0, 1.0, norm)
    outer = tl.where(norm == 0, 0.0, outer)
    along = tl.where(norm == 0, 0.0, along)
    for i in tl.static_range(TILES):
        total = outer * g[i] - along * x[i]
        if (i + 1) * BLOCK_C <= C:
            mask = rows
        else:
            mask = rows & (c + i * BLOCK_C < C)
        if codes_ptr is not None:
            plane = image.to(tl.int64) * OH * OW * C
            wide = (K - left + S - 1) // S
            for k in range((K - top + S - 1) // S * wide):
                oh = down - k // wide
                ow = across - k % wide
                covers = mask & (oh >= 0) & (ow >= 0) & (oh < OH) & (ow < OW)
                place = (oh * OW + ow) * C + c + i * BLOCK_C
                code = tl.load(codes_ptr + plane + place, mask=covers, other=-1)
                pooled = tl.load(next_ptr + plane + place, mask=covers, other=0.0).to(tl.float32)
                wanted = cell_code(top + k // wide * S, left + k % wide * S, K, K).to(tl.int8)
                total = tl.where(code == wanted, total + pooled, total)
        elif next_ptr is not None:
            total += tl.load(next_ptr + base + (offset + i * BLOCK_C), mask=mask, other=0.0).to(tl.float32)
        if AFTER_RELU:
            total = tl.where(x[i] <= 0, 0.0, total)
        tl.store(dx_ptr + base + (offset + i * BLOCK_C), total.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def of_channel(scale_ptr, channel, VALUE: tl.constexpr, shift_ptr=None):
    """(VALUE [+ shift]) / scale of the channel: three divisions for a program, two selections for an element."""
    values = ()
    for c in tl.static_range(3):
        value = 1.0 * VALUE
        if shift_ptr is not None:
            value += tl.load(shift_ptr + c).to(tl.float32)
        values = values + (value / tl.load(scale_ptr + c).to(tl.float32),)
    return tl.where(channel == 0, values[0], tl.where(channel == 1, values[1], values[2]))


@triton.jit
def lpips_images_kernel(
    x_ptr,  # (N, 3, H, W), or (N, H, W, 3) with X_LAST
    y_ptr,  # the same, (N, H, W, 3) with Y_LAST
    shift_ptr,  # [3], or None for a gradient
    scale_ptr,  # [3]
    pixels,
    tiles,
    FACTOR: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (FACTOR * x - (FACTOR - 1) - shift) / scale, or FACTOR * x / scale without a shift."""
    image = tl.program_id(0) // tiles
    at = (tl.program_id(0) - image * tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = at < 3 * pixels
    if Y_LAST:
        pixel = at // 3
        channel = at - pixel * 3
    else:
        channel = at // pixels
        pixel = at - channel * pixels
    if X_LAST:
        source = pixel * 3 + channel
    else:
        source = channel * pixels + pixel
    base = image.to(tl.int64) * 3 * pixels
    value = tl.load(x_ptr + base + source, mask=mask, other=0.0).to(tl.float32) * of_channel(scale_ptr, channel, FACTOR)
    if shift_ptr is not None:
        value -= of_channel(scale_ptr, channel, FACTOR - 1, shift_ptr)
    tl.store(y_ptr + base + at, value.to(y_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------- launchers
def check_maps(a, b):
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 4:
            raise ValueError(f"lpips: {name} must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"lpips: {name} must be float16, bfloat16 or float32, got {x.dtype}")
    if a.shape[1:] != b.shape[1:] or b.shape[0] not in (1, a.shape[0]):
        raise ValueError(f"lpips: the maps do not fit together: {tuple(a.shape)} and {tuple(b.shape)}")
    if a[:1].numel() >= 2**31:
        raise ValueError(f"lpips: one image must have fewer than 2**31 elements, got shape {tuple(a.shape)}")


def constants(channels, tile=TILE):
    """The constants of both kernels for so many channels.  Raises ValueError for too many."""
    if channels > MAX_CHANNELS:
        raise ValueError(f"lpips: a map may have {MAX_CHANNELS} channels at most, got {channels}")
    count, width = tiles_of(channels)
    threads = min(512, max(THREADS, count * width // 16))
    return {
        "C": channels,
        "BLOCK_R": max(1, tile // width),
        "BLOCK_C": width,
        "TILES": count,
        "num_warps": warps(threads),
    }


def lpips_fwd(pairs, shapes, spatial=False):
    """The distances of several pairs of maps, one launch each, and one or two for the sums.

    pairs: an iterable of (a, b, weight), taken one by one: maps (N, C, H, W) of the same N, where b may have one image,
    which is compared with all; the weights of the channels [C], or None for ones.  fp16, bf16, fp32; channels_last, or
    copied.  shapes: those of all a, beforehand.

    Returns fp32: (N, layers), means over the pixels; with `spatial` (N, P), the maps of all layers, each H x W, one
    behind the other.  Two runs give equal bits.  Raises ValueError where shapes or dtypes do not fit.
    """
    images, layers = shapes[0][0], len(shapes)
    pixels = [height * width for *_, height, width in shapes]
    settings = [constants(shape[1]) for shape in shapes]
    tiles = [triton.cdiv(p, setting["BLOCK_R"]) for p, setting in zip(pixels, settings, strict=True)]
    out: torch.Tensor
    for layer, (a, b, weight) in enumerate(pairs):
        check_maps(a, b)
        if a.shape != torch.Size(shapes[layer]):
            raise ValueError(f"lpips: pair {layer} has shape {tuple(a.shape)}, announced was {tuple(shapes[layer])}")
        if layer == 0 and spatial:
            out = torch.empty((images, sum(pixels)), dtype=torch.float32, device=a.device)
        elif layer == 0:
            # programs that a smaller layer has not write nothing
            make = torch.empty if len(set(tiles)) == 1 else torch.zeros
            out = make((max(tiles), images, layers), dtype=torch.float32, device=a.device)
        if a.numel():
            lpips_fwd_kernel[(images * tiles[layer],)](
                channels_last(a), channels_last(b), weight, out, pixels[layer], tiles[layer], b.shape[0],
                out[0].numel(), layers, sum(pixels[:layer]) if spatial else layer, 1.0 / pixels[layer],
                SPATIAL=spatial, **settings[layer],
            )  # fmt: skip
    return out if spatial else sum_partials(out.flatten(1)).view(images, layers)


def lpips_bwd(
    grad, x, y, weight, *, first=0, shift=0, spatial=False, above=None, codes=None, window=(1, 1), after_relu=False
):
    """The gradient of one layer's distance with respect to the maps x, and what else flows into them.

    grad: fp32 (rows, columns), rows a divisor of x's batch, as `lpips_fwd` returns it; `first` is the column of the
    layer, or with `spatial` of its first pixel.  Image i of x was compared with image (i + shift) % len(y) of y.
    above: the gradient that comes from the layer above: as x; or with `codes` (int8, of max_pool_fwd) that of a
    max-pool over x with `window` = (kernel size, stride), square and without padding.
    after_relu: the result is that before a ReLU whose output x is: 0 where x <= 0.

    Returns dx in x's shape and dtype, channels_last.  Raises ValueError where shapes or dtypes do not fit.
    """
    check_maps(x, y[:1])
    images, channels, height, width = x.shape
    dx = torch.empty((images, height, width, channels), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    if dx.numel() == 0:
        return dx
    if above is not None and codes is None and above.shape != x.shape:
        raise ValueError(f"lpips: above has shape {tuple(above.shape)}, the map {tuple(x.shape)}")
    if codes is not None and (above is None or above.shape != codes.shape or codes.shape[:2] != x.shape[:2]):
        raise ValueError(f"lpips: codes {tuple(codes.shape)} do not fit the map {tuple(x.shape)} and its gradient")
    setting = constants(channels, TILE if codes is None else GATHER_TILE)
    if codes is None:
        tiles = triton.cdiv(height * width, setting["BLOCK_R"])
    else:
        step = window[1]
        tiles = step**2 * triton.cdiv(triton.cdiv(height, step) * triton.cdiv(width, step), setting["BLOCK_R"])
    lpips_bwd_kernel[(images * tiles,)](
        channels_last(x), channels_last(y), weight, grad[:, first:],
        None if above is None else channels_last(above), None if codes is None else channels_last(codes), dx,
        height * width, shift, y.shape[0], grad.shape[0], grad.stride(0),
        width, *(codes.shape[2:] if codes is not None else (0, 0)),
        C=channels, WINDOW=tuple(window), TILE=(setting["BLOCK_R"], setting["BLOCK_C"], setting["TILES"]),
        SPATIAL=spatial, AFTER_RELU=after_relu, num_warps=setting["num_warps"],
    )  # fmt: skip
    return dx


def lpips_images(images, shift, scale, normalize, out):
    """(images - shift) / scale per channel, after 2 * images - 1 with `normalize`, into `out`, (N, 3, H, W).

    images: (N, 3, H, W), contiguous or channels_last; out: channels_last, of any dtype of the kernels.
    """
    launch_images(images, out, shift, scale, normalize)


def lpips_images_bwd(grad, scale, normalize, out):
    """The gradient of `lpips_images`: grad, (N, 3, H, W) channels_last, into `out`, contiguous or channels_last."""
    launch_images(grad, out, None, scale, normalize)


def launch_images(x, y, shift, scale, normalize):
    pixels = x.shape[2] * x.shape[3]
    tiles = triton.cdiv(3 * pixels, IMAGE_BLOCK)
    if x.numel():
        lpips_images_kernel[(x.shape[0] * tiles,)](
            x, y, shift, scale, pixels, tiles, FACTOR=2 if normalize else 1,
            X_LAST=is_channels_last(x), Y_LAST=is_channels_last(y), BLOCK=IMAGE_BLOCK, num_warps=warps(THREADS),
        )  # fmt: skip
