"""Convolution with bias and ReLU, every algorithm against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from compiling import compiled
from tolerances import SLACK, UNIT_ROUNDOFF, assert_matches
from triton.runtime.interpreter import InterpreterBuilder

from fastalex.inspection import traffic
from fastalex.kernels.convolution import forward as module
from fastalex.kernels.convolution.config import Config, forward_config, split_tile
from fastalex.kernels.convolution.forward import ALGORITHMS, conv_relu, unsupported
from fastalex.kernels.geometry import output_size
from fastalex.kernels.registers import interpreting

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
NONE = ((0, 0), (0, 0))
ONES = ((1, 1), (1, 1))
# stride, padding, dilation, groups
PLAIN = ((1, 1), NONE, (1, 1), 1)
SAME = ((1, 1), ONES, (1, 1), 1)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def sample(shape, features, kernel, groups=1, dtype=SINGLE):
    """x, weight and bias; the weight's scale keeps outputs near 1."""
    fan = shape[1] // groups * kernel[0] * kernel[1]
    x = last(torch.randn(shape).to(dtype))
    weight = last((torch.randn(features, shape[1] // groups, *kernel) / fan**0.5).to(dtype))
    return x, weight, torch.randn(features).to(dtype)


def truth(x, weight, bias, stride, padding, dilation, groups):
    """float64 before the ReLU, and the sum of the absolute values that are added."""
    (top, bottom), (left, right) = padding

    def convolved(x, weight, bias):
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)

    bias = None if bias is None else bias.double()
    magnitude = convolved(x.double().abs(), weight.double().abs(), None if bias is None else bias.abs())
    return convolved(x.double(), weight.double(), bias), magnitude


def check(x, weight, bias, stride, padding, dilation, groups, *, algorithm, relu=True, against=None, **options):
    """y within the tolerance of float64; `against` is another geometry (mutants)."""
    geometry = (stride, padding, dilation, groups)
    expected, magnitude = truth(x, weight, bias, *(against or geometry))
    y = conv_relu(x, weight, bias, *geometry, algorithm=algorithm, relu=relu, **options)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    terms = weight[0].numel() + 1
    if options.get("precision") == "tf32":
        # factors lose what is behind their 10 bits
        magnitude = magnitude * (1 + 2.01 * 2**-10 / (UNIT_ROUNDOFF[SINGLE] * (terms + SLACK)))
    truncates = x.dtype == BRAIN and interpreting()
    expected = expected.relu() if relu else expected
    assert_matches(y, expected, terms=terms, magnitude=magnitude, truncates=truncates)
    return y


CASES = {
    "3x3, two groups": ((3, 32, 3, 4), 32, (3, 3), ((1, 1), ONES, (1, 1), 2)),
    "odd everything": ((2, 7, 4, 3), 5, (2, 3), ((2, 1), ((1, 0), (0, 2)), (1, 2), 1)),
    "48 = 32 + 16 channels, 96 = 64 + 32 features": ((2, 48, 2, 3), 96, (2, 2), ((1, 1), ((1, 0), (0, 1)), (1, 1), 1)),
    "two tiles of features, two of channels": ((2, 96, 1, 3), 192, (1, 2), PLAIN),
    "three groups, dilation 2": ((2, 48, 3, 3), 48, (3, 3), ((1, 1), ((2, 2), (2, 2)), (2, 2), 3)),
    "four groups, stride 2": ((2, 64, 3, 2), 64, (2, 2), ((2, 2), ((0, 1), (1, 1)), (1, 1), 4)),
    "one channel per group": ((2, 3, 3, 3), 6, (2, 2), ((1, 1), NONE, (1, 1), 3)),
    "conv1": ((2, 3, 8, 11), 12, (11, 11), ((4, 4), ((2, 2), (2, 2)), (1, 1), 1)),
    "one pixel": ((2, 16, 1, 1), 16, (1, 1), PLAIN),
    "one output": ((1, 200, 2, 2), 1, (2, 2), PLAIN),
    "windows in the padding alone": ((2, 16, 1, 2), 16, (2, 1), ((1, 2), ((3, 2), (1, 3)), (1, 1), 1)),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("case", CASES)
def test_values(case, dtype, algorithm):
    shape, features, kernel, geometry = CASES[case]
    x, weight, bias = sample(shape, features, kernel, geometry[-1], dtype)
    if unsupported(algorithm, x, weight, *geometry):
        pytest.skip("not for this algorithm")
    check(x, weight, bias, *geometry, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kernel", range(1, 12))
def test_kernels(kernel, algorithm):
    """Of 1 to 11, and strides of 1 to 4."""
    stride = (1 + kernel % 4, 1 + (kernel + 2) % 4)
    padding = ((kernel // 2, (kernel - 1) // 2), ((kernel - 1) // 2, kernel // 2))
    check(*sample((2, 16, 4, 3), 16, (kernel, kernel)), stride, padding, (1, 1), 1, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("batch", [1, 2, 3, 18, 130])
def test_batches(batch, algorithm):
    check(*sample((batch, 16, 2, 2), 16, (3, 3), dtype=HALF), *SAME, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tiles_beyond_the_ends(algorithm):
    """More than one tile of rows, the last one partial; tiles of two widths, more than one of them."""
    x, weight, bias = sample((18, 96, 2, 1), 96, (2, 1))
    config = Config(16, (32, 16), (32, 16), 4, 2, split_k=3 if algorithm == "split_k" else 1)
    check(x, weight, bias, *PLAIN, algorithm=algorithm, config=config)


@pytest.mark.parametrize("algorithm", [algorithm for algorithm in ALGORITHMS if algorithm != "descriptors"])
def test_partial_tiles_of_channels(algorithm):
    x, weight, bias = sample((3, 20, 2, 2), 22, (2, 2))
    config = Config(16, (16, 0), (16, 0), 4, 2, split_k=3 if algorithm == "split_k" else 1)
    check(x, weight, bias, *SAME, algorithm=algorithm, config=config)


@pytest.mark.parametrize("parts", [1, 2, 5, 9])
def test_parts_of_the_sum(parts):
    x, weight, bias = sample((1, 16, 3, 3), 16, (3, 3))
    check(x, weight, bias, *SAME, algorithm="split_k", config=Config(16, (16, 0), (16, 0), 4, 2, split_k=parts))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_bias_and_relu_are_optional(dtype, algorithm):
    x, weight, bias = sample((2, 16, 2, 2), 16, (2, 2), dtype=dtype)
    assert (check(x, weight, None, *PLAIN, algorithm=algorithm, relu=False) < 0).any()
    check(x, weight, None, *PLAIN, algorithm=algorithm)
    check(x, weight, bias.float().repeat_interleave(2)[::2], *PLAIN, algorithm=algorithm, relu=False)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tf32(algorithm):
    check(*sample((2, 32, 2, 2), 32, (2, 2)), *SAME, algorithm=algorithm, precision="tf32")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinities(value, algorithm):
    """They reach the outputs whose windows contain them and no others: what is skipped or masked is not read."""
    x, weight, bias = sample((3, 32, 3, 3), 16, (2, 2), dtype=HALF)
    x[1, 3, 1, 1] = value
    x[0, 31, 2, 2] = value
    bias[2] = value
    y = check(x, weight, bias, *SAME, algorithm=algorithm)
    assert y.isfinite().float().mean() > 0.7
    if value != value:
        assert y[:, 2].isnan().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_infinite_weight_at_the_border(algorithm):
    """torch multiplies the zeros of the padding, too: NaN.  Forms that skip them have nothing to multiply."""
    x, weight, bias = sample((1, 16, 2, 2), 16, (2, 2))
    weight[0, 0, 0, 0] = torch.inf
    y = conv_relu(x, weight, bias, *SAME, algorithm=algorithm)
    assert y[0, 0, 0].isnan().any() == (algorithm in ("spatial", "split_k"))
    assert y[:, 1:].isfinite().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layouts_that_are_copied(algorithm):
    x, weight, bias = sample((4, 16, 3, 3), 16, (2, 2))
    expected = check(x, weight, bias, *PLAIN, algorithm=algorithm)
    assert torch.equal(conv_relu(x.contiguous(), weight.contiguous(), bias, algorithm=algorithm), expected)
    wide = torch.randn(4, 32, 3, 3)
    wide[:, ::2] = x
    assert torch.equal(conv_relu(wide[:, ::2], weight, bias, algorithm=algorithm), expected)
    assert torch.equal(conv_relu(x[::2], weight, bias, algorithm=algorithm), expected[::2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty(algorithm):
    x, weight, bias = sample((0, 16, 3, 3), 32, (2, 2))
    assert conv_relu(x, weight, bias, algorithm=algorithm).shape == (0, 32, 2, 2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_runs_are_equal(algorithm):
    x, weight, bias = sample((3, 32, 3, 3), 32, (3, 3), dtype=HALF)
    runs = [conv_relu(x, weight, bias, *SAME, algorithm=algorithm) for _ in range(2)]
    assert torch.equal(*runs)


# ---- work and traffic


def valid_taps(size, kernel, stride, pads, dilation):
    """How many taps of all output positions lie in the image, in one dimension."""
    count = (size + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1
    positions = (i * stride - pads[0] + t * dilation for i, t in itertools.product(range(count), range(kernel)))
    return sum(0 <= position < size for position in positions)


def test_valid_taps():
    """What AlexNet's layers save."""
    assert valid_taps(13, 3, 1, (1, 1), 1) ** 2 / (13 * 3) ** 2 == pytest.approx(0.900, abs=5e-4)
    assert valid_taps(27, 5, 1, (2, 2), 1) ** 2 / (27 * 5) ** 2 == pytest.approx(0.913, abs=5e-4)


@pytest.mark.skipif(not interpreting(), reason="counts in the interpreter")
@pytest.mark.parametrize("algorithm", ["batch_tiled", "descriptors"])
@pytest.mark.parametrize(
    "geometry", [SAME, PLAIN, ((2, 1), ((2, 0), (1, 2)), (1, 1), 1), ((1, 2), ((2, 2), (2, 2)), (2, 2), 2)]
)
def test_taps_in_the_padding_are_not_multiplied(geometry, algorithm, monkeypatch):
    stride, padding, dilation, groups = geometry
    flops = []
    dot = InterpreterBuilder.create_dot

    def counted(self, a, b, *rest):
        flops.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    x, weight, bias = sample((16, 96, 4, 5), 96, (3, 3), groups)
    check(x, weight, bias, *geometry, algorithm=algorithm)
    taps = [
        valid_taps(size, 3, *rest)
        for size, rest in zip((4, 5), zip(stride, padding, dilation, strict=True), strict=True)
    ]
    # 96 = 64 + 32 and 48 = 32 + 16: nothing is padded
    assert sum(flops) == 2 * 16 * 96 * (96 // groups) * taps[0] * taps[1]
    oh, ow = output_size((4, 5), (3, 3), *geometry[:3])
    assert sum(flops) <= 2 * 16 * 96 * (96 // groups) * 9 * oh * ow


@pytest.mark.skipif(not interpreting(), reason="counts in the interpreter")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_sector_once(algorithm):
    """What `traffic` says of the convolutions of the catalogue."""
    x, weight, bias = sample((3, 32, 4, 3), 32, (3, 3), 2, dtype=HALF)
    with traffic.counting() as counted:
        y = conv_relu(x, weight, bias, (1, 1), ONES, (1, 1), 2, algorithm=algorithm)
    read, written = (sum(launch[i] for launch in counted) for i in (1, 2))
    parts = sum(launch[2] for launch in counted[:-1])
    assert parts == (
        4 * y.numel() * forward_config(algorithm, 3, 12, tuple(weight.shape), 2, HALF, "ieee", 80).split_k
        if len(counted) == 2
        else 0
    )
    assert read == 2 * (x.numel() + weight.numel() + bias.numel()) + parts
    assert written == 2 * y.numel() + parts


# ---- refusals


@pytest.mark.parametrize(
    ("count", "limit", "tiles"),
    [
        (96, 128, (64, 32)), (192, 128, (128, 64)), (384, 128, (128, 0)), (256, 128, (128, 0)), (64, 128, (64, 0)),
        (48, 64, (32, 16)), (192, 64, (64, 0)), (3, 64, (16, 0)), (100, 128, (128, 0)), (40, 64, (16, 0)),
        (20, 16, (16, 0)),
    ],
)  # fmt: skip
def test_split_tile(count, limit, tiles):
    assert split_tile(count, limit) == tiles


def meta(shape, dtype=HALF):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "fft"}, "algorithm must be one of .*got 'fft'"),
        ({"precision": "bf16x3"}, "precision must be 'ieee' or 'tf32', got 'bf16x3'"),
        ({"x": meta((16, 4, 4))}, r"x must have 4 dimensions, got shape \(16, 4, 4\)"),
        ({"weight": meta((16, 16, 3))}, "weight must have 4 dimensions"),
        ({"x": meta((2, 16, 4, 4), torch.float64)}, "x must be fp16, bf16 or fp32, got torch.float64"),
        ({"weight": meta((16, 16, 3, 3), BRAIN)}, "weight must be torch.float16 on meta as x, got torch.bfloat16"),
        ({"weight": torch.zeros(16, 16, 3, 3, dtype=HALF)}, "got torch.float16 on cpu"),
        ({"groups": 3}, "groups must divide the 16 output channels, got 3"),
        ({"groups": 0}, "groups must divide"),
        ({"groups": 2}, r"C = 16 and groups = 2, got \(16, 16, 3, 3\)"),
        ({"weight": meta((16, 16, 0, 3))}, r"got \(16, 16, 0, 3\)"),
        ({"bias": meta(17)}, r"bias must be .*\(16,\) on meta, got torch.float16 \(17,\)"),
        ({"bias": meta(16, torch.float64)}, "got torch.float64"),
        ({"bias": torch.zeros(16)}, "on cpu"),
        ({"stride": (1, 0)}, r"stride must be 1 or more, got \(1, 0\)"),
        ({"dilation": (0, 1)}, r"dilation must be 1 or more, got \(0, 1\)"),
        ({"padding": ((0, 0), (0, -1))}, r"padding must be 0 or more, got \(0, 0, 0, -1\)"),
        ({"dilation": (2, 1)}, r"x must be at least as large as the window .*got \(4, 4\)"),
        ({"x": meta((2, 16, 0, 4)), "padding": ((2, 2), (0, 0))}, r"x must be at least .*got \(0, 4\)"),
        ({"x": meta((2, 16, 70000, 2000))}, r"algorithm 'batch_tiled' .*2\*\*31"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": meta((2, 16, 4, 4)), "weight": meta((16, 16, 3, 3)), "algorithm": "batch_tiled", **change}
    with pytest.raises(ValueError, match=message):
        conv_relu(**arguments)


@pytest.mark.parametrize(
    ("algorithm", "x", "weight", "reason"),
    [
        ("descriptors", meta((2, 24, 4, 4)), meta((16, 24, 3, 3)), "input channels .* multiples of 16, got 24"),
        ("descriptors", meta((2, 16, 4, 4)), meta((24, 16, 3, 3)), "output channels .* multiples of 16, got 24"),
        ("descriptors", meta(2 * 16 * 16 + 1)[1:].view(2, 16, 4, 4), meta((16, 16, 3, 3)), "x to start at"),
        ("spatial", meta((2, 16, 40, 4)), meta((16, 16, 33, 3)), r"at most 31 x 31, got \(33, 3\)"),
        ("split_k", meta((40000, 16, 300, 300)), meta((16, 16, 3, 3)), r"fewer than 2\*\*31 output pixels"),
    ],
)
def test_algorithms_say_what_they_cannot(algorithm, x, weight, reason):
    assert unsupported("batch_tiled", x, weight, *PLAIN) is None
    with pytest.raises(ValueError, match=f"algorithm '{algorithm}' .*{reason}"):
        conv_relu(x, weight, algorithm=algorithm)


# ---- mutants, code


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_geometry_is_noticed(algorithm):
    sampled = sample((2, 32, 4, 4), 32, (3, 3), 2)
    for wrong in (((1, 1), ((0, 2), (1, 1)), (1, 1), 2), ((1, 1), ((1, 1), (2, 0)), (1, 1), 2)):
        with pytest.raises(AssertionError, match="elements differ"):
            check(*sampled, (1, 1), ONES, (1, 1), 2, algorithm=algorithm, against=wrong)


@triton.jit
def every_tap(start, size, TAPS: tl.constexpr, DILATION: tl.constexpr):
    return 0, TAPS


@triton.jit
def every_bit(start, size, TAPS: tl.constexpr, DILATION: tl.constexpr):
    return tl.full(start.shape, -1, tl.int32)


@triton.jit
def channels_only(r, s, c, s_first, s_stop, C_IN: tl.constexpr, BLOCK_K: tl.constexpr):
    return r, s, (c + BLOCK_K) % C_IN


@pytest.mark.skipif(not interpreting(), reason="a compiled kernel keeps the helpers that it was compiled with")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("helper", "mutant"), [("tap_range", every_tap), ("tap_bits", every_bit), ("next_step", channels_only)]
)
def test_wrong_taps_are_noticed(helper, mutant, algorithm, monkeypatch):
    used = helper == "next_step" or (helper == "tap_bits") == (algorithm in ("spatial", "split_k"))
    if not used:
        pytest.skip("not in this algorithm")
    monkeypatch.setattr(module, helper, mutant)
    # an image in the middle of others: what is read by mistake is memory of this test
    x = last(torch.randn(5, 32, 4, 4))
    _, weight, bias = sample((1, 32, 4, 4), 32, (3, 3))
    with pytest.raises(AssertionError, match="elements differ"):
        check(x[2:3], weight, bias, *SAME, algorithm=algorithm)


def test_offsets_of_images_are_64_bit():
    """And nothing else is."""
    pointers = dict.fromkeys(("weight", "bias_ptr"), "*fp16")
    sizes = dict.fromkeys(("h", "w", "oh", "ow"), "i32")
    shared = {"CONV": (32, 64, 1, 3, 3, 1, 1, 1, 1, 1, 1), "RELU": True, "PRECISION": "ieee"}
    shared["TILE"] = Config(64, (64, 0), (32, 0), 4, 3).tile
    absent = dict.fromkeys(("x_tail", "weight_k_tail", "weight_n_tail", "weight_tails", "y_tail"))
    batch = pointers | {"x": "*fp16", "y": "*fp16", "n": "i32"} | sizes
    spatial = {"x_ptr": "*fp16", "weight_ptr": "*fp16", "bias_ptr": "*fp16", "y_ptr": "*fp16", "pixels": "i32"} | sizes
    where = "convolution.forward"
    jobs = {
        "batch": (where, "conv_relu_batch_kernel", batch, shared | absent | {"DESCRIPTORS": False}, 80),
        "spatial": (where, "conv_relu_spatial_kernel", spatial, shared | {"SPLIT_K": 1}, 80),
    }
    for name, build in compiled(jobs).items():
        wide = [line for line in build["ttir"].splitlines() if "arith.muli" in line and "i64" in line]
        # image x elements of x and of y; the second kernel: of x, and part x pixels
        assert len(wide) >= 2, name
        assert all("x1xi64" in line or "<64xi64>" in line or ": i64" in line for line in wide)
