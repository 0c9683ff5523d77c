"""Arguments in every form that torch.nn.functional takes, PyTorch's own samples among them, in any memory."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

from fastalex import backend, nn
from fastalex import functional as F

# it would freeze the settings of torch.backends for every test of this process
with mock.patch("torch.backends.disable_global_flags"):
    common = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError)
REFUSALS = (RuntimeError, ValueError, TypeError)
FUNCTIONS = {
    "conv2d": (F.conv2d_relu, lambda *args, **kwargs: TF.conv2d(*args, **kwargs).relu()),
    "max_pool2d": (F.max_pool2d, TF.max_pool2d),
    "local_response_norm": (F.local_response_norm, TF.local_response_norm),
}


def samples(name):
    (info,) = [op for op in common.op_db if op.name == f"nn.functional.{name}"]
    return info


@pytest.fixture(params=["auto", "triton"])
def mode(request):
    with backend.use(request.param):
        yield request.param


def compare(ours, theirs, inputs, **kwargs):
    """Outputs and gradients of the tensors among the inputs."""
    expected, got = theirs(*inputs, **kwargs), ours(*inputs, **kwargs)
    expected, got = (x if isinstance(x, tuple) else (x,) for x in (expected, got))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    grad = torch.randn_like(expected[0])
    pairs = zip(torch.autograd.grad(got[0], wanted, grad), torch.autograd.grad(expected[0], wanted, grad), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "count"), [("conv2d", 30), ("max_pool2d", 1440), ("local_response_norm", 11)])
def test_pytorchs_samples(name, count, mode):
    ours, theirs = FUNCTIONS[name]
    found = list(samples(name).sample_inputs("cpu", torch.float32, requires_grad=True))
    assert len(found) >= count
    if mode == "triton" and name == "max_pool2d":
        found = found[::8]  # the interpreter takes 60 ms each
    for sample in found:
        compare(ours, theirs, [sample.input, *sample.args], **sample.kwargs)


@pytest.mark.slow
def test_pytorchs_samples_of_pooling_by_the_kernels():
    with backend.use("triton"):
        for sample in samples("max_pool2d").sample_inputs("cpu", torch.float32, requires_grad=True):
            compare(F.max_pool2d, TF.max_pool2d, [sample.input, *sample.args], **sample.kwargs)


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d"])
def test_what_pytorch_refuses_is_refused(name, mode):
    ours, _ = FUNCTIONS[name]
    for wrong in samples(name).error_inputs("cpu"):
        sample = wrong.sample_input
        with pytest.raises(REFUSALS):
            ours(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("value", [2, [2], (2, 2), [2, 2], np.int64(2), (np.int32(2), 2), torch.Size([2, 2])])
def test_forms_of_two_numbers(value, mode):
    x, weight = torch.randn(2, 3, 9, 9, requires_grad=True), torch.randn(4, 3, 2, 2, requires_grad=True)
    for name in ("stride", "padding", "dilation"):
        compare(F.conv2d_relu, lambda x, w, **kw: TF.conv2d(x, w, **kw).relu(), [x, weight], **{name: value})
    compare(F.max_pool2d, TF.max_pool2d, [x], kernel_size=value, stride=value)
    assert torch.equal(
        F.lrn_max_pool2d(x, 5, kernel_size=value, stride=value), F.lrn_max_pool2d(x, 5, 1e-4, 0.75, 1.0, 2, 2)
    )
    assert nn.MaxPool2d(value, value)(x).shape == (2, 3, 4, 4)


def test_no_stride_is_the_windows(mode):
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    for stride in (None, [], ()):
        compare(F.max_pool2d, TF.max_pool2d, [x], kernel_size=3, stride=stride)
        assert torch.equal(F.lrn_max_pool2d(x, 5, kernel_size=3, stride=stride), F.lrn_max_pool2d(x, 5, stride=3))


@pytest.mark.parametrize("window", [(3, 3), (2, 3), (4, 2), (1, 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_in_words(padding, window, mode):
    x, weight = torch.randn(2, 3, 7, 8, requires_grad=True), torch.randn(4, 3, *window, requires_grad=True)
    for dilation in (1, 2):
        arguments = {"padding": padding, "dilation": dilation}
        compare(F.conv2d_relu, lambda x, w, **kw: TF.conv2d(x, w, **kw).relu(), [x, weight], **arguments)
    layer = nn.ConvReLU2d(3, 4, window, padding=padding)
    torch.testing.assert_close(layer(x), TF.conv2d(x, layer.weight, layer.bias, padding=padding).relu())


def test_padding_in_other_words():
    x, weight = torch.randn(2, 3, 7, 8), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match='padding must be "valid", "same" or numbers, got \'full\''):
        F.conv2d_relu(x, weight, padding="full")
    with pytest.raises(ValueError, match='padding="same" needs stride 1'):
        F.conv2d_relu(x, weight, stride=2, padding="same")
    with pytest.raises(ValueError, match="stride must be an int or two ints, got \\[1, 2, 3\\]"):
        F.conv2d_relu(x, weight, stride=[1, 2, 3])


def test_pictures_without_a_batch(mode):
    x, weight = torch.randn(3, 9, 9, requires_grad=True), torch.randn(4, 3, 2, 2, requires_grad=True)
    compare(F.conv2d_relu, lambda x, w: TF.conv2d(x, w).relu(), [x, weight])
    compare(F.conv2d_relu_max_pool2d, lambda x, w: TF.max_pool2d(TF.conv2d(x, w).relu(), 3, 2), [x, weight])
    compare(F.max_pool2d, TF.max_pool2d, [x], kernel_size=2, return_indices=True)


def test_windows_that_no_code_has_room_for(mode):
    x, weight = torch.randn(2, 3, 20, 20, requires_grad=True), torch.randn(8, 3, 2, 2, requires_grad=True)
    compare(F.max_pool2d, TF.max_pool2d, [x], kernel_size=12, stride=3, return_indices=True)
    norm = F.ResponseNorm(5, 1.0)
    apart = lambda x, w: TF.max_pool2d(TF.local_response_norm(TF.conv2d(x, w).relu(), 5, 1.0), 12, 3)  # noqa: E731
    compare(
        lambda x, w: F.conv2d_relu_max_pool2d(x, w, norm=norm, kernel_size=12, pool_stride=3), apart, [x, weight]
    )  # fmt: skip
    compare(F.lrn_max_pool2d, lambda x, **kw: TF.max_pool2d(TF.local_response_norm(x, 5), 12, 1), [x], size=5,
            kernel_size=12, stride=1)  # fmt: skip


def test_integers_are_pooled():
    x = torch.randint(-9, 9, (2, 3, 9, 9))
    assert torch.equal(F.max_pool2d(x, 3, 2), TF.max_pool2d(x, 3, 2))


# ------------------------------------------------------------------------------------------------- memory
def every_second(t):
    larger = torch.full([2 * size for size in t.shape], 77.0)
    larger[tuple(slice(0, None, 2) for _ in t.shape)] = t
    return larger[tuple(slice(0, None, 2) for _ in t.shape)]


MEMORY = {
    "every second": every_second,
    "a column": lambda t: torch.stack([torch.full_like(t, 77), t], -1)[..., 1],
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded everywhere": lambda t: t[(slice(0, 1),) * t.dim()].expand(t.shape),
    "offset": lambda t: torch.cat([torch.zeros(3), t.flatten()])[3:].view(t.shape),
    "transposed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "odd strides of size 1": lambda t: t[:1].as_strided(t[:1].shape, (7, *t.stride()[1:])) if t.dim() > 1 else t,
}


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("which", ["input", "weight", "bias", "grad"])
def test_any_memory(which, memory, mode):
    """Every tensor of every function, one after the other, against the same values in packed memory."""
    x, weight, bias = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3), torch.randn(8)
    matrix = torch.randn(8, 81)
    functions = {
        "conv": (lambda x, w, b: F.conv2d_relu(x, w, b), [x, weight, bias]),
        "stage": (lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, norm=F.ResponseNorm(5)), [x, weight, bias]),
        "no norm": (lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b), [x, weight, bias]),
        "linear": (lambda x, w, b: F.linear_relu_dropout(x, w, b, 0.0), [x.flatten(2), matrix, bias]),
        "lrn": (lambda x: F.local_response_norm(x, 5), [x]),
        "both": (lambda x: F.lrn_max_pool2d(x, 5), [x]),
        "pool": (lambda x: F.max_pool2d(x, 3, 2, 1), [x]),
    }
    for name, (function, tensors) in functions.items():
        index = ["input", "weight", "bias"].index(which) if which != "grad" else None
        if index is not None and index >= len(tensors):
            continue
        given = [memory(t) if i == index else t for i, t in enumerate(tensors)]
        if which == "weight" and given[1].shape[0] == 1:
            given[2] = given[2][:1]
        packed = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in given]
        given = [t.detach().requires_grad_() for t in given]
        got, expected = function(*given), function(*packed)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)
        grad = torch.randn(expected.shape)
        if which == "grad":
            grad = memory(grad)
            if grad.shape != expected.shape:
                continue
        pairs = zip(
            torch.autograd.grad(got, given, grad),
            torch.autograd.grad(expected, packed, grad.clone(memory_format=torch.contiguous_format)),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


# ------------------------------------------------------------------------------------------------- small shapes
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_few_channels(channels, dtype, layout, mode):
    x = (3 * torch.rand(2, channels, 28, 13)).to(dtype).contiguous(memory_format=layout).requires_grad_()
    wide = x.detach().double().requires_grad_()
    expected = TF.max_pool2d(TF.local_response_norm(wide, 5, 1.0, 0.75, 2.0), 3, 2)
    got = F.lrn_max_pool2d(x, 5, 1.0, 0.75, 2.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-3)
    apart = F.max_pool2d(F.local_response_norm(x, 5, 1.0, 0.75, 2.0), 3, 2)
    grad = torch.randn_like(got)
    grads = [torch.autograd.grad(y, x, grad)[0].double() for y in (got, apart)]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "window", "padding", "dilation"),
    [((10, 1), 2, 0, 1), ((4, 3), 3, 0, 2), ((1, 1), 3, 1, 1), ((1, 1), 2, 1, 1), ((1, 7), 3, 1, 1), ((1, 1), 4, 0, 1)],
)
def test_windows_larger_than_the_image(size, window, padding, dilation, layout, mode):
    x = torch.randn(2, 3, *size).contiguous(memory_format=layout).requires_grad_()
    arguments = {"kernel_size": window, "stride": 2, "padding": padding, "dilation": dilation, "ceil_mode": True}
    try:
        TF.max_pool2d(x, **arguments)
    except RuntimeError:
        with pytest.raises(ValueError, match="does not fit"):
            F.max_pool2d(x, **arguments)
    else:
        compare(F.max_pool2d, TF.max_pool2d, [x], **arguments, return_indices=True)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (0,), (2, 3, 0)])
def test_linear_layers_of_nothing(shape, mode):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(5, shape[-1], requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    ours = lambda x, w, b: F.linear_relu_dropout(x, w, b, 0.0)  # noqa: E731
    compare(ours, lambda x, w, b: TF.linear(x, w, b).relu(), [x, weight, bias])


def test_empty_planes_are_refused(mode):
    for shape in ((1, 0, 10, 10), (2, 1, 10, 0)):
        with pytest.raises(ValueError, match="may be empty in its batch only"):
            F.max_pool2d(torch.empty(shape), 1)
    assert F.max_pool2d(torch.empty(0, 3, 7, 7), 3, 2).shape == (0, 3, 3, 3)


def test_the_dilation_of_a_single_cell_is_none(mode):
    """oneDNN dies of it on narrow maps."""
    for shape, window, geometry in (
        ((2, 5, 12, 1), (2, 1), ((1, 4), (3, 3), (2, 3))),
        ((1, 4, 1, 1), (5, 1), (4, 2, (1, 3))),
        ((3, 2, 8, 1), (4, 1), ((3, 4), (3, 3), (3, 3))),
    ):
        x, weight, bias = torch.randn(shape), torch.randn(3, shape[1], *window), torch.randn(3)
        stride, padding, (rows, _) = geometry
        for x_ in (x, x.to(memory_format=torch.channels_last)):
            for _ in range(3):
                got = F.conv2d_relu(x_, weight, bias, *geometry)
            torch.testing.assert_close(got, TF.conv2d(x, weight, bias, stride, padding, (rows, 1)).relu())


# ------------------------------------------------------------------------------------------------- NaN
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinities(dtype, value, mode):
    x = torch.randn(2, 8, 9, 9).to(dtype)
    x[0, 3, 4, 4] = x[1, :, 1, 1] = value
    normed = TF.local_response_norm(x.float(), 5, 1.0)
    for got, expected in (
        (F.max_pool2d(x, 3, 2), TF.max_pool2d(x, 3, 2)),
        (F.local_response_norm(x, 5, 1.0), normed),
        (F.lrn_max_pool2d(x, 5, 1.0), TF.max_pool2d(normed, 3, 2)),
        (
            F.lrn_max_pool2d(x.relu(), 5, after_relu=True),
            TF.max_pool2d(TF.local_response_norm(x.float().relu(), 5), 3, 2),
        ),
        (F.linear_relu_dropout(x, x[0, 0], None, 0.0), TF.linear(x, x[0, 0]).relu()),
    ):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


def test_gradients_beside_nan_stay_zero_where_the_relu_was():
    x, weight = torch.randn(2, 3, 9, 9, requires_grad=True), torch.randn(8, 3, 3, 3, requires_grad=True)
    bias = torch.tensor([torch.nan, -99.0, 1, 1, -99, 1, 1, 1], requires_grad=True)
    y = F.conv2d_relu_max_pool2d(x, weight, bias, norm=F.ResponseNorm(5, 1.0))
    expected = TF.max_pool2d(TF.local_response_norm(TF.conv2d(x, weight, bias).relu(), 5, 1.0), 3, 2)
    assert torch.equal(y.isnan(), expected.isnan())
    got, wanted = (torch.autograd.grad(out.sum(), [weight, bias]) for out in (y, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert got[1][4] == 0


def test_windows_wholly_in_the_padding(mode):
    """Strided and dilated on one column: oneDNN dies of it."""
    for shape, window, groups, stride, padding, dilation in (
        ((1, 18, 14, 1), (5, 2), 3, (4, 4), (3, 3), (1, 2)),
        ((2, 5, 3, 1), (2, 2), 1, (2, 2), (1, 3), (3, 2)),
        ((2, 3, 1, 6), (2, 4), 1, (2, 2), (5, 0), (2, 1)),
    ):
        x, weight, bias = torch.randn(shape), torch.randn(6, shape[1] // groups, *window), torch.randn(6)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        got = F.conv2d_relu(x, weight, bias, stride, padding, dilation, groups)
        wide = TF.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation, groups).relu()
        torch.testing.assert_close(got.double(), wide, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (got, wide)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_strides_of_single_rows(mode):
    """A packed weight whose dimensions of one element have other strides than a new tensor's."""
    x = torch.randn(1, 2, 4, 4).to(memory_format=torch.channels_last)
    weight = torch.randn(2, 1, 2, 1).permute(3, 2, 1, 0).requires_grad_()
    assert weight.shape == (1, 2, 1, 2)
    compare(F.conv2d_relu, lambda x, w: TF.conv2d(x, w.contiguous()).relu(), [x, weight])
