"""Max-pooling, its one-byte codes and its backward against the float64 reference and PyTorch's rules."""

import importlib.util
import mmap
import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_matches

from fastalex import reference
from fastalex.kernels import geometry, max_pool, max_pool_3x3s2, registers

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
NCHW, NHWC = torch.contiguous_format, torch.channels_last
INTERPRETING = registers.interpreting()

dtypes = pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=["fp16", "bf16", "fp32"])
layouts = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])

# (height, width), kernel_size, stride, padding, dilation, ceil_mode
WINDOWS = {
    "3x3s2-odd": ((9, 11), (3, 3), (2, 2), (0, 0), (1, 1), False),
    "3x3s2-even": ((8, 10), (3, 3), (2, 2), (0, 0), (1, 1), False),
    "3x3s2-odd-even": ((7, 4), (3, 3), (2, 2), (0, 0), (1, 1), False),
    "3x3s2-one-window": ((3, 3), (3, 3), (2, 2), (0, 0), (1, 1), False),
    "3x3s2-even-ceil": ((8, 6), (3, 3), (2, 2), (0, 0), (1, 1), True),
    "3x3s2-padded": ((8, 7), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "3x3s1": ((5, 6), (3, 3), (1, 1), (0, 0), (1, 1), False),
    "3x3s3": ((9, 8), (3, 3), (3, 3), (0, 0), (1, 1), False),
    "3x3-dilated": ((9, 8), (3, 3), (2, 2), (1, 0), (2, 3), False),
    "1x1": ((4, 3), (1, 1), (1, 1), (0, 0), (1, 1), False),
    "1x1s3": ((5, 7), (1, 1), (3, 2), (0, 0), (1, 1), False),
    "2x2s2": ((6, 7), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "2x2s3": ((8, 9), (2, 2), (3, 4), (0, 0), (1, 1), False),
    "2x2-padded-ceil": ((5, 6), (2, 2), (2, 2), (1, 1), (1, 1), True),
    "2x2-dilated-padded": ((6, 7), (2, 2), (1, 2), (1, 1), (3, 2), True),
    "3x2": ((7, 6), (3, 2), (2, 1), (0, 1), (1, 1), False),
    "1x5": ((3, 9), (1, 5), (1, 3), (0, 2), (1, 1), True),
    "5x1": ((9, 3), (5, 1), (3, 1), (2, 0), (1, 1), False),
    "1x9": ((2, 12), (1, 9), (1, 2), (0, 4), (1, 1), False),
    "4x3": ((7, 7), (4, 3), (2, 2), (2, 1), (1, 1), False),
    "5x5s2": ((9, 10), (5, 5), (2, 3), (2, 1), (1, 1), True),
    "5x5-dilated": ((11, 12), (5, 5), (1, 2), (0, 2), (2, 1), False),
    "11x11": ((14, 13), (11, 11), (4, 4), (5, 2), (1, 1), False),
    "1x127": ((1, 130), (1, 127), (1, 2), (0, 0), (1, 1), False),
}
windows = pytest.mark.parametrize("window", list(WINDOWS))


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    """The interpreter is fastest with few large programs; compiled kernels run as they ship."""
    if INTERPRETING:
        enlarge(max_pool, monkeypatch)
        enlarge(max_pool_3x3s2, monkeypatch)


def enlarge(module, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1024)
    if hasattr(module, "WARP"):
        monkeypatch.setattr(module, "WARP", 128)


def signed(shape, dtype, layout):
    """Both signs, many ties, zeros of both signs."""
    return (torch.randn(shape) * 2).round().div(2).to(dtype).contiguous(memory_format=layout)


def with_specials(shape, dtype, layout):
    """`signed` with every special value in a tenth of the places: NaN of both signs, infinities, signed zeros."""
    x = signed(shape, FP32, NCHW)
    kind = torch.randint(0, 60, shape)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0)):
        x[kind == i] = value
    x = x.to(dtype)
    bits, sign = (torch.int32, -(2**31)) if dtype == FP32 else (torch.int16, -(2**15))
    x.view(bits)[kind == 5] = x.new_tensor(torch.nan).view(bits) | sign
    return x.contiguous(memory_format=layout)


def bytes_of(index, width, oh, ow, kernel_size, stride, padding, dilation):
    """The byte for each torch index h * width + w."""
    rows, columns = kernel_size
    table = torch.tensor([geometry.cell_code(r, s, rows, columns) for r in range(rows) for s in range(columns)])
    top = torch.arange(oh)[:, None] * stride[0] - padding[0]
    left = torch.arange(ow) * stride[1] - padding[1]
    row = (index // width - top) // dilation[0]
    column = (index % width - left) // dilation[1]
    return table[row * columns + column].to(torch.int8)


def check_forward(module, x, kernel_size, stride, padding, dilation, ceil_mode):
    """Values, indices and bytes of the codes, exactly; returns the codes."""
    window = kernel_size, stride, padding, dilation
    y, codes = module.max_pool_fwd(x, *window, ceil_mode)
    expected, index = reference.max_pool2d(x.double(), *window, ceil_mode, return_indices=True)
    assert y.dtype == x.dtype
    assert codes.dtype == torch.int8
    assert codes.is_contiguous() == y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0, equal_nan=True)
    wrong = codes != bytes_of(index, x.shape[3], *y.shape[2:], *window)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} codes are wrong"
    indices = module.max_pool_indices(codes, x.shape[2:], *window)
    assert torch.equal(indices, index)
    assert indices.is_contiguous() == y.is_contiguous()
    return codes


def check_backward(module, x, kernel_size, stride, padding, dilation, ceil_mode, codes=None, bias_partials=False):
    """dx against autograd through the reference, and the partial sums of dx; `codes`: those of the module's forward."""
    window = kernel_size, stride, padding, dilation
    if codes is None:
        _, codes = module.max_pool_fwd(x, *window, ceil_mode)
    grad = torch.randn(codes.shape).to(x.dtype)

    def derivative(grad):
        leaf = x.double().requires_grad_()
        reference.max_pool2d(leaf, *window, ceil_mode).backward(grad.double())
        return leaf.grad

    expected, magnitude = derivative(grad), derivative(grad.abs())
    covering = -(-kernel_size[0] // stride[0]) * -(-kernel_size[1] // stride[1])
    dx = module.max_pool_bwd(grad, codes, tuple(x.shape[2:]), *window, bias_partials=bias_partials)
    if bias_partials:
        dx, partials = dx
        assert partials.dtype == FP32
        assert partials.shape[1] == x.shape[1]
        dims = (0, 2, 3)
        # generic windows sum the rounded dx, whose roundings are within one unit of the dtype each
        rounding = torch.finfo(x.dtype).eps * expected.abs().sum(dims)
        error = (partials.double().sum(0) - expected.sum(dims)).abs()
        assert (error <= rounding + 2**-24 * x[:, 0].numel() * magnitude.sum(dims)).all()
    assert dx.dtype == x.dtype
    truncates = INTERPRETING and x.dtype == BF16
    assert_matches(dx, expected, terms=covering, magnitude=magnitude, truncates=truncates)
    return dx


@windows
@layouts
def test_forward_and_backward(window, layout):
    size, *arguments = WINDOWS[window]
    x = signed((2, 8, *size), FP16, layout)
    codes = check_forward(max_pool, x, *arguments)
    assert codes.is_contiguous(memory_format=layout)
    dx = check_backward(max_pool, x, *arguments, codes=codes, bias_partials=True)
    # one window per image: both layouts are one, and the codes cannot tell
    assert dx.is_contiguous(memory_format=layout) or codes.shape[2:] == (1, 1)


@windows
@layouts
@dtypes
@pytest.mark.slow
def test_every_dtype(window, layout, dtype):
    size, *arguments = WINDOWS[window]
    for channels in (8, 12):
        x = signed((2, channels, *size), dtype, layout)
        check_backward(max_pool, x, *arguments, codes=check_forward(max_pool, x, *arguments))


@pytest.mark.parametrize(
    "window", ["3x3s2-odd", "3x3s2-even", "3x3s2-padded", "2x2-padded-ceil", "3x2", "5x5s2", "1x1"]
)
@layouts
@dtypes
def test_special_values(window, layout, dtype):
    size, *arguments = WINDOWS[window]
    x = with_specials((3, 8, *size), dtype, layout)
    assert x.isnan().any()
    assert (x == -torch.inf).any()
    check_forward(max_pool, x, *arguments)


@layouts
@dtypes
@pytest.mark.parametrize("window", ["3x3s2-odd", "3x3s2-padded", "5x5s2"])
def test_uniform_windows(window, layout, dtype):
    """One value everywhere, also minus infinity: the first cell inside the input; NaN everywhere: the last."""
    size, *arguments = WINDOWS[window]
    values = torch.tensor([-torch.inf, torch.inf, torch.nan, -1.0, 0.0, -0.0, 2.0, torch.finfo(dtype).tiny])
    x = values[:, None, None].expand(8, *size)[None].to(dtype).contiguous(memory_format=layout)
    check_forward(max_pool, x, *arguments)


@pytest.mark.parametrize("window", ["3x3s2-odd", "2x2s2"])
@pytest.mark.parametrize("first", [0.0, -0.0])
@dtypes
def test_zeros_of_both_signs_tie(window, first, dtype):
    size, *arguments = WINDOWS[window]
    x = torch.full((1, 8, *size), -1.0)
    x[:, :, ::2] = first
    x[:, :, 1::2] = -first
    check_forward(max_pool, x.to(dtype).contiguous(memory_format=NHWC), *arguments)


def test_the_smallest_differences_count():
    """Neighbouring subnormals, and values next to the largest and next to infinity."""
    # the interpreter widens subnormal bf16 to something else
    for dtype in (FP16,) if INTERPRETING else (FP16, BF16):
        largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16)
        bits = torch.cat([torch.arange(0, 9), largest - torch.arange(0, 9), largest + torch.arange(-4, 2)]).to(
            torch.int16
        )
        values = bits.view(dtype)
        values = torch.cat([values, -values])
        x = values[torch.randint(0, len(values), (2, 8, 15, 15))].contiguous(memory_format=NHWC)
        check_forward(max_pool, x, (3, 3), (2, 2), (0, 0), (1, 1), False)


@pytest.mark.parametrize("channels", [1, 3, 8, 24, 96, 100, 256])
@layouts
@pytest.mark.parametrize("dtype", [FP16, pytest.param(FP32, marks=pytest.mark.slow)], ids=["fp16", "fp32"])
def test_channels(channels, layout, dtype):
    arguments = WINDOWS["3x3s2-odd-even"][1:]
    x = signed((2, channels, 5, 4), dtype, layout)
    codes = check_forward(max_pool, x, *arguments)
    check_backward(max_pool, x, *arguments, codes=codes, bias_partials=True)


@pytest.mark.parametrize("window", ["3x3s2-odd", "3x3s2-padded", "2x2s2", "5x5s2"])
@layouts
@dtypes
def test_after_relu_kills_the_windows_of_zeros(window, layout, dtype):
    size, *arguments = WINDOWS[window]
    x = with_specials((2, 8, *size), dtype, layout)
    x = torch.where(x.isnan() | (torch.rand(x.shape) < 0.25), x, 0).contiguous(memory_format=layout)
    x = torch.where(x < 0, -0.0, x)
    x[0, 0] = 0
    x[0, 1] = -0.0
    x[0, 2, ::2] = -0.0
    y, alive = max_pool.max_pool_fwd(x, *arguments)
    relu, codes = max_pool.max_pool_fwd(x, *arguments, after_relu=True)
    torch.testing.assert_close(relu, y, rtol=0, atol=0, equal_nan=True)
    dead = geometry.no_cell(*arguments[0])
    assert (y == 0).any()
    assert torch.equal(codes, torch.where(y == 0, dead, alive))

    grad = torch.ones_like(y)
    dx = max_pool.max_pool_bwd(grad, codes, size, *arguments[:-1])
    through_relu = max_pool.max_pool_bwd(grad, alive, size, *arguments[:-1])
    # what is alive gets its gradient whatever the dead windows do; pixels of zeros get none
    assert torch.equal(dx, torch.where(x == 0, 0, through_relu))


@pytest.mark.parametrize("window", ["3x3s2-odd", "3x3s2-padded"])
@layouts
def test_without_codes(window, layout):
    size, *arguments = WINDOWS[window]
    x = with_specials((2, 8, *size), FP16, layout)
    y, codes = max_pool.max_pool_fwd(x, *arguments, codes=False)
    assert codes is None
    expected = reference.max_pool2d(x.double(), *arguments)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("window", ["3x3s2-odd", "3x3s2-even", "3x3s2-padded", "5x5s2"])
@layouts
@dtypes
def test_nothing_leaks_into_a_gradient(window, layout, dtype):
    """A NaN or an infinity in one window's gradient reaches that window's pixel and no other; sums are exact here."""
    size, *arguments = WINDOWS[window]
    x = signed((2, 8, *size), dtype, layout)
    codes = check_forward(max_pool, x, *arguments)
    grad = torch.randint(-8, 8, codes.shape).to(dtype)
    kind = torch.randint(0, 20, codes.shape)
    grad[kind == 0] = torch.nan
    grad[kind == 1] = torch.inf
    grad[kind == 2] = -torch.inf
    leaf = x.double().requires_grad_()
    reference.max_pool2d(leaf, *arguments).backward(grad.double())
    dx = max_pool.max_pool_bwd(grad, codes, size, *arguments[:-1])
    torch.testing.assert_close(dx.double(), leaf.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("channels", "size"), [(96, (55, 55)), (256, (13, 13)), (24, (27, 27)), (8, (6, 5))])
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=["fp16", "fp32"])
def test_partials_are_a_small_share_of_the_traffic(channels, size, dtype, monkeypatch):
    """Counted without running the kernel, which would take the interpreter minutes."""
    monkeypatch.undo()
    monkeypatch.setattr(max_pool_3x3s2, "max_pool_bwd_3x3s2_kernel", Launches())
    for batch in (1, 7, 128):
        oh, ow = ((length - 3) // 2 + 1 for length in size)
        grad = torch.ones(1, 1, 1, 1, dtype=dtype).expand(batch, channels, oh, ow).contiguous(memory_format=NHWC)
        codes = torch.zeros(grad.shape, dtype=torch.int8).contiguous(memory_format=NHWC)
        dx, partials = max_pool.max_pool_bwd(grad, codes, size, (3, 3), (2, 2), (0, 0), (1, 1), bias_partials=True)
        moved = (dx.numel() + grad.numel()) * dx.element_size() + codes.numel()
        # one image of a small plane has fewer bytes than one row of partials needs
        smallest = 4 * channels * (1 if size[1] <= 16 else 4)
        assert partials.numel() * 4 <= max(0.02 * moved, smallest)


class Launches:
    """Stands in for a kernel: takes a grid and arguments, does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("per_program", [1, 3, 100])
@pytest.mark.parametrize("partials", [False, True])
def test_rows_per_program_do_not_matter(per_program, partials, monkeypatch):
    """One program may walk any number of rows, across images; the partial sums then have fewer rows."""
    size, *arguments = WINDOWS["3x3s2-even"]
    x = signed((3, 16, *size), FP16, NHWC)
    monkeypatch.setattr(max_pool_3x3s2, "rows_per_program", lambda rows, blocks: per_program)
    codes = check_forward(max_pool, x, *arguments)
    check_backward(max_pool, x, *arguments, codes=codes, bias_partials=partials)


@layouts
@pytest.mark.parametrize("window", ["3x3s2-odd", "5x5s2"])
def test_two_runs_are_bit_equal(window, layout):
    size, *arguments = WINDOWS[window]
    x = signed((2, 24, *size), FP16, layout)
    y, codes = max_pool.max_pool_fwd(x, *arguments)
    grad = torch.randn(y.shape).to(FP16)
    runs = [
        (
            *max_pool.max_pool_fwd(x, *arguments),
            *max_pool.max_pool_bwd(grad, codes, size, *arguments[:-1], bias_partials=True),
        )
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def views(x):
    """The values of x (N, C, H, W) in layouts that are neither packed nor aligned."""
    n, c, h, w = x.shape
    wide = torch.full((n, c + 4, h, w + 1), 99, dtype=x.dtype)
    wide[:, 2:-2, :, 1:] = x
    yield wide[:, 2:-2, :, 1:]
    last = wide.contiguous(memory_format=NHWC)
    yield last[:, 2:-2, :, 1:]
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield x.flip(0).contiguous().flip(0)
    for layout in (NCHW, NHWC):
        # one element into its storage: no 16-byte boundary
        storage = torch.full((x.numel() + 1,), 99, dtype=x.dtype)
        shifted = storage[1:].as_strided(x.shape, x.contiguous(memory_format=layout).stride())
        yield shifted.copy_(x)


@pytest.mark.parametrize("window", ["3x3s2-odd", "3x3s2-padded"])
def test_views(window):
    size, *arguments = WINDOWS[window]
    x = signed((2, 8, *size), FP16, NCHW)
    for view in views(x):
        assert torch.equal(view, x)
        codes = check_forward(max_pool, view, *arguments)
    grad = torch.randn(codes.shape).to(FP16)
    expected = max_pool.max_pool_bwd(grad, codes, size, *arguments[:-1])
    for grad_view in views(grad):
        assert torch.equal(max_pool.max_pool_bwd(grad_view, codes, size, *arguments[:-1]), expected)
    for codes_view in views(codes):
        assert torch.equal(max_pool.max_pool_bwd(grad, codes_view, size, *arguments[:-1]), expected)


@pytest.mark.parametrize("expanded", [(1, 8, 9, 11), (2, 1, 9, 11), (2, 8, 1, 11), (2, 8, 9, 1), (1, 1, 1, 1)])
def test_expanded(expanded):
    size, *arguments = WINDOWS["3x3s2-odd"]
    x = torch.randn(expanded).to(FP16).expand(2, 8, *size)
    codes = check_forward(max_pool, x, *arguments)
    leaf = x.double().requires_grad_()
    y = reference.max_pool2d(leaf, *arguments)
    y.sum().backward()
    grad = torch.ones((), dtype=FP16).expand(y.shape)
    assert torch.equal(max_pool.max_pool_bwd(grad, codes, size, *arguments[:-1]).double(), leaf.grad)


@layouts
@pytest.mark.parametrize("window", ["3x3s2-odd", "5x5s2"])
@pytest.mark.parametrize(("batch", "channels"), [(0, 8), (2, 0), (0, 0)])
def test_empty(batch, channels, window, layout):
    size, *arguments = WINDOWS[window]
    x = torch.zeros(batch, channels, *size, dtype=FP16).contiguous(memory_format=layout)
    y, codes = max_pool.max_pool_fwd(x, *arguments)
    expected = geometry.output_size(size, *arguments[:4], True)[0]
    assert y.shape == codes.shape == (batch, channels, expected, y.shape[3])
    dx, partials = max_pool.max_pool_bwd(y, codes, size, *arguments[:-1], bias_partials=True)
    assert dx.shape == x.shape
    assert partials.sum(0).tolist() == [0] * channels
    assert max_pool.max_pool_indices(codes, size, *arguments[:-1]).shape == codes.shape


def test_a_window_without_any_cell_inside():
    """Dilation can step over an input of two rows; PyTorch's value is minus infinity, and no pixel gets a gradient."""
    x = torch.randn(1, 8, 2, 2)
    arguments = (2, 2), (1, 1), (1, 1), (3, 3)
    y, codes = max_pool.max_pool_fwd(x, *arguments, False)
    assert torch.equal(y, torch.nn.functional.max_pool2d(x, 2, 1, 1, 3))
    assert (y == -torch.inf).all()
    assert not max_pool.max_pool_bwd(torch.ones_like(y), codes, (2, 2), *arguments).any()


BAD = {
    "rank": (dict(x=torch.zeros(8, 9, 9)), r"4 dimensions.*\(8, 9, 9\)"),
    "dtype": (dict(x=torch.zeros(1, 8, 9, 9, dtype=torch.float64)), "float16, bfloat16 or float32, got torch.float64"),
    "cells": (dict(kernel_size=(2, 64)), r"kernel_size \(2, 64\) has 128 cells.*127"),
    "kernel": (dict(kernel_size=(0, 3)), r"kernel_size must be at least 1.*\(0, 3\)"),
    "stride": (dict(stride=(2, 0)), r"stride must be at least 1.*\(2, 0\)"),
    "dilation": (dict(dilation=(0, 1)), r"dilation must be at least 1.*\(0, 1\)"),
    "negative": (dict(padding=(-1, 0)), r"padding must be at least 0.*\(-1, 0\)"),
    "padding": (dict(padding=(1, 2)), r"padding must be at most half of kernel_size \(3, 3\), got \(1, 2\)"),
    "small": (dict(x=torch.zeros(1, 8, 2, 9)), r"no window fits: input size \(2, 9\)"),
    "reach": (dict(dilation=(5, 1)), r"no window fits.*dilation \(5, 1\)"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_refusals(case):
    change, message = BAD[case]
    good = dict(x=torch.zeros(1, 8, 9, 9), kernel_size=(3, 3), stride=(2, 2), padding=(0, 0), dilation=(1, 1))
    with pytest.raises(ValueError, match=message):
        max_pool.max_pool_fwd(**{**good, **change}, ceil_mode=False)


def test_backward_refusals():
    window = (3, 3), (2, 2), (0, 0), (1, 1)
    grad = torch.zeros(1, 8, 4, 4)
    codes = torch.zeros(1, 8, 4, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"input_size \(11, 9\): these windows give \(5, 4\)"):
        max_pool.max_pool_bwd(grad, codes, (11, 9), *window)
    with pytest.raises(ValueError, match=r"grad has shape \(1, 8, 4, 3\), codes have \(1, 8, 4, 4\)"):
        max_pool.max_pool_bwd(grad[..., :3], codes, (9, 9), *window)
    with pytest.raises(ValueError, match=r"codes must be int8.*torch.int64"):
        max_pool.max_pool_bwd(grad, codes.long(), (9, 9), *window)
    with pytest.raises(ValueError, match=r"128 cells"):
        max_pool.max_pool_indices(codes, (9, 9), (2, 64), *window[1:])


# ---------------------------------------------------------------------------------------------- beyond 2**31 elements
def untouched(shape, dtype):
    """Zeros that take memory only where they are touched."""
    size = torch.Size(shape).numel()
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype).view(shape)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.skipif(not INTERPRETING, reason="needs memory that is there when it is touched")
def test_forward_offsets_beyond_2_31(layout):
    """Three images of 2**30 elements, one window each: the last begins at element 2**31."""
    height, width = 2**15, 2**12
    x = untouched((3, height, width, 8) if layout == NHWC else (3, 8, height, width), FP16)
    x = x.permute(0, 3, 1, 2) if layout == NHWC else x
    x[2, :, 1, 1] = torch.arange(1, 9)
    y, codes = max_pool.max_pool_fwd(x, (2, 2), (height, width), (0, 0), (1, 1), False)
    assert y[:, :, 0, 0].tolist() == [[0] * 8, [0] * 8, list(range(1, 9))]
    assert codes[2, :, 0, 0].tolist() == [geometry.cell_code(1, 1, 2, 2)] * 8


@pytest.mark.parametrize("kernel", ["3x3s2", "plane", "generic"])
@pytest.mark.skipif(not INTERPRETING, reason="moves the program index of the interpreter")
def test_backward_offsets_beyond_2_31(kernel, monkeypatch):
    """The last programs of a batch whose dx has more than 2**31 elements, run alone."""
    from triton.runtime.interpreter import interpreter_builder

    batch, height, width, channels = 129, 2**11, 2**10, 8
    oh, ow = (height - 3) // 2 + 1, (width - 3) // 2 + 1
    last = kernel != "plane"
    dx = untouched((batch, height, width, channels) if last else (batch, channels, height, width), FP16)
    grad = untouched((batch, oh, ow, channels) if last else (batch, channels, oh, ow), FP16)
    codes = untouched(grad.shape, torch.int8)
    sizes = dict(H=height, W=width, OH=oh, OW=ow, C=channels)
    # code 27 names the first cell of a 3x3 window; all others are 0, which match every cell, of zero gradients
    at = (-1, -1, -1) if last else (-1, slice(None), -1, -1)
    grad[at] = 3.0
    codes[at] = geometry.cell_code(0, 0, 3, 3)

    run, arguments, programs, lanes = {
        "3x3s2": (
            max_pool_3x3s2.max_pool_bwd_3x3s2_kernel,
            (grad, codes, dx, None, batch * height // 2, 1),
            batch * (height // 2) * (width // 2 // 32),
            dict(VEC=8, COLUMNS=8, ASM=False, BLOCK=32),
        ),
        "plane": (
            max_pool_3x3s2.max_pool_bwd_3x3s2_nchw_kernel,
            (grad, codes, dx),
            batch * channels * (height // 2) * (width // 2) // 128,
            dict(ASM=False, BLOCK=128),
        ),
        "generic": (
            max_pool.max_pool_bwd_kernel,
            (grad, codes, dx),
            batch * height * width // 128,
            dict(WINDOW=(3, 3, 2, 2, 0, 0, 1, 1), CHANNELS_LAST=True, VEC=8, BLOCK=128),
        ),
    }[kernel]
    rows = 4 * width // 128 if kernel == "generic" else 2 * (width // 2 // 32)
    first = programs - (rows if kernel != "plane" else 2 * (width // 2) // 128)
    builder = type(interpreter_builder)
    program_id = builder.create_get_program_id

    def shifted(self, axis):
        handle = program_id(self, axis)
        handle.data = handle.data + first if axis == 0 else handle.data
        return handle

    monkeypatch.setattr(builder, "create_get_program_id", shifted)
    run[(programs - first,)](*arguments, **sizes, **lanes)
    pixel = (-1, 2 * oh - 2, 2 * ow - 2) if last else (-1, slice(None), 2 * oh - 2, 2 * ow - 2)
    assert dx[pixel].tolist() == [3.0] * channels if last else dx[pixel][-1].item() == 3.0
    # an offset that wrapped around would have landed in the first half
    assert not dx[0].any() if kernel == "generic" else True


# ---------------------------------------------------------------------------------------------- would we notice?
PACKED = pytest.mark.skipif(INTERPRETING, reason="inline assembly")
MUTANTS = [
    # what it breaks, the line as it is, the line broken
    ("the last maximum wins", "taken = (value > best)", "taken = (value >= best)"),
    ("NaN is forgotten", "taken = (value > best) | (value != value)", "taken = value > best"),
    ("the first NaN wins", "| (value != value)", "| ((value != value) & (best == best))"),
    ("a row too many", "inside = (h >= 0) & (h < H)", "inside = (h >= 0) & (h <= H)"),
    ("a column too few", "(w >= 0) & (w < W)", "(w >= 0) & (w < W - 1)"),
    ("padding counts as zero", 'mask=inside[:, None], other=float("-inf")', "mask=inside[:, None], other=0.0"),
    ("minus infinity in the padding", "tl.where(h0 < 0, (DH - 1 - h0) // DH, 0)", "tl.where(h0 < 0, 0, 0)"),
    ("rows and columns swapped", "code == (row * COLUMNS + column)", "code == (column * ROWS + row)"),
    ("dilation", "(row * DH * W + column * DW)", "(row * DH * W + column * DH)"),
    ("a dropped window", "p00 = add_window(p00, grads, codes, 2, 2, VEC, ASM)", "p00 = p00"),
    ("a wrong cell", "p10 = add_window(p10, grads, codes, 1, 2,", "p10 = add_window(p10, grads, codes, 1, 1,"),
    ("a dropped mask below", "codes_ptr, below & right, VEC)", "codes_ptr, right, VEC)"),
    ("a dropped mask on the left", "(j > 0) & (j <= OW)", "(j >= 0) & (j <= OW)"),
    ("a row not written", "mask=second_row & first_column", "mask=second_row & second_column"),
    ("a window edge in backward", "(offset // D < CELLS)", "(offset // D < CELLS - 1)"),
    ("a window too few in backward", "((ROWS - 1) * DH + SH) // SH", "((ROWS - 1) * DH + SH - 1) // SH"),
    ("a window before the first", "(window >= 0) & (window < OUT)", "(window < OUT)"),
    ("a partial sum", "(p10[k] + p11[k])", "p10[k]"),
    ("windows of zeros get a gradient", "code = tl.where(best == 0, no_cell, code)", "code = code"),
    pytest.param("a wrong mask", "and.b32 t, $3, $4; setp.eq", "and.b32 t, $3, $4; setp.ne", marks=PACKED),
]  # fmt: skip


def load(source, path):
    """The mutated module, as a sibling of the real one."""
    path.write_text(source)
    name = f"fastalex.kernels.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def suite(module):
    """A short form of the tests above: every kernel, once."""
    for window, layout, dtype in [
        ("3x3s2-odd", NHWC, FP16),
        ("3x3s2-even", NCHW, FP32),
        ("3x3s2-padded", NHWC, FP16),
        ("2x2-dilated-padded", NHWC, FP16),
        ("4x3", NCHW, FP32),
        ("5x5-dilated", NCHW, FP16),
    ]:
        size, *arguments = WINDOWS[window]
        x = with_specials((2, 8, *size), dtype, layout)
        x[:, 0] = -torch.inf
        check_forward(module, x, *arguments)
        x = signed((2, 8, *size), dtype, layout)
        check_forward(module, x, *arguments)
        check_backward(module, x, *arguments, bias_partials=True)
        y, codes = module.max_pool_fwd(x.relu(), *arguments, after_relu=True)
        assert torch.equal(codes == geometry.no_cell(*arguments[0]), y == 0)


# On a GPU, too: those that leave a tensor stay within a few KB of it, and --device has borders of 64 KB.
@pytest.mark.parametrize(("what", "line", "broken"), MUTANTS)
def test_the_suite_notices(what, line, broken, tmp_path, monkeypatch):
    original = max_pool if line in Path(max_pool.__file__).read_text() else max_pool_3x3s2
    source = Path(original.__file__).read_text()
    assert line in source
    mutant = load(source.replace(line, broken), tmp_path / "max_pool_mutant.py")
    if INTERPRETING:
        enlarge(mutant, monkeypatch)
    module = mutant
    if original is max_pool_3x3s2:
        module = max_pool
        for name in ("max_pool_bwd_3x3s2", "max_pool_bwd_3x3s2_nchw"):
            monkeypatch.setattr(max_pool, name, getattr(mutant, name))
    # where memory is checked, an access out of bounds is an error before a wrong value can be seen
    with pytest.raises(AssertionError if INTERPRETING else (AssertionError, RuntimeError)):
        suite(module)


def test_the_short_suite_passes_unbroken():
    suite(max_pool)
