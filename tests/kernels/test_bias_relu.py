"""Bias, ReLU and dropout in place against float64 and against Philox written out here."""

import pytest
import torch
import triton
import triton.language as tl
from compiling import compiled
from tolerances import assert_matches

from fastalex.kernels import bias_relu as module
from fastalex.kernels.bias_relu import bias_relu_
from fastalex.kernels.registers import interpreting
from fastalex.kernels.relu_bias_grad import relu_bias_grad

LAYOUTS = ("channels_last", "contiguous")
SHAPES = [(2, 96, 5, 7), (3, 100, 3, 3), (5, 3, 3, 3), (2, 1, 3, 5), (9, 64), (7, 5), (2, 24, 5), (2, 16, 2, 3, 2)]


def in_layout(x, layout):
    if layout == "contiguous":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sample(shape, dtype=torch.float16, layout="channels_last"):
    return in_layout(torch.randn(shape).to(dtype), layout), torch.randn(shape[1]).to(dtype)


def per_channel(bias, z):
    return bias.double().view(-1, *[1] * (z.dim() - 2))


def check(z, bias, truth=None):
    """y within the tolerance of float64; `truth` is another pre-activation (mutants).  z is not touched."""
    added = 0 if bias is None else per_channel(bias, z)
    expected = torch.relu(z.double() + added if truth is None else truth)
    y = z.clone()
    assert bias_relu_(y, bias) is y
    assert y.stride() == z.stride()
    truncates = z.dtype == torch.bfloat16 and interpreting()
    magnitude = z.double().abs() + (0 if bias is None else added.abs())
    assert_matches(y, expected, magnitude=magnitude, truncates=truncates)
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, layout, dtype):
    check(*sample(shape, dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_bias(layout):
    z, _ = sample((2, 24, 3, 3), layout=layout)
    assert torch.equal(check(z, None), torch.relu(z))


def test_a_wider_or_strided_bias():
    z, _ = sample((2, 24, 3, 3))
    check(z, torch.randn(24))
    check(z, torch.randn(48)[::2])
    check(z, torch.randn(()).expand(24))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_behind_the_end_is_touched(layout):
    """Several programs, the last one partial: in place, work done twice would add the bias twice."""
    memory = torch.full((3000 + 2048,), -7.0)
    z = in_layout(torch.randn(5, 24, 5, 5), layout)
    view = memory[:3000].as_strided(z.shape, z.stride()).copy_(z)
    bias = torch.randn(24)
    expected = check(z, bias)
    assert torch.equal(bias_relu_(view, bias), expected)
    assert (memory[3000:] == -7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_and_infinities_are_kept(layout):
    z, bias = sample((2, 24, 3, 3), layout=layout)
    z[0, :3, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    bias[5] = torch.nan
    y = check(z, bias)
    assert y[0, :3, 0, 0].isnan().tolist() == [True, False, False]
    assert y[:, 5].isnan().all()


@pytest.mark.parametrize("shape", [(0, 8, 2, 2), (2, 8, 0, 3), (2, 0, 2, 3), (0, 8)])
def test_empty(shape):
    z = torch.zeros(shape)
    assert bias_relu_(z, torch.zeros(shape[1]), p=0.5, seed=torch.tensor([1])) is z


# ---- dropout


def philox(seed, block):
    """Four 32-bit words of Philox4x32-10 (Salmon et al. 2011) for counter (block, 0, 0, 0)."""
    c, key = [block, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            high >> 32 ^ c[1] ^ key[0],
            high & 0xFFFFFFFF,
            low >> 32 ^ c[3] ^ key[1],
            low & 0xFFFFFFFF,
        ]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def test_the_philox_above_is_philox():
    """The published test vector for counter and key zero."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def kept(count, p, seed):
    """Which of `count` elements, in memory order, stay: a word as a signed fraction, folded to [0, 1)."""
    words = torch.tensor([philox(seed, block) for block in range(-(-count // 4))]).flatten()[:count]
    signed = torch.where(words >= 2**31, words - 2**32, words)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return (folded.float() * 4.6566127342e-10) >= p


@pytest.mark.parametrize("seed", [0, 1234567890123456789, -5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dropped_places_are_philoxs(dtype, seed):
    z = (torch.rand(7, 64) + 0.5).to(dtype)
    y = bias_relu_(z.clone(), p=0.3, seed=torch.tensor([seed]))
    expected = torch.where(kept(z.numel(), 0.3, seed).view(z.shape), z.double() / 0.7, 0)
    assert_matches(y, expected, truncates=dtype == torch.bfloat16 and interpreting())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 5, 5), (3, 5, 3, 3), (9, 64), (3, 7)])
def test_kept_values_are_scaled(shape, layout):
    z, bias = sample(shape, torch.float32, layout)
    plain = check(z, bias)
    y = bias_relu_(z.clone(), bias, p=0.25, seed=torch.tensor([7]))
    zero = y == 0
    assert_matches(y[~zero], plain[~zero].double() / 0.75)
    memory = kept(z.numel(), 0.25, 7)
    mask = torch.empty_like(z, dtype=torch.bool)
    mask.as_strided((z.numel(),), (1,)).copy_(memory)
    assert torch.equal(zero, ~mask | (plain == 0))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements(p):
    count = 64 * 1024
    y = bias_relu_(torch.ones(64, 1024), p=p, seed=torch.tensor([42]))
    share = (y == 0).double().mean().item()
    # five standard deviations of a binomial share
    assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_everything_or_nothing():
    z, bias = sample((4, 64))
    assert torch.equal(bias_relu_(z.clone(), bias, p=0.0, seed=torch.tensor([3])), check(z, bias))
    assert not bias_relu_(z.clone(), bias, p=1.0, seed=torch.tensor([3])).any()


def test_seeds_decide():
    z = torch.ones(8, 64)
    draws = [bias_relu_(z.clone(), p=0.5, seed=torch.tensor([seed])) for seed in (1, 1, 2, 1 + 2**32)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_a_dropped_nan_is_zero():
    z = torch.full((8, 64), torch.nan)
    y = bias_relu_(z, p=0.5, seed=torch.tensor([1]))
    assert torch.equal(y.isnan().flatten(), kept(512, 0.5, 1))
    assert (y[~y.isnan()] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_is_all_that_backward_needs(layout):
    z, bias = sample((3, 24, 4, 4), torch.float32, layout)
    y = bias_relu_(z.clone(), bias, p=0.4, seed=torch.tensor([11]))
    mask = torch.empty_like(z)
    mask.as_strided((z.numel(),), (1,)).copy_(kept(z.numel(), 0.4, 11))
    wide = z.double().requires_grad_()
    grad = torch.randn_like(z)
    expected = torch.relu(wide + per_channel(bias, z)) * mask.double() / 0.6
    (gradient,) = torch.autograd.grad(expected, wide, grad.double())
    dz, db = relu_bias_grad(grad, y, scale=1 / 0.6)
    assert_matches(dz, gradient)
    assert_matches(db, gradient.sum((0, 2, 3)), terms=48, magnitude=gradient.abs().sum((0, 2, 3)))


# ---- refusals, mutants, code


ONE = torch.tensor([1])


@pytest.mark.parametrize(
    ("z", "arguments", "message"),
    [
        (torch.zeros(4), {}, "2 or more dimensions"),
        (torch.zeros(2, 3).double(), {}, "z must be fp16, bf16 or fp32, got torch.float64"),
        (torch.zeros(2, 6)[:, ::2], {}, r"packed.*got strides \(6, 2\)"),
        (torch.zeros(1, 3).expand(2, 3), {}, "packed"),
        (torch.zeros(2, 3), {"bias": torch.zeros(4)}, r"bias must be .* \(3,\), got torch.float32 \(4,\)"),
        (torch.zeros(2, 3), {"bias": torch.zeros(3).double()}, "got torch.float64"),
        (torch.zeros(2, 3), {"p": 1.5, "seed": ONE}, "p must lie between 0 and 1, got 1.5"),
        (torch.zeros(2, 3), {"p": 0.5}, "seed must be one int64 on cpu where p > 0, got None"),
        (torch.zeros(2, 3), {"p": 0.5, "seed": ONE.int()}, "got torch.int32"),
        (torch.zeros(2, 3), {"p": 0.5, "seed": torch.tensor([1, 2])}, r"got torch.int64 \(2,\)"),
    ],
)
def test_refusals(z, arguments, message):
    with pytest.raises(ValueError, match=message):
        bias_relu_(z, **arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_bias_is_noticed(layout):
    z, bias = sample((2, 24, 3, 3), layout=layout)
    for wrong in (bias.roll(1), bias.roll(-8), torch.zeros_like(bias), 2 * bias):
        with pytest.raises(AssertionError, match="elements differ"):
            check(z, bias, truth=z.double() + per_channel(wrong, z))


@triton.jit
def one_draw_per_vector(seed, vector, VEC: tl.constexpr):
    u = tl.rand(seed, vector)
    out = ()
    for _ in tl.static_range(VEC):
        out = out + (u,)
    return out


@pytest.mark.skipif(not interpreting(), reason="a compiled kernel keeps the helpers that it was compiled with")
def test_repeated_random_numbers_are_noticed(monkeypatch):
    monkeypatch.setattr(module, "uniforms", one_draw_per_vector)
    with pytest.raises(AssertionError, match="elements differ"):
        test_dropped_places_are_philoxs(torch.float16, 0)


@pytest.mark.parametrize(("batch", "large"), [(7000, False), (7500, True)])
def test_elements_become_64_bit(batch, large, monkeypatch):
    seen = {}

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.update(kwargs)

    monkeypatch.setattr(module, "bias_relu_kernel", Recorder())
    bias_relu_(torch.empty(batch, 96, 55, 55, device="meta", dtype=torch.float16))
    assert seen["LARGE"] == large


def test_compiled_code():
    """16-byte accesses in both layouts, no shared memory, 64-bit offsets, also for AMD."""
    types = {"z_ptr": "*fp16", "bias_ptr": "*fp16", "seed_ptr": "*i64", "count": "i32", "p": "fp32", "scale": "fp32"}
    sizes = {"CHANNELS": 96, "VEC": 8, "WHOLE": True, "BLOCK": 128}
    jobs = {}
    for inner in (1, 3025):
        for target in (80, 90, 100, "gfx942"):
            constants = sizes | {"INNER": inner, "LARGE": False}
            jobs[f"{inner} {target}"] = ("bias_relu", "bias_relu_kernel", types, constants, target)
    large = sizes | {"INNER": 3025, "LARGE": True}
    jobs["large"] = ("bias_relu", "bias_relu_kernel", types | {"count": "i64"}, large, 80)
    for name, build in compiled(jobs).items():
        assert build["shared"] == 0
        if "gfx942" in name:
            assert "global_load_dwordx4" in build["amdgcn"]
        else:
            assert "ld.global.v4.b32" in build["ptx"]
            assert "st.global.v4.b32" in build["ptx"]
        offsets = [line for line in build["ttir"].splitlines() if "tt.addptr" in line and "xi64>" in line]
        # of z, shared by its load and its store
        assert offsets
