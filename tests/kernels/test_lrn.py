"""LRN kernels against the float64 formula, elementwise; windows, layouts, borders, extremes, mutants."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from compiling import compiled
from tolerances import assert_matches

from fastalex import reference
from fastalex.kernels import lrn
from fastalex.kernels.geometry import is_channels_last
from fastalex.kernels.lrn import lrn_bwd, lrn_fwd
from fastalex.kernels.registers import interpreting

LAYOUTS = ("channels_last", "contiguous")
KERNELS = ("channels_last", "nchw", "any_window")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PAPER = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
# d varies by large factors: a wrong window, scale or exponent moves every element
STEEP = {"size": 5, "alpha": 2.0, "beta": 0.75, "k": 1.5}


def in_layout(x, layout):
    if layout == "contiguous":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sample(shape, dtype=torch.float16, layout="channels_last", scale=2.0):
    x = in_layout((torch.randn(shape) * scale).to(dtype), layout)
    return x, in_layout(torch.randn(shape).to(dtype), layout)


def window_sums(v, below, above, groups):
    v = F.pad(v.unflatten(1, (groups, -1)).movedim(2, -1), (below, above))
    return v.unfold(-1, below + 1 + above, 1).sum(-1).movedim(-1, 2).flatten(1, 2)


def magnitude_of_gradient(grad, x, size, alpha, beta, k, groups=1):
    """The sum of the absolute values that were added up for dx."""
    below, above = size // 2, (size - 1) // 2
    d = k + alpha / size * window_sums(x.square(), below, above, groups)
    terms = (grad * x).abs() * d ** (-beta - 1)
    neighbours = window_sums(terms, above, below, groups)
    return grad.abs() * d**-beta + 2 * beta * alpha / size * x.abs() * neighbours


def check(x, grad, size, alpha, beta, k, groups=1, truth=None):
    """Both passes within the tolerance of float64; `truth` overrides parameters of the reference (mutants)."""
    given = {"size": size, "alpha": alpha, "beta": beta, "k": k, "groups": groups}
    wide = x.detach().double().requires_grad_()
    expected = reference.local_response_norm(wide, **(given | (truth or {})))
    (gradient,) = torch.autograd.grad(expected, wide, grad.double())
    truncates = x.dtype == torch.bfloat16 and interpreting()

    y = lrn_fwd(x, **given)
    dx = lrn_bwd(grad, x, **given)
    assert y.dtype == dx.dtype == x.dtype
    assert_matches(y, expected.detach(), terms=size, truncates=truncates)
    magnitude = magnitude_of_gradient(grad.double(), x.double(), **given)
    # the window of squares and the window of terms
    assert_matches(dx, gradient, terms=2 * size, magnitude=magnitude, truncates=truncates)
    return y, dx


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15])
def test_windows(size, layout, dtype):
    x, grad = sample((2, 24, 2, 3), dtype, layout)
    y, dx = check(x, grad, **(STEEP | {"size": size}))
    assert y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [30, 41])
def test_windows_beyond_the_registers(size, layout):
    x, grad = sample((1, 40, 2, 2), torch.float16, layout)
    check(x, grad, **(STEEP | {"size": size}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 8, 24, 96, 100, 256])
def test_channels(channels, layout, dtype):
    x, grad = sample((1, channels, 1, 3), dtype, layout)
    check(x, grad, **STEEP)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "groups", "size"), [(48, 2, 5), (24, 3, 4), (200, 2, 9), (12, 4, 5), (60, 2, 25)])
def test_groups(channels, groups, size, layout):
    x, grad = sample((2, channels, 1, 3), torch.float16, layout)
    check(x, grad, **(STEEP | {"size": size}), groups=groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 24, 5), (2, 24, 2, 3, 2)])
def test_dimensions(shape, layout):
    x, grad = sample(shape, torch.float16, layout)
    y, dx = check(x, grad, **STEEP)
    assert y.stride() == dx.stride() == x.stride()


def test_channels_last_3d():
    x = torch.randn(2, 16, 2, 3, 2, dtype=torch.float16).to(memory_format=torch.channels_last_3d)
    y, dx = check(x, torch.randn_like(x), **STEEP)
    for out in (y, dx):
        assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beta", [0.5, 1.0, 0.6, 2.0, 0.0])
def test_exponents(beta, layout):
    x, grad = sample((2, 24, 2, 2), torch.float32, layout)
    check(x, grad, size=5, alpha=0.7, beta=beta, k=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_programs_and_a_partial_last_one(layout):
    x, grad = sample((3, 96, 5, 9), torch.float16, layout)
    check(x, grad, **PAPER)


@pytest.mark.parametrize("alpha", [1e-4, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_squares_beyond_fp16(layout, alpha):
    x, grad = sample((1, 24, 2, 2), torch.float16, layout)
    x = (x.sign() * torch.empty(x.shape).uniform_(2e4, 6e4)).half()
    check(in_layout(x, layout), grad, size=5, alpha=alpha, beta=0.75, k=1.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [5, 20])
def test_nan_and_infinity_reach_their_windows_only(value, layout, size):
    x, grad = sample((1, 48, 1, 3), torch.float16, layout)
    x[0, 8, 0, 1] = value
    y, _ = check(x, grad, **(STEEP | {"size": size}))
    assert y[..., 0].isfinite().all()
    assert y[..., 2].isfinite().all()
    below, above = size // 2, (size - 1) // 2
    reached = torch.zeros(48, dtype=torch.bool)
    reached[max(0, 8 - above) : 8 + below + 1] = True
    # numbers over an infinite denominator are zero
    assert torch.equal(~y[0, :, 0, 1].isfinite() | (y[0, :, 0, 1] == 0), reached)


def test_nan_in_the_gradient():
    x, grad = sample((1, 24, 1, 2))
    grad[0, 9, 0, 1] = torch.nan
    check(x, grad, **PAPER)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, 8:],
        lambda x: x[:, :, 1:],
        lambda x: x[..., ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x.flip(0)[1:],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 24, -1, -1),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(view, layout):
    x, grad = sample((2, 24, 3, 4), torch.float16, layout)
    x, grad = view(x), view(grad)
    before = x.clone()
    y, dx = check(x, grad, **STEEP)
    assert torch.equal(x, before)
    for out in (y, dx):
        assert out.is_contiguous() or is_channels_last(out)


def test_a_view_keeps_the_nearer_layout():
    x, _ = sample((2, 24, 3, 4))
    assert is_channels_last(lrn_fwd(x[:, :, 1:], **PAPER))
    assert is_channels_last(lrn_fwd(x[:, 8:], **PAPER))
    assert lrn_fwd(x.contiguous()[:, :, 1:], **PAPER).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_may_come_in_any_layout(layout):
    x, grad = sample((2, 24, 2, 3), torch.float16, layout)
    expected = lrn_bwd(grad, x, **STEEP)
    for other in LAYOUTS:
        assert torch.equal(lrn_bwd(in_layout(grad, other), x, **STEEP), expected)
    ones = torch.ones((), dtype=x.dtype).expand(x.shape)
    assert torch.equal(lrn_bwd(ones, x, **STEEP), lrn_bwd(ones.contiguous(), x, **STEEP))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 8, 2, 2), (2, 8, 0, 3), (2, 0, 2, 3), (2, 8, 0)])
def test_empty(shape, layout):
    x, grad = sample(shape, torch.float16, layout)
    for out in (lrn_fwd(x, **PAPER), lrn_bwd(grad, x, **PAPER)):
        assert out.shape == x.shape
        assert out.dtype == x.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [5, 20])
def test_two_runs_are_equal_to_the_bit(layout, size):
    x, grad = sample((2, 48, 3, 3), torch.float32, layout)
    arguments = PAPER | {"size": size}
    assert torch.equal(lrn_fwd(x, **arguments), lrn_fwd(x, **arguments))
    assert torch.equal(lrn_bwd(grad, x, **arguments), lrn_bwd(grad, x, **arguments))


def test_one_launch_a_pass(monkeypatch):
    """Small windows and large ones alike: nothing but the kernel reads x."""
    for direction in (lrn.FORWARD, lrn.BACKWARD):
        for shape, size in (((2, 24, 2, 2), 5), ((2, 24, 2, 2), 15), ((2, 64, 2, 2), 33)):
            launches = []
            counting = replace(direction, **dict.fromkeys(KERNELS, Recorder(launches)))
            x = torch.zeros(shape)
            lrn.launch(counting, (x, x), size, 1e-4, 0.75, 1.0, 1)
            assert len(launches) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"3 or more dimensions.*\(4, 8\)"),
        ({"x": torch.zeros(4, 8, 2, 2, dtype=torch.float64)}, "fp16, bf16 or fp32, got torch.float64"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"groups": 3}, "divide the 8 channels of x, got 3"),
        ({"groups": 0}, "got 0"),
    ],
)
def test_refusals(arguments, message):
    given = {"x": torch.zeros(4, 8, 2, 2)} | PAPER | arguments
    with pytest.raises(ValueError, match=message):
        lrn_fwd(**given)
    with pytest.raises(ValueError, match=message):
        lrn_bwd(torch.zeros_like(given["x"]), **given)


def test_a_gradient_of_another_shape_or_dtype_is_refused():
    x = torch.zeros(2, 8, 3, 3)
    with pytest.raises(ValueError, match=r"grad must have.*\(2, 8, 3, 3\).*got \(2, 8, 3, 1\)"):
        lrn_bwd(torch.zeros(2, 8, 3, 1), x, **PAPER)
    with pytest.raises(ValueError, match=r"got .* torch.float16"):
        lrn_bwd(x.half(), x, **PAPER)


# ---- mutants: each must turn the checks above red


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "truth",
    [
        {"size": 4},  # wrong window edge above
        {"size": 6, "alpha": STEEP["alpha"] * 6 / 5},  # below
        {"alpha": STEEP["alpha"] * 5},  # alpha for alpha/n
        {"beta": 0.7},
        {"k": 1.6},
        {"groups": 3},  # no halo between vectors of 8
        {"groups": 6},  # nor of 4
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_wrong_formula_is_noticed(truth, layout, dtype):
    x, grad = sample((2, 24, 2, 2), dtype, layout)
    with pytest.raises(AssertionError, match="elements differ"):
        check(x, grad, **STEEP, truth=truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_across_groups_is_noticed(layout):
    x, grad = sample((2, 24, 2, 2), torch.float16, layout)
    with pytest.raises(AssertionError, match="elements differ"):
        check(x, grad, **STEEP, groups=3, truth={"groups": 1})


@triton.jit
def without_the_last(q, N: tl.constexpr, SIZE: tl.constexpr):
    out = ()
    for i in tl.static_range(N):
        total = q[i]
        for j in tl.static_range(1, SIZE - 1):
            total = total + q[i + j]
        out = out + (total,)
    return out


@triton.jit
def without_halo(ptr, channel, BELOW: tl.constexpr, ABOVE: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr):
    x = lrn.load_channels(ptr, channel, 0, N, CHANNELS, CHANNELS % N != 0)
    nothing = ()
    for _ in tl.static_range(BELOW):
        nothing = nothing + (x[0] * 0,)
    return nothing + x + nothing


@triton.jit
def without_mask(ptr, first, START, STOP, N: tl.constexpr, PLANE: tl.constexpr, CHANNELS: tl.constexpr):
    out = ()
    for i in tl.static_range(START, STOP):
        c = tl.minimum(tl.maximum(first + i, 0), CHANNELS - 1)
        out = out + (tl.load(ptr + (c - first) * PLANE).to(tl.float32),)
    return out


@triton.jit
def undivided(x, N: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr, K: tl.constexpr):
    return real_denominators(x, N, SIZE, SCALE * SIZE, K)


@triton.jit
def wrong_exponent(g, x, d, BETA: tl.constexpr, ASM: tl.constexpr):
    u = g * lrn.inverse_power(d, BETA, ASM)
    return u, u * x


@triton.jit
def shifted_by_one(t, channel, BELOW: tl.constexpr, ABOVE: tl.constexpr, CHANNELS: tl.constexpr):
    return real_shifted_sums(t, channel + 1, BELOW, ABOVE, CHANNELS)


real_denominators = lrn.denominators
real_shifted_sums = lrn.shifted_sums


@pytest.mark.skipif(not interpreting(), reason="a compiled kernel keeps the helpers that it was compiled with")
@pytest.mark.parametrize(
    ("name", "mutant", "layout", "size"),
    [
        ("window_sums", without_the_last, "channels_last", 5),
        ("window_sums", without_the_last, "contiguous", 5),
        ("load_window", without_halo, "channels_last", 5),
        ("load_nchw", without_mask, "contiguous", 5),
        ("denominators", undivided, "channels_last", 5),
        ("denominators", undivided, "contiguous", 5),
        ("shifted_sums", shifted_by_one, "channels_last", 21),
        ("shifted_sums", shifted_by_one, "contiguous", 21),
        ("gradient_terms", wrong_exponent, "channels_last", 5),
        ("gradient_terms", wrong_exponent, "contiguous", 5),
        ("gradient_terms", wrong_exponent, "channels_last", 21),
    ],
)
def test_a_wrong_kernel_is_noticed(name, mutant, layout, size, monkeypatch):
    x, grad = sample((2, 24, 2, 2), torch.float16, layout)
    check(x, grad, **(STEEP | {"size": size}))
    monkeypatch.setattr(lrn, name, mutant)
    with pytest.raises(AssertionError, match="elements differ"):
        check(x, grad, **(STEEP | {"size": size}))


# ---- tensors of more than 2^31 elements, by construction


class Recorder:
    """Stands for a kernel: keeps the grid and the arguments of each launch."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, args, kwargs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "large"), [(7000, False), (7500, True)])
def test_work_items_become_64_bit(batch, large, layout):
    launches = []
    recording = replace(lrn.FORWARD, **dict.fromkeys(KERNELS, Recorder(launches)))
    x = torch.empty(batch, 96, 55, 55, device="meta", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    lrn.launch(recording, (x, x), 5, 1e-4, 0.75, 1.0, 1)
    ((grid, _, kwargs),) = launches
    assert kwargs["LARGE"] == large
    assert grid[0] < 2**31


CONSTANTS = {"CHANNELS": 96, "BELOW": 2, "ABOVE": 2, "SCALE": 1e-4, "BETA": 0.6, "K": 2.0}
SIZES = {
    "lrn_fwd_kernel": {"VEC": 8, "BLOCK": 128},
    "lrn_bwd_kernel": {"VEC": 8, "BLOCK": 128},
    "lrn_fwd_nchw_kernel": {"PLANE": 3025, "CHUNK": 16, "BLOCK": 128},
    "lrn_bwd_nchw_kernel": {"PLANE": 3025, "CHUNK": 16, "BLOCK": 128},
    "lrn_fwd_any_window_kernel": {"BLOCK": 16, "TILE": 128},
    "lrn_bwd_any_window_kernel": {"BLOCK": 16, "TILE": 128},
}


def job(kernel, target, large=False):
    constants = CONSTANTS | SIZES[kernel] | {"LARGE": large, "ASM": not isinstance(target, str)}
    pointers = {"x_ptr": "*fp16"} | ({"g_ptr": "*fp16", "dx_ptr": "*fp16"} if "bwd" in kernel else {"y_ptr": "*fp16"})
    item = "pixels" if "PLANE" in constants else "vectors" if "VEC" in constants else "rows"
    types = pointers | {item: "i64" if large else "i32"} | ({"plane": "i32"} if item == "rows" else {})
    return "lrn", kernel, types, constants, target


@pytest.fixture(scope="module")
def builds():
    jobs = {f"{kernel} {large}": job(kernel, 80, large) for kernel in SIZES for large in (False, True)}
    for kernel in SIZES:
        jobs[f"{kernel} gfx942"] = job(kernel, "gfx942")
    for kernel in ("lrn_fwd_kernel", "lrn_bwd_kernel"):
        jobs |= {f"{kernel} {target}": job(kernel, target) for target in (80, 90, 100)}
    return compiled(jobs)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kernel", SIZES)
def test_offsets_are_64_bit(kernel, large, builds):
    lines = builds[f"{kernel} {large}"]["ttir"].splitlines()
    offsets = [line for line in lines if "tt.addptr" in line and "xi64>" in line]
    # one for every pointer at least: what is left are lane numbers added to these
    assert len(offsets) >= (3 if "bwd" in kernel else 2)
    # A product in 32 bits wraps: only a work item's own number may be one, and the channel inside the group.
    narrow = [line for line in lines if "arith.muli" in line and "xi32>" in line]
    assert len(narrow) <= (0 if large else 2), narrow


def stays_in_registers(build, kernel):
    """No shared memory; Triton before 3.7 sends the backward pass's exchange between lanes through it."""
    shuffles = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)
    return build["shared"] == 0 or (kernel == "lrn_bwd_kernel" and not shuffles)


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["lrn_fwd_kernel", "lrn_bwd_kernel"])
def test_channels_last_kernels_stay_in_registers(kernel, target, builds):
    build = builds[f"{kernel} {target}"]
    assert stays_in_registers(build, kernel)
    assert "ld.global.v4.b32" in build["ptx"]
    assert "st.global.v4.b32" in build["ptx"]
    assert "ld.global.b16" not in build["ptx"]
    assert "lg2.approx.ftz" in build["ptx"]


@pytest.mark.parametrize("kernel", SIZES)
def test_amd_compiles(kernel, builds):
    build = builds[f"{kernel} gfx942"]
    assert "s_endpgm" in build["amdgcn"]
    if kernel in ("lrn_fwd_kernel", "lrn_bwd_kernel"):
        assert stays_in_registers(build, kernel)
        assert "global_load_dwordx4" in build["amdgcn"]
