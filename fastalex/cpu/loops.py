"""LRN, max-pooling and the distances of LPIPS as loops that numba compiles, for each dtype when it is first met.

PyTorch would run a chain of ten operations over memory; here a row of channels goes through the chain in registers and
L1.  Kernels see a tensor's memory as arrays: channels innermost, or, those with `planes` in their names, a plane per
channel.  bfloat16 comes as uint16, because numpy has no such type, and is computed in float32; float16 has to come as
float32.  `start` and `stop` bound the rows of the output that a call makes, so that threads can share them.

One file, because numba's cache on disk notices changes of the file that a kernel is in and of no other: nothing that a
kernel inlines, and no constant that it reads, may come from elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload, register_jitable
from torch import Tensor

# error_model: a division by zero gives infinity, without a branch that would keep loops from being vectorised
compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
inlined = register_jitable(error_model="numpy")
# sums in an order that vectors of the processor can take; the same in every run
compiled_sums = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})

# Elements that one stage of a chain makes before the next reads them.  With fewer, loads at a shift of one channel meet
# stores that have not left the store buffer, and wait: LRN forward in rows of 96 takes 1.6 times as long.
STRIP = 2048
# Elements below which a second thread costs more than it brings.
SERIAL = 2**17
# Ranges per thread: one that is held up leaves its share to the others.
RANGES = 4
LPIPS_EPS = np.float32(1e-10)


# --------------------------------------------------------------------------------------------------- for the kernels
def widen(value: Any) -> Any:
    """An element of an array as float32; of float64 itself."""
    raise NotImplementedError


def narrow(value: Any, like: Any) -> Any:
    """A float32, or float64, as an element of the array `like`; to bfloat16 rounded to nearest, ties to even."""
    raise NotImplementedError


def workspace(shape: Any, like: Any) -> Any:
    """An array of what `widen` makes of elements of the array `like`, not initialised."""
    raise NotImplementedError


@overload(widen)
def _widen(value):  # type: ignore[no-untyped-def]
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@overload(narrow)
def _narrow(value, like):  # type: ignore[no-untyped-def]
    if like.dtype == types.uint16:

        def to_bfloat16(value, like):  # type: ignore[no-untyped-def]
            bits = np.float32(value).view(np.uint32)
            up = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            # rounding up would carry a NaN into infinity or past it
            return np.uint16(up if value == value else np.uint32(0x7FC0))

        return to_bfloat16
    return lambda value, like: value


@overload(workspace)
def _workspace(shape, like):  # type: ignore[no-untyped-def]
    dtype = np.float64 if like.dtype == types.float64 else np.float32
    return lambda shape, like: np.empty(shape, dtype)


# Loops run over slices, not at offsets: numba would test every index at an offset for being negative.  It also copies
# slices in ways that are not vectorised.
@inlined
def load(source, target):  # type: ignore[no-untyped-def]
    """Into an array of what `widen` makes."""
    for i in range(source.size):
        target[i] = widen(source[i])


@inlined
def load_every(source, first, step, target, begin, count):  # type: ignore[no-untyped-def]
    """target[begin + i] = source[first + i * step] for i < count; without signs, which would be tested."""
    first, step, begin = np.uintp(first), np.uintp(step), np.uintp(begin)
    for i in range(np.uintp(max(0, count))):
        target[begin + i] = widen(source[first + i * step])


@inlined
def store(source, target):  # type: ignore[no-untyped-def]
    """Into an array of any type."""
    for i in range(source.size):
        target[i] = narrow(source[i], target)


@inlined
def window_sums(terms, width, step, scale, k, sums):  # type: ignore[no-untyped-def]
    """sums[r, i] = k + scale * (terms[r, i] + terms[r, i + step] + ... + terms[r, i + (width - 1) * step])"""
    rows, length = sums.shape
    for r in range(rows):
        row, out = terms[r], sums[r]
        if width == 5 and step == 1:
            for i in range(length):
                out[i] = k + scale * (((row[i] + row[i + 1]) + (row[i + 2] + row[i + 3])) + row[i + 4])
        else:
            for i in range(length):
                out[i] = row[i]
            for j in range(1, width):
                shifted = row[j * step : j * step + length]
                for i in range(length):
                    out[i] += shifted[i]
            for i in range(length):
                out[i] = k + scale * out[i]


@inlined
def bases(x, norm, numbers, squares, base):  # type: ignore[no-untyped-def]
    """What is raised to the power beta, for some rows of channels.

    norm: channels of a window below its own, channels of a window, how many elements apart they are.
    numbers: alpha / size, k, beta and -2 alpha beta / size.  The borders of `squares` are zeros.
    """
    below, width, step = norm
    rows, length = x.shape
    for r in range(rows):
        source, target = x[r], squares[r, below * step : below * step + length]
        for i in range(length):
            value = widen(source[i])
            target[i] = value * value
    window_sums(squares[:rows], width, step, numbers[0], numbers[1], base[:rows])


@inlined
def normalise(x, norm, numbers, squares, base, y):  # type: ignore[no-untyped-def]
    """Some rows of channels, from x to y."""
    bases(x, norm, numbers, squares, base)
    # flat: in a loop over one row of 96 channels a third of the roots would be taken four at a time
    flat_x, flat_base, flat_y = x.reshape(-1), base.reshape(-1), y.reshape(-1)
    beta = numbers[2]
    if beta == 0.75:
        for i in range(x.size):
            root = np.sqrt(flat_base[i])
            flat_y[i] = narrow(widen(flat_x[i]) / (root * np.sqrt(root)), y)
    else:
        for i in range(x.size):
            flat_y[i] = narrow(widen(flat_x[i]) / flat_base[i] ** beta, y)


@inlined
def normalise_backward(grad, x, norm, numbers, squares, base, terms, dx, after_relu):  # type: ignore[no-untyped-def]
    """The gradient of some rows; `grad`, as wide as `base`, is overwritten.

    after_relu: 0 where x is, even beside NaN.  The borders of `terms` are zeros.
    """
    bases(x, norm, numbers, squares, base)
    flat_grad, flat_x, flat_base, flat_dx = grad.reshape(-1), x.reshape(-1), base.reshape(-1), dx.reshape(-1)
    beta = numbers[2]
    if beta == 0.75:
        for i in range(x.size):
            root = np.sqrt(flat_base[i])
            flat_grad[i] /= root * np.sqrt(root)
            flat_base[i] = widen(flat_x[i]) / flat_base[i] * flat_grad[i]
    else:
        for i in range(x.size):
            flat_grad[i] /= flat_base[i] ** beta
            flat_base[i] = widen(flat_x[i]) / flat_base[i] * flat_grad[i]
    rows, length = x.shape
    below, width, step = norm
    above = (width - 1 - below) * step
    for r in range(rows):
        load(base[r], terms[r, above : above + length])
    # the 0 is a constant: as a number of the array it costs 6 % of the whole
    window_sums(terms[:rows], width, step, numbers[3], np.float32(0), base[:rows])
    for i in range(x.size):
        value = widen(flat_x[i])
        total = flat_grad[i] + value * flat_base[i]
        flat_dx[i] = narrow(np.float32(0) if after_relu & (value <= 0) else total, dx)


@inlined
def inside(first, step, cells, size):  # type: ignore[no-untyped-def]
    """Which cells (begin, end) of a window lie in [0, size): the first is at `first`, the others `step` apart.

    Where none does, as dilation and padding can have it, begin is the first that is not negative, as in torch.
    """
    return max(0, -(first // step)), min(cells, (size - 1 - first) // step + 1)


@inlined
def larger(value, code, best, found):  # type: ignore[no-untyped-def]
    """The maximum and its code: the first of equal numbers, but the last NaN."""
    wins = (value > best) | (value != value)
    return value if wins else best, code if wins else found


@inlined
def pool_window(source, first, places, step, rows, columns, table, dead, best, found):  # type: ignore[no-untyped-def]
    """The maxima over the cells of one window, and their codes.

    Cell (r, s) with rows[0] <= r < rows[1] and columns likewise lies at first + places[r] + s * step.
    """
    size, begin = best.size, True
    for r in range(rows[0], rows[1]):
        for s in range(columns[0], columns[1]):
            offset, code = first + places[r] + s * step, table[r, s]
            cell = source[offset : offset + size]
            if begin:
                begin = False
                for i in range(size):
                    best[i], found[i] = widen(cell[i]), code
            else:
                for i in range(size):
                    best[i], found[i] = larger(widen(cell[i]), code, best[i], found[i])
    if begin:
        for i in range(size):
            best[i], found[i] = -np.inf, table[rows[0], columns[0]]
    if dead:
        for i in range(size):
            found[i] = dead if best[i] == 0 else found[i]


@inlined
def gather(grad, codes, image, h, w, channels, output, window, table, total):  # type: ignore[no-untyped-def]
    """total = the gradients of the windows whose maximum input (h, w) is."""
    kernel, stride, padding, dilation = window
    for c in range(channels):
        total[c] = 0
    for r in range(kernel[0]):
        oh, rest = divmod(h + padding[0] - r * dilation[0], stride[0])
        if rest != 0 or oh < 0 or oh >= output[0]:
            continue
        for s in range(kernel[1]):
            ow, rest = divmod(w + padding[1] - s * dilation[1], stride[1])
            if rest != 0 or ow < 0 or ow >= output[1]:
                continue
            offset = ((image * output[0] + oh) * output[1] + ow) * channels
            part, part_codes, code = grad[offset : offset + channels], codes[offset : offset + channels], table[r, s]
            for c in range(channels):
                value = widen(part[c])
                total[c] += value if part_codes[c] == code else np.float32(0)


# ------------------------------------------------------------------------------------ the kernels, channels innermost
@compiled
def lrn_kernel(start, stop, x, y, norm, numbers):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    strip = max(1, STRIP // channels)
    squares, base = np.zeros((strip, channels + norm[1] - 1), numbers.dtype), np.empty((strip, channels), numbers.dtype)
    for a in range(start, stop, strip):
        b = min(a + strip, stop)
        normalise(x[a:b], norm, numbers, squares, base, y[a:b])


@compiled
def lrn_backward_kernel(start, stop, grad, x, dx, norm, numbers):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    strip = max(1, STRIP // channels)
    squares, base = np.zeros((strip, channels + norm[1] - 1), numbers.dtype), np.empty((strip, channels), numbers.dtype)
    terms, wide = np.zeros_like(squares), np.empty((strip, channels), numbers.dtype)
    for a in range(start, stop, strip):
        b = min(a + strip, stop)
        load(grad[a:b].reshape(-1), wide.reshape(-1))
        normalise_backward(wide, x[a:b], norm, numbers, squares, base, terms, dx[a:b], False)


@compiled
def max_pool_kernel(start, stop, x, y, codes, plane, output, channels, window, table, dead):  # type: ignore[no-untyped-def]
    kernel, stride, padding, dilation = window
    best, found = workspace(channels, x), np.empty(channels, np.int32)
    places = np.arange(kernel[0]) * (dilation[0] * plane[1] * channels)
    for row in range(start, stop):
        image, oh = divmod(row, output[0])
        top = oh * stride[0] - padding[0]
        rows = inside(top, dilation[0], kernel[0], plane[0])
        for ow in range(output[1]):
            left = ow * stride[1] - padding[1]
            columns = inside(left, dilation[1], kernel[1], plane[1])
            first = ((image * plane[0] + top) * plane[1] + left) * channels
            pool_window(x, first, places, dilation[1] * channels, rows, columns, table, dead, best, found)
            offset = (row * output[1] + ow) * channels
            store(best, y[offset : offset + channels])
            if codes.size > 0:
                store(found, codes[offset : offset + channels])


@compiled
def max_pool_backward_kernel(start, stop, grad, codes, dx, plane, output, channels, window, table):  # type: ignore[no-untyped-def]
    total = workspace(channels, grad)
    for row in range(start, stop):
        image, h = divmod(row, plane[0])
        for w in range(plane[1]):
            gather(grad, codes, image, h, w, channels, output, window, table, total)
            offset = (row * plane[1] + w) * channels
            store(total, dx[offset : offset + channels])


@compiled
def lrn_max_pool_kernel(  # type: ignore[no-untyped-def]
    start, stop, x, y, codes, plane, output, channels, groups, norm, numbers, kernel, stride, table, dead
):
    """Normalised rows, rounded to x's dtype, live in a ring as long as windows need them."""
    inner, width = channels // groups, plane[1] * groups
    strip = max(1, STRIP // inner)
    squares, base = np.zeros((strip, inner + norm[1] - 1), numbers.dtype), np.empty((strip, inner), numbers.dtype)
    best, found = workspace(channels, x), np.empty(channels, np.int32)
    ring = np.empty((kernel[0] * width, inner), x.dtype)
    places = np.empty(kernel[0], np.int64)
    for row in range(start, stop):
        image, oh = divmod(row, output[0])
        top = oh * stride[0]
        known = 0 if row == start or oh == 0 else max(0, kernel[0] - stride[0])
        for r in range(kernel[0]):
            places[r] = (top + r) % kernel[0] * width * inner
        for h in range(top + known, top + kernel[0]):
            source, target = (image * plane[0] + h) * width, h % kernel[0] * width
            for a in range(0, width, strip):
                b = min(a + strip, width)
                rows = x[source + a : source + b]
                normalise(rows, norm, numbers, squares, base, ring[target + a : target + b])
        for ow in range(output[1]):
            first = ow * stride[1] * channels
            pool_window(ring.ravel(), first, places, channels, (0, kernel[0]), (0, kernel[1]), table, dead, best, found)
            offset = (row * output[1] + ow) * channels
            store(best, y[offset : offset + channels])
            if codes.size > 0:
                store(found, codes[offset : offset + channels])


@compiled
def lrn_max_pool_backward_kernel(  # type: ignore[no-untyped-def]
    start, stop, grad, codes, x, dx, plane, output, channels, groups, norm, numbers, window, table, after_relu
):
    inner = channels // groups
    strip = max(1, STRIP // channels)
    squares = np.zeros((strip * groups, inner + norm[1] - 1), numbers.dtype)
    base, terms = np.empty((strip * groups, inner), numbers.dtype), np.zeros_like(squares)
    total = np.empty((strip, channels), numbers.dtype)
    for row in range(start, stop):
        image, h = divmod(row, plane[0])
        for first in range(0, plane[1], strip):
            last = min(first + strip, plane[1])
            for w in range(first, last):
                gather(grad, codes, image, h, w, channels, output, window, table, total[w - first])
            a, b = (row * plane[1] + first) * groups, (row * plane[1] + last) * groups
            wide = total.reshape(strip * groups, inner)[: b - a]
            normalise_backward(wide, x[a:b], norm, numbers, squares, base, terms, dx[a:b], after_relu)


@compiled_sums
def lpips_kernel(start, stop, a, b, weight, out, pixels, others):  # type: ignore[no-untyped-def]
    """out[row] = sum_c weight_c (a_c / (|a| + eps) - b_c / (|b| + eps))^2; image i of a with image i % others of b."""
    channels = a.shape[1]
    for row in range(start, stop):
        image = row // pixels
        x, y = a[row], b[row + (image % others - image) * pixels]
        xx, yy = np.float32(0), np.float32(0)
        for c in range(channels):
            left, right = widen(x[c]), widen(y[c])
            xx += left * left
            yy += right * right
        x_scale = np.float32(1) / (np.sqrt(xx) + LPIPS_EPS)
        y_scale = np.float32(1) / (np.sqrt(yy) + LPIPS_EPS)
        total = np.float32(0)
        for c in range(channels):
            d = widen(x[c]) * x_scale - widen(y[c]) * y_scale
            total += weight[c] * d * d
        out[row] = total


@compiled_sums
def lpips_backward_kernel(  # type: ignore[no-untyped-def]
    start, stop, x, y, weight, grad, above, codes, dx, plane, output, link, mode, window, table, after_relu
):
    """The gradient of x, as kernels/lpips.py has it.  grad: (rows, 1) or (rows, pixels), twice what comes in.

    link: (shift, others); image i was compared with image (i + shift) % others.  mode: what `above` is: 0 nothing, 1
    the gradient of x itself, 2 that of a max-pool over x.
    """
    channels, pixels = x.shape[1], plane[0] * plane[1]
    pooled = workspace(channels, x)
    for row in range(start, stop):
        image, pixel = divmod(row, pixels)
        left, right, out = x[row], y[(image + link[0]) % link[1] * pixels + pixel], dx[row]
        xx, yy = np.float32(0), np.float32(0)
        for c in range(channels):
            a, b = widen(left[c]), widen(right[c])
            xx += a * a
            yy += b * b
        norm = np.sqrt(xx)
        x_scale = np.float32(1) / (norm + LPIPS_EPS)
        y_scale = np.float32(1) / (np.sqrt(yy) + LPIPS_EPS)
        incoming = grad[image % grad.shape[0], pixel % grad.shape[1]]
        along = np.float32(0)
        for c in range(channels):
            a = widen(left[c])
            along += a * (weight[c] * (a * x_scale - widen(right[c]) * y_scale))
        inner = incoming * x_scale
        along = incoming * along * x_scale * x_scale / norm
        if norm == 0:
            inner, along = np.float32(0), np.float32(0)
        if mode == 2:
            h, w = divmod(pixel, plane[1])
            gather(above, codes, image, h, w, channels, output, window, table, pooled)
        elif mode == 1:
            load(above[row * channels : (row + 1) * channels], pooled)
        else:
            pooled[:] = 0
        for c in range(channels):
            a = widen(left[c])
            total = inner * (weight[c] * (a * x_scale - widen(right[c]) * y_scale)) - a * along + pooled[c]
            out[c] = narrow(np.float32(0) if after_relu & (a <= 0) else total, dx)


# ----------------------------------------------------------------------------------- the kernels, a plane per channel
# LRN copies a run of as many pixels as the window's channels are elements apart, of all channels.
@compiled
def lrn_planes_kernel(start, stop, x, y, norm, numbers):  # type: ignore[no-untyped-def]
    (_, channels, pixels), (_, width, step) = x.shape, norm
    runs = -(-pixels // step)
    squares, wide = (
        np.zeros((1, (channels + width - 1) * step), numbers.dtype),
        np.zeros((channels, step), numbers.dtype),
    )
    base, out = np.empty((1, channels * step), numbers.dtype), np.empty((channels, step), numbers.dtype)
    for item in range(start, stop):
        image, run = divmod(item, runs)
        a, b = run * step, min(run * step + step, pixels)
        for c in range(channels):
            load(x[image, c, a:b], wide[c])
        normalise(wide.reshape(1, -1), norm, numbers, squares, base, out)
        for c in range(channels):
            store(out[c, : b - a], y[image, c, a:b])


@compiled
def lrn_planes_backward_kernel(start, stop, grad, x, dx, norm, numbers):  # type: ignore[no-untyped-def]
    (_, channels, pixels), (_, width, step) = x.shape, norm
    runs = -(-pixels // step)
    squares, wide = (
        np.zeros((1, (channels + width - 1) * step), numbers.dtype),
        np.zeros((channels, step), numbers.dtype),
    )
    terms, wide_grad = np.zeros_like(squares), np.zeros_like(wide)
    base, out = np.empty((1, channels * step), numbers.dtype), np.empty((channels, step), numbers.dtype)
    for item in range(start, stop):
        image, run = divmod(item, runs)
        a, b = run * step, min(run * step + step, pixels)
        for c in range(channels):
            load(x[image, c, a:b], wide[c])
            load(grad[image, c, a:b], wide_grad[c])
        normalise_backward(wide_grad, wide.reshape(1, -1), norm, numbers, squares, base, terms, out, False)
        for c in range(channels):
            store(out[c, : b - a], dx[image, c, a:b])


@compiled
def max_pool_planes_kernel(start, stop, x, y, codes, window, table, dead):  # type: ignore[no-untyped-def]
    """Cell (r, s) of the windows of some rows of the output is made an array of its own, with -inf for padding."""
    kernel, stride, padding, dilation = window
    (_, height, width), (_, out_height, out_width) = x.shape, y.shape
    block = min(out_height, max(1, STRIP // (8 * out_width)))
    cells = workspace((kernel[0], kernel[1], block, out_width), x)
    cells[:] = -np.inf
    flat_x, flat_cells = x.reshape(-1), cells.reshape(-1)
    best, found = workspace((block, out_width), x), np.empty((block, out_width), np.int32)
    places, whole = np.arange(kernel[0]) * (kernel[1] * best.size), ((0, kernel[0]), (0, kernel[1]))
    for image in range(start, stop):
        for first in range(0, out_height, block):
            last = min(first + block, out_height)
            for r in range(kernel[0]):
                for s in range(kernel[1]):
                    left = s * dilation[1] - padding[1]
                    begin, end = inside(left, stride[1], out_width, width)
                    left += begin * stride[1]
                    for oh in range(first, last):
                        h = oh * stride[0] - padding[0] + r * dilation[0]
                        if 0 <= h < height:
                            pixel = (image * height + h) * width + left
                            cell = ((r * kernel[1] + s) * block + oh - first) * out_width + begin
                            load_every(flat_x, pixel, stride[1], flat_cells, cell, end - begin)
                        else:
                            cells[r, s, oh - first] = -np.inf
            pool_window(flat_cells, 0, places, best.size, *whole, table, dead, best.ravel(), found.ravel())
            for oh in range(first, last):
                if padding[0] + padding[1] > 0:
                    # the code of a window without numbers is that of the first cell that is not padding
                    row = inside(oh * stride[0] - padding[0], dilation[0], kernel[0], height)[0]
                    for ow in range(out_width):
                        if best[oh - first, ow] == -np.inf:
                            left = ow * stride[1] - padding[1]
                            found[oh - first, ow] = table[row, inside(left, dilation[1], kernel[1], width)[0]]
                store(best[oh - first], y[image, oh])
                if codes.size > 0:
                    store(found[oh - first], codes[image, oh])


@compiled
def max_pool_planes_backward_kernel(start, stop, grad, codes, dx, window, table):  # type: ignore[no-untyped-def]
    kernel, stride, padding, dilation = window
    _, height, width = dx.shape
    total = workspace((height, width), dx)
    # where a code's cell lies in a window; far outside for the code of no cell
    row_of, column_of = np.full(128, -(2**40)), np.zeros(128, np.int64)
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            row_of[table[r, s]], column_of[table[r, s]] = r * dilation[0], s * dilation[1]
    for image in range(start, stop):
        total[:] = 0
        for oh in range(grad.shape[1]):
            for ow in range(grad.shape[2]):
                code = codes[image, oh, ow]
                h = oh * stride[0] - padding[0] + row_of[code]
                w = ow * stride[1] - padding[1] + column_of[code]
                if 0 <= h < height and 0 <= w < width:
                    total[h, w] += widen(grad[image, oh, ow])
        for h in range(height):
            store(total[h], dx[image, h])


# ------------------------------------------------------------------------------------------------------ from PyTorch
def array(x: Tensor) -> np.ndarray:
    """The memory of a dense tensor, in its order."""
    flat = x.detach().as_strided((x.numel(),), (1,))
    return flat.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else flat.numpy()


def share(kernel: Callable[..., None], rows: int, elements: int, *args: Any) -> None:
    """kernel(start, stop, *args) over all rows, on as many threads as PyTorch may use.

    The threads take the next range when they are done with one, so a busy core delays a range and not the whole.
    """
    threads = torch.get_num_threads() if elements >= SERIAL else 1
    if threads == 1:
        kernel(0, rows, *args)
        return
    step = -(-rows // (threads * RANGES))
    starts = iter(range(0, rows, step))

    def work() -> None:
        for start in starts:
            kernel(start, min(start + step, rows), *args)

    others = [_pool(os.getpid(), threads).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One of each process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="fastalex")
