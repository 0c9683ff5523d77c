"""fastalex.cpu.conv_relu and fastalex.cpu.linear against the reference."""

import pytest
import torch
from tolerances import assert_matches

from fastalex import private, reference
from fastalex.cpu import linear
from fastalex.cpu.conv_relu import conv_input_grad, conv_relu_fwd
from fastalex.cpu.linear import linear_relu_fwd

GEOMETRIES = [  # stride, padding, dilation, groups
    ([1, 1], [0, 0], [1, 1], 1),
    ([2, 3], [1, 2], [1, 1], 2),
    ([1, 1], [2, 2], [2, 1], 1),
]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_convolution(dtype, geometry, layout, with_bias):
    x = torch.randn(2, 8, 13, 12).to(dtype).to(memory_format=layout)
    weight = torch.randn(6, 8 // geometry[-1], 3, 3).to(dtype).to(memory_format=layout)
    bias = torch.randn(6).to(dtype) if with_bias else None
    wide = [t if t is None else t.double() for t in (x, weight, bias)]
    expected = reference.conv2d_relu(*wide, *geometry)
    absolute = [t if t is None else t.abs() for t in wide]
    magnitude = reference.conv2d_relu(*absolute, *geometry)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for _ in range(2):
        y = conv_relu_fwd(x, weight, bias, *geometry)
        assert y.dtype == dtype
        assert_matches(y, expected, terms=weight[0].numel() + 1, magnitude=magnitude, compute_dtype=compute)


def test_inference_tensors():
    with torch.inference_mode():
        x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
        expected = torch.nn.functional.conv2d(x, weight).relu()
        for _ in range(3):
            torch.testing.assert_close(conv_relu_fwd(x, weight, None, [1, 1], [0, 0], [1, 1], 1), expected)


def test_empty_batch():
    y = conv_relu_fwd(torch.empty(0, 4, 5, 5), torch.randn(4, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], 1)
    assert y.shape == (0, 4, 3, 3)


@pytest.mark.parametrize("path", ["fused", "addmv", "plain"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_linear(dtype, rows, with_bias, relu, path, monkeypatch):
    monkeypatch.setattr(linear, "prefers_addmv", lambda: path == "addmv")
    if path == "plain":
        monkeypatch.setattr(private, "has_onednn_linear", lambda: False)
    x, weight = torch.randn(rows, 20).to(dtype), torch.randn(9, 20).to(dtype)
    bias = torch.randn(9).to(dtype) if with_bias else None
    sums = x.double() @ weight.double().t()
    magnitude = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        sums, magnitude = sums + bias.double(), magnitude + bias.double().abs()
    y = linear_relu_fwd(x, weight, bias, relu)
    assert y.dtype == dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert_matches(y, sums.relu() if relu else sums, terms=21, magnitude=magnitude, compute_dtype=compute)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinities_are_torchs(dtype, value):
    x, weight, bias = torch.randn(2, 8, 9, 9).to(dtype), torch.randn(6, 8, 3, 3).to(dtype), torch.randn(6).to(dtype)
    for spoilt in (x[1, 2, 4:5, 4], weight[3, 2, 1:2, 1], bias[2:3]):
        before = spoilt.clone()
        spoilt.fill_(value)
        y = conv_relu_fwd(x, weight, bias, [1, 1], [1, 1], [1, 1], 1)
        expected = torch.nn.functional.conv2d(x, weight, bias, padding=1).relu()
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        rows, matrix = x.flatten(1), weight.flatten(1)[:, :60].repeat(1, 11)[:, :648]
        y = linear_relu_fwd(rows, matrix, bias)
        expected = torch.nn.functional.linear(rows, matrix, bias).relu()
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        spoilt.copy_(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_of_any_strides(dtype):
    x, weight, bias = torch.randn(20, 14).to(dtype).t(), torch.randn(40, 9).to(dtype).t()[:, ::2], torch.randn(18)[::2]
    bias = bias.to(dtype)
    for b in (bias, bias[:1].expand(9), bias.flip(0)[1:].new_zeros(9, 3)[:, 1]):
        y = linear_relu_fwd(x[:, :20], weight, b)
        wide = [t.double() for t in (x[:, :20], weight, b)]
        magnitude = wide[0].abs() @ wide[1].abs().t() + wide[2].abs()
        assert_matches(y, (wide[0] @ wide[1].t() + wide[2]).relu(), terms=21, magnitude=magnitude)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((31, 37), 11, 4, 2),
        ((33, 32), 11, 4, 2),
        ((40, 35), 3, 2, 0),
        ((9, 8), 5, 1, 2),
        ((7, 7), 1, 1, 0),
        ((20, 17), 2, 3, 1),
    ],
)
def test_input_gradient(size, kernel, stride, padding):
    """On blocks of pixels where the convolution is strided; pixels that no window reaches get zero."""
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, kernel, kernel, dtype=torch.float64)
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    found = conv_input_grad(grad, weight, size, stride, padding)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
