"""LRN, max-pooling and the distances of LPIPS as loops that numba compiles.

Optional: without numba, and for what `takes` refuses, the PyTorch operations of this folder do the same.  PyTorch runs
a chain of ten operations over a piece in L2; here a row of channels goes through the chain in registers and L1.

All kernels see flat arrays with the channels innermost.  bfloat16 comes as uint16, because numpy has no such type, and
is computed in float32.  `start` and `stop` bound the rows of the output that a call makes, so that threads can share
them.  One file, because numba's cache on disk notices changes of the file that a kernel is in and of no other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload, register_jitable
from torch import Tensor

from fastalex.kernels import geometry
from fastalex.kernels.geometry import is_channels_last

Pair = tuple[int, int]

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
# The only exponent of the kernels: s ** 0.75 is sqrt(s) * sqrt(sqrt(s)).
BETA = 0.75
LPIPS_EPS = np.float32(1e-10)


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels run on these tensors."""
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype == x.dtype for t in others)
        and is_channels_last(x)
        and x.numel() > 0
        and not numba.config.DISABLE_JIT  # type: ignore[attr-defined]
    )


# --------------------------------------------------------------------------------------------------- for the kernels
def widen(value: Any) -> Any:
    """An element of an array as float32."""
    raise NotImplementedError


def narrow(value: Any, like: Any) -> Any:
    """A float32 as an element of the array `like`; to bfloat16 rounded to nearest, ties to even."""
    raise NotImplementedError


@overload(widen)
def _widen(value):  # type: ignore[no-untyped-def]
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@overload(narrow)
def _narrow(value, like):  # type: ignore[no-untyped-def]
    if like.dtype == types.uint16:

        def rounded(value, like):  # type: ignore[no-untyped-def]
            bits = np.float32(value).view(np.uint32)
            up = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            # rounding up would carry a NaN into infinity or past it
            return np.uint16(up if value == value else np.uint32(0x7FC0))

        return rounded
    return lambda value, like: value


# Loops run over slices, not at offsets: numba would test every index at an offset for being negative.  It also copies
# slices in ways that are not vectorised.
@inlined
def load(source, target):  # type: ignore[no-untyped-def]
    """Into an array of float32."""
    for i in range(source.size):
        target[i] = widen(source[i])


@inlined
def store(source, target):  # type: ignore[no-untyped-def]
    """Into an array of any type."""
    for i in range(source.size):
        target[i] = narrow(source[i], target)


@inlined
def window_sums(terms, size, scale, k, sums):  # type: ignore[no-untyped-def]
    """sums[r, c] = k + scale * (terms[r, c] + ... + terms[r, c + size - 1])"""
    rows, channels = sums.shape
    for r in range(rows):
        row, out = terms[r], sums[r]
        if size == 5:
            for c in range(channels):
                out[c] = k + scale * (((row[c] + row[c + 1]) + (row[c + 2] + row[c + 3])) + row[c + 4])
        else:
            for c in range(channels):
                out[c] = row[c]
            for j in range(1, size):
                shifted = row[j : j + channels]
                for c in range(channels):
                    out[c] += shifted[c]
            for c in range(channels):
                out[c] = k + scale * out[c]


@inlined
def bases(x, norm, squares, base):  # type: ignore[no-untyped-def]
    """What is raised to the power beta, for some rows of channels; `norm` as `_norm` makes it."""
    below, size, scale, k = norm
    rows, channels = x.shape
    for r in range(rows):
        source, target = x[r], squares[r, below : below + channels]
        for c in range(channels):
            value = widen(source[c])
            target[c] = value * value
    window_sums(squares[:rows], size, scale, k, base[:rows])


@inlined
def normalise(x, norm, squares, base, y):  # type: ignore[no-untyped-def]
    """Some rows of channels, from x to y; the borders of `squares` are zeros."""
    bases(x, norm, squares, base)
    # flat: in a loop over one row of 96 channels a third of the roots would be taken four at a time
    flat_x, flat_base, flat_y = x.reshape(-1), base.reshape(-1), y.reshape(-1)
    for i in range(x.size):
        root = np.sqrt(flat_base[i])
        flat_y[i] = narrow(widen(flat_x[i]) / (root * np.sqrt(root)), y)


@inlined
def normalise_backward(grad, x, norm, slope, squares, base, terms, dx, after_relu):  # type: ignore[no-untyped-def]
    """The gradient of some rows; `grad`, in float32, is overwritten.  `after_relu`: 0 where x is, even beside NaN."""
    bases(x, norm, squares, base)
    flat_grad, flat_x, flat_base, flat_dx = grad.reshape(-1), x.reshape(-1), base.reshape(-1), dx.reshape(-1)
    for i in range(x.size):
        root = np.sqrt(flat_base[i])
        flat_grad[i] /= root * np.sqrt(root)
        flat_base[i] = widen(flat_x[i]) / flat_base[i] * flat_grad[i]
    rows, channels = x.shape
    below, size, _, _ = norm
    above = size - 1 - below
    for r in range(rows):
        load(base[r], terms[r, above : above + channels])
    window_sums(terms[:rows], size, slope, np.float32(0), base[:rows])
    for i in range(x.size):
        value = widen(flat_x[i])
        total = flat_grad[i] + value * flat_base[i]
        flat_dx[i] = narrow(np.float32(0) if after_relu & (value <= 0) else total, dx)


@inlined
def pool_window(source, first, places, step, rows, columns, table, dead, best, found):  # type: ignore[no-untyped-def]
    """The maxima over the cells of one window, and their codes; the first of equal cells, but the last NaN.

    Cell (r, s) with rows[0] <= r < rows[1] and columns likewise lies at first + places[r] + s * step.
    """
    channels = best.size
    begin = True
    for r in range(rows[0], rows[1]):
        for s in range(columns[0], columns[1]):
            offset = first + places[r] + s * step
            cell = source[offset : offset + channels]
            code = table[r, s]
            if begin:
                begin = False
                for c in range(channels):
                    best[c] = widen(cell[c])
                    found[c] = code
            else:
                for c in range(channels):
                    value = widen(cell[c])
                    larger = (value > best[c]) | (value != value)
                    best[c] = value if larger else best[c]
                    found[c] = code if larger else found[c]
    if dead:
        for c in range(channels):
            found[c] = dead if best[c] == 0 else found[c]


@inlined
def gather(grad, codes, image, h, w, channels, output, kernel, stride, padding, table, total):  # type: ignore[no-untyped-def]
    """total = the gradients of the windows whose maximum input (h, w) is."""
    for c in range(channels):
        total[c] = 0
    for r in range(kernel[0]):
        oh, rest = divmod(h + padding[0] - r, stride[0])
        if rest != 0 or oh < 0 or oh >= output[0]:
            continue
        for s in range(kernel[1]):
            ow, rest = divmod(w + padding[1] - s, stride[1])
            if rest != 0 or ow < 0 or ow >= output[1]:
                continue
            offset = ((image * output[0] + oh) * output[1] + ow) * channels
            part, part_codes, code = grad[offset : offset + channels], codes[offset : offset + channels], table[r, s]
            for c in range(channels):
                value = widen(part[c])
                total[c] += value if part_codes[c] == code else np.float32(0)


# -------------------------------------------------------------------------------------------------------- the kernels
@compiled
def lrn_kernel(start, stop, x, y, norm):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    strip = max(1, STRIP // channels)
    squares, base = np.zeros((strip, channels + norm[1] - 1), np.float32), np.empty((strip, channels), np.float32)
    for a in range(start, stop, strip):
        b = min(a + strip, stop)
        normalise(x[a:b], norm, squares, base, y[a:b])


@compiled
def lrn_backward_kernel(start, stop, grad, x, dx, norm, slope):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    strip = max(1, STRIP // channels)
    squares, base = np.zeros((strip, channels + norm[1] - 1), np.float32), np.empty((strip, channels), np.float32)
    terms, wide = np.zeros(squares.shape, np.float32), np.empty(base.shape, np.float32)
    for a in range(start, stop, strip):
        b = min(a + strip, stop)
        load(grad[a:b].reshape(-1), wide.reshape(-1))
        normalise_backward(wide, x[a:b], norm, slope, squares, base, terms, dx[a:b], False)


@compiled
def max_pool_kernel(start, stop, x, y, codes, plane, output, channels, kernel, stride, padding, table, dead):  # type: ignore[no-untyped-def]
    best, found = np.empty(channels, np.float32), np.empty(channels, np.int32)
    places = np.arange(kernel[0]) * plane[1] * channels
    for row in range(start, stop):
        image, oh = divmod(row, output[0])
        top = oh * stride[0] - padding[0]
        rows = max(0, -top), min(kernel[0], plane[0] - top)
        for ow in range(output[1]):
            left = ow * stride[1] - padding[1]
            columns = max(0, -left), min(kernel[1], plane[1] - left)
            first = ((image * plane[0] + top) * plane[1] + left) * channels
            pool_window(x, first, places, channels, rows, columns, table, dead, best, found)
            offset = (row * output[1] + ow) * channels
            store(best, y[offset : offset + channels])
            if codes.size > 0:
                store(found, codes[offset : offset + channels])


@compiled
def max_pool_backward_kernel(start, stop, grad, codes, dx, plane, output, channels, kernel, stride, padding, table):  # type: ignore[no-untyped-def]
    total = np.empty(channels, np.float32)
    for row in range(start, stop):
        image, h = divmod(row, plane[0])
        for w in range(plane[1]):
            gather(grad, codes, image, h, w, channels, output, kernel, stride, padding, table, total)
            offset = (row * plane[1] + w) * channels
            store(total, dx[offset : offset + channels])


@compiled
def lrn_max_pool_kernel(  # type: ignore[no-untyped-def]
    start, stop, x, y, codes, plane, output, channels, groups, norm, kernel, stride, table, dead
):
    """Normalised rows, rounded to x's dtype, live in a ring as long as windows need them."""
    inside, width = channels // groups, plane[1] * groups
    strip = max(1, STRIP // inside)
    squares, base = np.zeros((strip, inside + norm[1] - 1), np.float32), np.empty((strip, inside), np.float32)
    best, found = np.empty(channels, np.float32), np.empty(channels, np.int32)
    ring = np.empty((kernel[0] * width, inside), x.dtype)
    places = np.empty(kernel[0], np.int64)
    for row in range(start, stop):
        image, oh = divmod(row, output[0])
        top = oh * stride[0]
        known = 0 if row == start or oh == 0 else max(0, kernel[0] - stride[0])
        for r in range(kernel[0]):
            places[r] = (top + r) % kernel[0] * width * inside
        for h in range(top + known, top + kernel[0]):
            source, target = (image * plane[0] + h) * width, h % kernel[0] * width
            for a in range(0, width, strip):
                b = min(a + strip, width)
                rows = x[source + a : source + b]
                normalise(rows, norm, squares, base, ring[target + a : target + b])
        for ow in range(output[1]):
            first = ow * stride[1] * channels
            pool_window(ring.ravel(), first, places, channels, (0, kernel[0]), (0, kernel[1]), table, dead, best, found)
            offset = (row * output[1] + ow) * channels
            store(best, y[offset : offset + channels])
            if codes.size > 0:
                store(found, codes[offset : offset + channels])


@compiled
def lrn_max_pool_backward_kernel(  # type: ignore[no-untyped-def]
    start, stop, grad, codes, x, dx, plane, output, channels, groups, norm, slope, kernel, stride, table, after_relu
):
    inside = channels // groups
    strip = max(1, STRIP // channels)
    squares = np.zeros((strip * groups, inside + norm[1] - 1), np.float32)
    base, terms = np.empty((strip * groups, inside), np.float32), np.zeros(squares.shape, np.float32)
    total = np.empty((strip, channels), np.float32)
    for row in range(start, stop):
        image, h = divmod(row, plane[0])
        for first in range(0, plane[1], strip):
            last = min(first + strip, plane[1])
            for w in range(first, last):
                gather(grad, codes, image, h, w, channels, output, kernel, stride, (0, 0), table, total[w - first])
            a, b = (row * plane[1] + first) * groups, (row * plane[1] + last) * groups
            wide = total.reshape(strip * groups, inside)[: b - a]
            normalise_backward(wide, x[a:b], norm, slope, squares, base, terms, dx[a:b], after_relu)


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
    start, stop, x, y, weight, grad, above, codes, dx, plane, output, link, mode, kernel, stride, table, after_relu
):
    """The gradient of x, as kernels/lpips.py has it.  grad: (rows, 1) or (rows, pixels), twice what comes in.

    link: (shift, others); image i was compared with image (i + shift) % others.  mode: what `above` is: 0 nothing, 1
    the gradient of x itself, 2 that of a max-pool over x.
    """
    channels, pixels = x.shape[1], plane[0] * plane[1]
    pooled = np.empty(channels, np.float32)
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
            gather(above, codes, image, h, w, channels, output, kernel, stride, (0, 0), table, pooled)
        elif mode == 1:
            load(above[row * channels : (row + 1) * channels], pooled)
        else:
            pooled[:] = 0
        for c in range(channels):
            a = widen(left[c])
            total = inner * (weight[c] * (a * x_scale - widen(right[c]) * y_scale)) - a * along + pooled[c]
            out[c] = narrow(np.float32(0) if after_relu & (a <= 0) else total, dx)


# ------------------------------------------------------------------------------------------------------ from PyTorch
def lrn_fwd(x: Tensor, y: Tensor, size: int, alpha: float, k: float, groups: int) -> None:
    """Into y, which is laid out as x; likewise below."""
    arrays = _rows(x, groups), _rows(y, groups)
    _share(lrn_kernel, len(arrays[0]), x.numel(), *arrays, _norm(size, alpha, k))


def lrn_bwd(grad: Tensor, x: Tensor, dx: Tensor, size: int, alpha: float, k: float, groups: int) -> None:
    arrays = _rows(grad, groups), _rows(x, groups), _rows(dx, groups)
    slope = np.float32(-2 * alpha * BETA / size)
    _share(lrn_backward_kernel, len(arrays[0]), x.numel(), *arrays, _norm(size, alpha, k), slope)


def _norm(size: int, alpha: float, k: float) -> tuple[int, int, np.float32, np.float32]:
    """(channels of a window below its own, channels of a window, alpha / size, k)"""
    return size // 2, size, np.float32(alpha / size), np.float32(k)


def max_pool_fwd(
    x: Tensor, y: Tensor, codes: Tensor | None, kernel_size: Pair, stride: Pair, padding: Pair, after_relu: bool
) -> None:
    _share(
        max_pool_kernel,
        y.shape[0] * y.shape[2],
        x.numel(),
        *(_flat(x), _flat(y), _codes(codes)),
        *(tuple(x.shape[2:]), tuple(y.shape[2:]), x.shape[1]),
        *(kernel_size, stride, padding, _table(kernel_size), _dead(kernel_size, after_relu)),
    )


def max_pool_bwd(grad: Tensor, codes: Tensor, dx: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> None:
    _share(
        max_pool_backward_kernel,
        dx.shape[0] * dx.shape[2],
        dx.numel(),
        *(_flat(grad), _flat(codes), _flat(dx)),
        *(tuple(dx.shape[2:]), tuple(grad.shape[2:]), dx.shape[1]),
        *(kernel_size, stride, padding, _table(kernel_size)),
    )


def lrn_max_pool_fwd(
    x: Tensor,
    y: Tensor,
    codes: Tensor | None,
    size: int,
    alpha: float,
    k: float,
    groups: int,
    kernel_size: Pair,
    stride: Pair,
    after_relu: bool,
) -> None:
    _share(
        lrn_max_pool_kernel,
        y.shape[0] * y.shape[2],
        x.numel(),
        *(_rows(x, groups), _flat(y), _codes(codes)),
        *(tuple(x.shape[2:]), tuple(y.shape[2:]), x.shape[1], groups, _norm(size, alpha, k)),
        *(kernel_size, stride, _table(kernel_size), _dead(kernel_size, after_relu)),
    )


def lrn_max_pool_bwd(
    grad: Tensor,
    codes: Tensor,
    x: Tensor,
    dx: Tensor,
    size: int,
    alpha: float,
    k: float,
    groups: int,
    kernel_size: Pair,
    stride: Pair,
    after_relu: bool,
) -> None:
    _share(
        lrn_max_pool_backward_kernel,
        x.shape[0] * x.shape[2],
        x.numel(),
        *(_flat(grad), _flat(codes), _rows(x, groups), _rows(dx, groups)),
        *(tuple(x.shape[2:]), tuple(grad.shape[2:]), x.shape[1], groups, _norm(size, alpha, k)),
        *(np.float32(-2 * alpha * BETA / size), kernel_size, stride, _table(kernel_size), after_relu),
    )


def lpips_fwd(a: Tensor, b: Tensor, weight: Tensor, out: Tensor) -> None:
    """Into out, float32 (N, pixels); weight: float32."""
    pixels = a.shape[2] * a.shape[3]
    arrays = _rows(a, 1), _rows(b, 1), weight.numpy(), out.view(-1).numpy()
    _share(lpips_kernel, out.numel(), a.numel(), *arrays, pixels, b.shape[0])


def lpips_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    above: Tensor | None,
    codes: Tensor | None,
    dx: Tensor,
    shift: int,
    window: Pair,
    after_relu: bool,
) -> None:
    """Into dx; grad: float32 (rows, 1) or (rows, pixels), twice the gradient of each pixel's distance."""
    kernel_size, stride = (window[0],) * 2, (window[1],) * 2
    _share(
        lpips_backward_kernel,
        x.shape[0] * x.shape[2] * x.shape[3],
        x.numel(),
        *(_rows(x, 1), _rows(y, 1), weight.numpy(), grad.numpy()),
        *(_flat(dx)[:0] if above is None else _flat(above), _codes(codes), _rows(dx, 1)),
        *(tuple(x.shape[2:]), (0, 0) if codes is None else tuple(codes.shape[2:]), (shift, y.shape[0])),
        *(0 if above is None else 1 if codes is None else 2, kernel_size, stride, _table(kernel_size), after_relu),
    )


def _flat(x: Tensor) -> np.ndarray:
    flat = x.detach().movedim(1, -1).view(-1)
    return flat.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else flat.numpy()


def _rows(x: Tensor, groups: int) -> np.ndarray:
    return _flat(x).reshape(-1, x.shape[1] // groups)


def _codes(codes: Tensor | None) -> np.ndarray:
    return np.empty(0, np.int8) if codes is None else _flat(codes)


def _dead(kernel_size: Pair, after_relu: bool) -> int:
    return geometry.no_cell(*kernel_size) if after_relu else 0


@lru_cache(maxsize=64)
def _table(kernel_size: Pair) -> np.ndarray:
    rows, columns = kernel_size
    return np.array([[geometry.cell_code(r, s, rows, columns) for s in range(columns)] for r in range(rows)], np.int8)


def _share(kernel: Callable[..., None], rows: int, elements: int, *args: Any) -> None:
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
