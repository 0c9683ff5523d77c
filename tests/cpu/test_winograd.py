"""fastalex.cpu.winograd against the float64 convolution, and when it is taken."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches

pytest.importorskip("numba")
from fastalex.cpu import conv_relu, winograd
from fastalex.cpu.conv_relu import conv_relu_fwd

GEOMETRY = (1, 1), (1, 1), (1, 1)
B = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
A = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def kernels():
    """Here the folder's two kinds of kernels would be one."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def magnitude(x, weight, bias, groups):
    """The same transforms of absolute values, in float64: what rounding errors are relative to."""
    height, width = x.shape[2:]
    padded = F.pad(x.double().abs(), (1, 1 + width % 2, 1, 1 + height % 2))
    tiles = padded.unfold(2, 4, 2).unfold(3, 4, 2).unflatten(1, (groups, -1))
    inputs = torch.einsum("ai,bj,ngcuvij->abguvnc", B.abs(), B.abs(), tiles)
    filters = winograd.transformed(weight.abs(), groups).double().unflatten(0, (4, 4, groups))
    products = torch.einsum("abguvnc,abgck->abguvnk", inputs, filters)
    sums = torch.einsum("ia,jb,abguvnk->ngkuivj", A.abs(), A.abs(), products)
    out = sums.flatten(1, 2).flatten(2, 3).flatten(3, 4)[:, :, :height, :width]
    return out if bias is None else out + bias.double().abs()[:, None, None]


@pytest.mark.parametrize("plane", [(13, 13), (1, 1), (2, 2), (1, 6), (6, 9), (40, 3)])
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(5, 7, 1), (12, 24, 2), (48, 32, 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_the_convolution(has_bias, channels, outputs, groups, plane, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", 30)  # several strips, the last one short, borders of images inside
    x = torch.randn(5, channels, *plane).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels // groups, 3, 3)
    bias = torch.randn(2 * outputs)[::2] if has_bias else None
    actual = winograd.conv_relu_fwd(x, winograd.transformed(weight, groups), bias, groups)
    wide_bias = None if bias is None else bias.double()
    expected = F.conv2d(x.double(), weight.double(), wide_bias, 1, 1, 1, groups).relu()
    assert actual.is_contiguous(memory_format=torch.channels_last)
    # the transforms add 4 + 4 terms each
    bound = magnitude(x, weight, bias, groups)
    assert_matches(actual, expected, terms=channels // groups + 16, magnitude=bound)


def test_nothing_is_left_of_earlier_calls(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    x = torch.randn(3, 8, 7, 5).to(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 3, 3)
    assert winograd.conv_relu_fwd(x, winograd.transformed(weight, 1), None, 1).isfinite().all()


def test_nan_of_the_input_arrives():
    x = torch.zeros(1, 8, 6, 6).to(memory_format=torch.channels_last)
    x[0, 3, 2, 2] = torch.nan
    y = winograd.conv_relu_fwd(x, winograd.transformed(torch.randn(8, 8, 3, 3), 1), None, 1)
    assert y[:, :, 1:4, 1:4].isnan().all()


def test_is_taken_for_weights_that_stay(monkeypatch):
    calls = []
    run = winograd.conv_relu_fwd
    monkeypatch.setattr(winograd, "conv_relu_fwd", lambda *args: (calls.append(1), run(*args))[1])
    x = torch.randn(2, 96, 6, 6).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(96, 96, 3, 3), torch.randn(96)
    outputs = [conv_relu_fwd(x, weight, bias, *GEOMETRY, 1) for _ in range(3)]
    assert len(calls) == 2
    assert torch.equal(outputs[1], outputs[2])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        weight.mul_(2)
    again = conv_relu_fwd(x, weight, bias, *GEOMETRY, 1)
    assert len(calls) == 2
    torch.testing.assert_close(conv_relu_fwd(x, weight, bias, *GEOMETRY, 1), again, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3
    # the same weight on more threads has another form
    torch.set_num_threads(2)
    torch.testing.assert_close(conv_relu_fwd(x, weight, bias, *GEOMETRY, 1), again, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv_relu_fwd(x, weight, bias, *GEOMETRY, 1), again, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "change",
    ["kernel", "stride", "padding", "dilation", "groups", "dtype", "layout", "threads"],
)
def test_leaves_the_rest_to_onednn(change, monkeypatch):
    x = torch.randn(1, 96, 6, 6).to(memory_format=torch.channels_last)
    weight = torch.randn(96, 96, 3, 3)
    stride, padding, dilation, groups = (*GEOMETRY, 1)
    assert winograd.suits(x, weight, stride, padding, dilation, groups)
    if change == "kernel":
        weight = torch.randn(96, 96, 1, 1)
    elif change == "stride":
        stride = (2, 2)
    elif change == "padding":
        padding = (0, 0)
    elif change == "dilation":
        dilation = (2, 2)
    elif change == "groups":
        groups, weight = 2, torch.randn(96, 48, 3, 3)
    elif change == "dtype":
        x, weight = x.bfloat16(), weight.bfloat16()
    elif change == "layout":
        x = x.contiguous()
    else:
        torch.set_num_threads(2)
    assert not winograd.suits(x, weight, stride, padding, dilation, groups)
    if conv_relu.has_fused_convolution():
        for _ in range(2):
            actual = conv_relu_fwd(x, weight, None, stride, padding, dilation, groups)
        expected = F.conv2d(x, weight, None, stride, padding, dilation, groups).relu()
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
