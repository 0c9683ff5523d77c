"""The fused LRN + max-pool against the float64 formulas, and its values against those of the two operators apart."""

import importlib.util
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from tolerances import UNIT_ROUNDOFF, assert_matches

from fastalex import reference
from fastalex.kernels import geometry
from fastalex.kernels import lrn_max_pool as fused
from fastalex.kernels import lrn_max_pool_backward as backward
from fastalex.kernels.lrn import lrn_fwd
from fastalex.kernels.lrn_max_pool import ForwardConfig
from fastalex.kernels.lrn_max_pool_backward import BackwardConfig
from fastalex.kernels.registers import interpreting

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CODES = torch.tensor([[geometry.cell_code(r, s, 3, 3) for s in range(3)] for r in range(3)], dtype=torch.int8)
NO_CELL = geometry.no_cell(3, 3)
# alpha far above AlexNet's 1e-4, so that a wrong window changes more than the last bit
ALPHA, BETA, K = 0.3, 0.75, 2.0
# The interpreter is fastest with few large programs; compiled kernels run as they ship.
WARPS = 32 if interpreting() else 1
interpreter_only = pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")

# size, channels, groups, height, width, output rows per item (forward), row pairs (backward)
CASES = {
    "size1": (1, 8, 1, 3, 3, 1, 1),
    "size2-groups": (2, 32, 2, 8, 5, 2, 2),
    "size3": (3, 24, 1, 4, 6, 1, 1),
    "size4-groups": (4, 48, 2, 5, 12, 2, 3),
    "size5": (5, 96, 1, 7, 9, 2, 1),
    "size5-groups": (5, 256, 2, 3, 4, 1, 1),
    "size6": (6, 16, 1, 6, 7, 9, 3),
    "size7": (7, 24, 3, 5, 5, 1, 1),
    "size8": (8, 32, 2, 7, 3, 2, 2),
    "size9": (9, 40, 1, 5, 6, 2, 1),
}
cases = pytest.mark.parametrize("case", list(CASES))
kinds = pytest.mark.parametrize(
    ("dtype", "after_relu"),
    [
        (FP16, True),
        (FP16, False),
        (BF16, True),
        (BF16, False),
        (FP32, False),
        pytest.param(FP32, True, marks=pytest.mark.slow),
    ],
)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def is_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


def activations(shape, dtype, after_relu, scale=3.0):
    x = (torch.randn(shape) * scale).to(dtype)
    return last(x.relu() if after_relu else x)


def codes_of(values, after_relu, last_nan=True):
    """The codes of max_pool2d(values, 3, 2), where the last NaN of a window beats everything, or the first."""
    pooled, index = reference.max_pool2d(values.double(), 3, 2, return_indices=True)
    width = values.shape[3]
    row = index // width - 2 * torch.arange(pooled.shape[2])[:, None]
    column = index % width - 2 * torch.arange(pooled.shape[3])
    codes = CODES[row, column]
    if not last_nan:
        codes = torch.where(pooled.isnan(), codes_of(values.isnan(), False), codes)
    return torch.where(pooled == 0, NO_CELL, codes).to(torch.int8) if after_relu else codes


# what the checks below run: the launchers, or copies of them with a mistake
BOTH = SimpleNamespace(lrn_max_pool_fwd=fused.lrn_max_pool_fwd, lrn_max_pool_bwd=backward.lrn_max_pool_bwd)


def check_forward(x, size, *, groups=1, after_relu=False, config=None, alpha=ALPHA, beta=BETA, k=K, module=BOTH):
    """y against float64; y and codes against the values of the LRN kernel, pooled by comparing alone: no tolerance.

    Compiled, the two kernels may contract different products and sums into fma: there the codes are compared where
    the values are equal.
    """
    args = (size, alpha, beta, k)
    y, codes = module.lrn_max_pool_fwd(x, *args, groups=groups, after_relu=after_relu, config=config)
    exact = reference.lrn_max_pool2d(x.double(), *args, groups=groups)
    assert_matches(y, exact, terms=size, truncates=x.dtype == BF16 and interpreting())
    values = lrn_fwd(x, *args, groups=groups)
    pooled = reference.max_pool2d(values.double(), 3, 2)
    equal = (y == pooled) | (y.isnan() & pooled.isnan())
    assert equal.all() or not interpreting()
    packed = after_relu and x.dtype != FP32
    expected_codes = codes_of(values, after_relu, last_nan=not packed)
    torch.testing.assert_close(codes[equal], expected_codes[equal], rtol=0, atol=0)
    assert y.dtype == x.dtype
    assert is_last(y)
    assert is_last(codes)
    return y, codes


def window_sum(v, below, above, groups):
    """Sums over the channels [c - below, c + above] inside each group."""
    v = v.unflatten(1, (groups, -1)).movedim(2, -1)
    v = torch.nn.functional.pad(v, (below, above)).unfold(-1, below + 1 + above, 1).sum(-1)
    return v.movedim(-1, 2).flatten(1, 2)


def expected_gradient(x, grad, size, *, groups, after_relu, alpha, beta, k):
    """dx by autograd in float64, and the sum of the absolute values that it is made of."""
    wide = x.double().requires_grad_()
    y = reference.lrn_max_pool2d(wide, size, alpha, beta, k, groups=groups)
    (dx,) = torch.autograd.grad(y, wide, grad.double())
    if after_relu:
        dx = dx * (x > 0)
    wide = x.double()
    values = reference.local_response_norm(wide, size, alpha, beta, k, groups=groups).requires_grad_()
    (g,) = torch.autograd.grad(reference.max_pool2d(values, 3, 2), values, grad.double().abs())
    below, above = size // 2, (size - 1) // 2
    d = k + alpha / size * window_sum(wide**2, below, above, groups)
    t = g * wide.abs() * d ** (-beta - 1)
    return dx, g * d**-beta + 2 * alpha * beta / size * wide.abs() * window_sum(t, above, below, groups)


def clear_winners(x, size, *, groups, after_relu, alpha, beta, k):
    """1 where rounding cannot change which cell of a window is the largest, else 0; a window of zeros is clear."""
    values = reference.local_response_norm(x.double(), size, alpha, beta, k, groups=groups)
    cells = values.unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2)
    first, second = cells.topk(2).values.unbind(-1)
    return ((first - second > 6 * UNIT_ROUNDOFF[x.dtype] * first.abs()) | (first == 0) & after_relu).to(x.dtype)


def check_backward(
    x, size, *, groups=1, after_relu=False, config=None, bias_partials=False, alpha=ALPHA, beta=BETA, k=K, module=BOTH
):
    """dx and the bias gradient against autograd in float64; no gradient enters where rounding may decide the winner."""
    args = (size, alpha, beta, k)
    kw = {"groups": groups, "after_relu": after_relu}
    _, codes = module.lrn_max_pool_fwd(x, *args, **kw)
    clear = clear_winners(x, groups=groups, after_relu=after_relu, size=size, alpha=alpha, beta=beta, k=k)
    assert clear.mean(dtype=torch.float64) > 0.5
    grad = torch.randn(codes.shape).to(x.dtype) * clear
    dx, magnitude = expected_gradient(x, grad, size, alpha=alpha, beta=beta, k=k, **kw)
    got = module.lrn_max_pool_bwd(grad, codes, x, *args, groups=groups, bias_partials=bias_partials, config=config)
    if bias_partials:
        got, partials = got
        assert partials.dtype == FP32
        assert partials.shape[1] == x.shape[1]
        assert_matches(
            partials.double().sum(0).float(),
            dx.sum((0, 2, 3)),
            terms=x[:, 0].numel() + size,
            magnitude=magnitude.sum((0, 2, 3)),
        )
    assert_matches(got, dx, terms=size + 4, magnitude=magnitude, truncates=x.dtype == BF16 and interpreting())
    assert is_last(got)


@cases
@kinds
def test_forward(case, dtype, after_relu):
    size, channels, groups, height, width, rows, _ = CASES[case]
    x = activations((2, channels, height, width), dtype, after_relu)
    config = ForwardConfig(rows, WARPS)
    y, _ = check_forward(x, size, groups=groups, after_relu=after_relu, config=config)
    values, none = fused.lrn_max_pool_fwd(x, size, ALPHA, BETA, K, groups=groups, codes=False, config=config)
    assert none is None
    if interpreting():
        assert torch.equal(values, y)
    else:  # two kernels, which may contract different products and sums into fma
        exact = reference.lrn_max_pool2d(x.double(), size, ALPHA, BETA, K, groups=groups)
        assert_matches(values, exact, terms=size)


@cases
@kinds
def test_backward(case, dtype, after_relu):
    size, channels, groups, height, width, _, rows = CASES[case]
    x = activations((2, channels, height, width), dtype, after_relu)
    config = BackwardConfig(rows, WARPS)
    check_backward(x, size, groups=groups, after_relu=after_relu, config=config, bias_partials=rows > 1)


@pytest.mark.parametrize("beta", [0.5, 1.0, 0.6])
def test_other_exponents(beta):
    x = activations((1, 16, 5, 5), FP16, True)
    check_forward(x, 5, beta=beta, k=1.5, after_relu=True)
    check_backward(x, 5, beta=beta, k=1.5, after_relu=True)


def test_default_configs():
    x = activations((3, 16, 9, 8), FP16, True)
    check_forward(x, 5, after_relu=True)
    check_backward(x, 5, after_relu=True, bias_partials=True)


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("after_relu", [True, False])
def test_ties_go_to_the_first_cell_and_empty_windows_die(dtype, after_relu):
    # Three values that all channels of a pixel share: most windows tie.  Whole windows of zeros are among them.
    x = torch.randint(0, 3, (4, 1, 9, 9)).expand(4, 16, 9, 9).to(dtype)
    x[:, :, :5, :5] = 0
    x = last(x)
    y, codes = check_forward(x, 5, after_relu=after_relu, config=ForwardConfig(2, WARPS))
    zero = y == 0
    assert zero.any()
    assert (codes[zero] == (NO_CELL if after_relu else CODES[0, 0])).all()
    if after_relu:
        grad = torch.ones_like(y)
        dx = backward.lrn_max_pool_bwd(grad, codes, x, 5, ALPHA, BETA, K)
        assert (dx[x == 0] == 0).all()
        # each living window sends its gradient to one pixel: with alpha = 0, LRN is a factor of k**-beta
        dx = backward.lrn_max_pool_bwd(grad, codes, x, 5, 0.0, 0.5, 4.0)
        assert dx.sum() == 0.5 * (~zero).sum()


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("after_relu", [True, False])
def test_nan_and_infinity(dtype, after_relu):
    x = activations((1, 16, 9, 9), dtype, after_relu)
    x[0, 3, 4, 4] = torch.nan
    x[0, 4, 3, 3] = torch.nan
    x[0, 9, 6, 6] = torch.inf
    if not after_relu:
        x[0, 12, 1, 1] = -torch.inf
        x[0, 13, 2, 2] = -torch.nan
    y, codes = check_forward(x, 5, after_relu=after_relu, config=ForwardConfig(2, WARPS))
    assert y.isnan().any()
    assert not y.isnan().all()
    assert not (codes[y.isnan()] == NO_CELL).any()


@pytest.mark.parametrize("alpha", [1e-4, 1.0])
def test_large_fp16_values_do_not_overflow(alpha):
    """The squares of 6e4 exceed fp16 by far; eager PyTorch returns 0 from |x| = 256 on."""
    x = activations((1, 16, 7, 7), FP16, True).clamp(max=1) * 6e4
    check_forward(x, 5, after_relu=True, alpha=alpha)
    check_backward(x, 5, after_relu=True, alpha=alpha)


def test_layouts():
    """Strided and expanded x and grad give what their dense copies give, bit for bit."""
    dense = activations((2, 16, 7, 9), FP16, True)
    y, codes = fused.lrn_max_pool_fwd(dense, 5, ALPHA, BETA, K, after_relu=True)
    grad = torch.randn_like(y)
    dx = backward.lrn_max_pool_bwd(grad, codes, dense, 5, ALPHA, BETA, K)

    strided = last(torch.zeros((2, 16, 7, 18), dtype=FP16))[..., ::2]
    strided.copy_(dense)
    y2, codes2 = fused.lrn_max_pool_fwd(strided, 5, ALPHA, BETA, K, after_relu=True)
    dx2 = backward.lrn_max_pool_bwd(grad.contiguous(), codes2.contiguous(), strided, 5, ALPHA, BETA, K)
    assert torch.equal(y, y2)
    assert torch.equal(codes, codes2)
    assert torch.equal(dx, dx2)
    assert is_last(y2)
    assert is_last(dx2)

    one = dense[:1].expand(3, -1, -1, -1)
    y3, codes3 = fused.lrn_max_pool_fwd(one, 5, ALPHA, BETA, K, after_relu=True)
    assert torch.equal(y3, y[:1].expand_as(y3))
    dx3 = backward.lrn_max_pool_bwd(grad[:1].expand_as(y3), codes3, one, 5, ALPHA, BETA, K)
    assert torch.equal(dx3, dx[:1].expand_as(dx3))


def test_two_runs_are_bit_equal():
    x = activations((2, 16, 9, 9), FP16, True)
    grad = torch.randn(2, 16, 4, 4).half()
    runs = []
    for _ in range(2):
        y, codes = fused.lrn_max_pool_fwd(x, 5, ALPHA, BETA, K, after_relu=True)
        runs.append((y, codes, *backward.lrn_max_pool_bwd(grad, codes, x, 5, ALPHA, BETA, K, bias_partials=True)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_empty_batch():
    x = last(torch.zeros((0, 16, 7, 9), dtype=FP16))
    y, codes = fused.lrn_max_pool_fwd(x, 5, ALPHA, BETA, K)
    assert y.shape == codes.shape == (0, 16, 3, 4)
    dx, partials = backward.lrn_max_pool_bwd(y, codes, x, 5, ALPHA, BETA, K, bias_partials=True)
    assert dx.shape == x.shape
    assert partials.sum(0).tolist() == [0.0] * 16


@pytest.mark.parametrize(
    ("shape", "dtype", "arguments", "word"),
    [
        ((2, 16, 7, 7), FP16, {}, None),
        ((2, 16, 7, 7), FP16, {"size": 9, "groups": 2}, None),
        ((1, 4, 3, 3), FP32, {}, None),
        ((8, 7, 7), FP16, {}, "dimensions"),
        ((2, 16, 7, 7), torch.float64, {}, "float64"),
        ((2, 16, 7, 7), FP16, {"size": 10}, "size"),
        ((2, 16, 7, 7), FP16, {"size": 0}, "size"),
        ((2, 16, 7, 7), FP16, {"groups": 4}, "groups"),
        ((2, 16, 7, 7), FP16, {"groups": 0}, "groups"),
        ((1, 12, 7, 7), FP16, {}, "multiple of 8"),
        ((1, 16, 2, 7), FP16, {}, "2x7"),
        ((1, 2**15, 2**8, 2**8), FP16, {}, "2^31"),
        ((2, 16, 7, 7), FP16, {"kernel_size": (3, 2)}, "kernel_size"),
        ((2, 16, 7, 7), FP16, {"stride": (1, 1)}, "stride"),
        ((2, 16, 7, 7), FP16, {"layout": torch.contiguous_format}, "channels_last"),
    ],
)
def test_unsupported(shape, dtype, arguments, word):
    x = torch.empty(shape, dtype=dtype, device="meta")
    layout = arguments.pop("layout", torch.channels_last) if x.dim() == 4 else torch.contiguous_format
    reason = fused.unsupported(x.contiguous(memory_format=layout), **{"size": 5, **arguments})
    assert reason is None if word is None else word in reason


def test_bad_arguments():
    x = last(torch.zeros((1, 16, 7, 7), dtype=FP16))
    with pytest.raises(ValueError, match="not channels_last"):
        fused.lrn_max_pool_fwd(x.contiguous(), 5, ALPHA, BETA, K)
    y, codes = torch.zeros((1, 16, 3, 3), dtype=FP16), torch.zeros((1, 16, 3, 3), dtype=torch.int8)
    with pytest.raises(ValueError, match="size is 11"):
        fused.lrn_max_pool_fwd(x, 11, ALPHA, BETA, K)
    with pytest.raises(ValueError, match="3 groups"):
        backward.lrn_max_pool_bwd(y, codes, x, 5, ALPHA, BETA, K, groups=3)
    with pytest.raises(ValueError, match=r"grad must be \(1, 16, 3, 3\)"):
        backward.lrn_max_pool_bwd(x, codes, x, 5, ALPHA, BETA, K)
    with pytest.raises(ValueError, match=r"in torch\.float16, got \(1, 16, 3, 3\) in torch\.float32"):
        backward.lrn_max_pool_bwd(y.float(), codes, x, 5, ALPHA, BETA, K)
    with pytest.raises(ValueError, match=r"codes must be .* in torch\.int8, got .* in torch\.float16"):
        backward.lrn_max_pool_bwd(y, y, x, 5, ALPHA, BETA, K)
    with pytest.raises(ValueError, match=r"config\.rows must divide the 4"):
        backward.lrn_max_pool_bwd(y, codes, x, 5, ALPHA, BETA, K, config=BackwardConfig(rows=3))


@pytest.mark.parametrize("batch", [1, 16, 128, 1024])
@pytest.mark.parametrize(("chunks", "height"), [(12, 55), (32, 27), (1, 3), (5, 26)])
def test_configs(batch, chunks, height):
    out = (height - 3) // 2 + 1
    forward = fused.forward_config(batch, chunks, out, out)
    items = batch * chunks * out * triton.cdiv(out, forward.rows)
    finest = batch * chunks * out * out
    assert items >= min(32 * fused.ENOUGH_WARPS, finest)
    pairs = triton.cdiv(height, 2)
    assert backward.backward_config(batch, chunks, height, height, 2, False).rows == 1
    rows = backward.backward_config(batch, chunks, height, height, 2, True).rows
    assert pairs % rows == 0
    moved = batch * chunks * 8 * (2 * 2 * height**2 + 3 * out**2)

    def items(rows):
        return batch * chunks * pairs * (pairs // rows)

    # the partials are small, or a coarser cut would leave the device idle
    coarser = next((d for d in range(rows + 1, pairs + 1) if pairs % d == 0), None)
    small = items(rows) * 8 * 4 <= 1.01 * backward.PARTIALS_SHARE * moved
    assert small or coarser is None or items(coarser) < 32 * backward.ENOUGH_WARPS
    if (chunks, height) in ((12, 55), (32, 27)) and batch >= 128:
        assert small


class Reserved:
    """`elements` of address space on either side of a pointer; only the pages that are written take memory."""

    def __init__(self, dtype, elements):
        self.dtype = dtype
        self.half = -(-elements * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        # MAP_NORESERVE has a name from Python 3.13 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self.memory = mmap.mmap(-1, 2 * self.half, flags=flags)

    def at(self, index, count=1):
        offset = self.half + index * self.dtype.itemsize
        return torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=offset)


@interpreter_only
def test_more_than_2_31_elements(monkeypatch):
    """The last image of a batch of more than 2^31 elements; an offset that wraps around would find zeros."""
    x = activations((1, 8, 3, 3), FP16, True)
    y, codes = fused.lrn_max_pool_fwd(x, 5, ALPHA, BETA, K, after_relu=True)
    grad = torch.randn_like(y)
    dx = backward.lrn_max_pool_bwd(grad, codes, x, 5, ALPHA, BETA, K)

    batch = 2**31 // x.numel() + 1000
    final = batch - 1
    big = {
        name: Reserved(t.dtype, batch * t.numel())
        for name, t in {"x": x, "y": y, "codes": codes, "grad": grad, "dx": dx}.items()
    }
    for name, t in {"x": x, "grad": grad}.items():
        big[name].at(final * t.numel(), t.numel()).copy_(t.permute(0, 2, 3, 1).flatten())
    pointers = {name: reserved.at(0) for name, reserved in big.items()}

    # one program runs, of 32 items (forward) or one warp (backward): the one that holds the last item
    interpreter = triton.runtime.interpreter
    program = 0
    monkeypatch.setattr(
        interpreter.interpreter_builder,
        "create_get_program_id",
        lambda axis: interpreter.TensorHandle(np.array([program], dtype=np.int32), tl.int32),
    )
    shared = fused.constants(x, 5, ALPHA, BETA, K, 1)
    program = (batch - 1) // 32
    fused.lrn_max_pool_fwd_kernel[(1,)](
        *(pointers[name] for name in ("x", "y", "codes")),
        batch,
        1,
        **shared,
        AFTER_RELU=True,
        MODE="packed",
        BLOCK=32,
    )
    items = batch * 2 * 2
    program = (items - 1) // 30
    backward.lrn_max_pool_bwd_kernel[(1,)](
        *(pointers[name] for name in ("grad", "codes", "x", "dx", "dx")),
        items,
        **shared,
        PARTIALS=False,
        ROWS=1,
        WARPS=1,
        LANES=32,
    )
    for name, t in {"y": y, "codes": codes, "dx": dx}.items():
        assert torch.equal(big[name].at(final * t.numel(), t.numel()), t.permute(0, 2, 3, 1).flatten()), name


def tied():
    """Most windows have several maxima or none but zeros."""
    x = torch.randint(0, 2, (2, 1, 9, 9)).expand(2, 16, 9, 9).half()
    return x.contiguous(memory_format=torch.channels_last)


def any_sign():
    return activations((2, 16, 7, 7), FP16, False)


MUTATIONS = {
    "nothing": ("", "", None),
    "alpha for alpha/n": (
        "float(alpha) / size",
        "float(alpha)",
        lambda m: check_forward(any_sign(), 5, module=m),
    ),
    "even window on the wrong side": (
        "x_ptr, channel, BELOW, (SIZE - 1) // 2, N, GROUP",
        "x_ptr, channel, (SIZE - 1) // 2, BELOW, N, GROUP",
        lambda m: check_forward(any_sign(), 4, module=m),
    ),
    "no halo": (
        "load_window(x_ptr, channel, BELOW, (SIZE - 1) // 2, N, GROUP_CHANNELS)",
        "load_window(x_ptr, channel * 0, BELOW, (SIZE - 1) // 2, N, N)",
        lambda m: check_forward(any_sign(), 5, module=m),
    ),
    "windows across groups": (
        "cv * VEC % GROUP_CHANNELS",
        "cv * VEC % C",
        lambda m: check_forward(activations((1, 16, 5, 5), FP16, False), 5, groups=2, module=m),
    ),
    "last maximum wins": (
        "second[0] > first[0]",
        "second[0] >= first[0]",
        lambda m: check_forward(tied(), 5, module=m),
    ),
    "later cell wins, packed": (
        "return (c[0] + BITS,)",
        "return (c[0],)",
        lambda m: check_forward(tied(), 5, after_relu=True, config=ForwardConfig(2, WARPS), module=m),
    ),
    "comparison before rounding": (
        "y.to(DTYPE).to(tl.float32)",
        "y",
        lambda m: check_forward(any_sign() * 0.01 + 3, 5, module=m),
    ),
    "NaN loses": (
        " | (second[0] != second[0])",
        "",
        lambda m: check_forward(last(any_sign().masked_fill(any_sign() > 4, torch.nan)), 5, module=m),
    ),
    "no code of no cell": (
        "tl.where(c[0] < 0x10000, NO_CELL, ~c[0] & NO_CELL)",
        "~c[0] & NO_CELL",
        lambda m: check_backward((any_sign() - 4).relu(), 5, after_relu=True, module=m),
    ),
    "adjoint window not mirrored": (
        "with_neighbours(ts, channel, ABOVE, BELOW, N",
        "with_neighbours(ts, channel, BELOW, ABOVE, N",
        lambda m: check_backward(any_sign(), 4, module=m),
    ),
    "no halo of the terms": (
        "tl.where(channel > 0, tl.gather(t[i], previous, 1), 0.0)",
        "0.0 * t[i]",
        lambda m: check_backward(any_sign(), 5, module=m),
    ),
    "terms across groups": (
        "tl.where(channel < GROUP_CHANNELS - N, tl.gather(t[i], following, 1), 0.0)",
        "tl.gather(t[i], following, 1)",
        lambda m: check_backward(any_sign(), 5, groups=2, module=m),
    ),
    "half the indirect gradient": (
        "(2 * SCALE * BETA)",
        "(SCALE * BETA)",
        lambda m: check_backward(any_sign(), 5, module=m),
    ),
    "feeding lanes counted": (
        "4, mine)",
        "4)",
        lambda m: check_backward(any_sign(), 5, bias_partials=True, module=m),
    ),
}


@interpreter_only
@pytest.mark.parametrize("mutation", list(MUTATIONS))
def test_mutations_turn_the_checks_red(mutation, tmp_path, monkeypatch):
    """Each check above, on a copy of the kernels with one mistake in it."""
    old, new, check = MUTATIONS[mutation]
    module = SimpleNamespace()
    original = backward if old and old not in Path(fused.__file__).read_text() else fused
    for real, launcher in ((fused, "lrn_max_pool_fwd"), (backward, "lrn_max_pool_bwd")):
        source = Path(real.__file__).read_text()
        if real is original and old:
            assert old in source
            source = source.replace(old, new)
        path = tmp_path / f"mutant_{launcher}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"fastalex.kernels.mutant_{launcher}", path)
        mutant = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, mutant)
        spec.loader.exec_module(mutant)
        setattr(module, launcher, getattr(mutant, launcher))
    if check is None:
        for _, _, check in list(MUTATIONS.values())[1:]:
            check(module)
    else:
        with pytest.raises(AssertionError):
            check(module)
