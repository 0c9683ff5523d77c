"""fastalex.cpu.conv_relu and fastalex.cpu.linear against PyTorch, and that a kept weight is never stale."""

import gc

import pytest
import torch
from tolerances import assert_matches

from fastalex import reference
from fastalex.cpu import conv_relu, linear
from fastalex.cpu.conv_relu import conv_relu_fwd
from fastalex.cpu.linear import linear_relu_fwd

GEOMETRIES = [  # stride, padding, dilation, groups
    ([1, 1], [0, 0], [1, 1], 1),
    ([2, 3], [1, 2], [1, 1], 2),
    ([1, 1], [2, 2], [2, 1], 1),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_convolution(dtype, geometry, layout, with_bias, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(conv_relu, "has_fused_convolution", lambda: False)
    x = torch.randn(2, 8, 13, 12).to(dtype).to(memory_format=layout)
    weight = torch.randn(6, 8 // geometry[-1], 3, 3).to(dtype).to(memory_format=layout)
    bias = torch.randn(6).to(dtype) if with_bias else None
    wide = [t if t is None else t.double() for t in (x, weight, bias)]
    expected = reference.conv2d_relu(*wide, *geometry)
    absolute = [t if t is None else t.abs() for t in wide]
    magnitude = reference.conv2d_relu(*absolute, *geometry)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for _ in range(3):  # the second call packs the weight, the third uses it
        y = conv_relu_fwd(x, weight, bias, *geometry)
        assert y.dtype == dtype
        assert_matches(y, expected, terms=weight[0].numel() + 1, magnitude=magnitude, compute_dtype=compute)


@pytest.mark.skipif(not conv_relu.has_fused_convolution(), reason="this PyTorch has no fused convolution")
def test_a_changed_weight_is_seen():
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(torch.randn(6, 8, 3, 3).to(memory_format=torch.channels_last))
    arguments = None, [1, 1], [1, 1], [1, 1], 1

    def check():
        with torch.no_grad():
            expected = torch.nn.functional.conv2d(x, weight, padding=1).relu()
            for _ in range(3):
                torch.testing.assert_close(conv_relu_fwd(x, weight, *arguments), expected)
        assert conv_relu._entries[id(weight)].prepared is not None

    check()
    with torch.no_grad():
        weight.mul_(-1)  # raises the version
    check()
    weight.data.mul_(2)  # does not
    check()
    weight.data = torch.randn_like(weight)
    check()


@pytest.mark.skipif(not conv_relu.has_fused_convolution(), reason="this PyTorch has no fused convolution")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_weight_serves_every_batch(dtype):
    if not conv_relu.has_onednn_dtype(dtype):
        pytest.skip(f"no {dtype} in oneDNN here")
    weight = torch.randn(6, 8, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    kept = []
    for batch in (2, 2, 3, 1, 2, 130):
        x = torch.randn(batch, 8, 9, 9).to(dtype).to(memory_format=torch.channels_last)
        y = conv_relu_fwd(x, weight, None, [1, 1], [1, 1], [1, 1], 1)
        expected = reference.conv2d_relu(x.double(), weight.double(), None, 1, 1)
        magnitude = reference.conv2d_relu(x.double().abs(), weight.double().abs(), None, 1, 1)
        assert_matches(y, expected, terms=73, magnitude=magnitude)
        kept.append(conv_relu._entries[id(weight)].prepared)
    assert kept[0] is None
    assert all(packed is kept[1] for packed in kept[1:])


def test_a_kept_weight_goes_with_its_weight():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    for _ in range(3):
        conv_relu_fwd(x, weight, None, [1, 1], [0, 0], [1, 1], 1)
    key = id(weight)
    assert key in conv_relu._entries or not conv_relu.has_fused_convolution()
    del weight
    gc.collect()
    assert key not in conv_relu._entries


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
        monkeypatch.setattr(linear, "has_fused_linear", lambda: False)
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
