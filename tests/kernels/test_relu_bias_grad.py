"""Masked gradient and bias gradient against float64; layouts, mask rule, order of the sums, mutants."""

import pytest
import torch
import triton
import triton.language as tl
from compiling import compiled
from tolerances import assert_matches

from fastalex.kernels import relu_bias_grad as module
from fastalex.kernels.geometry import is_channels_last
from fastalex.kernels.partial_sums import sum_partials
from fastalex.kernels.registers import interpreting
from fastalex.kernels.relu_bias_grad import relu_bias_grad

LAYOUTS = ("channels_last", "contiguous")
SHAPES = [(2, 96, 5, 7), (3, 100, 3, 3), (5, 3, 4, 4), (2, 1, 3, 5), (130, 64), (7, 5), (2, 24, 5), (2, 16, 2, 3, 2)]


def in_layout(x, layout):
    if layout == "contiguous":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sample(shape, dtype=torch.float16, layout="channels_last"):
    y = in_layout(torch.randn(shape).relu().to(dtype), layout)
    return in_layout(torch.randn(shape).to(dtype), layout), y


def check(grad, y, scale=1.0, mask=None):
    """dz and db within the tolerance of float64; `mask` overrides the reference's (mutants)."""
    mask = ~(y <= 0) if mask is None else mask
    expected = torch.where(mask, grad.double() * scale, 0)
    dz, db = relu_bias_grad(grad, y, scale=scale)
    assert dz.dtype == y.dtype
    assert db.dtype == torch.float32
    assert_matches(dz, expected, truncates=y.dtype == torch.bfloat16 and interpreting())
    rest = [d for d in range(y.dim()) if d != 1]
    terms = y.numel() // y.shape[1]
    assert_matches(db, expected.sum(rest), terms=terms, magnitude=expected.abs().sum(rest))
    return dz, db


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, layout, dtype):
    grad, y = sample(shape, dtype, layout)
    dz, _ = check(grad, y)
    assert dz.stride() == y.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale(layout):
    check(*sample((3, 32, 4, 5), layout=layout), scale=1 / 0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_chunks_of_several_tiles(layout, monkeypatch):
    """The walk of one program over its tiles, and more than one row of partial sums."""
    seen = []
    monkeypatch.setattr(module, "sum_partials", lambda p: seen.append(p.shape) or sum_partials(p))
    monkeypatch.setattr(module, "MAX_PARTIALS", 2)
    check(*sample((40, 24, 9, 9), torch.float32, layout))
    assert seen == [(2, 24)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_is_taken_before_rounding(layout):
    """2048 terms of 1/3 in fp16: rounded terms would be off by 2^-12 relative, far beyond the fp32 tolerance."""
    y = in_layout(torch.ones(8, 8, 16, 16, dtype=torch.bfloat16), layout)
    _, db = relu_bias_grad(torch.ones_like(y), y, scale=1 / 3)
    assert_matches(db, torch.full((8,), 2048 / 3, dtype=torch.float64), terms=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_is_torchs(layout):
    """threshold_backward passes the gradient where y is NaN, stops it at both zeros."""
    special = torch.tensor([torch.nan, 0.0, -0.0, -1.0, torch.inf, -torch.inf, 6e-8, 1.0], dtype=torch.float16)
    y = in_layout(special.expand(2, 8, 8).contiguous()[..., None], layout)
    grad = torch.randn_like(y)
    dz, _ = relu_bias_grad(grad, y, bias=False)
    assert torch.equal(dz, torch.ops.aten.threshold_backward(grad, y, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_in_the_gradient(layout):
    grad, y = sample((2, 24, 3, 3), layout=layout)
    y[0, :4, 1, 1] = 1
    y[0, 4:8, 1, 1] = 0
    grad[0, 0:8, 1, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1] * 2)
    _, db = check(grad, y)
    # a stopped gradient does not reach the sum, whatever it was
    assert db[3:].isfinite().all()


def test_without_bias():
    grad, y = sample((2, 24, 3, 3))
    dz, db = relu_bias_grad(grad, y, bias=False)
    assert db is None
    assert torch.equal(dz, relu_bias_grad(grad, y)[0])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 24, -1, -1),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(view, layout):
    grad, y = sample((2, 24, 3, 4), layout=layout)
    dz, _ = check(view(grad), view(y))
    assert dz.is_contiguous() or is_channels_last(dz)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_may_come_in_any_layout(layout):
    grad, y = sample((2, 24, 3, 4), layout=layout)
    dz, db = relu_bias_grad(grad, y)
    for other in LAYOUTS:
        dz_other, db_other = relu_bias_grad(in_layout(grad, other), y)
        assert torch.equal(dz, dz_other)
        assert torch.equal(db, db_other)
    check(torch.ones((), dtype=y.dtype).expand(y.shape), y)


@pytest.mark.parametrize("shape", [(0, 8, 2, 2), (2, 8, 0, 3), (2, 0, 2, 3), (0, 8)])
def test_empty(shape):
    y = torch.zeros(shape)
    dz, db = relu_bias_grad(y, y)
    assert dz.shape == y.shape
    assert torch.equal(db, torch.zeros(shape[1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_are_equal_to_the_bit(layout):
    grad, y = sample((40, 24, 9, 9), torch.float32, layout)
    for first, second in zip(relu_bias_grad(grad, y), relu_bias_grad(grad, y), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("grad", "y", "message"),
    [
        (torch.zeros(4), torch.zeros(4), "2 or more dimensions"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), "y must be fp16, bf16 or fp32, got torch.float64"),
        (torch.zeros(2, 4), torch.zeros(2, 3), r"\(2, 3\) torch.float32, got \(2, 4\)"),
        (torch.zeros(2, 3).half(), torch.zeros(2, 3), "got .* torch.float16"),
    ],
)
def test_refusals(grad, y, message):
    with pytest.raises(ValueError, match=message):
        relu_bias_grad(grad, y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_mask_is_noticed(layout):
    grad, y = sample((2, 24, 3, 3), layout=layout)
    for mask in (torch.ones_like(y, dtype=torch.bool), y > 0.1, y >= 0):
        with pytest.raises(AssertionError, match="elements differ"):
            check(grad, y, mask=mask)


@triton.jit
def unmasked(grad, y, scale):
    return grad.to(tl.float32) * scale


@pytest.mark.skipif(not interpreting(), reason="a compiled kernel keeps the helpers that it was compiled with")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dropped_mask_is_noticed(layout, monkeypatch):
    monkeypatch.setattr(module, "masked", unmasked)
    with pytest.raises(AssertionError, match="elements differ"):
        check(*sample((2, 24, 3, 3), layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dropped_partial_sum_is_noticed(layout, monkeypatch):
    monkeypatch.setattr(module, "sum_partials", lambda partials: sum_partials(partials[1:]))
    monkeypatch.setattr(module, "MAX_PARTIALS", 2)
    with pytest.raises(AssertionError, match="elements differ"):
        check(*sample((40, 24, 9, 9), layout=layout))


def test_partial_sums_are_below_two_percent():
    """Of the compulsory traffic, at AlexNet's shapes with batch 128 in fp16: written once and read once."""
    for channels, side in ((96, 55), (256, 27), (384, 13), (256, 13)):
        for layout in (torch.contiguous_format, torch.channels_last):
            shapes = []
            launch_nothing = {"relu_bias_grad_kernel": Nothing(), "relu_bias_grad_nchw_kernel": Nothing()}
            with pytest.MonkeyPatch.context() as patch:
                for name, kernel in launch_nothing.items():
                    patch.setattr(module, name, kernel)
                patch.setattr(module, "sum_partials", lambda p, shapes=shapes: shapes.append(p.shape))
                y = torch.empty(128, channels, side, side, device="meta", dtype=torch.float16)
                y = y.contiguous(memory_format=layout)
                relu_bias_grad(y, y)
            assert shapes[0].numel() * 8 < 0.02 * 3 * 2 * y.numel()


class Nothing:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def test_compiled_code():
    """64-bit rows, 16-byte accesses in channels-last memory, also for AMD."""
    pointers = {"grad_ptr": "*fp16", "y_ptr": "*fp16", "dz_ptr": "*fp16", "partials_ptr": "*fp32"}
    last = {"rows": "i32", "steps": "i32", "scale": "fp32"}
    nchw = {"images": "i32", "channels": "i32", "plane": "i32", "steps": "i32", "scale": "fp32"}
    rows = ("relu_bias_grad", "relu_bias_grad_kernel", pointers | last, {"channels": 96, "BLOCK_R": 64, "BLOCK_C": 32})
    jobs = {str(target): (*rows, target) for target in (80, 90, 100, "gfx942")}
    jobs["nchw"] = (
        "relu_bias_grad",
        "relu_bias_grad_nchw_kernel",
        pointers | nchw,
        {"BLOCK_N": 2, "BLOCK_P": 1024},
        90,
    )
    builds = compiled(jobs)
    for name in ("80", "90", "100"):
        assert "ld.global.v4.b32" in builds[name]["ptx"]
        assert "st.global.v4.b32" in builds[name]["ptx"]
        assert "ld.global.b16" not in builds[name]["ptx"]
    assert "global_load_dwordx4" in builds["gfx942"]["amdgcn"]
    for name in ("90", "nchw"):
        offsets = [line for line in builds[name]["ttir"].splitlines() if "tt.addptr" in line and "ptr<f16>" in line]
        assert len([line for line in offsets if "xi64>" in line]) >= 3
