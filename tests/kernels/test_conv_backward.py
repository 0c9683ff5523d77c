"""The two gradients of a convolution against float64: geometries, tiles, mask and partial sums, order of the sums."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches
from triton.runtime.interpreter import InterpreterBuilder

from fastalex.inspection import catalog, traffic
from fastalex.kernels.convolution import config
from fastalex.kernels.convolution.input_grad import conv_input_grad, unsupported_input_grad
from fastalex.kernels.convolution.weight_grad import conv_weight_grad, unsupported_weight_grad
from fastalex.kernels.partial_sums import sum_partials
from fastalex.kernels.registers import interpreting
from fastalex.kernels.relu_bias_grad import relu_bias_grad

NONE = ((0, 0), (0, 0))
SAME = ((1, 1), (1, 1))
# images, channels and filters per group, (H, W), (R, S), stride, padding, dilation, groups
CASES = {
    "1x1": (1, 16, 16, (3, 2), (1, 1), (1, 1), NONE, (1, 1), 1),
    "3x3": (3, 16, 32, (3, 4), (3, 3), (1, 1), SAME, (1, 1), 2),
    "odd": (2, 20, 17, (4, 3), (3, 2), (1, 1), ((1, 0), (0, 1)), (1, 1), 1),
    "tails": (18, 48, 48, (2, 2), (2, 2), (1, 1), ((0, 1), (1, 0)), (1, 1), 1),
    "two tiles": (2, 192, 160, (1, 2), (1, 2), (1, 1), ((0, 0), (1, 0)), (1, 1), 2),
    "batch": (130, 16, 16, (2, 2), (2, 2), (1, 1), ((0, 0), (1, 1)), (1, 1), 1),
    "dilation": (2, 16, 16, (3, 4), (3, 3), (1, 1), ((2, 2), (2, 1)), (2, 2), 3),
    "4x4": (1, 8, 8, (3, 3), (4, 4), (1, 1), ((2, 1), (1, 2)), (1, 1), 1),
    "5x5": (1, 8, 24, (2, 1), (5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1), 4),
    "stride": (2, 16, 16, (5, 6), (3, 3), (2, 3), SAME, (1, 1), 1),
    "stride and dilation": (2, 16, 16, (7, 6), (3, 2), (2, 3), ((2, 0), (1, 2)), (2, 2), 1),
    "stride above the kernel": (2, 16, 16, (5, 4), (1, 2), (3, 3), NONE, (1, 1), 1),
    "taps that see padding only": (2, 16, 16, (2, 1), (3, 3), (1, 1), ((2, 2), (2, 2)), (2, 2), 1),
    "11x11": (1, 3, 8, (9, 11), (11, 11), (4, 4), ((2, 1), (1, 2)), (1, 1), 1),
}


def last(t):
    return t.contiguous(memory_format=torch.channels_last)


def sample(case, dtype):
    """grad, weight, x and the arguments behind them; the weight's scale keeps gradients near 1."""
    images, channels, filters, size, kernel, *geometry, groups = CASES[case]
    x = last(torch.randn(images, channels * groups, *size).to(dtype))
    scale = (filters * kernel[0] * kernel[1]) ** -0.5
    weight = last((scale * torch.randn(filters * groups, channels, *kernel)).to(dtype))
    out = convolution(x.float(), weight.float(), *geometry, groups)
    return last(torch.randn(out.shape).to(dtype)), weight, x, (*geometry, groups)


def exact_sample(case, dtype):
    """The same of numbers with 10 bits, which tf32 does not round: fp32's tolerance holds for its products."""
    *tensors, geometry = sample(case, torch.float16)
    return *(last(t.to(dtype)) for t in tensors), geometry


def convolution(x, weight, stride, padding, dilation, groups):
    (top, bottom), (left, right) = padding
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride, 0, dilation, groups)


def truth(grad, weight, x, geometry):
    """dx and dw in float64."""
    x = x.double().requires_grad_()
    weight = weight.double().requires_grad_()
    return torch.autograd.grad(convolution(x, weight, *geometry), (x, weight), grad.double())


def check(grad, weight, x, geometry, **options):
    """Both gradients within the tolerance of float64."""
    dx, dw = truth(grad, weight, x, geometry)
    magnitudes = truth(grad.abs(), weight.abs(), x.abs(), geometry)
    truncates = grad.dtype == torch.bfloat16 and interpreting()
    found = conv_input_grad(grad, weight, x.shape[2:], *geometry, **options)
    assert found.dtype == grad.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    terms = weight[:, 0].numel() // geometry[-1]
    assert_matches(found, dx, terms=terms, magnitude=magnitudes[0], truncates=truncates)
    found = conv_weight_grad(grad, x, weight.shape[2:], *geometry, **options)
    assert found.dtype == grad.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_matches(found, dw, terms=grad[:, 0].numel(), magnitude=magnitudes[1], truncates=truncates)


@pytest.mark.parametrize("case", CASES)
def test_values_in_fp16(case):
    check(*sample(case, torch.float16))


@pytest.mark.parametrize("case", ["3x3", "odd", "tails", "stride"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_in_other_dtypes(case, dtype):
    check(*sample(case, dtype))


@pytest.mark.parametrize("case", ["3x3", "tails", "stride and dilation"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_descriptors(case, dtype):
    grad, weight, x, geometry = exact_sample(case, dtype)
    options = {"descriptors": True, "precision": "tf32"}
    assert unsupported_input_grad(grad, weight, *geometry, **options) is None
    assert unsupported_weight_grad(grad, x, weight.shape[2:], *geometry, **options) is None
    check(grad, weight, x, geometry, **options)


@pytest.mark.parametrize("case", ["1x1", "3x3", "tails"])
def test_tf32(case):
    check(*exact_sample(case, torch.float32), precision="tf32")


def masking(case, dtype):
    """A ReLU's output with everything that a mask can meet."""
    *arguments, geometry = exact_sample(case, dtype)
    y = arguments[2].relu()
    special = torch.tensor([torch.nan, 0.0, -0.0, torch.inf, -1.0], dtype=dtype)
    y.movedim(1, -1).flatten()[: 5 * 7] = special.repeat(7)
    return *arguments[:2], y, geometry


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("case", ["3x3", "tails", "batch", "stride"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_mask_and_partial_sums(case, dtype, descriptors):
    """The bits of relu_bias_grad over the unmasked gradient; its sums, but from values before rounding."""
    grad, weight, y, geometry = masking(case, dtype)
    options = {"descriptors": descriptors, "precision": "tf32" if descriptors else "ieee"}
    plain = conv_input_grad(grad, weight, y.shape[2:], *geometry, **options)
    expected, bias = relu_bias_grad(plain, y)
    dx, partials = conv_input_grad(grad, weight, y.shape[2:], *geometry, relu_output=y, bias_partials=True, **options)
    assert torch.equal(dx, expected)
    assert (dx == 0).any()
    assert partials.dtype == torch.float32
    assert partials.shape[1] == y.shape[1]

    exact, _ = truth(grad, weight, y.nan_to_num(1, 1), geometry)
    size, _ = truth(grad.abs(), weight.abs(), y.nan_to_num(1, 1), geometry)
    open_ = ~(y <= 0)
    terms = weight[:, 0].numel() // geometry[-1] + y[:, 0].numel()
    sums = sum_partials(partials)
    assert_matches(sums, (exact * open_).sum((0, 2, 3)), terms=terms, magnitude=(size * open_).sum((0, 2, 3)))
    if dtype == torch.float32:
        assert_matches(sums, bias.double(), terms=2 * terms, magnitude=(size * open_).sum((0, 2, 3)))


@pytest.mark.parametrize("descriptors", [False, True])
def test_the_sum_is_taken_before_rounding(descriptors):
    """128 times 1 + 2^-12, which fp16 rounds to 1."""
    grad = last(torch.ones(2, 16, 8, 8, dtype=torch.float16))
    weight = torch.zeros(16, 16, 1, 1, dtype=torch.float16)
    weight[0] = 1
    weight[1] = 2.0**-12
    dx, partials = conv_input_grad(grad, weight, (8, 8), bias_partials=True, descriptors=descriptors)
    assert torch.equal(dx, torch.ones_like(dx))
    assert torch.equal(sum_partials(partials), torch.full((16,), 128 * (1 + 2.0**-12)))


def test_partial_sums_without_a_mask():
    grad, weight, x, geometry = sample("odd", torch.float32)
    dx, partials = conv_input_grad(grad, weight, x.shape[2:], *geometry, bias_partials=True)
    assert_matches(
        sum_partials(partials),
        dx.double().sum((0, 2, 3)),
        terms=x[:, 0].numel(),
        magnitude=dx.double().abs().sum((0, 2, 3)),
    )


@pytest.mark.parametrize("descriptors", [False, True])
def test_images_behind_the_batch_leave_no_trace(descriptors):
    """A tile has 16 rows: those behind the third image hold another image's numbers, or zeros times infinity."""
    grad, weight, x, geometry = sample("3x3", torch.float16)
    weight[0, 0, 1, 1] = torch.inf
    grad[2, 0, 1, 1] = 2.0
    dx, partials = conv_input_grad(grad, weight, x.shape[2:], *geometry, bias_partials=True, descriptors=descriptors)
    assert dx[:, 0].isinf().any()
    assert dx[:, 1:].isfinite().all()
    assert sum_partials(partials)[1:].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_where_they_belong(value, monkeypatch):
    # without padding: the reference multiplies it
    monkeypatch.setitem(CASES, "valid", (3, 16, 16, (3, 4), (2, 3), (1, 1), NONE, (1, 1), 1))
    grad, weight, x, geometry = sample("valid", torch.float16)
    grad[1, 3, 0, 1] = value
    x[2, 5, 1, 1] = value
    check(grad, weight, x, geometry)
    dw = conv_weight_grad(grad, x, weight.shape[2:], *geometry)
    assert dw.isfinite().any()
    assert not dw[3].isfinite().any()


def test_padding_is_not_multiplied():
    """Only taps that see the image: an infinite gradient meets no zero of the padding."""
    grad, weight, x, geometry = sample("3x3", torch.float16)
    x.fill_(1)
    grad.fill_(0)
    grad[0, 0, 0, 0] = torch.inf
    dw = conv_weight_grad(grad, x, weight.shape[2:], *geometry)
    assert torch.equal(dw[0, 0], torch.tensor([[0, 0, 0], [0, torch.inf, torch.inf], [0, torch.inf, torch.inf]]).half())


@pytest.mark.skipif(not interpreting(), reason="counts in the interpreter")
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("case", ["whole tiles", "whole tiles, strided"])
def test_only_products_of_taps_in_the_image(case, descriptors, monkeypatch):
    """16 images and channels in 16s: a tile wastes nothing, so each pair of an output and a tap counts once."""
    geometry = ((2, 1), SAME, (1, 2), 2) if "strided" in case else ((1, 1), SAME, (1, 1), 2)
    monkeypatch.setitem(CASES, case, (16, 48, 48, (3, 3), (3, 3), *geometry))
    grad, weight, x, geometry = sample(case, torch.float16)
    flops = []
    dot = InterpreterBuilder.create_dot

    def counted(self, a, b, *rest):
        flops.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    pairs = int(convolution(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), *geometry[:-1], 1).sum())
    expected = 2 * 16 * 48 * 48 * 2 * pairs
    conv_input_grad(grad, weight, x.shape[2:], *geometry, descriptors=descriptors)
    assert sum(flops) == expected
    flops.clear()
    conv_weight_grad(grad, x, weight.shape[2:], *geometry, descriptors=descriptors)
    assert sum(flops) == expected


@pytest.mark.skipif(not interpreting(), reason="counts in the interpreter")
def test_every_sector_once(monkeypatch):
    """What `traffic` says of the gradients in the catalogue."""
    monkeypatch.setattr(config, "WEIGHT_GRAD_STEPS", 4)
    grad, weight, x, geometry = sample("3x3", torch.float16)
    with traffic.counting() as counted:
        _, partials = conv_input_grad(grad, weight, x.shape[2:], *geometry, relu_output=x, bias_partials=True)
        sum_partials(partials)
        conv_weight_grad(grad, x, weight.shape[2:], *geometry)
    x_bytes, weight_bytes, grad_bytes = (2 * t.numel() for t in (x, weight, grad))
    parts = 3 * 2 * weight_bytes
    assert [moved[1:] for moved in counted] == [
        (grad_bytes + weight_bytes + x_bytes, x_bytes + 4 * partials.numel()),
        (4 * partials.numel(), 4 * x.shape[1]),
        (grad_bytes + x_bytes, parts),
        (parts, weight_bytes),
    ]


def launched(monkeypatch, programs, *arguments):
    """The number of parts, and dw, with so many programs wanted."""
    monkeypatch.setattr(config, "WEIGHT_GRAD_PROGRAMS", programs)
    with catalog.recording() as launches:
        conv_weight_grad(*arguments)
    return launches[0].constants["SPLIT_K"], conv_weight_grad(*arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_number_of_parts_gives_the_sum(dtype, monkeypatch):
    """1, 2 and 5 parts of 9 steps (fp16); 5 do not divide them: the last parts are short or empty."""
    monkeypatch.setattr(config, "WEIGHT_GRAD_STEPS", 1)
    grad, weight, x, geometry = sample("batch", dtype)
    _, dw = truth(grad, weight, x, geometry)
    _, magnitude = truth(grad.abs(), weight.abs(), x.abs(), geometry)
    tiles = 4
    for parts in (1, 2, 5):
        count, found = launched(monkeypatch, parts * tiles, grad, x, weight.shape[2:], *geometry)
        assert count == parts
        assert_matches(found, dw, terms=grad[:, 0].numel(), magnitude=magnitude)


@pytest.mark.parametrize("descriptors", [False, True])
def test_two_runs_are_equal_to_the_bit(descriptors, monkeypatch):
    monkeypatch.setattr(config, "WEIGHT_GRAD_STEPS", 4)
    grad, weight, y, geometry = masking("tails", torch.float32)
    masks = {"relu_output": y, "bias_partials": True}
    options = {"descriptors": descriptors, "precision": "tf32"}
    first, second = (conv_input_grad(grad, weight, y.shape[2:], *geometry, **masks, **options) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    x = y.nan_to_num(1, 1)
    first, second = (conv_weight_grad(grad, x, weight.shape[2:], *geometry, **options) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", ["contiguous", "every second channel", "expanded"])
def test_other_layouts_are_copied(layout):
    grad, weight, x, geometry = sample("1x1", torch.float16)
    view = {
        "contiguous": lambda t: t.contiguous(),
        "every second channel": lambda t: torch.stack([t, t], 2).flatten(1, 2)[:, ::2],
        "expanded": lambda t: t[:, :1].expand(t.shape),
    }[layout]
    check(view(grad), view(weight), view(x), geometry)


def test_empty_batch():
    grad, weight, x, geometry = sample("3x3", torch.float16)
    dx, partials = conv_input_grad(grad[:0], weight, x.shape[2:], *geometry, bias_partials=True)
    assert dx.shape == x[:0].shape
    assert torch.equal(sum_partials(partials), torch.zeros(x.shape[1]))
    dw = conv_weight_grad(grad[:0], x[:0], weight.shape[2:], *geometry)
    assert torch.equal(dw, torch.zeros_like(weight))


@pytest.mark.parametrize("descriptors", [False, True])
def test_no_offset_overflows(descriptors):
    """2^31 elements and more of grad, x and dx, on meta tensors: batch offsets are 64-bit, grids stay small."""
    n = 2**31 // (16 * 64 * 64)
    t = last(torch.empty(n, 16, 64, 64, dtype=torch.float16, device="meta"))
    weight = last(torch.empty(16, 16, 1, 1, dtype=torch.float16, device="meta"))
    with catalog.recording() as launches:
        conv_input_grad(t, weight, (64, 64), bias_partials=True, descriptors=descriptors)
        conv_weight_grad(t, t, (1, 1), descriptors=descriptors)
    assert all(launch.programs < 2**31 for launch in launches)


def wrong(**changes):
    grad, weight, x, (stride, padding, dilation, groups) = sample("3x3", torch.float16)
    arguments = {
        "grad": grad,
        "weight": weight,
        "x": x,
        "input_size": x.shape[2:],
        "kernel_size": weight.shape[2:],
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "relu_output": None,
        "precision": "ieee",
        "descriptors": False,
    }
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


BOTH = {
    "grad must have 4 dimensions": {"grad": lambda t: t[0]},
    "grad must be fp16, bf16 or fp32, got torch.float64": {"grad": lambda t: t.double()},
    "grad must have the dtype of": {"grad": lambda t: t.float()},
    "groups must be at least 1": {"groups": lambda groups: 0},
    r"at least 1, got \(3, 3\), \(0, 1\)": {"stride": lambda stride: (0, 1)},
    "padding must not be negative": {"padding": lambda padding: ((1, 1), (-1, 1))},
    "descriptors need fp16, bf16 or tf32": {
        "grad": lambda t: t.float(),
        "weight": lambda t: t.float(),
        "x": lambda t: t.float(),
        "descriptors": lambda descriptors: True,
    },
    "multiple of 5 groups": {"groups": lambda groups: 5},
    r"grad must have shape \(3, 64, 3, 4\)": {"grad": lambda t: t[:, :, :2]},
    'precision must be "ieee" or "tf32"': {"precision": lambda precision: "half"},
    "channels per group in multiples of 16": {"groups": lambda groups: 8, "descriptors": lambda d: True},
}
INPUT = {
    "weight must have 4 dimensions": {"weight": lambda t: t[0]},
    "a channel per filter of weight, 32": {"weight": lambda t: t[:32]},
    "relu_output must be torch.float16 of shape": {"relu_output": lambda t: torch.zeros(3, 32, 3, 3).half()},
    "relu_output must be torch.float16": {"relu_output": lambda t: torch.zeros(3, 32, 3, 4)},
    "relu_output to start at a multiple of 16 bytes": {
        "relu_output": lambda t: torch.zeros(3 * 4 * 32 * 3 + 1).half()[1:].view(3, 3, 4, 32).movedim(-1, 1),
        "descriptors": lambda descriptors: True,
    },
    "for an input of (3, 5)": {"input_size": lambda size: (3, 5)},
}
WEIGHT = {
    "x must have 4 dimensions": {"x": lambda t: t[0]},
    "x must have a multiple of 2 groups": {"x": lambda t: t[:, :31]},
    "x to start at a multiple of 16 bytes": {
        "x": lambda t: torch.zeros(3 * 4 * 32 * 3 + 1).half()[1:].view(3, 3, 4, 32).movedim(-1, 1),
        "descriptors": lambda descriptors: True,
    },
    "grad must have shape (2,": {"x": lambda t: t[:2]},
    "kernel of (2, 3)": {"kernel_size": lambda size: (2, 3)},
}


@pytest.mark.parametrize("message", [*BOTH, *INPUT])
def test_bad_arguments_of_the_input_gradient(message):
    a = wrong(**(BOTH | INPUT)[message])
    names = ("grad", "weight", "input_size", "stride", "padding", "dilation", "groups")
    pattern = message if message in BOTH else message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=pattern):
        conv_input_grad(
            *(a[name] for name in names),
            relu_output=a["relu_output"],
            descriptors=a["descriptors"],
            precision=a["precision"],
        )


@pytest.mark.parametrize("message", [*BOTH, *WEIGHT])
def test_bad_arguments_of_the_weight_gradient(message):
    a = wrong(**(BOTH | WEIGHT)[message])
    names = ("grad", "x", "kernel_size", "stride", "padding", "dilation", "groups")
    pattern = message if message in BOTH else message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=pattern):
        conv_weight_grad(*(a[name] for name in names), descriptors=a["descriptors"], precision=a["precision"])


def test_reasons_before_the_call():
    """What a dispatcher asks: None for what runs, the launcher's own message otherwise."""
    grad, weight, x, geometry = sample("3x3", torch.float16)
    assert unsupported_input_grad(grad, weight, *geometry) is None
    assert unsupported_weight_grad(grad, x, (3, 3), *geometry) is None
    reason = unsupported_input_grad(grad.double(), weight.double(), *geometry)
    assert reason == "grad must be fp16, bf16 or fp32, got torch.float64"
    huge = torch.empty(1, 2**21, 64, 16, dtype=torch.float16, device="meta")
    filters = torch.empty(2**21, 1, 1, 1, dtype=torch.float16, device="meta")
    assert "less than 2^31 elements" in unsupported_input_grad(huge, filters, (1, 1), NONE, (1, 1), 1)
    assert "less than 2^31 elements" in unsupported_weight_grad(huge, huge, (1, 1), (1, 1), NONE, (1, 1), 1)
